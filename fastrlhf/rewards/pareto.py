"""Which of several policies trade one objective for another, and which are simply worse."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastrlhf.trainers.metrics import METRICS_FILE


def pareto_front(points: Tensor) -> Tensor:
    """[n], bool: the points that no other one dominates, by being at least as good in everything and better in one.

    points: [n, k], larger is better. Equal points dominate neither other. Raises ValueError for a NaN or another shape.
    """
    if points.dim() != 2 or points.isnan().any():
        raise ValueError(f"points: got shape {tuple(points.shape)}, wanted [n, k] without NaN")
    at_least = (points[:, None] >= points[None]).all(2)
    better = (points[:, None] > points[None]).any(2)
    return ~(at_least & better).any(0)


def pareto_table(rows: Mapping[str, Mapping[str, float]], objectives: Sequence[str]) -> str:
    """A Markdown table of policies by their objectives, best first by the first one; ● marks the Pareto front.

    rows: of each policy by its name, its objectives; larger is better. Raises ValueError for one that is missing.
    """
    if not rows or not objectives:
        raise ValueError("pareto_table: at least one row and one objective are wanted")
    for name, row in rows.items():
        missing = [objective for objective in objectives if not math.isfinite(row.get(objective, math.nan))]
        if missing:
            raise ValueError(f"pareto_table: {name} has no finite {', '.join(missing)}; it has {', '.join(row)}")
    points = torch.tensor([[row[objective] for objective in objectives] for row in rows.values()])
    on_front = dict(zip(rows, pareto_front(points).tolist(), strict=True))
    lines = [
        "| | " + " | ".join(objectives) + " | front |",
        "|---|" + "--:|" * len(objectives) + ":-:|",
    ]
    for name in sorted(rows, key=lambda name: -rows[name][objectives[0]]):
        numbers = " | ".join(f"{rows[name][objective]:.3f}" for objective in objectives)
        lines.append(f"| {name} | {numbers} | {'●' if on_front[name] else ''} |")
    return "\n".join(lines)


def run_objectives(folder: str | Path, objectives: Sequence[str], last: int = 10) -> dict[str, float]:
    """Means over the last `last` records in a run's `metrics.jsonl` that have all objectives, or as many as there are.

    Raises FileNotFoundError without the file, ValueError where no record has them, naming those that there are.
    """
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run's output_dir is wanted")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    having = [record for record in records if all(name in record for name in objectives)][-last:]
    if not having:
        there = sorted({name for record in records for name in record})
        raise ValueError(f"{path}: no record has {', '.join(objectives)}; there are {', '.join(there)}")
    return {name: sum(record[name] for record in having) / len(having) for name in objectives}
