"""TRL: https://github.com/huggingface/trl. The last release with PPO; its steps are statements of PPOTrainer.train."""

from __future__ import annotations

from contextlib import nullcontext
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
    # The gathering of sharded weights that it asks for has nothing to do here.
    context |= {"maybe_gather_lm_head_ctx": lambda *_: nullcontext()}
    names = ("_CHUNKED_LM_HEAD_CHUNK_SIZE", "_chunk", "_chunked_cross_entropy_loss")
    sft = definitions(root / "trainer" / "sft_trainer.py", keep(*names), context)
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

    def cross_entropy(hidden, weight, tokens):
        size = sft["_CHUNKED_LM_HEAD_CHUNK_SIZE"]
        loss, *metrics = sft["_chunked_cross_entropy_loss"](hidden, weight, size, shift_labels=tokens)
        return loss, metrics

    log_probs, entropy = utils["selective_log_softmax"], utils["entropy_from_logits"]
    linear = nn.functional.linear

    def linear_log_probs_and_entropy(hidden, weight, tokens):
        logits = linear(hidden, weight)
        return log_probs(logits, tokens), entropy(logits)

    def linear_ppo_loss(hidden, weight, tokens, *rest):
        return ppo_loss(log_probs(linear(hidden, weight), tokens), *rest)

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
        "linear_token_log_probs": Run(lambda hidden, weight, tokens: log_probs(linear(hidden, weight), tokens)),
        "linear_token_log_probs_and_entropy": Run(linear_log_probs_and_entropy),
        "linear_ppo_loss": Run(linear_ppo_loss, lambda *inputs: (*inputs[:-1], ~inputs[-1]), "without the entropy"),
        "linear_cross_entropy": Run(cross_entropy),
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


def trl_chunked() -> Peer:
    """What its asynchronous GRPO puts in the place of a model's LM head: parts of the vocabulary at a time."""
    path = folder("trl") / "trainer" / "utils.py"
    apply = definitions(path, keep("_ChunkedLogProbFunction"), {"torch": torch})["_ChunkedLogProbFunction"].apply
    size = 8192

    def log_probs_and_entropy(hidden, weight, tokens):
        found = apply(hidden.flatten(0, -2), weight, tokens.flatten(), 1.0, size)
        return tuple(x.view_as(tokens) for x in found)

    ops = {
        "linear_token_log_probs": Run(lambda *head: log_probs_and_entropy(*head)[0], note="computes the entropy too"),
        "linear_token_log_probs_and_entropy": Run(log_probs_and_entropy, note="the entropy has no gradient"),
    }
    return Peer(metadata.version("trl"), ops)
