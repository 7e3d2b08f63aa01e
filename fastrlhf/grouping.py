"""Which sequences go through a model together: groups of their indices, by their lengths."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence

# What one more forward and backward costs beside its tokens, in tokens: every weight and its gradient are read and
# written once more.
PASS_COST = 200


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences in groups of similar length, one forward each: those that together cost least, in padded
    tokens and PASS_COST for each group."""
    return cheapest_runs(lengths, lambda longest, count: PASS_COST + longest * count)


def batches_of(texts: Sequence[Sequence[int]], size: int, packed: bool) -> Iterator[list[int]]:
    """Indices of token sequences, at most `size` at a time: beside each other those that begin alike, which can share
    that once packed, else those of similar length."""
    order = sorted(range(len(texts)), key=lambda i: texts[i] if packed else len(texts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


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


def runs_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, as they stand, cut into the fewest runs of at most `max_tokens` tokens, and of these ways
    the one whose largest run is the smallest. A sequence longer than `max_tokens` stands alone."""

    def cut(limit: int) -> list[list[int]]:
        runs: list[list[int]] = []
        load = 0
        for i, length in enumerate(lengths):
            if not runs or load + length > limit:
                runs.append([])
                load = 0
            runs[-1].append(i)
            load += length
        return runs

    fewest = len(cut(max_tokens))
    least, most = 1, max_tokens
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if len(cut(middle)) <= fewest else (middle + 1, most)
    return cut(least)


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
