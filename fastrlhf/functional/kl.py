"""The KL divergence between two policies: estimated from the sampled tokens, and exact."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.fallback import KL_ESTIMATORS
from fastrlhf.functional import _checks as check
from fastrlhf.functional._autograd import checked_once, differentiable
from fastrlhf.functional.log_probs import temperature_number

ops = torch.ops.fastrlhf


def kl_divergence(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    *,
    estimator: str = "k1",
    clamp: float | tuple[float | None, float | None] | None = None,
) -> Tensor:
    """Per-token estimates of KL(policy || reference), from tokens that the policy sampled.

    log_probs, ref_log_probs: [...], fp32, bf16 or fp16, of the same tokens under the two policies.
    estimator: with d = log_probs - ref_log_probs, "k1": d, "k2": d^2 / 2, "k3": exp(-d) - 1 + d, "abs": |d|.
    clamp: c holds the estimate within [-c, c]; (a, c) holds d within [-a, a] first (either may be None). As with
        torch.clamp, the gradient outside is 0.
    Returns [...], fp32, in nats, with gradient to both. Raises ValueError on shapes, dtypes, devices and options.
    Reverse mode only, once: forward-mode AD and double backward raise NotImplementedError.

    Schulman 2020, "Approximating KL Divergence": k1 and k3 are unbiased as values, k2 and k3 never negative; as a loss,
    the gradient of k2 is the unbiased one, that of k1 has mean zero.
    """
    check.tensor("log_probs", log_probs)
    check.like("ref_log_probs", ref_log_probs, "log_probs", log_probs)
    index, limits = _options(estimator, clamp)
    return _kl_divergence(check.fp32(log_probs), check.fp32(ref_log_probs), index, limits)


def full_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """The exact KL(policy || reference) at each position, over the whole vocabulary; each tensor is read once.

    logits, ref_logits: [..., V], fp32, bf16 or fp16, each its own; rows may be strided, the last dimension contiguous.
    mask: [...], 1 = counts. A row under a 0 is not read; its KL is 0 and its gradients are 0.
    temperature: of both distributions, a positive normal fp32 number.
    Returns [...], fp32, in nats, with gradient to both, in their dtypes. A token impossible under the policy adds
    nothing; one impossible under the reference alone makes it infinite. Raises ValueError on shapes, dtypes and devices
    that don't match. Reverse mode only, once: forward-mode AD and double backward raise NotImplementedError.

    KL = sum_j p_j (log p_j - log q_j), p = softmax(logits / T), q = softmax(ref_logits / T);
    dKL/dz_j = p_j (log p_j - log q_j - KL) / T;  dKL/dz_ref_j = (q_j - p_j) / T.
    """
    for name, x in (("logits", logits), ("ref_logits", ref_logits)):
        check.tensor(name, x)
        check.vocabulary(name, x)
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"ref_logits: got shape {tuple(ref_logits.shape)}, wanted {tuple(logits.shape)}, the shape of logits"
        )
    check.same_device("ref_logits", ref_logits, "logits", logits)
    if mask is not None:
        mask = check.mask("mask", mask, "logits without the vocabulary", logits[..., 0])
    return _full_kl(logits, ref_logits, mask, temperature_number(temperature))[0]


@checked_once
def _options(estimator, clamp) -> tuple[int, Tensor]:
    index = check.option("estimator", estimator, KL_ESTIMATORS)
    if not isinstance(clamp, tuple):
        clamp = (None, clamp)
    if len(clamp) != 2:
        raise ValueError(f"clamp: got {clamp!r}, wanted c, (a, c) or None")
    return index, check.scalars(*(check.limit("clamp", limit) for limit in clamp))


def _setup(ctx, inputs, output) -> None:
    log_probs, ref_log_probs, *ctx.options = inputs
    ctx.save_for_backward(log_probs, ref_log_probs)


def _backward(ctx, grad):
    grad = ops.kl_divergence_backward(grad, *ctx.saved_tensors, *ctx.options)
    wanted, wanted_ref = ctx.needs_input_grad[:2]
    return grad if wanted else None, -grad if wanted_ref else None, None, None


def _full_setup(ctx, inputs, output) -> None:
    logits, ref_logits, mask, ctx.temperature = inputs
    ctx.save_for_backward(logits, ref_logits, mask, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _full_backward(ctx, grad, *_):
    needs = ctx.needs_input_grad[:2]
    if grad is None or not any(needs):
        return None, None, None, None
    grads = ops.full_kl_backward(grad, *ctx.saved_tensors, ctx.temperature, *needs)
    return *(x if need else None for x, need in zip(grads, needs, strict=True)), None, None


_kl_divergence = differentiable("kl_divergence", _setup, _backward, (0, 1))
_full_kl = differentiable("full_kl", _full_setup, _full_backward, (0, 1))


@torch.library.register_fake("fastrlhf::kl_divergence")
def _(log_probs, ref_log_probs, estimator, clamp):
    return log_probs.new_empty(log_probs.shape)


@torch.library.register_fake("fastrlhf::kl_divergence_backward")
def _(grad, log_probs, ref_log_probs, estimator, clamp):
    return log_probs.new_empty(log_probs.shape)


@torch.library.register_fake("fastrlhf::full_kl")
def _(logits, ref_logits, mask, temperature):
    rows = logits.shape[:-1]
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in (rows, (*rows, 2), (*rows, 2)))


@torch.library.register_fake("fastrlhf::full_kl_backward")
def _(grad, logits, ref_logits, mask, kl, normaliser, ref_normaliser, temperature, needs_grad, needs_ref_grad):
    pairs = ((logits, needs_grad), (ref_logits, needs_ref_grad))
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in pairs)
