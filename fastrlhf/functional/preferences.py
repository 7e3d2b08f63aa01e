"""Losses on pairs of which one was preferred. Loss, gradients and statistics come out of the same pass over the pairs.

Reverse mode only, once: forward-mode AD and double backward raise NotImplementedError.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.fallback import DPO_VARIANTS
from fastrlhf.functional import _checks as check
from fastrlhf.functional._autograd import checked_once, differentiable, known_gradients


class PairwiseRewardStats(NamedTuple):
    """Scalars on the loss's device, without gradient; means over the pairs."""

    accuracy: Tensor  # share of pairs in the right order; a tie is half
    difference: Tensor  # chosen - rejected
    chosen: Tensor
    rejected: Tensor


class DPOStats(NamedTuple):
    """Scalars on the loss's device, without gradient; means over the pairs. Rewards: beta log(policy / reference)."""

    accuracy: Tensor  # share of pairs whose chosen response has the larger reward; a tie is half
    margin: Tensor  # reward of the chosen response - reward of the rejected one
    chosen_reward: Tensor
    rejected_reward: Tensor


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center_coef: float = 0.0
) -> tuple[Tensor, PairwiseRewardStats]:
    """The Bradley-Terry loss of a reward model on pairs of which one was preferred.

    chosen, rejected: [B], fp32, bf16 or fp16, the scores. Gradient goes to both.
    margin: [B], how much better the chosen one should be (Llama 2, arXiv:2307.09288, equation 2).
    center_coef: weight of (chosen + rejected)^2, which holds the scores near 0 (Eisenstein et al. 2023,
        arXiv:2312.09244).
    Returns (loss, PairwiseRewardStats), the mean over the pairs, an fp32 scalar; 0 for no pairs. Raises ValueError.

    L = mean of -log sigmoid(chosen - rejected - margin) + center_coef (chosen + rejected)^2. Ouyang et al. 2022
    (arXiv:2203.02155), equation 1.
    """
    check.tensor("chosen", chosen, dims=1)
    check.like("rejected", rejected, "chosen", chosen)
    if margin is not None:
        check.like("margin", margin, "chosen", chosen)
    needs_grad = torch.is_grad_enabled() and (chosen.requires_grad or rejected.requires_grad)
    loss, stats, _, _ = _pairwise_reward_loss(
        check.fp32(chosen), check.fp32(rejected), check.fp32(margin), _center_coef(center_coef), needs_grad
    )
    return loss, PairwiseRewardStats(*stats.unbind())


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, DPOStats]:
    """Direct preference optimisation, on the log-probabilities of whole responses.

    policy_chosen, policy_rejected, ref_chosen, ref_rejected: [B], fp32, bf16 or fp16: log-probs summed over a response
        (for "ipo" averaged over its tokens, as its authors do). Gradient goes to the first two.
    beta: strength of the pull to the reference, > 0.
    variant: with h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected) and e = label_smoothing,
        "sigmoid": -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), Rafailov et al. 2023 (arXiv:2305.18290),
            equation 7, and with e > 0 the conservative form of Mitchell 2023;
        "robust": the same, unbiased for labels that are wrong with probability e, Chowdhury et al. 2024
            (arXiv:2403.00409): [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e);
        "hinge": max(0, 1 - beta h), Zhao et al. 2023 (arXiv:2305.10425), equation 4, normalised by beta;
        "ipo": (h - 1 / (2 beta))^2, Azar et al. 2023 (arXiv:2310.12036), equation 17.
    label_smoothing: in [0, 0.5), for "sigmoid" and "robust".
    Returns (loss, DPOStats), the mean over the pairs, an fp32 scalar; 0 for no pairs. Raises ValueError.
    """
    check.tensor("policy_chosen", policy_chosen, dims=1)
    others = {"policy_rejected": policy_rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    for name, x in others.items():
        check.like(name, x, "policy_chosen", policy_chosen)
    numbers, index = _dpo_options(beta, variant, label_smoothing)
    loss, stats, _, _ = _dpo_loss(
        *(check.fp32(x) for x in (policy_chosen, *others.values())),
        numbers,
        index,
        torch.is_grad_enabled() and (policy_chosen.requires_grad or policy_rejected.requires_grad),
    )
    return loss, DPOStats(*stats.unbind())


@checked_once
def _center_coef(center_coef) -> Tensor:
    return check.scalars(check.number("center_coef", center_coef, least=0.0))


@checked_once
def _dpo_options(beta, variant, label_smoothing) -> tuple[Tensor, int]:
    index = check.option("variant", variant, DPO_VARIANTS)
    beta = check.number("beta", beta, above=0.0)
    label_smoothing = check.number("label_smoothing", label_smoothing, least=0.0, below=0.5)
    if label_smoothing and variant not in ("sigmoid", "robust"):
        raise ValueError(f"label_smoothing: got {label_smoothing}, wanted 0, because variant={variant!r} has none")
    return check.scalars(beta, label_smoothing), index


_pairwise_reward_loss = differentiable("pairwise_reward_loss", *known_gradients({0: 2, 1: 3}, arguments=5))
_dpo_loss = differentiable("dpo_loss", *known_gradients({0: 2, 1: 3}, arguments=7))


def _shapes(model: Tensor, stats: type, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = model.shape if needs_grad else (0,)
    return tuple(model.new_empty(size) for size in ((), (len(stats._fields),), shape, shape))


@torch.library.register_fake("fastrlhf::pairwise_reward_loss")
def _(chosen, rejected, margin, center_coef, needs_grad):
    return _shapes(chosen, PairwiseRewardStats, needs_grad)


@torch.library.register_fake("fastrlhf::dpo_loss")
def _(policy_chosen, policy_rejected, ref_chosen, ref_rejected, options, variant, needs_grad):
    return _shapes(policy_chosen, DPOStats, needs_grad)
