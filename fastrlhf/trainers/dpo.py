"""Direct preference optimisation, and its kin: a policy from pairs, without a reward model and without sampling."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback, set_seed

from fastrlhf import functional as F
from fastrlhf.batching import ScoredBatch
from fastrlhf.data.pairs import SIDES, prepare_pairs
from fastrlhf.loading import disable_dropout, load_causal_lm, prepare_eval, tokenizer_with_pad, with_adapter
from fastrlhf.trainers.base import ScorerTrainer
from fastrlhf.trainers.dpo_config import SIMPO, DPOConfig
from fastrlhf.trainers.reference_log_probs import COLUMNS, ReferenceLogProbs, pair_batch, sums
from fastrlhf.trainers.scored_tokens import ScoredTokens
from fastrlhf.trainers.token_scorer import TokenScorer

STATE_FILE = "dpo_state.json"


class DPOTrainer(ScorerTrainer):
    """The policy whose log-probs, beside the reference's, order the pairs (Rafailov et al. 2023); or IPO, SLiC, SimPO.

    model: the policy to start from, a causal language model or its hub id or folder (loaded with `model_init_kwargs`).
    args: DPOConfig.
    train_dataset, eval_dataset: columns `chosen` and `rejected`, with or without `prompt`, strings or messages
        (fastrlhf.data.pairs).
    processing_class: the tokenizer; the model's own when None.
    ref_model: a causal language model, or its hub id or folder; when None, the start, without the adapters of
        `peft_config`.
    peft_config: of adapters to train instead of the model.

    What the loss needs of the reference, two numbers a pair, is computed here, once, with the work spread over the
    ranks, and kept in `output_dir/reference_log_probs`; a run that is started again computes what is missing. While
    the policy is trained, no reference is in memory. simpo has none.
    `trainer.scorer.model` is the policy in training; checkpoints and `save_model` hold it as transformers save it.
    `evaluate` has the metrics of training over the evaluation pairs.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: DPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | nn.Module | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        set_seed(args.seed)  # adapters are drawn before the Trainer sets it
        options = model_init_kwargs or {}
        if ref_model is not None and not args.has_reference:
            raise ValueError(f"ref_model: loss_type={args.loss_type!r} has no reference, leave it out")
        policy = load_causal_lm(model, **options)
        tokenizer = tokenizer_with_pad(
            processing_class, policy, trust_remote_code=options.get("trust_remote_code", False)
        )
        limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)

        def prepared(dataset: Dataset) -> Dataset:
            pairs, _ = prepare_pairs(dataset, tokenizer, args.max_length, args.pair_rules, starts=True)
            return _checked(pairs, limit)

        train_dataset, eval_dataset = prepared(train_dataset), prepare_eval(eval_dataset, prepared)
        policy = with_adapter(policy, peft_config)
        disable_dropout(policy)
        super().__init__(
            model=TokenScorer(policy, args.lm_head, padding_free=args.padding_free),
            args=args,
            data_collator=PairCollator(args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=partial(pair_metrics, args=args),
            callbacks=callbacks,
        )
        # The loss is the mean over a batch's pairs, so the Trainer divides it by the accumulation steps.
        self.loss_is_scaled_for_ga = False
        self.reference = None
        if args.has_reference:
            self.reference = ReferenceLogProbs(
                self.scorer,
                args,
                self.accelerator,
                without_adapters=peft_config is not None,
                place=self.is_fsdp_enabled or self.is_deepspeed_enabled,
            )
            if ref_model is not None and ref_model is not model:
                self.reference.take(load_causal_lm(ref_model, "ref_model", **options))
            self.train_dataset = self.reference.added_to(self.train_dataset)
            self.eval_dataset = prepare_eval(self.eval_dataset, self.reference.added_to)
            self.reference.release()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        args, batch = self.args, inputs["batch"]
        ref = torch.cat([inputs[name] for name in COLUMNS])
        pairs: Pairs = model(
            batch.input_ids,
            batch.positions,
            batch.tokens,
            packing=batch.packing,
            loss=lambda scored: pair_loss(scored, batch, ref, args),
        )
        if model.training:
            chosen, rejected = pairs.log_probs.chunk(2)
            self.record(
                **{
                    "rewards/chosen": pairs.stats.chosen_reward,
                    "rewards/rejected": pairs.stats.rejected_reward,
                    "rewards/accuracies": pairs.stats.accuracy,
                    "rewards/margins": pairs.stats.margin,
                    "logps/chosen": chosen.mean(),
                    "logps/rejected": rejected.mean(),
                    "entropy": pairs.entropy,
                }
            )
        return (pairs.loss, pairs) if return_outputs else pairs.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, pairs = self.compute_loss(model, inputs, return_outputs=True)
        each = torch.stack([*pairs.rewards.chunk(2), *pairs.log_probs.chunk(2)], dim=1)
        # The loss is pair_metrics' to say: of the last batch, the Trainer would count pairs twice that two ranks have.
        return None, each, torch.zeros_like(each[:, 0])

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        wanted = {"chosen_ids", *(COLUMNS if self.args.has_reference else ())}
        if isinstance(eval_dataset, Dataset) and not wanted <= set(eval_dataset.column_names):
            raise ValueError(
                "eval_dataset: evaluation pairs are made ready while the reference is there; give DPOTrainer all of "
                "them as eval_dataset, a data set or a dictionary of several by name"
            )
        return super().get_eval_dataloader(eval_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            path = os.path.join(output_dir or self.args.output_dir, STATE_FILE)
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"reference": self._reference_key()}, file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with open(os.path.join(resume_from_checkpoint, STATE_FILE), encoding="utf-8") as file:
            before = json.load(file)["reference"]
        if before != self._reference_key():
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} was trained beside another reference. Give the "
                "`model` that its training started from (not the checkpoint), and the same ref_model and loss_type"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _reference_key(self) -> str | None:
        return None if self.reference is None else self.reference.key


