"""Statistics over the positions that count."""

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.functional import _checks as check
from fastrlhf.functional._autograd import checked_once, differentiable


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the positions where mask is 1; 0 where there are none.

    x: [...], fp32, bf16 or fp16. mask: the same shape. dim: one dimension, or all of them.
    Returns a scalar, or x's shape without `dim`; fp32, with gradient to x, in reverse mode. Raises ValueError.
    """
    check.tensor("x", x)
    mask = check.mask("mask", mask, "x", x)
    if dim is None:
        return _masked_mean(check.fp32(x).reshape(1, -1), mask.reshape(1, -1))[0].reshape(())
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise ValueError(f"dim: got {dim!r}, wanted one dimension of x as an int, or None")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: got {dim}, wanted a dimension of x, which has shape {tuple(x.shape)}")
    x, mask = check.fp32(x).movedim(dim, -1), mask.movedim(dim, -1)
    rows, columns = x.shape[:-1], x.shape[-1]
    shape = (rows.numel(), columns)
    return _masked_mean(x.reshape(shape), mask.reshape(shape))[0].reshape(rows)


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the positions where mask is 1; 0 where it is 0.

    x: [...], fp32, bf16 or fp16. mask: the same shape. The statistics are over all positions together.
    shift_mean: False adds the mean back. unbiased: divide the squares by n - 1 (1 if there is one
        position), else by n.
    Returns x's shape, fp32, with gradient to x: reverse mode only, once. Raises ValueError.
    """
    check.tensor("x", x)
    mask = check.mask("mask", mask, "x", x)
    return _masked_whiten(check.fp32(x), mask, bool(shift_mean), bool(unbiased), _eps(eps))[0]


@checked_once
def _eps(eps) -> Tensor:
    return check.scalars(check.number("eps", eps, least=0.0))


def _mean_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _mean_backward(ctx, grad, _grad_count):
    mask, count = ctx.saved_tensors
    return torch.where(mask, (grad / count.clamp(min=1.0)).unsqueeze(-1), 0.0), None


def _whiten_setup(ctx, inputs, output) -> None:
    _, mask, ctx.shift_mean, ctx.unbiased, _ = inputs
    ctx.save_for_backward(mask, *output)
    ctx.mark_non_differentiable(output[1])


def _whiten_backward(ctx, grad, _grad_stats):
    mask, whitened, stats = ctx.saved_tensors
    mean, rstd, count = stats.unbind()
    whitened = whitened if ctx.shift_mean else torch.where(mask, whitened - mean, 0.0)
    grad = torch.where(mask, grad, 0.0)
    grad_mean = grad.sum() / count.clamp(min=1.0)
    freedom = (count - 1 if ctx.unbiased else count).clamp(min=1.0)
    grad_x = rstd * (grad - grad_mean - whitened * (grad * whitened).sum() / freedom)
    if not ctx.shift_mean:
        grad_x = grad_x + grad_mean
    return torch.where(mask, grad_x, 0.0), None, None, None, None


_masked_mean = differentiable("masked_mean", _mean_setup, _mean_backward, times=2)  # linear: it needs nothing of x
_masked_whiten = differentiable("masked_whiten", _whiten_setup, _whiten_backward)


@torch.library.register_fake("fastrlhf::masked_mean")
def _(x, mask):
    return x.new_empty(x.shape[0]), x.new_empty(x.shape[0])


@torch.library.register_fake("fastrlhf::masked_whiten")
def _(x, mask, shift_mean, unbiased, eps):
    return x.new_empty(x.shape), x.new_empty(3)
