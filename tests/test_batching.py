"""Batches with little padding that score the right tokens."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.batching import PASS_COST, group_by_length, pad_right, score_responses


def cost(groups, lengths):
    return sum(max(lengths[i] for i in group) * len(group) + PASS_COST for group in groups)


def contiguous_groupings(order):
    """Every way to cut a list into runs."""
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        groups = [[order[0]]]
        for cut, index in zip(cuts, order[1:], strict=True):
            groups.append([index]) if cut else groups[-1].append(index)
        yield groups


@given(st.lists(st.integers(1, 900), min_size=1, max_size=8))
def test_groups_hold_every_index_once_and_cost_least(lengths):
    groups = group_by_length(lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    assert cost(groups, lengths) == min(cost(some, lengths) for some in contiguous_groupings(order))


def test_no_sequences_no_groups():
    assert group_by_length([]) == []


def test_pad_right():
    input_ids, mask = pad_right([[5, 6, 7], [8]], pad_token_id=0)
    assert input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_positions_predict_the_response_tokens():
    prompts, responses = [[1, 2], [3], [4, 5, 6]], [[7, 8, 9], [10], [11, 12]]
    batch = score_responses(prompts, responses, [2, 0], pad_token_id=0)
    assert batch.input_ids.tolist() == [[4, 5, 6, 11, 12], [1, 2, 7, 8, 9]]
    # the token that follows each position is the one it is scored for
    assert batch.input_ids.flatten()[batch.positions + 1].tolist() == batch.tokens.tolist() == [11, 12, 7, 8, 9]
    table = torch.zeros(3, 3)
    batch.put(table, torch.arange(1.0, 6.0))
    assert table.tolist() == [[3, 4, 5], [0, 0, 0], [1, 2, 0]]
    assert batch.take(table).tolist() == [1, 2, 3, 4, 5]
