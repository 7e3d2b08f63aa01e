"""A rollout with all that its updates need, and the batches that they take it in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from fastrlhf.batching import ScoredBatch, pack_sharing_prompts, score_responses
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
    filled evenly up to it, else per_device_train_batch_size responses of similar length. Without padding, responses to
    one prompt are in one batch if they can, where the prompt is read once."""
    limit = args.max_tokens_per_micro_batch
    if limit is None:
        size, items = args.micro_batch_size, _by_prompt(rollout, rows, args.padding_free)
        order = [row for item in items for row in item]
        groups = [order[start : start + size] for start in range(0, len(order), size)]
    else:
        items = _by_prompt(rollout, rows, args.padding_free, limit)
        chosen = split_by_tokens([_tokens(rollout, item) for item in items], limit)
        count = max_over_ranks(len(chosen), accelerator)
        if len(chosen) < count:
            items = items if len(items) >= count else [[row] for row in rows]
            chosen = split_into([_tokens(rollout, item) for item in items], count)
        groups = [[row for i in group for row in items[i]] for group in chosen]
    build = pack_sharing_prompts if args.padding_free else score_responses
    return [build(rollout.prompts, rollout.responses, group).to(args.device) for group in groups]


def _tokens(rollout: Rollout, item: Sequence[int]) -> int:
    """Of responses to one prompt, and of the prompt."""
    return len(rollout.prompts[item[0]]) + sum(len(rollout.responses[row]) for row in item)


def _by_prompt(rollout: Rollout, rows: Sequence[int], together: bool, limit: float = math.inf) -> list[list[int]]:
    """The rows, those of one prompt in one list if they are to be `together`, as far as they have at most `limit`
    tokens; in the order of the longest of each list."""
    items: list[list[int]] = []
    last: dict[tuple[int, ...], list[int]] = {}  # the list that a prompt's next response goes into
    for row in sorted(rows, key=lambda row: _tokens(rollout, [row])):
        prompt = tuple(rollout.prompts[row])
        item = last.get(prompt) if together else None
        if item is None or _tokens(rollout, [*item, row]) > limit:
            item = last[prompt] = []
            items.append(item)
        item.append(row)
    return sorted(items, key=lambda item: _tokens(rollout, item[-1:]))
