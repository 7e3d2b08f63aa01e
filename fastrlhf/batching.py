"""Token sequences to padded or packed tensors, in groups that cost little, and with the positions that are scored."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

# What one more forward and backward costs beside its tokens, in tokens: every weight and its gradient are read and
# written once more.
PASS_COST = 200
# What one more block of padded rows costs in a layer's attention, in scores of a head (0.4 ms forward and backward on
# CPU in bf16, with 9 heads of 64; next to nothing in fp32).
BLOCK_COST = 4000


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences in groups of similar length, one forward each: those that together cost least, in padded
    tokens and PASS_COST for each group."""
    return cheapest_runs(lengths, lambda longest, count: PASS_COST + longest * count)


def cheapest_runs(lengths: Sequence[int], cost: Callable[[int, int], float]) -> list[list[int]]:
    """Indices of the sequences, sorted by length (then index) and cut into the runs of least total cost.

    cost: of a group, called as cost(longest, count). Found by dynamic programming over the ends of the groups.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    least = [0.0] + [math.inf] * len(order)  # of the first n sequences
    start = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        for begin in range(end):
            total = least[begin] + cost(longest, end - begin)
            if total < least[end]:
                least[end], start[end] = total, begin
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences in groups of at most `max_tokens` tokens: few of them, with balanced loads.

    A sequence longer than `max_tokens` stands alone. No more groups than first-fit decreasing finds (at most 11/9 of
    the fewest possible, and 2/3 of one; Dosa 2007), and often fewer.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    alone = [[i] for i, length in enumerate(lengths) if length > max_tokens]
    rest = [i for i, length in enumerate(lengths) if length <= max_tokens]
    if not rest:
        return alone
    tight = _first_fit_decreasing(lengths, rest, max_tokens)
    for count in range(math.ceil(sum(lengths[i] for i in rest) / max_tokens), len(tight) + 1):
        balanced = _balanced(lengths, rest, max(count, 1))
        if all(sum(lengths[i] for i in group) <= max_tokens for group in balanced):
            return alone + balanced
    return alone + tight


def split_into(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices of sequences in `count` groups of balanced token counts, none empty.

    The longest first, each to the group with the fewest tokens so far: the largest load is at most 4/3 of the least
    possible (Graham 1969). Raises ValueError for fewer sequences than groups.
    """
    if not 1 <= count <= len(lengths):
        raise ValueError(f"count={count} groups cannot be made of {len(lengths)} sequences; from 1 to as many can")
    return _balanced(lengths, range(len(lengths)), count)


def _longest_first(lengths: Sequence[int], indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda i: (-lengths[i], i))


def _balanced(lengths: Sequence[int], indices: Sequence[int], count: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, 0, group) for group in range(count)]  # tokens, then sequences: no group stays empty
    for i in _longest_first(lengths, indices):
        tokens, sequences, group = loads[0]
        groups[group].append(i)
        heapq.heapreplace(loads, (tokens + lengths[i], sequences + 1, group))
    return groups


def _first_fit_decreasing(lengths: Sequence[int], indices: Sequence[int], max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    left: list[int] = []
    for i in _longest_first(lengths, indices):
        fits = next((g for g, room in enumerate(left) if room >= lengths[i]), len(groups))
        if fits == len(groups):
            groups.append([])
            left.append(max_tokens)
        groups[fits].append(i)
        left[fits] -= lengths[i]
    return groups


def pad_right(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Sequences as input_ids [b, L] and attention_mask [b, L] (1 = a token of the sequence), padded on the right."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.tensor([[*s, *[pad_token_id] * (longest - len(s))] for s in sequences])
    lengths = torch.tensor([len(s) for s in sequences])
    return input_ids, (torch.arange(longest) < lengths[:, None]).long()


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
        tokens = [token for sequence in sequences for token in sequence]
        shared = SharedTokens(
            torch.tensor(tokens),
            torch.from_numpy(np.unique(tokens, return_index=True)[1]),
            [sequence[0] for sequence in sequences],
        )
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, torch.tensor([list(positions)]), cu_seqlens, shared)

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


@dataclass
class ScoredBatch:
    """b sequences and the tokens in them whose log-probs are wanted.

    input_ids: [b, L], padded on the right, or packed into one row [1, N] if there is a `packing`.
    positions: [n], indices into the flattened input_ids of the places that predict the scored tokens.
    tokens: [n], the scored tokens.
    rows, columns: [n], where each scored token stands in the caller's [B, T] tensors.
    sequences: [n], the sequence of this batch, from 0 to b - 1, that each scored token belongs to.
    sequence_rows: b numbers, the row of the caller's that each sequence is.
    shape: (b, the largest number of scored tokens in a sequence).
    """

    input_ids: Tensor
    positions: Tensor
    tokens: Tensor
    rows: Tensor
    columns: Tensor
    sequences: Tensor
    sequence_rows: list[int]
    shape: tuple[int, int]
    packing: Packing | None = None

    def to(self, device: torch.device) -> ScoredBatch:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return ScoredBatch(**{name: x.to(device) if hasattr(x, "to") else x for name, x in fields.items()})

    def take(self, x: Tensor) -> Tensor:
        """The values [n] of a [B, T] tensor at this batch's tokens."""
        return x[self.rows, self.columns]

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write values [n] of this batch's tokens into a [B, T] tensor."""
        x[self.rows, self.columns] = values

    def by_sequence(self, values: Tensor) -> Tensor:
        """Values [n] as [b, T], 0 after the end of a response; differentiable."""
        return values.new_zeros(self.shape).index_put((self.sequences, self.columns), values)

    def from_sequences(self, x: Tensor) -> Tensor:
        """The values [n] of a [b, T] tensor: what `by_sequence` undoes."""
        return x[self.sequences, self.columns]

    @property
    def mask(self) -> Tensor:
        """[b, T], 1 where `by_sequence` has a token; int64."""
        return self.by_sequence(torch.ones_like(self.tokens))


def fed_tokens(prompt: Sequence[int], response: Sequence[int]) -> list[int]:
    """What a model reads to score a response: all but the last token, after which nothing is scored, and of a prompt
    without response one token, to have any."""
    if not prompt:
        raise ValueError("prompts: one has no tokens, and nothing would predict the first token of its response")
    return [*prompt, *response[:-1]] if response else list(prompt[:1])


def score_responses(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int]
) -> ScoredBatch:
    """The padded batch that scores every token of `responses[row]` after `prompts[row]`, for each row of `rows`.

    A response may be empty, a prompt may not. The padding is token 0: nothing reads what becomes of it, and a
    tokenizer's own may lie outside the model's vocabulary.
    """
    input_ids, _ = pad_right([fed_tokens(prompts[row], responses[row]) for row in rows], 0)
    begins = [i * input_ids.shape[1] for i in range(len(rows))]
    return ScoredBatch(input_ids, **_scored(responses, rows, _predicting(prompts, responses, rows, begins)))


