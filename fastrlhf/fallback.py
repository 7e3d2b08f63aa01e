"""The raw ops of csrc/ops.cpp for devices that have no kernel, each in terms of `fastrlhf.reference`.

Numbers arrive as tensors in CPU memory, enumerations as integers, "no limit" as infinity. The token-wise losses return
their gradients, and write them out here: an op runs below autograd, which therefore cannot be asked. The tests hold
them against autograd's.
"""

import functools
import math

import torch
from torch import Tensor

from fastrlhf import reference

OPS = (
    "token_log_probs",
    "token_log_probs_backward",
    "token_log_probs_backward_",
    "token_log_probs_and_entropy",
    "token_log_probs_and_entropy_backward",
    "token_log_probs_and_entropy_backward_",
    "linear_token_log_probs",
    "linear_token_log_probs_backward",
    "linear_cross_entropy",
    "linear_ppo_loss",
    "full_kl",
    "full_kl_backward",
    "kl_divergence",
    "kl_divergence_backward",
    "rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
    "rotate",
    "gae",
    "gae_packed",
    "rollout_advantages",
    "ppo_loss",
    "value_loss",
    "masked_mean",
    "masked_whiten",
    "pairwise_reward_loss",
    "dpo_loss",
    "sample_tokens",
    "paged_attention",
)
# The integers of the raw ops are positions in these; csrc/cpu/kernels.h repeats them.
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
MASK_MODES = ("carry", "zero", "none")
DPO_VARIANTS = ("sigmoid", "robust", "hinge", "ipo")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def _limit(x: float) -> float | None:
    return None if math.isinf(x) else x


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    counts, z = reference.scaled(logits, tokens, temperature.item())
    return reference.pick(torch.log_softmax(z, -1), tokens, counts), _normaliser(logits, counts, temperature)


