"""Timing on a GPU: events on the stream, cold caches, and the copy bandwidth as the limit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

FLUSH = 2**30  # bytes; many times the L2 cache of any GPU
FEW, MORE = 4, 12  # tokens, of two runs whose difference shows what a step takes


class CudaStopwatch:
    """Time between two events around the work, after a write of 1 GiB.

    The write empties the caches, and while it lasts the CPU runs ahead and has the launches ready, so that short
    kernels are not timed by how fast Python launches them.
    """

    device = "cuda"

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def __call__(self, work: Callable[[Any], Any], argument: Any) -> float:
        """Milliseconds that work(argument) takes on the GPU."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush.zero_()
        start.record()
        work(argument)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def extra_memory(self, work: Callable[[Any], Any], argument: Any) -> float:
        """MiB that work(argument) had allocated at its highest beyond what was allocated before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(argument)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def details(self, work: Callable[[Any], Any], prepare: Callable[[], Any]) -> dict[str, float]:
        """Kernels launched by one call, and the microseconds that they run; {} where the profiler is not allowed."""
        argument = prepare()
        events = _profiled(lambda: work(argument))
        on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        if not on_gpu:
            return {}
        device_us = round(sum(event.device_time for event in on_gpu), 2)
        return {"launches": len(_kernels(on_gpu)), "device_us": device_us}


def launches_a_step(decode: Callable[[int], Any]) -> dict[str, float]:
    """Kernels that a step of decoding runs, and the launches of kernels and graphs by which the CPU starts them.

    decode: makes so many tokens of each response. {} where the profiler is not allowed.
    """
    counts = []
    decode(MORE)
    for tokens in (FEW, MORE):
        events = _profiled(lambda tokens=tokens: decode(tokens))
        on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        launches = [event for event in events if re.match(r"cu(da)?(Graph)?Launch", event.name)]
        counts.append((len(_kernels(on_gpu)), len(launches)))
    if not counts[1][0]:
        return {}
    kernels, launches = ((more - few) / (MORE - FEW) for few, more in zip(*counts, strict=True))
    return {"kernels_a_step": kernels, "launches_a_step": launches}


def _profiled(work: Callable[[], Any]) -> list[Any]:
    """The profiler's events; none where it is not allowed."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            work()
            torch.cuda.synchronize()
    except RuntimeError:
        return []
    return list(profile.events())


def _kernels(on_gpu: list[Any]) -> list[Any]:
    return [event for event in on_gpu if not event.name.startswith(("Memcpy", "Memset"))]


def copy_bandwidth(stopwatch: CudaStopwatch) -> float:
    """Bytes read and written per millisecond by a copy of 2 GiB, the median of eleven."""
    source = torch.ones(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = sorted(stopwatch(lambda _: target.copy_(source), None) for _ in range(11))
    return 2 * source.numel() / times[5]
