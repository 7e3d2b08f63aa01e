"""The physical limits, measured beside the contenders.

What plain C++ loops need to move the bytes (limits.cpp), for the LM head what its bare matrix products take, and for
decoding the peak of a matrix product.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastrlhf.bench.measure import Limit

FLAGS = ["-O3", "-ffast-math", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC"]


@functools.cache
def library() -> ctypes.CDLL:
    """limits.cpp, compiled for this processor. Raises OSError without a compiler or when it fails."""
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        raise OSError(f"no C++ compiler {compiler[0]!r} for the loops that measure the limits; install g++ or set CXX")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "limits.so"
        source = Path(__file__).with_name("limits.cpp")
        done = subprocess.run([*compiler, *FLAGS, source, "-o", target], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"limits.cpp does not compile: {done.stderr.strip()[-500:]}")
        loaded = ctypes.CDLL(str(target))
    for name in ("read_once", "read_read_write", "streams"):
        getattr(loaded, name).restype = ctypes.c_float
    return loaded


def read_once(*tensors: Tensor) -> Callable[[], float]:
    """Reads the tensors from one end to the other."""
    read = library().read_once
    parts = [(_pointer(x), ctypes.c_int64(x.numel() * x.element_size() // 4)) for x in tensors]
    threads = torch.get_num_threads()
    # `tensors` is named so that they live as long as the function does.
    return lambda keep=tensors: sum(read(pointer, n, threads) for pointer, n in parts)


def read_read_write(x: Tensor) -> Callable[[], float]:
    """Reads a buffer of x's size, then reads it again and writes over it."""
    buffer = torch.zeros(x.numel() * x.element_size() // 4)
    function, n = library().read_read_write, ctypes.c_int64(buffer.numel())
    threads = torch.get_num_threads()
    return lambda: function(_pointer(buffer), n, threads)


def streams(n: int, *, reads: int, writes: int, masks: int = 0) -> Callable[[], float]:
    """Reads and writes as many streams of n floats, and reads masks of n bytes, all in warm buffers of its own."""
    floats = [[torch.ones(n) for _ in range(count)] for count in (reads, writes)]
    bytes_ = [torch.ones(n, dtype=torch.bool) for _ in range(masks)]
    function, threads = library().streams, torch.get_num_threads()
    arrays = [(_pointers(group), len(group)) for group in (floats[0], bytes_, floats[1])]
    arguments = [x for pair in arrays for x in pair]
    # `floats` and `bytes_` are named so that the buffers live as long as the function does.
    return lambda keep=(floats, bytes_): function(*arguments, ctypes.c_int64(n), threads)


class Products:
    """The matrix products of an LM head, as torch makes them, into memory that is there already."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        """hidden: [N, H]; weight: [V, H]."""
        self.hidden, self.weight = hidden, weight
        self.logits = hidden.new_zeros(hidden.shape[0], weight.shape[0])
        self.grad_hidden, self.grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def limit(self, *, logits: int = 1, grad_hidden: bool = False, grad_weight: bool = False) -> Limit:
        """The logits, as often as it says, and the products of their gradient, which is taken to lie in their place."""
        count = logits + grad_hidden + grad_weight
        size = self.hidden.numel() * self.weight.shape[0]

        def run() -> None:
            for _ in range(logits):
                torch.mm(self.hidden, self.weight.T, out=self.logits)
            if grad_hidden:
                torch.mm(self.logits, self.weight, out=self.grad_hidden)
            if grad_weight:
                torch.mm(self.logits.T, self.hidden, out=self.grad_weight)

        return Limit(f"{count} bare matrix product{'s' * (count > 1)}", run=run, flops=2 * count * size)


def product(size: int, dtype: torch.dtype, device: str) -> Limit:
    """A square matrix product as torch makes it, into memory that is there already."""
    left, right, out = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
    return Limit("a square product", run=lambda: torch.mm(left, right.T, out=out), flops=2 * size**3)


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * max(1, len(tensors)))(*[x.data_ptr() for x in tensors])
