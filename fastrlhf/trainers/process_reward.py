"""Process reward models: whether each step of a reasoning is right."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback, set_seed

from fastrlhf.batching import text_batches
from fastrlhf.data.steps import prepare_steps
from fastrlhf.fused_layers import fuse_layers
from fastrlhf.loading import load_reward_model, prepare_eval, tokenizer_with_pad, with_adapter
from fastrlhf.rewards.calibration import expected_calibration_error
from fastrlhf.rewards.settings import RewardSettings
from fastrlhf.rewards.text_scores import score_in_fp32, scores_by_place, takes_packing
from fastrlhf.trainers.base import BaseTrainer
from fastrlhf.trainers.config import ProcessRewardConfig


class ProcessRewardTrainer(BaseTrainer):
    """The probability that a step is right, given the prompt and the steps before it (Lightman et al. 2023,
    arXiv:2305.20050): cross-entropy at the last token of each step.

    model: a sequence classification model with one label, or its hub id or folder (loaded with `model_init_kwargs`); a
        causal language model's folder gets a new score head.
    args: ProcessRewardConfig.
    train_dataset, eval_dataset: columns `prompt`, `steps` and `labels` (fastrlhf.data.steps).
    processing_class: the tokenizer; the model's own when None. Its pad token must differ from its EOS.
    peft_config: of adapters to train instead of the model.
    `evaluate` adds accuracy and expected calibration error of the steps, and how often a solution's first wrong step,
    or that there is none, is found. ProcessRewardModel makes a reward function of the result.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: ProcessRewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        set_seed(args.seed)  # a new score head and adapters are drawn before the Trainer sets it
        options = model_init_kwargs or {}
        model = fuse_layers(score_in_fp32(load_reward_model(model, **options)))
        tokenizer = tokenizer_with_pad(
            processing_class, model, unlike_eos=True, trust_remote_code=options.get("trust_remote_code", False)
        )

        def prepared(dataset: Dataset) -> Dataset:
            return prepare_steps(dataset, tokenizer, args.max_length, args.step_separator)

        model = with_adapter(model, peft_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=StepCollator(tokenizer.pad_token_id, packed=takes_packing(model)),
            train_dataset=prepared(train_dataset),
            eval_dataset=prepare_eval(eval_dataset, prepared),
            processing_class=tokenizer,
            compute_metrics=step_metrics,
            callbacks=callbacks,
        )
        self.data_collator.one_batch = self.is_deepspeed_enabled or self.is_fsdp_enabled
        # The loss is normalised by the steps of the whole accumulated batch, which the collator's `labels` count.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False

    def _scores(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """[n], log-odds of every step of the batch, in the order of its labels."""
        return scores_by_place(model, inputs["texts"])[:, 0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        scores, labels = self._scores(model, inputs), inputs["labels"]
        # Data parallelism averages gradients over the ranks, but the count is already that of all of them.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        denominator = len(labels) if num_items_in_batch is None else num_items_in_batch / ranks
        loss = nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / denominator
        self.record(accuracy=((scores > 0) == (labels > 0.5)).float().mean())
        return (loss, {"scores": scores}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            scores = self._scores(model, inputs)
        # The loss is step_metrics' to say: the Trainer would take the mean over batches, which differ in steps.
        return None, *(_padded(x, inputs["counts"].tolist()) for x in (scores, inputs["labels"]))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        settings = RewardSettings("process", separator=self.args.step_separator)
        if self.args.should_save:
            settings.save(self.args.output_dir if output_dir is None else output_dir)


class StepCollator:
    """Rows to batches of texts with the places where steps end, and the labels in the rows' order.

    packed, one_batch: see PreferenceCollator.
    """

    one_batch = False

    def __init__(self, pad_token_id: int, *, packed: bool) -> None:
        self.pad_token_id, self.packed = pad_token_id, packed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        batch["texts"] = text_batches(
            [row["input_ids"] for row in rows],
            self.pad_token_id,
            [row["places"] for row in rows],
            packed=self.packed,
            one_batch=self.one_batch,
        )
        batch["labels"] = torch.tensor([float(label) for row in rows for label in row["labels"]])
        batch["counts"] = torch.tensor([len(row["labels"]) for row in rows])
        return batch


def _padded(x: Tensor, counts: list[int]) -> Tensor:
    """[n] as [b, T], -100 after a row's last step, as the Trainer pads further."""
    return nn.utils.rnn.pad_sequence(x.split(counts), batch_first=True, padding_value=-100.0)


def step_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Of log-odds and labels [b, T], -100 where there is no step: loss, accuracy and ECE of steps, and the share of
    rows of which the first step labelled wrong (below 0.5), or that there is none, is found."""
    scores, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    there = labels != -100
    right, said = labels > 0.5, scores > 0
    of_label = torch.sigmoid(torch.where(right, scores, -scores).double())[there]
    wrong, seen = there & ~right, there & ~said

    def first(x: Tensor) -> Tensor:
        return torch.where(x.any(1), x.int().argmax(1), x.shape[1])

    loss = nn.functional.binary_cross_entropy_with_logits(scores[there].double(), labels[there].double())
    return {
        "loss": loss.item(),
        "accuracy": (right == said)[there].double().mean().item(),
        "ece": expected_calibration_error(of_label),
        "first_error_accuracy": (first(wrong) == first(seen)).double().mean().item(),
    }