class Pairs(NamedTuple):
    """B pairs. log_probs, rewards: [2 B], without gradient, of whole responses, the chosen ones first. entropy: mean
    over the responses' tokens, in nats."""

    loss: Tensor
    stats: F.DPOStats
    log_probs: Tensor
    rewards: Tensor
    entropy: Tensor


def pair_loss(scored: ScoredTokens, batch: ScoredBatch, ref: Tensor, args: DPOConfig) -> Pairs:
    """Of a batch's responses, the chosen ones first, beside the reference's log-probs of them, [2 B]."""
    each, entropy = scored.log_probs_and_entropy()
    log_probs = policy = sums(batch, each)
    if args.normalizes_length:
        lengths = batch.mask.sum(1)
        policy, ref = policy / lengths, ref / lengths
    loss, stats = preference_loss(policy, ref, args)
    rewards = args.beta * (policy.detach() - ref)
    return Pairs(loss, stats, log_probs.detach(), rewards, entropy.detach().mean())


def preference_loss(policy: Tensor, ref: Tensor, args: DPOConfig) -> tuple[Tensor, F.DPOStats]:
    """The loss `args.loss_type` of log-probs [2 B], chosen ones first, which are means where it normalises by length.

    simpo: -log sigmoid(beta (chosen - rejected) - gamma), Meng et al. 2024 (arXiv:2405.14734), equation 6, which is a
    Bradley-Terry loss with a margin, of rewards that are mean log-probs.
    """
    if args.loss_type == SIMPO:
        chosen, rejected = (args.beta * policy).chunk(2)
        loss, stats = F.pairwise_reward_loss(chosen, rejected, margin=torch.full_like(chosen, args.simpo_gamma))
        return loss, F.DPOStats(*stats)
    options = {"beta": args.beta, "variant": args.loss_type, "label_smoothing": args.label_smoothing}
    return F.dpo_loss(*policy.chunk(2), *ref.chunk(2), **options)


class PairCollator:
    """Pairs to one batch of their responses, the chosen ones first, and what the reference gives them (0 without)."""

    def __init__(self, args: DPOConfig) -> None:
        self.args = args

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        known = self.args.has_reference
        ref = {name: torch.tensor([row[name] if known else 0.0 for row in rows]) for name in COLUMNS}
        return {**ref, "batch": pair_batch(rows, self.args)}


def pair_metrics(prediction: EvalPrediction, args: DPOConfig) -> dict[str, float]:
    """Means over n pairs, whatever batches they were in. predictions: [n, 4], the rewards of their chosen and rejected
    responses and the log-probs of these."""
    chosen, rejected, *log_probs = torch.as_tensor(prediction.predictions).unbind(1)
    policy = torch.cat([chosen, rejected]) / args.beta
    loss, stats = preference_loss(policy, torch.zeros_like(policy), args)
    each = {
        "loss": loss,
        "rewards/chosen": stats.chosen_reward,
        "rewards/rejected": stats.rejected_reward,
        "rewards/accuracies": stats.accuracy,
        "rewards/margins": stats.margin,
        "logps/chosen": log_probs[0].mean(),
        "logps/rejected": log_probs[1].mean(),
    }
    return {name: x.item() for name, x in each.items()}


def _checked(pairs: Dataset, limit: int | None) -> Dataset:
    """The pairs, and their tokens as `length`. limit: most tokens of a text, or None."""
    for side in SIDES:
        starts = list(pairs[f"{side}_start"])
        if 0 in starts:
            raise ValueError(
                f"{side}: pair {starts.index(0)} has an empty prompt, and the tokenizer puts no BOS token before it: "
                "nothing predicts the first token of its answers. Leave such rows out with dataset.filter(...)."
            )
    lengths = np.array([[len(ids) for ids in pairs[f"{side}_ids"]] for side in SIDES])
    if limit and lengths.max() > limit:
        raise ValueError(
            f"the longest text has {lengths.max()} tokens, more than the model's max_position_embeddings={limit}. Set "
            "max_length to that, and pair_too_long='drop' to leave longer pairs out"
        )
    return pairs.add_column("length", lengths.sum(0))
