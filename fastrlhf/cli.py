"""The command `fastrlhf`: picks the sub-command and shows errors as one line. Heavy imports wait until needed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from importlib import metadata, util

Command = Callable[[list[str]], None]

USAGE = """\
usage: fastrlhf COMMAND [config.yaml] [--flag value ...]

  sft                 supervised fine-tuning of a language model
  reward              a reward model from pairs of a chosen and a rejected text
  process-reward      a process reward model from steps that are labelled right or wrong
  ppo                 PPO of a language model against reward models and functions
  dpo                 DPO, IPO, hinge or SimPO of a language model on pairs of a chosen and a rejected text
  best-of-n           the best of several responses to each prompt, and what best-of-n is worth at every n
  rejection-sampling  fine-tuning on the best of a model's own responses
  judge               preferences from a judge: which of two answers a language model finds better
  constitutional      preferences from a language model that criticises and revises its answers by principles
  pareto              runs with several objectives as one table: which of them are simply worse
  compare             SFT, best-of-n, rejection sampling, DPO, PPO and GRPO on the demo's data, in one measured table
  demo                the whole way on real human ratings, on a laptop
  env                 versions, the machine, and which backend serves which op
  bench               bench kernels: the ops beside their peers and the physical limit; bench rollout: decoding;
                      bench ppo: whole iterations of PPO beside TRL's; bench ppo_learning: what both learn;
                      bench dpo, bench reward: steps of DPO and of reward models; bench scoring: judges and reward
                      models; bench compat: other frameworks' functions beside ours in their place

Each command explains its flags with --help. A YAML file may hold the same names; flags override it.
--debug (or FASTRLHF_DEBUG=1) shows where an error came from. The documentation is README.md.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for an error the user can mend, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get("FASTRLHF_DEBUG", "") not in ("", "0")
    argv = [arg for arg in argv if arg != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    if command in ("-V", "--version"):
        print(metadata.version("fastrlhf"))
        return 0
    if command not in COMMANDS:
        print(f"fastrlhf: error: no command {command!r}, wanted one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2

    # Fresh pages are most of the cost of a large CPU tensor, and the loop makes many. Huge pages make them up to five
    # times cheaper. torch reads this at its first allocation.
    # Benchmarks measure torch as people find it; who wants huge pages there says so.
    if command != "bench":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        COMMANDS[command](rest)
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"fastrlhf {command}: error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print(
            f"fastrlhf {command}: interrupted. The same command continues from the last checkpoint, if there is one.",
            file=sys.stderr,
        )
        return 130
    return 0


def _train(command: str) -> Command:
    def run(argv: list[str]) -> None:
        from fastrlhf.cli_train import train

        train(command, argv)

    return run


def _elsewhere(module: str, function: str) -> Command:
    def run(argv: list[str]) -> None:
        getattr(importlib.import_module(module), function)(argv)

    return run


def env(argv: list[str]) -> None:
    """Prints versions, the machine, and for every op the backend that serves it."""
    if argv:
        raise ValueError(f"env takes no arguments, {' '.join(argv)!r} given")
    import torch
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, box=None)
    facts.add_row("python", sys.version.split()[0])
    for package in ("fastrlhf", "torch", "transformers", "datasets", "peft", "triton", "flash-attn"):
        facts.add_row(package, _version(package))
    facts.add_row("CPU capability of torch", torch.backends.cpu.get_cpu_capability())
    facts.add_row("threads", str(torch.get_num_threads()))
    facts.add_row("GPU", _gpus())
    facts.add_row(
        "FASTRLHF_BACKEND", os.environ.get("FASTRLHF_BACKEND") or "not set: the fastest backend serves each op"
    )
    console.print(facts)

    from fastrlhf.backends import backend_table

    ops = Table(title="Which backend serves which op")
    ops.add_column("op", no_wrap=True)
    for column in ("cpu", "cuda", "other devices"):
        ops.add_column(column)
    table = backend_table()
    for op, backend in table.items():
        if "_backward" in op and backend == table.get(op.split("_backward")[0]):
            continue  # named apart from its op only where it is served by something else
        ops.add_row(op, backend["cpu"], backend["cuda"], backend["other"])
    console.print(ops)


def bench(argv: list[str]) -> None:
    if argv[:1] == ["ppo_learning"]:
        from fastrlhf.bench.ppo_learning import main as run_learning

        return run_learning(argv[1:])
    suites = ("kernels", "rollout", "ppo", "dpo", "reward", "scoring", "compat")
    if argv[:1] not in [[name] for name in suites]:
        what = " ".join(argv[:1]) or "what?"
        raise ValueError(
            f"bench {what}: wanted {', '.join(f'`bench {name}`' for name in suites)} or `bench ppo_learning` (--help "
            "lists the flags)"
        )
    from fastrlhf.bench.suite import main as run

    run(*argv[:1], argv[1:])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "there, version unknown" if util.find_spec(package.replace("-", "_")) else "not installed"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


COMMANDS = {name: _train(name) for name in ("sft", "reward", "process-reward", "ppo", "dpo")} | {
    "best-of-n": _elsewhere("fastrlhf.cli_best_of_n", "best_of_n"),
    "rejection-sampling": _elsewhere("fastrlhf.cli_best_of_n", "rejection_sampling"),
    "judge": _elsewhere("fastrlhf.feedback.judge_run", "main"),
    "constitutional": _elsewhere("fastrlhf.feedback.constitutional_run", "main"),
    "pareto": _elsewhere("fastrlhf.cli_pareto", "main"),
    "compare": _elsewhere("fastrlhf.compare", "run_from_command_line"),
    "demo": _elsewhere("fastrlhf.demo", "run_from_command_line"),
    "env": env,
    "bench": bench,
}
