"""verl's losses of policies: the clipped one, GSPO, CISPO and GMPO. `fastrlhf.compat.verl` says more about verl."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def _as_verl_calls_it(loss_agg_mode: str = "token-mean") -> Callable[[Callable], Callable]:
    """Makes of (log_prob, old, advantages, mask as bool, mode, (clip_low, clip_high), config, weights) -> (loss,
    metrics) a function with verl's signature, which leaves to verl what we don't take."""
    default = loss_agg_mode

    def wrap(policy_loss: Callable) -> Callable:
        def call(
            old_log_prob: Tensor,
            log_prob: Tensor,
            advantages: Tensor,
            response_mask: Tensor,
            loss_agg_mode: str = default,
            config: Any = None,
            rollout_is_weights: Tensor | None = None,
            *,
            exact_dtype: bool = False,
        ) -> tuple[Tensor, dict[str, Any]]:
            if config is None:
                raise ValueError("config: got None, wanted verl's ActorConfig")
            if log_prob.dim() != 2 or not fits(
                log_prob, old_log_prob, advantages, rollout_is_weights, mask=response_mask
            ):
                theirs = original(f"{ALGOS}.{policy_loss.__name__}")
                arguments = (old_log_prob, log_prob, advantages, response_mask)
                return theirs(*arguments, loss_agg_mode, config, rollout_is_weights)
            mask = response_mask.to(torch.bool)
            low, high = config.clip_ratio_low, config.clip_ratio_high
            clip = (config.clip_ratio if low is None else low, config.clip_ratio if high is None else high)
            loss, metrics = policy_loss(
                log_prob, old_log_prob, advantages, mask, loss_agg_mode, clip, config, rollout_is_weights
            )
            return cast(loss, exact_dtype, log_prob, old_log_prob, advantages, response_mask), metrics

        for name in ("__name__", "__qualname__", "__doc__"):
            setattr(call, name, getattr(policy_loss, name))
        return call

    return wrap


@_as_verl_calls_it()
def compute_policy_loss_vanilla(log_prob, old_log_prob, advantages, mask, mode, clip, config, weights):
    """(loss, metrics) of PPO with dual clip, everything [B, T]. config: verl's ActorConfig."""
    aggregation, denominator = aggregation_of(mask, mode, **config.global_batch_info)
    loss, stats = F.ppo_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask,
        clip_low=clip[0],
        clip_high=clip[1],
        dual_clip=config.get("clip_ratio_c", 3.0),
        log_ratio_clamp=CLAMP,
        weights=weights,
        ref_log_probs=old_log_prob,  # so that the statistics have the mean of the log-ratios
        kl_estimator="k1",
        aggregation=aggregation,
        denominator=denominator,
    )
    numbers = (stats.clip_fraction, stats.dual_clip_fraction, stats.kl, stats.ratio_min, stats.ratio_max)
    clipped, dual_clipped, kl, smallest, largest = torch.stack(numbers).tolist()
    if not 1 / BEYOND < smallest <= largest < BEYOND:  # also where they are nan
        kl = F.masked_mean((log_prob.detach() - old_log_prob).clamp(-CLAMP, CLAMP), mask).item()
    return loss, _metrics(clipped, -kl, dual_clipped)


@_as_verl_calls_it("seq-mean-token-mean")
def compute_policy_loss_gspo(log_prob, old_log_prob, advantages, mask, mode, clip, config, weights):
    """(loss, metrics) of GSPO (arXiv:2507.18071): the sequence's mean log-ratio, at most 10, for each of its tokens,
    with that token's gradient."""
    with torch.no_grad():
        log_ratio = F.masked_mean(log_prob.float() - old_log_prob.float(), mask, dim=-1)
        lengths = mask.sum(-1)
        kl = -(log_ratio * lengths).sum() / lengths.sum().clamp(min=1)
    held = (log_ratio > 10.0).unsqueeze(-1)
    aggregation, denominator = aggregation_of(mask, mode, **config.global_batch_info)
    loss, stats = F.ppo_loss(
        torch.where(held, 0.0, log_prob - log_prob.detach()),  # nothing but its gradient
        -log_ratio.clamp(max=10.0).unsqueeze(-1).expand_as(log_prob),
        advantages,
        mask,
        clip_low=clip[0],
        clip_high=clip[1],
        log_ratio_clamp=None,
        weights=weights,
        aggregation=aggregation,
        denominator=denominator,
    )
    clipped, kl = torch.stack((stats.clip_fraction, kl)).tolist()
    return loss, _metrics(clipped, kl, 0.0)


@_as_verl_calls_it()
def compute_policy_loss_geo_mean(log_prob, old_log_prob, advantages, mask, mode, clip, config, weights):
    """(loss, metrics) of GMPO (arXiv:2507.20673): log-ratios clipped token by token, their mean in each sequence, and
    the mean over the B sequences, whatever loss_agg_mode is."""
    low, high = clip
    log_ratio = torch.where(mask, log_prob.float() - old_log_prob.float(), 0.0)
    good, bad = advantages > 0, advantages < 0
    worse = torch.where(good, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    worse = torch.where(good | bad, worse, 0.0)
    losses = -F.masked_mean(advantages, mask, dim=-1) * F.masked_mean(worse, mask, dim=-1).exp()
    if weights is not None:
        losses = losses * F.masked_mean((weights + 1e-10).log(), mask, dim=-1).exp()
    with torch.no_grad():
        clipped = log_ratio != log_ratio.clamp(-low, high)
        fractions = (F.masked_mean((clipped & side).float(), mask) for side in (good, bad))
        above, below, kl = torch.stack((*fractions, F.masked_mean(log_ratio, mask))).tolist()
    return losses.mean(), _metrics(above, -kl, below)


@_as_verl_calls_it()
def compute_policy_loss_cispo(log_prob, old_log_prob, advantages, mask, mode, clip, config, weights):
    """(loss, metrics) of CISPO (arXiv:2506.13585): log-probs times constants, clipped ratios and advantages."""
    with torch.no_grad():
        log_ratio = (log_prob.float() - old_log_prob.float()).clamp(-CLAMP, CLAMP)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
        factors = -clipped * advantages * (1.0 if weights is None else weights)
        factors = torch.where(mask, factors, 0.0)  # it multiplies the gradients of what does not count, too
        numbers = (F.masked_mean((ratio != clipped).float(), mask), F.masked_mean(log_ratio, mask))
        fraction, kl = torch.stack(numbers).tolist()
    aggregation, denominator = aggregation_of(mask, mode, **config.global_batch_info)
    loss = aggregate(factors * log_prob, mask, aggregation, denominator)
    return loss, _metrics(fraction, -kl, 0.0)


def _metrics(clipped: float, kl: float, clipped_below: float) -> dict[str, float]:
    return {"actor/pg_clipfrac": clipped, "actor/ppo_kl": kl, "actor/pg_clipfrac_lower": clipped_below}
