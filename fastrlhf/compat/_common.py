"""What the frameworks' conventions have in common."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.functional._checks import FLOATS


def fits(model: Tensor, *others: Tensor | None, mask: Tensor | None = None) -> bool:
    """Whether our kernels take these: fp32, bf16 or fp16, all in one shape, as is the mask, whose dtype is free."""
    floats = (model, *(x for x in others if x is not None))
    shapes = floats if mask is None else (*floats, mask)
    return all(x.dtype in FLOATS for x in floats) and all(x.shape == model.shape for x in shapes)


def cast(result: Tensor, exact_dtype: bool, *inputs: Tensor | None) -> Tensor:
    """With exact_dtype in the dtype to which torch promotes the inputs, that of eager code; otherwise as it is."""
    if not exact_dtype:
        return result
    return result.to(functools.reduce(torch.promote_types, (x.dtype for x in inputs if x is not None)))


def rows(x: Tensor) -> Tensor:
    """x [..., V], with a vocabulary that a kernel can walk along."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def entropy(logits: Tensor) -> Tensor:
    """Of softmax(logits): [..., V] to [...], fp32, in nats."""
    tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return F.token_log_probs_and_entropy(rows(logits), tokens)[1]


def aggregate(x: Tensor, mask: Tensor, aggregation: str, denominator: float | Tensor | None) -> Tensor:
    """Sum of x over tokens or sequences, divided by their number or by denominator: as `ppo_loss` does with its terms.

    x, mask: [B, T], or any one shape for "token-mean". Returns an fp32 scalar, with gradient to x; 0 if nothing counts.
    """
    if aggregation == "token-mean" and denominator is None:
        return F.masked_mean(x, mask)
    means, lengths = F.masked_mean(x, mask, dim=-1), mask.sum(-1)
    total = (means if aggregation == "seq-mean-token-mean" else means * lengths).sum()
    if denominator is None:
        denominator = (lengths > 0).sum().clamp(min=1)
    return total / denominator


def discounted_sums(x: Tensor, discount: Tensor) -> Tensor:
    """y_t = x_t + discount_t y_{t+1} along the last dimension, differentiable in both; x and discount of one shape.

    Doubles the reach of every position log2(T) times (Hillis and Steele 1986), where a loop would take T steps.
    """
    length, step = x.shape[-1], 1
    while step < length:
        ahead = torch.nn.functional.pad(x[..., step:], (0, step))
        x = x + discount * ahead
        discount = discount * torch.nn.functional.pad(discount[..., step:], (0, step))
        step *= 2
    return x
