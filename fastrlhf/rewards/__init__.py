"""What turns text into reward."""

from fastrlhf.rewards.calibration import expected_calibration_error
from fastrlhf.rewards.functions import RewardError, RewardFunction, Rewards
from fastrlhf.rewards.normalization import RunningNormalizer, normalize
from fastrlhf.rewards.reward_model import RewardModel

__all__ = [
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "Rewards",
    "RunningNormalizer",
    "expected_calibration_error",
    "normalize",
]
