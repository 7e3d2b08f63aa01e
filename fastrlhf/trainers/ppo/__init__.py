"""PPO and its critic-free kin: the trainer, its arguments, and what its steps are made of."""

from fastrlhf.trainers.ppo.config import PPOConfig
from fastrlhf.trainers.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
