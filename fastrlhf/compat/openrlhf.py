"""OpenRLHF (https://github.com/OpenRLHF/OpenRLHF), 0.11.2: what `fastrlhf.patch("openrlhf")` binds.

    import fastrlhf

    fastrlhf.patch("openrlhf")  # before the trainer is made; in Ray's workers through FASTRLHF_PATCH=openrlhf
    from openrlhf.models import PolicyLoss

    loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio = PolicyLoss()(log_probs, old_log_probs, advantages, action_mask)

The losses are in `_openrlhf_losses`.

Where OpenRLHF and we differ: what stands under a 0 of a mask is not read, and advantages and returns are 0 there; a
batch without tokens has a loss of 0, not nan; `log_probs_from_logits` divides by the temperature inside, and leaves the
logits as they are. Masks hold zeros and ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.compat._common import cast, entropy, fits, rows
from fastrlhf.compat._openrlhf_losses import (
    LOSSES,
    DPOLoss,
    LogExpLoss,
    PairWiseLoss,
    PolicyLoss,
    SFTLoss,
    ValueLoss,
    aggregate_loss,
)
from fastrlhf.compat._patch import original
from fastrlhf.functional._checks import FLOATS

PACKAGE = "openrlhf"
VERSIONS = ">=0.11.2,<0.12"
UTILS = "openrlhf.models.utils"
GAE = "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker.get_advantages_and_returns"

KL_CLAMP = 10.0
KL_IS_WEIGHT_CLIP = 10.0


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """Estimates of the KL divergence, [...], fp32, by "k1", "k2" or "k3", within 10.

    unbiased_gradient: they get the gradient of k2 times the ratio to log_probs_old, held below 10 and constant.
    """
    if kl_estimator not in ("k1", "k2", "k3") or not fits(log_probs, log_probs_base, log_probs_old):
        arguments = (log_probs, log_probs_base, log_probs_old, kl_estimator, unbiased_gradient)
        return original(f"{UTILS}.compute_approx_kl")(*arguments)
    kl = F.kl_divergence(log_probs, log_probs_base, estimator=kl_estimator, clamp=KL_CLAMP)
    if not unbiased_gradient:
        return kl
    surrogate = F.kl_divergence(log_probs, log_probs_base, estimator="k2")
    if log_probs_old is not None:
        ratio = (log_probs.detach().float() - log_probs_old.detach().float()).exp()
        surrogate = surrogate * ratio.clamp(max=KL_IS_WEIGHT_CLIP)
    return kl.detach() + surrogate - surrogate.detach()


def compute_reward(
    r: Tensor | float,
    kl_coef: float,
    kl: Tensor | list[Tensor],
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor | list[Tensor]:
    """-kl_coef kl [B, T], and the score r [B], clipped, at the last token of each action_mask; of an empty one, at T.

    The same sums as OpenRLHF's, without its copies of mask and result.
    """
    if reward_clip_range:
        r = r.clamp(min=reward_clip_range[0], max=reward_clip_range[1])
    from_the_end = action_mask.to(torch.bool).view(torch.uint8).fliplr().argmax(dim=1, keepdim=True)
    last = action_mask.size(1) - 1 - from_the_end
    return (-max(kl_coef, 0.0) * kl).scatter_add(1, last, r.unsqueeze(1).to(kl.dtype))


def log_probs_from_logits(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, *, exact_dtype: bool = False
) -> Tensor:
    """Log-probability of each label under softmax(logits / temperature).

    [..., V] and [...] to [...], fp32; with exact_dtype in the dtype of the logits.
    """
    if logits.dtype not in FLOATS or labels.shape != logits.shape[:-1]:
        return original(f"{UTILS}.log_probs_from_logits")(logits, labels, temperature)
    return cast(F.token_log_probs(rows(logits), labels, temperature=temperature), exact_dtype, logits)


def compute_entropy(logits: Tensor, *, exact_dtype: bool = False) -> Tensor:
    """Entropy of softmax(logits), in nats: [..., V] to [...], fp32; with exact_dtype in the dtype of the logits."""
    if logits.dtype not in FLOATS:
        return original(f"{UTILS}.compute_entropy")(logits)
    return cast(entropy(logits), exact_dtype, logits)


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None, *, exact_dtype: bool = False) -> Tensor:
    """Mean where the mask is 1, or everywhere without one, over everything or along dim; nan where it is 1 nowhere."""
    if mask is None or isinstance(dim, tuple) or not fits(tensor, mask=mask):
        return original(f"{UTILS}.masked_mean")(tensor, mask, dim)
    mask = mask.to(torch.bool)
    mean = torch.where(mask.any() if dim is None else mask.any(dim), F.masked_mean(tensor, mask, dim=dim), torch.nan)
    return cast(mean, exact_dtype, tensor)


def masked_normalize(
    tensor: Tensor, mask: Tensor, dim: int = 1, eps: float = 1e-8, *, exact_dtype: bool = False
) -> Tensor:
    """(tensor - mean) / std along dim, over the positions where the mask is 1; 0 where it is 0.

    The variance is divided by n, and eps is the least it can be.
    """
    if not fits(tensor, mask=mask):
        return original(f"{UTILS}.masked_normalize")(tensor, mask, dim, eps)
    counts = mask.to(torch.bool)
    deviations = torch.where(counts, tensor - F.masked_mean(tensor, counts, dim=dim).unsqueeze(dim), 0.0)
    variance = F.masked_mean(deviations**2, counts, dim=dim).unsqueeze(dim)
    return cast(deviations * variance.clamp(min=eps).rsqrt(), exact_dtype, tensor, mask)


def get_advantages_and_returns(
    self,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor,
    gamma: float,
    lambd: float,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) by GAE, [B, T], fp32, without gradient; masked tokens are steps of reward and value 0."""
    if values.dim() != 2 or not fits(values, rewards, mask=action_mask):
        return original(GAE)(self, values, rewards, action_mask, gamma, lambd)
    options = {"gamma": gamma, "lam": lambd, "mask_mode": "none" if action_mask is None else "zero"}
    results = F.gae(rewards, values, action_mask, **options)
    return tuple(cast(x, exact_dtype, values, rewards) for x in results)


_LOSSES = (PolicyLoss, ValueLoss, PairWiseLoss, LogExpLoss, DPOLoss, SFTLoss, aggregate_loss)
_UTILS = (compute_approx_kl, compute_reward, log_probs_from_logits, compute_entropy, masked_mean, masked_normalize)
REPLACEMENTS = {
    **{f"{LOSSES}.{ours.__name__}": ours for ours in _LOSSES},
    **{f"{UTILS}.{ours.__name__}": ours for ours in _UTILS},
    GAE: get_advantages_and_returns,
}
_FP32 = "fp32 inside and out; OpenRLHF computes in the dtype of its inputs"
_SAME_DTYPE = {f"{UTILS}.compute_approx_kl", f"{UTILS}.compute_reward"}
MORE_ACCURATE = {
    **{place: _FP32 for place in REPLACEMENTS if place not in _SAME_DTYPE},
    f"{LOSSES}.LogExpLoss": f"{_FP32}, and overflows where a score is ahead by 88 or more",
}
