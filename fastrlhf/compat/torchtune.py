"""torchtune (https://github.com/pytorch/torchtune), 0.6: what `fastrlhf.patch("torchtune")` binds.

    import fastrlhf

    fastrlhf.patch("torchtune")
    from torchtune import rlhf

    advantages, returns = rlhf.estimate_advantages(values, rewards, gamma=1.0, lmbda=0.95, masks=masks)

Where torchtune and we differ: what stands where a mask is False is not read, and what is whitened is 0 there; the
unbiased variance of one value is 0, not nan.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrlhf import functional as F
from fastrlhf.compat._common import cast, discounted_sums, fits, rows
from fastrlhf.compat._patch import original
from fastrlhf.functional._checks import FLOATS

PACKAGE = "torchtune"
VERSIONS = ">=0.6,<0.7"
REWARDS = "torchtune.rlhf.rewards"
SEQUENCES = "torchtune.rlhf.sequence_processing"
LOSS = "torchtune.rlhf.loss.ppo.PPOLoss"


def get_rewards_ppo(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kl_coeff: float,
    valid_score_idxs: Tensor | None = None,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, KL divergence by k1, the fine for it), [B, T]: the score [B] is added at its index, or at the end."""
    if not fits(logprobs, ref_logprobs) or scores.dtype not in FLOATS:
        return original(f"{REWARDS}.get_rewards_ppo")(scores, logprobs, ref_logprobs, kl_coeff, valid_score_idxs)
    kl = F.kl_divergence(logprobs, ref_logprobs)
    fine = -kl_coeff * kl
    if valid_score_idxs is None:
        valid_score_idxs = torch.full_like(scores, logprobs.shape[1] - 1, dtype=torch.int64)
    rewards = fine.scatter_add(1, valid_score_idxs.unsqueeze(-1), scores.float().unsqueeze(-1))
    return tuple(cast(x, exact_dtype, logprobs, ref_logprobs) for x in (rewards, kl, fine))


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None, *, exact_dtype: bool = False) -> Tensor:
    """Mean where the mask is True, over everything or along dim; 0 where it is nowhere."""
    if isinstance(dim, tuple) or not fits(x, mask=mask):
        return original(f"{REWARDS}.masked_mean")(x, mask, dim)
    return cast(F.masked_mean(x, mask, dim=dim), exact_dtype, x, mask)


def masked_var(centered_values: Tensor, mask: Tensor, unbiased: bool = True, *, exact_dtype: bool = False) -> Tensor:
    """Mean square where the mask is True, of values from which the mean was taken. unbiased: divided by n - 1."""
    if not fits(centered_values, mask=mask):
        return original(f"{REWARDS}.masked_var")(centered_values, mask, unbiased)
    variance = F.masked_mean(centered_values.float() ** 2, mask)
    if unbiased:
        n = mask.sum()
        variance = variance * (n / (n - 1).clamp(min=1))
    return cast(variance, exact_dtype, centered_values, mask)


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True, *, exact_dtype: bool = False) -> Tensor:
    """Whitened by mean and unbiased variance of the values where the mask is True, or of all; 0 where it is False.

    shift_mean: True adds the mean back.
    """
    if not fits(x, mask=mask):
        return original(f"{REWARDS}.whiten")(x, mask, shift_mean)
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return cast(F.masked_whiten(x, mask, shift_mean=not shift_mean), exact_dtype, x, mask)


def estimate_advantages(
    values: Tensor,
    rewards: Tensor,
    gamma: float,
    lmbda: float,
    masks: Tensor | None = None,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) by GAE of all positions, [B, T], fp32. Advantages are whitened where masks is True, with
    their mean added again, and 0 elsewhere.

    Where values or rewards need a gradient, the sums are made of log2(T) steps in plain torch.
    """
    if values.dim() != 2 or not fits(values, rewards, mask=masks):
        return original(f"{REWARDS}.estimate_advantages")(values, rewards, gamma, lmbda, masks)
    if torch.is_grad_enabled() and (values.requires_grad or rewards.requires_grad):
        values, rewards = values.float(), rewards.float()
        following = torch.nn.functional.pad(values[:, 1:], (0, 1))
        delta = rewards + gamma * following - values
        advantages = discounted_sums(delta, torch.full_like(delta, gamma * lmbda))
        returns = advantages + values
    else:
        advantages, returns = F.gae(rewards, values, gamma=gamma, lam=lmbda)
    inputs = (values, rewards)
    return cast(whiten(advantages, masks), exact_dtype, *inputs), cast(returns, exact_dtype, *inputs)


def logits_to_logprobs(
    logits: Tensor, sequences: Tensor, temperature: float = 1.0, *, exact_dtype: bool = False
) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature): [B, T, V] and [B, T] to [B, T], fp32."""
    if logits.dtype not in FLOATS or sequences.shape != logits.shape[:-1] or temperature <= 0:
        return original(f"{SEQUENCES}.logits_to_logprobs")(logits, sequences, temperature)
    return cast(F.token_log_probs(rows(logits), sequences, temperature=temperature), exact_dtype, logits)


