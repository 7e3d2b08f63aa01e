"""What keeps a run from training on nonsense: iterations that are skipped and counted, and runs that are stopped."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

DUMP_FILE = "skipped-batch-{step}.json"
DIVERGED_FOLDER = "diverged-{step}"


class TrainingStopped(ValueError):
    """A guard ended the training: the message says which, why, and where the last good state is."""


@dataclass
class SkippedSteps:
    """How many iterations were skipped: without one that went through in between, and in the whole run."""

    in_a_row: int = 0
    total: int = 0

    def add(self) -> None:
        self.in_a_row += 1
        self.total += 1

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.in_a_row, self.total = state["in_a_row"], state["total"]


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients, over the shards of all ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def dump_batch(
    output_dir: str, step: int, reason: str, prompts: list[Any], texts: list[str], scores: dict[str, list[float]]
) -> str:
    """Write the batch of a skipped iteration as JSON, for people to look at; returns the path.

    scores: of each reward function by its name, as far as there are any.
    """
    path = os.path.join(output_dir, DUMP_FILE.format(step=step))
    rows = [
        {"prompt": prompt, "completion": text, "rewards": {name: values[i] for name, values in scores.items()}}
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    os.makedirs(output_dir, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"step": step, "reason": reason, "rows": rows}, file, indent=1, ensure_ascii=False)
    return path


def set_diverged_aside(folder: str) -> str | None:
    """Rename a checkpoint of weights that have diverged, so that no run continues from it; None where there is none."""
    if not os.path.isdir(folder):
        return None
    parent, name = os.path.split(folder)
    aside = os.path.join(parent, DIVERGED_FOLDER.format(step=name.rpartition("-")[2]))
    os.replace(folder, aside)
    return aside
