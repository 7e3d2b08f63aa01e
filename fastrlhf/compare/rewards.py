"""The reward models that are compared, and the reward that every method is to raise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from fastrlhf.compare.recipe import Recipe
from fastrlhf.demo import judgement, stages
from fastrlhf.demo.data import DemoData
from fastrlhf.demo.workspace import Workspace
from fastrlhf.rewards import RewardModel, Rewards


@dataclass(frozen=True)
class RewardVariant:
    """A reward model: of the smaller or the larger preference set, with one head or an ensemble of them."""

    small: bool
    ensemble: bool

    @property
    def name(self) -> str:
        return ("small" if self.small else "large") + ("-ensemble" if self.ensemble else "")

    @property
    def title(self) -> str:
        return f"{'smaller' if self.small else 'larger'} set, {'ensemble' if self.ensemble else 'single model'}"

    @property
    def stage(self) -> str:
        return f"reward-{self.name}"


VARIANTS = tuple(RewardVariant(small, ensemble) for small in (False, True) for ensemble in (False, True))
# What all methods of the table are rewarded by.
TABLE = VARIANTS[0]
NAME = "reward_model"


def train(workspace: Workspace, name: str, variant: RewardVariant, data: DemoData, recipe: Recipe) -> dict[str, Any]:
    """Stage: train it from SFT, as the demo's reward model is."""
    pairs, options = data.pairs, {}
    if variant.small:
        pairs = pairs.select(range(min(len(pairs), recipe.small_set_steps * recipe.reward_pairs)))
        options = {"max_steps": -1, "num_train_epochs": recipe.small_set_epochs}
    if variant.ensemble:
        options["num_heads"] = recipe.ensemble_heads
    sft = workspace.stage_folder("sft")
    results = stages.reward(workspace, name, sft, pairs, data, recipe, **options)
    return {**results, "pairs": len(pairs)}


def model(workspace: Workspace, variant: RewardVariant, recipe: Recipe) -> RewardModel:
    """The trained one, ready to score; an ensemble gives the mean of its heads less their standard deviation."""
    careful = {"ensemble": "mean-std", "std_coef": recipe.ensemble_std_coef} if variant.ensemble else {}
    return judgement.reward_model(workspace.stage_folder(variant.stage), **careful)


def rewards(workspace: Workspace, variant: RewardVariant, recipe: Recipe) -> Rewards:
    """The demo's reward: the reward model's score and the penalty on brief responses."""
    brevity = partial(stages.brevity, recipe.full_length_words)
    return Rewards([model(workspace, variant, recipe), brevity], [1.0, recipe.brevity_weight])
