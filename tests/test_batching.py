"""Batches with little padding that score the right tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.batching import group_by_length, pad_right, score_responses


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60))
def test_groups_hold_every_index_once_and_waste_little(lengths):
    groups = group_by_length(lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert max(lengths[i] for i in group) <= 1.25 * min(lengths[i] for i in group) + 2


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
