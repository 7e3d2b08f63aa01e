"""From scores and log-probs to what policy and value function are trained towards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.trainers.config import PPOConfig


@dataclass
class Targets:
    """Of one rollout, all [B, T] and constants of its updates; 0 where the mask is 0.

    log_probs, values: of the policy that sampled. kl: per-token KL to the reference (its estimator's value).
    rewards: -kl_coef kl, plus the score at the last token. advantages: whitened if so configured. mask: 1 = a token.
    """

    log_probs: Tensor
    values: Tensor
    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor


def ppo_targets(
    scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, values: Tensor, mask: Tensor, args: PPOConfig
) -> Targets:
    """KL penalty at every token, score [B] at the response's last (its EOS, if it has one), GAE, whitening."""
    kl = F.kl_divergence(log_probs, ref_log_probs, estimator=args.kl_estimator) * mask
    rewards = -args.kl_coef * kl
    last = mask.sum(dim=1).long() - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    advantages, returns = F.gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
    if args.whiten_advantages:
        advantages = F.masked_whiten(advantages, mask) * mask
    return Targets(log_probs, values, kl, rewards, advantages, returns, mask)
