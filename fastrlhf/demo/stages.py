"""The trainings of the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from fastrlhf.demo.data import DemoData
from fastrlhf.demo.recipe import Recipe
from fastrlhf.demo.workspace import Workspace
from fastrlhf.rewards import RewardModel
from fastrlhf.trainers import (
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    last_checkpoint,
)


def model_options() -> dict[str, Any]:
    """bf16 weights and compute where the processor has bf16 GEMMs, which run more than twice as fast as fp32's; the
    optimiser keeps fp32 masters. Eager attention on CPU: torch's fused one has a backward that is slow on short texts.
    """
    if torch.cuda.is_available():
        return {"dtype": torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32}
    found = torch.cpu.get_capabilities()
    has_bf16 = any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return {"dtype": torch.bfloat16 if has_bf16 else torch.float32, "attn_implementation": "eager"}


def sft(workspace: Workspace, name: str, base: str, data: DemoData, recipe: Recipe) -> dict[str, Any]:
    args = SFTConfig(
        **common_options(workspace, name, recipe),
        max_steps=recipe.sft_steps,
        per_device_train_batch_size=recipe.sft_batch_size,
        learning_rate=recipe.sft_learning_rate,
    )
    trainer = SFTTrainer(base, args, data.texts, model_init_kwargs=model_options())
    return train(workspace, name, trainer)


def reward(
    workspace: Workspace, name: str, base: str, pairs: Dataset, data: DemoData, recipe: Recipe, **options: Any
) -> dict[str, Any]:
    """options: other settings of RewardConfig."""
    settings = {
        "max_steps": recipe.reward_steps,
        "per_device_train_batch_size": recipe.reward_pairs,
        "per_device_eval_batch_size": 4 * recipe.reward_pairs,  # texts that pairs share are read once a batch
        "learning_rate": recipe.reward_learning_rate,
        "train_sampling_strategy": "sequential",  # keeps each block of comparisons together
    }
    args = RewardConfig(**common_options(workspace, name, recipe), **{**settings, **options})
    trainer = RewardTrainer(base, args, pairs, eval_dataset=data.held_out_pairs, model_init_kwargs=model_options())
    results = train(workspace, name, trainer)
    metrics = trainer.calibrate()
    return {
        **results,
        "accuracy": metrics["eval_accuracy"],
        "ece": metrics["eval_ece"],
        "ece_calibrated": metrics["eval_ece_calibrated"],
        "log_loss": metrics["eval_loss"],
    }


def ppo(
    workspace: Workspace,
    name: str,
    data: DemoData,
    recipe: Recipe,
    reward_model: str | RewardModel | None = None,
    watched: Sequence[Callable[..., list[float]]] = (),
    **options: Any,
) -> dict[str, Any]:
    """reward_model: that of the stage `reward_model` when None. watched: functions whose scores are logged and have no
    weight. options: other settings of PPOConfig."""
    settings = {
        "max_steps": recipe.ppo_steps,
        "rollout_batch_size": recipe.rollout_batch_size,
        "per_device_train_batch_size": recipe.micro_batch_size,
        "num_mini_batches": recipe.num_mini_batches,
        "num_ppo_epochs": recipe.num_ppo_epochs,
        "response_length": recipe.response_length,
        "learning_rate": recipe.ppo_learning_rate,
        "kl_coef": recipe.kl_coef,
        "reward_weights": [1.0, recipe.brevity_weight, *(0.0 for _ in watched)],
        "reward_normalization": "batch",
    }
    common = common_options(workspace, name, recipe, lr_scheduler_type="constant_with_warmup")
    args = PPOConfig(**common, **{**settings, **options})
    reward_model = workspace.stage_folder("reward_model") if reward_model is None else reward_model
    trainer = PPOTrainer(
        workspace.stage_folder("sft"),
        args,
        reward_funcs=[reward_model, partial(brevity, recipe.full_length_words), *watched],
        train_dataset=data.prompts,
        model_init_kwargs=model_options(),
    )
    return train(workspace, name, trainer)


def brevity(words: int, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """0 for a response of `words` words or more, down to -1 for none.

    Without it PPO finds that short texts are the surest to please: within 20 iterations responses shrank to half.
    """
    return [min(0.0, len(completion.split()) / words - 1) for completion in completions]


def common_options(workspace: Workspace, name: str, recipe: Recipe, **options: Any) -> dict[str, Any]:
    """Arguments that the trainings of all stages share; `options` come before them."""
    return {
        "output_dir": workspace.stage_folder(name),
        "seed": recipe.seed,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "logging_steps": 1,
        "save_steps": recipe.checkpoint_steps,
        "save_total_limit": 1,
        "report_to": "none",
        **options,
    }


def train(workspace: Workspace, name: str, trainer: Trainer) -> dict[str, Any]:
    """Train from the last checkpoint if there is one, and save the model."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(BarWithMetrics)
    trainer.add_callback(Clock(workspace))
    loss = trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir)).training_loss
    trainer.save_model()
    return {"loss": loss}


class BarWithMetrics(ProgressCallback):
    """The progress bar with the latest metrics behind it, instead of a line for each step."""

    SHOWN = ("loss", "accuracy", "rewards/reward_model", "objective/kl", "rollout/length")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs:
            self.training_bar.set_postfix({k.split("/")[-1]: f"{logs[k]:.3g}" for k in self.SHOWN if k in logs})


class Clock(TrainerCallback):
    """Books the stage's time at every checkpoint, so that an interrupted run does not lose it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def on_save(self, args, state, control, **kwargs):
        self.workspace.tick()
