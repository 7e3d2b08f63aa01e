"""verl: https://github.com/volcengine/verl."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Optional

import torch
from torch import nn

from fastrlhf.bench.peers import triton
from fastrlhf.bench.peers.base import (
    CLIP,
    GAMMA,
    KL_COEF,
    LAM,
    VALUE_CLIP,
    Peer,
    Run,
    bare,
    float_masks,
    keep,
    last_counted,
)
from fastrlhf.bench.sources import NotThere, definitions, folder


@functools.cache
def functional() -> SimpleNamespace:
    """verl.utils.torch_functional, as far as it is about PPO."""
    names = ("logprobs_from_logits", "logprobs_from_logits_v2", "logprobs_from_logits_flash_attn")
    names += ("gather_from_labels", "entropy_from_logits", "clip_by_value")
    names += ("masked_sum", "masked_mean", "masked_var", "masked_whiten")
    context = {"torch": torch, "F": nn.functional, "os": os, "NPU_CROSS_ENTROPY_LOSS_AVAILABLE": False}
    context["cross_entropy_loss"] = _flash_attn()
    context["FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE"] = context["cross_entropy_loss"] is not None
    return SimpleNamespace(**definitions(folder("verl") / "utils" / "torch_functional.py", keep(*names), context))


def _flash_attn() -> Callable | None:
    """flash-attn's kernel, where it is there and there is a GPU: as verl's own imports do."""
    if torch.cuda.is_available():
        with suppress(NotThere):
            return triton.flash_attn_module().cross_entropy_loss
    return None


def _fused_linear(root: Path) -> Callable:
    """FusedLinearForPPO, with its usual chunks of 512 tokens."""
    names = ("_fused_linear_for_ppo_fwd", "_fused_linear_for_ppo_bwd", "FusedLinearForPPOFunction", "FusedLinearForPPO")
    context = {"torch": torch, "Optional": Optional, "cross_entropy_loss": _flash_attn()}
    context["_FLASH_ATTN_CROSS_ENTROPY_AVAILABLE"] = context["cross_entropy_loss"] is not None
    path = root / "utils" / "experimental" / "torch_functional.py"
    return definitions(path, keep(*names), context)["FusedLinearForPPO"]()


@functools.cache
def algorithms() -> SimpleNamespace:
    """verl.trainer.ppo.core_algos, as far as it is about PPO."""
    names = ("compute_gae_advantage_return", "agg_loss", "compute_policy_loss_vanilla", "compute_value_loss")
    names += ("kl_penalty", "kl_penalty_forward", "FixedKLController")
    context = {"torch": torch, "verl_F": functional(), "AlgoConfig": type("AlgoConfig", (), {})}
    # The decorators enter the functions into verl's registries.
    return SimpleNamespace(**definitions(folder("verl") / "trainer" / "ppo" / "core_algos.py", bare(*names), context))


def verl() -> Peer:
    root, verl_F, algos = folder("verl"), functional(), algorithms()
    context = {"torch": torch, "core_algos": algos, "masked_mean": verl_F.masked_mean}
    trainer = root / "trainer" / "ppo" / "ray_trainer.py"
    apply_kl_penalty = definitions(trainer, keep("apply_kl_penalty"), context)["apply_kl_penalty"]

    def rollout(batch):
        data, _ = apply_kl_penalty(SimpleNamespace(batch=batch), algos.FixedKLController(KL_COEF), "kl")
        rewards = data.batch["token_level_rewards"]
        return algos.compute_gae_advantage_return(rewards, batch["values"], batch["response_mask"], GAMMA, LAM)

    def batch(scores, log_probs, ref, values, mask):
        token_scores = torch.zeros_like(values)
        last = last_counted(mask)
        token_scores[torch.arange(len(last), device=last.device), last] = scores
        result = _Batch(old_log_probs=log_probs, ref_log_prob=ref, values=values, token_level_scores=token_scores)
        result["response_mask"], result.batch_size = mask.float(), mask.shape[:1]
        return (result,)

    def ppo_loss(log_probs, old, advantages, mask, ref):
        loss, metrics = algos.compute_policy_loss_vanilla(old, log_probs, advantages, mask, "token-mean", CONFIG)
        kl = algos.kl_penalty(log_probs, ref, "low_var_kl")
        return loss + KL_COEF * algos.agg_loss(kl, mask, "token-mean"), metrics

    fused = _fused_linear(root)

    def linear_ppo_loss(hidden, weight, tokens, old, advantages, mask):
        log_probs, _ = fused(hidden, weight, tokens)
        return algos.compute_policy_loss_vanilla(old, log_probs, advantages, mask, "token-mean", CONFIG)

    ops = {
        "linear_token_log_probs": Run(lambda *head: fused(*head)[0], note="computes the entropy too"),
        "linear_token_log_probs_and_entropy": Run(fused),
        "linear_ppo_loss": Run(linear_ppo_loss, float_masks),
        "token_log_probs": Run(verl_F.logprobs_from_logits),
        "token_log_probs_and_entropy": Run(_with_entropy(verl_F.entropy_from_logits)),
        "kl_divergence": Run(lambda log_probs, ref: algos.kl_penalty(log_probs, ref, "low_var_kl")),
        "gae": Run(
            lambda *inputs: algos.compute_gae_advantage_return(*inputs, GAMMA, LAM), float_masks, "whitens them as well"
        ),
        "rollout_advantages": Run(rollout, batch),
        "masked_mean": Run(verl_F.masked_mean, float_masks),
        "masked_whiten": Run(verl_F.masked_whiten, float_masks),
        "ppo_loss": Run(ppo_loss, float_masks),
        "value_loss": Run(
            lambda values, old, returns, mask: algos.compute_value_loss(values, returns, old, mask, VALUE_CLIP),
            float_masks,
        ),
    }
    cannot = {"full_kl": "not implemented there", "gae_packed": "padded batches only"}
    cannot |= {"pairwise_reward_loss": "not there", "dpo_loss": "not there", "linear_cross_entropy": "log-probs only"}
    return Peer(metadata.version("verl"), ops, cannot)


def verl_compiled() -> Peer:
    """verl's engine compiles its entropy unless told otherwise (use_torch_compile)."""
    entropy = torch.compile(functional().entropy_from_logits, dynamic=True)
    op = "token_log_probs_and_entropy"
    return Peer(metadata.version("verl"), {op: Run(_with_entropy(entropy), note="its entropy under torch.compile")})


