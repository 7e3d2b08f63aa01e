"""What turns text into reward."""

from fastrlhf.rewards.calibration import expected_calibration_error, fit_temperature
from fastrlhf.rewards.calls import RewardError
from fastrlhf.rewards.combine import combine
from fastrlhf.rewards.detailed_scores import DetailedScores
from fastrlhf.rewards.ensembles import RewardEnsemble
from fastrlhf.rewards.functions import RewardFunction, RewardResult, Rewards
from fastrlhf.rewards.normalization import RunningNormalizer, normalize, normalize_groups
from fastrlhf.rewards.preference_report import preference_report
from fastrlhf.rewards.process_reward_model import ProcessRewardModel
from fastrlhf.rewards.reward_model import RewardModel
from fastrlhf.rewards.shaping import ScoreShaper

__all__ = [
    "DetailedScores",
    "ProcessRewardModel",
    "RewardEnsemble",
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "RewardResult",
    "Rewards",
    "RunningNormalizer",
    "ScoreShaper",
    "combine",
    "expected_calibration_error",
    "fit_temperature",
    "normalize",
    "normalize_groups",
    "preference_report",
]
