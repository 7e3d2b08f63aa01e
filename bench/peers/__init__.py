"""Whom the ops are compared with: for every peer, its own functions under the names of our ops.

Each peer has an adapter that returns its ops. Every op takes the same inputs from everybody (torch_based.ours shows
them); a peer may convert them first, untimed, into the shapes and mask types that it wants. What a peer cannot do
stands in its `cannot`, with the reason, and one that is not installed says so: nobody is left out in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata

from fastrlhf.bench.peers import cut_cross_entropy, liger, openrlhf, torch_based, torchrl, triton, trl, verl
from fastrlhf.bench.peers.base import Peer, Run
from fastrlhf.bench.sources import NotThere

__all__ = ["ADAPTERS", "Peer", "Run", "contenders", "peer"]

ADAPTERS: dict[str, Callable[[], Peer]] = {
    "ours": torch_based.ours,
    "eager": torch_based.eager_pytorch,
    "torch.compile": torch_based.torch_compile,
    "TRL": trl.trl,
    "TRL Triton": triton.trl_triton,
    "TRL chunked": trl.trl_chunked,
    "verl": verl.verl,
    "verl compiled": verl.verl_compiled,
    "verl Triton": verl.verl_triton,
    "OpenRLHF": openrlhf.openrlhf,
    "torchrl": torchrl.torchrl,
    "Liger": liger.liger,
    "cut-cross-entropy": cut_cross_entropy.cut_cross_entropy,
    "flash-attn": triton.flash_attn,
}
# A second way of a peer that stands above: not missed where it has nothing to add.
SECOND_WAYS = ("TRL Triton", "TRL chunked", "verl compiled", "verl Triton")


@functools.cache
def peer(name: str) -> Peer:
    try:
        return ADAPTERS[name]()
    except metadata.PackageNotFoundError:
        return Peer("", absent="not installed")
    except (NotThere, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Peer("", absent=reason if reason.startswith("not installed") else f"not usable: {reason}")


def contenders(op: str) -> dict[str, Run | str]:
    """For every peer that is here: its Run of `op`, or the reason why it has none."""
    found = {name: peer(name) for name in ADAPTERS}
    return {
        name: x.ops.get(op) or x.cannot.get(op, "not there")
        for name, x in found.items()
        if not x.absent and (op in x.ops or name not in SECOND_WAYS)
    }


def roll_call() -> dict[str, dict[str, str]]:
    """Every peer's version, or why it is missing."""
    found = {name: peer(name) for name in ADAPTERS}
    return {name: {"missing": x.absent} if x.absent else {"version": x.version} for name, x in found.items()}