def verl_triton() -> Peer:
    """The kernels that take the place of FusedLinearForPPO where one asks for Triton."""
    root = folder("verl") / "utils" / "kernel"
    version = metadata.version("verl")
    device = ModuleType("verl.utils.device")  # as much of it as the kernels ask
    device.is_cuda_available = torch.cuda.is_available()
    device.get_device_name, device.get_torch_device = (lambda: "cuda"), (lambda: torch.cuda)
    device.get_device_capability = torch.cuda.get_device_capability
    # The two files as a package, because one imports the other when it is called.
    package = sys.modules[f"{__name__}_kernel"] = ModuleType(f"{__name__}_kernel")
    package.__path__ = [str(root)]
    stubs = {"verl": ModuleType("verl"), "verl.utils": ModuleType("verl.utils"), "verl.utils.device": device}
    sys.modules |= stubs
    try:
        importlib.import_module(f"{package.__name__}.kernels")
    finally:
        for name in stubs:
            del sys.modules[name]
    function = importlib.import_module(f"{package.__name__}.linear_cross_entropy").linear_cross_entropy
    if not torch.cuda.is_available():
        return Peer(version, absent="for GPUs")

    def log_probs_and_entropy(hidden, weight, tokens):
        return tuple(x.view_as(tokens) for x in function(hidden, weight, tokens, 1.0, "none"))

    ops = {
        "linear_token_log_probs": Run(lambda *head: log_probs_and_entropy(*head)[0], note="computes the entropy too"),
        "linear_token_log_probs_and_entropy": Run(log_probs_and_entropy),
    }
    return Peer(version, ops)


def _with_entropy(entropy):
    log_probs = functional().logprobs_from_logits
    return lambda logits, tokens: (log_probs(logits, tokens), entropy(logits))


class _Batch(dict):
    """As much of verl's DataProto.batch as its functions touch."""

    batch_size: torch.Size


class _VerlConfig(dict):
    """As much of verl's ActorConfig as compute_policy_loss_vanilla reads."""

    global_batch_info: dict = {}  # noqa: RUF012
    __getattr__ = dict.__getitem__


CONFIG = _VerlConfig(clip_ratio=CLIP, clip_ratio_low=CLIP, clip_ratio_high=CLIP, clip_ratio_c=3.0)
