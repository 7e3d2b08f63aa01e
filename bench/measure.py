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
VERY_SLOW_MS = 30_000.0


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
    holds: int = 0  # bytes that it keeps between calls: extra memory too
    facts: Callable[[], dict[str, float]] = dict  # what else there is to say, found out after the timing
    here: bool = True  # in this process, whose memory alone is measured


@dataclass
class Limit:
    """What must be done at least, and code that does no more; without it, the bytes at the copy bandwidth."""

    what: str
    bytes: int = 0  # to move
    run: Callable[[], Any] | None = None
    flops: int = 0  # instead of bytes, where arithmetic is the measure

    def contenders(self) -> dict[str, Contender]:
        return {LIMIT: Contender(lambda _: self.run())} if self.run else {}

    def record(self, times: dict[str, list[float]], calls: int, bandwidth: float | None) -> dict[str, Any]:
        """As it goes into the JSON file. bandwidth: bytes per ms, where the limit is not a loop."""
        record = {"what": self.what} | ({"flops": self.flops} if self.flops else {"bytes": self.bytes})
        if LIMIT in times:
            return record | summary(times[LIMIT], calls)
        return record | ({"median_ms": self.bytes / bandwidth, "from": "copy bandwidth"} if bandwidth else {})


@dataclass
class Roofline:
    """Of one call: the longer of what memory needs to move the bytes and what the products take at their peak.

    reading: code that reads about as many bytes, or None where the bandwidth is known. products: by name, products of
    which the fastest is the peak.
    """

    bytes: int
    flops: int
    reading: Limit | None
    products: dict[str, Limit]

    def contenders(self) -> dict[str, Contender]:
        limits = dict(self.products) | ({"reading": self.reading} if self.reading else {})
        return {f"{LIMIT}: {name}": Contender(lambda _, run=x.run: run()) for name, x in limits.items()}

    def record(self, times: dict[str, list[float]], calls: int, bandwidth: float | None) -> dict[str, Any]:
        """As Limit's; what the two sides take stands beside the longer one."""
        medians = {name.removeprefix(f"{LIMIT}: "): summary(x)["median_ms"] for name, x in times.items()}
        if self.reading:
            bandwidth = self.reading.bytes / medians["reading"]
        rates = {name: x.flops / medians[name] for name, x in self.products.items()}
        fastest = max(rates, key=rates.get)
        sides = {"bytes": self.bytes / bandwidth, "products": self.flops / rates[fastest]}
        return {
            "what": f"roofline: the {max(sides, key=sides.get)} take longer",
            **{"bytes": self.bytes, "flops": self.flops, "median_ms": max(sides.values())},
            **{f"{name}_ms": ms for name, ms in sides.items()},
            **{"gb_s": bandwidth / 1e6, "gflop_s": rates[fastest] / 1e6, "peak": fastest},
        }


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
    limit: Limit | Roofline | None = None
    targets: dict[str, float] = field(default_factory=dict)
    calls: int = 1  # how many calls `work` makes
    tokens: float = 0  # that a call makes, where it makes tokens
    seconds: float | None = None  # for each contender, instead of the setting's


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
            forget_high_water()
            before = resident("VmRSS")
            work(argument)
            return (resident("VmHWM") - before) / 1024
        except OSError:
            return float("nan")


def forget_high_water() -> None:
    """From here on, VmHWM is the highest resident set since (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(entry: str) -> int:
    """KiB: VmRSS, the resident set of this process, or VmHWM, its highest (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{entry}:")[1].split()[0])


def interleave(
    contenders: dict[str, Contender], stopwatch: Callable, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """({name: its times in ms}, {name: why it failed}).

    They run A B C, then C B A, and so on, so that nobody has the quiet moments to himself. Each gets about `seconds`,
    but at least LEAST and at most MOST repetitions; the slow ones are done after the first rounds. What takes half a
    minute is warm after the first seconds of it: its first run counts, and there is one more.
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    rounds, warm = {}, {}
    for name, contender in contenders.items():
        try:
            argument, begin = contender.prepare(), time.perf_counter()
            contender.work(argument)  # compiles, and touches its memory for the first time
            estimate = first = 1e3 * (time.perf_counter() - begin)
            if first < VERY_SLOW_MS:
                estimate = stopwatch(contender.work, contender.prepare())
        except Exception as error:  # whatever a peer raises is a result
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        times[name] = [estimate] if estimate > SLOW_MS else []
        warm[name] = estimate < WARM_MS
        count = int(1e3 * seconds / max(estimate * (1 + warm[name]), 1e-6))
        count = min(max(count, LEAST), MOST) // 2 * 2 + 1  # odd, so that the median is one of them
        if first >= VERY_SLOW_MS:  # the median is then the mean of the two
            count = 2
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
    limits = row.limit.contenders() if row.limit else {}
    times, failed = interleave(running | limits, stopwatch, seconds if row.seconds is None else row.seconds)
    for name, contender in running.items():
        if name in failed:
            results[name] = {"failed": failed[name]}
            continue
        results[name] = summary(times[name], row.calls)
        if contender.here:
            results[name] |= memory(contender, stopwatch)
        if row.calls == 1 and results[name]["median_ms"] < BRIEF_MS:
            results[name] |= stopwatch.details(contender.work, contender.prepare)
        results[name] |= contender.facts()
        if contender.note:
            results[name]["note"] = contender.note
    record = {"op": row.op, "work": row.work, "shape": row.shape, "dtype": row.dtype, "targets": row.targets}
    if row.tokens:
        record |= {"tokens": row.tokens, "calls": row.calls}
    if row.limit:
        wrong = [failed[name] for name in limits if name in failed]
        of_limits = {name: times[name] for name in limits if name in times}
        record["limit"] = {"failed": wrong[0]} if wrong else row.limit.record(of_limits, row.calls, bandwidth)
    order = [name for name in row.contenders if name in results]
    return record | {"results": {name: results[name] for name in order}}


def summary(times: list[float], calls: int = 1) -> dict[str, float]:
    """Of the times of `calls` calls each, in ms a call."""
    ordered = sorted(x / calls for x in times)
    median = ordered[len(ordered) // 2]
    return {"median_ms": median, "min_ms": ordered[0], "max_ms": ordered[-1], "repetitions": len(ordered)}


def memory(contender: Contender, stopwatch: Stopwatch) -> dict[str, float]:
    """Peak memory of one call beyond what it was given and what it returns, and what it keeps between calls."""
    made = []

    def work(argument):
        made.append(contender.work(argument))

    argument = contender.prepare()
    given = {x.untyped_storage().data_ptr() for x in tensors(argument)}
    extra = stopwatch.extra_memory(work, argument)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(made)}
    returned = sum(size for pointer, size in storages.items() if pointer not in given) / 2**20
    extra = max(0.0, extra - returned) + contender.holds / 2**20
    return {"extra_mib": round(extra, 3), "returned_mib": round(returned, 3)}


def tensors(x: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    return [tensor for item in x for tensor in tensors(item)] if isinstance(x, (list, tuple)) else []
