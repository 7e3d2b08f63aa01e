"""The phases of an iteration: how long each takes, and a bar that shows where it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


class Phases:
    """Times the phases of an iteration.

    bar: show the phase that is running, and how far it is, below the Trainer's bar.
    """

    def __init__(self, bar: bool) -> None:
        self.bar = bar
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, total: int | None = None) -> Iterator[tqdm]:
        """Around a phase; what it gives counts the `total` parts of it by `update()`."""
        start = time.perf_counter()
        with tqdm(desc=name, total=total, disable=not self.bar, leave=False, position=1) as bar:
            yield bar
        self.seconds[name] = time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds
