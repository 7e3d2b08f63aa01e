"""Cut Cross-Entropy: https://github.com/apple/ml-cross-entropy."""

from __future__ import annotations

import functools
import importlib
from importlib import metadata

import torch

from fastrlhf.bench.peers.base import Peer, Run


def cut_cross_entropy() -> Peer:
    on_gpu = torch.cuda.is_available()
    note = "small gradients are left out" if on_gpu else "its implementation under torch.compile"
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    function = functools.partial(function, impl="cce" if on_gpu else "torch_compile")
    ops = {
        "linear_token_log_probs": Run(lambda *head: -function(*head, reduction="none"), note=note),
        "linear_cross_entropy": Run(lambda *head: (function(*head), ()), note=note),
    }
    cannot = {"linear_token_log_probs_and_entropy": "no entropy", "linear_ppo_loss": "no log-prob's loss but its own"}
    return Peer(metadata.version("cut-cross-entropy"), ops, cannot)
