"""Bradley-Terry losses of reward models with one head or several."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrlhf import functional as F


def preference_loss(
    chosen: Tensor, rejected: Tensor, batch: dict[str, Any], heads: str, center_coef: float
) -> tuple[Tensor, F.PairwiseRewardStats]:
    """The mean over pairs and heads of the Bradley-Terry loss, and statistics over what was compared.

    chosen, rejected: [B, m], fp32, one column a head. batch: of PreferenceCollator; its `margin` counts in each head.
    single: m = 1.
    ensemble: with `draws` [B, m] in the batch, each head on the pairs of its own bootstrap sample, one drawn twice
        counting twice (Osband et al. 2016, arXiv:1602.04621); without, the mean of the heads, as it will be used.
    objectives: `objectives` [B, m] says by its sign which text is the better one for each head; 0 is left out.
    """
    margin = batch.get("margin")
    if heads == "objectives":
        labels = batch["objectives"].to(chosen.device)
        kept = labels != 0
        better = torch.where(labels > 0, chosen, rejected)[kept]
        worse = torch.where(labels > 0, rejected, chosen)[kept]
        margins = None if margin is None else margin[:, None].expand_as(labels)[kept]
        loss, stats = F.pairwise_reward_loss(better, worse, margin=margins, center_coef=center_coef)
        return loss, stats
    if heads == "ensemble" and "draws" in batch:
        draws = batch["draws"].flatten()
        which = torch.arange(len(draws), device=draws.device).repeat_interleave(draws)
        pair = which // chosen.shape[1]
        loss, stats = F.pairwise_reward_loss(
            chosen.flatten()[which],
            rejected.flatten()[which],
            margin=None if margin is None else margin[pair],
            center_coef=center_coef,
        )
        return loss * (len(which) / len(draws)), stats
    return F.pairwise_reward_loss(chosen.mean(1), rejected.mean(1), margin=margin, center_coef=center_coef)


def bootstrap_draws(pairs: int, heads: int, seed: int) -> list[list[int]]:
    """[pairs][heads]: how often each pair is in each head's sample of as many pairs, drawn with replacement."""
    rng = np.random.default_rng(seed)
    samples = [np.bincount(rng.integers(0, pairs, pairs), minlength=pairs) for _ in range(heads)]
    return np.stack(samples, axis=1).tolist()
