"""Batches with little padding or none that score the right tokens."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.batching import pack_responses, pack_sharing_prompts, pad_right, score_responses, text_batches
from fastrlhf.grouping import PASS_COST, batches_of, group_by_length, runs_by_tokens, split_by_tokens, split_into
from fastrlhf.packing import Packing, share_prefixes

PROMPTS, RESPONSES = [[1, 2], [3], [4, 5, 6], [7, 7]], [[7, 8, 9], [10], [11, 12], []]


def cost(groups, lengths):
    return sum(max(lengths[i] for i in group) * len(group) + PASS_COST for group in groups)


def contiguous_groupings(order):
    """Every way to cut a list into runs."""
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        groups = [[order[0]]]
        for cut, index in zip(cuts, order[1:], strict=True):
            groups.append([index]) if cut else groups[-1].append(index)
        yield groups


def loads(groups, lengths):
    return [sum(lengths[i] for i in group) for group in groups]


def groupings(indices):
    """Every way to put things into groups."""
    if not indices:
        yield []
        return
    for rest in groupings(indices[1:]):
        yield [[indices[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [indices[0], *rest[i]], *rest[i + 1 :]]


@given(st.lists(st.integers(1, 900), min_size=1, max_size=8))
def test_groups_hold_every_index_once_and_cost_least(lengths):
    groups = group_by_length(lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    assert cost(groups, lengths) == min(cost(some, lengths) for some in contiguous_groupings(order))


def test_no_sequences_no_groups():
    assert group_by_length([]) == []
    assert split_by_tokens([], 10) == []


class TestTokenBudget:
    @given(st.lists(st.integers(1, 900), max_size=60), st.integers(1, 2000))
    def test_every_sequence_once_and_no_group_over_the_budget(self, lengths, budget):
        groups = split_by_tokens(lengths, budget)
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
        assert all(groups)
        assert all(
            load <= budget or len(group) == 1 for group, load in zip(groups, loads(groups, lengths), strict=True)
        )
        assert groups == split_by_tokens(list(lengths), budget)

    @given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(20, 40))
    def test_few_groups(self, lengths, budget):
        possible = (g for g in groupings(list(range(len(lengths)))) if max(loads(g, lengths)) <= budget)
        fewest = min(map(len, possible))
        assert fewest <= len(split_by_tokens(lengths, budget)) <= math.floor(11 / 9 * fewest + 2 / 3)

    def test_balanced_and_not_full_then_rest(self):
        assert loads(split_by_tokens([10] * 12, 90), [10] * 12) == [60, 60]

    def test_balance_gives_way_to_a_tight_fit(self):
        lengths = [5, 5, 4, 4, 3, 3, 3]  # 5 + 5 + 4 and 4 + 3 + 3 + 3; balanced as they come, one of two has 15
        groups = split_by_tokens(lengths, 14)
        assert len(groups) == 2
        assert max(loads(groups, lengths)) <= 14

    @given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.data())
    def test_a_given_number_of_groups_is_balanced(self, lengths, data):
        count = data.draw(st.integers(1, len(lengths)))
        groups = split_into(lengths, count)
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
        assert len(groups) == count
        assert all(groups)
        least = min(max(loads(g, lengths)) for g in groupings(list(range(len(lengths)))) if len(g) == count)
        assert 3 * count * max(loads(groups, lengths)) <= (4 * count - 1) * least

    @given(st.lists(st.integers(1, 20), max_size=8), st.integers(1, 40))
    def test_runs_are_the_fewest_and_of_these_the_most_even(self, lengths, budget):
        runs = runs_by_tokens(lengths, budget)
        assert [i for run in runs for i in run] == list(range(len(lengths)))
        if not lengths:
            return
        allowed = [
            cut
            for cut in contiguous_groupings(list(range(len(lengths))))
            if all(load <= budget or len(run) == 1 for run, load in zip(cut, loads(cut, lengths), strict=True))
        ]
        fewest = min(map(len, allowed))
        assert len(runs) == fewest
        assert max(loads(runs, lengths)) == min(max(loads(cut, lengths)) for cut in allowed if len(cut) == fewest)

    def test_errors(self):
        with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
            split_by_tokens([1], 0)
        for count in (0, 3):
            with pytest.raises(ValueError, match=f"count={count} groups cannot be made of 2 sequences"):
                split_into([1, 2], count)


def test_pad_right():
    input_ids, mask = pad_right([[5, 6, 7], [8]], pad_token_id=0)
    assert input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_padded_positions_predict_the_response_tokens():
    batch = score_responses(PROMPTS, RESPONSES, [2, 3, 0])
    assert batch.packing is None
    assert batch.input_ids.tolist() == [[4, 5, 6, 11], [7, 0, 0, 0], [1, 2, 7, 8]]  # no last token is read
    assert batch.positions.tolist() == [2, 3, 9, 10, 11]
    assert batch.tokens.tolist() == [11, 12, 7, 8, 9]


def test_packed_positions_predict_the_response_tokens():
    batch = pack_responses(PROMPTS, RESPONSES, [2, 3, 0, 1])
    assert batch.input_ids.tolist() == [[4, 5, 6, 11, 7, 1, 2, 7, 8, 3]]
    assert batch.packing.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3, 0]]
    assert batch.packing.cu_seqlens.tolist() == [0, 4, 5, 9, 10]
    assert batch.packing.cu_seqlens.dtype == torch.int32
    assert batch.positions.tolist() == [2, 3, 6, 7, 8, 9]
    assert batch.tokens.tolist() == [11, 12, 7, 8, 9, 10]


def test_a_shared_prompt_stands_once_and_predicts_every_first_token():
    prompts, responses = [[1, 2], [3], [1, 2], [1, 2]], [[7], [8, 9], [4, 5, 6], []]
    batch = pack_sharing_prompts(prompts, responses, [0, 1, 2, 3])
    assert batch.input_ids.tolist() == [[1, 2, 4, 5, 3, 8]]
    assert batch.packing.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.packing.lengths == [2, 2, 4, 1]
    assert batch.packing.cu_seqlens.tolist() == [0, 2, 4, 8, 9]
    assert batch.packing.shared.tokens.tolist() == [0, 1, 4, 5, 0, 1, 2, 3, 0]
    assert batch.packing.shared.places.tolist() == [0, 1, 6, 7, 2, 3]
    assert batch.packing.longest == (0, 4)
    assert batch.positions.tolist() == [1, 4, 5, 1, 2, 3]
    assert batch.tokens.tolist() == [7, 8, 9, 4, 5, 6]
    assert batch.by_sequence(batch.tokens).tolist() == [[7, 0, 0], [8, 9, 0], [4, 5, 6], [0, 0, 0]]


def test_words_that_answers_begin_with_are_shared_too():
    batch = pack_sharing_prompts([[1, 2], [1, 2]], [[3, 4, 5], [3, 4, 6]], [0, 1])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4]]  # neither last token is read
    assert batch.positions.tolist() == [1, 2, 3] * 2
    assert batch.tokens.tolist() == [3, 4, 5, 3, 4, 6]


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8)


@given(SEQUENCES)
def test_every_beginning_stands_once(sequences):
    row, packing, made_of = share_prefixes(sequences)
    beginnings = {tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))}
    assert len(row) == len(beginnings)
    for sequence, tokens in zip(sequences, made_of, strict=True):
        assert [row[token] for token in tokens] == sequence
        assert packing.position_ids[0, tokens].tolist() == list(range(len(sequence)))
    assert packing.lengths == [len(sequence) for sequence in sequences]
    begin, longest = packing.longest
    assert list(range(begin, begin + longest)) in made_of  # in one piece
    assert longest == max(packing.lengths)
    tokens = torch.arange(len(row))
    assert packing.by_sequence(tokens).tolist() == [token for of_one in made_of for token in of_one]
    assert torch.equal(packing.from_sequences(packing.by_sequence(tokens)), tokens)
    assert (packing.shared is None) == (len(row) == sum(map(len, sequences)))


@given(SEQUENCES, st.data())
def test_places_in_batches_of_texts(texts, data):
    some = [data.draw(st.lists(st.integers(0, len(text) - 1), max_size=3)) for text in texts]
    for places in (None, some):
        wanted = [(i, at) for i, text in enumerate(texts) for at in ([len(text) - 1] if places is None else places[i])]
        for how in ({"packed": True}, {"packed": False}, {"packed": False, "one_batch": True}):
            batches = text_batches(texts, 9, places, **how)
            assert len(batches) == 1 or not how["packed"]
            found = []
            for batch in batches:
                assert batch.at_ends == (places is None)
                assert (batch.packing is None) == (batch.attention_mask is not None) == (not how["packed"])
                ids = batch.input_ids.flatten()[batch.places].tolist()
                found += zip(batch.texts.tolist(), ids, strict=True)
            assert sorted(found) == sorted((i, texts[i][at]) for i, at in wanted)


@given(SEQUENCES, st.integers(1, 4))
def test_batches_of_texts_that_belong_together(texts, size):
    for packed in (False, True):
        batches = list(batches_of(texts, size, packed))
        order = [texts[i] for batch in batches for i in batch]
        assert sorted(i for batch in batches for i in batch) == list(range(len(texts)))
        assert all(len(batch) <= size for batch in batches)
        assert order == sorted(texts) if packed else list(map(len, order)) == sorted(map(len, texts))


@pytest.mark.parametrize("build", [score_responses, pack_responses, pack_sharing_prompts])
class TestScoredBatch:
    def test_of_the_callers_tensors(self, build):
        batch = build(PROMPTS, RESPONSES, [2, 0]).to("cpu")
        table = torch.zeros(4, 3)
        batch.put(table, torch.arange(1.0, 6.0))
        assert table.tolist() == [[3, 4, 5], [0, 0, 0], [1, 2, 0], [0, 0, 0]]
        assert batch.take(table).tolist() == [1, 2, 3, 4, 5]

    def test_by_sequence(self, build):
        batch = build(PROMPTS, RESPONSES, [2, 3, 0])
        values = torch.arange(1.0, 6.0, requires_grad=True)
        table = batch.by_sequence(values)
        assert table.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
        assert batch.mask.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
        assert batch.from_sequences(table).tolist() == values.tolist()
        (table * torch.arange(9.0).view(3, 3)).sum().backward()
        assert values.grad.tolist() == [0, 1, 6, 7, 8]

    def test_only_empty_responses(self, build):
        batch = build([[4, 5], [6]], [[], []], [0, 1])
        assert batch.input_ids.flatten().tolist() == [4, 6]
        assert batch.tokens.numel() == 0
        assert batch.tokens.dtype == torch.long
        assert batch.by_sequence(torch.zeros(0)).shape == (2, 0)

    def test_a_prompt_without_tokens(self, build):
        with pytest.raises(ValueError, match="prompts: one has no tokens"):
            build([[]], [[1]], [0])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_padded_rows_of_a_packing(lengths):
    """Every packed token has a slot of its own, in its place in a row; the padding repeats the row's own last token."""
    packing = Packing.of(lengths)
    rows, total = packing.rows, sum(lengths)
    assert packing.longest == (sum(lengths[: lengths.index(max(lengths))]), max(lengths))
    assert sum(count for count, _ in rows.shapes) == len(lengths)
    slots = torch.arange(total) if rows.slots is None else rows.slots
    places = torch.arange(total) if rows.places is None else rows.places
    assert slots[places].tolist() == list(range(total))
    assert len(set(places.tolist())) == total
    position, sequence = packing.position_ids[0], torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert [int(packing.cu_seqlens[i]) for i in sequence] == (torch.arange(total) - position).tolist()
    for block, (count, longest) in zip(slots.split([n * width for n, width in rows.shapes]), rows.shapes, strict=True):
        block = block.view(count, longest)
        assert (sequence[block] == sequence[block[:, :1]]).all()
        last = torch.tensor(lengths)[sequence[block]] - 1
        assert torch.equal(position[block], torch.arange(longest).minimum(last))
