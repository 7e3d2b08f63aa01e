"""The frameworks that fastrlhf.compat is compared with, from where `make test` puts them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastrlhf.bench import sources
from fastrlhf.bench.sources import PEERS, peers_on_path

__all__ = ["OLDER_TRL", "PEERS", "definitions", "module", "peers_on_path"]

OLDER_TRL = Path(sys.prefix) / "peers-trl"  # a folder for each version


def module(name: str) -> ModuleType:
    """A module of a framework; skips the test where that is missing or cannot be imported."""
    _there(name.split(".")[0])
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def definitions(package: str, file: str, names: dict[str, bool], context: dict[str, Any]) -> dict[str, Any]:
    """Functions taken out of a framework that cannot be imported, as `bench.sources.definitions` does."""
    return sources.definitions(_there(package) / file, names, context)


def _there(package: str) -> Path:
    if not (PEERS / package).is_dir():
        pytest.skip(f"{package} is not installed; `make .venv/.peers` does that")
    return PEERS / package
