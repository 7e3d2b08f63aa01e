"""TRL: https://github.com/huggingface/trl. The last release with PPO; its steps are statements of PPOTrainer.train."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace

import torch
from torch import nn

from fastrlhf.bench.peers.base import CLIP, GAMMA, KL_COEF, LAM, VALUE_CLIP, Peer, Run, keep, last_counted
from fastrlhf.bench.sources import definitions, folder, method, steps


def trl() -> Peer:
    root = folder("trl")
    context = {"torch": torch, "F": nn.functional}
    utils = definitions(root / "trainer" / "utils.py", keep("selective_log_softmax", "entropy_from_logits"), context)
    path = root / "experimental" / "ppo" / "ppo_trainer.py"
    masked = definitions(path, keep("masked_mean", "masked_var", "masked_whiten"), context)
    context |= {name: masked[name] for name in ("masked_mean", "masked_whiten")}
    train = method(path, "PPOTrainer", "train")
    batch = ["padding_mask", "micro_batch_inds", "args"]
    gae = steps(path, train, "lastgaelam", "returns", ["rewards", "values", "responses", "args"], context)
    rollout = ["logprobs", "ref_logprobs", "values", "scores", "sequence_lengths", "sequence_lengths_p1"]
    rollout = steps(
        path, train, "logr", "advantages", [*rollout, "padding_mask", "padding_mask_p1", "responses", "args"], context
    )
    policy = steps(
        path, train, "logprobs_diff", "pg_loss", ["new_logprobs", "mb_logprobs", "mb_advantage", *batch], context
    )
    clipped = steps(path, train, "pg_clipfrac", "pg_clipfrac", ["pg_losses", "pg_losses2", *batch], context)
    approx_kl = steps(path, train, "approxkl", "approxkl", ["logprobs_diff"], context)
    inputs = ["vpred", "mb_values", "mb_return", "padding_mask_p1", "micro_batch_inds", "args"]
    value = steps(path, train, "vpredclipped", "vf_clipfrac", inputs, context)
    args = SimpleNamespace(gamma=GAMMA, lam=LAM, kl_estimator="k1", kl_coef=KL_COEF, whiten_rewards=False)
    args.cliprange, args.cliprange_value = CLIP, VALUE_CLIP
    everything = slice(None)

    @torch.no_grad()
    def run_gae(rewards, values):
        result = gae(rewards, values, rewards, args)
        return result["advantages"], result["returns"]

    def lengths(scores, log_probs, ref, values, mask):
        last = last_counted(mask)
        positions = torch.arange(mask.shape[1], device=mask.device)
        padding, padding_p1 = positions > last[:, None], positions > (last + 1)[:, None]
        return log_probs, ref, values, scores, last, last + 1, padding, padding_p1, log_probs, args

    @torch.no_grad()
    def run_rollout(*inputs):
        result = rollout(*inputs)
        return result["advantages"], result["returns"]

    def ppo_loss(log_probs, old, advantages, padding):
        result = policy(log_probs, old, advantages, padding, everything, args)
        with torch.no_grad():
            fraction = clipped(result["pg_losses"], result["pg_losses2"], padding, everything, args)["pg_clipfrac"]
            kl = approx_kl(result["logprobs_diff"])["approxkl"]
        return result["pg_loss"], (fraction, kl)

    def value_loss(values, old, returns, padding):
        result = value(values, old, returns, padding, everything, args)
        return result["vf_loss"], (result["vf_clipfrac"],)

    log_probs, entropy = utils["selective_log_softmax"], utils["entropy_from_logits"]
    ops = {
        "token_log_probs": Run(log_probs),
        "token_log_probs_and_entropy": Run(lambda x, tokens: (log_probs(x, tokens), entropy(x))),
        "gae": Run(run_gae, lambda rewards, values, mask: (rewards, values), "without a mask"),
        "rollout_advantages": Run(run_rollout, lengths, "without masks inside a response"),
        "masked_mean": Run(masked["masked_mean"]),
        "masked_whiten": Run(masked["masked_whiten"]),
        "ppo_loss": Run(
            ppo_loss, lambda x, old, advantages, mask, ref: (x, old, advantages, ~mask), "without KL in the loss"
        ),
        "value_loss": Run(value_loss, lambda values, old, returns, mask: (values, old, returns, ~mask)),
    }
    return Peer(
        metadata.version("trl"),
        ops,
        {
            "kl_divergence": "computed within the rewards only",
            "full_kl": "not in this release",
            "gae_packed": "padded batches only",
            "pairwise_reward_loss": "computed inside RewardTrainer",
            "dpo_loss": "computed inside DPOTrainer",
        },
    )
