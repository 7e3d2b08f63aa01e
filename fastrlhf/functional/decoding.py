"""What a decoding step is made of, for the rollout engine: attention to a paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)

PAGE = 16  # positions


def new_cache(
    pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys [pages, kv_heads, head_dim, 16] and values [pages, kv_heads, 16, head_dim] of one layer, not initialised.

    Keys lie with the positions innermost: a vector then holds the scores of 16 positions, and no sum crosses its lanes.
    """
    return (
        torch.empty(pages, kv_heads, head_dim, PAGE, dtype=dtype, device=device),
        torch.empty(pages, kv_heads, PAGE, head_dim, dtype=dtype, device=device),
    )


@torch.library.register_fake("fastrlhf::paged_attention")
def _(qkv, keys, values, pages, sequence, position, cos, sin, q_norm, k_norm, numbers, window):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[2], dtype=torch.float32)
