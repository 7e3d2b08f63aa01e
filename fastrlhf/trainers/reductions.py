"""Numbers of all ranks. Each of these functions is a collective: every rank calls it, in the same order. One process
gets back what it gave, without communication."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


def gather_varying(x: Tensor, accelerator: Accelerator) -> tuple[Tensor, slice]:
    """The rows of all ranks, in their order, and where this rank's stand among them.

    x: [n, ...], of the accelerator's device; n may be another on each rank, and 0.
    Returns ([sum of n, ...], slice): `rows[own]` is x.
    """
    if accelerator.num_processes == 1:
        return x, slice(0, len(x))
    counts = accelerator.gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = accelerator.gather(padded).split(max(counts)) if max(counts) else [padded]
    start = sum(counts[: accelerator.process_index])
    rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=False)])
    return rows, slice(start, start + len(x))


def global_advantage_stats(stats: Tensor, advantages: Tensor, mask: Tensor, accelerator: Accelerator) -> Tensor:
    """[2], fp32: mean and 1/sqrt(unbiased variance + 1e-8) of the advantages that count, over all ranks.

    stats: [2], those of this rank, as `F.rollout_advantages` gives them: what one process gets back.
    advantages, mask: [B, T], other shapes on each rank; mask 1 = counts, and nothing else is read.
    Each rank's count, mean and squared distances from it, in fp64, merged as in Chan et al. 1979.
    """
    if accelerator.num_processes == 1:
        return stats
    kept = advantages[mask.bool()].double()
    count = kept.new_tensor(float(kept.numel()))
    mean = kept.sum() / count.clamp(min=1)
    each = accelerator.gather(torch.stack([count, mean, (kept - mean).square().sum()])[None])
    counts, means, squares = each.unbind(1)
    total = counts.sum()
    mean = (counts * means).sum() / total.clamp(min=1)
    square = squares.sum() + (counts * (means - mean).square()).sum()
    return torch.stack([mean, (square / (total - 1).clamp(min=1) + 1e-8).rsqrt()]).float()


def mean_over_ranks(x: Tensor, accelerator: Accelerator) -> Tensor:
    """The mean of the ranks' x, each of one shape."""
    return x if accelerator.num_processes == 1 else accelerator.reduce(x, "mean")


def any_rank(flag: bool, accelerator: Accelerator) -> bool:
    """Whether it is true on some rank."""
    return bool(max_over_ranks(int(flag), accelerator))


def max_over_ranks(number: int, accelerator: Accelerator) -> int:
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