def token_log_probs_and_entropy(logits: Tensor, tokens: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts, z = reference.scaled(logits, tokens, temperature.item())
    log_p = torch.log_softmax(z, -1)
    normaliser = _normaliser(logits, counts, temperature)
    return reference.pick(log_p, tokens, counts), reference.entropy_of(log_p, counts), normaliser


def _normaliser(logits: Tensor, counts: Tensor, temperature: Tensor) -> Tensor:
    """m and log s, for the backward pass. m is -inf only in a row of nothing but -inf."""
    x = reference.keep(logits, counts.unsqueeze(-1))
    top = x.amax(-1, keepdim=True)
    return torch.cat([top, torch.logsumexp((x - top) / temperature.item(), -1, keepdim=True)], -1)


def token_log_probs_backward(grad_log_probs, logits, tokens, normaliser, temperature) -> Tensor:
    return reference.token_log_probs_and_entropy_backward(
        grad_log_probs, None, logits, tokens, normaliser, None, temperature.item()
    )


def token_log_probs_and_entropy_backward(
    grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature
) -> Tensor:
    return reference.token_log_probs_and_entropy_backward(
        grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature.item()
    )


def token_log_probs_backward_(grad_log_probs, logits, *rest) -> None:
    logits.copy_(token_log_probs_backward(grad_log_probs, logits, *rest))


def token_log_probs_and_entropy_backward_(grad_log_probs, grad_entropy, logits, *rest) -> None:
    logits.copy_(token_log_probs_and_entropy_backward(grad_log_probs, grad_entropy, logits, *rest))


def _linear_logits(hidden, weight, bias, tokens, numbers) -> tuple[Tensor, Tensor]:
    """Logits [N, V] in fp32, and which rows count."""
    counts = tokens != reference.IGNORED
    return reference.linear_logits(hidden, weight, bias, counts, _limit(numbers[1].item())), counts


def _without_autocast(function):
    """Autocast also reaches the products inside these ops, and would round the logits to 16 bits."""

    @functools.wraps(function)
    def call(*arguments):
        with torch._C._DisableAutocast():
            return function(*arguments)

    return call


@_without_autocast
def linear_token_log_probs(hidden, weight, bias, tokens, numbers, chunk_bytes) -> tuple[Tensor, Tensor, Tensor]:
    """All logits at once: here nobody saves memory."""
    logits, _ = _linear_logits(hidden, weight, bias, tokens, numbers)
    return token_log_probs_and_entropy(logits, tokens, numbers[0])


@_without_autocast
def linear_token_log_probs_backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    numbers: Tensor,
    _chunk_bytes: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    weight_grad_in_fp32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    temperature, softcap = numbers.tolist()
    logits, counts = _linear_logits(hidden, weight, bias, tokens, numbers)
    dz = reference.token_log_probs_and_entropy_backward(
        grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature
    )
    if _limit(softcap) is not None:
        dz = dz * (1 - (logits / softcap) ** 2)
    dtype = torch.float32 if weight_grad_in_fp32 else weight.dtype
    x = reference.keep(hidden, counts.unsqueeze(-1))
    return (
        (dz @ reference.upcast(weight)).to(hidden.dtype) if needs_hidden else hidden.new_empty(0),
        (dz.mT @ x).to(dtype) if needs_weight else weight.new_empty(0, dtype=dtype),
        dz.sum(0).to(bias.dtype) if needs_bias else hidden.new_empty(0),
    )


def linear_cross_entropy(hidden, weight, bias, tokens, numbers, chunk_bytes, denominator, *needs):
    head = (hidden, weight, bias, tokens)
    log_probs, entropy, normaliser = linear_token_log_probs(*head, numbers, chunk_bytes)
    mask = tokens != reference.IGNORED
    count = mask.sum().float()
    shares = reference.divide(mask.float(), count if denominator is None else denominator)
    stats = torch.stack([reference.divide(entropy.sum(), count), count])
    grads = linear_token_log_probs_backward(-shares, None, *head, normaliser, entropy, numbers, chunk_bytes, *needs)
    return -(log_probs * shares).sum(), stats, *grads


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    numbers: Tensor,
    chunk_bytes: int,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    advantage_stats: Tensor | None,
    ref_log_probs: Tensor | None,
    denominator: Tensor | None,
    options: Tensor,
    kl_estimator: int,
    aggregation: int,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = (hidden, weight, bias, tokens.reshape(-1))
    log_probs, entropy, normaliser = linear_token_log_probs(*head, numbers, chunk_bytes)
    constants = (old_log_probs, advantages, mask, weights, advantage_stats, entropy.view(tokens.shape))
    rest = (ref_log_probs, denominator, options, kl_estimator, False, aggregation, True)
    loss, stats, *grads = ppo_loss(log_probs.view(tokens.shape), *constants, *rest)
    grads = (grad.reshape(-1) for grad in grads)
    return (
        loss,
        stats,
        *linear_token_log_probs_backward(*grads, *head, normaliser, entropy, numbers, chunk_bytes, *needs),
    )


def full_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.ones_like(logits[..., 0], dtype=torch.bool) if mask is None else mask
    kl = reference.full_kl(logits, ref_logits, mask, temperature=temperature.item())
    return kl, *(_normaliser(x, counts, temperature) for x in (logits, ref_logits))


def full_kl_backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    kl: Tensor,
    _normaliser: Tensor,
    _ref_normaliser: Tensor,
    temperature: Tensor,
    needs_grad: bool,
    needs_ref_grad: bool,
) -> tuple[Tensor, Tensor]:
    counts = (torch.ones_like(kl, dtype=torch.bool) if mask is None else mask) & (grad != 0)
    log_p, log_q, gap = reference.log_softmaxes(logits, ref_logits, counts, temperature.item())
    p = log_p.exp()
    slope = torch.where(counts, grad / temperature.item(), 0.0).unsqueeze(-1)
    # Where p is 0 its token pulls nowhere, however far the reference is.
    dz = torch.where(p == 0, 0.0, slope * p * (gap - torch.where(counts, kl, 0.0).unsqueeze(-1)))
    dz_ref = slope * (log_q.exp() - p)
    pairs = ((logits, dz, needs_grad), (ref_logits, dz_ref, needs_ref_grad))
    return tuple(
        torch.where(counts.unsqueeze(-1), d, 0.0).to(x.dtype) if needed else x.new_empty(0) for x, d, needed in pairs
    )


