"""PPO's metrics, under the names that TRL's trainer gave them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.rollout import Rollout
from fastrlhf.trainers.ppo.targets import Targets


def rollout_metrics(
    rollout: Rollout,
    scores: Tensor,
    each: dict[str, Tensor],
    targets: Targets,
    kl_coef: float,
) -> dict[str, Tensor]:
    """Means over the responses, of scores as the reward functions gave them; `each` is shown when there are several.

    objective/kl is the KL of a whole response to the reference, in nats; objective/rlhf_reward is score - kl_coef KL;
    objective/entropy is the mean of -log p over the sampled tokens, whose expectation is the entropy.
    """
    lengths = rollout.lengths.float()
    parts = {f"rewards/{name}": values.mean() for name, values in each.items()} if len(each) > 1 else {}
    return {
        **parts,
        "objective/kl": targets.kl.mean(),
        "objective/entropy": F.masked_mean(-targets.log_probs, targets.mask),
        "objective/scores": scores.mean(),
        "objective/rlhf_reward": (scores - kl_coef * targets.kl).mean(),
        "rollout/length": lengths.mean(),
        "val/num_eos_tokens": scores.new_tensor(float(rollout.finish_reasons.count("stop"))),
    }


def gap_metrics(stats: list[tuple[Tensor, F.PPOStats, Tensor, F.ValueStats]]) -> dict[str, Tensor]:
    """|log-prob of the engine - log-prob of the trainer| over a mini-batch on which the policy is still the one that
    sampled, from `update_metrics`' argument; `kl` there must be by the estimator "abs", to the old log-probs."""
    ratios = torch.stack([ratio for _, policy, _, _ in stats for ratio in (policy.ratio_min, policy.ratio_max)])
    return {
        "rollout/logprob_gap": sum(share * policy.kl for share, policy, _, _ in stats),
        "rollout/logprob_gap_max": ratios.log().abs().max(),
    }


def gap_metrics_of(gap: Tensor) -> dict[str, Tensor]:
    """The same, from the differences themselves [N]."""
    return {"rollout/logprob_gap": gap.abs().mean(), "rollout/logprob_gap_max": gap.abs().max()}


def update_metrics(stats: list[tuple[Tensor, F.PPOStats, Tensor, F.ValueStats]]) -> dict[str, Tensor]:
    """Of one mini-batch, from (share of its tokens, PPOStats, value loss, ValueStats) of its micro-batches.

    The losses are parts of one sum already, normalised by the mini-batch; the statistics are means to be weighted.
    """
    return {
        "loss/policy_avg": sum(policy.policy_loss for _, policy, _, _ in stats),
        "loss/value_avg": sum(value_loss.detach() for _, _, value_loss, _ in stats),
        "policy/approxkl_avg": sum(share * policy.approx_kl for share, policy, _, _ in stats),
        "policy/clipfrac_avg": sum(share * policy.clip_fraction for share, policy, _, _ in stats),
        "val/ratio": sum(share * policy.ratio_mean for share, policy, _, _ in stats),
        "val/clipfrac_avg": sum(share * value.clip_fraction for share, _, _, value in stats),
    }
