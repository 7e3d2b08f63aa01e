"""NeMo-RL (https://github.com/NVIDIA-NeMo/RL), 0.7: what `fastrlhf.patch("nemo_rl")` binds.

    import fastrlhf

    fastrlhf.patch("nemo_rl")  # before the workers are made; in those of Ray through FASTRLHF_PATCH=nemo_rl
    from nemo_rl.algorithms.utils import calculate_kl

    kl = calculate_kl(logprobs, logprobs_reference, kl_type="k3")

GAE, the loss of the value function, and the means and KL estimates that the other losses are made of. The loss of the
policy itself stays NeMo-RL's, which computes a dozen diagnostics between its lines; for a loss function of one's own,
`clipped_pg_loss` is its mathematics in one pass.

Where NeMo-RL and we differ: what stands under a 0 of a mask is not read, and advantages and returns are 0 there. Masks
that weight samples with other numbers than 0 and 1, and a lambda for every sample, go to NeMo-RL.

The package on PyPI is empty: this is written, and tested, by the formulas of the source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.compat._common import aggregate, cast, fits
from fastrlhf.compat._patch import original
from fastrlhf.functional import PPOStats

PACKAGE = "nemo_rl"
DISTRIBUTION = "nemo-rl"
VERSIONS = ">=0.7,<0.8"
UTILS = "nemo_rl.algorithms.utils"
GAE = "nemo_rl.algorithms.advantage_estimator.GeneralizedAdvantageEstimator._compute_gae"
VALUE_LOSS = "nemo_rl.algorithms.loss.loss_functions.MseValueLossFn.__call__"


def calculate_kl(
    logprobs: Tensor,
    logprobs_reference: Tensor,
    kl_type: str = "k3",
    input_clamp_value: float | None = 20.0,
    output_clamp_value: float | None = 10.0,
    importance_sampling_weights: Tensor | None = None,
    *,
    exact_dtype: bool = False,
) -> Tensor:
    """Estimates of the KL divergence, [B, T], by "k1", "k2" or "k3".

    input_clamp_value, output_clamp_value: hold the log-ratio, and the result, within it.
    importance_sampling_weights: [B, T], multiply the estimates; without gradient where the log-ratio was held.
    """
    weights, pair = importance_sampling_weights, (logprobs, logprobs_reference)
    if kl_type not in ("k1", "k2", "k3") or not fits(*pair, weights):
        return original(f"{UTILS}.calculate_kl")(*pair, kl_type, input_clamp_value, output_clamp_value, weights)
    if weights is None:
        kl = F.kl_divergence(*pair, estimator=kl_type, clamp=(input_clamp_value, output_clamp_value))
        return cast(kl, exact_dtype, *pair)
    kl = F.kl_divergence(*pair, estimator=kl_type, clamp=(input_clamp_value, None))
    if input_clamp_value is not None:
        held = (logprobs.detach().float() - logprobs_reference.detach().float()).abs() > input_clamp_value
        weights = torch.where(held, weights.detach(), weights)
    kl = kl * weights
    if output_clamp_value is not None:
        kl = kl.clamp(-output_clamp_value, output_clamp_value)
    return cast(kl, exact_dtype, *pair, weights)


def masked_mean(
    values: Tensor,
    mask: Tensor,
    dim: int | None = None,
    global_normalization_factor: Tensor | float | None = None,
    *,
    exact_dtype: bool = False,
) -> Tensor:
    """Mean where the mask is 1, over everything or along dim; 0 where it is 1 nowhere.

    global_normalization_factor: the number by which to divide, instead of the count here.
    """
    counts = None if isinstance(dim, tuple) or not fits(values, mask=mask) else _bits(mask)
    if counts is None:
        return original(f"{UTILS}.masked_mean")(values, mask, dim, global_normalization_factor)
    mean = F.masked_mean(values, counts, dim=dim)
    if global_normalization_factor is not None:
        count = counts.sum() if dim is None else counts.sum(dim)
        mean = mean * (count / (global_normalization_factor + 1e-8))
    return cast(mean, exact_dtype, values, mask)


def _compute_gae(
    self,
    token_level_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gae_lambda: Tensor | float | None = None,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), [B, T], fp32, without gradient; gaps in the mask are skipped."""
    lam = self.gae_lambda if gae_lambda is None else gae_lambda
    inputs = (token_level_rewards, values)
    ours = values.dim() == 2 and not isinstance(lam, Tensor) and fits(*inputs, mask=mask)
    counts = _bits(mask) if ours else None
    if counts is None:
        return original(GAE)(self, *inputs, mask, gae_lambda)
    results = F.gae(*inputs, counts, gamma=self.gae_gamma, lam=lam)
    return tuple(cast(x, exact_dtype, *inputs, mask) for x in results)


