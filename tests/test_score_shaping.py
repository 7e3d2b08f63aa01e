"""Scores after normalisation, clip and penalties: by hand, and over several ranks."""

import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from fastrlhf.rewards import RunningNormalizer, ScoreShaper, normalize, normalize_groups


def arguments(**options):
    defaults = {
        "reward_normalization": "none",
        "normalize_each_reward": False,
        "num_generations": 1,
        "reward_clip": None,
        "missing_eos_penalty": None,
        "length_penalty": 0.0,
        "response_length": 10,
    }
    return SimpleNamespace(**defaults | options)


def shape(scores, finished=None, lengths=None, **options):
    scores = torch.tensor(scores)
    finished = torch.ones(len(scores), dtype=torch.bool) if finished is None else torch.tensor(finished)
    lengths = torch.ones(len(scores), dtype=torch.long) if lengths is None else torch.tensor(lengths)
    return ScoreShaper(arguments(**options))(scores, finished, lengths).tolist()


def test_by_default_nothing_changes():
    assert shape([1.5, -200.0], finished=[False, True], lengths=[3, 10]) == [1.5, -200.0]


def test_clip():
    assert shape([1.5, -200.0, 7.0], reward_clip=5.0) == [1.5, -5.0, 5.0]


def test_missing_eos_penalty():
    assert shape([1.0, 2.0], finished=[False, True], missing_eos_penalty=3.0) == [-2.0, 2.0]


def test_length_penalty_is_by_the_share_of_response_length():
    assert shape([1.0, 1.0], lengths=[5, 10], length_penalty=0.5) == [0.75, 0.5]


def test_order_is_normalise_clip_penalties():
    # normalised: -/+ 1/sqrt(2); clipped to 0.5; the penalties come off after the clip, which does not hold them
    result = shape(
        [10.0, 30.0],
        finished=[False, True],
        lengths=[10, 5],
        reward_normalization="batch",
        reward_clip=0.5,
        missing_eos_penalty=1.0,
        length_penalty=0.25,
    )
    assert result == [-0.5 - 1.0 - 0.25, 0.5 - 0.125]


def test_groups_by_hand():
    # (1, 3): mean 2, unbiased std sqrt(2); (5, 5): no spread
    result = shape([1.0, 3.0, 5.0, 5.0], reward_normalization="group", num_generations=2)
    assert result == pytest.approx([-(2**-0.5), 2**-0.5, 0.0, 0.0], abs=1e-6)


def test_groups_do_not_change_under_shift_and_scale_of_one():
    torch.manual_seed(0)
    scores = torch.randn(12)
    moved = scores.clone()
    moved[4:8] = 3 * moved[4:8] - 20
    torch.testing.assert_close(normalize_groups(moved, 4), normalize_groups(scores, 4), rtol=0, atol=1e-5)


def test_groups_must_be_whole():
    with pytest.raises(ValueError, match="got 5, wanted a multiple of num_generations=2"):
        normalize_groups(torch.ones(5), 2)


@pytest.mark.parametrize("normalization", ["batch", "group", "running"])
def test_equal_scores_become_zero_whatever_the_rounding_of_their_mean(normalization):
    for value in (0.1, 1 / 3, 1e6 / 7):
        result = shape([value] * 7, reward_normalization=normalization, num_generations=7)
        assert result == pytest.approx([0.0] * 7, abs=1e-3)


@pytest.mark.parametrize("normalization", ["batch", "running"])
def test_two_ranks_get_what_one_process_gets(normalization):
    torch.manual_seed(0)
    batches = [torch.randn(8) * 5 + 3 for _ in range(3)]
    ones, ends = torch.ones(8, dtype=torch.long), torch.ones(8, dtype=torch.bool)
    alone = ScoreShaper(arguments(reward_normalization=normalization))
    current = {}
    ranks = [
        ScoreShaper(arguments(reward_normalization=normalization), gather=lambda x: current["all"]) for _ in range(2)
    ]
    for batch in batches:
        current["all"] = batch
        wanted = alone(batch, ends, ones)
        parts = [rank(part, ends[:4], ones[:4]) for rank, part in zip(ranks, batch.split(4), strict=True)]
        assert torch.cat(parts).tolist() == wanted.tolist()
    assert ranks[0].state_dict() == ranks[1].state_dict() == alone.state_dict()


def test_running_goes_on_from_its_state_bit_for_bit():
    torch.manual_seed(0)
    batches = torch.randn(4, 6) * 3 + 1
    ends, lengths = torch.ones(6, dtype=torch.bool), torch.ones(6, dtype=torch.long)
    through = ScoreShaper(arguments(reward_normalization="running"))
    results = [through(batch, ends, lengths) for batch in batches]
    first = ScoreShaper(arguments(reward_normalization="running"))
    for batch in batches[:2]:
        first(batch, ends, lengths)
    second = ScoreShaper(arguments(reward_normalization="running"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch, wanted in zip(batches[2:], results[2:], strict=True):
        assert second(batch, ends, lengths).tolist() == wanted.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_running_statistics_take_no_bad_number(bad):
    running = RunningNormalizer()
    running(torch.tensor([1.0, 2.0]))
    before = running.state_dict()
    with pytest.raises(ValueError, match="not finite"):
        running(torch.tensor([1.0, 2.0]), over=torch.tensor([1.0, 2.0, bad]))  # another rank's
    assert running.state_dict() == before


def test_batch_statistics_of_all_ranks():
    everyone = torch.tensor([1.0, 2.0, 3.0, 6.0])
    torch.testing.assert_close(normalize(everyone[:2], everyone), (everyone[:2] - 3) / everyone.std())


@pytest.mark.parametrize("name", ["finished", "lengths"])
def test_shapes(name):
    given = {"finished": torch.ones(3, dtype=torch.bool), "lengths": torch.ones(3)}
    given[name] = given[name][:1]
    with pytest.raises(ValueError, match=rf"{name}: got shape \(1,\), wanted \(3,\)"):
        ScoreShaper(arguments())(torch.ones(3), **given)


class TestEach:
    """Every reward function on a scale of its own before the weights."""

    EACH: ClassVar = {
        "a": torch.tensor([0.0, 2.0]),
        "b": torch.tensor([300.0, 100.0]),
        "a/part": torch.tensor([9.0, 9.0]),
    }
    GIVEN = (torch.tensor([True, True]), torch.tensor([1, 1]))

    def test_by_hand(self):
        args = arguments(reward_normalization="batch", normalize_each_reward=True)
        shaper = ScoreShaper(args, weights={"a": 1.0, "b": 3.0})
        # -/+ 1/sqrt(2) for a, the other way round for b, whatever their scales
        wanted = torch.tensor([2.0, -2.0]) / 2**0.5
        torch.testing.assert_close(shaper(torch.zeros(2), *self.GIVEN, self.EACH), wanted)

    def test_running_statistics_of_each_are_kept(self):
        args = arguments(reward_normalization="running", normalize_each_reward=True)
        first, second = (ScoreShaper(args, weights={"a": 1.0, "b": 0.0}) for _ in range(2))
        first(torch.zeros(2), *self.GIVEN, self.EACH)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        more = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([7.0, 1.0])}
        results = [shaper(torch.zeros(2), *self.GIVEN, more).tolist() for shaper in (first, second)]
        assert results[0] == results[1]
        assert first.running["a"].mean == 2.0