def get_batch_log_probs(
    logits: Tensor,
    labels: Tensor,
    label_pad_token_id: int = -100,
    return_average_logprobs: bool = False,
    *,
    exact_dtype: bool = False,
) -> Tensor:
    """Log-probability of each sequence's labels, the first one aside: [B, T, V] and [B, T] to [B], fp32.

    return_average_logprobs: their mean. What is label_pad_token_id does not count.
    """
    if logits.dtype not in FLOATS or labels.shape != logits.shape[:-1]:
        arguments = (logits, labels, label_pad_token_id, return_average_logprobs)
        return original(f"{SEQUENCES}.get_batch_log_probs")(*arguments)
    labels = labels[:, 1:]
    counts = labels != label_pad_token_id
    log_probs = F.token_log_probs(rows(logits[:, :-1]), torch.where(counts, labels, -100))
    total = F.masked_mean(log_probs, counts, dim=-1) if return_average_logprobs else log_probs.sum(-1)
    return cast(total, exact_dtype, logits)


class PPOLoss(nn.Module):
    """PPO's clipped losses of policy and value function, the latter times value_coeff."""

    exact_dtype = False

    def __init__(self, epsilon: float = 0.1, value_clip_range: float = 0.2, value_coeff: float = 0.1):
        super().__init__()
        self.epsilon = epsilon
        self.value_clip_range = value_clip_range
        self.value_coeff = value_coeff

    def forward(
        self,
        pi_old_logprobs: Tensor,
        pi_logprobs: Tensor,
        advantages: Tensor,
        phi_old_values: Tensor,
        phi_values: Tensor,
        returns: Tensor,
        padding_masks: Tensor | None = None,
        value_padding_masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Everything [B, T]; where the masks are True, a position counts.

        Returns (loss, policy loss, value loss, mean ratio, clipped fraction), scalars, fp32. The ratio is the mean over
        all positions, also those that do not count.
        """
        policy, value = (pi_logprobs, pi_old_logprobs, advantages), (phi_values, phi_old_values, returns)
        ours = fits(*policy, mask=padding_masks) and fits(*value, mask=value_padding_masks)
        if not ours or self.value_clip_range <= 0 or not 0 <= self.epsilon <= 1:
            arguments = (*policy[1::-1], advantages, phi_old_values, phi_values, returns)
            return original(LOSS).forward(self, *arguments, padding_masks, value_padding_masks)
        masks = (
            torch.ones_like(x, dtype=torch.bool) if mask is None else mask
            for x, mask in ((pi_logprobs, padding_masks), (phi_values, value_padding_masks))
        )
        mask, value_mask = masks
        clip = {"clip_low": self.epsilon, "clip_high": self.epsilon, "log_ratio_clamp": None}
        policy_loss, stats = F.ppo_loss(*policy, mask, **clip)
        value_loss, _ = F.value_loss(*value, value_mask, clip=self.value_clip_range)
        ratio = stats.ratio_mean
        if padding_masks is not None:
            ratio = (pi_logprobs.detach().float() - pi_old_logprobs.detach().float()).exp_().mean()
        loss = policy_loss + value_loss * self.value_coeff
        results = (loss, policy_loss.detach(), value_loss.detach(), ratio, stats.clip_fraction)
        return tuple(cast(x, self.exact_dtype, *policy) for x in results)


_REWARDS = (get_rewards_ppo, masked_mean, masked_var, whiten, estimate_advantages)
REPLACEMENTS = {
    **{f"{REWARDS}.{function.__name__}": function for function in _REWARDS},
    **{f"{SEQUENCES}.{function.__name__}": function for function in (logits_to_logprobs, get_batch_log_probs)},
    LOSS: PPOLoss,
}
MORE_ACCURATE = dict.fromkeys(REPLACEMENTS, "fp32 inside and out; torchtune computes in the dtype of its inputs")
