"""The demo's output folder: which stages are finished, with what results, and how long they took."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

STATE_FILE = "state.json"
STAGES = ("sft", "reward_model", "gold", "ppo", "eval")


def peak_rss_gib() -> float:
    """Most memory this process ever had resident, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def release_memory() -> None:
    """Give what a stage left behind back to the system: glibc keeps freed memory, gigabytes of it after a training."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Workspace:
    """`folder/state.json` holds the settings, and of each stage its seconds and results.

    stages: the names of all that are to run, in their order.
    Raises ValueError when the folder was begun with other settings: its stages would not belong together.
    """

    def __init__(self, folder: str, console: Console, settings: dict[str, Any], stages: Sequence[str] = STAGES) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.console = console
        self.stages = stages
        self.path = self.folder / STATE_FILE
        self.state: dict[str, Any] = {"settings": settings, "stages": {}, "peak_rss_gib": 0.0}
        if self.path.exists():
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
            before = self.state["settings"]
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed:
                told = ", ".join(f"{name}: {before.get(name)} there, {settings[name]} now" for name in changed)
                raise ValueError(
                    f"output_dir: {folder} was begun with other settings ({told}). Choose another or delete it"
                )

    def stage_folder(self, name: str) -> str:
        return str(self.folder / name)

    def stage(self, name: str, title: str, run: Callable[..., dict[str, Any]], *inputs: Any) -> None:
        """Run a stage `run(workspace, name, *inputs) -> results` unless it is finished."""
        number = f"[{self.stages.index(name) + 1}/{len(self.stages)}]"
        record = self.state["stages"].setdefault(name, {"seconds": 0.0})
        if "results" in record:
            self.console.print(
                f"[bold]{number}[/bold] {title}: done before ({record['seconds']:.0f} s)", highlight=False
            )
            return
        self.console.print(f"[bold]{number}[/bold] {title}", highlight=False)
        before, start = record["seconds"], time.perf_counter()

        def tick() -> None:
            record["seconds"] = before + time.perf_counter() - start
            self.state["peak_rss_gib"] = max(self.state["peak_rss_gib"], peak_rss_gib())
            self.save()

        self.tick = tick
        try:
            record["results"] = run(self, name, *inputs)
        finally:
            tick()
        self.drop_checkpoints(name)  # only now: until the results are written, the stage may have to be taken up again
        release_memory()
        shown = ", ".join(f"{k} {v:.3g}" for k, v in record["results"].items() if isinstance(v, float))
        self.console.print(f"      done in {record['seconds']:.0f} s{': ' + shown if shown else ''}", highlight=False)

    def results(self, name: str) -> dict[str, Any]:
        return self.state["stages"][name]["results"]

    def seconds(self, name: str) -> float:
        return self.state["stages"][name]["seconds"]

    def save(self) -> None:
        """Write the state; whole or not at all."""
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.state, indent=1), encoding="utf-8")
        os.replace(temporary, self.path)

    def drop_checkpoints(self, name: str) -> None:
        """Delete a finished stage's checkpoints; the final model stays."""
        for checkpoint in (self.folder / name).glob("checkpoint-*"):
            with suppress(OSError):
                shutil.rmtree(checkpoint)
