"""The flags of `fastrlhf compare` and its hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from fastrlhf.demo import recipe as demo
from fastrlhf.demo.recipe import DemoArguments


@dataclass(frozen=True)
class Recipe(demo.Recipe):
    """What the stages do, beyond those of the demo. Chosen for 2 CPU cores and 1.5 hours with 3 seeds."""

    num_candidates: int = 16
    # Rejection sampling
    rejection_prompts: int = 384
    rejection_epochs: int = 2
    # DPO
    dpo_prompts: int = 512
    dpo_candidates: int = 4
    dpo_batch_size: int = 16
    dpo_learning_rate: float = 1e-4
    dpo_beta: float = 0.1
    # GRPO
    grpo_generations: int = 4
    grpo_kl_loss_coef: float = 0.04
    # Overoptimisation: the smaller preference set has the pairs of so many of the larger one's steps.
    small_set_steps: int = 10
    small_set_epochs: int = 2
    ensemble_heads: int = 5
    ensemble_std_coef: float = 1.0
    curve_prompts: int = 128
    curve_steps: int = 30

    def of_seed(self, number: int) -> Recipe:
        return replace(self, seed=self.seed + number)


QUICK = replace(
    Recipe(),
    eval_prompts=32,
    eval_pairs=100,
    sft_steps=10,  # fewer, and hardly a response ends by itself
    reward_steps=4,
    reward_texts=24,
    reward_pairs=128,
    ppo_steps=3,
    rollout_batch_size=16,
    micro_batch_size=8,
    checkpoint_steps=3,
    rejection_prompts=16,
    rejection_epochs=1,
    dpo_prompts=32,
    small_set_steps=2,
    curve_prompts=16,
    curve_steps=4,
)


@dataclass
class CompareArguments(DemoArguments):
    """SFT, best-of-n, rejection sampling, DPO, PPO and GRPO on the demo's data, in one measured table."""

    quick: bool = field(default=False, metadata={"help": "Everything small, in a few minutes: no results to keep."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where everything is written; runs/compare, runs/compare-quick with --quick, "
            "runs/compare-synthetic with --synthetic."
        },
    )
    seeds: int | None = field(
        default=None,
        metadata={
            "help": "How often everything after the reward models is done; 3, or 1 with --quick. The same command "
            "with a larger number goes on from what is there."
        },
    )
    synthetic: bool = field(
        default=False,
        metadata={"help": "The known results, in a world whose utilities are known; seconds, no language model."},
    )
    results_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that gets the summary and the figure as well, such as bench/results/quality."},
    )

    def __post_init__(self) -> None:
        if self.seeds is None:
            self.seeds = 1 if self.quick else 3
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1")
        if self.output_dir is None:
            kind = "-synthetic" if self.synthetic else "-quick" if self.quick else ""
            self.output_dir = f"runs/compare{kind}"

    def recipe(self) -> Recipe:
        return self.adapted(QUICK if self.quick else Recipe())

    def settings(self) -> dict[str, Any]:
        return {"model": self.model, "dataset": self.dataset, **self.recipe().as_dict()}
