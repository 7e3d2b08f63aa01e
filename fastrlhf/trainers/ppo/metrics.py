"""PPO's metrics, under the names that TRL's trainer gave them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.rollout import Rollout
from fastrlhf.rollout.diversity import distinct_n


class MicroBatchStats(NamedTuple):
    """share: of its mini-batch's tokens. policy: PPOStats. value_loss and value are None without a value function."""

    share: Tensor
    policy: F.PPOStats
    value_loss: Tensor | None
    value: F.ValueStats | None


def rollout_metrics(
    rollout: Rollout,
    scores: Tensor,
    each: dict[str, Tensor],
    log_probs: Tensor,
    kl: Tensor,
    mask: Tensor,
    kl_coef: float,
) -> dict[str, Tensor]:
    """Means over the responses, of scores [B] as the reward functions gave them; each one's where there are several.

    log_probs, mask: [B, T], of the policy, and 1 = a token that it sampled. kl: [B], of a response, in nats.

    objective/kl is the KL of a whole response to the reference, in nats; objective/rlhf_reward is score - kl_coef KL;
    objective/entropy is the mean of -log p over the sampled tokens, whose expectation is the entropy;
    rollout/distinct_n is the number of different n-grams over that of all (Li et al. 2016): it falls when the policy
    collapses.
    """
    each = each if len(each) > 1 else {}
    return {
        **{f"rewards/{name}": values.mean() for name, values in each.items()},
        "objective/kl": kl.mean(),
        "objective/kl_coef": scores.new_tensor(kl_coef),
        "objective/entropy": F.masked_mean(-log_probs, mask),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        "objective/rlhf_reward": (scores - kl_coef * kl).mean(),
        "rollout/length": rollout.lengths.float().mean(),
        "rollout/distinct_1": scores.new_tensor(distinct_n(rollout.responses, 1)),
        "rollout/distinct_2": scores.new_tensor(distinct_n(rollout.responses, 2)),
        "val/num_eos_tokens": scores.new_tensor(float(rollout.finish_reasons.count("stop"))),
    }


def gap_metrics(stats: list[MicroBatchStats], with_mean: bool) -> dict[str, Tensor]:
    """|log-prob of the engine - log-prob of the trainer| over a mini-batch on which the policy is still the one that
    sampled. with_mean: whether `kl` of the statistics is by the estimator "abs" and to the old log-probs."""
    ratios = torch.stack([ratio for part in stats for ratio in (part.policy.ratio_min, part.policy.ratio_max)])
    mean = {"rollout/logprob_gap": _mean(stats, "policy", "kl")} if with_mean else {}
    return {**mean, "rollout/logprob_gap_max": ratios.log().abs().max()}


def gap_metrics_of(gap: Tensor) -> dict[str, Tensor]:
    """The same, from the differences themselves [N]."""
    return {"rollout/logprob_gap": gap.abs().mean(), "rollout/logprob_gap_max": gap.abs().max()}


def update_metrics(stats: list[MicroBatchStats]) -> dict[str, Tensor]:
    """Of one mini-batch. The losses are parts of one sum already, normalised by the mini-batch; the statistics are
    means to be weighted."""
    policy = {
        "loss/policy_avg": sum(part.policy.policy_loss for part in stats),
        "policy/approxkl_avg": _mean(stats, "policy", "approx_kl"),
        "policy/clipfrac_avg": _mean(stats, "policy", "clip_fraction"),
        "policy/dual_clipfrac_avg": _mean(stats, "policy", "dual_clip_fraction"),
        "policy/entropy_avg": _mean(stats, "policy", "entropy"),
        "val/ratio": _mean(stats, "policy", "ratio_mean"),
    }
    if stats[0].value is None:
        return policy
    return policy | {
        "loss/value_avg": sum(part.value_loss.detach() for part in stats),
        "val/clipfrac_avg": _mean(stats, "value", "clip_fraction"),
        "val/explained_variance": _mean(stats, "value", "explained_variance"),
    }


def _mean(stats: list[MicroBatchStats], of: str, name: str) -> Tensor:
    return sum(part.share * getattr(getattr(part, of), name) for part in stats)
