"""Models that are on the device only while they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def on_device(model: Any, device: torch.device, offload: bool) -> Iterator[None]:
    """`model.to(device)` during, and back to the CPU after; nothing unless `offload`."""
    if offload:
        model.to(device)
    try:
        yield
    finally:
        if offload:
            model.to(torch.device("cpu"))
