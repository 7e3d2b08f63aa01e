"""Bradley-Terry reward models."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from fastrlhf.data import PairReport, prepare_pairs
from fastrlhf.fused_layers import fuse_layers
from fastrlhf.loading import load_reward_model, prepare_eval, tokenizer_with_pad, with_adapter
from fastrlhf.rewards.head_report import flat_metrics, head_report
from fastrlhf.rewards.preference_report import write_report
from fastrlhf.rewards.text_scores import score_in_fp32, takes_packing, text_scores
from fastrlhf.trainers.base import BaseTrainer
from fastrlhf.trainers.checkpoints import last_checkpoint
from fastrlhf.trainers.config import RewardConfig
from fastrlhf.trainers.reward_batches import PreferenceCollator
from fastrlhf.trainers.reward_losses import bootstrap_draws, preference_loss

REPORTS_FOLDER = "reports"


class RewardTrainer(BaseTrainer):
    """A score for a text, so that chosen texts score above rejected ones (Ouyang et al. 2022, equation 1).

    model: a sequence classification model with `args.num_labels` labels, or its hub id or folder (loaded with
        `model_init_kwargs`); a causal language model's folder gets a new score head.
    args: RewardConfig.
    train_dataset, eval_dataset: columns `chosen` and `rejected`, and if wanted `prompt`, `margin`, `score_chosen` and
        `score_rejected`, and the columns that `args.objectives` names (fastrlhf.data.prepare_pairs).
    processing_class: the tokenizer; the model's own when None. Its pad token must differ from its EOS.
    peft_config: of adapters to train instead of the model.

    A text that stands in several pairs of a batch goes through the model once (all comparisons of one prompt in one
    batch, Ouyang et al. 2022, section 3.5), and so does what several texts begin with, as the two of a pair do with
    their prompt: texts are packed where those that are do not disturb each other in the model, else padded. Every
    evaluation writes `reports/STEP.json` with what `preference_report` measures, and reliability diagrams beside it;
    `calibrate` fits what turns scores into probabilities.
    """

    runs_on_deepspeed = True

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
        if args.early_stopping_patience is not None:
            if eval_dataset is None:
                raise ValueError(
                    f"early_stopping_patience={args.early_stopping_patience} looks at the held-out loss: give an "
                    "eval_dataset"
                )
            callbacks = [*(callbacks or []), EarlyStoppingCallback(args.early_stopping_patience)]
        options = model_init_kwargs or {}
        self.settings = args.reward_settings
        model = fuse_layers(score_in_fp32(load_reward_model(model, num_labels=args.num_labels, **options)))
        tokenizer = tokenizer_with_pad(
            processing_class, model, unlike_eos=True, trust_remote_code=options.get("trust_remote_code", False)
        )
        self.pair_reports: list[PairReport] = []

        def prepared(dataset: Dataset) -> Dataset:
            if "chosen_ids" in dataset.column_names:
                return dataset
            pairs, found = prepare_pairs(
                dataset,
                tokenizer,
                args.max_length,
                args.pair_rules,
                turns=args.score_turns == "all",
                objectives=args.objectives or (),
            )
            self.pair_reports.append(found)
            return pairs

        self.prepared = prepared
        train = prepared(train_dataset)
        if args.num_heads > 1:
            train = train.add_column("draws", bootstrap_draws(len(train), args.num_heads, args.seed))
        model = with_adapter(model, peft_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=PreferenceCollator(tokenizer.pad_token_id, args.objectives, packed=takes_packing(model)),
            train_dataset=train,
            eval_dataset=prepare_eval(eval_dataset, prepared),
            processing_class=tokenizer,
            compute_metrics=self._measure,
            callbacks=callbacks,
        )
        self.data_collator.one_batch = self.is_deepspeed_enabled or self.is_fsdp_enabled
        # The loss is the mean over a batch's pairs, so the Trainer divides it by the accumulation steps.
        self.loss_is_scaled_for_ga = False
        self.last_report: dict[str, Any] = {}

    def _pair_scores(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[B, heads] each."""
        scores = text_scores(model, inputs["texts"], inputs["count"])
        return scores[inputs["chosen"]], scores[inputs["rejected"]]

    def _loss(self, chosen: Tensor, rejected: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        return preference_loss(chosen, rejected, inputs, self.settings.heads, self.args.center_rewards_coefficient)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        chosen, rejected = self._pair_scores(model, inputs)
        loss, stats = self._loss(chosen, rejected, inputs)
        self.record(accuracy=stats.accuracy, **{"rewards/margins": stats.difference})
        if self.settings.heads == "ensemble":
            self.record(**{"rewards/disagreement": (chosen - rejected).std(dim=1).mean()})
        return (loss, {"chosen": chosen, "rejected": rejected}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            kept = last_checkpoint(self.args.output_dir)
            raise ValueError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}, because a score is not finite. Lower "
                f"learning_rate={self.args.learning_rate} or max_grad_norm={self.args.max_grad_norm}. "
                + (f"The last checkpoint is {kept}." if kept else "There is no checkpoint.")
            )
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            chosen, rejected = self._pair_scores(model, inputs)
        unknown = torch.full_like(chosen[:, 0], torch.nan)
        margin = inputs.get("margin", unknown)
        said = [margin, inputs.get("gap", margin), inputs["length_differences"].to(chosen.dtype)]
        labels = torch.stack([*said, *inputs.get("objectives", unknown[:, None][:, :0]).unbind(1)], dim=1)
        # The loss is _measure's to say: of the last batch, the Trainer would count pairs twice that two ranks have.
        return None, torch.stack([chosen, rejected], dim=1), labels

    def _measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics out of scores [n, 2, heads] and [n, 3 + objectives]: margin, gap, length difference, and label of
        each objective."""
        scores, said = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        batch = {"margin": None if said[:, 0].isnan().any() else said[:, 0], "objectives": said[:, 3:]}
        loss, _ = self._loss(*scores.unbind(1), batch)
        self.last_report = head_report(scores, said[:, 1:], self.settings)
        return {"loss": loss.item(), **flat_metrics(self.last_report)}

    def evaluate(
        self, eval_dataset: Any | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, accuracy and calibration on held-out pairs, of which `reports/` then says more."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        given = eval_dataset if isinstance(eval_dataset, str) or eval_dataset is None else self.prepared(eval_dataset)
        metrics = super().evaluate(given, ignore_keys, metric_key_prefix)
        if self.is_world_process_zero():
            name = f"{self.state.global_step:06d}" + metric_key_prefix.removeprefix("eval")
            at = {"step": self.state.global_step, "epoch": self.state.epoch}
            pairs = [found.as_dict() for found in self.pair_reports]
            report = {**at, "loss": metrics[f"{metric_key_prefix}_loss"], **self.last_report, "data": pairs}
            write_report(os.path.join(self.args.output_dir, REPORTS_FOLDER), name, report)
        return metrics

    def calibrate(self, dataset: Dataset | None = None) -> dict[str, float]:
        """Fit temperatures, and means and deviations of the scores, on held-out pairs; `eval_dataset` when None.

        They are written into `reward_model.json` in output_dir, and change no score: `RewardModel(calibrated=True)`
        divides by the temperatures. Returns what `evaluate` does. Raises ValueError where there are no held-out pairs,
        or several sets of them to choose from.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "calibrate: one data set of held-out pairs is wanted, here or as the trainer's eval_dataset"
            )
        metrics = self.evaluate(dataset)
        parts = list(self.last_report.get("objectives", {"": self.last_report}).values())
        self.settings = replace(
            self.settings,
            temperatures=[part["temperature"] for part in parts],
            means=self.last_report["head_means"],
            stds=self.last_report["head_stds"],
        )
        if self.args.should_save:
            os.makedirs(self.args.output_dir, exist_ok=True)
            self.settings.save(self.args.output_dir)
        return metrics

    def train(self, *args: Any, **kwargs: Any):
        self.settings = self.args.reward_settings  # calibration is of weights that will be others
        return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.settings.save(self.args.output_dir if output_dir is None else output_dir)
