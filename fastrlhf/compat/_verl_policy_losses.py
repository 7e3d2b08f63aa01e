"""verl's losses of policies: the clipped one, GSPO, CISPO and GMPO. `fastrlhf.compat.verl` says more about verl."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.compat._common import aggregate, cast, fits
from fastrlhf.compat._patch import original

ALGOS = "verl.trainer.ppo.core_algos"

CLAMP = 20.0  # of log-ratios
BEYOND = math.exp(0.999 * CLAMP)  # a ratio that says that some may have been clamped
AGGREGATIONS = {
    "token-mean": "token-mean",
    "token-sum": "token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "seq-mean-token-sum",
    "seq-mean-token-mean": "seq-mean-token-mean",
}


def aggregation_of(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[str, float | Tensor | None]:
    """(aggregation, denominator), as our losses take them. mask: [B, T], bool."""
    if loss_agg_mode not in AGGREGATIONS:
        wanted = ", ".join(map(repr, AGGREGATIONS))
        raise ValueError(f"Invalid loss_agg_mode: got {loss_agg_mode!r}, wanted one of {wanted}")
    aggregation = AGGREGATIONS[loss_agg_mode]
    by_token = aggregation == "token-mean"
    count = batch_num_tokens if by_token else global_batch_size
    if loss_agg_mode == "token-sum":
        count = 1
    if count is None and dp_size > 1:
        name = "batch_num_tokens" if by_token else "global_batch_size"
        raise ValueError(f"{name} is required when dp_size > 1: got None, dp_size={dp_size}")
    if loss_agg_mode == "seq-mean-token-sum-norm":
        count = mask.any(-1).sum().clamp(min=1) if count is None else count
        count = count * (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return aggregation, count if count is None or dp_size == 1 else count / dp_size


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """(loss, metrics) of PPO with dual clip, everything [B, T]. config: verl's ActorConfig."""
    low, high = _clip_range(config)
    if not _ours(log_prob, old_log_prob, advantages, rollout_is_weights, mask=response_mask):
        arguments = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
        return original(f"{ALGOS}.compute_policy_loss_vanilla")(*arguments)
    mask = response_mask.to(torch.bool)
    aggregation, denominator = aggregation_of(mask, loss_agg_mode, **config.global_batch_info)
    loss, stats = F.ppo_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask,
        clip_low=low,
        clip_high=high,
        dual_clip=config.get("clip_ratio_c", 3.0),
        log_ratio_clamp=CLAMP,
        weights=rollout_is_weights,
        ref_log_probs=old_log_prob,  # so that the statistics have the mean of the log-ratios
        kl_estimator="k1",
        aggregation=aggregation,
        denominator=denominator,
    )
    numbers = (stats.clip_fraction, stats.dual_clip_fraction, stats.kl, stats.ratio_min, stats.ratio_max)
    clipped, dual_clipped, kl, smallest, largest = torch.stack(numbers).tolist()
    if not 1 / BEYOND < smallest <= largest < BEYOND:  # also where they are nan
        kl = F.masked_mean((log_prob.detach() - old_log_prob).clamp(-CLAMP, CLAMP), mask).item()
    loss = cast(loss, exact_dtype, log_prob, old_log_prob, advantages, response_mask)
    return loss, _metrics(clipped, -kl, dual_clipped)


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """(loss, metrics) of GSPO (arXiv:2507.18071): the sequence's mean log-ratio, at most 10, for each of its tokens,
    with that token's gradient."""
    low, high = _clip_range(config)
    if not _ours(log_prob, old_log_prob, advantages, rollout_is_weights, mask=response_mask):
        arguments = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
        return original(f"{ALGOS}.compute_policy_loss_gspo")(*arguments)
    mask = response_mask.to(torch.bool)
    with torch.no_grad():
        log_ratio = F.masked_mean(log_prob.float() - old_log_prob.float(), mask, dim=-1)
        lengths = mask.sum(-1)
        kl = -(log_ratio * lengths).sum() / lengths.sum().clamp(min=1)
    held = (log_ratio > 10.0).unsqueeze(-1)
    aggregation, denominator = aggregation_of(mask, loss_agg_mode, **config.global_batch_info)
    loss, stats = F.ppo_loss(
        torch.where(held, 0.0, log_prob - log_prob.detach()),  # nothing but its gradient
        -log_ratio.clamp(max=10.0).unsqueeze(-1).expand_as(log_prob),
        advantages,
        mask,
        clip_low=low,
        clip_high=high,
        log_ratio_clamp=None,
        weights=rollout_is_weights,
        aggregation=aggregation,
        denominator=denominator,
    )
    clipped, kl = torch.stack((stats.clip_fraction, kl)).tolist()
    loss = cast(loss, exact_dtype, log_prob, old_log_prob, advantages, response_mask)
    return loss, _metrics(clipped, kl, 0.0)


