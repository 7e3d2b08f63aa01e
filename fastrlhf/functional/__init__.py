"""What people import: `from fastrlhf import functional as F`. One file per family of ops."""

from fastrlhf.functional.advantages import gae
from fastrlhf.functional.kl import kl_divergence
from fastrlhf.functional.log_probs import token_log_probs, token_log_probs_and_entropy
from fastrlhf.functional.losses import (
    PairwiseRewardStats,
    PPOStats,
    ValueStats,
    pairwise_reward_loss,
    ppo_loss,
    value_loss,
)
from fastrlhf.functional.masked import masked_mean, masked_whiten

__all__ = [
    "PPOStats",
    "PairwiseRewardStats",
    "ValueStats",
    "gae",
    "kl_divergence",
    "masked_mean",
    "masked_whiten",
    "pairwise_reward_loss",
    "ppo_loss",
    "token_log_probs",
    "token_log_probs_and_entropy",
    "value_loss",
]
