"""Several opinions as one score that is careful where they disagree."""

from __future__ import annotations

import torch
from torch import Tensor

ENSEMBLES = ("mean", "min", "mean-std")
DISAGREEMENT = "disagreement"


def combine(members: Tensor, how: str = "mean", std_coef: float = 1.0) -> tuple[Tensor, Tensor]:
    """One score of many, and how far they are from each other.

    members: [n, m], scores by each member, around the same zero.
    how: "mean"; "min", the worst case; "mean-std", mean - std_coef std, a lower confidence bound. Coste et al. 2023
        (arXiv:2310.02743) have the first two, and the third with the variance in place of the standard
        deviation, which is on the scale of the scores.
    Returns the scores [n] and the standard deviations [n] (unbiased; 0 for one member), fp32. Raises ValueError.
    """
    if members.dim() != 2 or members.shape[1] == 0:
        raise ValueError(f"members: got shape {tuple(members.shape)}, wanted [n, m] with m at least 1")
    if how not in ENSEMBLES:
        raise ValueError(f"reward_ensemble={how!r} must be one of {', '.join(ENSEMBLES)}")
    if std_coef < 0:
        raise ValueError(f"reward_std_coef={std_coef} must be at least 0")
    members = members.double()
    mean = members.mean(1)
    std = members.std(1) if members.shape[1] > 1 else torch.zeros_like(mean)
    scores = {"mean": mean, "min": members.min(1).values, "mean-std": mean - std_coef * std}[how]
    return scores.float(), std.float()
