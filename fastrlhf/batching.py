"""Token sequences to padded tensors, with little padding and with the positions that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A sequence may be at most this much longer than the shortest of its group.
MAX_STRETCH = 1.25
MAX_EXTRA_TOKENS = 2


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences in groups of similar length, so that padding adds at most about a quarter.

    Deterministic: sorted by length, then by index; a group ends where the next sequence is too long for its first.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and lengths[index] <= MAX_STRETCH * lengths[groups[-1][0]] + MAX_EXTRA_TOKENS:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


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
