"""PPO's metrics, under the names that TRL's trainer gave them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.rollout import Rollout
from fastrlhf.trainers.ppo_targets import Targets


def rollout_metrics(rollout: Rollout, scores: Tensor, entropy: Tensor, targets: Targets) -> dict[str, Tensor]:
    """Means over the responses; objective/kl is the KL of a whole response to the reference, in nats."""
    kl = targets.kl.sum(dim=1)
    rewards = targets.rewards.sum(dim=1)
    lengths = rollout.lengths.float()
    return {
        "objective/kl": kl.mean(),
        "objective/entropy": F.masked_mean(entropy, targets.mask),
        "objective/scores": scores.mean(),
        "objective/rlhf_reward": rewards.mean(),
        "rollout/length": lengths.mean(),
        "val/num_eos_tokens": scores.new_tensor(float(sum(rollout.finished))),
    }


def update_metrics(stats: list[tuple[Tensor, Tensor, Any, Tensor, Any]]) -> dict[str, Tensor]:
    """Of one mini-batch from (share of its tokens, policy loss, PPOStats, value loss, ValueStats) of its micro-batches.

    The losses are parts of one sum already, normalised by the mini-batch; the statistics are means to be weighted.
    """
    return {
        "loss/policy_avg": sum(policy_loss.detach() for _, policy_loss, _, _, _ in stats),
        "loss/value_avg": sum(value_loss.detach() for _, _, _, value_loss, _ in stats),
        "policy/approxkl_avg": sum(share * policy.approx_kl for share, _, policy, _, _ in stats),
        "policy/clipfrac_avg": sum(share * policy.clip_fraction for share, _, policy, _, _ in stats),
        "val/ratio": sum(share * policy.ratio_mean for share, _, policy, _, _ in stats),
        "val/clipfrac_avg": sum(share * value.clip_fraction for share, _, _, _, value in stats),
    }