def pack_responses(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int]
) -> ScoredBatch:
    """`score_responses` without padding: all sequences in one row [1, N], in the order of `rows`."""
    sequences = [fed_tokens(prompts[row], responses[row]) for row in rows]
    packing = Packing.of([len(sequence) for sequence in sequences])
    begins = [0, *accumulate(packing.lengths)]
    input_ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    positions = _predicting(prompts, responses, rows, begins)
    return ScoredBatch(input_ids, **_scored(responses, rows, positions), packing=packing)


def pack_sharing_prompts(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int]
) -> ScoredBatch:
    """`pack_responses` with a prompt in the row once, however many responses it has, which follow it one by one."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for sequence, row in enumerate(rows):
        groups.setdefault(tuple(prompts[row]), []).append(sequence)
    input_ids: list[int] = []
    position_ids: list[int] = []
    sequences: list[list[int]] = []
    positions: list[Sequence[int]] = [()] * len(rows)
    for prompt, members in groups.items():
        begin = len(input_ids)
        # The longest first, so that it is one piece with its prompt.
        for sequence in sorted(members, key=lambda sequence: -len(responses[rows[sequence]])):
            response = responses[rows[sequence]]
            fed = fed_tokens(prompt, response)
            known = min(len(prompt), len(fed)) if len(input_ids) > begin else 0
            tokens = [*range(begin, begin + known), *range(len(input_ids), len(input_ids) + len(fed) - known)]
            input_ids += fed[known:]
            position_ids += range(known, len(fed))
            sequences.append(tokens)
            positions[sequence] = tokens[len(prompt) - 1 :] if response else ()
    packing = Packing.of_sequences(sequences, position_ids)
    return ScoredBatch(torch.tensor([input_ids]), **_scored(responses, rows, positions), packing=packing)


def _predicting(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int], begins: Sequence[int]
) -> list[range]:
    """Of every response the places that predict it, where sequences begin at `begins` in the flattened input_ids."""
    # The token before the response's first one predicts it.
    firsts = [begin + len(prompts[row]) - 1 for begin, row in zip(begins, rows, strict=False)]
    return [range(first, first + len(responses[row])) for first, row in zip(firsts, rows, strict=True)]


def _scored(
    responses: Sequence[Sequence[int]], rows: Sequence[int], positions: Sequence[Sequence[int]]
) -> dict[str, Tensor | list[int] | tuple[int, int]]:
    """The other fields of a ScoredBatch; positions: of every response the places that predict it."""
    fields: dict[str, list[int]] = {name: [] for name in ("positions", "tokens", "rows", "columns", "sequences")}
    for sequence, row in enumerate(rows):
        length = len(responses[row])
        fields["positions"] += positions[sequence]
        fields["tokens"] += responses[row]
        fields["rows"] += [row] * length
        fields["columns"] += range(length)
        fields["sequences"] += [sequence] * length
    of_tokens = {name: torch.tensor(x, dtype=torch.long) for name, x in fields.items()}
    shape = len(rows), max(len(responses[row]) for row in rows)
    return {**of_tokens, "sequence_rows": list(rows), "shape": shape}
