"""From scores and log-probs to what policy and value function are trained towards."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.trainers.ppo.config import PPOConfig


@dataclass
class Targets:
    """Of one rollout, all constants of its updates; the [B, T] ones are 0 where the mask is 0.

    log_probs, values: [B, T], of the policy that sampled. kl: [B], of each response to the reference, in nats.
    advantages, returns: [B, T]. advantage_stats: [2], what the advantages are whitened with, or None if they are not.
    mask: [B, T], 1 = a token. weights: [B, T], of each token in the policy's loss, or None for 1.
    """

    log_probs: Tensor
    values: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    advantage_stats: Tensor | None
    mask: Tensor
    weights: Tensor | None = None


def ppo_targets(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    mask: Tensor,
    args: PPOConfig,
    weights: Tensor | None = None,
) -> Targets:
    """KL penalty at every token, score [B] at the response's last (its EOS, if it has one), GAE, whitening."""
    target = F.rollout_advantages(
        scores,
        log_probs,
        ref_log_probs,
        values,
        mask,
        kl_coef=args.kl_coef,
        kl_estimator=args.kl_estimator,
        gamma=args.gamma,
        lam=args.lam,
    )
    stats = target.advantage_stats if args.whiten_advantages else None
    return Targets(log_probs, values, target.kl, target.advantages, target.returns, stats, mask, weights)
