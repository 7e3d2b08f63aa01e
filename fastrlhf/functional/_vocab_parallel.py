"""A vocabulary that is spread over a process group: each rank has some of the columns, in the order of the ranks.

Each rank makes the row statistics of its own logits (m and log s with logsumexp(z/T) = m/T + log s, entropy, log-prob),
all of them are gathered, and every rank merges them to the same bits. With M the largest m, the share of rank r in the
probability is w_r = exp(a_r - L), where

    a_r = (m_r - M)/T + log s_r,    L = logsumexp_r(a_r),
    log p(y) = log p_r(y) + a_r - L  for the r that has y,    H = sum_r w_r (H_r + L - a_r),

in fp64 and without cancellation. The backward pass of a rank needs the merged normaliser, M and L, and the merged
entropy; then it is the one it always is. Sources: Megatron-LM (arXiv:1909.08053, section 3) for the layout, Milakov and
Gimelshein 2018 (arXiv:1805.02867) for merging the statistics of softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf.functional._autograd import NAMESPACE, is_traced, once_differentiable
from fastrlhf.reference import ELSEWHERE, IGNORED, INFINITY, check_tokens


class Shard(NamedTuple):
    """What a call has to know of the others."""

    tokens: Tensor  # [...], as the raw ops take them: in [0, this rank's V), ELSEWHERE or IGNORED
    owners: Tensor  # [ranks, ...]: who has the token
    group: torch.distributed.ProcessGroup


def shard(group: torch.distributed.ProcessGroup, tokens: Tensor, vocabulary: int) -> Shard:
    """For tokens in [0, sum of the ranks' vocabularies)."""
    _check_group(group)
    sizes = _gather(torch.full((1,), vocabulary, dtype=torch.int64, device=tokens.device), group)
    if tokens.is_cpu and not is_traced():
        check_tokens(tokens, int(sizes.sum()))
    ends = sizes.cumsum(0).view(-1, *(1,) * tokens.dim())
    begins = ends - sizes.view_as(ends)
    owners = (tokens >= begins) & (tokens < ends)
    rank = dist.get_rank(group)
    local = torch.where(owners[rank], tokens - begins[rank], ELSEWHERE)
    return Shard(torch.where(tokens == IGNORED, IGNORED, local), owners, group)


def _check_group(group: torch.distributed.ProcessGroup) -> None:
    wanted = "wanted a process group of torch.distributed that this process is in"
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group: got {type(group).__name__}, {wanted}")
    if not dist.is_initialized():
        raise ValueError(f"group: got one of a torch.distributed that is not initialized, {wanted}")


def _gather(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """[ranks, ...]. The collective that fills a single tensor has another name in every other torch; this one stays."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)


def merge(results: tuple[Tensor, ...], part: Shard, numbers: Tensor) -> tuple[Tensor, ...]:
    """A raw op's (log_probs, [entropy,] normaliser) for the whole vocabulary; numbers[0] is the temperature."""
    log_probs, *entropy, normaliser = results
    local = torch.stack([log_probs, *entropy, *normaliser.unbind(-1)])
    log_probs, *entropy, m, log_s = _gather(local, part.group).double().unbind(1)
    empty = (m == -INFINITY) | (log_s == -INFINITY)  # nothing but logits of -inf, which is no mistake in a shard
    top = m.amax(0)
    relative = torch.where(empty, -INFINITY, (m - top) / numbers[0] + log_s)
    total = relative.logsumexp(0)
    owned = torch.where(part.owners, torch.where(empty, -INFINITY, log_probs) + relative, 0.0).sum(0) - total
    merged = [torch.where(part.owners.any(0), owned, torch.nan)]
    if entropy:
        shares = (relative - total).exp()
        surprise = torch.where(shares == 0, 0.0, entropy[0] + total - relative)
        merged.append((shares * surprise).sum(0))
    merged = [torch.where(part.tokens == IGNORED, 0.0, x).float() for x in merged]
    return *merged, torch.stack([top, total], -1).float()


def summed(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Over all ranks, in fp32, over x itself where it is fp32."""
    total = x.float()
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)


def over_group(name: str, setup: Callable, backward: Callable, tokens: int) -> Callable:
    """`differentiable` for an op whose vocabulary is spread over a group; the call takes its Shard first.

    tokens: their position among the op's inputs; the numbers come after them.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    class Merged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *inputs, part = args
            inputs[tokens] = part.tokens
            output = merge(op(*inputs), part, inputs[tokens + 1])
            setup(ctx, inputs, output)
            ctx.group = part.group
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None

    Merged.__name__ = Merged.__qualname__ = name

    def call(part: Shard, *inputs):
        return Merged.apply(*inputs, part)

    return call
