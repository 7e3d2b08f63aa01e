"""Per-token estimates of the KL divergence between two policies."""

import math

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.fallback import KL_ESTIMATORS
from fastrlhf.functional import _checks as check

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
    index = check.option("estimator", estimator, KL_ESTIMATORS)
    if not isinstance(clamp, tuple):
        clamp = (None, clamp)
    if len(clamp) != 2:
        raise ValueError(f"clamp: got {clamp!r}, wanted c, (a, c) or None")
    clamp_input, clamp_output = clamp
    clamp_input, clamp_output = check.limit("clamp", clamp_input), check.limit("clamp", clamp_output)
    return ops.kl_divergence(log_probs.float(), ref_log_probs.float(), index, clamp_input, clamp_output)


def _setup(ctx, inputs, output) -> None:
    log_probs, ref_log_probs, *ctx.options = inputs
    ctx.save_for_backward(log_probs, ref_log_probs)


@check.once_differentiable
def _backward(ctx, grad):
    grad = ops.kl_divergence_backward(grad, *ctx.saved_tensors, *ctx.options)
    wanted, wanted_ref = ctx.needs_input_grad[:2]
    return grad if wanted else None, -grad if wanted_ref else None, None, None, None


torch.library.register_autograd("fastrlhf::kl_divergence", _backward, setup_context=_setup)


@torch.library.register_fake("fastrlhf::kl_divergence")
def _(log_probs, ref_log_probs, estimator, clamp_input=math.inf, clamp_output=math.inf):
    return log_probs.new_empty(log_probs.shape)


@torch.library.register_fake("fastrlhf::kl_divergence_backward")
def _(grad, log_probs, ref_log_probs, estimator, clamp_input, clamp_output):
    return log_probs.new_empty(log_probs.shape)
