"""How sequences lie in one row of packed tokens: one after the other, or sharing what they begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fastrlhf.grouping import cheapest_runs

# What one more block of padded rows costs in a layer's attention, in scores of a head (0.4 ms forward and backward on
# CPU in bf16, with 9 heads of 64; next to nothing in fp32).
BLOCK_COST = 4000


@dataclass
class PaddedRows:
    """How packed tokens lie in blocks of rows that are padded on the right, one block after another.

    shapes: of the blocks, (rows, longest).
    slots: [S], the packed token of each slot; after the end of a row, the row's last token. None where the slots are
        the packed tokens as they are.
    places: [N], the slot of each packed token, or None.
    """

    shapes: list[tuple[int, int]]
    slots: Tensor | None = None
    places: Tensor | None = None


@dataclass
class SharedTokens:
    """Which of N packed tokens the sequences are made of, S of them one after the other, where some are in several.

    tokens: [S], the packed token. places: [N], the first of the S that is each packed token. begins: of the sequences,
    the packed token that is its first, known on the host.
    """

    tokens: Tensor
    places: Tensor
    begins: list[int]

    def to(self, device: torch.device) -> SharedTokens:
        return SharedTokens(self.tokens.to(device), self.places.to(device), self.begins)


@dataclass
class Packing:
    """Where the sequences of one packed row end and begin.

    lengths: of the b sequences, each at least 1, known on the host.
    position_ids: [1, N], from 0 in every sequence.
    cu_seqlens: [b + 1], int32, where the sequences begin, and their sum S: N, unless sequences share tokens.
    shared: for sequences that share their beginnings, where their tokens are; None where each has its own.
    """

    lengths: list[int]
    position_ids: Tensor
    cu_seqlens: Tensor
    shared: SharedTokens | None = None

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Packing:
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        return cls(list(lengths), position_ids, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    @classmethod
    def of_sequences(cls, sequences: Sequence[Sequence[int]], positions: Sequence[int]) -> Packing:
        """Of sequences given by the packed tokens that each one has; any may be in several.

        positions: [N], of the packed tokens. The longest sequence, of several the first, must lie in one piece.
        """
        lengths = [len(sequence) for sequence in sequences]
        tokens = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
        places = np.empty(len(positions), dtype=np.int64)
        places[tokens[::-1]] = np.arange(len(tokens))[::-1]  # of a token's several, the first is written last
        begins = [sequence[0] for sequence in sequences]
        shared = SharedTokens(torch.from_numpy(tokens), torch.from_numpy(places), begins)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, torch.tensor([list(positions)]), cu_seqlens, shared)

    def by_sequence(self, x: Tensor) -> Tensor:
        """[S, ...] of x [N, ...] of the packed tokens: of the tokens of the sequences, one after the other."""
        return x if self.shared is None else x.index_select(0, self.shared.tokens)

    def from_sequences(self, x: Tensor) -> Tensor:
        """[N, ...] of x [S, ...]: of a token that is in several sequences, what it is in the first."""
        return x if self.shared is None else x.index_select(0, self.shared.places)

    def to(self, device: torch.device) -> Packing:
        shared = None if self.shared is None else self.shared.to(device)
        return Packing(self.lengths, self.position_ids.to(device), self.cu_seqlens.to(device), shared)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Where in the row the longest sequence begins, and its length."""
        index = max(range(len(self.lengths)), key=self.lengths.__getitem__)
        begin = sum(self.lengths[:index]) if self.shared is None else self.shared.begins[index]
        return begin, self.lengths[index]

    @cached_property
    def rows(self) -> PaddedRows:
        """The padded rows for attention: blocks of sequences of similar length."""
        lengths = self.lengths
        if min(lengths) == max(lengths):
            return PaddedRows([(len(lengths), lengths[0])])
        groups = cheapest_runs(lengths, lambda longest, count: BLOCK_COST + count * longest**2)
        shapes = [(len(group), lengths[group[-1]]) for group in groups]
        begins = [0, *accumulate(lengths)]
        slots, places, slot = [], torch.empty(begins[-1], dtype=torch.long), 0
        for group, (_, longest) in zip(groups, shapes, strict=True):
            for i in group:
                slots.append(begins[i] + torch.arange(longest).clamp(max=lengths[i] - 1))
                places[begins[i] : begins[i + 1]] = torch.arange(slot, slot + lengths[i])
                slot += longest
        device = self.position_ids.device
        return PaddedRows(shapes, torch.cat(slots).to(device), places.to(device))


def share_prefixes(sequences: Sequence[Sequence[int]]) -> tuple[list[int], Packing, list[list[int]]]:
    """One row of tokens in which what several sequences begin with stands once: the row, where in it the sequences are,
    and of each the packed tokens that it is made of.

    Causal attention gives the tokens of a common beginning the same states in all of them.
    """
    row: list[int] = []
    positions: list[int] = []
    made_of: list[list[int]] = [[]] * len(sequences)
    tree: dict[int, int] = {}  # (the place before, from 1 on, or 0) * 2^32 + token -> its place in the row
    # The longest first, so that it is in one piece.
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        before, places = 0, []
        for position, token in enumerate(sequences[i]):
            key = before << 32 | token
            place = tree.get(key)
            if place is None:
                place = tree[key] = len(row)
                row.append(token)
                positions.append(position)
            places.append(place)
            before = place + 1
        made_of[i] = places
    lengths = [len(sequence) for sequence in sequences]
    if len(row) < sum(lengths):
        return row, Packing.of_sequences(made_of, positions), made_of
    ends = [*accumulate(lengths)]
    return (
        [token for sequence in sequences for token in sequence],
        Packing.of(lengths),
        [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)],
    )
