"""Every op once more in plain PyTorch: the oracle of the tests, and what runs where no kernel exists.

Written to be read beside the papers, not to be fast. Everything is differentiable by autograd, computes in fp64 when it
is given fp64 and in fp32 otherwise, and reads nothing that stands under a zero of the mask. Arguments are described in
`fastrlhf.functional`.
"""

import torch
from torch import Tensor

IGNORED = -100
INFINITY = float("inf")


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """x where it counts, 0 elsewhere. A selection and not a product: 0 * nan is nan."""
    return torch.where(mask, upcast(x), 0.0)


def divide(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 where nothing was counted."""
    return torch.where(count == 0, 0.0, total / torch.where(count == 0, 1.0, count))


# ---------------------------------------------------------------------------------------------- vocabulary-wide


def log_softmax(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count, log softmax(z / T), and its normaliser log sum exp(z / T)."""
    counts = tokens != IGNORED
    z = torch.where(counts.unsqueeze(-1), upcast(logits), 0.0) / temperature
    return counts, torch.log_softmax(z, dim=-1), torch.where(counts, torch.logsumexp(z, dim=-1), 0.0)


def pick(log_p: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    index = torch.where(counts, tokens, 0).unsqueeze(-1)
    return torch.where(counts, log_p.gather(-1, index).squeeze(-1), 0.0)


def entropy_of(log_p: Tensor, counts: Tensor) -> Tensor:
    """H = -sum p log p, with 0 log 0 = 0."""
    surprise = torch.where(log_p == -INFINITY, 0.0, log_p)
    return torch.where(counts, -(log_p.exp() * surprise).sum(-1), 0.0)


def token_log_probs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    counts, log_p, _ = log_softmax(logits, tokens, temperature)
    return pick(log_p, tokens, counts)


def token_log_probs_and_entropy(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    counts, log_p, _ = log_softmax(logits, tokens, temperature)
    return pick(log_p, tokens, counts), entropy_of(log_p, counts)


def token_log_probs_and_entropy_backward(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    tokens: Tensor,
    logsumexp: Tensor,
    entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """dz = (1/T) [ g (delta - p) - h p (log p + H) ]: what every vocabulary kernel ends in."""
    counts = tokens != IGNORED
    z = torch.where(counts.unsqueeze(-1), upcast(logits), 0.0) / temperature
    log_p = z - logsumexp.unsqueeze(-1)
    p = log_p.exp()
    dz = torch.zeros_like(p)
    if grad_log_probs is not None:
        delta = torch.zeros_like(p).scatter_(-1, torch.where(counts, tokens, 0).unsqueeze(-1), 1.0)
        dz = dz + grad_log_probs.unsqueeze(-1) * (delta - p)
    if grad_entropy is not None:
        surprise = torch.where(log_p == -INFINITY, 0.0, log_p)
        dz = dz - grad_entropy.unsqueeze(-1) * p * (surprise + entropy.unsqueeze(-1))
    return torch.where(counts.unsqueeze(-1), dz / temperature, 0.0).to(logits.dtype)


# ---------------------------------------------------------------------------------------------- token-wise


def kl_estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """Estimates of KL(p || q) from a token sampled from p, given log p - log q. Schulman 2020, "Approximating KL"."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    if estimator == "k3":
        # Impossible under p, possible under q: infinite, and not inf - inf.
        return torch.where(log_ratio == -INFINITY, INFINITY, torch.expm1(-log_ratio) + log_ratio)
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


def aggregate(losses: Tensor, mask: Tensor, aggregation: str, denominator=None) -> Tensor:
    """One number from per-token losses that are 0 where the mask is. `denominator` replaces the local count."""
    if aggregation == "token-mean":
        total, count = losses.sum(), mask.sum()
    else:
        lengths = mask.sum(-1)
        per_sequence = losses.sum(-1)
        if aggregation == "seq-mean-token-mean":
            per_sequence = divide(per_sequence, lengths.to(losses.dtype))
        total, count = per_sequence.sum(), (lengths > 0).sum()
    count = count if denominator is None else torch.as_tensor(denominator, device=losses.device)
    return divide(total, count.to(losses.dtype))


def ppo_loss(
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
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of Schulman et al. 2017 (arXiv:1707.06347), equation 7, as a loss, with its later options.

    Returns the loss and the ten numbers of `fastrlhf.functional.PPOStats`, in that order.
    """
    mask = mask.bool()
    log_probs, old_log_probs = keep(log_probs, mask), keep(old_log_probs, mask)
    advantages = keep(advantages, mask)
    if advantage_stats is not None:
        mean, rstd = advantage_stats.to(advantages.dtype)
        advantages = torch.where(mask, (advantages - mean) * rstd, 0.0)

    log_ratio = log_probs - old_log_probs
    if ratio_level == "sequence":  # GSPO, arXiv:2507.18071, equation 7: the geometric mean over the sequence
        mean_log_ratio = divide(log_ratio.sum(-1, keepdim=True), mask.sum(-1, keepdim=True).to(log_ratio.dtype))
        log_ratio = torch.where(mask, mean_log_ratio, 0.0)
    if log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = log_ratio.exp()

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.maximum(unclipped, clipped)
    was_clipped = mask & (clipped > unclipped)
    was_dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:  # Ye et al. 2020 (arXiv:1912.09729), equation 5: bounds the loss where A < 0
        bound = -advantages * dual_clip
        was_dual_clipped = mask & (advantages < 0) & (surrogate > bound)
        surrogate = torch.where(was_dual_clipped, bound, surrogate)
    if weights is not None:
        surrogate = surrogate * keep(weights, mask)
    surrogate = torch.where(mask, surrogate, 0.0)

    losses = surrogate
    kl = torch.zeros_like(log_probs)
    if ref_log_probs is not None:
        kl = torch.where(mask, kl_estimate(log_probs - keep(ref_log_probs, mask), kl_estimator), 0.0)
        losses = losses + kl_coef * kl
    if entropy is not None:
        entropy = keep(entropy, mask)
        losses = losses - entropy_coef * entropy
    loss = aggregate(losses, mask, aggregation, denominator)

    with torch.no_grad():
        count = mask.sum().to(loss.dtype)
        zero = torch.zeros_like(loss)
        masked_in = (lambda x, fill: torch.where(mask, x, fill)) if mask.numel() else None
        stats = [
            aggregate(surrogate, mask, aggregation, denominator),
            divide(torch.where(mask, torch.expm1(log_ratio) - log_ratio, 0.0).sum(), count),
            divide(was_clipped.sum().to(loss.dtype), count),
            divide(was_dual_clipped.sum().to(loss.dtype), count),
            divide(torch.where(mask, ratio, 0.0).sum(), count),
            torch.where(count == 0, 0.0, masked_in(ratio, INFINITY).min()) if masked_in else zero,
            torch.where(count == 0, 0.0, masked_in(ratio, -INFINITY).max()) if masked_in else zero,
            zero if entropy is None else divide(entropy.sum(), count),
            divide(kl.sum(), count),
            count,
        ]
    return loss, torch.stack(stats).detach()


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
        losses = torch.where(was_clipped, clipped, losses)
    loss = aggregate(losses, mask, aggregation, denominator)

    with torch.no_grad():
        count = mask.sum().to(loss.dtype)
        mean = lambda x: divide(torch.where(mask, x, 0.0).sum(), count)  # noqa: E731
        error = returns - values
        spread = mean((returns - mean(returns)) ** 2)
        unexplained = mean((error - mean(error)) ** 2)
        explained = torch.where(spread > 0, 1 - unexplained / torch.where(spread > 0, spread, 1.0), 0.0)
        stats = [mean(was_clipped.to(loss.dtype)), mean(values), mean(returns), explained, count]
    return loss, torch.stack(stats).detach()


# ---------------------------------------------------------------------------------------------- masked statistics


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    mask = mask.bool()
    kept, ones = keep(x, mask), mask
    total, count = (kept.sum(), ones.sum()) if dim is None else (kept.sum(dim), ones.sum(dim))
    return divide(total, count.to(kept.dtype))


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    mask = mask.bool()
    x = keep(x, mask)
    count = mask.sum().to(x.dtype)
    mean = divide(x.sum(), count)
    squares = torch.where(mask, (x - mean) ** 2, 0.0).sum()
    variance = squares / (count - 1 if unbiased else count).clamp(min=1.0)
    whitened = (x - mean) * (variance + eps).rsqrt()
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


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