def kl_divergence(log_probs: Tensor, ref_log_probs: Tensor, estimator: int, clamp: Tensor) -> Tensor:
    clamp = tuple(map(_limit, clamp.tolist()))
    return reference.kl_divergence(log_probs, ref_log_probs, estimator=KL_ESTIMATORS[estimator], clamp=clamp).clone()


def kl_divergence_backward(
    grad: Tensor, log_probs: Tensor, ref_log_probs: Tensor, estimator: int, clamp: Tensor
) -> Tensor:
    clamp_input, clamp_output = clamp.tolist()
    log_ratio, name = log_probs - ref_log_probs, KL_ESTIMATORS[estimator]
    held = log_ratio.clamp(-clamp_input, clamp_input)
    outside = (log_ratio.abs() > clamp_input) | (reference.kl_estimate(held, name).abs() > clamp_output)
    return torch.where(outside, 0.0, grad * reference.kl_slope(held, name))


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.float().square().mean(-1) + eps.item()).flatten()
    return reference.rms_norm(x, weight, eps=eps.item()), rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    grad, wide, r = grad.float(), x.float(), rstd.view(*x.shape[:-1], 1)
    grad_weight = (
        (grad * wide * r).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if needs_weight else weight.new_empty(0)
    )
    if not needs_x:
        return x.new_empty(0), grad_weight
    gw = grad * weight.float()
    return (r * (gw - wide * r**2 * (gw * wide).mean(-1, keepdim=True))).to(x.dtype), grad_weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g, x, s = grad.float(), gate.float(), torch.sigmoid(gate.float())
    return (g * up.float() * s * (1 + x * (1 - s))).to(gate.dtype), (g * x * s).to(up.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if back:  # the sines of the two halves change places and signs
        sin = -torch.cat(sin.chunk(2, dim=-1)[::-1], dim=-1)
    return reference.rotary_embedding(x.transpose(1, 2), cos, sin).transpose(1, 2).contiguous()


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap_values: Tensor | None,
    options: Tensor,
    mask_mode: int,
) -> tuple[Tensor, Tensor]:
    return reference.gae(rewards, values, mask, **_discounts(options, mask_mode), bootstrap_values=bootstrap_values)


def _discounts(options: Tensor, mask_mode: int) -> dict:
    gamma, lam = options.tolist()
    return {"gamma": gamma, "lam": lam, "mask_mode": MASK_MODES[mask_mode]}


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap_values: Tensor | None,
    options: Tensor,
    mask_mode: int,
) -> tuple[Tensor, Tensor]:
    discounts = _discounts(options, mask_mode)
    return reference.gae_packed(rewards, values, cu_seqlens, mask, **discounts, bootstrap_values=bootstrap_values)


