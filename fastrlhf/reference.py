"""Every op once more in plain PyTorch: the oracle of the tests, and what runs where no kernel exists.

Written to be read beside the papers, not to be fast. Everything is differentiable by autograd, computes in fp64 when it
is given fp64 and in fp32 otherwise, and reads nothing that stands under a zero of the mask. Arguments are described in
`fastrlhf.functional`.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
ELSEWHERE = -(2**63)  # the row counts, but its token lies in another shard of the vocabulary
INFINITY = float("inf")


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """x where it counts, 0 elsewhere. A selection and not a product: 0 * nan is nan."""
    return torch.where(mask, upcast(x), 0.0)


def divide(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 where nothing was counted."""
    count = count.to(total.dtype)
    return torch.where(count == 0, 0.0, total / torch.where(count == 0, 1.0, count))


def residual(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, to the last digits also near 0, where that is a difference of equal numbers: by its series."""
    small = x.abs() < 1
    near, series = torch.where(small, x, 0.0), 1.0
    for n in range(10 if x.dtype == torch.float32 else 18, 2, -1):
        series = 1 + near / n * series
    far = torch.expm1(x) - x.clamp(max=1e30)  # at infinity: infinity, and not inf - inf
    return torch.where(small, near**2 / 2 * series, far)


# ---------------------------------------------------------------------------------------------- vocabulary-wide


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """IndexError on CPU. Elsewhere reading the tokens would stall the device: there, `pick` gives nan."""
    wrong = (tokens != IGNORED) & (tokens != ELSEWHERE) & ((tokens < 0) | (tokens >= vocabulary))
    if tokens.device.type == "cpu" and wrong.any():
        position = int(wrong.flatten().nonzero()[0])
        raise IndexError(
            f"tokens: got {tokens.flatten()[position]} at position {position}, wanted a token in [0, {vocabulary}), "
            f"or {IGNORED} to ignore it"
        )


def scaled(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Which rows count, and z / T in those, 0 in the others."""
    check_tokens(tokens, logits.shape[-1])
    counts = tokens != IGNORED
    return counts, torch.where(counts.unsqueeze(-1), upcast(logits), 0.0) / temperature


def log_softmax(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Which rows count, and log softmax(z / T)."""
    counts, z = scaled(logits, tokens, temperature)
    return counts, torch.log_softmax(z, dim=-1)


def whiten_by(advantages: Tensor, mask: Tensor, stats: Tensor | None) -> Tensor:
    if stats is None:
        return advantages
    mean, rstd = stats.to(advantages.dtype)
    return torch.where(mask, (advantages - mean) * rstd, 0.0)


def pick(log_p: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    inside = (tokens >= 0) & (tokens < log_p.shape[-1])
    picked = log_p.gather(-1, torch.where(inside, tokens, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counts, torch.where(inside, picked, torch.nan), 0.0)


def entropy_of(log_p: Tensor, counts: Tensor) -> Tensor:
    """H = -sum p log p, with 0 log 0 = 0."""
    surprise = torch.where(log_p == -INFINITY, 0.0, log_p)
    return torch.where(counts, -(log_p.exp() * surprise).sum(-1), 0.0)


def token_log_probs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    counts, log_p = log_softmax(logits, tokens, temperature)
    return pick(log_p, tokens, counts)


def token_log_probs_and_entropy(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    counts, log_p = log_softmax(logits, tokens, temperature)
    return pick(log_p, tokens, counts), entropy_of(log_p, counts)


def token_log_probs_and_entropy_backward(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    tokens: Tensor,
    normaliser: Tensor,
    entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """dz = (1/T) [ g (delta - p) - h p (log p + H) ]: what every vocabulary kernel ends in.

    normaliser: [..., 2], m and log s: from their sum, a logsumexp of 1e5, log p would have two digits after the point.
    """
    check_tokens(tokens, logits.shape[-1])
    counts = tokens != IGNORED
    m, log_s = normaliser.unsqueeze(-2).unbind(-1)
    log_p = (keep(logits, counts.unsqueeze(-1)) - m) / temperature - log_s
    p = log_p.exp()
    dz = torch.zeros_like(p)
    if grad_log_probs is not None:
        inside = (tokens >= 0) & (tokens < p.shape[-1])
        index = torch.where(inside, tokens, 0).unsqueeze(-1)
        delta = torch.zeros_like(p).scatter_(-1, index, inside.unsqueeze(-1).to(p.dtype))
        dz = dz + grad_log_probs.unsqueeze(-1) * (delta - p)
    if grad_entropy is not None:
        surprise = torch.where(log_p == -INFINITY, 0.0, log_p)
        dz = dz - grad_entropy.unsqueeze(-1) * p * (surprise + entropy.unsqueeze(-1))
    # A row nobody wants a gradient of may hold anything.
    wanted = sum((grad != 0 for grad in (grad_log_probs, grad_entropy) if grad is not None), torch.zeros_like(counts))
    return torch.where((counts & wanted).unsqueeze(-1), dz / temperature, 0.0).to(logits.dtype)


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, softcap: float | None = None
) -> Tensor:
    """x W^T + bias, capped as in Gemma 2 (arXiv:2408.00118): softcap tanh(z / softcap)."""
    z = keep(hidden, counts.unsqueeze(-1)) @ upcast(weight).mT
    z = z if bias is None else z + upcast(bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_token_log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, bias=None, temperature: float = 1.0, softcap=None
) -> tuple[Tensor, Tensor]:
    logits = linear_logits(hidden, weight, bias, tokens != IGNORED, softcap)
    return token_log_probs_and_entropy(logits, tokens, temperature=temperature)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor, *, denominator=None, **head) -> Tensor:
    log_probs, _ = linear_token_log_probs_and_entropy(hidden, weight, tokens, **head)
    count = (tokens != IGNORED).sum() if denominator is None else torch.as_tensor(denominator, device=tokens.device)
    return -divide(log_probs.sum(), count)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias=None,
    temperature: float = 1.0,
    softcap=None,
    **options,
) -> tuple[Tensor, Tensor]:
    """`ppo_loss` of the head's log-probs and entropies."""
    head = {"bias": bias, "temperature": temperature, "softcap": softcap}
    tokens = torch.where(mask.bool(), tokens, IGNORED)
    log_probs, entropy = linear_token_log_probs_and_entropy(hidden, weight, tokens, **head)
    return ppo_loss(log_probs, old_log_probs, advantages, mask, entropy=entropy, **options)


def log_softmaxes(logits: Tensor, ref_logits: Tensor, counts: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """log p, log q and log p - log q; the last 0 where p is, whatever q is there."""
    scaled = [keep(x, counts.unsqueeze(-1)) / temperature for x in (logits, ref_logits)]
    log_p, log_q = (torch.log_softmax(z, -1) for z in scaled)
    gap = torch.where(log_p == -INFINITY, 0.0, log_p - log_q)
    return log_p, log_q, gap


def full_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum p (log p - log q), with 0 log 0 = 0."""
    counts = torch.ones_like(logits[..., 0], dtype=torch.bool) if mask is None else mask.bool()
    log_p, _, gap = log_softmaxes(logits, ref_logits, counts, temperature)
    return torch.where(counts, (log_p.exp() * gap).sum(-1), 0.0)


# ------------------------------------------------------------------------------------- inside the decoder layers


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Zhang and Sennrich 2019 (arXiv:1910.07467), with eps under the root as in Llama."""
    wide = upcast(x)
    return (upcast(weight) * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shazeer 2020 (arXiv:2002.05202)."""
    return (torch.nn.functional.silu(upcast(gate)) * upcast(up)).to(gate.dtype)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Su et al. 2021 (arXiv:2104.09864), equation 34, with element i + d / 2 as the partner of element i."""
    low, high = upcast(x).chunk(2, dim=-1)
    cos, sin = upcast(cos).unsqueeze(1), upcast(sin).unsqueeze(1)
    return (torch.cat([low, high], -1) * cos + torch.cat([-high, low], -1) * sin).to(x.dtype)


# ---------------------------------------------------------------------------------------------- token-wise


def kl_estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """Estimates of KL(p || q) from a token sampled from p, given log p - log q. Schulman 2020, "Approximating KL"."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    if estimator == "k3":
        return residual(-log_ratio)
    if estimator == "abs":
        return log_ratio.abs()
    raise ValueError(f"estimator: got {estimator!r}, wanted one of 'k1', 'k2', 'k3', 'abs'")


def kl_divergence(log_probs: Tensor, ref_log_probs: Tensor, *, estimator: str = "k1", clamp=None) -> Tensor:
    clamp_input, clamp_output = clamp if isinstance(clamp, tuple) else (None, clamp)
    log_ratio = upcast(log_probs) - upcast(ref_log_probs)
    if clamp_input is not None:
        log_ratio = log_ratio.clamp(-clamp_input, clamp_input)
    kl = kl_estimate(log_ratio, estimator)
    return kl if clamp_output is None else kl.clamp(-clamp_output, clamp_output)


def kl_slope(log_ratio: Tensor, estimator: str) -> Tensor:
    """The derivative of `kl_estimate`, for those who cannot ask autograd."""
    if estimator == "k1":
        return torch.where(log_ratio.isnan(), log_ratio, 1.0)
    if estimator == "k2":
        return log_ratio
    return (
        -torch.expm1(-log_ratio) if estimator == "k3" else torch.where(log_ratio.isnan(), log_ratio, log_ratio.sign())
    )


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: str = "carry",
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Schulman et al. 2016 (arXiv:1506.02438), equations 11 and 16, from the last token to the first."""
    batch, length = rewards.shape
    rewards, values = upcast(rewards), upcast(values)
    counts = torch.ones_like(rewards, dtype=torch.bool) if mask is None or mask_mode == "none" else mask.bool()
    rewards, values = keep(rewards, counts), keep(values, counts)
    next_value = values.new_zeros(batch) if bootstrap_values is None else bootstrap_values.to(values.dtype)
    next_advantage = values.new_zeros(batch)
    advantages = []
    for t in reversed(range(length)):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages.append(torch.where(counts[:, t], advantage, 0.0))
        # "carry": a masked token is as if it did not exist. "zero": it exists, with reward 0 and value 0.
        moves = counts[:, t] | (mask_mode == "zero")
        next_value = torch.where(moves, values[:, t], next_value)
        next_advantage = torch.where(moves, advantage, next_advantage)
    advantages = torch.stack(advantages[::-1], dim=1) if length else torch.zeros_like(rewards)
    return advantages, torch.where(counts, advantages + values, 0.0)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    *,
    bootstrap_values: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """`gae`, sequence by sequence."""
    ends = cu_seqlens.tolist()
    check_ends(ends, rewards.shape[0])
    advantages, returns = torch.zeros_like(upcast(rewards)), torch.zeros_like(upcast(rewards))
    for b, (start, end) in enumerate(itertools.pairwise(ends)):
        part = [None if x is None else x[None, start:end] for x in (rewards, values, mask)]
        last = None if bootstrap_values is None else bootstrap_values[b : b + 1]
        advantages[start:end], returns[start:end] = (x[0] for x in gae(*part, bootstrap_values=last, **options))
    return advantages, returns


def check_ends(ends: list[int], length: int) -> None:
    good = ends[0] == 0 and ends[-1] == length and all(a <= b for a, b in itertools.pairwise(ends))
    if not good:
        shown = ends if len(ends) < 12 else f"{len(ends)} numbers from {ends[0]} to {ends[-1]}"
        raise IndexError(f"cu_seqlens: got {shown}, wanted numbers that never fall, from 0 to {length}")


def rollout_advantages(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    token_rewards: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: str = "carry",
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ziegler et al. 2019 (arXiv:1909.08593), equation 2, then `gae`: advantages, returns, KL [B], (mean, 1/std)."""
    mask, scores = mask.bool(), upcast(scores)
    kl = torch.where(mask, kl_estimate(keep(log_probs, mask) - keep(ref_log_probs, mask), kl_estimator), 0.0)
    rewards = -kl_coef * kl if kl_coef else torch.zeros_like(kl)  # monitored alone, an infinite KL is no reward
    if token_rewards is not None:
        rewards = rewards + keep(token_rewards, mask)
    scores = scores if score_clip is None else scores.clamp(-score_clip, score_clip)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).max(dim=1).values if mask.shape[1] else positions.new_zeros(len(mask))
    rewards = torch.where(mask & (positions == last.unsqueeze(1)), rewards + scores.unsqueeze(1), rewards)
    options = {"gamma": gamma, "lam": lam, "mask_mode": mask_mode, "bootstrap_values": bootstrap_values}
    advantages, returns = gae(rewards, values, mask, **options)
    _, mean, rstd, _ = whiten(advantages, mask, True, True, 1e-8)
    return advantages, returns, kl.sum(1), torch.stack([mean, rstd])


def token_weights(mask: Tensor, dtype: torch.dtype, aggregation: str, denominator=None) -> Tensor:
    """What each token's loss is multiplied with before everything is summed. `denominator` replaces the local count."""
    weights = mask.to(dtype)
    if aggregation == "token-mean":
        count = mask.sum()
    else:
        lengths = mask.sum(-1, keepdim=True)
        count = (lengths > 0).sum()
        if aggregation == "seq-mean-token-mean":
            weights = divide(weights, lengths)
    count = count if denominator is None else torch.as_tensor(denominator, device=mask.device)
    return divide(weights, count)


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Schulman et al. 2017, equation 7, as a loss: max(-A r, -A clip(r)). Returns it, r, and where it was clipped."""
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    was_clipped = clipped > unclipped
    was_dual_clipped = torch.zeros_like(was_clipped)
    if dual_clip is not None:  # Ye et al. 2020 (arXiv:1912.09729), equation 5: bounds the loss where A < 0
        bound = -advantages * dual_clip
        was_dual_clipped = (advantages < 0) & (losses > bound)
        losses = torch.where(was_dual_clipped, bound, losses)
    return losses, ratio, was_clipped, was_dual_clipped


def log_ratio_of(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, ratio_level: str) -> Tensor:
    log_ratio = keep(log_probs, mask) - keep(old_log_probs, mask)
    if ratio_level == "sequence":  # GSPO, arXiv:2507.18071, equation 7: the geometric mean over the sequence
        mean = divide(log_ratio.sum(-1, keepdim=True), mask.sum(-1, keepdim=True))
        log_ratio = torch.where(mask, mean, 0.0)
    return log_ratio


class PPOTerms(NamedTuple):
    """What a token's loss was made of, for those who cannot ask autograd for its gradient."""

    advantages: Tensor  # whitened
    ratio: Tensor
    held: Tensor  # by a clip or by the clamp of the log-ratio, so that the surrogate has no slope
    weights: Tensor | float
    shares: Tensor  # what the token's loss was multiplied with
    distance: Tensor | None  # log-ratio to the reference


def ppo_loss(*arguments, **options) -> tuple[Tensor, Tensor]:
    """The loss, and the ten numbers of `fastrlhf.functional.PPOStats`, in that order. Arguments as of `ppo_terms`."""
    return ppo_terms(*arguments, **options)[:2]


def ppo_terms(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    ratio_level: str = "token",
    weights: Tensor | None = None,
    advantage_stats: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str = "token-mean",
    denominator=None,
) -> tuple[Tensor, Tensor, PPOTerms]:
    """The clipped surrogate of Schulman et al. 2017 (arXiv:1707.06347), with its later options."""
    mask = mask.bool()
    advantages = whiten_by(keep(advantages, mask), mask, advantage_stats)
    log_ratio = log_ratio_of(log_probs, old_log_probs, mask, ratio_level)
    held = torch.zeros_like(mask)
    if log_ratio_clamp is not None:
        held = log_ratio.abs() > log_ratio_clamp
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    surrogate, ratio, was_clipped, was_dual_clipped = clipped_surrogate(
        log_ratio, advantages, clip_low, clip_high, dual_clip
    )
    weights = 1.0 if weights is None else keep(weights, mask)
    surrogate = surrogate * weights

    losses, kl, bonus, distance = surrogate, torch.zeros_like(ratio), torch.zeros_like(ratio), None
    if ref_log_probs is not None:
        distance = keep(log_probs, mask) - keep(ref_log_probs, mask)
        kl = kl_estimate(distance, kl_estimator)
    if entropy is not None:
        bonus = keep(entropy, mask)
    # Coefficients of 0 ask for the statistics alone, and 0 * inf would be a nan.
    losses = losses + kl_coef * kl if kl_coef else losses
    losses = losses - entropy_coef * bonus if entropy_coef else losses
    shares = token_weights(mask, losses.dtype, aggregation, denominator)
    loss = (losses * shares).sum()

    with torch.no_grad():
        count = mask.sum().to(loss.dtype)
        mean = lambda x: divide(torch.where(mask, x.to(loss.dtype), 0.0).sum(), count)  # noqa: E731
        stats = [
            (surrogate * shares).sum(),
            mean(residual(log_ratio)),
            mean(was_clipped),
            mean(was_dual_clipped),
            mean(ratio),
        ]
        nobody = torch.zeros_like(loss)
        smallest = torch.where(mask, ratio, INFINITY).min() if ratio.numel() else nobody
        largest = torch.where(mask, ratio, -INFINITY).max() if ratio.numel() else nobody
        stats += [torch.where(count == 0, 0.0, smallest), torch.where(count == 0, 0.0, largest)]
        stats += [mean(bonus), mean(kl), count]
    held = held | was_clipped | was_dual_clipped
    return loss, torch.stack(stats).detach(), PPOTerms(advantages, ratio, held, weights, shares, distance)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = None,
    aggregation: str = "token-mean",
    denominator=None,
) -> tuple[Tensor, Tensor]:
    """1/2 (V - R)^2; with `clip` the larger of that and the same at V held within `clip` of the old value.

    Returns the loss and the five numbers of `fastrlhf.functional.ValueStats`, in that order.
    """
    mask = mask.bool()
    values, returns = keep(values, mask), keep(returns, mask)
    losses = (values - returns) ** 2 / 2
    was_clipped = torch.zeros_like(mask)
    if clip is not None:
        old_values = keep(old_values, mask)
        near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        clipped = (near - returns) ** 2 / 2
        was_clipped = mask & (clipped > losses)
        losses = torch.where(was_clipped | clipped.isnan(), clipped, losses)  # an old value of nan shows
    loss = (losses * token_weights(mask, losses.dtype, aggregation, denominator)).sum()

    with torch.no_grad():
        count = mask.sum().to(loss.dtype)
        mean = lambda x: divide(torch.where(mask, x, 0.0).sum(), count)  # noqa: E731
        spread, unexplained = (mean(deviations(x, mask)[1] ** 2) for x in (returns, returns - values))
        explained = torch.where(spread > 0, 1 - unexplained / torch.where(spread > 0, spread, 1.0), 0.0)
        stats = [mean(was_clipped.to(loss.dtype)), mean(values), mean(returns), explained, count]
    return loss, torch.stack(stats).detach()


# ---------------------------------------------------------------------------------------------- masked statistics


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    mask = mask.bool()
    kept, ones = keep(x, mask), mask
    total, count = (kept.sum(), ones.sum()) if dim is None else (kept.sum(dim), ones.sum(dim))
    return divide(total, count.to(kept.dtype))


def deviations(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of an x that went through `keep`: the mean of what counts, and x - mean where it counts, 0 elsewhere.

    By way of the distances to the first number that counts: equal numbers deviate by exactly 0, however they round.
    """
    first = mask.flatten().int().argmax(0, keepdim=True) if mask.numel() else slice(0)
    pivot = x.detach().flatten()[first].sum()
    distances = torch.where(mask, x - pivot, 0.0)
    step = divide(distances.sum(), mask.sum())
    return pivot + step, torch.where(mask, distances - step, 0.0)


def whiten(
    x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whitened x, mean, 1 / std and count."""
    mask = mask.bool()
    mean, centered = deviations(keep(x, mask), mask)
    count = mask.sum().to(mean.dtype)
    variance = (centered**2).sum() / (count - 1 if unbiased else count).clamp(min=1.0)
    rstd = (variance + eps).rsqrt()
    whitened = centered * rstd
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0), mean, rstd, count


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    return whiten(x, mask, shift_mean, unbiased, eps)[0]


# ---------------------------------------------------------------------------------------------- sequence-wise


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center_coef: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin), plus center_coef (chosen + rejected)^2."""
    chosen, rejected = upcast(chosen), upcast(rejected)
    difference = chosen - rejected
    losses = torch.nn.functional.softplus(-(difference if margin is None else difference - upcast(margin)))
    losses = losses + center_coef * (chosen + rejected) ** 2
    count = torch.full_like(losses.sum(), losses.numel())
    loss = divide(losses.sum(), count)
    with torch.no_grad():
        won = (difference > 0).to(loss.dtype) + (difference == 0).to(loss.dtype) / 2
        stats = [divide(s.sum(), count) for s in (won, difference, chosen, rejected)]
    return loss, torch.stack(stats).detach()


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Rafailov et al. 2023 (arXiv:2305.18290), equation 7, and its relatives.

    Returns the loss and the four numbers of `fastrlhf.functional.DPOStats`, in that order.
    """
    chosen = upcast(policy_chosen) - upcast(ref_chosen)
    rejected = upcast(policy_rejected) - upcast(ref_rejected)
    h, e = chosen - rejected, label_smoothing
    right, wrong = (torch.nn.functional.softplus(x) for x in (-beta * h, beta * h))  # -log sigmoid of each
    if variant == "sigmoid":
        losses = (1 - e) * right + e * wrong
    elif variant == "robust":
        losses = ((1 - e) * right - e * wrong) / (1 - 2 * e)
    elif variant == "hinge":
        losses = torch.relu(1 - beta * h)
    elif variant == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"variant: got {variant!r}, wanted one of 'sigmoid', 'robust', 'hinge', 'ipo'")
    count = torch.full_like(losses.sum(), losses.numel())
    with torch.no_grad():
        won = (h > 0).to(losses.dtype) + (h == 0).to(losses.dtype) / 2
        stats = [divide(s.sum(), count) for s in (won, beta * h, beta * chosen, beta * rejected)]
    return divide(losses.sum(), count), torch.stack(stats).detach()


# ---------------------------------------------------------------------------------------------- rollouts

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
PAGE = 16  # positions in a page of the KV cache


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3): four words of 32 bits, each in an int64, from as many."""

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """The two words of a b, from halves of b: int64 holds no unsigned product of two words."""
        high, low = a * (b >> 16), a * (b & 0xFFFF)
        return (high + (low >> 16)) >> 16 & WORD, (high << 16) + low & WORD

    c, k = counter, key
    for _ in range(10):
        (high0, low0), (high1, low1) = product(PHILOX_MULTIPLIERS[0], c[0]), product(PHILOX_MULTIPLIERS[1], c[2])
        c = (high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0)
        k = tuple(word + step & WORD for word, step in zip(k, PHILOX_KEY_STEPS, strict=True))
    return c


def uniform(seed: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
    """One number in [0, 1) for each, fp64, with 53 random bits."""
    counter = (position & WORD, position >> 32 & WORD, sequence & WORD, sequence >> 32 & WORD)
    a, b, _, _ = philox(counter, (seed & WORD, seed >> 32 & WORD))
    return ((a >> 5) * 2**26 + (b >> 6)).double() / 2**53


def kept_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The tokens [B, V] that the filters leave, as a mask; each filter looks at what the one before it left."""
    x = logits.double()
    kept = x > -INFINITY
    if 0 < top_k < x.shape[-1]:
        kept &= x >= x.topk(top_k, -1).values[:, -1:]
    if top_p < 1:
        p, order = torch.where(kept, x / temperature, -INFINITY).softmax(-1).sort(-1, descending=True)
        before = p.cumsum(-1) - p
        last = (before < top_p).sum(-1, keepdim=True) - 1  # of the fewest that have the mass
        kept &= x >= x.gather(-1, order.gather(-1, last))
    if min_p > 0:
        kept &= x >= x.amax(-1, keepdim=True) + temperature * math.log(min_p)
    return kept


def sample_tokens(
    logits: Tensor,
    *,
    seed: Tensor,
    sequence: Tensor,
    position: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """By inversion of the distribution function, which is summed up in fp64."""
    x = upcast(logits)
    log_p = torch.log_softmax((x - x.amax(-1, keepdim=True)) / (temperature or 1.0), -1)
    if logits.device.type == "cpu" and log_p.amax(-1).isnan().any():
        row = int(log_p.amax(-1).isnan().nonzero()[0])
        raise ValueError(f"logits: row {row} has no distribution (a nan, +inf or nothing but -inf)")
    if temperature == 0:
        tokens = x.argmax(-1)
    else:
        kept = kept_tokens(x, temperature, top_k, top_p, min_p)
        masses = torch.where(kept, (x.double() - x.double().amax(-1, keepdim=True)) / temperature, -INFINITY).exp()
        sums = masses.cumsum(-1)
        wanted = uniform(seed, sequence, position).unsqueeze(-1) * sums[:, -1:]
        # The first one whose sum is greater; only rounding can leave none, and then it is the last that is kept.
        last = (kept * torch.arange(1, kept.shape[-1] + 1, device=kept.device)).amax(-1) - 1
        tokens = torch.minimum((sums <= wanted).sum(-1), last)
    return tokens, log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, position: Tensor) -> Tensor:
    """x [N, heads, d] turned by the angles of its positions (Su et al. 2021), element i with i + r, i < r."""
    if cos is None:
        return x
    r = cos.shape[-1]
    c, s = cos[position].to(x.dtype).unsqueeze(1), sin[position].to(x.dtype).unsqueeze(1)
    a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


def rms_normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def paged_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    sequence: Tensor,
    position: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    scale: float,
    softcap: float = INFINITY,
    eps: float = 1e-6,
    window: int = 0,
) -> Tensor:
    """Every row attends to the positions of its sequence up to its own, over a gathered copy of their pages."""
    kv_heads, d = keys.shape[1], keys.shape[2]
    q, k, v = upcast(qkv).unflatten(-1, (-1, d)).split([qkv.shape[1] // d - 2 * kv_heads, kv_heads, kv_heads], 1)
    q, k = (rotated(rms_normed(x, w, eps), cos, sin, position) for x, w in ((q, q_norm), (k, k_norm)))
    page, slot = pages[sequence, position // PAGE].long(), position % PAGE
    keys[page, :, :, slot] = k.to(keys.dtype)
    values[page, :, slot] = v.to(values.dtype)
    if qkv.shape[0] == 0:
        return q.flatten(1)
    limit = int(position.max()) // PAGE + 1
    table = pages[sequence, :limit].long()
    k = upcast(keys[table]).to(q.dtype).permute(0, 2, 3, 1, 4).flatten(3)  # [N, kv_heads, d, positions]
    v = upcast(values[table]).to(q.dtype).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [N, kv_heads, positions, d]
    scores = scale * torch.einsum("ngrd,ngdl->ngrl", q.unflatten(1, (kv_heads, -1)), k)
    if softcap < INFINITY:
        scores = softcap * torch.tanh(scores / softcap)
    at, now = torch.arange(limit * PAGE, device=qkv.device), position[:, None]
    seen = (at <= now) & (at > now - window) if window else at <= now
    seen = seen[:, None, None]
    v = torch.where(seen[:, 0, :, :, None], v, 0.0)  # what has never been written may be nan
    return torch.einsum("ngrl,ngld->ngrd", scores.masked_fill(~seen, -INFINITY).softmax(-1), v).flatten(1)
