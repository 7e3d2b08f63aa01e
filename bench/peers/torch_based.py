"""Ourselves, and plain PyTorch: eager and under torch.compile."""

from __future__ import annotations

from importlib import metadata

import torch

from fastrlhf.bench import eager
from fastrlhf.bench.peers.base import BETA, GAMMA, KL_COEF, LAM, VALUE_CLIP, Peer, Run


def ours() -> Peer:
    from fastrlhf import functional as F

    ops = {
        "token_log_probs": lambda logits, tokens: F.token_log_probs(logits, tokens),
        "token_log_probs_and_entropy": lambda logits, tokens: F.token_log_probs_and_entropy(logits, tokens),
        "token_log_probs in place": lambda logits, tokens: F.token_log_probs(logits, tokens, inplace_backward=True),
        "token_log_probs_and_entropy in place": lambda logits, tokens: F.token_log_probs_and_entropy(
            logits, tokens, inplace_backward=True
        ),
        "linear_token_log_probs": lambda *head: F.linear_token_log_probs(*head),
        "linear_token_log_probs_and_entropy": lambda *head: F.linear_token_log_probs_and_entropy(*head),
        "linear_cross_entropy": lambda *head: F.linear_cross_entropy(*head),
        "linear_ppo_loss": lambda *inputs: F.linear_ppo_loss(*inputs),
        "full_kl": lambda logits, ref_logits: F.full_kl(logits, ref_logits),
        "kl_divergence": lambda log_probs, ref: F.kl_divergence(log_probs, ref, estimator="k3"),
        "gae": lambda rewards, values, mask: F.gae(rewards, values, mask, gamma=GAMMA, lam=LAM),
        "gae_packed": lambda rewards, values, cu: F.gae_packed(rewards, values, cu, gamma=GAMMA, lam=LAM),
        "rollout_advantages": lambda scores, log_probs, ref, values, mask: F.rollout_advantages(
            scores, log_probs, ref, values, mask, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM
        ),
        "masked_mean": lambda x, mask: F.masked_mean(x, mask),
        "masked_whiten": lambda x, mask: F.masked_whiten(x, mask),
        "ppo_loss": lambda log_probs, old, advantages, mask, ref: F.ppo_loss(
            log_probs, old, advantages, mask, ref_log_probs=ref, kl_coef=KL_COEF
        ),
        "value_loss": lambda values, old, returns, mask: F.value_loss(values, old, returns, mask, clip=VALUE_CLIP),
        "pairwise_reward_loss": lambda chosen, rejected: F.pairwise_reward_loss(chosen, rejected),
        "dpo_loss": lambda *log_probs: F.dpo_loss(*log_probs, beta=BETA),
        "rms_norm": lambda x, weight: F.rms_norm(x, weight),
        "swiglu": lambda gate, up: F.swiglu(gate, up),
        "rotary_embedding": lambda x, cos, sin: F.rotary_embedding(x, cos, sin),
    }
    return Peer(metadata.version("fastrlhf"), {name: Run(work) for name, work in ops.items()})


def eager_pytorch() -> Peer:
    ops = {
        name: Run(getattr(eager, name))
        for name in (
            *("token_log_probs", "token_log_probs_and_entropy", "full_kl", "kl_divergence", "masked_mean"),
            *("masked_whiten", "pairwise_reward_loss", "linear_token_log_probs", "linear_token_log_probs_and_entropy"),
            *("linear_cross_entropy", "linear_ppo_loss", "rms_norm", "swiglu", "rotary_embedding"),
        )
    }
    ops["gae"] = Run(lambda *inputs: eager.gae(*inputs, GAMMA, LAM))
    ops["gae_packed"] = Run(lambda *inputs: eager.gae_packed(*inputs, GAMMA, LAM))
    ops["rollout_advantages"] = Run(lambda *inputs: eager.rollout_advantages(*inputs, KL_COEF, GAMMA, LAM))
    ops["ppo_loss"] = Run(lambda *inputs: eager.ppo_loss(*inputs, KL_COEF))
    ops["value_loss"] = Run(lambda *inputs: eager.value_loss(*inputs, VALUE_CLIP))
    ops["dpo_loss"] = Run(lambda *inputs: eager.dpo_loss(*inputs, BETA))
    return Peer(torch.__version__, ops)


def torch_compile() -> Peer:
    loops = ("gae", "gae_packed", "rollout_advantages")
    ops = {name: Run(run.work, compiled=True) for name, run in eager_pytorch().ops.items() if name not in loops}
    return Peer(torch.__version__, ops, dict.fromkeys(loops, "a Python loop over the tokens, which it would unroll"))
