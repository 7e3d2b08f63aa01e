"""What turns text into reward."""

from fastrlhf.rewards.calibration import expected_calibration_error
from fastrlhf.rewards.calls import RewardError
from fastrlhf.rewards.functions import RewardFunction, Rewards
from fastrlhf.rewards.normalization import RunningNormalizer, normalize, normalize_groups
from fastrlhf.rewards.reward_model import RewardModel
from fastrlhf.rewards.shaping import ScoreShaper

__all__ = [
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "Rewards",
    "RunningNormalizer",
    "ScoreShaper",
    "expected_calibration_error",
    "normalize",
    "normalize_groups",
]
