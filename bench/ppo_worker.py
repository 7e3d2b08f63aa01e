"""One PPO trainer in a process of its own: ours, or TRL's (peers/trl_ppo.py).

    python -m fastrlhf.bench.ppo_worker PLAN.json

The last line on standard output is JSON: {"iterations": [...]}, each with

    seconds         from the end of the one before (the first: from the start of training)
    cpu_seconds     of all threads in that time: what is left of a comparison on a machine that others use too
    phases          seconds of each phase, as far as the provider tells them apart
    before          the same, of what came before the training
    optimizer_steps counted by torch's own hooks
    peak_mib        highest resident set of the process so far, without the loading of models
    update_mib      by how much the update grew the resident set at its highest, where the plan asks for that (ours)
    metrics         what the trainer logged
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastrlhf.bench.measure import forget_high_water, resident
from fastrlhf.demo.workspace import release_memory

OURS, TRL = "ours", "TRL"
SCORES = "objective/scores"


@dataclass
class Plan:
    """provider: OURS or TRL. policy, reward_model, value_model: folders; without a value model, ours puts the value
    head on the policy's trunk. dtype: of all weights. prompts: texts. arguments: of the provider's PPOConfig. eos:
    whether EOS ends our responses (TRL's `stop_token` is among its arguments). as_written: ours are scored as they
    stand, as TRL's are. watch_update: look at the memory of our updates, which costs them time.
    """

    provider: str
    policy: str
    reward_model: str
    value_model: str | None
    dtype: str
    attention: str
    prompts: list[str]
    arguments: dict[str, Any]
    threads: int
    eos: bool = False
    as_written: bool = False
    watch_update: bool = False


@dataclass
class Phases:
    """Seconds spent in functions, under names, and the optimiser's steps, since `take` was called last."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: int = 0

    def of(self, name: str | Callable[[], str], function: Callable) -> Callable:
        """`function`, its time booked under `name`, or what name() says."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name()):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    @contextmanager
    def of_optimizers(self) -> Iterator[None]:
        """Counts and times the steps of every optimiser; one inside another (of master weights) is a part of it."""
        from torch.optim import optimizer

        begun: list[float] = []

        def after(*_: Any) -> None:
            start = begun.pop()
            if not begun:
                self.steps += 1
                self.seconds["optimizer"] += time.perf_counter() - start

        hooks = [
            optimizer.register_optimizer_step_pre_hook(lambda *_: begun.append(time.perf_counter())),
            optimizer.register_optimizer_step_post_hook(after),
        ]
        yield
        for hook in hooks:
            hook.remove()

    def take(self) -> tuple[dict[str, float], int]:
        taken = dict(self.seconds), self.steps
        self.seconds.clear()
        self.steps = 0
        return taken


class Memory:
    """The highest resident set of this process, though a phase may be looked at by itself in between (MiB)."""

    def __init__(self) -> None:
        self.highest = self.update = 0.0

    def peak(self) -> float:
        self.highest = max(self.highest, resident("VmHWM") / 1024)
        return self.highest

    def start(self) -> None:
        forget_high_water()
        self.highest = 0.0

    @contextmanager
    def of_update(self) -> Iterator[None]:
        self.peak()
        release_memory()  # or freed pages that are still resident would count for nothing
        forget_high_water()
        before = resident("VmRSS")
        yield
        self.update = (resident("VmHWM") - before) / 1024


def run(plan: Any, module: str = __name__) -> list[dict[str, Any]]:
    """The iterations of a process with this plan, for `module`. Raises RuntimeError, with the last it said, when it
    fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.arguments |= {"output_dir": folder}
        path.write_text(json.dumps(asdict(plan)), encoding="utf-8")
        command = [sys.executable, "-m", module, path]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{plan.provider}'s process ended: {' '.join(done.stderr.split())[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])["iterations"]


def main(path: str) -> None:
    from fastrlhf.bench.peers import trl_ppo

    work(Plan(**json.loads(Path(path).read_text(encoding="utf-8"))), {OURS: ours, TRL: trl_ppo.trainer}, SCORES)


def work(plan: Any, trainers: dict[str, Callable[[Any, Phases, Memory], Any]], logged: str) -> None:
    """Trains by the plan with the trainer of its provider. logged: a name in the log of every iteration."""
    # Trainers print where they like: what stands for standard output from now on is standard error.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import transformers

    torch.set_num_threads(plan.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    phases, memory = Phases(), Memory()
    made = trainers[plan.provider](plan, phases, memory)
    made.accelerator.backward = phases.of("backward", made.accelerator.backward)
    report = recorder(phases, memory, logged)
    made.add_callback(report)
    with phases.of_optimizers():
        made.train()
    json.dump({"iterations": report.iterations}, answer)
    answer.write("\n")
    answer.close()


def load(plan: Plan) -> dict[str, Any]:
    """tokenizer, policy, reward_model and value_model (or None)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    options = {"dtype": getattr(torch, plan.dtype), "attn_implementation": plan.attention}

    def scorer(folder: str) -> Any:
        torch.manual_seed(0)  # a head that is not in the folder is drawn
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **options)

    return {
        "tokenizer": AutoTokenizer.from_pretrained(plan.policy, padding_side="left"),
        "policy": AutoModelForCausalLM.from_pretrained(plan.policy, **options),
        "reward_model": scorer(plan.reward_model),
        "value_model": scorer(plan.value_model) if plan.value_model else None,
    }


def ours(plan: Plan, phases: Phases, memory: Memory) -> Any:
    """Our trainer; its phases are those that it logs."""
    import torch
    from datasets import Dataset

    from fastrlhf.rewards import RewardResult
    from fastrlhf.rewards.text_scores import sequence_scores, takes_packing
    from fastrlhf.rollout import NativeEngine
    from fastrlhf.trainers import PPOConfig, PPOTrainer
    from fastrlhf.trainers.ppo.phases import Phases as PhasesOfTrainer

    class Watched(PhasesOfTrainer):
        @contextmanager
        def __call__(self, name: str, total: int | None = None) -> Iterator[Any]:
            with memory.of_update() if name == "update" else nullcontext(), super().__call__(name, total) as bar:
                yield bar

    class ScoredAsWritten(PPOTrainer):
        """Scores at the last token that the policy wrote, as in TRL, on the tokens themselves."""

        @torch.no_grad()
        def scores(self, rows: list[dict[str, Any]], rollout: Any) -> tuple[RewardResult, None]:
            texts = [prompt + response for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)]
            pad = self.processing_class.pad_token_id
            scores = sequence_scores(models["reward_model"], texts, pad, packed=packed)[:, 0]
            return RewardResult(scores, scores, {"reward_model": scores}), None

    models = load(plan)
    packed = takes_packing(models["reward_model"])
    made = (ScoredAsWritten if plan.as_written else PPOTrainer)(
        models["policy"],
        PPOConfig(**plan.arguments),
        reward_funcs=models["reward_model"],
        train_dataset=Dataset.from_dict({"prompt": plan.prompts}),
        processing_class=models["tokenizer"],
        value_model=models["value_model"],
        engine=None if plan.eos else NativeEngine(models["policy"], SimpleNamespace(eos_token_id=None)),
    )
    if plan.watch_update:
        made.phases = Watched(bar=False)
    return made


def recorder(phases: Phases, memory: Memory, logged: str) -> Any:
    """A callback that keeps what every iteration took, when it is logged: all providers do that last."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.iterations: list[dict[str, Any]] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            memory.start()
            self.before, _ = phases.take()
            self.start, self.cpu = time.perf_counter(), time.process_time()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if logged not in logs:  # not an iteration's
                return
            seconds = time.perf_counter() - self.start
            spent, steps = phases.take()
            named = {name.removeprefix("time/"): x for name, x in logs.items() if name.startswith("time/")}
            self.iterations.append(
                {
                    "seconds": seconds,
                    "cpu_seconds": time.process_time() - self.cpu,
                    "phases": spent | named,
                    "before": self.before,
                    "optimizer_steps": steps,
                    "peak_mib": memory.peak(),
                    "update_mib": memory.update,
                    "metrics": {name: x for name, x in logs.items() if isinstance(x, int | float)},
                }
            )
            self.start, self.cpu = time.perf_counter(), time.process_time()

    return Recorder()


if __name__ == "__main__":
    main(*sys.argv[1:])
