"""What bench/gpu_audit.py launches of kernels/triton/lm_head_fused.py."""

import math

import torch

# Tokens, hidden size, vocabulary, temperature, softcap; the last ones are less than a tile.
ALIGNED = ((300, 64, 50_257, 1.0, 30.0), (17, 24, 4096, 0.7, 15.0), (1, 16, 1, 2.0, 0.1))
ODD = ((300, 65, 5001, 1.0, 30.0), (17, 7, 4096, 0.7, 15.0), (1, 1, 1, 2.0, 0.1))
HEADS = {
    "": (ALIGNED, False, False),
    "[bias]": (ALIGNED, True, False),
    "[softcap]": (ALIGNED, False, True),
    "[bias, softcap]": (ALIGNED, True, True),
    "[unaligned]": (ODD, False, False),
    "[unaligned, bias, softcap]": (ODD, True, True),
}


def inputs(cases, bias, softcap, dtype):
    for n, H, V, temperature, cap in cases:
        skip = n % 2  # a bias may lie anywhere
        numbers = torch.tensor([temperature, cap if softcap else math.inf])
        bias_or_none = torch.zeros(V + skip, dtype=dtype)[skip:] if bias else None
        tokens = torch.zeros(n, dtype=torch.int64)
        yield torch.zeros(n, H, dtype=dtype), torch.zeros(V, H, dtype=dtype), bias_or_none, tokens, numbers


def launches(ops, dtype):
    """{op: [(function, args) that differ in all that must not matter]}."""
    return {
        f"linear_token_log_probs{name}": [(ops.linear_token_log_probs, args) for args in inputs(*head, dtype)]
        for name, head in HEADS.items()
    }
