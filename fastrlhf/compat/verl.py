"""verl (https://github.com/volcengine/verl), 0.9.1: what `fastrlhf.patch("verl")` binds.

    import fastrlhf

    fastrlhf.patch("verl")  # before the trainer is made; in Ray's workers through FASTRLHF_PATCH=verl
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    advantages, returns = compute_gae_advantage_return(rewards, values, response_mask, gamma=1.0, lam=0.95)

The losses of policies are in `_verl_policy_losses`, log-probs and entropies in `_verl_vocabulary`. The clipped loss and
GAE are registered as "fastrlhf" as well (policy_loss.loss_mode, adv_estimator).

Where verl and we differ: what stands under a 0 of a mask is not read, advantages and returns are 0 there, and so is
what `masked_whiten` returns; where verl refuses a mask of fewer than two tokens, which takes a stall of the device to
find out, the variance is 0; a batch without tokens has a loss of 0, not nan. Masks hold zeros and ones.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.compat._common import aggregate, cast, fits
from fastrlhf.compat._patch import original
from fastrlhf.compat._verl_policy_losses import (
    ALGOS,
    aggregation_of,
    compute_policy_loss_cispo,
    compute_policy_loss_geo_mean,
    compute_policy_loss_gspo,
    compute_policy_loss_vanilla,
)
from fastrlhf.compat._verl_vocabulary import (
    FUNCTIONAL,
    FUSED,
    KERNEL,
    FusedLinearForPPO,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    linear_cross_entropy,
    logprobs_from_logits,
)

PACKAGE = "verl"
VERSIONS = ">=0.9.1,<0.10"

KL_ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: Tensor,
    lam: Tensor,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, Tensor]:
    """(whitened advantages, returns), [B, T], fp32, without gradient; gaps in the mask are skipped.

    Reading rewards and values, GAE and the statistics of the whitening are one pass.
    """
    if not fits(token_level_rewards, values, mask=response_mask):
        theirs = original(f"{ALGOS}.compute_gae_advantage_return")
        return theirs(token_level_rewards, values, response_mask, gamma, lam)
    mask = response_mask.to(torch.bool)
    with torch.no_grad():
        scores, v = token_level_rewards.new_zeros(mask.shape[0]), values.float()
        # There is no KL penalty: its two log-probs are the values, of which every line is read only once.
        target = F.rollout_advantages(
            *(scores, v, v, v, mask),
            kl_coef=0.0,
            token_rewards=token_level_rewards,
            gamma=float(gamma),
            lam=float(lam),
        )
        mean, rstd = target.advantage_stats
        ones = response_mask if response_mask.dtype == torch.float32 else mask.float()
        advantages = target.advantages.mul_(rstd).addcmul_(ones, -mean * rstd)  # where it is 0 they stay 0
    inputs = (token_level_rewards, values, response_mask)
    return cast(advantages, exact_dtype, *inputs), cast(target.returns, exact_dtype, *inputs)


def compute_rewards(
    token_level_scores: Tensor,
    old_log_prob: Tensor,
    ref_log_prob: Tensor,
    kl_ratio: float,
    *,
    exact_dtype: bool = False,
) -> Tensor:
    """scores - kl_ratio (log p - log q), everything [B, T]."""
    if not fits(token_level_scores, old_log_prob, ref_log_prob):
        return original(f"{ALGOS}.compute_rewards")(token_level_scores, old_log_prob, ref_log_prob, kl_ratio)
    rewards = token_level_scores - F.kl_divergence(old_log_prob, ref_log_prob) * kl_ratio
    return cast(rewards, exact_dtype, token_level_scores, old_log_prob, ref_log_prob)


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
    *,
    exact_dtype: bool = False,
) -> Tensor:
    """The loss [B, T] as a scalar, with gradient: means over tokens or sequences, of the global batch if its counts
    are given, times dp_size."""
    counts = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    if not fits(loss_mat, mask=loss_mask) or loss_mat.dim() != 2:
        return original(f"{ALGOS}.agg_loss")(loss_mat, loss_mask, loss_agg_mode, *counts)
    mask = loss_mask.to(torch.bool)
    loss = aggregate(loss_mat, mask, *aggregation_of(mask, loss_agg_mode, *counts))
    return cast(loss, exact_dtype, loss_mat, loss_mask)


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, Tensor]:
    """(half the squared error, clipped around the old values; the fraction that was clipped), both scalars."""
    counts = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    inputs = (vpreds, returns, values)
    if not fits(*inputs, mask=response_mask) or vpreds.dim() != 2 or cliprange_value <= 0:
        options = (response_mask, cliprange_value, loss_agg_mode, *counts)
        return original(f"{ALGOS}.compute_value_loss")(*inputs, *options)
    mask = response_mask.to(torch.bool)
    aggregation, denominator = aggregation_of(mask, loss_agg_mode, *counts)
    options = {"clip": float(cliprange_value), "aggregation": aggregation, "denominator": denominator}
    loss, stats = F.value_loss(vpreds, values, returns, mask, **options)
    return cast(loss, exact_dtype, *inputs, response_mask), stats.clip_fraction


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str, *, exact_dtype: bool = False) -> Tensor:
    """Estimates of the KL divergence, [...], by "kl" or "k1", "abs", "mse" or "k2", "low_var_kl" or "k3".

    k3 holds the log-ratio within 20 and the estimate within 10. A "+" at the end gives them the gradient of k2.
    """
    base = kl_penalty.removesuffix("+")
    if base not in KL_ESTIMATORS or not fits(logprob, ref_logprob):
        return original(f"{ALGOS}.kl_penalty")(logprob, ref_logprob, kl_penalty)
    kl = _kl(logprob, ref_logprob, KL_ESTIMATORS[base])
    if base != kl_penalty:
        unbiased = _kl(logprob, ref_logprob, "k2")
        kl = unbiased - unbiased.detach() + kl.detach()
    return cast(kl, exact_dtype, logprob, ref_logprob)


def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str, *, exact_dtype: bool = False) -> Tensor:
    """`kl_penalty` with the estimator's own gradient."""
    if kl_penalty not in KL_ESTIMATORS or not fits(logprob, ref_logprob):
        return original(f"{ALGOS}.kl_penalty_forward")(logprob, ref_logprob, kl_penalty)
    return cast(_kl(logprob, ref_logprob, KL_ESTIMATORS[kl_penalty]), exact_dtype, logprob, ref_logprob)


