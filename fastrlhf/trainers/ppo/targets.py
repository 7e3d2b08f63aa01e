"""From scores and log-probs to what policy and value function are trained towards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.rewards.normalization import in_groups
from fastrlhf.trainers.ppo.config import PPOConfig

# (stats [2], x [B, T], mask [B, T]) -> [2]: mean and 1/std of x over all ranks, from those of this one.
Statistics = Callable[[Tensor, Tensor, Tensor], Tensor]
# Added to a group's standard deviation, as in TRL's GRPO.
GRPO_EPS = 1e-4


@dataclass
class Targets:
    """Of one rollout, all constants of its updates; the [B, T] ones are 0 where the mask is 0.

    log_probs, ref_log_probs: [B, T], of the policy that sampled and of the reference.
    values, returns: [B, T], or None where the estimator has no critic.
    kl: [B], of each response to the reference, in nats.
    advantages: [B, T]. advantage_stats: [2], what the advantages are whitened with, or None if they are not.
    mask: [B, T], 1 = a token. weights: [B, T], of each token in the policy's loss, or None for 1.
    """

    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor | None
    kl: Tensor
    advantages: Tensor
    returns: Tensor | None
    advantage_stats: Tensor | None
    mask: Tensor
    weights: Tensor | None = None


def ppo_targets(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor | None,
    mask: Tensor,
    args: PPOConfig,
    *,
    kl_coef: float,
    weights: Tensor | None = None,
    token_rewards: Tensor | None = None,
    whitening: Statistics = lambda stats, x, mask: stats,
) -> Targets:
    """KL penalty, score and advantages by `args.advantage_estimator`. The score stands on the last token that counts:
    its EOS, if it has one, never what follows; tokens the policy did not sample have mask 0.

    scores: [B], shaped. log_probs, ref_log_probs, mask: [B, T]. values: [B, T] for gae; the others do not look at it.
    kl_coef: weight of the KL penalty now. token_rewards: [B, T], of single tokens beside the score, such as those at
        which steps end; 0 where the mask is 0.
    whitening: statistics over all ranks, of one process when not given; called once for `args.whiten_rewards`, then
        once for `args.whitens_advantages`, on every rank alike.
    Rows of a group, the `args.num_generations` responses to a prompt, follow each other.

    With r_t = -kl_coef KL_t + [t last] score + token_rewards_t, R = sum_t r_t:
    gae: Schulman et al. 2016 (arXiv:1506.02438) on r_t.
    reinforce++: sum over u >= t of gamma^(u - t) r_u, whitened over the batch (Hu et al. 2025, arXiv:2501.03262). With
        num_generations > 1 the scores first lose their group's mean, which is the paper's "REINFORCE++ w/ baseline";
        that variant takes the KL into the loss (kl_coef=0, kl_loss_coef, kl_loss_estimator="k2"), which is left to the
        caller.
    rloo: R less the mean R of the other responses of its group, at every token (Ahmadian et al. 2024,
        arXiv:2402.14740).
    grpo: (R - mean) / (std + 1e-4) over its group, at every token, std the unbiased one (Shao et al. 2024,
        arXiv:2402.03300, which does not say which; TRL, verl and OpenRLHF take this). The paper has the KL in the loss:
        kl_coef=0 and kl_loss_coef.
    whiten_rewards divides r_t by its standard deviation over all tokens and leaves its mean where it is (TRL's PPO).
    Raises ValueError on shapes, for gae without values and for groups that are not whole.
    """
    if args.has_critic and values is None:
        raise ValueError("values: got None, wanted [B, T] for advantage_estimator='gae'")
    if args.advantage_estimator in ("rloo", "grpo"):
        scores = scores if token_rewards is None else scores + token_rewards.sum(1)
        target = _group_advantages(scores, log_probs, ref_log_probs, mask, args, kl_coef)
    else:
        rewards = (scores, token_rewards)
        target = _token_advantages(*rewards, log_probs, ref_log_probs, values, mask, args, kl_coef, whitening)
    stats = whitening(target.advantage_stats, target.advantages, mask) if args.whitens_advantages else None
    values, returns = (values, target.returns) if args.has_critic else (None, None)
    return Targets(log_probs, ref_log_probs, values, target.kl, target.advantages, returns, stats, mask, weights)


def response_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """[B], in nats: the KL estimates of the tokens [B, T] that count, summed over each response."""
    return torch.where(mask.bool(), F.kl_divergence(log_probs, ref_log_probs, estimator=estimator), 0.0).sum(1)


def _token_advantages(
    scores: Tensor,
    token_rewards: Tensor | None,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor | None,
    mask: Tensor,
    args: PPOConfig,
    kl_coef: float,
    whitening: Statistics,
) -> F.RolloutAdvantages:
    """gae and reinforce++, which is gae with values 0 and lambda 1."""
    lam = args.lam
    if not args.has_critic:
        values, lam = torch.zeros_like(log_probs), 1.0
        if args.num_generations > 1:
            groups = in_groups(scores, args.num_generations)
            scores = (groups - groups.mean(dim=1, keepdim=True)).flatten().to(scores.dtype)
    if args.whiten_rewards:
        rewards = (scores, token_rewards)
        token_rewards = _whitened_rewards(
            *rewards, log_probs, ref_log_probs, mask, args.kl_estimator, kl_coef, whitening
        )
        scores, kl_coef = torch.zeros_like(scores), 0.0  # both are in the rewards
    return F.rollout_advantages(
        scores,
        log_probs,
        ref_log_probs,
        values,
        mask,
        kl_coef=kl_coef,
        kl_estimator=args.kl_estimator,
        token_rewards=token_rewards,
        gamma=args.gamma,
        lam=lam,
        mask_mode=args.gae_mask_mode,
    )


def _whitened_rewards(
    scores: Tensor,
    token_rewards: Tensor | None,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    kl_estimator: str,
    kl_coef: float,
    whitening: Statistics,
) -> Tensor:
    """[B, T]: r_t with variance 1 and its own mean. At gamma 0 and values 0, advantages are the rewards."""
    raw = F.rollout_advantages(
        scores,
        log_probs,
        ref_log_probs,
        torch.zeros_like(log_probs),
        mask,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        token_rewards=token_rewards,
        gamma=0.0,
        lam=0.0,
    )
    mean, rstd = whitening(raw.advantage_stats, raw.advantages, mask)
    return torch.where(mask.bool(), (raw.advantages - mean) * rstd + mean, 0.0)


def _group_advantages(
    scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, args: PPOConfig, kl_coef: float
) -> F.RolloutAdvantages:
    """rloo and grpo: one number a response, [B], at all its tokens [B, T]."""
    kl = response_kl(log_probs, ref_log_probs, mask, args.kl_estimator)
    rewards = scores - kl_coef * kl if kl_coef else scores  # monitored alone, an infinite KL is no reward
    groups = in_groups(rewards, args.num_generations)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if args.advantage_estimator == "rloo":  # the mean of the others: (n mean - R) / (n - 1)
        advantages = advantages * (args.num_generations / (args.num_generations - 1))
    else:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + GRPO_EPS)
    # Undiscounted and without values, the advantage of each token is the score at the end.
    return F.rollout_advantages(
        advantages.flatten().float(),
        log_probs,
        ref_log_probs,
        torch.zeros_like(log_probs),
        mask,
        kl_coef=0.0,
        kl_estimator=args.kl_estimator,
        gamma=1.0,
        lam=1.0,
    )
