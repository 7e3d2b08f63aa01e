"""`fastrlhf bench`: runs the families of a suite, prints their tables and keeps the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastrlhf.bench import (
    accuracy,
    advantages,
    calls,
    compat,
    dpo_step,
    layers,
    lm_head,
    log_probs,
    losses,
    ppo_step,
    records,
    report,
    reward_step,
    rollout,
    scoring,
)
from fastrlhf.bench.contests import OURS
from fastrlhf.bench.gpu import CudaStopwatch, copy_bandwidth
from fastrlhf.bench.measure import Stopwatch, keep_memory, measure
from fastrlhf.bench.peers import roll_call
from fastrlhf.bench.settings import FULL, QUICK, Setting
from fastrlhf.bench.sources import peers_on_path

FAMILIES = {
    "log_probs": log_probs,
    "lm_head": lm_head,
    "advantages": advantages,
    "losses": losses,
    "layers": layers,
    "calls": calls,
    "rollout": rollout,
    "scoring": scoring,
}
ACCURACY = "accuracy"
PPO, DPO, REWARD, COMPAT = "ppo", "dpo", "reward", "compat"
# Their contenders are processes, which are timed in there.
STEPS = {PPO: ppo_step, DPO: dpo_step, REWARD: reward_step}
# Whose peers are others than those of the kernels.
ROLL_CALLS = {
    "rollout": rollout.roll_call,
    "scoring": scoring.roll_call,
    **{name: family.roll_call for name, family in STEPS.items()},
    COMPAT: compat.roll_call,
}
SUITES = {
    "kernels": (*(name for name in FAMILIES if name not in ROLL_CALLS), ACCURACY),
    **{name: (name,) for name in FAMILIES if name in ROLL_CALLS},
    **{name: (name,) for name in (*STEPS, COMPAT)},
}


def run(
    family: str,
    setting: Setting,
    console: Console,
    stopwatch: Any,
    bandwidth: float | None,
    path: Path,
    warm: bool = False,
) -> dict[str, Any]:
    """Measures one family into its file, row by row, so that a run cut short keeps what it has."""
    who = ROLL_CALLS.get(family, roll_call)()
    content = {**records.environment(setting.device), "family": family, "peers": who, "complete": False}
    if setting.on_cpu:
        content["outputs_in_warm_memory"] = warm
    if bandwidth:
        content["copy_bandwidth_gb_s"] = bandwidth / 1e6
    content["rows"] = []
    if family == ACCURACY:
        content["rows"] = accuracy.measure(setting)
        console.print(report.of_accuracy(content["rows"]))
    else:
        for row in _measured(family, setting, stopwatch, bandwidth):
            content["rows"].append(row)
            records.write(path, content)
            console.print(report.of_row(content["rows"][-1]))
        console.print(report.of_targets(content["rows"]))
    content["complete"] = True
    records.write(path, content)
    return content


def _measured(family: str, setting: Setting, stopwatch: Any, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    if family in STEPS:
        yield from STEPS[family].measure(setting)
        return
    if family == COMPAT:  # so are some of these
        yield from compat.measured(setting, stopwatch, bandwidth)
        return
    for row in FAMILIES[family].rows(setting):
        yield measure(row, stopwatch, setting.seconds, bandwidth)


def failures(content: dict[str, Any]) -> list[str]:
    """What of ours failed to run."""
    rows = [(row.get("work", row["dtype"]), row["results"].get(OURS, {})) for row in content["rows"]]
    return [f"{work}: {result['failed']}" for work, result in rows if "failed" in result]


def main(suite: str, arguments: list[str]) -> None:
    with peers_on_path(first=True) if suite == COMPAT else nullcontext():
        _main(suite, arguments)


def _main(suite: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"fastrlhf bench {suite}", description=_HELP[suite], allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=SUITES[suite], default=SUITES[suite])
    parser.add_argument("--quick", action="store_true", help="small inputs, few repetitions: does it all run?")
    parser.add_argument("--output", type=Path, default=None, help="folder for the results (bench/results of a clone)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU that it can use")
    setting = (QUICK if options.quick else FULL)[options.device]
    name = records.device_name(options.device)
    folder = (options.output or records.folder()) / records.slug(name)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}", highlight=False)
    for peer, state in ROLL_CALLS.get(suite, roll_call)().items():
        console.print(f"  {peer:<14} {state.get('version') or state['missing']}", highlight=False)

    warm = setting.on_cpu and keep_memory()
    stopwatch = Stopwatch() if setting.on_cpu else CudaStopwatch()
    bandwidth = None if setting.on_cpu else copy_bandwidth(stopwatch)
    failed = []
    for family in options.only:
        path = folder / f"{family}{records.variant(options.quick)}.json"
        failed += failures(run(family, setting, console, stopwatch, bandwidth, path, warm))
        console.print(f"{path}\n", highlight=False)
    if failed:
        raise ValueError(f"{len(failed)} of our own did not run: {'; '.join(failed)}")


_HELP = {
    "kernels": """Times the ops beside eager PyTorch, torch.compile, the peers that are installed (`make bench` installs
them) and the physical limit, which plain C++ loops (on a GPU: a copy; for the LM head: its bare matrix products)
measure in the same run. Outputs are allocated by each contender in the call; inputs are warm, and on Linux so is the
memory of outputs, because the process is told to keep what it frees. THP_MEM_ALLOC_ENABLE=1 and
FASTRLHF_CPU_CAPABILITY=avx2|portable in the environment are measured as they are set, and name the file.""",
    "rollout": """Times the native rollout engine beside transformers.generate, vLLM (where FASTRLHF_VLLM_PYTHON names
the Python of an environment that has it) and the roofline: a step of decoding SmolLM2-135M-Instruct (on a GPU, of a
random model shaped like Qwen2-0.5B), responses of widely varying length, and drawing tokens from logits. A step is the
time of a whole rollout, the prompts and the packing of the weights included, divided by its tokens. The roofline of a
step is the longer of reading the weights and the cache once, at the bandwidth of a plain loop, and the products at the
peak of a square one, all measured in the same run.""",
    PPO: """Times whole iterations of PPOTrainer beside TRL's last PPO trainer (`make bench` installs it), on equal
