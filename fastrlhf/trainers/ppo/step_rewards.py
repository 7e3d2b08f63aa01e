"""From the places in a text where steps end to the tokens of the response that end them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrlhf.rollout import Rollout


def step_rewards(
    rollout: Rollout, steps: Sequence[Sequence[tuple[int, float]]], tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """[B, T], fp32: the reward of each step at the token with which it ends, 0 elsewhere.

    steps: of each response, each as (how many characters of its text, `Rollout.texts`, there are up to the end of the
        step, reward). Those that end with the same token add up; an end behind the text is that of the last token. A
        token that the policy did not sample earns nothing: its reward goes to the last sampled one before it, or else
        to the first of all. A response without sampled tokens gets none.
    """
    rewards = torch.zeros(rollout.mask.shape)
    sampled = rollout.trained.bool()
    for row, of_one in enumerate(steps):
        places = sampled[row].nonzero().flatten().tolist()
        if not of_one or not places:
            continue
        prompt, response = rollout.prompts[row], rollout.responses[row]
        before = len(tokenizer.decode(prompt, skip_special_tokens=True))

        def characters(tokens: int, prompt=prompt, response=response, before=before) -> int:
            return len(tokenizer.decode([*prompt, *response[:tokens]], skip_special_tokens=True)) - before

        for end, reward in of_one:
            token = min(bisect_left(range(1, len(response) + 1), end, key=characters), len(response) - 1)
            earlier = [place for place in places if place <= token]
            rewards[row, earlier[-1] if earlier else places[0]] += reward
    return rewards
