"""Token sequences to padded tensors, with little padding and with the positions that are scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What one more forward and backward costs beside its tokens, in tokens: every weight and its gradient are read and
# written once more.
PASS_COST = 200


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences in groups of similar length, one forward each.

    The groups are runs of the sequences sorted by length (then index) that together cost least: padded tokens, and
    PASS_COST for each group. Found by dynamic programming over the ends of the groups.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    least = [0.0] + [math.inf] * len(order)  # of the first n sequences
    start = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        for begin in range(end):
            cost = least[begin] + PASS_COST + longest * (end - begin)
            if cost < least[end]:
                least[end], start[end] = cost, begin
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]


def pad_right(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Sequences as input_ids [b, L] and attention_mask [b, L] (1 = a token of the sequence), padded on the right."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.tensor([[*s, *[pad_token_id] * (longest - len(s))] for s in sequences])
    lengths = torch.tensor([len(s) for s in sequences])
    return input_ids, (torch.arange(longest) < lengths[:, None]).long()


@dataclass
class ScoredBatch:
    """Sequences and the tokens in them whose log-probs are wanted.

    input_ids: [b, L], padded on the right.
    positions: [n], indices into the flattened input_ids of the places that predict the scored tokens.
    tokens: [n], the scored tokens.
    rows, columns: [n], where each scored token stands in the caller's [B, T] tensors.
    """

    input_ids: Tensor
    positions: Tensor
    tokens: Tensor
    rows: Tensor
    columns: Tensor

    def to(self, device: torch.device) -> ScoredBatch:
        return ScoredBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def take(self, x: Tensor) -> Tensor:
        """The values [n] of a [B, T] tensor at this batch's tokens."""
        return x[self.rows, self.columns]

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write values [n] of this batch's tokens into a [B, T] tensor."""
        x[self.rows, self.columns] = values


def score_responses(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int], pad_token_id: int
) -> ScoredBatch:
    """The batch that scores every token of `responses[row]` after `prompts[row]`, for each row of `rows`."""
    input_ids, _ = pad_right([[*prompts[row], *responses[row]] for row in rows], pad_token_id)
    width = input_ids.shape[1]
    places, tokens, in_rows, columns = [], [], [], []
    for place, row in enumerate(rows):
        length = len(responses[row])
        # The token before the response's first one predicts it.
        first = place * width + len(prompts[row]) - 1
        places += range(first, first + length)
        tokens += responses[row]
        in_rows += [row] * length
        columns += range(length)
    return ScoredBatch(input_ids, *(torch.tensor(x, dtype=torch.long) for x in (places, tokens, in_rows, columns)))
