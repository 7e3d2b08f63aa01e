"""gae_packed: sequences one after the other are the rows of gae, bit for bit, wherever they begin and end."""

import random

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, poison, random_tokenwise, same_bits

from fastrlhf import functional as F
from fastrlhf import reference

MODES = ("carry", "zero", "none")
OPTIONS = {"gamma": 0.99, "lam": 0.9}
LENGTHS = {
    "around the vectors": [1, 7, 8, 9, 15, 16, 17, 0, 31, 32, 33],
    "around the chunks": [1023, 1024, 1025, 2, 2049, 3],
    "one": [1],
    "nothing but empty ones": [0, 0, 0],
    "many short ones": [i % 5 for i in range(3000)],
    "no sequences": [],
}


def packed_case(lengths, dtype=torch.int64):
    rewards, values, mask = random_tokenwise(2, sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    return rewards, values, ends, mask, torch.linspace(-1, 1, len(lengths))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("mask_mode", MODES)
def test_against_the_oracle(lengths, mask_mode):
    rewards, values, ends, mask, last = packed_case(lengths)
    for m, bootstrap in ((mask, last), (None, None)):

        def run(function, dtype, m=m, bootstrap=bootstrap):
            bootstrap = None if bootstrap is None else bootstrap.to(dtype)
            options = {"mask_mode": mask_mode, "bootstrap_values": bootstrap, **OPTIONS}
            return function(rewards.to(dtype), values.to(dtype), ends, m, **options)

        ours = run(F.gae_packed, torch.float32)
        eager, exact = (run(reference.gae_packed, dtype) for dtype in (torch.float32, torch.float64))
        for a, b, c in zip(ours, eager, exact, strict=True):
            assert_as_good_as_eager(a, b, c, 64 * EPS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask_mode", MODES)
def test_packed_is_padded_bit_for_bit(mask_mode, dtype):
    lengths = [i * 37 % 150 for i in range(60)] + [1100]
    rewards, values, ends, mask, last = packed_case(lengths, dtype)
    packed = F.gae_packed(rewards, values, ends, mask, mask_mode=mask_mode, bootstrap_values=last, **OPTIONS)
    for b, n in enumerate(lengths):
        rows = [x[None, ends[b] : ends[b + 1]] for x in (rewards, values, mask)]
        alone = F.gae(*rows, mask_mode=mask_mode, bootstrap_values=last[b : b + 1], **OPTIONS)
        assert all(same_bits(a[ends[b] : ends[b + 1]], c[0]) for a, c in zip(packed, alone, strict=True)), n


def test_a_padded_batch_holds_the_bits_of_the_packed_one():
    """With "carry", padding is cut out wherever it stands: on the right, on the left, in between."""
    lengths = [0, 1, 16, 17, 100, 1024, 1100]
    rewards, values, ends, _, last = packed_case(lengths)
    packed = F.gae_packed(rewards, values, ends, bootstrap_values=last, **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    for place in ("right", "left", "between"):
        mask = torch.zeros(len(lengths), 1300, dtype=torch.bool)
        for b, n in enumerate(lengths):
            spots = {"right": torch.arange(n), "left": torch.arange(1300 - n, 1300)}
            spots["between"] = torch.randperm(1300, generator=generator)[:n]
            mask[b, spots[place]] = True
        padded = [torch.full(mask.shape, float("nan")).masked_scatter(mask, x) for x in (rewards, values)]
        results = F.gae(*padded, mask, bootstrap_values=last, **OPTIONS)
        assert all(same_bits(a[mask], b) for a, b in zip(results, packed, strict=True)), place
        assert not any(x[~mask].any() for x in results)


@pytest.mark.parametrize("seed", range(30))
def test_runs_and_gaps_of_any_length_are_cut_out_bit_for_bit(seed):
    """Long runs are scanned where they lie, short ones are gathered: nobody can tell."""
    choose = random.Random(seed)
    pieces = [choose.choice([1, 2, 7, 15, 16, 17, 63, 64, 65, 200, 1023, 1024, 1025]) for _ in range(12)]
    if seed % 3:
        pieces = [n % 70 + 1 for n in pieces]
    mask = torch.cat([torch.full((n,), (i + seed) % 2 == 0) for i, n in enumerate(pieces)])
    rewards, values, _ = random_tokenwise(2, 1, len(mask), seed=seed)
    dense, last = [x[:, mask] for x in (rewards, values)], torch.tensor([0.3])
    padded = F.gae(
        poison(rewards, mask[None]), poison(values, mask[None]), mask[None], bootstrap_values=last, **OPTIONS
    )
    packed = F.gae(*dense, bootstrap_values=last, **OPTIONS)
    assert all(same_bits(a[:, mask], b) for a, b in zip(padded, packed, strict=True))
    assert not any(x[:, ~mask].any() for x in padded)


@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
def test_what_stands_under_the_mask_changes_no_bit(mask_mode):
    rewards, values, ends, mask, last = packed_case([3, 0, 40, 1500, 16])
    options = {"mask_mode": mask_mode, "bootstrap_values": last}
    clean = F.gae_packed(rewards, values, ends, mask, **options)
    dirty = F.gae_packed(poison(rewards, mask), poison(values, mask), ends, mask, **options)
    assert all(same_bits(a, b) for a, b in zip(clean, dirty, strict=True))


def test_the_number_of_threads_changes_no_bit():
    rewards, values, ends, mask, _ = packed_case([5, 60_000, 0, 300, 7, 20_000, 40_000])
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(F.gae_packed(rewards, values, ends, mask))
    torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("function", [F.gae_packed, reference.gae_packed])
@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ([0, 3], r"\[0, 3\]"),
        ([1, 5], r"\[1, 5\]"),
        ([0, 4, 2, 5], r"\[0, 4, 2, 5\]"),
        ([0, 9, 5], r"\[0, 9, 5\]"),
        ([-1, 5], r"\[-1, 5\]"),
        ([0] * 12 + [4], "13 numbers from 0 to 4"),
    ],
)
def test_ends_that_lead_outside_raise_index_error(function, ends, shown):
    message = rf"cu_seqlens: got {shown}, wanted numbers that never fall, from 0 to 5"
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(IndexError, match=message):
            function(torch.zeros(5), torch.zeros(5), torch.tensor(ends, dtype=dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(1, 5)}, r"rewards: got shape \(1, 5\), wanted 1 dimension"),
        ({"values": torch.zeros(4)}, r"values: got shape \(4,\), wanted \(5,\), the shape of rewards"),
        ({"mask": torch.ones(4)}, r"mask: got shape \(4,\)"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens: got dtype float32, wanted int32, int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, r"cu_seqlens: got shape \(0,\)"),
        ({"bootstrap_values": torch.zeros(2)}, r"bootstrap_values: got shape \(2,\), wanted \(1,\)"),
        ({"mask_mode": "skip"}, "mask_mode: got 'skip'"),
        ({"gamma": -1}, "gamma: got -1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"rewards": torch.zeros(5), "values": torch.zeros(5), "cu_seqlens": torch.tensor([0, 5])}
    with pytest.raises(ValueError, match=message):
        F.gae_packed(**(arguments | change))


def test_opcheck_and_compile():
    rewards, values, ends, mask, last = packed_case([3, 0, 4])
    numbers = torch.tensor([0.9, 0.8])
    op = torch.ops.fastrlhf.gae_packed.default
    torch.library.opcheck(op, (rewards, values, ends, mask, last, numbers, 0))
    torch.library.opcheck(op, (rewards, values, ends.int(), None, None, numbers, 2))
    compiled = torch.compile(F.gae_packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards, values, ends, mask), F.gae_packed(rewards, values, ends, mask))
