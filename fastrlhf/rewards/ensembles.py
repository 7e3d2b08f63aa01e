"""Several reward models as one."""

from __future__ import annotations

from typing import Any

import torch

from fastrlhf.rewards.combine import DISAGREEMENT, combine
from fastrlhf.rewards.detailed_scores import DetailedScores
from fastrlhf.rewards.reward_model import RewardModel


class RewardEnsemble:
    """`f(prompts, completions, **columns) -> list[float]` by several reward models, each with one head or an ensemble.

    models: at least one. how, std_coef: of `combine`. Every head is a member, its scores around their mean on held-out
    texts where its model was calibrated (`RewardTrainer.calibrate`): a Bradley-Terry score has no zero of its own.
    Raises ValueError for a model whose heads are no ensemble.
    """

    def __init__(self, models: list[RewardModel], how: str = "mean", std_coef: float = 1.0) -> None:
        for model in models:
            if model.settings.heads not in ("single", "ensemble"):
                raise ValueError(
                    f"reward_ensemble={how!r}: a reward model with {model.settings.heads} heads cannot be a member"
                )
        combine(torch.zeros(1, len(models)), how, std_coef)  # an error now, not after a rollout
        self.models, self.how, self.std_coef = models, how, std_coef
        self.__name__ = "reward_ensemble"

    def to(self, device: torch.device) -> RewardEnsemble:
        for model in self.models:
            model.to(device)
        return self

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> DetailedScores:
        members = torch.cat([model.head_scores(prompts, completions) for model in self.models], dim=1)
        scores, std = combine(members, self.how, self.std_coef)
        return DetailedScores(scores.tolist(), parts={DISAGREEMENT: std.tolist()})
