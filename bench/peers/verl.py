"""verl: https://github.com/volcengine/verl."""

from __future__ import annotations

import functools
import os
from importlib import metadata
from types import SimpleNamespace

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
    # flash-attn's kernel, where it is there and there is a GPU: as its own import does.
    context["FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE"] = False
    if torch.cuda.is_available():
        try:
            context["cross_entropy_loss"] = triton.flash_attn_module().cross_entropy_loss
            context["FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE"] = True
        except NotThere:
            pass
    return SimpleNamespace(**definitions(folder("verl") / "utils" / "torch_functional.py", keep(*names), context))


def verl() -> Peer:
    root = folder("verl")
    verl_F = functional()
    names = ("compute_gae_advantage_return", "agg_loss", "compute_policy_loss_vanilla", "compute_value_loss")
    names += ("kl_penalty", "kl_penalty_forward", "FixedKLController")
    context = {"torch": torch, "verl_F": verl_F, "AlgoConfig": type("AlgoConfig", (), {})}
    # The decorators enter the functions into verl's registries.
    algos = SimpleNamespace(**definitions(root / "trainer" / "ppo" / "core_algos.py", bare(*names), context))
    context = {"torch": torch, "core_algos": algos, "masked_mean": verl_F.masked_mean}
    trainer = root / "trainer" / "ppo" / "ray_trainer.py"
    apply_kl_penalty = definitions(trainer, keep("apply_kl_penalty"), context)["apply_kl_penalty"]
    config = _VerlConfig(clip_ratio=CLIP, clip_ratio_low=CLIP, clip_ratio_high=CLIP, clip_ratio_c=3.0)

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
        loss, metrics = algos.compute_policy_loss_vanilla(old, log_probs, advantages, mask, "token-mean", config)
        kl = algos.kl_penalty(log_probs, ref, "low_var_kl")
        return loss + KL_COEF * algos.agg_loss(kl, mask, "token-mean"), metrics

    ops = {
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
    cannot |= {"pairwise_reward_loss": "not there", "dpo_loss": "not there"}
    return Peer(metadata.version("verl"), ops, cannot)


def verl_compiled() -> Peer:
    """verl's engine compiles its entropy unless told otherwise (use_torch_compile)."""
    entropy = torch.compile(functional().entropy_from_logits, dynamic=True)
    op = "token_log_probs_and_entropy"
    return Peer(metadata.version("verl"), {op: Run(_with_entropy(entropy), note="its entropy under torch.compile")})


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