def compute_policy_loss_geo_mean(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """(loss, metrics) of GMPO (arXiv:2507.20673): log-ratios clipped token by token, their mean in each sequence, and
    the mean over the B sequences, whatever loss_agg_mode is."""
    low, high = _clip_range(config)
    if not _ours(log_prob, old_log_prob, advantages, rollout_is_weights, mask=response_mask):
        arguments = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
        return original(f"{ALGOS}.compute_policy_loss_geo_mean")(*arguments)
    mask = response_mask.to(torch.bool)
    log_ratio = torch.where(mask, log_prob.float() - old_log_prob.float(), 0.0)
    good, bad = advantages > 0, advantages < 0
    worse = torch.where(good, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    worse = torch.where(good | bad, worse, 0.0)
    losses = -F.masked_mean(advantages, mask, dim=-1) * F.masked_mean(worse, mask, dim=-1).exp()
    if rollout_is_weights is not None:
        losses = losses * F.masked_mean((rollout_is_weights + 1e-10).log(), mask, dim=-1).exp()
    with torch.no_grad():
        clipped = log_ratio != log_ratio.clamp(-low, high)
        fractions = (F.masked_mean((clipped & side).float(), mask) for side in (good, bad))
        above, below, kl = torch.stack((*fractions, F.masked_mean(log_ratio, mask))).tolist()
    loss = cast(losses.mean(), exact_dtype, log_prob, old_log_prob, advantages, response_mask)
    return loss, _metrics(above, -kl, below)


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """(loss, metrics) of CISPO (arXiv:2506.13585): log-probs times constants, clipped ratios and advantages."""
    low, high = _clip_range(config)
    if not _ours(log_prob, old_log_prob, advantages, rollout_is_weights, mask=response_mask):
        arguments = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
        return original(f"{ALGOS}.compute_policy_loss_cispo")(*arguments)
    mask = response_mask.to(torch.bool)
    with torch.no_grad():
        log_ratio = (log_prob.float() - old_log_prob.float()).clamp(-CLAMP, CLAMP)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - low, 1 + high)
        weights = -clipped * advantages * (1.0 if rollout_is_weights is None else rollout_is_weights)
        weights = torch.where(mask, weights, 0.0)  # it multiplies the gradients of what does not count, too
        numbers = (F.masked_mean((ratio != clipped).float(), mask), F.masked_mean(log_ratio, mask))
        fraction, kl = torch.stack(numbers).tolist()
    aggregation, denominator = aggregation_of(mask, loss_agg_mode, **config.global_batch_info)
    loss = aggregate(weights * log_prob, mask, aggregation, denominator)
    loss = cast(loss, exact_dtype, log_prob, old_log_prob, advantages, response_mask)
    return loss, _metrics(fraction, -kl, 0.0)


def _clip_range(config: Any) -> tuple[float, float]:
    """(clip_low, clip_high) of verl's ActorConfig."""
    if config is None:
        raise ValueError("config: got None, wanted verl's ActorConfig")
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return config.clip_ratio if low is None else low, config.clip_ratio if high is None else high


def _ours(log_prob: Tensor, *others: Tensor | None, mask: Tensor) -> bool:
    return log_prob.dim() == 2 and fits(log_prob, *others, mask=mask)


def _metrics(clipped: float, kl: float, clipped_below: float) -> dict[str, float]:
    return {"actor/pg_clipfrac": clipped, "actor/ppo_kl": kl, "actor/pg_clipfrac_lower": clipped_below}
