"""SFT, reward models, PPO and DPO: subclasses of `transformers.Trainer` and their arguments."""

from fastrlhf.trainers.checkpoints import last_checkpoint
from fastrlhf.trainers.config import ProcessRewardConfig, RewardConfig, SFTConfig
from fastrlhf.trainers.dpo import DPOTrainer
from fastrlhf.trainers.dpo_config import DPOConfig
from fastrlhf.trainers.lm_heads import LMHead, linear_lm_head, register_lm_head
from fastrlhf.trainers.ppo import PPOConfig, PPOTrainer
from fastrlhf.trainers.process_reward import ProcessRewardTrainer
from fastrlhf.trainers.reward import RewardTrainer
from fastrlhf.trainers.sft import SFTTrainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "LMHead",
    "PPOConfig",
    "PPOTrainer",
    "ProcessRewardConfig",
    "ProcessRewardTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "last_checkpoint",
    "linear_lm_head",
    "register_lm_head",
]
