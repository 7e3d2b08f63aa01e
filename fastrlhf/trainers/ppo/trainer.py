"""Proximal policy optimisation of a language model against a reward."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastrlhf import functional as F
from fastrlhf.batching import ScoredBatch, score_responses
from fastrlhf.data import prepare_prompts
from fastrlhf.loading import (
    disable_dropout,
    load_causal_lm,
    load_reward_model,
    prepare_eval,
    tokenizer_with_pad,
    with_adapter,
)
from fastrlhf.rewards import RewardError, Rewards, RunningNormalizer, normalize
from fastrlhf.rollout import NativeEngine, Rollout, SamplingParams, create_engine
from fastrlhf.rollout.types import new_seed
from fastrlhf.trainers.base import ScorerTrainer
from fastrlhf.trainers.checkpoints import is_complete
from fastrlhf.trainers.ppo.actor_critic import ActorCritic
from fastrlhf.trainers.ppo.config import PPOConfig
from fastrlhf.trainers.ppo.metrics import gap_metrics, gap_metrics_of, rollout_metrics, update_metrics
from fastrlhf.trainers.ppo.targets import Targets, ppo_targets
from fastrlhf.trainers.token_scorer import TokenScorer

REWARD_STATE_FILE = "reward_normalizer.json"


class PPOTrainer(ScorerTrainer):
    """PPO with a KL penalty to the start (Ziegler et al. 2019, Ouyang et al. 2022).

    model: the policy to start from, a causal language model or its hub id or folder (loaded with `model_init_kwargs`).
    args: PPOConfig.
    reward_funcs: one or a list of reward models (object, hub id or folder) and callables
        `f(prompts, completions, **columns) -> list[float]`; summed with `args.reward_weights`.
    train_dataset, eval_dataset: column `prompt` (a string or messages); other columns go to the reward functions.
    processing_class: the tokenizer; the model's own when None.
    ref_model: what the KL is measured to; when None, a frozen copy of the start, or with `peft_config` the model with
        its adapters off.
    value_model: a sequence classification model with one label, or its hub id or folder; None puts a value head on
        the policy's own trunk.
    `trainer.scorer.model` is the policy in training; checkpoints and `save_model` hold it as transformers save it.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: PPOConfig,
        reward_funcs: Any,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | nn.Module | None = None,
        value_model: str | nn.Module | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        set_seed(args.seed)  # adapters are drawn before the Trainer sets it
        options = model_init_kwargs or {}
        _refuse_shared(model, ref_model, value_model, reward_funcs)
        policy = load_causal_lm(model, **options)
        tokenizer = tokenizer_with_pad(
            processing_class, policy, trust_remote_code=options.get("trust_remote_code", False)
        )
        if ref_model is not None:
            ref_model = load_causal_lm(ref_model, "ref_model", **options)
            disable_dropout(ref_model)
        elif peft_config is None:
            ref_model = copy.deepcopy(policy)
        if value_model is not None:
            value_model = load_reward_model(value_model, "value_model", **options)
            disable_dropout(value_model)

        def prepared(dataset: Dataset) -> Dataset:
            prompts = prepare_prompts(dataset, tokenizer, args.max_prompt_length)
            _check_context(prompts, policy, args)
            return prompts

        prompts, wanted = prepared(train_dataset), args.rollout_batch_size * args.world_size
        if len(prompts) < wanted:
            raise ValueError(
                f"train_dataset has {len(prompts)} prompts, fewer than rollout_batch_size={args.rollout_batch_size}"
                + (f" on each of {args.world_size} devices" if args.world_size > 1 else "")
            )
        policy = with_adapter(policy, peft_config)
        disable_dropout(policy)
        super().__init__(
            model=ActorCritic(policy, value_model, args.lm_head),
            args=args,
            data_collator=list,
            train_dataset=prompts,
            eval_dataset=prepare_eval(eval_dataset, prepared),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # Autocast computes in its own dtype, and so does an engine that is to give the trainer's log-probs.
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.engine = create_engine(
            args.rollout_engine, self.scorer.model, tokenizer, dtype=dtype, server=args.rollout_server
        )
        self.sampling = SamplingParams(args.response_length, args.temperature, batch_size=args.rollout_batch_size)
        self.rewards = Rewards(reward_funcs, args.reward_weights, tokenizer).to(args.device)
        self.reward_normalizer = RunningNormalizer()
        self.ref_scorer = None
        if ref_model is not None:
            self.ref_scorer = TokenScorer(ref_model.eval().requires_grad_(False), args.lm_head).to(args.device)

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """One PPO iteration on a batch of prompts. The Trainer makes the last optimiser step; returns the mean loss."""
        args = self.args
        with self.timed("rollout"):
            rollout = self.rollout([row["prompt_ids"] for row in inputs])
        with self.timed("reward"):
            scores, each = self.scores(inputs, rollout)
        with self.timed("reference"):
            batches = self.micro_batches(rollout)
            log_probs, values, weights = self.score_rollout(model, rollout, batches)
            ref_log_probs = self.reference_log_probs(rollout, batches)
        targets = ppo_targets(
            self.normalized(scores), log_probs, ref_log_probs, values, rollout.mask.to(args.device), args, weights
        )
        self.record(**rollout_metrics(rollout, scores, each, targets, args.kl_coef))

        with self.timed("update"):
            losses = []
            for mini_batch in self.mini_batches(batches):
                if losses:
                    self.optimizer_step(model)
                loss, stats = self.update(model, mini_batch, targets)
                if not losses and weights is None:  # the policy is still the one that sampled
                    self.record(**gap_metrics(stats))
                losses.append(loss)
        return torch.stack(losses).mean()

    def rollout(self, prompts: list[list[int]]) -> Rollout:
        """Responses of the policy as it is, other ones on each device."""
        self.engine.update_weights()
        sampling = replace(self.sampling, seed=(new_seed() + self.args.process_index) % 2**63)
        if isinstance(self.engine, NativeEngine):
            return self.engine.generate(prompts, sampling, hidden=self.scorer.value_model is None)
        return self.engine.generate(prompts, sampling)

    def update(
        self, model: nn.Module, mini_batch: list[ScoredBatch], targets: Targets
    ) -> tuple[Tensor, list[tuple[Tensor, F.PPOStats, Tensor, F.ValueStats]]]:
        """Gradients of policy and value loss over a mini-batch, one micro-batch at a time.

        Returns the loss, and what `update_metrics` takes.
        """
        args = self.args
        model.train()
        tokens = torch.tensor(float(sum(batch.tokens.numel() for batch in mini_batch)), device=args.device)
        # Mean over the ranks: data parallelism averages the gradients again, which leaves the mean over all tokens.
        denominator = self.accelerator.reduce(tokens, "mean")
        losses, stats = [], []
        for batch in mini_batch:
            with self.accelerator.autocast():
                policy_loss, policy_stats, value_loss, value_stats = self.losses(model, batch, targets, denominator)
                loss = policy_loss + args.vf_coef * value_loss
            self.accelerator.backward(loss)
            losses.append(loss.detach())
            stats.append((batch.tokens.numel() / tokens, policy_stats, value_loss, value_stats))
        self.record(**update_metrics(stats))
        return torch.stack(losses).sum(), stats

    def losses(
        self, model: nn.Module, batch: ScoredBatch, targets: Targets, denominator: Tensor
    ) -> tuple[Tensor, F.PPOStats, Tensor, F.ValueStats]:
        """Policy loss and value loss of a micro-batch, as parts of sums over `denominator` tokens, with statistics."""
        args, mask = self.args, torch.ones_like(batch.tokens)
        old_log_probs = batch.take(targets.log_probs)
        policy_loss, policy_stats, values = model(
            batch.input_ids,
            batch.positions,
            batch.tokens,
            args.temperature,
            loss=lambda tokens: tokens.ppo_loss(
                old_log_probs,
                batch.take(targets.advantages),
                mask,
                clip_low=args.cliprange,
                clip_high=args.cliprange,
                weights=None if targets.weights is None else batch.take(targets.weights),
                advantage_stats=targets.advantage_stats,
                entropy_coef=args.entropy_coef,
                denominator=denominator,
                # For the statistics: how far the policy is from the old one, |log ratio| on average.
                ref_log_probs=old_log_probs,
                kl_estimator="abs",
            ),
        )
        value_loss, value_stats = F.value_loss(
            values,
            batch.take(targets.values),
            batch.take(targets.returns),
            mask,
            clip=args.cliprange_value,
            denominator=denominator,
        )
        return policy_loss, policy_stats, value_loss, value_stats

    def optimizer_step(self, model: nn.Module) -> None:
        """An optimiser step between mini-batches, clipped like the Trainer's own."""
        if self.args.max_grad_norm > 0:
            self._clip_grad_norm(model)
        self.optimizer.step()
        model.zero_grad()

    def scores(self, inputs: list[dict[str, Any]], rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B], and those of each reward function. An error there first saves a checkpoint: what was trained so
        far is whole."""
        prompts = [row["prompt"] for row in inputs]
        texts = rollout.texts(self.processing_class)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name not in ("prompt", "prompt_ids")}
        try:
            scores, each = self.rewards(prompts, completions, columns)
        except RewardError:
            folder = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            wanted = self.is_in_train and self.state.global_step and self.args.save_strategy != "no"
            if wanted and not is_complete(folder):
                self._save_checkpoint(self.model, trial=None)
            raise
        return scores.to(self.args.device), each

    def normalized(self, scores: Tensor) -> Tensor:
        """Scores as `args.reward_normalization` wants them."""
        if self.args.reward_normalization == "batch":
            return normalize(scores)
        return self.reward_normalizer(scores) if self.args.reward_normalization == "running" else scores

    def micro_batches(self, rollout: Rollout) -> list[ScoredBatch]:
        """The rollout in batches of similar length, one forward each.

        They are cut once, so that every forward over a response runs on the same shapes. A mini-batch is a random
        choice of micro-batches; where the two are of one size, it holds one class of length.
        """
        size = self.args.micro_batch_size
        order = sorted(range(len(rollout)), key=lambda i: len(rollout.prompts[i]) + len(rollout.responses[i]))
        pad = self.processing_class.pad_token_id
        return [
            score_responses(rollout.prompts, rollout.responses, order[start : start + size], pad).to(self.args.device)
            for start in range(0, len(order), size)
        ]

    def mini_batches(self, batches: list[ScoredBatch]) -> Iterator[list[ScoredBatch]]:
        """`num_ppo_epochs` passes over the micro-batches, shuffled, in `num_mini_batches` lists each."""
        size = len(batches) // self.args.num_mini_batches
        for _ in range(self.args.num_ppo_epochs):
            order = torch.randperm(len(batches)).tolist()
            for start in range(0, len(order), size):
                yield [batches[i] for i in order[start : start + size]]

    @torch.no_grad()
    def score_rollout(
        self, model: nn.Module, rollout: Rollout, batches: list[ScoredBatch]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Old log-probs and values [B, T] of every response token, and the importance weights [B, T] of its loss.

        From the engine, as far as it gives them; what is left takes a forward, of the policy or of the value model.
        """
        clip = self.args.rollout_weight_clip
        sampled = rollout.padded(rollout.log_probs.to(self.args.device))
        if clip is None and rollout.hidden is not None:
            return sampled, rollout.padded(self.scorer.values_of(rollout.hidden)), None
        model.train()  # as in the update, so that both run the same code
        log_probs, values = torch.zeros_like(sampled), torch.zeros_like(sampled)
        for batch in batches:
            with self.accelerator.autocast():
                if clip is None and self.scorer.value_model is not None:
                    batch.put(values, self.scorer.values(batch.input_ids, batch.positions))
                    continue
                scored = model(batch.input_ids, batch.positions, batch.tokens, self.args.temperature)
            batch.put(log_probs, scored[0])
            batch.put(values, scored[2])
        if clip is None:
            return sampled, values, None
        mask = rollout.mask.bool().to(self.args.device)
        gap = log_probs - sampled
        self.record(**gap_metrics_of(gap[mask]))
        return log_probs, values, gap.exp().clamp(max=clip)

    @torch.no_grad()
    def reference_log_probs(self, rollout: Rollout, batches: list[ScoredBatch]) -> Tensor:
        """Log-probs [B, T] of every response token under the reference."""
        results = torch.zeros(len(rollout), int(rollout.lengths.max()), device=self.args.device)
        with self.reference() as score, self.accelerator.autocast():
            for batch in batches:
                log_probs, _ = score(batch.input_ids, batch.positions, batch.tokens, self.args.temperature)
                batch.put(results, log_probs)
        return results

    @contextmanager
    def reference(self) -> Iterator[Callable[..., tuple[Tensor, Tensor]]]:
        """TokenScorer's forward under the reference: the frozen copy, or the policy with its adapters off."""
        if self.ref_scorer is not None:
            yield self.ref_scorer
            return
        with self.scorer.model.disable_adapter():
            yield partial(TokenScorer.forward, self.scorer)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.record(**{f"time/{phase}": torch.tensor(time.perf_counter() - start)})

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores, KL and entropy of fresh responses to the evaluation prompts (a data set, or a dictionary of them)."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset: none was given, here or to the trainer")
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        if "prompt_ids" not in dataset.column_names:
            dataset = prepare_prompts(dataset, self.processing_class, self.args.max_prompt_length)
        rows = list(dataset)
        rollout = self.rollout([row["prompt_ids"] for row in rows])
        batches = self.micro_batches(rollout)
        log_probs, values, _ = self.score_rollout(self.model, rollout, batches)
        ref_log_probs = self.reference_log_probs(rollout, batches)
        scores, each = self.scores(rows, rollout)
        mask = rollout.mask.to(self.args.device)
        targets = ppo_targets(scores, log_probs, ref_log_probs, values, mask, self.args)
        measured = rollout_metrics(rollout, scores, each, targets, self.args.kl_coef)
        metrics = {f"{metric_key_prefix}_{name}": value.item() for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_train_dataloader(self) -> DataLoader:
        """One batch a PPO iteration: `rollout_batch_size` prompts on each device."""
        return self._get_dataloader(
            self.train_dataset, "Training", self.args.rollout_batch_size, self._get_train_sampler, is_training=True
        )

    def get_total_train_batch_size(self, args: PPOConfig) -> int:
        return args.rollout_batch_size * args.world_size

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.args.reward_normalization == "running":
            path = os.path.join(output_dir or self.args.output_dir, REWARD_STATE_FILE)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(self.reward_normalizer.state_dict(), file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.scorer.load_value_function(resume_from_checkpoint)
        path = os.path.join(resume_from_checkpoint, REWARD_STATE_FILE)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.reward_normalizer = RunningNormalizer(**json.load(file))


def _refuse_shared(policy: Any, ref_model: Any, value_model: Any, reward_funcs: Any) -> None:
    """Errors for a model in two roles, of which one would freeze or train the other."""
    rewards = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    models = {"model": policy, "ref_model": ref_model, "value_model": value_model}
    for name, other in (("model", "ref_model"), ("model", "value_model"), ("ref_model", "value_model")):
        if isinstance(models[name], nn.Module) and models[name] is models[other]:
            raise ValueError(f"{other} is the same object as {name}; give it a copy of its own (copy.deepcopy)")
    for name, model in models.items():
        if isinstance(model, nn.Module) and any(model is func for func in rewards):
            raise ValueError(f"reward_funcs holds the same object as {name}; give it a copy of its own (copy.deepcopy)")


def _check_context(prompts: Dataset, policy: nn.Module, args: PPOConfig) -> None:
    limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts["prompt_ids"]))
    if limit and longest + args.response_length > limit:
        raise ValueError(
            f"the longest prompt ({longest} tokens) and response_length={args.response_length} exceed the model's "
            f"max_position_embeddings={limit}; lower response_length or leave long prompts out"
        )
