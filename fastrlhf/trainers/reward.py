"""Bradley-Terry reward models."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback, set_seed

from fastrlhf import functional as F
from fastrlhf.batching import group_by_length, pad_right
from fastrlhf.data import prepare_preferences
from fastrlhf.loading import load_reward_model, prepare_eval, tokenizer_with_pad, with_adapter
from fastrlhf.rewards.calibration import expected_calibration_error
from fastrlhf.rewards.reward_model import score_in_fp32
from fastrlhf.trainers.base import BaseTrainer
from fastrlhf.trainers.config import RewardConfig


class RewardTrainer(BaseTrainer):
    """A score for a text, so that chosen texts score above rejected ones (Ouyang et al. 2022, equation 1).

    model: a sequence classification model with one label, or its hub id or folder (loaded with `model_init_kwargs`); a
        causal language model's folder gets a new score head.
    args: RewardConfig.
    train_dataset, eval_dataset: columns `chosen` and `rejected`, and if wanted `prompt` and `margin` (fastrlhf.data).
    processing_class: the tokenizer; the model's own when None. Its pad token must differ from its EOS.
    peft_config: of adapters to train instead of the model.

    A text that stands in several pairs of a batch goes through the model once (all comparisons of one prompt in one
    batch, Ouyang et al. 2022, section 3.5). `evaluate` adds accuracy and expected calibration error.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: RewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        set_seed(args.seed)  # a new score head and adapters are drawn before the Trainer sets it
        options = model_init_kwargs or {}
        model = score_in_fp32(load_reward_model(model, **options))
        tokenizer = tokenizer_with_pad(
            processing_class, model, unlike_eos=True, trust_remote_code=options.get("trust_remote_code", False)
        )

        def prepared(dataset: Dataset) -> Dataset:
            return prepare_preferences(dataset, tokenizer, args.max_length, args.pair_rules)

        super().__init__(
            model=with_adapter(model, peft_config),
            args=args,
            data_collator=PreferenceCollator(tokenizer.pad_token_id),
            train_dataset=prepared(train_dataset),
            eval_dataset=prepare_eval(eval_dataset, prepared),
            processing_class=tokenizer,
            compute_metrics=preference_metrics,
            callbacks=callbacks,
        )
        # The loss is the mean over a batch's pairs, so the Trainer divides it by the accumulation steps.
        self.loss_is_scaled_for_ga = False

    def _pair_scores(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.cat([model(**group).logits.squeeze(-1).float() for group in inputs["groups"]])
        return scores[inputs["chosen"]], scores[inputs["rejected"]]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        chosen, rejected = self._pair_scores(model, inputs)
        loss, stats = F.pairwise_reward_loss(
            chosen, rejected, margin=inputs.get("margin"), center_coef=self.args.center_rewards_coefficient
        )
        self.record(accuracy=stats.accuracy, **{"rewards/margins": stats.difference})
        return (loss, {"chosen": chosen, "rejected": rejected}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            chosen, rejected = self._pair_scores(model, inputs)
            loss, _ = F.pairwise_reward_loss(
                chosen, rejected, margin=inputs.get("margin"), center_coef=self.args.center_rewards_coefficient
            )
        return loss, torch.stack([chosen, rejected], dim=1), torch.zeros_like(chosen)


class PreferenceCollator:
    """Pairs to the distinct texts among them, in padded groups of similar length, and each pair's places there."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        chosen = [tuple(row["chosen_ids"]) for row in rows]
        rejected = [tuple(row["rejected_ids"]) for row in rows]
        texts = list(dict.fromkeys([*chosen, *rejected]))
        groups = group_by_length([len(text) for text in texts])
        place = {texts[index]: at for at, index in enumerate(i for group in groups for i in group)}
        batch: dict[str, Any] = {
            "chosen": torch.tensor([place[text] for text in chosen]),
            "rejected": torch.tensor([place[text] for text in rejected]),
        }
        if "margin" in rows[0]:
            batch["margin"] = torch.tensor([float(row["margin"]) for row in rows])
        batch["groups"] = [
            dict(
                zip(
                    ("input_ids", "attention_mask"),
                    pad_right([texts[i] for i in group], self.pad_token_id),
                    strict=True,
                )
            )
            for group in groups
        ]
        return batch


def preference_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy (a tie is half) and expected calibration error of score pairs [n, 2], chosen first."""
    scores = torch.as_tensor(prediction.predictions).double()
    difference = scores[:, 0] - scores[:, 1]
    return {
        "accuracy": ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item(),
        "ece": expected_calibration_error(torch.sigmoid(difference)),
    }
