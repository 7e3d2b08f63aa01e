"""What the tests of the benchmarks share: a clock that shows what it is told."""

from __future__ import annotations

from fastrlhf.bench.measure import Contender, Stopwatch


class FakeStopwatch(Stopwatch):
    """Time passes only as the work says: it returns its milliseconds."""

    def __init__(self):
        self.order = []

    def __call__(self, work, argument):
        name, ms = work(argument)
        self.order.append(name)
        return ms

    def extra_memory(self, work, argument):
        work(argument)
        return 7.0


def clockwork(name, times):
    """A contender that takes these times, one after the other, whenever it is called."""
    left = list(times)
    return Contender(lambda _: (name, left.pop(0) if len(left) > 1 else left[0]))
