"""Loads the ops and says who serves them: C++ on CPU, Triton on CUDA, `fastrlhf.reference` everywhere else.

Importing this module loads the extension `fastrlhf._C`, which holds the schemas and registers the CPU kernels. The
kernels of other devices are registered here, from Python, with the device's dispatch key; torch's dispatcher does the
choosing. `FASTRLHF_BACKEND=reference` registers no kernel at all, so that the reference serves every device.
`FASTRLHF_LM_HEAD`, `chunked` (the default) or `fused`, is how Triton serves the LM head; see kernels/triton/lm_head.py.
"""

import importlib
import os
import warnings
from collections.abc import Callable

import torch

from fastrlhf import fallback

NAMESPACE = "fastrlhf"
TRITON = {  # module of fastrlhf.kernels: the ops it holds, under their own names
    "log_probs": (
        "token_log_probs",
        "token_log_probs_backward",
        "token_log_probs_backward_",
        "token_log_probs_and_entropy",
        "token_log_probs_and_entropy_backward",
        "token_log_probs_and_entropy_backward_",
    ),
    "lm_head": (
        "linear_token_log_probs",
        "linear_token_log_probs_backward",
        "linear_cross_entropy",
        "linear_ppo_loss",
    ),
    "kl": ("kl_divergence", "kl_divergence_backward", "full_kl", "full_kl_backward"),
    "advantages": ("gae", "gae_packed", "rollout_advantages"),
    "masked": ("masked_mean", "masked_whiten"),
    "losses": ("ppo_loss", "value_loss"),
    "preferences": ("pairwise_reward_loss", "dpo_loss"),
    "sampling": ("sample_tokens",),
    "decoding": ("paged_attention",),
}

# Over a layout of their own, and of use on CPU alone: the rollout engine has torch's linear layers elsewhere, and when
# the reference is asked for.
CPU_ONLY = ("pack_weight_", "packed_linear_")


def _load_extension():
    try:
        return importlib.import_module("fastrlhf._C")
    except ImportError as error:
        raise ImportError(
            f"fastrlhf's C++ extension fastrlhf._C is not there or cannot be loaded ({error}). Build it from the "
            "repository with `pip install --no-build-isolation -e .` (it needs a C++17 compiler and torch >= 2.10). "
            "Nothing falls back to slower code without being asked to."
        ) from error


def _forced_reference() -> bool:
    asked = os.environ.get("FASTRLHF_BACKEND", "")
    if asked not in ("", "reference"):
        raise ValueError(f"FASTRLHF_BACKEND: got {asked!r}, wanted 'reference' or nothing")
    return asked == "reference"


def _triton(module: str, name: str) -> Callable:
    """The Triton kernel `name`, imported when CUDA first needs it."""
    chosen: list[Callable] = []

    def call(*args):
        if not chosen:
            try:
                chosen.append(getattr(importlib.import_module(f"fastrlhf.kernels.{module}"), name))
            except ImportError as error:
                warnings.warn(f"{name} runs as plain PyTorch on CUDA, because {error}", RuntimeWarning, stacklevel=2)
                chosen.append(getattr(fallback, name))
        return chosen[0](*args)

    return call


REFERENCE_FORCED = _forced_reference()
EXTENSION = _load_extension()
_library = torch.library.Library(NAMESPACE, "IMPL")
for _name in fallback.OPS:
    _library.impl(_name, getattr(fallback, _name), "CompositeExplicitAutograd")
if not REFERENCE_FORCED:
    for _module, _names in TRITON.items():
        for _name in _names:
            _library.impl(_name, _triton(_module, _name), "CUDA")


def backend_table() -> dict[str, dict[str, str]]:
    """For every op: which backend serves it on "cpu", on "cuda" and on any other device; "none" where it cannot run."""
    on_cuda = {name: f"triton ({module})" for module, names in TRITON.items() for name in names}
    strategy = os.environ.get("FASTRLHF_LM_HEAD") or "chunked"
    on_cuda |= dict.fromkeys(TRITON["lm_head"], f"triton (lm_head, {strategy})")
    table = {}
    for name in fallback.OPS:
        has_cpu_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
        table[name] = {
            "cpu": f"c++ ({EXTENSION.cpu_capability()})" if has_cpu_kernel else "reference",
            "cuda": "reference" if REFERENCE_FORCED else on_cuda.get(name, "reference"),
            "other": "reference",
        }
    on_cpu = "none" if REFERENCE_FORCED else f"c++ ({EXTENSION.cpu_capability()})"
    return table | {name: {"cpu": on_cpu, "cuda": "none", "other": "none"} for name in CPU_ONLY}
