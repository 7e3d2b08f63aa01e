"""The raw ops of csrc/ops.cpp for devices that have no kernel, each in terms of `fastrlhf.reference`.

Only the calling convention is here: enumerations arrive as integers, "no limit" as infinity, and the ops that return
their gradients get them from `torch.func.grad` over the reference (autograd itself is below us at this point).
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
    counts, log_p, logsumexp = reference.log_softmax(logits, tokens, temperature)
    return reference.pick(log_p, tokens, counts), logsumexp


def token_log_probs_and_entropy(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    counts, log_p, logsumexp = reference.log_softmax(logits, tokens, temperature)
    return reference.pick(log_p, tokens, counts), reference.entropy_of(log_p, counts), logsumexp


def token_log_probs_backward(
    grad_log_probs: Tensor, logits: Tensor, tokens: Tensor, logsumexp: Tensor, temperature: float
) -> Tensor:
    return reference.token_log_probs_and_entropy_backward(
        grad_log_probs, None, logits, tokens, logsumexp, None, temperature
    )


def token_log_probs_and_entropy_backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    tokens: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    temperature: float,
) -> Tensor:
    return reference.token_log_probs_and_entropy_backward(
        grad_log_probs, grad_entropy, logits, tokens, logsumexp, entropy, temperature
    )


def token_log_probs_backward_(
    grad_log_probs: Tensor, logits: Tensor, tokens: Tensor, logsumexp: Tensor, temperature: float
) -> None:
    logits.copy_(token_log_probs_backward(grad_log_probs, logits, tokens, logsumexp, temperature))


def token_log_probs_and_entropy_backward_(
    grad_log_probs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    tokens: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    temperature: float,
) -> None:
    logits.copy_(
        token_log_probs_and_entropy_backward(
            grad_log_probs, grad_entropy, logits, tokens, logsumexp, entropy, temperature
        )
    )


def kl_divergence(
    log_probs: Tensor, ref_log_probs: Tensor, estimator: int, clamp_input: float, clamp_output: float
) -> Tensor:
    clamp = (_limit(clamp_input), _limit(clamp_output))
    return reference.kl_divergence(log_probs, ref_log_probs, estimator=KL_ESTIMATORS[estimator], clamp=clamp).clone()


def kl_divergence_backward(
    grad: Tensor, log_probs: Tensor, ref_log_probs: Tensor, estimator: int, clamp_input: float, clamp_output: float
) -> Tensor:
    def total(x):
        return (grad * kl_divergence(x, ref_log_probs, estimator, clamp_input, clamp_output)).sum()

    return torch.func.grad(total)(log_probs)


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
    def loss(log_probs, entropy):
        return reference.ppo_loss(
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

    nothing = log_probs.new_empty(0)
    if not needs_grad:
        return *loss(log_probs, entropy), nothing, nothing.clone()
    if entropy is None:
        grad, (value, stats) = _grad_and_results(lambda x: loss(x, None), (0,), log_probs)
        return value, stats, grad[0], nothing
    (grad, grad_entropy), (value, stats) = _grad_and_results(loss, (0, 1), log_probs, entropy)
    return value, stats, grad, grad_entropy


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
    def loss(values):
        options = {"clip": _limit(clip), "aggregation": AGGREGATIONS[aggregation], "denominator": denominator}
        return reference.value_loss(values, old_values, returns, mask, **options)

    if not needs_grad:
        return *loss(values), values.new_empty(0)
    (grad,), (value, stats) = _grad_and_results(loss, (0,), values)
    return value, stats, grad


def masked_mean(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return reference.masked_mean(x, mask, dim=1), mask.sum(1).float()


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool, eps: float) -> tuple[Tensor, Tensor]:
    options = {"unbiased": unbiased, "eps": eps}
    whitened = reference.masked_whiten(x, mask, shift_mean=shift_mean, **options)
    count = mask.sum().float()
    mean = reference.masked_mean(x, mask)
    squares = torch.where(mask, (x - mean) ** 2, 0.0).sum()
    rstd = (squares / (count - 1 if unbiased else count).clamp(min=1.0) + eps).rsqrt()
    return whitened, torch.stack([mean, rstd, count])


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coef: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def loss(chosen, rejected):
        return reference.pairwise_reward_loss(chosen, rejected, margin=margin, center_coef=center_coef)

    if not needs_grad:
        return *loss(chosen, rejected), chosen.new_empty(0), chosen.new_empty(0)
    (grad_chosen, grad_rejected), (value, stats) = _grad_and_results(loss, (0, 1), chosen, rejected)
    return value, stats, grad_chosen, grad_rejected


def _grad_and_results(function, positions, *args):
    """The gradients of function(*args)[0], and everything function returned."""

    def with_loss_kept(*args):
        loss, stats = function(*args)
        return loss, (loss, stats)

    grads, (loss, stats) = torch.func.grad(with_loss_kept, argnums=positions, has_aux=True)(*args)
    return grads, (loss.detach(), stats.detach())
