"""What bench/gpu_audit.py launches of kernels/triton/lm_head.py."""

import functools
import math
from unittest import mock

import torch

K2 = 1
CHUNK_BYTES = 1 << 20
# Tokens, hidden size, vocabulary, temperature, softcap. Several chunks; odd sizes; the least there can be.
CASES = ((192, 16, 4096, 1.0, 30.0), (70, 7, 50_257, 0.7, 15.0), (3, 8, 1, 2.0, 0.1))
HEADS = {"": {}, "[bias, softcap]": {"bias": True, "softcap": True}}
EVERYTHING = ("weights", "advantage_stats", "ref_log_probs", "denominator")  # that ppo_loss may be given


def bytes_needed(dtype):
    """{op: {kernel: [(bytes read, bytes written) for a column, ...]}}."""
    needed = {}
    for name, read in (("", dtype.itemsize), ("[bias, softcap]", 2 * dtype.itemsize)):
        first, second = (read, 0), (read, dtype.itemsize)
        needed["linear_token_log_probs" + name] = {"_forward_kernel": [first]}
        needed["linear_token_log_probs_backward" + name] = {"_backward_kernel": [second]}
        needed["linear_cross_entropy" + name] = {"_loss_kernel": [first, second]}
        needed["linear_ppo_loss" + name] = {"_loss_kernel": [first, second]}
    needed["linear_token_log_probs_backward[no entropy]"] = needed["linear_token_log_probs_backward"]
    needed["linear_ppo_loss[everything]"] = needed["linear_ppo_loss"]
    needed["linear_token_log_probs_backward[fused]"] = {"_backward_kernel": [(4, dtype.itemsize)]}
    needed["linear_ppo_loss[fused]"] = {"_loss_kernel": [(4, 0), (4, dtype.itemsize)]}
    return needed


def heads(dtype, bias=False, softcap=False):
    """Arguments of linear_token_log_probs."""
    for n, H, V, temperature, cap in CASES:
        skip = V % 2  # odd ones do not start at a 16-byte boundary
        bias_or_none = torch.zeros(V + skip, dtype=dtype)[skip:] if bias else None
        numbers = torch.tensor([temperature, cap if softcap else math.inf])
        tokens = torch.zeros(n, dtype=torch.int64)
        yield torch.zeros(n, H, dtype=dtype), torch.zeros(V, H, dtype=dtype), bias_or_none, tokens, numbers, CHUNK_BYTES


def ppo(ops, inputs, given=()):
    tokens = inputs[3]
    optional = {
        "weights": torch.zeros(tokens.shape),
        "advantage_stats": torch.ones(2),
        "ref_log_probs": torch.zeros(tokens.shape),
        "denominator": torch.tensor(3.0),
    }
    weights, stats, ref, denominator = (x if name in given else None for name, x in optional.items())
    x, mask = torch.zeros(tokens.shape), torch.ones(tokens.shape, dtype=torch.bool)
    options = torch.tensor([0.2, 0.3, 3.0, 20.0, 0.01, 0.05])
    constants = (x, x, mask, weights, stats, ref, denominator, options)
    return ops.linear_ppo_loss, (*inputs, *constants, K2, 0, True, True, inputs[2] is not None, False)


def fused(ops, function, args):
    """The call, by the other strategy: logits in fp32."""

    @functools.wraps(function)
    def call(*args):
        with mock.patch.object(ops, "STRATEGY", "fused"):
            return function(*args)

    return call, args


def launches(ops, dtype):
    """{op: [(function, args) that differ in all that must not matter]}."""
    calls = {}
    for name, options in HEADS.items():
        for inputs in heads(dtype, **options):
            needs = (True, True, inputs[2] is not None, False)
            x = torch.zeros(inputs[3].shape)
            results = torch.zeros(len(x), 2), x, *inputs[4:], *needs
            head = {
                "linear_token_log_probs": (ops.linear_token_log_probs, inputs),
                "linear_token_log_probs_backward": (
                    ops.linear_token_log_probs_backward,
                    (x, x, *inputs[:4], *results),
                ),
                "linear_cross_entropy": (ops.linear_cross_entropy, (*inputs, None, *needs)),
                "linear_ppo_loss": ppo(ops, inputs),
            }
            for op, call in head.items():
                calls.setdefault(op + name, []).append(call)
            if not name:
                call = (ops.linear_token_log_probs_backward, (x, None, *inputs[:4], *results))
                calls.setdefault("linear_token_log_probs_backward[no entropy]", []).append(call)
                calls.setdefault("linear_ppo_loss[everything]", []).append(ppo(ops, inputs, EVERYTHING))
                for op in ("linear_token_log_probs_backward", "linear_ppo_loss"):
                    calls.setdefault(f"{op}[fused]", []).append(fused(ops, *head[op]))
    return calls
