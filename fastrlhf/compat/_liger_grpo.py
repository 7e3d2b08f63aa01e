"""GRPO and its relatives, with Liger's options, as functions of log-probs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PPO_LIKE = ("grpo", "bnpo", "dr_grpo", "dapo")  # a clipped ratio; luspo too, with masked tokens in its sum
WEIGHTED = ("cispo", "sapo", "vespo")  # other weights of a token's gradient
BY_TOKENS = ("dapo", "cispo", "vespo")  # divided by the tokens of all processes


@dataclass
class GRPO:
    """The options of Liger's GRPO losses; the names are theirs."""

    loss_type: str
    importance_sampling_level: str
    beta: float
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    use_bias_correction_kl: bool
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    max_completion_length: int | None

    def __post_init__(self) -> None:
        if self.loss_type not in (*PPO_LIKE, "luspo", *WEIGHTED):
            wanted = ", ".join((*PPO_LIKE, "luspo", *WEIGHTED))
            raise ValueError(f"loss_type: got {self.loss_type!r}, wanted one of {wanted}")
        if self.importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level: got {self.importance_sampling_level!r}, wanted 'token' or 'sequence'"
            )
        if self.importance_sampling_level == "sequence" and self.loss_type in WEIGHTED:
            raise ValueError(
                f"importance_sampling_level: got 'sequence', wanted 'token', because loss_type={self.loss_type!r}"
            )

    @property
    def is_ppo(self) -> bool:
        """Whether the loss is that of `ppo_loss`."""
        usual = self.loss_type in PPO_LIKE and self.importance_sampling_level == "token" and self.delta is None
        return usual and not self.use_bias_correction_kl and 0 <= self.epsilon_low <= 1 and self.epsilon_high >= 0

    def per_token(
        self,
        log_probs: Tensor,
        old: Tensor | None,
        ref: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        ratio: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(loss, KL or None, whether it was clipped), each [B, T], or [B, 1] where it is one number a sequence.

        log_probs, old, ref, mask: [B, T]; old or ref None: the detached log_probs. advantages: [B]. ratio: [B, 1] or
        [B, T], importance weights of the rollout's mismatch.
        """
        advantages = advantages[:, None].float()
        log_ratio = log_probs - (log_probs.detach() if old is None else old)
        log_weights = log_ratio
        if self.importance_sampling_level == "sequence":
            log_weights = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
        weights = log_weights.exp()
        clipped = torch.zeros_like(weights, dtype=torch.bool)
        if self.loss_type == "cispo":
            clipped = (weights > self.epsilon_high) & (advantages > 0)
            loss = -weights.detach().clamp(max=self.epsilon_high) * advantages * log_probs
        elif self.loss_type == "sapo":
            gate = torch.where(advantages > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
            loss = -torch.sigmoid(gate * (weights - 1)) * 4 / gate * advantages
        elif self.loss_type == "vespo":
            loss = -self._vespo_weights(advantages, log_ratio.detach(), mask, ratio) * advantages * log_probs
        else:
            low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
            clipped = ((weights < low) & (advantages < 0)) | ((weights > high) & (advantages > 0))
            bounded = weights if self.delta is None else weights.clamp(max=self.delta)
            loss = -torch.min(bounded * advantages, weights.clamp(low, high) * advantages)
        if ratio is not None and self.loss_type != "vespo":  # there it is a part of the weights
            loss = loss * ratio
        kl = None
        if self.beta != 0.0:
            difference = (log_probs.detach() if ref is None else ref) - log_probs
            kl = difference.exp() - difference - 1.0
            if self.use_bias_correction_kl:
                kl = kl * weights
            loss = loss + self.beta * kl
            kl = kl.detach()
        return loss, kl, clipped.float()

    def reduce(self, loss: Tensor, mask: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor:
        """From `per_token` to a scalar."""
        if self.loss_type == "luspo":
            return (loss * mask.sum(-1, keepdim=True)).mean()
        if self.loss_type in ("grpo", "sapo"):
            return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
        return (loss * mask).sum() / self.denominator(mask, num_items_in_batch)

    def denominator(self, mask: Tensor, num_items_in_batch: float | Tensor | None) -> float | Tensor:
        """What a sum over tokens, or for "grpo" over sequences, is divided by."""
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1.0)
        if self.loss_type in BY_TOKENS:
            return _tokens_a_process(mask, num_items_in_batch)
        return mask.shape[0] * (self.max_completion_length if self.loss_type == "dr_grpo" else 1)

    def _vespo_weights(self, advantages: Tensor, log_ratio: Tensor, mask: Tensor, ratio: Tensor | None) -> Tensor:
        """[B, 1]: e^lambda w^k e^(-lambda w) of each sequence's importance weight w, detached."""
        least = math.log(1e-8)
        log_w = (log_ratio.clamp(-20.0, 20.0) * mask).sum(-1, keepdim=True)
        if ratio is not None:
            log_w = log_w + ratio.log().clamp(least, 20.0).sum(-1, keepdim=True)
        log_w = log_w.clamp(least, 20.0)
        positive = advantages >= 0
        k = torch.where(positive, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(positive, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _tokens_a_process(mask: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor:
    """The tokens of the whole batch, over all processes, as a mean over these; at least 1."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_items_in_batch is None:
        count = mask.sum(dtype=torch.float32)
        if distributed:
            torch.distributed.all_reduce(count)
    else:
        count = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    return (count / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1.0)


def as_columns(ratio: Tensor | None, mask: Tensor) -> Tensor | None:
    """Importance weights [B], [B, 1] or [B, T] as one of the last two."""
    if ratio is None:
        return None
    if (
        ratio.dim() not in (1, 2)
        or ratio.shape[0] != mask.shape[0]
        or ratio.shape[1:] not in ((), (1,), mask.shape[1:])
    ):
        batch, length = mask.shape
        raise ValueError(
            f"vllm_is_ratio: got shape {tuple(ratio.shape)}, wanted ({batch},), ({batch}, 1) or ({batch}, {length})"
        )
    return ratio[:, None] if ratio.dim() == 1 else ratio
