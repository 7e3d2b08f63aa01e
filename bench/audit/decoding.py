"""What bench/gpu_audit.py launches of kernels/triton/decoding.py."""

import math

import torch

DTYPES = (torch.float32, torch.bfloat16)  # fp16 takes the same steps as bf16
# Query heads, key heads, head_dim: those of Llama 3, Qwen2 0.5B, GPT-2 and Gemma.
SHAPES = {"": (32, 8, 128), "[group 7]": (14, 2, 64), "[group 1]": (12, 12, 64), "[d 256]": (8, 1, 256)}
WITH_ALL_OPTIONS = (6, 2, 80)  # d lies between powers of two, and so do the heads of a group


def calls(ops, heads, kv_heads, d, dtype, plain):
    """Few rows and many, pages for few positions and many, a window or none, odd strides and addresses."""
    for n, table, rotary, window, skip in ((1, 256, d // 2, 0, 0), (700, 256, 8, 128, 8), (3, 7, 1, 1000, 3)):
        qkv = torch.zeros(n, (heads + 2 * kv_heads) * d + skip, dtype=dtype)[:, skip:]
        keys, values = torch.zeros(4, kv_heads, d, 16, dtype=dtype), torch.zeros(4, kv_heads, 16, d, dtype=dtype)
        pages = torch.zeros(5, table, dtype=torch.int32)
        place = torch.zeros(n, dtype=torch.int64)
        angles, norm = torch.zeros(4096, rotary), torch.zeros(d + skip)[skip:]
        optional = (None,) * 4 if plain else (angles, angles, norm, norm)
        numbers = torch.tensor([d**-0.5, math.inf if plain else 30.0 + skip, 1e-6])
        yield ops.paged_attention, (qkv, keys, values, pages, place, place, *optional, numbers, window)


def launches(ops, dtype):
    """{op: [(function, args) that differ in all that must not matter]}."""
    every = {f"paged_attention{name}": list(calls(ops, *shape, dtype, True)) for name, shape in SHAPES.items()}
    return every | {"paged_attention[all options]": list(calls(ops, *WITH_ALL_OPTIONS, dtype, False))}
