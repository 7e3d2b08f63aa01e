"""What a mini-batch is trained on: the losses of policy and value function, as `PPOConfig` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastrlhf import functional as F
from fastrlhf.batching import ScoredBatch
from fastrlhf.trainers.ppo.config import PPOConfig
from fastrlhf.trainers.ppo.targets import Targets


@dataclass
class Losses:
    """Of the micro-batches of one mini-batch: each is its part of a sum over the whole mini-batch.

    targets: of the rollout. tokens, sequences: how many the mini-batch has, the mean over the ranks.
    """

    args: PPOConfig
    targets: Targets
    tokens: Tensor
    sequences: Tensor

    def policy(self, model: nn.Module, batch: ScoredBatch, **options: bool) -> tuple[Tensor, F.PPOStats, Tensor | None]:
        """Loss and statistics, and what `model`, an ActorCritic whose forward takes the `options`, gives as values."""
        args, targets = self.args, self.targets
        old_log_probs = self._take(batch, targets.log_probs)
        ref = {
            "ref_log_probs": self._take(batch, targets.ref_log_probs),
            "kl_coef": args.kl_loss_coef,
            "kl_estimator": args.kl_loss_estimator,
        }
        if not args.kl_loss_coef:
            # For the statistics: how far the policy is from the old one, |log ratio| on average.
            ref = {"ref_log_probs": old_log_probs, "kl_estimator": "abs"}
        return model(
            batch.input_ids,
            batch.positions,
            batch.tokens,
            args.temperature,
            packing=batch.packing,
            loss=lambda scored: scored.ppo_loss(
                old_log_probs,
                self._take(batch, targets.advantages),
                self._take(batch, targets.mask),
                by_sequence=batch.by_sequence if self._by_sequence else None,
                clip_low=args.cliprange,
                clip_high=args.cliprange if args.cliprange_high is None else args.cliprange_high,
                dual_clip=args.dual_clip,
                ratio_level=args.ratio_level,
                weights=None if targets.weights is None else self._take(batch, targets.weights),
                advantage_stats=targets.advantage_stats,
                entropy_coef=args.entropy_coef,
                **ref,
                **self._aggregation,
            ),
            **options,
        )

    def value(self, batch: ScoredBatch, values: Tensor) -> tuple[Tensor, F.ValueStats]:
        """Loss and statistics of the values [n] of the batch's tokens."""
        return F.value_loss(
            batch.by_sequence(values) if self._by_sequence else values,
            self._take(batch, self.targets.values),
            self._take(batch, self.targets.returns),
            self._take(batch, self.targets.mask),
            clip=self.args.cliprange_value,
            **self._aggregation,
        )

    @property
    def _by_sequence(self) -> bool:
        """Whether the loss must know which tokens are of one sequence; others are sums over tokens."""
        return self.args.ratio_level == "sequence" or self.args.loss_aggregation == "seq-mean-token-mean"

    @property
    def _aggregation(self) -> dict[str, Any]:
        kind = self.args.loss_aggregation
        denominator = {
            "token-mean": self.tokens,
            "seq-mean-token-sum": self.sequences,
            "seq-mean-token-mean": self.sequences,
            "seq-mean-token-sum-norm": self.sequences * self.args.response_length,
        }[kind]
        return {"aggregation": kind if kind == "seq-mean-token-mean" else "token-mean", "denominator": denominator}

    def _take(self, batch: ScoredBatch, x: Tensor) -> Tensor:
        """[n] of [B, T], or [b, T]."""
        return batch.by_sequence(batch.take(x)) if self._by_sequence else batch.take(x)
