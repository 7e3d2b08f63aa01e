"""Proximal policy optimisation of a language model against a reward, with or without a value function."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastrlhf.batching import ScoredBatch
from fastrlhf.data import prepare_prompts
from fastrlhf.loading import (
    disable_dropout,
    load_causal_lm,
    load_reward_model,
    prepare_eval,
    tokenizer_with_pad,
    with_adapter,
)
from fastrlhf.rewards import RewardError, RewardResult, Rewards, ScoreShaper
from fastrlhf.rewards.functions import Steps
from fastrlhf.rollout import NativeEngine, Rollout, RolloutEngine, SamplingParams, TransformersEngine, create_engine
from fastrlhf.trainers import zero
from fastrlhf.trainers.base import ScorerTrainer
from fastrlhf.trainers.checkpoints import is_complete, last_checkpoint
from fastrlhf.trainers.offload import on_device
from fastrlhf.trainers.ppo.actor_critic import ActorCritic
from fastrlhf.trainers.ppo.config import PPOConfig
from fastrlhf.trainers.ppo.experience import Experience, micro_batches, mini_batches
from fastrlhf.trainers.ppo.frozen_layers import LowerStates, copy_sharing, freeze_lower_layers
from fastrlhf.trainers.ppo.guards import (
    SkippedSteps,
    TrainingStopped,
    dump_batch,
    gradient_norm,
    set_diverged_aside,
)
from fastrlhf.trainers.ppo.kl_controllers import create_kl_controller
from fastrlhf.trainers.ppo.losses import Losses
from fastrlhf.trainers.ppo.metrics import MicroBatchStats, gap_metrics, gap_metrics_of, rollout_metrics, update_metrics
from fastrlhf.trainers.ppo.phases import Phases
from fastrlhf.trainers.ppo.reference import Reference
from fastrlhf.trainers.ppo.rollout_weights import rollout_weights
from fastrlhf.trainers.ppo.samples import show_completions, write_completions
from fastrlhf.trainers.ppo.step_rewards import step_rewards
from fastrlhf.trainers.ppo.targets import Targets, ppo_targets, response_kl
from fastrlhf.trainers.reductions import any_rank, gather_varying, global_advantage_stats, mean_over_ranks
from fastrlhf.trainers.sharding import whole_weights
from fastrlhf.trainers.token_scorer import inside

STATE_FILE = "ppo_state.json"

logger = logging.getLogger(__name__)


class PPOTrainer(ScorerTrainer):
    """PPO with a KL penalty to the start (Ziegler et al. 2019, Ouyang et al. 2022), or one of its critic-free kin.

    model: the policy to start from, a causal language model or its hub id or folder (loaded with `model_init_kwargs`).
    args: PPOConfig.
    reward_funcs: one or a list of reward models (object, hub id or folder) and callables
        `f(prompts, completions, **columns) -> list[float]`; summed with `args.reward_weights`.
    train_dataset, eval_dataset: column `prompt` (a string or messages), or `input_ids` (tokens); other columns go to
        the reward functions.
    processing_class: the tokenizer; the model's own when None.
    ref_model: what the KL is measured to; when None, a frozen copy of the start, or with `peft_config` the model with
        its adapters off.
    value_model: a sequence classification model with one label, or its hub id or folder; None puts a value head on
        the policy's own trunk. The critic-free estimators have neither.
    engine: what samples the responses, in place of the one that `args.rollout_engine` names: a RolloutEngine over the
        policy, such as one whose responses hold tool output (`Rollout.sampled`).
    `trainer.scorer.model` is the policy in training; checkpoints and `save_model` hold it as transformers save it.
    """

    runs_on_deepspeed = True

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
        engine: RolloutEngine | None = None,
    ) -> None:
        set_seed(args.seed)  # adapters are drawn before the Trainer sets it
        options = model_init_kwargs or {}
        _refuse_shared(model, ref_model, value_model, reward_funcs)
        if value_model is not None and not args.has_critic:
            raise ValueError(f"value_model: advantage_estimator={args.advantage_estimator!r} has no value function")
        policy = load_causal_lm(model, **options)
        tokenizer = tokenizer_with_pad(
            processing_class, policy, trust_remote_code=options.get("trust_remote_code", False)
        )
        frozen = freeze_lower_layers(policy, args.num_frozen_layers) if args.num_frozen_layers else []
        if frozen and peft_config is not None:
            raise ValueError(
                f"num_frozen_layers={args.num_frozen_layers}: adapters freeze all layers; give one of the two"
            )
        if ref_model is not None:
            ref_model = load_causal_lm(ref_model, "ref_model", **options)
            disable_dropout(ref_model)
        elif peft_config is None:
            ref_model = copy_sharing(policy, frozen)
        if value_model is not None:
            value_model = load_reward_model(value_model, "value_model", **options)
            disable_dropout(value_model)

        def prepared(dataset: Dataset) -> Dataset:
            prompts = prepare_prompts(dataset, tokenizer, args.max_prompt_length)
            _check_context(prompts, policy, args)
            return prompts

        prompts = prepared(train_dataset)
        _check_enough(prompts, args)
        policy = with_adapter(policy, peft_config)
        disable_dropout(policy)
        super().__init__(
            model=ActorCritic(
                policy, value_model, args.lm_head, value_head=args.has_critic, padding_free=args.padding_free
            ),
            args=args,
            data_collator=list,
            train_dataset=prompts,
            eval_dataset=prepare_eval(eval_dataset, prepared),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # Autocast computes in its own dtype, and so does an engine that is to give the trainer's log-probs.
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.engine = engine or create_engine(
            args.rollout_engine, self.scorer.model, tokenizer, dtype=dtype, server=args.rollout_server
        )
        self.sampling = SamplingParams(args.response_length, args.temperature, batch_size=args.rollout_batch_size)
        self.rewards = Rewards(
            reward_funcs,
            args.reward_weights,
            tokenizer,
            timeout=args.reward_timeout,
            retries=args.reward_retries,
            ensemble=None if args.reward_ensemble == "none" else args.reward_ensemble,
            std_coef=args.reward_std_coef,
            calibrated=args.calibrated_rewards,
        )
        if not args.offload_models:
            self.rewards.to(args.device)
        weights = dict(zip(self.rewards.names, self.rewards.weights, strict=True))
        self.shape_scores = ScoreShaper(args, gather=self._gather, weights=weights)
        self.kl_controller = create_kl_controller(args)
        self.lower_states = LowerStates(policy, args.num_frozen_layers)
        if ref_model is not None and dtype is not None and self.is_deepspeed_enabled:
            ref_model.to(dtype)  # as DeepSpeed does with the policy, in place of autocast
        self.reference = Reference(self.scorer, ref_model, args, self.lower_states)
        self.skipped = SkippedSteps()
        self.phases = Phases(bar=not args.disable_tqdm and self.is_world_process_zero())
        logger.info("attention of the forward passes: %s", self.scorer.packed_attention)

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """One PPO iteration on a batch of prompts. The Trainer makes the last optimiser step; returns the mean loss."""
        args = self.args
        rows = [row for row in inputs for _ in range(args.num_generations)]
        with self.phases("rollout"):
            rollout = self.rollout(inputs, args.num_generations)
        with self.phases("reward"):
            result, error = self.scores(rows, rollout)
        if any_rank(error is not None, self.accelerator):
            return self.skip("a reward function failed", rows, rollout, error=error)
        each = result.each
        with self.phases("reference"):
            experience = self.experience(model, rollout, result.total, each, result.outcome, result.steps)
        self.check_kl(experience.targets, result.disagreement)
        self.report(rows, experience)

        losses: list[Tensor] = []
        norm = None
        steps = args.num_ppo_epochs * args.num_mini_batches
        with self.phases("update", total=steps) as bar:
            for mini_batch in mini_batches(rollout, args, self.accelerator):
                if norm is not None:
                    self.optimizer_step(model, norm)
                loss, stats = self.update(model, mini_batch, experience.targets)
                norm = zero.gradient_norm(model) if self.is_deepspeed_enabled else gradient_norm(model)
                if not args.fp16 and any_rank(not torch.stack([loss, norm]).isfinite().all(), self.accelerator):
                    self.drop_gradients(model)
                    return self.skip(
                        f"the loss is {loss.item()}, the norm of the gradient {norm.item()}", rows, rollout, each
                    )
                if not losses and experience.targets.weights is None:  # the policy is still the one that sampled
                    self.record(**gap_metrics(stats, with_mean=not args.kl_loss_coef))
                if losses and args.target_kl is not None and self.approx_kl(stats) > args.target_kl:
                    self.drop_gradients(model)  # the step that the Trainer makes is then none
                    break
                losses.append(loss)
                bar.update()
            else:
                if self.is_deepspeed_enabled:  # under which the Trainer makes none
                    model.step()
        self.record(**{"policy/optimizer_steps": torch.tensor(float(len(losses)))})
        self.record_times(rollout, len(losses))
        self.skipped.in_a_row = 0
        return torch.stack(losses).mean()

    def rollout(self, inputs: list[dict[str, Any]], generations: int = 1, purpose: str = "train") -> Rollout:
        """Responses of the policy as it is, `generations` to each prompt of this rank.

        Each prompt has a seed of its own, which hangs on args.seed, the step, and its place among the prompts of all
        ranks: what is sampled is the same for any number of ranks, and after a resume.
        """
        self.lower_states.forget()
        prompts = [row["prompt_ids"] for row in inputs]
        sampling = replace(self.sampling, n=generations)
        _, own = gather_varying(torch.arange(len(prompts), device=self.args.device), self.accelerator)
        seeds = [self._seed(purpose, place) for place in range(own.start, own.stop)]
        with whole_weights(self.scorer, self.accelerator):
            self.engine.update_weights()
            if isinstance(self.engine, TransformersEngine):  # it has one generator for a batch
                return self.engine.generate(prompts, replace(sampling, seed=seeds[0]))
            if isinstance(self.engine, NativeEngine):
                hidden = self.args.has_critic and self.scorer.value_model is None
                rollout = self.engine.generate(prompts, sampling, seeds=seeds, hidden=hidden)
                self.engine.release_weights()  # its copy of them is of no use to the update
                return rollout
            return self.engine.generate(prompts, sampling, seeds=seeds)

    def _seed(self, purpose: str, place: int) -> int:
        name = f"{self.args.seed}/{purpose}/{self.state.global_step}/{place}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1

    def scores(self, rows: list[dict[str, Any]], rollout: Rollout) -> tuple[RewardResult | None, RewardError | None]:
        """What the reward functions say of each response, or the error of one that failed."""
        prompts = [row["prompt"] for row in rows]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, rollout.texts(self.processing_class), strict=True)
        ]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "prompt_ids")}
        try:
            with on_device(self.rewards, self.args.device, self.args.offload_models):
                result = self.rewards.score(prompts, completions, columns)
        except RewardError as error:
            return None, error
        result.total = result.total.to(self.args.device)
        return result, None

    def experience(
        self,
        model: nn.Module,
        rollout: Rollout,
        scores: Tensor,
        each: dict[str, Tensor],
        outcomes: Tensor | None = None,
        steps: list[Steps] | None = None,
    ) -> Experience:
        """What the updates of an iteration are made of: log-probs, values, shaped scores, advantages.

        scores: [B], as they are reported. outcomes: [B], what of them stands on a response's last token; all when None.
        steps: the rest, for the tokens with which steps end.
        """
        args = self.args
        batches = micro_batches(rollout, range(len(rollout)), args, self.accelerator)
        log_probs, values, weights = self.score_rollout(model, rollout, batches)
        ref_log_probs = self.reference.log_probs(rollout, batches, self.accelerator)
        finished = torch.tensor([reason == "stop" for reason in rollout.finish_reasons], device=args.device)
        token_rewards = None
        if steps is not None:
            if args.normalize_each_reward:
                raise ValueError("normalize_each_reward=True: rewards of steps are not normalised, set it to False")
            token_rewards = step_rewards(rollout, steps, self.processing_class).to(args.device)
        outcomes = scores if outcomes is None else outcomes.to(args.device)
        targets = ppo_targets(
            self.shape_scores(outcomes, finished, rollout.lengths.to(args.device), each),
            log_probs,
            ref_log_probs,
            values,
            rollout.trained.to(args.device),
            args,
            kl_coef=self.kl_controller.coef,
            weights=weights,
            token_rewards=token_rewards,
            whitening=self._global_stats,
        )
        return Experience(rollout, scores, each, targets)

    @torch.no_grad()
    def score_rollout(
        self, model: nn.Module, rollout: Rollout, batches: list[ScoredBatch]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Old log-probs and values [B, T] of every response token, and the importance weights [B, T] of its loss.

        From the engine, as far as it gives them; what is left takes a forward, of the policy or of the value model.
        """
        args, scorer = self.args, self.scorer
        sampled = None if rollout.log_probs is None else rollout.padded(rollout.log_probs.to(args.device))
        policy_forward = sampled is None or args.rollout_weight_clip is not None
        if not policy_forward and not args.has_critic:
            return sampled, None, None
        if not policy_forward and rollout.hidden is not None:
            return sampled, rollout.padded(inside(scorer, scorer.values_of, rollout.hidden)), None
        model.train()  # as in the update, so that both run the same code
        shape = rollout.mask.shape
        log_probs, values = torch.zeros(shape, device=args.device), torch.zeros(shape, device=args.device)
        for batch in batches:
            new_values = None
            with self.accelerator.autocast():
                if policy_forward or scorer.value_model is None:
                    with self.lower_states(batch):
                        new_log_probs, _, new_values = model(
                            batch.input_ids, batch.positions, batch.tokens, args.temperature, packing=batch.packing
                        )
                    batch.put(log_probs, new_log_probs)
                if scorer.value_model is not None:
                    new_values = scorer.values(batch.input_ids, batch.positions, batch.packing)
            if new_values is not None:
                batch.put(values, new_values)
        values = values if args.has_critic else None
        if not policy_forward:
            return sampled, values, None
        if args.rollout_weight_clip is None or sampled is None:
            return log_probs, values, None
        mask = rollout.trained.bool().to(args.device)
        self.record(**gap_metrics_of((log_probs - sampled)[mask]))
        weights = rollout_weights(log_probs, sampled, mask, args.rollout_weight_clip, args.rollout_weight_mode)
        return log_probs, values, weights

    def update(
        self, model: nn.Module, mini_batch: list[ScoredBatch], targets: Targets
    ) -> tuple[Tensor, list[MicroBatchStats]]:
        """Gradients of policy and value loss over a mini-batch, one micro-batch at a time.

        Returns the loss, and the statistics of each micro-batch.
        """
        args = self.args
        model.train()
        warming_up = self.state.global_step < args.critic_warmup_steps
        counts = [_counts(batch, targets.mask) for batch in mini_batch]
        # Mean over the ranks: data parallelism averages the gradients again, which leaves the mean over all tokens.
        tokens, sequences = mean_over_ranks(torch.stack(counts).sum(0), self.accelerator)
        losses, total, stats = Losses(args, targets, tokens, sequences), [], []
        # They take one backward to a forward.
        together = self.is_deepspeed_enabled or isinstance(model, DistributedDataParallel)
        for batch, (own_tokens, _) in zip(mini_batch, counts, strict=True):
            with self.accelerator.autocast(), self.lower_states(batch):
                loss, policy_stats, values = losses.policy(
                    model, batch, train_policy=not warming_up, model_values=together
                )
            loss = loss * 0.0 if warming_up else loss
            value_loss = value_stats = None
            if self.scorer.value_model is not None and not together:
                # The policy's activations go before the value model's come.
                self.accelerator.backward(loss)
                loss = loss.detach()
                with self.accelerator.autocast():
                    values = self.scorer.values(batch.input_ids, batch.positions, batch.packing)
            if values is not None:
                value_loss, value_stats = losses.value(batch, values)
                loss = loss + args.vf_coef * value_loss
            zero.backward(self.accelerator, loss, last=batch is mini_batch[-1])
            total.append(loss.detach())
            stats.append(MicroBatchStats(own_tokens / tokens, policy_stats, value_loss, value_stats))
        if warming_up:
            self.scorer.drop_policy_gradients()
        self.record(**update_metrics(stats))
        return torch.stack(total).sum(), stats

    def optimizer_step(self, model: nn.Module, norm: Tensor) -> None:
        """An optimiser step between mini-batches, clipped like the Trainer's own. norm: of the gradients."""
        if self.is_deepspeed_enabled:
            model.step()
            return
        if self.args.max_grad_norm > 0:
            if self.args.fp16 or self.is_fsdp_enabled:
                self._clip_grad_norm(model)  # which takes the scale off first, and knows shards
            else:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        self.optimizer.step()
        model.zero_grad()

    def drop_gradients(self, model: nn.Module) -> None:
        """Forget the gradients of a mini-batch: no step is made with them."""
        if self.is_deepspeed_enabled:
            zero.drop_gradients(model)
        else:
            model.zero_grad()

    def approx_kl(self, stats: list[MicroBatchStats]) -> float:
        """KL of the policy that sampled to the present one over a mini-batch, in nats a token, on all ranks."""
        return mean_over_ranks(sum(part.share * part.policy.approx_kl for part in stats), self.accelerator).item()

    def check_kl(self, targets: Targets, disagreement: Tensor | None = None) -> None:
        """Tell the KL controller how far the policy is from the reference; end the training beyond `args.max_kl`.

        disagreement: [B], of the reward models, if there are ensembles.
        """
        args = self.args
        if args.max_kl is None and args.kl_controller == "fixed":
            return
        kl = mean_over_ranks(targets.kl.mean(), self.accelerator).item()
        if disagreement is not None:
            disagreement = mean_over_ranks(disagreement.to(args.device).mean(), self.accelerator).item()
        self.kl_controller.update(kl, args.rollout_batch_size * args.world_size, disagreement)
        if args.max_kl is None or kl <= args.max_kl:
            return
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.accelerator.wait_for_everyone()
        aside = set_diverged_aside(folder) if args.should_save else None
        self.accelerator.wait_for_everyone()
        kept = last_checkpoint(args.output_dir)
        left = f"The last good checkpoint is {kept}; training continues from it." if kept else "There is no checkpoint."
        raise TrainingStopped(
            f"max_kl={args.max_kl}: at step {self.state.global_step} the KL to the reference is {kl:.3g} nats a "
            "response. Raise kl_coef, lower learning_rate, or set target_kl. "
            + (f"The checkpoint of these weights was renamed {aside}. " if aside else "")
            + left
        )

    def skip(
        self,
        reason: str,
        rows: list[dict[str, Any]],
        rollout: Rollout,
        each: dict[str, Tensor] | None = None,
        error: RewardError | None = None,
    ) -> Tensor:
        """Leave the batch, or what is left of it, untrained; end the training if that happens too often."""
        args, step = self.args, self.state.global_step + 1
        for parameter in self.model.parameters():
            parameter.grad = None  # so that the Trainer's optimiser step changes nothing
        if args.fp16:  # where the scaler wants to see a gradient, and skips the step for this one
            parameter = next(p for p in self.model.parameters() if p.requires_grad)
            parameter.grad = torch.full_like(parameter, torch.inf)
        self.skipped.add()
        self.phases.take()
        self.record(**{"guard/skipped_steps": torch.tensor(float(self.skipped.total))})
        logger.warning("step %d is skipped: %s", step, error or reason, exc_info=error)
        if self.skipped.in_a_row <= args.max_skipped_steps:
            return torch.zeros((), device=args.device)
        texts = rollout.texts(self.processing_class)
        given = {name: values.tolist() for name, values in (each or {}).items()}
        path = dump_batch(args.output_dir, step, reason, [row["prompt"] for row in rows], texts, given)
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.state.global_step and args.save_strategy != "no" and not is_complete(folder):
            self._save_checkpoint(self.model, trial=None)
        raise TrainingStopped(
            f"max_skipped_steps={args.max_skipped_steps}: {self.skipped.in_a_row} iterations in a row could not be "
            f"trained on; at step {step} {error or reason}. The batch is in {path}"
        ) from error

    def report(self, rows: list[dict[str, Any]], experience: Experience) -> None:
        """An iteration's metrics before its updates, and now and then its responses."""
        args, step = self.args, self.state.global_step + 1
        rollout, targets = experience.rollout, experience.targets
        policy = (targets.log_probs, targets.kl, targets.mask)
        self.record(**rollout_metrics(rollout, experience.scores, experience.each, *policy, self.kl_controller.coef))
        if not args.log_completions_steps or step % args.log_completions_steps or not self.is_world_process_zero():
            return
        self.show_completions([row["prompt"] for row in rows], experience, step)

    def show_completions(self, prompts: list[Any], experience: Experience, step: int) -> None:
        texts = experience.rollout.texts(self.processing_class)
        scores = {name: values.tolist() for name, values in experience.each.items()}
        show_completions(step, prompts, texts, scores)
        write_completions(self.args.output_dir, step, prompts, texts, scores)

    def record_times(self, rollout: Rollout, updates: int) -> None:
        """Seconds of each phase; tokens a second of this rank."""
        seconds = self.phases.take()
        self.record(**{f"time/{name}": torch.tensor(value) for name, value in seconds.items()})
        sampled = float(rollout.lengths.sum())
        read = sampled + sum(map(len, rollout.prompts))
        rates = {
            "rollout/tokens_per_second": sampled / seconds["rollout"],
            "policy/tokens_per_second": read * updates / self.args.num_mini_batches / seconds["update"],
        }
        self.record(**{name: torch.tensor(rate) for name, rate in rates.items()})

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
        rows, ranks = list(dataset), self.args.world_size
        share = -(-len(rows) // ranks)  # as many on every rank; some take a row that another has
        rows = [rows[(self.args.process_index + i * ranks) % len(rows)] for i in range(share)]
        rollout = self.rollout(rows, purpose="eval")
        result, error = self.scores(rows, rollout)
        if any_rank(error is not None, self.accelerator):
            raise error or RewardError("reward_funcs: one failed on another rank")
        batches = micro_batches(rollout, range(len(rollout)), self.args, self.accelerator)
        log_probs, *_ = self.score_rollout(self.model, rollout, batches)
        ref_log_probs = self.reference.log_probs(rollout, batches, self.accelerator)
        mask = rollout.trained.to(self.args.device)
        kl = response_kl(log_probs, ref_log_probs, mask, self.args.kl_estimator)
        policy = (log_probs, kl, mask)
        measured = rollout_metrics(rollout, result.total, result.each, *policy, self.kl_controller.coef)
        means = mean_over_ranks(torch.stack([x.to(self.args.device) for x in measured.values()]), self.accelerator)
        metrics = {f"{metric_key_prefix}_{name}": x for name, x in zip(measured, means.tolist(), strict=True)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_train_dataloader(self) -> DataLoader:
        """One batch a PPO iteration: the prompts of `rollout_batch_size` responses on each device."""
        prompts = self.args.rollout_batch_size // self.args.num_generations
        return self._get_dataloader(self.train_dataset, "Training", prompts, self._get_train_sampler, is_training=True)

    def get_total_train_batch_size(self, args: PPOConfig) -> int:
        return args.rollout_batch_size // args.num_generations * args.world_size

    def _gather(self, x: Tensor) -> Tensor:
        return gather_varying(x, self.accelerator)[0]

    def _global_stats(self, stats: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return global_advantage_stats(stats, advantages, mask, self.accelerator)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        with open(os.path.join(output_dir or self.args.output_dir, STATE_FILE), "w", encoding="utf-8") as file:
            json.dump(state, file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.scorer.load_value_function(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        with open(os.path.join(checkpoint, STATE_FILE), encoding="utf-8") as file:
            state = json.load(file)
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        """What a checkpoint must hold beside model, optimiser, scheduler and random numbers."""
        return {
            "kl_controller": self.kl_controller,
            "reward_shaping": self.shape_scores,
            "skipped_steps": self.skipped,
        }


def _counts(batch: ScoredBatch, mask: Tensor) -> Tensor:
    """[2], fp32: the tokens of a batch that count in mask [B, T], and the sequences that have any."""
    counted = batch.take(mask)
    return torch.stack([counted.sum(), (batch.by_sequence(counted).sum(1) > 0).sum()]).float()


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


def _check_enough(prompts: Dataset, args: PPOConfig) -> None:
    wanted = args.rollout_batch_size // args.num_generations * args.world_size
    if len(prompts) < wanted:
        raise ValueError(
            f"train_dataset has {len(prompts)} prompts, fewer than rollout_batch_size={args.rollout_batch_size}"
            + (f" / num_generations={args.num_generations}" if args.num_generations > 1 else "")
            + (f" on each of {args.world_size} devices" if args.world_size > 1 else "")
        )
