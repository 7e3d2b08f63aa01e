"""Importance weights where the engine that sampled has other numerics than the trainer."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rollout_weights(log_probs: Tensor, sampled_log_probs: Tensor, mask: Tensor, clip: float, mode: str) -> Tensor:
    """What each token's loss is multiplied with, [B, T], fp32; 0 where the mask is 0.

    log_probs, sampled_log_probs: [B, T], of the sampled tokens under the trainer's forward and as the engine gave them,
    both of the same weights. mask: [B, T], 1 = counts; nothing else is read. clip: at least 1 to mask by.
    With w = exp(log_probs - sampled_log_probs):

    "truncate": min(w, clip), truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly
        Brings You Off-Policy RL Training").
    "mask": w, or 0 where it is outside [1 / clip, clip]: IcePop's two-sided token mask (Ling team, "Small Leak Can Sink
        a Great Ship", 2025), its alpha and beta here 1 / clip and clip.
    "sequence_mask": the product of w over the response, at each of its tokens, or 0 where that is outside
        [1 / clip, clip]. The name and the weight are those of TRL's GRPO (vllm_importance_sampling_mode), which has no
        lower bound by default; verl rejects by the same statistic under the name seq_sum_k1. Masked importance sampling
        over sequences: Liu, Li et al. 2025, "When Speed Kills Stability". A product of many ratios strays further than
        one: long responses want a larger clip than tokens.
    Tokens that are masked stay in the loss's denominator. Raises ValueError for another mode.
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, log_probs.float() - sampled_log_probs.float(), 0.0)
    if mode == "truncate":
        weights = log_ratio.exp().clamp(max=clip)
    elif mode in ("mask", "sequence_mask"):
        if mode == "sequence_mask":
            log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
        weights = torch.where(log_ratio.abs() <= math.log(clip), log_ratio.exp(), 0.0)
    else:
        raise ValueError(f"rollout_weight_mode={mode!r} must be one of truncate, mask, sequence_mask")
    return torch.where(mask, weights, 0.0)
