"""Timing: contenders take turns, with the physical limit among them, and the median of each is kept."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LIMIT = "limit"
LEAST, MOST = 3, 25  # repetitions
BRIEF_MS = 50.0  # longer calls are not looked at in detail
WARM_MS = 300.0  # calls shorter than this are made once, untimed, just before they are timed
SLOW_MS = 1000.0  # of longer calls, the one that estimates counts


def keep_memory() -> bool:
    """Makes this process keep freed memory, so that everybody's outputs lie in pages that are already there (glibc).

    A training loop soon gets there by itself, up to 32 MiB a tensor; beyond, glibc asks the kernel for fresh pages at
    every allocation, and faulting them in costs ten times what filling them does.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


def _nothing() -> tuple:
    return ()


@dataclass
class Contender:
    """What is timed, on what was prepared for it untimed. `work` returns the tensors that it made."""

    work: Callable[[Any], Any]
    prepare: Callable[[], Any] = _nothing
    note: str = ""


@dataclass
class Limit:
    """What must be done at least, and code that does no more; without it, the bytes at the copy bandwidth."""

    what: str
    bytes: int = 0  # to move
    run: Callable[[], Any] | None = None
    flops: int = 0  # instead of bytes, where arithmetic is the measure


@dataclass
class Row:
    """One line of a table. A contender that is a string says why it does not run.

    `targets` were written down before measuring: {"limit": at most so many times the limit, "eager": at least so many
    times faster than eager, "us": at most so many microseconds a call, ...}.
    """

    op: str
    work: str
    shape: str
    dtype: str
    contenders: dict[str, Contender | str]
    limit: Limit | None = None
    targets: dict[str, float] = field(default_factory=dict)
    calls: int = 1  # how many calls `work` makes


class Stopwatch:
    """Wall-clock time on the CPU."""

    device = "cpu"

    def __call__(self, work: Callable[[Any], Any], argument: Any) -> float:
        """Milliseconds that work(argument) takes."""
        start = time.perf_counter()
        work(argument)
        return 1e3 * (time.perf_counter() - start)

    def details(self, work: Callable[[Any], Any], prepare: Callable[[], Any]) -> dict[str, float]:
        """What else there is to say about one call."""
        return {}

    def extra_memory(self, work: Callable[[Any], Any], argument: Any) -> float:
        """MiB by which work(argument) grew the resident set at its highest (Linux; nan elsewhere)."""
        try:
            with suppress(AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # or freed pages that are still resident would count for nothing
            Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
            before = _resident("VmRSS")
            work(argument)
            return (_resident("VmHWM") - before) / 1024
        except OSError:
            return float("nan")


def _resident(entry: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{entry}:")[1].split()[0])


def interleave(
    contenders: dict[str, Contender], stopwatch: Callable, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """({name: its times in ms}, {name: why it failed}).

    They run A B C, then C B A, and so on, so that nobody has the quiet moments to himself. Each gets about `seconds`,
    but at least LEAST and at most MOST repetitions; the slow ones are done after the first rounds.
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    rounds, warm = {}, {}
    for name, contender in contenders.items():
        try:
            contender.work(contender.prepare())  # compiles, and touches its memory for the first time
            estimate = stopwatch(contender.work, contender.prepare())
        except Exception as error:  # whatever a peer raises is a result
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        times[name] = [estimate] if estimate > SLOW_MS else []
        warm[name] = estimate < WARM_MS
        count = int(1e3 * seconds / max(estimate * (1 + warm[name]), 1e-6))
        count = min(max(count, LEAST), MOST) // 2 * 2 + 1  # odd, so that the median is one of them
        rounds[name] = count - len(times[name])
    for turn in range(max(rounds.values(), default=0)):
        for name in times if turn % 2 == 0 else reversed(times):
            if turn < rounds[name]:
                contender = contenders[name]
                if warm[name]:
                    contender.work(contender.prepare())
                times[name].append(stopwatch(contender.work, contender.prepare()))
    return times, failed


def measure(row: Row, stopwatch: Stopwatch, seconds: float, bandwidth: float | None = None) -> dict[str, Any]:
    """The row as it goes into the JSON file. bandwidth: bytes per ms, where the limit is not a loop."""
    gc.collect()  # what the rows before left behind
    running = {name: x for name, x in row.contenders.items() if isinstance(x, Contender)}
    results: dict[str, Any] = {name: {"cannot": x} for name, x in row.contenders.items() if isinstance(x, str)}
    limit = row.limit
    timed = dict(running)
    if limit and limit.run:
        timed[LIMIT] = Contender(lambda _: limit.run())
    times, failed = interleave(timed, stopwatch, seconds)
    for name in timed:
        if name in failed:
            results[name] = {"failed": failed[name]}
            continue
        ordered = sorted(x / row.calls for x in times[name])
        results[name] = {
            "median_ms": ordered[len(ordered) // 2],
            "min_ms": ordered[0],
            "max_ms": ordered[-1],
            "repetitions": len(ordered),
        }
        if name in running:
            results[name] |= memory(running[name], stopwatch)
            if row.calls == 1 and results[name]["median_ms"] < BRIEF_MS:
                results[name] |= stopwatch.details(running[name].work, running[name].prepare)
            if running[name].note:
                results[name]["note"] = running[name].note
    limit_result = results.pop(LIMIT, None)
    record = {"op": row.op, "work": row.work, "shape": row.shape, "dtype": row.dtype, "targets": row.targets}
    if limit:
        if limit_result is None and bandwidth:
            limit_result = {"median_ms": limit.bytes / bandwidth, "from": "copy bandwidth"}
        size = {"flops": limit.flops} if limit.flops else {"bytes": limit.bytes}
        record["limit"] = {"what": limit.what, **size, **(limit_result or {})}
    order = [name for name in row.contenders if name in results]
    return record | {"results": {name: results[name] for name in order}}


def memory(contender: Contender, stopwatch: Stopwatch) -> dict[str, float]:
    """Peak memory of one call beyond what it was given and what it returns."""
    made = []

    def work(argument):
        made.append(contender.work(argument))

    argument = contender.prepare()
    given = {x.untyped_storage().data_ptr() for x in tensors(argument)}
    extra = stopwatch.extra_memory(work, argument)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(made)}
    returned = sum(size for pointer, size in storages.items() if pointer not in given) / 2**20
    return {"extra_mib": max(0.0, round(extra - returned, 3)), "returned_mib": round(returned, 3)}


def tensors(x: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    return [tensor for item in x for tensor in tensors(item)] if isinstance(x, (list, tuple)) else []