def _kl(logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    return F.kl_divergence(logprob, ref_logprob, estimator=estimator, clamp=(20.0, 10.0) if estimator == "k3" else None)


def masked_sum(
    values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None, *, exact_dtype: bool = False
) -> Tensor:
    """Sum where the mask is 1, over everything or along one or more axes."""
    if not fits(values, mask=mask):
        return original(f"{FUNCTIONAL}.masked_sum")(values, mask, axis)
    total = torch.where(mask.to(torch.bool), values, 0.0).sum(dim=axis, dtype=torch.float32)
    return cast(total, exact_dtype, values, mask)


def masked_mean(
    values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None, *, exact_dtype: bool = False
) -> Tensor:
    """Mean where the mask is 1, over everything or along one or more axes; 0 where it is 1 nowhere."""
    if not fits(values, mask=mask) or isinstance(axis, tuple):
        return original(f"{FUNCTIONAL}.masked_mean")(values, mask, axis)
    return cast(F.masked_mean(values, mask, dim=axis), exact_dtype, values, mask)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True, *, exact_dtype: bool = False) -> Tensor:
    """Variance where the mask is 1. unbiased: divided by n - 1."""
    if not fits(values, mask=mask):
        return original(f"{FUNCTIONAL}.masked_var")(values, mask, unbiased)
    counts = mask.to(torch.bool)
    deviations = torch.where(counts, values.float() - F.masked_mean(values, counts), 0.0)
    variance = F.masked_mean(deviations**2, counts)
    if unbiased:
        n = counts.sum()
        variance = variance * (n / (n - 1).clamp(min=1))
    return cast(variance, exact_dtype, values, mask)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, *, exact_dtype: bool = False) -> Tensor:
    """Whitened by mean and unbiased variance of the values where the mask is 1; 0 where it is 0.

    shift_mean: False adds the mean back.
    """
    if not fits(values, mask=mask):
        return original(f"{FUNCTIONAL}.masked_whiten")(values, mask, shift_mean)
    return cast(F.masked_whiten(values, mask, shift_mean=shift_mean), exact_dtype, values, mask)


def register() -> None:
    """GAE and the clipped loss, under the name "fastrlhf"."""
    algos = importlib.import_module(ALGOS)
    algos.register_policy_loss("fastrlhf")(compute_policy_loss_vanilla)
    algos.register_adv_est("fastrlhf")(compute_gae_advantage_return)


def unregister() -> None:
    algos = importlib.import_module(ALGOS)
    algos.POLICY_LOSS_REGISTRY.pop("fastrlhf", None)
    algos.ADV_ESTIMATOR_REGISTRY.pop("fastrlhf", None)


_ALGOS = (
    compute_gae_advantage_return,
    compute_policy_loss_vanilla,
    compute_policy_loss_gspo,
    compute_policy_loss_cispo,
    compute_policy_loss_geo_mean,
    compute_value_loss,
    compute_rewards,
    agg_loss,
    kl_penalty,
    kl_penalty_forward,
)
_FUNCTIONAL = (
    logprobs_from_logits,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    masked_sum,
    masked_mean,
    masked_var,
    masked_whiten,
)
REPLACEMENTS = {
    **{f"{ALGOS}.{function.__name__}": function for function in _ALGOS},
    **{f"{FUNCTIONAL}.{function.__name__}": function for function in _FUNCTIONAL},
    FUSED: FusedLinearForPPO,
    KERNEL: linear_cross_entropy,
}
_FP32 = "fp32 inside and out; verl computes in the dtype of its inputs"
_SAME_DTYPE = {KERNEL, f"{FUNCTIONAL}.entropy_from_logits_with_chunking"}
MORE_ACCURATE = {
    **{place: _FP32 for place in REPLACEMENTS if place not in _SAME_DTYPE},
    f"{FUNCTIONAL}.logprobs_from_logits": "fp32 inside and out; without flash-attn, verl rounds to the logits' dtype",
    FUSED: "logits stay in fp32, verl rounds them to the dtype of the hidden states; so is the entropy",
}
