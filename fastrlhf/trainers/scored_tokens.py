"""Chosen tokens under a model, and the losses that need no more than their log-probs and entropies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.trainers.lm_heads import LMHead

BySequence = Callable[[Tensor], Tensor] | None


class ScoredTokens(ABC):
    """Tokens [n] and the distributions over the vocabulary that predict them."""

    tokens: Tensor
    temperature: float

    @abstractmethod
    def log_probs_and_entropy(self) -> tuple[Tensor, Tensor]:
        """[n] each, fp32, in nats."""

    def cross_entropy(self, denominator: float | Tensor | None = None) -> tuple[Tensor, F.CrossEntropyStats]:
        """`F.linear_cross_entropy`."""
        log_probs, entropy = self.log_probs_and_entropy()
        count = (self.tokens != -100).sum()
        mean_entropy = entropy.detach().sum() / count.clamp(min=1)
        loss = -log_probs.sum() / (count.clamp(min=1) if denominator is None else denominator)
        return loss, F.CrossEntropyStats(mean_entropy, count.float())

    def ppo_loss(
        self, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, by_sequence: BySequence = None, **options: Any
    ) -> tuple[Tensor, F.PPOStats]:
        """`F.ppo_loss`, options included; everything [n].

        by_sequence: makes [b, T] of [n], for losses that go by sequence; everything else is [b, T] then.
        """
        log_probs, entropy = self.log_probs_and_entropy()
        if by_sequence is not None:
            log_probs, entropy = by_sequence(log_probs), by_sequence(entropy)
        return F.ppo_loss(log_probs, old_log_probs, advantages, mask, entropy=entropy, **options)


class FromHidden(ScoredTokens):
    """Without logits: the ops do the head's product themselves, some rows at a time."""

    def __init__(self, head: LMHead, tokens: Tensor, temperature: float) -> None:
        self.head, self.tokens, self.temperature = head, tokens, temperature
        self.inputs = (head.hidden, head.weight, tokens)
        self.options = head.options(temperature)

    def log_probs_and_entropy(self) -> tuple[Tensor, Tensor]:
        return F.linear_token_log_probs_and_entropy(*self.inputs, **self.options)

    def cross_entropy(self, denominator: float | Tensor | None = None) -> tuple[Tensor, F.CrossEntropyStats]:
        if self._in_fp16():
            return super().cross_entropy(denominator)
        return F.linear_cross_entropy(*self.inputs, **self.options, denominator=denominator)

    def ppo_loss(
        self, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, by_sequence: BySequence = None, **options: Any
    ) -> tuple[Tensor, F.PPOStats]:
        if self._in_fp16() or by_sequence is not None:
            return super().ppo_loss(old_log_probs, advantages, mask, by_sequence=by_sequence, **options)
        return F.linear_ppo_loss(*self.inputs, old_log_probs, advantages, mask, **self.options, **options)

    def _in_fp16(self) -> bool:
        """Gradients known before the loss is scaled would be rounded to 0 there: fp16 has its own in the backward pass,
        which costs one more product."""
        device = self.tokens.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (autocast or self.head.hidden.dtype) == torch.float16


class FromLogits(ScoredTokens):
    """From the logits [n, V] of a model that computed them itself; their gradient is written over them."""

    def __init__(self, logits: Tensor, tokens: Tensor, temperature: float) -> None:
        self.logits, self.tokens, self.temperature = logits, tokens, temperature

    def log_probs_and_entropy(self) -> tuple[Tensor, Tensor]:
        options = {"temperature": self.temperature, "inplace_backward": True}
        return F.token_log_probs_and_entropy(self.logits, self.tokens, **options)