def value_loss(
    self,
    logits: Tensor,
    data: Any,
    global_valid_seqs: Tensor,
    global_valid_toks: Tensor,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """(loss, metrics): half the squared error times self.scale, with self.cliprange clipped around the old values.

    logits: the values, [B, T] or [B, T, 1]. data: token_mask, returns and values, [B, T], sample_mask, [B]. Sums are
    divided by global_valid_toks.
    """
    values = logits.squeeze(-1) if logits.dim() > 2 and logits.shape[-1] == 1 else logits
    clip, returns = self.cliprange or None, data["returns"]
    old_values = None if clip is None else data["values"]
    mask = data["token_mask"] * data["sample_mask"].unsqueeze(-1)
    ours = values.dim() == 2 and (clip is None or clip > 0) and fits(values, returns, old_values, mask=mask)
    counts = _bits(mask) if ours else None
    if counts is None:
        return original(VALUE_LOSS)(self, logits, data, global_valid_seqs, global_valid_toks)
    total = global_valid_toks + 1e-8
    loss, stats = F.value_loss(values, old_values, returns, counts, clip=clip, denominator=total / self.scale)
    with torch.no_grad():
        share = stats.tokens / total
        kept, targets = (torch.where(counts, x.detach().float(), 0.0) for x in (values, returns))
        nothing = stats.tokens == 0
        smallest, largest = (
            torch.where(nothing, 0.0, x)
            for x in (torch.where(counts, kept, torch.inf).min(), torch.where(counts, kept, -torch.inf).max())
        )
        numbers = {
            "loss": loss.detach(),
            "vf_clipfrac": stats.clip_fraction * share,
            "returns_mean": stats.return_mean * share,
            "values_mean": stats.value_mean * share,
            "values_min": smallest,
            "values_max": largest,
            "returns_sq_mean": targets.square().sum() / total,
            "residual_sq_mean": (targets - kept).square().sum() / total,
        }
        metrics = dict(zip(numbers, torch.stack([x.reshape(()) for x in numbers.values()]).tolist(), strict=True))
    return cast(loss, exact_dtype, values, returns, mask), metrics | {"num_valid_samples": int(values.shape[0])}


def clipped_pg_loss(
    curr_logprobs: Tensor,
    prev_logprobs: Tensor,
    advantages: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    *,
    ratio_clip_min: float = 0.2,
    ratio_clip_max: float = 0.2,
    ratio_clip_c: float | None = None,
    token_level_loss: bool = True,
    sequence_level_importance_ratios: bool = False,
    use_cispo: bool = False,
    importance_weights: Tensor | None = None,
    global_valid_seqs: Tensor | float | None = None,
    global_valid_toks: Tensor | float | None = None,
) -> tuple[Tensor, PPOStats | None]:
    """What `ClippedPGLossFn` minimises, without its KL term: PPO, GSPO (sequence_level_importance_ratios), or CISPO.

    curr_logprobs, prev_logprobs, advantages, token_mask: [B, T], positions already shifted. sample_mask: [B]. Masks
        hold zeros and ones. The options are those of ClippedPGLossConfig.
    importance_weights: [B, T], multiply the terms, for a mismatch of rollouts.
    global_valid_seqs, global_valid_toks: counts of the global batch, instead of this one's.
    Returns (loss, PPOStats, or None for CISPO), the loss an fp32 scalar. Raises ValueError: nothing broadcasts.
    """
    mask = token_mask.to(torch.bool) & sample_mask.to(torch.bool).unsqueeze(-1)
    aggregation = "token-mean" if token_level_loss else "seq-mean-token-mean"
    denominator = global_valid_toks if token_level_loss else global_valid_seqs
    if use_cispo:
        with torch.no_grad():
            ratio = (curr_logprobs.float() - prev_logprobs.float()).exp()
            weights = -ratio.clamp(1 - ratio_clip_min, 1 + ratio_clip_max) * advantages
            weights = weights if importance_weights is None else weights * importance_weights
            weights = torch.where(mask, weights, 0.0)
        return aggregate(weights * curr_logprobs, mask, aggregation, denominator), None
    return F.ppo_loss(
        curr_logprobs,
        prev_logprobs,
        advantages,
        mask,
        clip_low=ratio_clip_min,
        clip_high=ratio_clip_max,
        dual_clip=ratio_clip_c,
        log_ratio_clamp=None,
        ratio_level="sequence" if sequence_level_importance_ratios else "token",
        weights=importance_weights,
        aggregation=aggregation,
        denominator=denominator,
    )


def _bits(mask: Tensor) -> Tensor | None:
    """The mask as bool, or None if it holds anything but zeros and ones."""
    counts = mask.to(torch.bool)
    return counts if mask.dtype == torch.bool or torch.equal(counts.to(mask.dtype), mask) else None


REPLACEMENTS = {
    f"{UTILS}.calculate_kl": calculate_kl,
    f"{UTILS}.masked_mean": masked_mean,
    GAE: _compute_gae,
    VALUE_LOSS: value_loss,
}
MORE_ACCURATE = dict.fromkeys(REPLACEMENTS, "fp32 inside and out; NeMo-RL computes in the dtype of its inputs")
