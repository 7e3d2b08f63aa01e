"""Results as JSON files: bench/results/<device>/<family>.json, and what they say about the targets."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
REPACKING = "repacking"  # a contender that makes ready what ours works on, and is to take less than it
PEAK_OF_TRL = "of TRL's peak memory"  # the part that our process takes at its highest
# Every other target is "at least", of a peer.
AT_MOST = ("limit", "extra_mib", "us", "ms", "launches", "device_us", REPACKING, PEAK_OF_TRL)
OURS = "ours"


def device_name(device: str) -> str:
    """Such as `AMD EPYC, 2 cores`, or `NVIDIA H100 80GB HBM3`."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def variant(quick: bool = False) -> str:
    """What in the environment makes these results others than the usual ones: a part of the file's name."""
    parts = [os.environ.get("FASTRLHF_BACKEND"), os.environ.get("FASTRLHF_CPU_CAPABILITY")]
    parts += ["huge-pages" if huge_pages() else None, "quick" if quick else None]
    return "".join(f"-{part}" for part in parts if part)


def huge_pages() -> bool:
    """Whether torch was told to take huge pages for large CPU tensors, for every contender alike."""
    return os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1"


def environment(device: str) -> dict[str, Any]:
    from fastrlhf.backends import backend_table

    on = "cpu" if device == "cpu" else "cuda"
    found = {
        "schema": SCHEMA,
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "huge_pages": huge_pages(),
        "backends": {op: row[on] for op, row in backend_table().items()},
    }
    if device != "cpu":
        found["cuda"] = torch.version.cuda
    return found


def folder() -> Path:
    """bench/results of the clone this runs in; elsewhere, bench-results in the working directory."""
    here = Path(__file__).resolve().parent
    return here / "results" if (here.parent / "pyproject.toml").exists() else Path("bench-results")


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {content.get('schema')}, wanted {SCHEMA}; run the benchmark again")
    return content


def _rounded(x: Any) -> Any:
    """Four significant digits: more would only be noise in the diffs."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    return [_rounded(value) for value in x] if isinstance(x, (list, tuple)) else x


def ratio_to_limit(row: dict[str, Any], name: str = OURS) -> float | None:
    """A contender's median in units of the limit."""
    return _divided(_median(row["results"].get(name)), _median(row.get("limit")))


def ratio_to_ours(row: dict[str, Any], name: str) -> float | None:
    """How many times as long as ours a peer takes."""
    return _divided(_median(row["results"].get(name)), _median(row["results"].get(OURS)))


def reached(row: dict[str, Any]) -> dict[str, tuple[float, float | None, bool | None]]:
    """{target: (wanted, measured, whether that is good enough)}; (wanted, None, None) for what was not measured."""
    found = {}
    ours = row["results"].get(OURS, {})
    for key, wanted in row["targets"].items():
        if key == "limit":
            measured = ratio_to_limit(row)
        elif key in ("us", "ms"):
            median = _median(ours)
            measured = None if median is None else median * (1e3 if key == "us" else 1.0)
        elif key in AT_MOST and key != REPACKING:
            measured = ours.get(key)
        else:
            measured = ratio_to_ours(row, key)
        good = None if measured is None else measured <= wanted if key in AT_MOST else measured >= wanted
        found[key] = (wanted, measured, good)
    return found


def _median(result: dict[str, Any] | None) -> float | None:
    return (result or {}).get("median_ms")


def _divided(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
