"""`fastrlhf pareto`: runs with several objectives as one table."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fastrlhf.cli_arguments import parse


@dataclass
class ParetoArguments:
    """Runs of PPO by what their reward functions said in the end."""

    runs: list[str] = field(metadata={"help": "Their output_dirs."})
    objectives: list[str] = field(
        metadata={"help": "Names in metrics.jsonl; with :min behind one (objective/kl:min) where less is better."}
    )
    last: int = field(default=10, metadata={"help": "Records at the end of a run whose mean is taken."})
    output_dir: str = field(default="runs/pareto", metadata={"help": "Where pareto.md and pareto.json are written."})

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"last={self.last} must be at least 1")


def main(argv: list[str]) -> None:
    """Prints the table, and writes it as pareto.md and pareto.json."""
    from fastrlhf.rewards.pareto import pareto_table, run_objectives

    (args,) = parse("pareto", argv, ParetoArguments)
    names = [name.removesuffix(":min") for name in args.objectives]
    rows = {}
    for run in args.runs:
        found = run_objectives(run, names, args.last)
        signed = zip(args.objectives, names, strict=True)
        rows[run] = {given: -found[name] if given.endswith(":min") else found[name] for given, name in signed}
    table = pareto_table(rows, args.objectives)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pareto.md").write_text(table + "\n", encoding="utf-8")
    (folder / "pareto.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table)
