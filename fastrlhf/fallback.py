"""The raw ops of csrc/ops.cpp for devices that have no kernel, each in terms of `fastrlhf.reference`.

Enumerations arrive as integers, "no limit" as infinity. The token-wise losses return their gradients, and write them
out here: an op runs below autograd, which therefore cannot be asked. The tests hold them against autograd's.
"""

import math

import torch
from torch import Tensor

from fastrlhf import reference

OPS = (
    "token_log_probs",
    "token_log_probs_backward",
    "token_log_probs_backward_",
    "token_log_probs_and_entropy",
    "token_log_probs_and_entropy_backward",
    "token_log_probs_and_entropy_backward_",
    "kl_divergence",
    "kl_divergence_backward",
    "gae",
    "ppo_loss",
    "value_loss",
    "masked_mean",
    "masked_whiten",
    "pairwise_reward_loss",
)
# The integers of the raw ops are positions in these; csrc/cpu/kernels.h repeats them.
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
MASK_MODES = ("carry", "zero", "none")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def _limit(x: float) -> float | None:
    return None if math.isinf(x) else x


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    counts, z = reference.scaled(logits, tokens, temperature)
    logsumexp = torch.where(counts, torch.logsumexp(z, -1), 0.0)
    return reference.pick(torch.log_softmax(z, -1), tokens, counts), logsumexp


def token_log_probs_and_entropy(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    counts, z = reference.scaled(logits, tokens, temperature)
    log_p, logsumexp = torch.log_softmax(z, -1), torch.where(counts, torch.logsumexp(z, -1), 0.0)
    return reference.pick(log_p, tokens, counts), reference.entropy_of(log_p, counts), logsumexp


def token_log_probs_backward(grad_log_probs, logits, tokens, _logsumexp, temperature) -> Tensor:
    return reference.token_log_probs_and_entropy_backward(grad_log_probs, None, logits, tokens, None, temperature)


def token_log_probs_and_entropy_backward(
    grad_log_probs, grad_entropy, logits, tokens, _logsumexp, entropy, temperature
) -> Tensor:
    grads = (grad_log_probs, grad_entropy)
    return reference.token_log_probs_and_entropy_backward(*grads, logits, tokens, entropy, temperature)


def token_log_probs_backward_(grad_log_probs, logits, *rest) -> None:
    logits.copy_(token_log_probs_backward(grad_log_probs, logits, *rest))


def token_log_probs_and_entropy_backward_(grad_log_probs, grad_entropy, logits, *rest) -> None:
    logits.copy_(token_log_probs_and_entropy_backward(grad_log_probs, grad_entropy, logits, *rest))


def kl_divergence(
    log_probs: Tensor, ref_log_probs: Tensor, estimator: int, clamp_input: float, clamp_output: float
) -> Tensor:
    clamp = (_limit(clamp_input), _limit(clamp_output))
    return reference.kl_divergence(log_probs, ref_log_probs, estimator=KL_ESTIMATORS[estimator], clamp=clamp).clone()


def kl_divergence_backward(
    grad: Tensor, log_probs: Tensor, ref_log_probs: Tensor, estimator: int, clamp_input: float, clamp_output: float
) -> Tensor:
    log_ratio, name = log_probs - ref_log_probs, KL_ESTIMATORS[estimator]
    held = log_ratio.clamp(-clamp_input, clamp_input)
    outside = (log_ratio.abs() > clamp_input) | (reference.kl_estimate(held, name).abs() > clamp_output)
    return torch.where(outside, 0.0, grad * reference.kl_slope(held, name))


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap_values: Tensor | None,
    gamma: float,
    lam: float,
    mask_mode: int,
) -> tuple[Tensor, Tensor]:
    mode = MASK_MODES[mask_mode]
    return reference.gae(rewards, values, mask, gamma=gamma, lam=lam, mask_mode=mode, bootstrap_values=bootstrap_values)


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    advantage_stats: Tensor | None,
    entropy: Tensor | None,
    ref_log_probs: Tensor | None,
    denominator: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    log_ratio_clamp: float,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: int,
    sequence_ratio: bool,
    aggregation: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, stats, terms = reference.ppo_terms(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=_limit(dual_clip),
        log_ratio_clamp=_limit(log_ratio_clamp),
        ratio_level="sequence" if sequence_ratio else "token",
        weights=weights,
        advantage_stats=advantage_stats,
        entropy=entropy,
        entropy_coef=entropy_coef,
        ref_log_probs=ref_log_probs,
        kl_coef=kl_coef,
        kl_estimator=KL_ESTIMATORS[kl_estimator],
        aggregation=AGGREGATIONS[aggregation],
        denominator=denominator,
    )
    if not needs_grad:
        return loss, stats, log_probs.new_empty(0), log_probs.new_empty(0)

    # d loss / d log r is -A r, or 0 where a clip or the clamp holds.
    grad = torch.where(terms.held, 0.0, -terms.advantages * terms.ratio) * terms.weights * terms.shares
    if sequence_ratio:  # the ratio is the exponential of a mean: each token carries its part of the summed slope
        grad = mask * reference.divide(grad.sum(-1, keepdim=True), mask.sum(-1, keepdim=True))
    if terms.distance is not None and kl_coef:
        grad = grad + kl_coef * terms.shares * reference.kl_slope(terms.distance, KL_ESTIMATORS[kl_estimator])
    grad_entropy = log_probs.new_empty(0) if entropy is None else -entropy_coef * terms.shares
    return loss, stats, torch.where(mask, grad, 0.0), grad_entropy


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    denominator: Tensor | None,
    clip: float,
    aggregation: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    name = AGGREGATIONS[aggregation]
    options = {"clip": _limit(clip), "aggregation": name, "denominator": denominator}
    loss, stats = reference.value_loss(values, old_values, returns, mask, **options)
    if not needs_grad:
        return loss, stats, values.new_empty(0)
    kept, target = reference.keep(values, mask), reference.keep(returns, mask)
    slope = kept - target
    if old_values is not None:  # 0 where the value held at the clip has the larger error
        old = reference.keep(old_values, mask)
        held = torch.minimum(torch.maximum(kept, old - clip), old + clip)
        slope = torch.where((held - target) ** 2 > slope**2, 0.0, torch.where(held.isnan(), held, slope))
    grad = slope * reference.token_weights(mask, slope.dtype, name, denominator)
    return loss, stats, torch.where(mask, grad, 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return reference.masked_mean(x, mask, dim=1), mask.sum(1).float()


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool, eps: float) -> tuple[Tensor, Tensor]:
    whitened, *stats = reference.whiten(x, mask, shift_mean, unbiased, eps)
    return whitened, torch.stack(stats)


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coef: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, stats = reference.pairwise_reward_loss(chosen, rejected, margin=margin, center_coef=center_coef)
    if not needs_grad:
        return loss, stats, chosen.new_empty(0), chosen.new_empty(0)
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    slope, center = torch.sigmoid(-difference), 2 * center_coef * (chosen + rejected)
    count = max(chosen.numel(), 1)
    return loss, stats, (center - slope) / count, (center + slope) / count
