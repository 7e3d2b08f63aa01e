"""Liger: https://github.com/linkedin/Liger-Kernel."""

from __future__ import annotations

import importlib
from importlib import metadata

import torch

from fastrlhf.bench.peers.base import CLIP, Peer, Run

IGNORED = -100


def liger() -> Peer:
    from_hidden = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    scaled = from_hidden.LigerFusedLinearScaledCrossEntropyFunction
    chunked = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo").LigerFusedLinearPPOBase
    grpo = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    grpo = grpo(beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP)

    def flat(hidden, weight, tokens):
        return hidden.flatten(0, -2), weight, tokens.flatten()

    def with_entropy(hidden, weight, tokens):
        nll, entropy = scaled.apply(*flat(hidden, weight, tokens), 1.0, IGNORED, 1, True)
        return -nll.view_as(tokens), entropy.view_as(tokens)

    def sequences(hidden, weight, tokens, old, advantages, mask):
        return hidden, weight, tokens, mask.float(), advantages[:, 0], None, None, old

    ops = {
        "linear_token_log_probs": Run(chunked.chunk_forward, note="that of its GRPO loss"),
        "linear_token_log_probs_and_entropy": Run(with_entropy),
        "linear_ppo_loss": Run(grpo, sequences, "one advantage a sequence, without the entropy"),
    }
    cannot = {"token_log_probs_and_entropy": "no entropy", "ppo_loss": "one advantage a sequence, not a token"}
    version = metadata.version("liger-kernel")
    if not torch.cuda.is_available():
        cannot |= dict.fromkeys(("token_log_probs", "linear_cross_entropy"), "in Triton, for GPUs")
        return Peer(version, ops, cannot)
    cross_entropy = importlib.import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    linear = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    in_forward = "its gradient is made in the forward pass"
    ops |= {
        "token_log_probs": Run(
            lambda logits, tokens: -cross_entropy.apply(logits, tokens, None, IGNORED, 0.0, 0.0, "none")[0],
            note=in_forward,
        ),
        "linear_token_log_probs": Run(lambda *head: -scaled.apply(*flat(*head)).view_as(head[2])),
        "linear_cross_entropy": Run(lambda *head: (linear.apply(*flat(*head))[0], ()), note=in_forward),
    }
    return Peer(version, ops, cannot)
