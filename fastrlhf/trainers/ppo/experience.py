"""A rollout with all that its updates need, and the batches that they take it in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from fastrlhf.batching import ScoredBatch, pack_responses, score_responses
from fastrlhf.grouping import split_by_tokens, split_into
from fastrlhf.rollout import Rollout
from fastrlhf.trainers.ppo.config import PPOConfig
from fastrlhf.trainers.ppo.targets import Targets
from fastrlhf.trainers.reductions import max_over_ranks


@dataclass
class Experience:
    """One iteration's. scores: [B], as the reward functions gave them; each: [B], of each function by its name."""

    rollout: Rollout
    scores: Tensor
    each: dict[str, Tensor]
    targets: Targets


def mini_batches(rollout: Rollout, args: PPOConfig, accelerator: Accelerator) -> Iterator[list[ScoredBatch]]:
    """`num_ppo_epochs` passes over the responses, each in a new order, in `num_mini_batches` lists of micro-batches."""
    for _ in range(args.num_ppo_epochs):
        order = torch.randperm(len(rollout)).tolist()
        for start in range(0, len(order), args.mini_batch_size):
            yield micro_batches(rollout, order[start : start + args.mini_batch_size], args, accelerator)


def micro_batches(
    rollout: Rollout, rows: Sequence[int], args: PPOConfig, accelerator: Accelerator
) -> list[ScoredBatch]:
    """The responses `rows` in batches of one forward each, as many on every rank: with max_tokens_per_micro_batch
    filled evenly up to it, else per_device_train_batch_size responses of similar length."""
    lengths = [len(rollout.prompts[row]) + len(rollout.responses[row]) for row in rows]
    if args.max_tokens_per_micro_batch is not None:
        groups = split_by_tokens(lengths, args.max_tokens_per_micro_batch)
        count = max_over_ranks(len(groups), accelerator)
        groups = groups if len(groups) == count else split_into(lengths, count)
    else:
        order, size = sorted(range(len(rows)), key=lambda i: lengths[i]), args.micro_batch_size
        groups = [order[start : start + size] for start in range(0, len(order), size)]
    build = pack_responses if args.padding_free else score_responses
    chosen = [[rows[i] for i in group] for group in groups]
    return [build(rollout.prompts, rollout.responses, group).to(args.device) for group in chosen]
