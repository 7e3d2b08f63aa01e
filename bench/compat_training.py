"""TRL's trainers as they are and with `fastrlhf.patch("trl")`: the same losses, in how much time and memory.

A small random model with a large vocabulary, where the patched functions are a large part of a step. Each run is a
process of its own:

    python -m fastrlhf.bench.compat_training PLAN.json

whose last line on standard output is JSON: {"logs": [what TRL logged at each step], "ms": [of each step],
"peak_mib": highest resident set, "bound": how many places were patched}.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastrlhf.bench.measure import forget_high_water, resident, summary
from fastrlhf.bench.records import OURS
from fastrlhf.bench.settings import Training

THEIRS = "unpatched"
TRAINERS = ("SFT", "DPO", "GRPO")
# What they log of a step that says whether it was the same step.
COMPARED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "logps/chosen")
# Written down before measuring. SFT and DPO: five products of the head instead of four, but no passes over tiles in
# between; GRPO: its rollout is the same on both sides.
TARGETS = {"SFT": 1.2, "DPO": 1.2, "GRPO": 1.1}


@dataclass
class Plan:
    """trainer: one of TRAINERS. patched: with our functions."""

    trainer: str
    patched: bool
    training: Training
    threads: int


def measure(training: Training) -> Iterator[dict[str, Any]]:
    """The rows as they go into the JSON file; the processes run patched and unpatched by turns."""
    import torch

    for trainer in TRAINERS:
        runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for turn in range(training.turns):
            for patched in (True, False) if turn % 2 == 0 else (False, True):
                runs[patched].append(run(Plan(trainer, patched, training, torch.get_num_threads())))
        results = {name: _result(runs[patched]) for name, patched in ((OURS, True), (THEIRS, False))}
        results[OURS]["largest_difference"] = difference(runs[True][0]["logs"], runs[False][0]["logs"])
        yield {
            "op": f"TRL {trainer}",
            "work": f"a step of TRL's {trainer}Trainer",
            "shape": f"{training.sequences} × {training.length} tokens, vocabulary {training.vocabulary}",
            "dtype": "fp32",
            "targets": {THEIRS: TARGETS[trainer]},
            "results": results,
        }


def difference(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """The largest relative difference of what both logged, of numbers above 0.001; of the others, the thousandfold."""
    pairs = [(a[x], b[x]) for a, b in zip(ours, theirs, strict=True) for x in COMPARED if x in a and x in b]
    if not pairs:
        raise ValueError("the trainers logged nothing that can be compared")
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)


def run(plan: Plan) -> dict[str, Any]:
    """A process with this plan. Raises RuntimeError, with the last it said, when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(asdict(plan)), encoding="utf-8")
        # TRL is where this process finds it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", __name__, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        raise RuntimeError(f"{plan.trainer}'s process ended: {' '.join(done.stderr.split())[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(path: str) -> None:
    plan = json.loads(Path(path).read_text(encoding="utf-8"))
    plan = Plan(**plan | {"training": Training(**plan["training"])})
    # Trainers print where they like: what stands for standard output from now on is standard error.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(plan.threads)
    json.dump(train(plan, str(Path(path).parent)), answer)
    answer.write("\n")
    answer.close()


def train(plan: Plan, folder: str) -> dict[str, Any]:
    """A training in this process."""
    from contextlib import nullcontext

    import transformers

    import fastrlhf

    transformers.utils.logging.set_verbosity_error()
    with fastrlhf.patch("trl") if plan.patched else nullcontext() as patch:
        made = _trainer(plan, folder)
        times: list[float] = []
        made.add_callback(_watch(times))
        forget_high_water()
        made.train()
        logs = [entry for entry in made.state.log_history if "loss" in entry]
        return {
            "logs": logs,
            "ms": times,
            "peak_mib": resident("VmHWM") / 1024,
            "bound": sum(map(len, patch.bound.values())) if patch else 0,
        }


def _trainer(plan: Plan, folder: str) -> Any:
    import torch
    import transformers
    import trl
    from datasets import Dataset

    from fastrlhf.bench.ppo_step import QUIETLY, word_tokenizer

    sizes = plan.training
    transformers.set_seed(0)
    tokenizer = word_tokenizer(sizes.vocabulary)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=2 * sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2 * sizes.length,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    words = torch.randint(2, sizes.vocabulary, (sizes.steps * sizes.sequences, sizes.length))
    half = sizes.length // 2
    prompts, *answers = (
        [tokenizer.decode(row) for row in part] for part in (words[:, :half], words[:, half:], words.flip(0)[:, half:])
    )
    common = {"output_dir": folder, "max_steps": sizes.steps, "logging_steps": 1, "learning_rate": 1e-4, "bf16": False}
    common |= {"per_device_train_batch_size": sizes.sequences, "gradient_checkpointing": False, **QUIETLY}
    if plan.trainer == "SFT":
        data = Dataset.from_dict({"prompt": prompts, "completion": [f" {text}" for text in answers[0]]})
        return trl.SFTTrainer(model, trl.SFTConfig(**common), train_dataset=data, processing_class=tokenizer)
    if plan.trainer == "DPO":
        common["per_device_train_batch_size"] = sizes.sequences // 2
        pairs = {
            name: [f" {text}" for text in texts] for name, texts in zip(("chosen", "rejected"), answers, strict=True)
        }
        data = Dataset.from_dict({"prompt": prompts, **pairs})
        reference, options = copy.deepcopy(model), trl.DPOConfig(**common)
        return trl.DPOTrainer(model, reference, options, train_dataset=data, processing_class=tokenizer)
    # Two steps on each rollout: in the first, every ratio is 1 and the loss 0.
    lengths = {"num_generations": 4, "max_completion_length": half}
    options = trl.GRPOConfig(**common, **lengths, num_iterations=2, temperature=1.0)

    def even(completion_ids, **_):
        """How many of the tokens are even."""
        return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]

    data = Dataset.from_dict({"prompt": prompts})
    return trl.GRPOTrainer(model, even, options, train_dataset=data, processing_class=tokenizer)


def _watch(times: list[float]) -> Any:
    """A callback that keeps the milliseconds of every step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(1e3 * (time.perf_counter() - self.start))

    return Watch()


def _result(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several processes: the steps after the first, which warms up."""
    steps = [ms for made in runs for ms in made["ms"][1:]]
    return summary(steps) | {"peak_mib": min(made["peak_mib"] for made in runs)}


if __name__ == "__main__":
    main(*sys.argv[1:])
