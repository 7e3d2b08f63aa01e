"""LM heads as the frameworks hand them over."""

from __future__ import annotations

import torch
from torch import Tensor


def in_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In that of the hidden states, in which frameworks multiply them; autocast has its say in the ops."""
    return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


@torch.no_grad()
def mean_logit(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N], of hidden [N, H] the mean over the vocabulary, in fp32: it is linear, and needs no logits."""
    mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
    return mean if bias is None else mean + bias.mean(dtype=torch.float32)
