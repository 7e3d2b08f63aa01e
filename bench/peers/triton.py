"""The Triton kernels of TRL and flash-attn: log-probs on GPUs."""

from __future__ import annotations

import importlib.util
from importlib import metadata

import torch

from fastrlhf.bench.peers.base import FROM_HIDDEN, Peer, Run, load_file
from fastrlhf.bench.sources import NotThere, folder


def trl_triton() -> Peer:
    """TRL's Triton kernel came after its PPO had gone: a second release, unpacked beside the first as trl_latest."""
    for package in ("trl", "trl_latest"):
        if importlib.util.find_spec(package) is not None:
            root = folder(package) / ("trl" if package == "trl_latest" else "")
            path = root / "kernels" / "logprob_entropy.py"
            if path.is_file():
                break
    else:
        raise NotThere("not installed: needs trl >= 1.16 as trl or trl_latest")
    infos = [info.name for info in root.parent.glob("trl-*.dist-info")]
    version = infos[0].removeprefix("trl-").removesuffix(".dist-info") if infos else "unknown"
    if not torch.cuda.is_available():
        return Peer(version)
    kernel = load_file(path).selective_log_softmax_and_entropy
    ops = {"token_log_probs": Run(lambda x, tokens: kernel(x, tokens)[0], note="computes the entropy too")}
    ops["token_log_probs_and_entropy"] = Run(kernel)
    return Peer(version, ops)


def flash_attn() -> Peer:
    def log_probs(logits, tokens):
        return -flash_attn_module().cross_entropy_loss(logits, tokens, inplace_backward=logits.requires_grad)[0]

    flash_attn_module()
    cannot = {"token_log_probs_and_entropy": "no entropy"} | dict.fromkeys(FROM_HIDDEN, "from logits only")
    if not torch.cuda.is_available():
        return Peer(metadata.version("flash-attn"), {}, {"token_log_probs": "Triton, for GPUs"} | cannot)
    return Peer(metadata.version("flash-attn"), {"token_log_probs": Run(log_probs)}, cannot)


def flash_attn_module():
    """The one file, because the package's __init__ wants its CUDA extension."""
    return load_file(folder("flash_attn") / "ops" / "triton" / "cross_entropy.py")
