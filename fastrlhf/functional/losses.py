"""The losses of PPO. Loss, gradients and statistics come out of the same pass over the tokens.

Reverse mode only, once: forward-mode AD and double backward raise NotImplementedError.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.fallback import AGGREGATIONS, KL_ESTIMATORS
from fastrlhf.functional import _checks as check
from fastrlhf.functional._autograd import checked_once, differentiable, known_gradients


class PPOStats(NamedTuple):
    """Scalars on the loss's device, without gradient; means over the tokens of this call; all 0 if there are none."""

    policy_loss: Tensor  # the clipped surrogate alone, aggregated like the loss
    approx_kl: Tensor  # KL(old || new) by k3 on the (clamped) log-ratio: mean of ratio - 1 - log ratio
    clip_fraction: Tensor  # tokens whose ratio was clipped to the worse side
    dual_clip_fraction: Tensor  # tokens whose loss was bounded by dual_clip
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    entropy: Tensor  # 0 if not given
    kl: Tensor  # to the reference, by kl_estimator; 0 if not given
    tokens: Tensor  # how many counted


class ValueStats(NamedTuple):
    """Scalars on the loss's device, without gradient; means over the tokens of this call; all 0 if there are none."""

    clip_fraction: Tensor  # tokens where the clipped error was the larger
    value_mean: Tensor
    return_mean: Tensor
    explained_variance: Tensor  # 1 - Var(returns - values) / Var(returns); 0 if the returns are all equal
    tokens: Tensor  # how many counted


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    ratio_level: str = "token",
    weights: Tensor | None = None,
    advantage_stats: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, PPOStats]:
    """The clipped PPO policy loss, with entropy bonus and KL penalty.

    log_probs, old_log_probs, advantages: [B, T] (or any one shape, with "token" ratios and "token-mean"), fp32, bf16 or
        fp16. Gradient goes to log_probs and entropy; everything else is a constant.
    mask: the same shape, 1 = counts. What stands under a 0 is not read.
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    dual_clip: c > 1 bounds the loss of a token with A < 0 by c |A| (Ye et al. 2020, arXiv:1912.09729, equation 5).
    log_ratio_clamp: holds the log-ratio within +-c before exp; gradient 0 outside.
    ratio_level: "sequence" gives every token the geometric mean of its sequence's ratios, differentiated as such (GSPO,
        arXiv:2507.18071, equation 7).
    weights: the same shape, multiply each token's clipped surrogate (importance weights of a rollout mismatch).
    advantage_stats: [2], mean and 1/std: advantages become (A - mean) / std on the way in.
    entropy, ref_log_probs: the same shape; the loss gets - entropy_coef H and + kl_coef KL, see `kl_divergence`. With a
        coefficient of 0 they are only reported in the stats, and even inf and nan change neither loss nor gradient.
    aggregation: "token-mean": sum over tokens / tokens; "seq-mean-token-sum": sum over tokens / sequences;
        "seq-mean-token-mean": mean over each sequence's tokens, then sum / sequences. Sequences without a token that
        counts do not count.
    denominator: replaces that last count (tokens, or sequences) by the global one, so that gradient accumulation and
        data parallelism give the gradient of one big batch.
    Returns (loss, PPOStats), the loss an fp32 scalar; 0 if nothing counts. Raises ValueError: nothing broadcasts.

    L = mean of w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) - entropy_coef H + kl_coef KL,
    r = exp(log_probs - old_log_probs). Schulman et al. 2017 (arXiv:1707.06347), equation 7.
    """
    check.tensor("log_probs", log_probs)
    numbers, indices = ppo_options(
        clip_low,
        clip_high,
        dual_clip,
        log_ratio_clamp,
        entropy_coef,
        kl_coef,
        kl_estimator,
        ratio_level,
        aggregation,
    )
    _, sequence_ratio, aggregation_index = indices
    by_sequence = f"aggregation={aggregation!r}" if aggregation_index else None
    mask = check_ppo_inputs(
        ("log_probs", log_probs),
        {"old_log_probs": old_log_probs, "advantages": advantages},
        {"weights": weights, "entropy": entropy, "ref_log_probs": ref_log_probs},
        mask,
        advantage_stats,
        kl_coef=kl_coef,
        by_sequence="ratio_level='sequence'" if sequence_ratio else by_sequence,
    )
    if entropy is None and entropy_coef:
        raise ValueError(f"entropy: got None, wanted a tensor, because entropy_coef={entropy_coef}")

    needs_grad = torch.is_grad_enabled() and (
        log_probs.requires_grad or (entropy is not None and entropy.requires_grad)
    )
    loss, stats, _, _ = _ppo_loss(
        check.fp32(log_probs),
        check.fp32(old_log_probs),
        check.fp32(advantages),
        mask,
        check.fp32(weights),
        check.fp32(advantage_stats),
        check.fp32(entropy),
        check.fp32(ref_log_probs),
        check.denominator(denominator, log_probs),
        numbers,
        *indices,
        needs_grad,
    )
    return loss, PPOStats(*stats.unbind())


