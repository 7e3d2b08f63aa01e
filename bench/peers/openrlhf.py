"""OpenRLHF: https://github.com/OpenRLHF/OpenRLHF."""

from __future__ import annotations

import functools
from importlib import metadata
from types import SimpleNamespace
from typing import Optional

import torch
from torch import nn

from fastrlhf.bench.peers.base import (
    BETA,
    CLIP,
    FROM_HIDDEN,
    GAMMA,
    KL_COEF,
    LAM,
    VALUE_CLIP,
    Peer,
    Run,
    float_masks,
    keep,
)
from fastrlhf.bench.sources import definitions, folder, function, method, steps

MAKER = "RemoteExperienceMaker"


@functools.cache
def functions() -> SimpleNamespace:
    """Its functions and losses, as far as they are about PPO, reward models and DPO."""
    root = folder("openrlhf")
    names = ("compute_approx_kl", "KL_IS_WEIGHT_CLIP", "compute_reward", "_logsumexp_by_chunk")
    names += ("log_probs_from_logits", "masked_mean", "compute_entropy")  # compute_entropy is under @torch.compile
    context = {"torch": torch, "F": nn.functional}
    utils = definitions(root / "models" / "utils.py", keep(*names), context)
    context |= {"nn": nn, "masked_mean": utils["masked_mean"], "Optional": Optional}
    names = ("aggregate_loss", "PolicyLoss", "ValueLoss", "PairWiseLoss", "DPOLoss")
    losses = definitions(root / "models" / "loss.py", keep(*names), context)
    path = root / "trainer" / "ppo_utils" / "experience_maker.py"
    gae = function(path, method(path, MAKER, "get_advantages_and_returns"), {"torch": torch})
    return SimpleNamespace(**utils | losses, get_advantages_and_returns=gae)


def openrlhf() -> Peer:
    theirs = functions()
    gae = theirs.get_advantages_and_returns
    path = folder("openrlhf") / "trainer" / "ppo_utils" / "experience_maker.py"
    compute = method(path, MAKER, "compute_advantages_and_returns")
    normalize = steps(path, compute, "all_advantages", None, ["experiences", "args"], {"torch": torch})
    no_std_norm = SimpleNamespace(algo=SimpleNamespace(advantage=SimpleNamespace(no_std_norm=False)))
    policy, value = theirs.PolicyLoss(CLIP, CLIP), theirs.ValueLoss(VALUE_CLIP)
    pairwise, dpo = theirs.PairWiseLoss(), theirs.DPOLoss(BETA)
    approx_kl, reward, masked_mean = theirs.compute_approx_kl, theirs.compute_reward, theirs.masked_mean

    @torch.no_grad()
    def run_gae(rewards, values, mask):
        return gae(None, values, rewards, mask, GAMMA, LAM)

    @torch.no_grad()
    def rollout(scores, log_probs, ref, values, mask):
        kl = approx_kl(log_probs, ref)
        masked_mean(kl, mask, dim=-1)  # it is logged
        advantages, returns = gae(None, values, reward(scores, KL_COEF, kl, mask), mask, GAMMA, LAM)
        experience = SimpleNamespace(advantages=advantages, action_mask=mask)
        normalize([experience], no_std_norm)
        return experience.advantages, returns

    def ppo_loss(log_probs, old, advantages, mask, ref):
        loss, *metrics = policy(log_probs, old, advantages, mask)
        kl = theirs.aggregate_loss(approx_kl(log_probs, ref, kl_estimator="k3"), mask)
        return loss + KL_COEF * kl, metrics

    ops = {
        "token_log_probs": Run(theirs.log_probs_from_logits),
        "token_log_probs_and_entropy": Run(
            lambda x, tokens: (theirs.log_probs_from_logits(x, tokens), theirs.compute_entropy(x)),
            note="entropy under its own torch.compile",
        ),
        "kl_divergence": Run(lambda log_probs, ref: approx_kl(log_probs, ref, kl_estimator="k3")),
        "gae": Run(run_gae, float_masks, "masked tokens count as steps of value 0"),
        "rollout_advantages": Run(rollout, float_masks, "masked tokens count as steps of value 0"),
        "masked_mean": Run(masked_mean),
        "ppo_loss": Run(ppo_loss, float_masks),
        "value_loss": Run(lambda *inputs: (value(*inputs), ()), float_masks, "without metrics"),
        "pairwise_reward_loss": Run(lambda *scores: (pairwise(*scores), ()), note="without metrics"),
        "dpo_loss": Run(lambda *log_probs: (lambda loss, *rewards: (loss, rewards))(*dpo(*log_probs))),
    }
    cannot = {"full_kl": "not there", "gae_packed": "padded batches only"}
    cannot |= dict.fromkeys(FROM_HIDDEN, "from logits only")
    cannot["masked_whiten"] = "by rows, or inside the experience maker"
    return Peer(metadata.version("openrlhf"), ops, cannot)