work: SmolLM2-135M-Instruct, the same prompts, tokens and optimiser steps. fp32 weights, bf16 weights with fp32 masters,
and bf16 with the value head on the policy's trunk; TRL in fp32 and with all weights in bf16. Each runs in a process of
its own, in turns. The limit is the matrix products of trunks and head alone, for an iteration without its rollout.
Takes a quarter of an hour.""",
    COMPAT: """Times functions of TRL, Liger, verl, OpenRLHF and torchrl beside ours in their place (fastrlhf.compat),
on the frameworks' own calls, and steps of TRL's SFT, DPO and GRPO trainers with fastrlhf.patch("trl") and without, each
in a process of its own, by turns. `make .venv/.peers` installs the frameworks.""",
    DPO: """Times steps of DPOTrainer beside TRL's (`make bench` installs it): SmolLM2-135M-Instruct, the same pairs and
hyper-parameters, reference log-probs computed before. fp32 weights, and bf16 weights with fp32 masters; TRL in fp32,
with all weights in bf16, with fp32 weights under bf16 autocast, and as it comes. Each runs in a process of its own, in
turns. Takes ten minutes.""",
    REWARD: """Times steps of RewardTrainer beside TRL's (`make bench` installs it): SmolLM2-135M-Instruct with a score
head, the same pairs and hyper-parameters; and ours with five heads. Otherwise as `bench dpo`. Takes ten minutes.""",
    "scoring": """Times the verdicts of a judge on every pair of several answers to a prompt, in both orders, and the
scores of a reward model for these answers, beside transformers on the same tokens, padded.""",
}