def check_ppo_inputs(
    model: tuple[str, Tensor],
    constants: dict[str, Tensor],
    optional: dict[str, Tensor | None],
    mask: Tensor,
    advantage_stats: Tensor | None,
    *,
    kl_coef: float,
    by_sequence: str | None,
) -> Tensor:
    """Of a PPO loss: everything in the shape of `model` (its name, the tensor). Returns the mask as bool.

    by_sequence: why the shape has to be [B, T], or None.
    """
    for name, x in (constants | {name: x for name, x in optional.items() if x is not None}).items():
        check.like(name, x, *model)
    mask = check.mask("mask", mask, *model)
    if by_sequence is not None:
        check.sequences(*model, by_sequence)
    if advantage_stats is not None:
        check.tensor("advantage_stats", advantage_stats, dims=1)
        check.same_device("advantage_stats", advantage_stats, *model)
        if advantage_stats.shape[0] != 2:
            raise ValueError(f"advantage_stats: got shape {tuple(advantage_stats.shape)}, wanted (2,): mean and 1/std")
    if optional["ref_log_probs"] is None and kl_coef:
        raise ValueError(f"ref_log_probs: got None, wanted a tensor, because kl_coef={kl_coef}")
    return mask


@checked_once
def ppo_options(
    clip_low, clip_high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef, kl_estimator, ratio_level, aggregation
) -> tuple[Tensor, tuple[int, bool, int]]:
    """As the raw ops take them."""
    numbers = check.scalars(
        check.number("clip_low", clip_low, least=0.0, most=1.0),
        check.number("clip_high", clip_high, least=0.0),
        check.limit("dual_clip", dual_clip, above=1.0),
        check.limit("log_ratio_clamp", log_ratio_clamp),
        check.number("entropy_coef", entropy_coef),
        check.number("kl_coef", kl_coef),
    )
    estimator = check.option("kl_estimator", kl_estimator, KL_ESTIMATORS)
    sequence_ratio = check.option("ratio_level", ratio_level, ("token", "sequence")) == 1
    return numbers, (estimator, sequence_ratio, check.option("aggregation", aggregation, AGGREGATIONS))


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = None,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, ValueStats]:
    """The value function's squared error, optionally clipped around the old values.

    values, old_values, returns: [B, T] (or any one shape, with "token-mean"), fp32, bf16 or fp16. Gradient goes to
        values alone. old_values may be None without `clip`.
    mask, aggregation, denominator: as for `ppo_loss`.
    Returns (loss, ValueStats), the loss an fp32 scalar; 0 if nothing counts. Raises ValueError.

    L = mean of 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), as in the code of Schulman et al. 2017.
    """
    check.tensor("values", values)
    check.like("returns", returns, "values", values)
    if old_values is not None:
        check.like("old_values", old_values, "values", values)
    elif clip is not None:
        raise ValueError(f"old_values: got None, wanted a tensor, because clip={clip}")
    mask = check.mask("mask", mask, "values", values)
    limit, aggregation_index = _value_options(clip, aggregation)
    if aggregation_index:
        check.sequences("values", values, f"aggregation={aggregation!r}")
    loss, stats, _ = _value_loss(
        check.fp32(values),
        None if clip is None else check.fp32(old_values),
        check.fp32(returns),
        mask,
        check.denominator(denominator, values),
        limit,
        aggregation_index,
        torch.is_grad_enabled() and values.requires_grad,
    )
    return loss, ValueStats(*stats.unbind())


@checked_once
def _value_options(clip, aggregation) -> tuple[Tensor, int]:
    return check.scalars(check.limit("clip", clip)), check.option("aggregation", aggregation, AGGREGATIONS)


# Inputs are passed on with their graphs; the backward passes give gradient to those the docstrings name, and no others.


_ppo_loss = differentiable("ppo_loss", *known_gradients({0: 2, 6: 3}, arguments=14))
_value_loss = differentiable("value_loss", *known_gradients({0: 2}, arguments=8))


@torch.library.register_fake("fastrlhf::ppo_loss")
def _(log_probs, old_log_probs, advantages, mask, weights, advantage_stats, entropy, *rest):
    needs_grad = rest[-1]
    shape = log_probs.shape if needs_grad else (0,)
    entropy_shape = log_probs.shape if needs_grad and entropy is not None else (0,)
    stats = log_probs.new_empty(len(PPOStats._fields))
    return log_probs.new_empty(()), stats, log_probs.new_empty(shape), log_probs.new_empty(entropy_shape)


@torch.library.register_fake("fastrlhf::value_loss")
def _(values, old_values, returns, mask, denominator, clip, aggregation, needs_grad):
    stats = values.new_empty(len(ValueStats._fields))
    return values.new_empty(()), stats, values.new_empty(values.shape if needs_grad else (0,))
