"""Decoding steps as CUDA graphs: a step of many small kernels takes longer to launch than to run."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.rollout.decoder import Decoder


def padded_size(rows: int) -> int:
    """The size of the graph that takes so many rows: powers of two up to 16, then multiples of 16."""
    return 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16


class StepGraphs:
    """Calls of a decoder with one row a sequence, captured once for each padded size of the batch.

    pages: the page table, int32 on the GPU, which stays where it is; its last row is the padding's, which writes there.
    """

    def __init__(self, decoder: Decoder, pages: Tensor) -> None:
        self.decoder, self.pages = decoder, pages
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, tokens: list[int], slots: list[int], positions: list[int]) -> Tensor:
        """As the decoder's, [rows, H]; overwritten by the next call of the same padded size."""
        rows = len(tokens)
        size = padded_size(rows)
        if size not in self.graphs:
            self.graphs[size] = self._capture(size)
        graph, inputs, x = self.graphs[size]
        rest = size - rows
        spare = len(self.pages) - 1
        step = [tokens + [0] * rest, slots + [spare] * rest, positions + [0] * rest]
        inputs.copy_(torch.tensor(step), non_blocking=True)
        graph.replay()
        return x[:rows]

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        inputs = torch.zeros(3, size, dtype=torch.long, device=self.pages.device)
        inputs[1] = len(self.pages) - 1
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.decoder(*inputs, self.pages)  # compiles what has to be, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            x = self.decoder(*inputs, self.pages)
        return graph, inputs, x
