"""The ops as one writes them in plain PyTorch: what `eager` and `torch.compile` run in the tables."""

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    return log_p.gather(-1, tokens[..., None])[..., 0]


def token_log_probs_and_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    return log_p.gather(-1, tokens[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def linear_token_log_probs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return token_log_probs(torch.nn.functional.linear(hidden, weight), tokens)


def linear_token_log_probs_and_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return token_log_probs_and_entropy(torch.nn.functional.linear(hidden, weight), tokens)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor):
    logits = torch.nn.functional.linear(hidden, weight).flatten(0, -2)
    return torch.nn.functional.cross_entropy(logits.float(), tokens.flatten()), ()


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    ref_log_p = torch.log_softmax(ref_logits, -1, dtype=torch.float32)
    return (log_p.exp() * (log_p - ref_log_p)).sum(-1)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """This and the next two as transformers write them for Llama."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)


def kl_divergence(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """k3."""
    log_ratio = ref_log_probs - log_probs
    return log_ratio.exp() - 1 - log_ratio


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Masked tokens are skipped as if they did not exist."""
    counts = mask.to(values.dtype)
    next_value, last = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(values.shape[1])):
        m = counts[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        last = m * (delta + gamma * lam * last) + (1 - m) * last
        next_value = m * values[:, t] + (1 - m) * next_value
        advantages.append(last * m)
    advantages = torch.stack(advantages[::-1], 1)
    return advantages, (advantages + values) * counts


def gae_packed(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Unpacks, pads, runs `gae` and packs again."""
    lengths = cu_seqlens.diff().tolist()
    rewards, values = (torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values))
    steps = torch.arange(rewards.shape[1], device=rewards.device)
    mask = steps < cu_seqlens.diff()[:, None]
    return tuple(x[mask] for x in gae(rewards, values, mask, gamma, lam))


def rollout_advantages(scores, log_probs, ref_log_probs, values, mask, kl_coef, gamma, lam):
    """KL penalty in the reward, the score at the last token that counts, GAE, whitened advantages."""
    rewards = -kl_coef * (log_probs - ref_log_probs)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    rewards[torch.arange(len(last), device=last.device), last] += scores
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return masked_whiten(advantages, mask), returns


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    counts = mask.to(x.dtype)
    n = counts.sum()
    mean = (x * counts).sum() / n
    variance = ((x - mean).square() * counts).sum() / (n - 1)
    return (x - mean) * (variance + 1e-8).rsqrt() * counts


def ppo_loss(log_probs, old_log_probs, advantages, mask, ref_log_probs, kl_coef):
    """Clipped policy loss with a KL penalty (k3), and the metrics that trainers log."""
    counts = mask.to(log_probs.dtype)
    n = counts.sum()
    log_ratio = (log_probs - old_log_probs).clamp(-20, 20)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    kl = kl_divergence(log_probs, ref_log_probs)
    loss = ((torch.maximum(unclipped, clipped) + kl_coef * kl) * counts).sum() / n
    with torch.no_grad():
        clip_fraction = ((clipped > unclipped) * counts).sum() / n
        approx_kl = ((ratio - 1 - log_ratio) * counts).sum() / n
        mean_kl, mean_ratio = (kl * counts).sum() / n, (ratio * counts).sum() / n
    return loss, (clip_fraction, approx_kl, mean_kl, mean_ratio)


def linear_ppo_loss(hidden, weight, tokens, old_log_probs, advantages, mask):
    """Clipped policy loss, and the metrics that trainers log: the entropy too, without a gradient."""
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight), -1, dtype=torch.float32)
    log_probs = log_p.gather(-1, tokens[..., None])[..., 0]
    loss, metrics = ppo_loss(log_probs, old_log_probs, advantages, mask, old_log_probs, 0.0)
    with torch.no_grad():
        entropy = masked_mean(-(log_p.exp() * log_p).sum(-1), mask)
    return loss, (*metrics, entropy)


def value_loss(values, old_values, returns, mask, clip):
    counts = mask.to(values.dtype)
    n = counts.sum()
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors, clipped_errors = (values - returns).square(), (clipped - returns).square()
    loss = 0.5 * (torch.maximum(errors, clipped_errors) * counts).sum() / n
    with torch.no_grad():
        clip_fraction = ((clipped_errors > errors) * counts).sum() / n
    return loss, (clip_fraction,)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    counts = mask.to(x.dtype)
    return (x * counts).sum() / counts.sum()


def pairwise_reward_loss(chosen: Tensor, rejected: Tensor):
    difference = chosen - rejected
    accuracy = (difference.detach() > 0).float().mean()
    return -torch.nn.functional.logsigmoid(difference).mean(), (accuracy,)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    return loss, ((chosen.detach() > rejected.detach()).float().mean(),)
