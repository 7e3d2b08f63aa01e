"""Advantages and returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.fallback import KL_ESTIMATORS, MASK_MODES
from fastrlhf.functional import _checks as check
from fastrlhf.functional._autograd import checked_once, without_gradient

ops = torch.ops.fastrlhf


class RolloutAdvantages(NamedTuple):
    """What a rollout's policy and value function are trained towards: fp32, without gradient."""

    advantages: Tensor  # [B, T], not whitened
    returns: Tensor  # [B, T], advantages + values
    kl: Tensor  # [B], the per-token estimates summed over each response's tokens, nats
    advantage_stats: Tensor  # [2], mean and 1/std over all tokens that count: what `ppo_loss` whitens with


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: str = "carry",
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, and the returns advantages + values.

    rewards, values: [B, T], fp32, bf16 or fp16; values[b, t] is the value before token t.
    mask: [B, T], 1 = counts. Masked positions are not read, and their results are 0.
    mask_mode: "carry": masked tokens (tool output, other turns, padding) are skipped as if they did not exist; "zero":
        they are steps with reward 0 and value 0; "none": the mask is ignored.
    bootstrap_values: [B], the value after the last token, for responses that were cut off; 0 without it.
    Returns (advantages, returns), [B, T], fp32, without gradient: they are targets. Raises ValueError.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1}. Schulman et al. 2016 (arXiv:1506.02438),
    equations 11 and 16.
    """
    check.tensor("rewards", rewards, dims=2)
    check.like("values", values, "rewards", rewards)
    if mask is not None:
        mask = check.mask("mask", mask, "rewards", rewards)
    bootstrap_values = _bootstrap(bootstrap_values, rewards.shape[:1], "rewards", rewards)
    index, discounts = _discounts(gamma, lam, mask_mode)
    return _gae(check.fp32(rewards), check.fp32(values), mask, bootstrap_values, discounts, index)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: str = "carry",
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gae` of sequences that lie one after the other, without padding.

    rewards, values: [N], fp32, bf16 or fp16, N the tokens of all sequences together.
    cu_seqlens: [B + 1], int32 or int64: sequence b is cu_seqlens[b] .. cu_seqlens[b + 1]. Starts at 0, ends at N, never
        falls; on CPU a wrong one raises IndexError, elsewhere nothing outside [0, N) is touched.
    mask: [N]. mask_mode, gamma, lam: as for `gae`. bootstrap_values: [B].
    Returns (advantages, returns), [N], fp32, without gradient. Raises ValueError.
    """
    check.tensor("rewards", rewards, dims=1)
    check.like("values", values, "rewards", rewards)
    check.tensor("cu_seqlens", cu_seqlens, dims=1, dtypes=(torch.int32, torch.int64))
    check.same_device("cu_seqlens", cu_seqlens, "rewards", rewards)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens: got shape (0,), wanted one number more than there are sequences")
    if mask is not None:
        mask = check.mask("mask", mask, "rewards", rewards)
    bootstrap_values = _bootstrap(bootstrap_values, (cu_seqlens.shape[0] - 1,), "rewards", rewards)
    index, discounts = _discounts(gamma, lam, mask_mode)
    return _gae_packed(check.fp32(rewards), check.fp32(values), cu_seqlens, mask, bootstrap_values, discounts, index)


