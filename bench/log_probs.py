"""From logits: log-probabilities, with and without entropy, and the exact KL divergence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastrlhf.bench import limits
from fastrlhf.bench.contests import forward, logits_in_place
from fastrlhf.bench.measure import Limit, Row
from fastrlhf.bench.settings import FLOATS, Setting, generator, sizes

LOG_PROBS, WITH_ENTROPY = "token_log_probs", "token_log_probs_and_entropy"
TITLES = {LOG_PROBS: "log-prob", WITH_ENTROPY: "log-prob + entropy"}

# Written down before measuring: at most so many times the limit, at least so many times faster than a peer.
FORWARD = {
    ("fp32", LOG_PROBS): {"limit": 1.20, "torch.compile": 2.4, "TRL": 5.5, "verl": 5.5},
    ("fp32", WITH_ENTROPY): {"limit": 1.30, "torch.compile": 3.5, "TRL": 25, "verl": 25},
    ("bf16", LOG_PROBS): {"limit": 1.9, "torch.compile": 2.4, "TRL": 3, "verl": 3},
    ("bf16", WITH_ENTROPY): {"limit": 1.9, "torch.compile": 4, "TRL": 15, "verl": 15},
}
IN_PLACE = {
    ("fp32", WITH_ENTROPY, 49_152): {"limit": 1.4, "torch.compile": 3.5, "TRL": 10, "verl": 10, "OpenRLHF": 10},
}
MEMORY = {"extra_mib": 1.0}
# On an H100: TRL's Triton kernel takes 0.89 ms for the forward pass, and memory allows 0.74 ms and 1.49 ms.
ON_GPU = {
    ("forward", WITH_ENTROPY, 8192, 151_936): {"ms": 0.85, "TRL Triton": 1.0},
    ("backward", WITH_ENTROPY, 8192, 151_936): {"ms": 1.70, "TRL Triton": 1.0},
}


def rows(setting: Setting) -> Iterator[Row]:
    for vocabulary in setting.vocabularies:
        for dtype in setting.dtypes:
            yield from _rows(setting, dtype, vocabulary)


def _rows(setting: Setting, dtype: str, vocabulary: int) -> Iterator[Row]:
    random, shape = generator(setting), (setting.rows, vocabulary)
    on_device = {"generator": random, "device": setting.device}
    logits = (3 * torch.randn(shape, **on_device)).to(FLOATS[dtype])
    tokens = torch.randint(vocabulary, shape[:1], **on_device)
    grads = [torch.randn(shape[0], **on_device) for _ in range(2)]
    size = logits.numel() * logits.element_size()

    for op, title in TITLES.items():
        yield Row(
            op,
            f"{title}, forward",
            sizes(*shape),
            dtype,
            forward(op, (logits, tokens)),
            Limit("logits read once", size, limits.read_once(logits) if setting.on_cpu else None),
            _targets(setting, "forward", dtype, op, shape) | MEMORY,
        )
    for op, title in TITLES.items():
        wanted = grads[: 1 + (op == WITH_ENTROPY)]
        yield Row(
            op,
            f"{title}, forward + backward in place",
            sizes(*shape),
            dtype,
            logits_in_place(op, logits, tokens, wanted),
            Limit("logits read, read again, written", 3 * size, _in_place(setting, logits)),
            _targets(setting, "in place", dtype, op, shape) | MEMORY,
        )
        if not setting.on_cpu:
            yield Row(
                op,
                f"{title}, backward alone, in place",
                sizes(*shape),
                dtype,
                logits_in_place(op, logits, tokens, wanted, only_backward=True),
                Limit("logits read and written", 2 * size),
                _targets(setting, "backward", dtype, op, shape) | MEMORY,
            )
    ref_logits = (logits + torch.randn(shape, **on_device)).to(FLOATS[dtype])
    yield Row(
        "full_kl",
        "exact KL of two policies, forward",
        sizes(*shape),
        dtype,
        forward("full_kl", (logits, ref_logits)),
        Limit("both logits read once", 2 * size, limits.read_once(logits, ref_logits) if setting.on_cpu else None),
        {"limit": {"fp32": 1.4, "bf16": 2.2}[dtype], "torch.compile": 2.0} | MEMORY,
    )


def _in_place(setting: Setting, logits: Tensor):
    return limits.read_read_write(logits) if setting.on_cpu else None


def _targets(setting: Setting, what: str, dtype: str, op: str, shape: tuple[int, int]) -> dict[str, float]:
    if not setting.on_cpu:
        return ON_GPU.get((what, op, *shape), {})
    return FORWARD[dtype, op] if what == "forward" else IN_PLACE.get((dtype, op, shape[1]), {})
