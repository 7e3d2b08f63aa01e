"""What an adapter is, and the settings that every contender runs with."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastrlhf.bench.sources import NotThere

FROM_HIDDEN = (
    "linear_token_log_probs",
    "linear_token_log_probs_and_entropy",
    "linear_ppo_loss",
    "linear_cross_entropy",
)
CLIP, VALUE_CLIP, KL_COEF, BETA, GAMMA, LAM = 0.2, 0.2, 0.05, 0.1, 1.0, 0.95


@dataclass
class Run:
    """One op of one peer: what is timed, and what its inputs go through before, untimed."""

    work: Callable[..., Any]
    convert: Callable[..., tuple] = lambda *inputs: inputs
    note: str = ""  # what differs from our op
    compiled: bool = False  # under torch.compile, anew for each row: torch gives up on a function after eight shapes

    def ready(self) -> Callable[..., Any]:
        if not self.compiled:
            return self.work
        torch.compiler.reset()
        return torch.compile(self.work, dynamic=False)


@dataclass
class Peer:
    version: str
    ops: dict[str, Run] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)  # op: why not
    absent: str = ""  # why it is not here at all


def float_masks(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.float() if x.dtype == torch.bool else x for x in inputs)


def last_counted(mask: torch.Tensor) -> torch.Tensor:
    """[B], the position of each row's last token that counts."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


@functools.cache
def load_file(path: Path) -> ModuleType:
    """One file of a package as a module, for packages whose __init__ cannot be imported here."""
    if not path.is_file():
        raise NotThere(f"no file {path.name} in it")
    spec = importlib.util.spec_from_file_location(f"{__name__}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keep(*names: str) -> dict[str, bool]:
    """Definitions to take with their decorators."""
    return dict.fromkeys(names, True)


def bare(*names: str) -> dict[str, bool]:
    """Definitions to take without their decorators."""
    return dict.fromkeys(names, False)
