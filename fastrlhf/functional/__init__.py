"""What people import: `from fastrlhf import functional as F`. One file per family of ops."""

from fastrlhf.functional.advantages import RolloutAdvantages, gae, gae_packed, rollout_advantages
from fastrlhf.functional.kl import full_kl, kl_divergence
from fastrlhf.functional.layers import rms_norm, rotary_embedding, swiglu
from fastrlhf.functional.lm_head import (
    CrossEntropyStats,
    linear_cross_entropy,
    linear_dpo_loss,
    linear_ppo_loss,
    linear_token_log_probs,
    linear_token_log_probs_and_entropy,
)
from fastrlhf.functional.log_probs import token_log_probs, token_log_probs_and_entropy
from fastrlhf.functional.losses import PPOStats, ValueStats, ppo_loss, value_loss
from fastrlhf.functional.masked import masked_mean, masked_whiten
from fastrlhf.functional.preferences import DPOStats, PairwiseRewardStats, dpo_loss, pairwise_reward_loss
from fastrlhf.functional.sampling import sample_tokens

__all__ = [
    "CrossEntropyStats",
    "DPOStats",
    "PPOStats",
    "PairwiseRewardStats",
    "RolloutAdvantages",
    "ValueStats",
    "dpo_loss",
    "full_kl",
    "gae",
    "gae_packed",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_ppo_loss",
    "linear_token_log_probs",
    "linear_token_log_probs_and_entropy",
    "masked_mean",
    "masked_whiten",
    "pairwise_reward_loss",
    "ppo_loss",
    "rms_norm",
    "rollout_advantages",
    "rotary_embedding",
    "sample_tokens",
    "swiglu",
    "token_log_probs",
    "token_log_probs_and_entropy",
    "value_loss",
]
