"""torchrl: https://github.com/pytorch/rl."""

from __future__ import annotations

import importlib
from importlib import metadata

import torch

from fastrlhf.bench.peers.base import FROM_HIDDEN, GAMMA, LAM, Peer, Run


def torchrl() -> Peer:
    values = importlib.import_module("torchrl.objectives.value.functional")

    def columns(rewards, values, mask):
        """[B, T, 1]; the values that come next, and the flag of the last token."""
        rewards, values = rewards[..., None], values[..., None]
        following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        done = torch.zeros_like(values, dtype=torch.bool)
        done[:, -1] = True
        return values, following, rewards, done, done

    def gae(*inputs):
        return values.vec_generalized_advantage_estimate(GAMMA, LAM, *inputs)

    reason = "its objectives run the policy themselves"
    ops = ("token_log_probs", "token_log_probs_and_entropy", "ppo_loss", "value_loss", "rollout_advantages")
    ops += ("kl_divergence", "full_kl", "gae_packed", "masked_mean", "masked_whiten", "pairwise_reward_loss")
    return Peer(
        metadata.version("torchrl"),
        {"gae": Run(gae, columns, "vectorised, without a mask")},
        dict.fromkeys((*ops, *FROM_HIDDEN, "dpo_loss"), reason),
    )