def rollout_advantages(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    token_rewards: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: str = "carry",
    bootstrap_values: Tensor | None = None,
) -> RolloutAdvantages:
    """Everything between the scores of a rollout and its PPO loss, in one pass: KL penalty, score, GAE, whitening.

    scores: [B], what the reward gave each response; added to the reward of its last token that counts (its EOS, if it
        has one), and dropped where there is none.
    log_probs, ref_log_probs, values: [B, T], fp32, bf16 or fp16, of the policy that sampled, of the reference, and
        before each token. mask: [B, T], 1 = counts. What stands under a 0 is not read.
    kl_coef: each token that counts is fined kl_coef times its KL estimate, see `kl_divergence` for kl_estimator.
    score_clip: holds the scores within [-c, c].
    token_rewards: [B, T], rewards of single tokens (of a process reward model, say), added where the mask is 1.
    gamma, lam, mask_mode, bootstrap_values: as for `gae`. With "none", masked positions have reward 0, and their values
        are read and used.
    Returns RolloutAdvantages, without gradient. `ppo_loss(..., advantage_stats=)` whitens on the way in, so that the
    whitened advantages are never written. Raises ValueError.

    r_t = -kl_coef KL_t + token_rewards_t + [t last] clip(score), then GAE; std^2 is the unbiased variance + 1e-8.
    Ziegler et al. 2019 (arXiv:1909.08593), equation 2; Schulman et al. 2016, equations 11 and 16.
    """
    check.tensor("log_probs", log_probs, dims=2)
    check.like("ref_log_probs", ref_log_probs, "log_probs", log_probs)
    check.like("values", values, "log_probs", log_probs)
    mask = check.mask("mask", mask, "log_probs", log_probs)
    check.tensor("scores", scores)
    if scores.shape != log_probs.shape[:1]:
        raise ValueError(
            f"scores: got shape {tuple(scores.shape)}, wanted {tuple(log_probs.shape[:1])}: one a response"
        )
    check.same_device("scores", scores, "log_probs", log_probs)
    if token_rewards is not None:
        check.like("token_rewards", token_rewards, "log_probs", log_probs)
    bootstrap_values = _bootstrap(bootstrap_values, log_probs.shape[:1], "log_probs", log_probs)
    estimator, mode, options = _rollout_options(kl_coef, kl_estimator, score_clip, gamma, lam, mask_mode)
    tokenwise = (check.fp32(x) for x in (log_probs, ref_log_probs, values))
    return RolloutAdvantages(
        *_rollout_advantages(
            check.fp32(scores),
            *tokenwise,
            mask,
            check.fp32(token_rewards),
            bootstrap_values,
            options,
            estimator,
            mode,
        )
    )


def _bootstrap(x: Tensor | None, shape: tuple[int, ...], model_name: str, model: Tensor) -> Tensor | None:
    if x is None:
        return None
    check.tensor("bootstrap_values", x)
    if x.shape != shape:
        raise ValueError(f"bootstrap_values: got shape {tuple(x.shape)}, wanted {tuple(shape)}")
    check.same_device("bootstrap_values", x, model_name, model)
    return check.fp32(x)


@checked_once
def _discounts(gamma, lam, mask_mode) -> tuple[int, Tensor]:
    index = check.option("mask_mode", mask_mode, MASK_MODES)
    gamma, lam = (check.number(name, x, least=0.0, most=1.0) for name, x in (("gamma", gamma), ("lam", lam)))
    return index, check.scalars(gamma, lam)


@checked_once
def _rollout_options(kl_coef, kl_estimator, score_clip, gamma, lam, mask_mode) -> tuple[int, int, Tensor]:
    numbers = (check.number("kl_coef", kl_coef), check.limit("score_clip", score_clip))
    discounts = (check.number(name, x, least=0.0, most=1.0) for name, x in (("gamma", gamma), ("lam", lam)))
    estimator = check.option("kl_estimator", kl_estimator, KL_ESTIMATORS)
    return estimator, check.option("mask_mode", mask_mode, MASK_MODES), check.scalars(*numbers, *discounts)


_gae = without_gradient("gae")
_gae_packed = without_gradient("gae_packed")
_rollout_advantages = without_gradient("rollout_advantages")


@torch.library.register_fake("fastrlhf::gae")
def _(rewards, values, mask, bootstrap_values, options, mask_mode):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


@torch.library.register_fake("fastrlhf::gae_packed")
def _(rewards, values, cu_seqlens, mask, bootstrap_values, options, mask_mode):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


@torch.library.register_fake("fastrlhf::rollout_advantages")
def _(scores, log_probs, ref_log_probs, values, mask, *rest):
    shape = log_probs.shape
    return tuple(log_probs.new_empty(size) for size in (shape, shape, shape[:1], (2,)))
