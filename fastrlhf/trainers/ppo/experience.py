"""A rollout with all that its updates need, and the batches that they take it in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from fastrlhf.batching import ScoredBatch, pack_sharing_prompts, score_responses
from fastrlhf.grouping import runs_by_tokens, split_by_tokens, split_into
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
    filled evenly up to it, else per_device_train_batch_size responses of similar length. Without padding, responses to
    one prompt stand beside each other, and those of a batch share what they begin with."""
    prompts = [tuple(rollout.prompts[row]) for row in rows]
    lengths = [len(prompt) + len(rollout.responses[row]) for prompt, row in zip(prompts, rows, strict=True)]
    grouped = args.padding_free and len(set(prompts)) < len(prompts)
    order = _by_prompt(prompts, lengths) if grouped else sorted(range(len(rows)), key=lambda i: lengths[i])
    if args.max_tokens_per_micro_batch is not None:
        groups = split_by_tokens(lengths, args.max_tokens_per_micro_batch)
        if grouped:
            runs = runs_by_tokens([lengths[i] for i in order], args.max_tokens_per_micro_batch)
            groups = [[order[i] for i in run] for run in runs] if len(runs) <= len(groups) else groups
        count = max_over_ranks(len(groups), accelerator)
        groups = groups if len(groups) == count else split_into(lengths, count)
    else:
        size = args.micro_batch_size
        groups = [order[start : start + size] for start in range(0, len(order), size)]
    build = pack_sharing_prompts if args.padding_free else score_responses
    chosen = [[rows[i] for i in group] for group in groups]
    return [build(rollout.prompts, rollout.responses, group).to(args.device) for group in chosen]


def _by_prompt(prompts: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> list[int]:
    """Indices of responses, those to one prompt beside each other, in the order of the longest of each prompt."""
    longest: dict[tuple[int, ...], tuple[int, int]] = {}
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        longest[prompt] = max(longest.get(prompt, (0, i)), (length, i))
    return sorted(range(len(prompts)), key=lambda i: (longest[prompts[i]], lengths[i]))
