"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from fastrlhf.batching import pad_right
from fastrlhf.data import prepare_sft
from fastrlhf.loading import load_causal_lm, prepare_eval, tokenizer_with_pad, with_adapter
from fastrlhf.trainers.base import ScorerTrainer
from fastrlhf.trainers.config import SFTConfig
from fastrlhf.trainers.token_scorer import TokenScorer


class SFTTrainer(ScorerTrainer):
    """Maximum likelihood of texts or completions; the vocabulary is computed for the trained tokens only.

    model: a causal language model, or its hub id or folder (loaded with `model_init_kwargs`).
    args: SFTConfig.
    train_dataset, eval_dataset: columns `text`, or `prompt` and `completion`, or `messages` (fastrlhf.data).
    processing_class: the tokenizer; the model's own when None.
    peft_config: of adapters to train instead of the model.
    `trainer.scorer.model` is the model in training; checkpoints and `save_model` hold it as transformers save it.
    """

    runs_on_deepspeed = True

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        set_seed(args.seed)  # adapters are drawn before the Trainer sets it
        options = model_init_kwargs or {}
        model = load_causal_lm(model, **options)
        tokenizer = tokenizer_with_pad(
            processing_class, model, trust_remote_code=options.get("trust_remote_code", False)
        )

        def prepared(dataset: Dataset) -> Dataset:
            return prepare_sft(dataset, tokenizer, args.max_length, args.completion_only_loss)

        super().__init__(
            model=TokenScorer(with_adapter(model, peft_config), args.lm_head),
            args=args,
            data_collator=SFTCollator(tokenizer.pad_token_id),
            train_dataset=prepared(train_dataset),
            eval_dataset=prepare_eval(eval_dataset, prepared),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # The loss is normalised by the tokens of the whole accumulated batch, which the collator's `labels` count.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        # Data parallelism averages gradients over the ranks, but the count is already that of all of them.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        denominator = None if num_items_in_batch is None else num_items_in_batch / ranks
        loss, stats = model(
            inputs["input_ids"],
            inputs["positions"],
            inputs["labels"],
            loss=lambda labels: labels.cross_entropy(denominator),
        )
        if model.training:
            self.record(entropy=stats.entropy)
        return (loss, {"entropy": stats.entropy}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss, None, None


class SFTCollator:
    """Rows with `input_ids` and `labels` (-100 = not trained) to one padded batch and the positions to train."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, _ = pad_right([row["input_ids"] for row in rows], self.pad_token_id)
        labels, _ = pad_right([row["labels"] for row in rows], -100)
        # The token at a place is predicted one place before it.
        trained = torch.zeros_like(labels, dtype=torch.bool)
        trained[:, :-1] = labels[:, 1:] != -100
        positions = trained.flatten().nonzero().squeeze(1)
        return {"input_ids": input_ids, "positions": positions, "labels": labels.flatten()[positions + 1]}