def rollout_advantages(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    mask: Tensor,
    token_rewards: Tensor | None,
    bootstrap_values: Tensor | None,
    options: Tensor,
    kl_estimator: int,
    mask_mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kl_coef, score_clip = options[:2].tolist()
    return reference.rollout_advantages(
        scores,
        log_probs,
        ref_log_probs,
        values,
        mask,
        kl_coef=kl_coef,
        kl_estimator=KL_ESTIMATORS[kl_estimator],
        score_clip=_limit(score_clip),
        token_rewards=token_rewards,
        bootstrap_values=bootstrap_values,
        **_discounts(options[2:], mask_mode),
    )


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    advantage_stats: Tensor | None,
    entropy: Tensor | None,
    ref_log_probs: Tensor | None,
    denominator: Tensor | None,
    options: Tensor,
    kl_estimator: int,
    sequence_ratio: bool,
    aggregation: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    clip_low, clip_high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef = options.tolist()
    loss, stats, terms = reference.ppo_terms(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=_limit(dual_clip),
        log_ratio_clamp=_limit(log_ratio_clamp),
        ratio_level="sequence" if sequence_ratio else "token",
        weights=weights,
        advantage_stats=advantage_stats,
        entropy=entropy,
        entropy_coef=entropy_coef,
        ref_log_probs=ref_log_probs,
        kl_coef=kl_coef,
        kl_estimator=KL_ESTIMATORS[kl_estimator],
        aggregation=AGGREGATIONS[aggregation],
        denominator=denominator,
    )
    if not needs_grad:
        return loss, stats, log_probs.new_empty(0), log_probs.new_empty(0)

    # d loss / d log r is -A r, or 0 where a clip or the clamp holds.
    grad = torch.where(terms.held, 0.0, -terms.advantages * terms.ratio) * terms.weights * terms.shares
    if sequence_ratio:  # the ratio is the exponential of a mean: each token carries its part of the summed slope
        grad = mask * reference.divide(grad.sum(-1, keepdim=True), mask.sum(-1, keepdim=True))
    if terms.distance is not None and kl_coef:
        grad = grad + kl_coef * terms.shares * reference.kl_slope(terms.distance, KL_ESTIMATORS[kl_estimator])
    grad_entropy = log_probs.new_empty(0) if entropy is None else -entropy_coef * terms.shares
    return loss, stats, torch.where(mask, grad, 0.0), grad_entropy


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    denominator: Tensor | None,
    clip: Tensor,
    aggregation: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    clip, name = clip.item(), AGGREGATIONS[aggregation]
    options = {"clip": _limit(clip), "aggregation": name, "denominator": denominator}
    loss, stats = reference.value_loss(values, old_values, returns, mask, **options)
    if not needs_grad:
        return loss, stats, values.new_empty(0)
    kept, target = reference.keep(values, mask), reference.keep(returns, mask)
    slope = kept - target
    if old_values is not None:  # 0 where the value held at the clip has the larger error
        old = reference.keep(old_values, mask)
        held = torch.minimum(torch.maximum(kept, old - clip), old + clip)
        slope = torch.where((held - target) ** 2 > slope**2, 0.0, torch.where(held.isnan(), held, slope))
    grad = slope * reference.token_weights(mask, slope.dtype, name, denominator)
    return loss, stats, torch.where(mask, grad, 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return reference.masked_mean(x, mask, dim=1), mask.sum(1).float()


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool, eps: Tensor) -> tuple[Tensor, Tensor]:
    whitened, *stats = reference.whiten(x, mask, shift_mean, unbiased, eps.item())
    return whitened, torch.stack(stats)


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coef: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    center_coef = center_coef.item()
    loss, stats = reference.pairwise_reward_loss(chosen, rejected, margin=margin, center_coef=center_coef)
    if not needs_grad:
        return loss, stats, chosen.new_empty(0), chosen.new_empty(0)
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    slope, center = torch.sigmoid(-difference), 2 * center_coef * (chosen + rejected)
    count = max(chosen.numel(), 1)
    return loss, stats, (center - slope) / count, (center + slope) / count


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    options: Tensor,
    variant: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    beta, e = options.tolist()
    name = DPO_VARIANTS[variant]
    inputs = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    loss, stats = reference.dpo_loss(*inputs, beta=beta, variant=name, label_smoothing=e)
    if not needs_grad:
        return loss, stats, policy_chosen.new_empty(0), policy_chosen.new_empty(0)
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    up, down = torch.sigmoid(-beta * h), torch.sigmoid(beta * h)
    slope = {
        "sigmoid": beta * (e * down - (1 - e) * up),
        "robust": -beta * ((1 - e) * up + e * down) / (1 - 2 * e),
        "hinge": torch.where(beta * h < 1, -beta, torch.where(h.isnan(), h, 0.0)),
        "ipo": 2 * (h - 1 / (2 * beta)),
    }[name] / max(h.numel(), 1)
    return loss, stats, slope, -slope


def sample_tokens(logits, seed, sequence, position, numbers, top_k: int) -> tuple[Tensor, Tensor]:
    temperature, top_p, min_p = numbers.tolist()
    return reference.sample_tokens(
        logits,
        seed=seed,
        sequence=sequence,
        position=position,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )


def paged_attention(
    qkv, keys, values, pages, sequence, position, cos, sin, q_norm, k_norm, numbers, window: int
) -> Tensor:
    scale, softcap, eps = numbers.tolist()
    return reference.paged_attention(
        qkv,
        keys,
        values,
        pages,
        sequence,
        position,
        cos=cos,
        sin=sin,
        q_norm=q_norm,
        k_norm=k_norm,
        scale=scale,
        softcap=softcap,
        eps=eps,
        window=window,
    )
