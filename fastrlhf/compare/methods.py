"""The trainings that are compared, each from SFT and by the same reward."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from fastrlhf.compare import rewards, samples
from fastrlhf.compare.recipe import Recipe
from fastrlhf.compare.rewards import TABLE, RewardVariant
from fastrlhf.demo import judgement, stages
from fastrlhf.demo.data import DemoData
from fastrlhf.demo.workspace import Workspace
from fastrlhf.rollout import ScoredSamples, winners
from fastrlhf.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

GOLD = "gold"


def rejection_sampling(workspace: Workspace, name: str, data: DemoData, recipe: Recipe) -> dict[str, Any]:
    """Stage: fine-tune on the best of the candidates to each prompt (Touvron et al. 2023, section 3.2.3)."""
    found = samples.to_learn_from(workspace, name, data, recipe.rejection_prompts, recipe.num_candidates, recipe)
    best = winners(found, finished_only=True).select_columns(["prompt", "completion"])
    args = SFTConfig(
        **stages.common_options(workspace, name, recipe),
        num_train_epochs=recipe.rejection_epochs,
        per_device_train_batch_size=recipe.sft_batch_size,
        learning_rate=recipe.sft_learning_rate,
    )
    trainer = SFTTrainer(workspace.stage_folder("sft"), args, best, model_init_kwargs=stages.model_options())
    results = stages.train(workspace, name, trainer)
    return {**results, "texts": len(best), "reward_calls": len(found) * recipe.num_candidates}


def dpo(workspace: Workspace, name: str, data: DemoData, recipe: Recipe) -> dict[str, Any]:
    """Stage: DPO on the best against the worst of SFT's own responses to each prompt."""
    found = samples.to_learn_from(workspace, name, data, recipe.dpo_prompts, recipe.dpo_candidates, recipe)
    pairs = best_against_worst(found)
    args = DPOConfig(
        **stages.common_options(workspace, name, recipe),
        num_train_epochs=1,
        per_device_train_batch_size=recipe.dpo_batch_size,
        per_device_eval_batch_size=recipe.dpo_batch_size,
        learning_rate=recipe.dpo_learning_rate,
        beta=recipe.dpo_beta,
    )
    trainer = DPOTrainer(workspace.stage_folder("sft"), args, pairs, model_init_kwargs=stages.model_options())
    results = stages.train(workspace, name, trainer)
    return {**results, "pairs": len(pairs), "reward_calls": len(found) * recipe.dpo_candidates}


def best_against_worst(found: list[ScoredSamples]) -> Dataset:
    """Columns prompt, chosen, rejected: of the responses that ended by themselves, those with most and least reward.

    A response that was cut would teach to end in the middle of a sentence. Prompts with no two such responses of
    different rewards are left out. Raises ValueError when none is left.
    """
    rows = []
    for x in found:
        places = sorted((i for i, finished in enumerate(x.finished) if finished), key=lambda i: x.rewards[i])
        if places and x.rewards[places[0]] < x.rewards[places[-1]]:
            best, worst = x.completions[places[-1]], x.completions[places[0]]
            rows.append({"prompt": x.prompt, "chosen": best, "rejected": worst})
    if not rows:
        raise ValueError("no prompt has two responses that ended by themselves: raise response_length or sft_steps")
    return Dataset.from_list(rows)


def ppo(workspace: Workspace, name: str, data: DemoData, recipe: Recipe) -> dict[str, Any]:
    """Stage: the demo's PPO."""
    return _ppo(workspace, name, TABLE, data, recipe)


def grpo(workspace: Workspace, name: str, data: DemoData, recipe: Recipe) -> dict[str, Any]:
    """Stage: no value function, responses to a prompt beside each other, the KL in the loss (Shao et al. 2024)."""
    return _ppo(
        workspace,
        name,
        TABLE,
        data,
        recipe,
        advantage_estimator="grpo",
        num_generations=recipe.grpo_generations,
        reward_normalization="none",
        kl_coef=0.0,
        kl_loss_coef=recipe.grpo_kl_loss_coef,
    )


def watched_ppo(
    workspace: Workspace, name: str, variant: RewardVariant, data: DemoData, recipe: Recipe
) -> dict[str, Any]:
    """Stage: PPO without a KL penalty (Gao et al. 2022, section 2), the gold judge looking on at every iteration."""
    judge = judgement.reward_model(workspace.stage_folder(GOLD))

    def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return judge(prompts, completions)

    options = {"max_steps": recipe.curve_steps, "kl_coef": 0.0}
    return _ppo(workspace, name, variant, data, recipe, watched=[gold], **options)


def _ppo(
    workspace: Workspace, name: str, variant: RewardVariant, data: DemoData, recipe: Recipe, **options: Any
) -> dict[str, Any]:
    reward_model = rewards.model(workspace, variant, recipe)
    results = stages.ppo(workspace, name, data, recipe, reward_model, **options)
    steps = options.get("max_steps", recipe.ppo_steps)
    return {**results, "reward_calls": steps * recipe.rollout_batch_size}


# By the name of its stage: title in the table, and what trains it.
TRAININGS = {
    "rejection-sampling": ("rejection sampling", rejection_sampling),
    "dpo": ("DPO", dpo),
    "ppo": ("PPO", ppo),
    "grpo": ("GRPO", grpo),
}
