"""What stands between the matrix products of a decoder layer, forward and backward; on CPU, where it has kernels.

The frameworks that the other ops are compared with have none of it: they leave it to transformers, whose code `eager`
is, or on GPU to Liger.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastrlhf.bench import limits
from fastrlhf.bench.contests import forward_backward, timed_forward_backward
from fastrlhf.bench.measure import Limit, Row
from fastrlhf.bench.peers.base import Run
from fastrlhf.bench.settings import FLOATS, Setting, generator

# Written down before measuring.
RMS_NORM = {"limit": 2.0, "eager": 5, "torch.nn.functional": 2}
SWIGLU = {"limit": 1.6, "eager": 1.5}
ROTARY = {"limit": 2.0, "eager": 5}


def rows(setting: Setting) -> Iterator[Row]:
    if not setting.on_cpu:
        return
    for sizes in setting.layers:
        for dtype in setting.dtypes:
            yield from _rows(setting, dtype, *sizes)


def _rows(setting: Setting, dtype: str, tokens: int, hidden: int, inner: int, heads: int) -> Iterator[Row]:
    random, size = generator(setting), hidden // heads

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(FLOATS[dtype])

    def row(op: str, inputs: tuple, leaves: list[int], grad: torch.Tensor, targets: dict, more: dict) -> Row:
        contenders = forward_backward(op, inputs, leaves, [grad]) | more
        read = sum(inputs[i].numel() for i in leaves)
        what = f"{'inputs' if len(leaves) > 1 else 'input'} read twice, result and gradients written, its gradient read"
        floats = 3 * read + 2 * grad.numel()
        loops = limits.streams(floats * grad.element_size() // 4 // 5, reads=3, writes=2)
        return Row(
            op,
            f"{op}, forward + backward",
            f"{tokens} × {grad.numel() // tokens}",
            dtype,
            {name: x for name, x in contenders.items() if not isinstance(x, str)},
            Limit(what, floats * grad.element_size(), loops),
            targets,
        )

    x, weight = drawn(tokens, hidden), drawn(hidden)
    grad, torchs = drawn(tokens, hidden), Run(lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-6))
    more = {"torch.nn.functional": timed_forward_backward(torchs, torchs.work, (x, weight), [0, 1], [grad])}
    yield row("rms_norm", (x, weight), [0, 1], grad, RMS_NORM, more)
    yield row("swiglu", (drawn(tokens, inner), drawn(tokens, inner)), [0, 1], drawn(tokens, inner), SWIGLU, {})
    # Queries as a linear layer makes them: a token's heads beside each other.
    queries, grad = (drawn(1, tokens, heads, size).transpose(1, 2) for _ in range(2))
    turns = torch.randn(1, tokens, size, generator=random)
    angles = [x.to(FLOATS[dtype]) for x in (turns.cos(), turns.sin())]
    yield row("rotary_embedding", (queries, *angles), [0], grad, ROTARY, {})
