"""What stands between the matrix products of a decoder layer, in one pass each; for training on CPU.

On other devices these run as plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.functional import _checks as check
from fastrlhf.functional._autograd import checked_once, differentiable

ops = torch.ops.fastrlhf


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """y = weight x / sqrt(mean(x^2) + eps), the mean over the last dimension (Zhang and Sennrich 2019).

    x: [..., H], fp32, bf16 or fp16. weight: [H], of the same dtype and device. eps: positive.
    Returns [..., H] in the dtype of x, computed in fp32 and rounded once, with gradient to both. Raises ValueError on
    shapes, dtypes, devices and eps. Reverse mode only, once: forward-mode AD and double backward raise
    NotImplementedError.
    """
    check.tensor("x", x)
    check.tensor("weight", weight, dtypes=(x.dtype,))
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., H] with H >= 1")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted {tuple(x.shape[-1:])}, the last of x")
    check.same_device("weight", weight, "x", x)
    return _rms_norm(x, weight, _eps(eps))[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up = gate sigmoid(gate) up (Shazeer 2020, arXiv:2002.05202).

    gate, up: [...], fp32, bf16 or fp16, of one shape, dtype and device.
    Returns the same, computed in fp32 and rounded once, with gradient to both. Raises ValueError where they differ.
    Reverse mode only, once: forward-mode AD and double backward raise NotImplementedError.
    """
    check.tensor("gate", gate)
    check.like("up", up, "gate", gate, dtypes=(gate.dtype,))
    return _swiglu(gate, up)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys, turned by the angles of their positions (Su et al. 2021, arXiv:2104.09864); element i with
    i + d / 2, as in Llama: y = x cos + [-x_upper, x_lower] sin.

    x: [B, heads, L, d], fp32, bf16 or fp16, d even. cos, sin: [B, L, d] or [1, L, d], in any of these dtypes; they get
        no gradient.
    Returns [B, heads, L, d] in the dtype of x, computed in fp32 and rounded once, with gradient to x; it lies in memory
    as [B, L, heads, d]. Raises ValueError on shapes, dtypes and devices. Reverse mode only, once: forward-mode AD and
    double backward raise NotImplementedError.
    """
    check.tensor("x", x, dims=4)
    batch, _, length, size = x.shape
    if size % 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [B, heads, L, d] with d even")
    for name, angles in (("cos", cos), ("sin", sin)):
        check.tensor(name, angles, dims=3)
        if angles.shape not in ((batch, length, size), (1, length, size)):
            raise ValueError(
                f"{name}: got shape {tuple(angles.shape)}, wanted {(batch, length, size)} or {(1, length, size)}"
            )
        check.same_device(name, angles, "x", x)
    if sin.shape != cos.shape:
        raise ValueError(f"sin: got shape {tuple(sin.shape)}, wanted {tuple(cos.shape)}, the shape of cos")
    rows = _last_contiguous(x.transpose(1, 2))
    return _rotate(rows, *(check.fp32(t).contiguous() for t in (cos, sin)), False).transpose(1, 2)


@checked_once
def _eps(eps) -> Tensor:
    return check.scalars(check.number("eps", eps, above=0.0))


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _norm_setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, grad, _):
    needs = ctx.needs_input_grad[:2]
    if grad is None or not any(needs):
        return None, None, None
    grads = ops.rms_norm_backward(grad, *ctx.saved_tensors, *needs)
    return *(x if need else None for x, need in zip(grads, needs, strict=True)), None


def _swiglu_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, grad):
    return ops.swiglu_backward(grad, *ctx.saved_tensors)


def _rotate_setup(ctx, inputs, output) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx, grad):
    return ops.rotate(_last_contiguous(grad), *ctx.saved_tensors, not ctx.back), None, None, None


_rms_norm = differentiable("rms_norm", _norm_setup, _norm_backward, (0, 1))
_swiglu = differentiable("swiglu", _swiglu_setup, _swiglu_backward, (0, 1))
_rotate = differentiable("rotate", _rotate_setup, _rotate_backward)


@torch.library.register_fake("fastrlhf::rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.register_fake("fastrlhf::rms_norm_backward")
def _(grad, x, weight, rstd, needs_x, needs_weight):
    return x.new_empty(x.shape if needs_x else (0,)), weight.new_empty(weight.shape if needs_weight else (0,))


@torch.library.register_fake("fastrlhf::swiglu")
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("fastrlhf::swiglu_backward")
def _(grad, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@torch.library.register_fake("fastrlhf::rotate")
def _(x, cos, sin, back):
    return x.new_empty(x.shape)
