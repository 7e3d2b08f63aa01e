"""`preference_report` of reward models with one head or several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf.rewards.preference_report import preference_report
from fastrlhf.rewards.settings import RewardSettings


def head_report(scores: Tensor, said: Tensor, settings: RewardSettings) -> dict[str, Any]:
    """`preference_report` of score pairs [n, 2, heads], chosen first, and what is to be said of several heads.

    said: [n, 2 + objectives]: rating gap (NaN where there is none), length difference, and the label of each objective.
    ensemble: of the heads' mean, with the accuracy of each, and the mean over the pairs of their standard deviation.
    objectives: `objectives` has the report of each, over the pairs that have a label for it, and `accuracy` is their
    mean.
    """
    scores = scores.double().reshape(len(scores), 2, -1)
    gaps, length_differences = said[:, 0], said[:, 1]
    texts = scores.flatten(0, 1)
    spread = {"head_means": texts.mean(0).tolist(), "head_stds": texts.std(0).tolist()}
    if settings.heads != "objectives":
        mean = scores.mean(2)
        report = preference_report(mean[:, 0], mean[:, 1], gaps=gaps, length_differences=length_differences)
        if settings.heads == "ensemble":
            differences = scores[:, 0] - scores[:, 1]
            report["head_accuracy"] = (differences > 0).double().mean(0).tolist()
            report["disagreement"] = differences.std(dim=1).mean().item()
        return report | spread
    parts = {}
    for k, name in enumerate(settings.names):
        sign = said[:, 2 + k].double().sign()
        kept = sign != 0
        if not kept.any():
            raise ValueError(f"objectives: no held-out pair has a label for {name!r}")
        better = torch.where(sign > 0, scores[:, 0, k], scores[:, 1, k])[kept]
        worse = torch.where(sign > 0, scores[:, 1, k], scores[:, 0, k])[kept]
        longer = (length_differences * sign)[kept]
        parts[name] = preference_report(better, worse, gaps=said[kept, 2 + k].abs(), length_differences=longer)
    names = ("accuracy", "log_loss", "ece", "ece_calibrated")
    means = {name: sum(part[name] for part in parts.values()) / len(parts) for name in names}
    return {"pairs": len(scores), **means, "objectives": parts, **spread}


def flat_metrics(report: dict[str, Any]) -> dict[str, float]:
    """The numbers of a report that are one each, for logs; those of an objective carry its name."""
    flat = {name: x for name, x in report.items() if isinstance(x, float)}
    for objective, part in report.get("objectives", {}).items():
        flat |= {f"{objective}_{name}": x for name, x in part.items() if isinstance(x, float)}
    return flat
