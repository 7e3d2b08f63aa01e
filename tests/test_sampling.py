"""sample_tokens: the distribution it draws from, its random numbers, filters and log-probs, and its contract."""

import math
import os
import subprocess
import sys

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, peak_allocation, random_logits, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from fastrlhf import backends, reference
from fastrlhf import functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf
UNLIKELY = 1e-4  # what a p-value must exceed; the keys are fixed, so it does at every run or at none
SERVED_BY = backends.backend_table()["sample_tokens"]["cpu"]
kernel_only = pytest.mark.skipif(SERVED_BY == "reference", reason="the reference serves sample_tokens on CPU here")


def draw(logits, *, seed=0, sequence=None, position=None, **options):
    """Row i is the first token of sequence i where nothing else is said."""
    rows = torch.arange(len(logits))
    sequence = rows if sequence is None else sequence
    position = torch.zeros_like(rows) if position is None else position
    return F.sample_tokens(logits, seed=seed, sequence=sequence, position=position, **options)


def draws(logits, number, *, seed=0, **options):
    """`number` tokens from one row, at 1000 positions of each sequence."""
    i = torch.arange(number)
    return draw(logits.expand(number, -1), seed=seed, sequence=i // 1000, position=i % 1000, **options)[0]


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Of one row, by the definitions of the filters, a token at a time, in fp64."""
    x = logits.double().tolist()
    likely_first = sorted((i for i in range(len(x)) if x[i] > -INF), key=lambda i: -x[i])
    weight = {i: math.exp((x[i] - x[likely_first[0]]) / temperature) for i in likely_first}
    if top_k:
        last = likely_first[: min(top_k, len(likely_first))][-1]
        likely_first = [i for i in likely_first if x[i] >= x[last]]
    if top_p < 1:
        total, mass = sum(weight[i] for i in likely_first), 0.0
        for last in likely_first:
            mass += weight[last]
            if mass >= top_p * total:
                break
        likely_first = [i for i in likely_first if x[i] >= x[last]]
    kept = [i for i in likely_first if weight[i] >= min_p]
    p = torch.zeros(len(x), dtype=torch.float64)
    p[kept] = torch.tensor([weight[i] for i in kept], dtype=torch.float64)
    return p / p.sum()


def chi_square_p_value(counts, p):
    """That counts of p come out as far from their expectation as these, or further (Pearson 1900)."""
    assert not counts[p == 0].any(), "drawn, but impossible"
    counts, expected = counts[p > 0].double(), counts.sum() * p[p > 0]
    rare = expected < 10  # too few to be near a normal distribution: they go into one cell
    if rare.any():
        assert expected[rare].sum() >= 10
        counts, expected = (torch.cat([x[~rare], x[rare].sum().view(1)]) for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def steps(count, size):
    return size * torch.arange(count).flip(0)[torch.randperm(count, generator=torch.Generator().manual_seed(1))]


TIES = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 2.0, -1.0, -1.0, 1.0])
HOLES = torch.where(torch.arange(40) % 3 == 1, -INF, random_logits(40, scale=1.5)[0])
DISTRIBUTIONS = {
    "flat": (torch.zeros(37), {}),
    "peaked": (steps(12, 0.7), {}),
    "normal": (random_logits(64, scale=1.0)[0], {}),
    "cold": (random_logits(24, scale=0.5)[0], {"temperature": 0.3}),
    "hot": (random_logits(24, scale=3.0)[0], {"temperature": 2.0}),
    "top_k": (random_logits(50, scale=1.5)[0], {"top_k": 9}),
    "top_p": (random_logits(50, scale=1.5)[0], {"top_p": 0.83}),
    "min_p": (random_logits(50, scale=1.5)[0], {"min_p": 0.07}),
    "all the filters": (HOLES, {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.06}),
    "ties": (TIES, {"temperature": 0.9, "top_k": 3, "top_p": 0.97}),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_hundred_thousand_draws_fit_the_distribution(name):
    """A million in all, by Pearson's chi-square. It would see one token in twenty that is 10 % too likely."""
    logits, options = DISTRIBUTIONS[name]
    p = probabilities(logits, **options)
    seed = 1000 + list(DISTRIBUTIONS).index(name)
    counts = draws(logits, 100_000, seed=seed, **options).bincount(minlength=len(logits))
    assert chi_square_p_value(counts, p) > UNLIKELY


# ---------------------------------------------------------------------------------------------- random numbers


def words(text):
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    """philox4x32 with 10 rounds, from kat_vectors of the paper's Random123."""
    assert reference.philox(words(counter), words(key)) == words(expected)


def test_the_key_is_the_seed_and_the_counter_position_and_sequence():
    """The last of the known answers once more; of its first two words come 27 and 26 bits. Int64 knows no unsigned."""
    position, sequence, seed = (
        torch.tensor([int(x, 16) - (int(x[0], 16) >= 8) * 2**64])
        for x in ("85a308d3243f6a88", "0370734413198a2e", "299f31d0a4093822")
    )
    expected = ((0xD16CFE09 >> 5) * 2**26 + (0x94FDCCEB >> 6)) / 2**53
    assert reference.uniform(seed, sequence, position).item() == expected
    tokens, _ = draw(torch.zeros(1, 2**16), seed=seed, sequence=sequence, position=position)
    assert tokens.item() == 0xD16C


def test_tokens_of_a_flat_distribution_spell_the_number():
    """Equal masses are summed without rounding: of 2^16 tokens, the one drawn is made of the number's first 16 bits."""
    generator = torch.Generator().manual_seed(3)
    seed, sequence, position = torch.randint(-(2**63), 2**63 - 1, (3, 48), generator=generator)
    seed[:4], sequence[4:8], position[8:12] = 0, 0, 0  # and in 32 bits or less
    for x in (seed, sequence, position):
        x[12:24] &= 0xFFFFFFFF
        x[24:] %= 1000
    tokens, log_probs = draw(torch.zeros(1, 2**16).expand(48, -1), seed=seed, sequence=sequence, position=position)
    assert torch.equal(tokens, (reference.uniform(seed, sequence, position) * 2**16).long())
    torch.testing.assert_close(log_probs, torch.full((48,), -16 * math.log(2)))


AXES = {"seed": (1, 0, 0), "sequence": (0, 1, 0), "position": (0, 0, 1)}


def keys_along(axis, number, start=0):
    """Neighbours along one of the three, at fixed values of the others."""
    i = torch.arange(number)
    return {name: start + 5 + on * i for name, on in zip(AXES, AXES[axis], strict=True)}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("start", [0, 2**32 - 50_000])
def test_numbers_of_neighbouring_keys_are_uniform_and_unrelated(axis, start):
    n = 100_000
    u = reference.uniform(**keys_along(axis, n, start))
    assert ((u >= 0) & (u < 1)).all()
    # Kolmogorov and Smirnov's largest distance of the distribution function, in Stephens' form for finite n.
    rank = torch.arange(n + 1).double() / n
    distance = torch.maximum(rank[1:] - u.sort().values, u.sort().values - rank[:-1]).max().item()
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    assert sum(2 * (-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 20)) > UNLIKELY
    for lag in (1, 2, 3, 1000):  # each correlation is normal, with a variance of 1 / n
        correlation = torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1].item()
        assert math.erfc(abs(correlation) * math.sqrt((n - lag) / 2)) > UNLIKELY


@pytest.mark.parametrize("axis", AXES)
def test_tokens_of_neighbouring_keys_are_unrelated(axis):
    """Pairs of neighbours fill the 256 cells of 16 x 16 equally likely tokens evenly."""
    tokens, _ = draw(torch.zeros(1, 16).expand(60_000, -1), **keys_along(axis, 60_000))
    for a, b in ((tokens[0::2], tokens[1::2]), (tokens[:30_000], tokens[30_000:])):
        counts = (16 * a + b).bincount(minlength=256)
        assert chi_square_p_value(counts, torch.full((256,), 1 / 256).double()) > UNLIKELY


def test_the_three_keys_are_not_interchangeable():
    i = torch.arange(1000)
    logits, seen = torch.zeros(1, 64).expand(1000, -1), []
    for key in ((i, 0 * i, 0 * i), (0 * i, i, 0 * i), (0 * i, 0 * i, i), (i, i, 0 * i), (0 * i, i << 32, 0 * i)):
        seen.append(draw(logits, seed=key[0], sequence=key[1], position=key[2])[0])
    for k, a in enumerate(seen):
        # Of the other 999, each agrees by chance with probability 1/64: 16 on average, 4 the standard deviation.
        assert all((a == b)[1:].sum() < 16 + 5 * 4 for b in seen[:k])


def test_a_seed_may_be_a_number_or_a_tensor():
    logits, _ = random_logits(50, 100)
    for seed in (0, 7, 2**63 - 1):
        assert torch.equal(draw(logits, seed=seed)[0], draw(logits, seed=torch.full((50,), seed))[0])
    assert not torch.equal(draw(logits, seed=0)[0], draw(logits, seed=7)[0])


# ------------------------------------------------------------------------------------------------ which token


def rounding_of_a_sum(logits, temperature):
    """Of the masses up to a token, over all of them, in fp32: how far off it can be, for each row.

    A mass 2^t has a relative error of some 4 EPS, and 1.5 EPS of t's size, which is at most the row's whole range. The
    kernel's lanes add up 256 numbers before anything wider takes over: 128 EPS at most. Twice: of a part, of the whole.
    """
    x = logits.double().masked_fill(logits == -INF, INF)
    return 2 * EPS * (132 + 1.5 * (logits.double().amax(-1) - x.amin(-1)) / temperature)


FILTERS = ({}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 300, "top_p": 0.95, "min_p": 0.001})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 1009, 2048, 4097, 50257])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_the_token_is_the_one_at_which_the_sum_passes_the_number(dtype, vocabulary, temperature, options):
    """Against sums in fp64: the number lies between the token's two, or within rounding of them. And where rounding
    decides whether a filter keeps some tokens, those may count or not."""
    rows = 6 if vocabulary > 5000 else 24
    logits, _ = random_logits(rows, vocabulary, dtype=dtype, seed=vocabulary)
    logits[::2, ::5] = -INF
    i = torch.arange(rows)
    u = reference.uniform(torch.tensor(11), i, 3 * i)
    tokens, _ = draw(logits, seed=11, position=3 * i, temperature=temperature, **options)
    slack = rounding_of_a_sum(logits, temperature)[:, None]
    most, fewest = (kept_within(logits, temperature, sign * slack, **options) for sign in (1, -1))
    at = tokens[:, None]
    assert most.gather(1, at).all()
    mass = torch.where(most, ((logits.double() - logits.double().amax(-1, True)) / temperature).exp(), 0.0)
    p = mass / mass.sum(-1, True)
    after = p.cumsum(-1).gather(1, at)
    before = after - p.gather(1, at)
    slack = slack + torch.where(fewest, 0.0, p).sum(-1, True)
    assert (u[:, None] >= before - slack).all()
    assert (u[:, None] <= after + slack).all()


def kept_within(logits, temperature, slack, top_k=0, top_p=1.0, min_p=0.0):
    """reference.kept_tokens with thresholds that are lower by slack [B, 1]: more tokens; with a negative one, fewer."""
    kept = []
    for x, s in zip(logits, slack.flatten().tolist(), strict=True):
        p = 1.0 if top_p == 1 else min(top_p + s, 1.0)
        kept.append(reference.kept_tokens(x[None], temperature, top_k, p, min_p * (1 - s)))
    return torch.cat(kept)


def test_the_reference_serves_what_it_says():
    """reference.sample_tokens, by which others are judged, is the inversion of the distribution function in fp64."""
    logits, _ = random_logits(200, 30, scale=2.0)
    i = torch.arange(200)
    options = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02}
    tokens, _ = reference.sample_tokens(logits.double(), seed=0 * i, sequence=i, position=i, **options)
    numbers = reference.uniform(0 * i, i, i).tolist()
    for row, token, u in zip(logits, tokens.tolist(), numbers, strict=True):
        sums = probabilities(row, **options).cumsum(0).tolist()
        assert token == next(t for t, total in enumerate(sums) if total > u)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [True, False])
def test_a_rare_token_at_either_end_comes_where_it_should(dtype, first):
    """With a probability of 1e-4, for the first or last 1e-4 of the numbers."""
    logits = torch.full((3000,), -INF, dtype=dtype)
    rare, common = (0, 2999) if first else (2999, 0)
    logits[rare], logits[common] = -9.25, 0.0
    p = 1 / (1 + math.exp(9.25))
    i = torch.arange(100_000)
    u = reference.uniform(torch.tensor(2), i, torch.tensor(0))
    from_edge = u if first else 1 - u
    near = (from_edge < 3 * p) & ((from_edge - p).abs() > 8 * EPS)  # which side is beyond rounding
    i, from_edge = i[near], from_edge[near]
    comes = from_edge < p
    assert 5 <= comes.sum() <= len(comes) - 5
    tokens, log_probs = draw(logits.expand(len(i), -1), seed=2, sequence=i)
    assert tokens.tolist() == torch.where(comes, rare, common).tolist()
    assert log_probs[comes].tolist() == pytest.approx([math.log(p)] * int(comes.sum()), rel=1e-6)


# ------------------------------------------------------------------------------------------------------ filters

SMALL = torch.tensor([0.3, -0.8, 1.9, 0.6, -2.1, 1.1, -0.2, 0.9, -1.3, 1.5, 0.05, -0.5])
SMALL_FILTERS = (
    *({"top_k": k} for k in (1, 2, 5, 11, 12, 13, 1000)),
    *({"top_p": p} for p in (0.01, 0.3, 0.5, 0.8, 0.95, 0.999)),
    *({"min_p": p} for p in (0.01, 0.05, 0.3, 0.6, 1.0)),
    {"top_k": 6, "top_p": 0.8},
    {"top_p": 0.9, "min_p": 0.2},
    {"top_k": 8, "top_p": 0.95, "min_p": 0.1},
)


def support(logits, **options):
    """The tokens that come in 6000 draws: all that have a probability of half a percent, but for one time in 10^13."""
    p = probabilities(logits, **options)
    assert p[p > 0].min() > 0.005
    return sorted(set(draws(logits, 6000, seed=5, **options).tolist()))


@pytest.mark.parametrize("options", SMALL_FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_kept_tokens_are_those_of_the_definition_and_of_transformers(options, temperature):
    from transformers.generation import logits_process as hf

    options = options | {"temperature": temperature}
    drawn = support(SMALL, **options)
    assert drawn == probabilities(SMALL, **options).nonzero().flatten().tolist()
    filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    assert drawn == reference.kept_tokens(SMALL[None], **filters)[0].nonzero().flatten().tolist()
    scores = SMALL[None] / temperature
    for name, warper in (
        ("top_k", hf.TopKLogitsWarper),
        ("top_p", hf.TopPLogitsWarper),
        ("min_p", hf.MinPLogitsWarper),
    ):
        scores = warper(options[name])(None, scores) if name in options else scores
    assert drawn == scores[0].isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("p", "options", "expected"),
    [
        ((0.4, 0.3, 0.2, 0.1), {"top_k": 2}, [0, 1]),
        ((0.4, 0.3, 0.2, 0.1), {"top_p": 0.6}, [0, 1]),
        ((0.4, 0.3, 0.2, 0.1), {"top_p": 0.75}, [0, 1, 2]),
        ((0.1, 0.2, 0.4, 0.3), {"top_k": 2, "top_p": 0.55}, [2]),  # 4/7 of what top_k left
        ((0.1, 0.2, 0.4, 0.3), {"min_p": 0.45}, [1, 2, 3]),
        ((0.1, 0.2, 0.4, 0.3), {"min_p": 0.55}, [2, 3]),
        ((0.1, 0.2, 0.4, 0.3), {"min_p": 0.3, "temperature": 2.0}, [0, 1, 2, 3]),  # 0.1 / 0.4 is 1/2 there
        ((0.1, 0.2, 0.4, 0.3), {"top_p": 0.85, "temperature": 0.5}, [1, 2, 3]),  # 25/30 < 0.85 < 29/30
        ((0.1, 0.2, 0.4, 0.3), {"top_p": 0.83, "temperature": 0.5}, [2, 3]),
        ((0.1, 0.3, 0.1, 0.3, 0.2), {"top_k": 1}, [1, 3]),
        ((0.1, 0.3, 0.1, 0.3, 0.2), {"top_k": 4}, [0, 1, 2, 3, 4]),
        ((0.1, 0.3, 0.1, 0.3, 0.2), {"top_p": 0.1}, [1, 3]),
        ((0.1, 0.3, 0.1, 0.3, 0.2), {"top_p": 0.85}, [0, 1, 2, 3, 4]),
        ((0.1, 0.3, 0.1, 0.3, 0.2), {"min_p": 1.0}, [1, 3]),
        ((0.2, 0.2, 0.2, 0.2, 0.2), {"top_k": 2, "top_p": 0.3, "min_p": 1.0}, [0, 1, 2, 3, 4]),
        ((0.5, 0.0, 0.3, 0.0, 0.2), {"top_k": 4}, [0, 2, 4]),
        ((0.5, 0.0, 0.3, 0.0, 0.2), {"top_p": 0.9999}, [0, 2, 4]),
        ((0.5, 0.0, 0.3, 0.0, 0.2), {}, [0, 2, 4]),
    ],
    ids=str,
)
def test_kept_tokens_by_hand(p, options, expected):
    assert support(torch.tensor(p).log(), **options) == expected


def test_zeros_of_either_sign_are_equal():
    logits = torch.tensor([-1.0, -0.0, 0.0, -0.0, -1.0])
    for options in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}):
        assert support(logits, **options) == [1, 2, 3]
    assert draw(logits[None], temperature=0)[0].item() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_in_a_large_vocabulary(dtype):
    """None below the k-th comes, and those that come reach down to it. In 16 bits many are equal to it."""
    logits, _ = random_logits(1, 5003, dtype=dtype, seed=8)
    order = logits[0].float().sort(descending=True).values
    for k in (2, 17, 1000, 5002):
        tokens, _ = draw(logits.expand(256, -1), top_k=k, temperature=50.0)
        drawn = logits[0].float()[tokens]
        assert (drawn >= order[k - 1]).all()
        # 256 draws that are nearly evenly likely miss the last 16 parts in 256 once in 10^5 times.
        assert (order > drawn.min()).sum() >= k - 1 - k * 16 / 256


# -------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 1009, 50257])
def test_temperature_0_takes_the_most_likely_token(dtype, vocabulary):
    logits, _ = random_logits(6, vocabulary, dtype=dtype)
    for options in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.3}):
        tokens, log_probs = draw(logits, temperature=0.0, **options)
        x = logits.double()
        assert all(t == row.index(max(row)) for t, row in zip(tokens.tolist(), logits.tolist(), strict=True))
        expected = x.log_softmax(-1).gather(1, tokens[:, None])[:, 0]  # at temperature 1
        torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-6)
    integer, _ = draw(logits, temperature=0)
    assert torch.equal(integer, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [(0, 1), (5, 3000), (17, 16, 31), (2047, 2048), (2999, 3000), (3000,)])
def test_the_first_of_equals(dtype, places):
    logits = torch.full((1, 3001), -1.5, dtype=dtype)
    logits[0, list(places)] = 2.5
    assert draw(logits, temperature=0)[0].item() == min(places)
    assert draw(torch.zeros(1, 3001, dtype=dtype), temperature=0)[0].item() == 0


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}], ids=str)
def test_what_leaves_one_token_is_greedy(options):
    """At temperature 1e-3 the runner-up, which is 0.05 behind, has a probability of 2e-22."""
    logits, _ = random_logits(40, 3001, seed=4)
    best, second = logits.topk(2).values.T
    logits = torch.where(logits == best[:, None], second[:, None] + 0.05, logits)
    assert torch.equal(draw(logits, **options)[0], draw(logits, temperature=0)[0])


# ----------------------------------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_log_probs_are_those_of_the_unfiltered_distribution(dtype, temperature, options):
    logits, _ = random_logits(20, 2049, dtype=dtype)
    tokens, log_probs = draw(logits, temperature=temperature, **options)
    assert log_probs.dtype == torch.float32
    assert tokens.dtype == torch.int64
    exact = reference.token_log_probs(logits.double(), tokens, temperature=temperature)
    eager = reference.token_log_probs(logits, tokens, temperature=temperature)
    assert_as_good_as_eager(log_probs, eager, exact, 32 * EPS)  # as in test_log_probs


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 2048, 4097, 50257])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0, 0.0])
def test_log_probs_have_the_bits_of_token_log_probs(dtype, vocabulary, temperature):
    logits, _ = random_logits(5, vocabulary, dtype=dtype)
    logits[1::2, 1::3] = -INF
    logits[2] -= 500
    for options in FILTERS:
        tokens, log_probs = draw(logits, temperature=temperature, **options)
        assert same_bits(log_probs, F.token_log_probs(logits, tokens, temperature=temperature or 1.0))


def test_there_is_no_gradient():
    logits, _ = random_logits(3, 5)
    tokens, log_probs = draw(logits.requires_grad_())
    assert not tokens.requires_grad
    assert not log_probs.requires_grad


# ------------------------------------------------------------------------------------------ odd shapes and numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_one_token_in_the_vocabulary(dtype, temperature):
    for options in ({}, {"top_k": 1, "top_p": 0.1, "min_p": 1.0}):
        tokens, log_probs = draw(torch.full((3, 1), 7.5, dtype=dtype), temperature=temperature, **options)
        assert tokens.tolist() == [0, 0, 0]
        assert log_probs.tolist() == [0.0, 0.0, 0.0]


def test_no_rows():
    tokens, log_probs = draw(torch.zeros(0, 5))
    assert tokens.shape == log_probs.shape == (0,)
    assert (tokens.dtype, log_probs.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_are_the_same_bits(dtype):
    whole, _ = random_logits(8, 6, 257, dtype=dtype)
    options = {"temperature": 0.9, "top_k": 100, "top_p": 0.95, "min_p": 1e-3}
    for view in (whole[:, -1], whole[:, 2, :-1], whole[1::2, 0, 3:200], whole[:, 0, -1:], whole[3, :1].expand(9, -1)):
        strided, packed = (draw(x, seed=9, **options) for x in (view, view.contiguous()))
        assert torch.equal(strided[0], packed[0])
        assert same_bits(strided[1], packed[1])


def test_strided_keys_too():
    logits, _ = random_logits(10, 33)
    keys = torch.randint(0, 1000, (3, 20))[:, ::2]
    strided, packed = (
        draw(logits, seed=k[0], sequence=k[1], position=k[2])[0] for k in (keys, [x.contiguous() for x in keys])
    )
    assert torch.equal(strided, packed)


@pytest.mark.parametrize("vocabulary", [40, 5000])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_forbidden_tokens_never_come(vocabulary, options):
    allowed = torch.tensor([3, 17, vocabulary - 2])
    logits = torch.full((vocabulary,), -INF)
    logits[allowed] = torch.tensor([0.0, 0.5, -0.5])
    tokens = draws(logits, 600, **options)
    assert sorted(set(tokens.tolist())) == allowed.tolist()
    alone = torch.full((4, vocabulary), -INF)
    alone[:, -1] = -30.0
    tokens, log_probs = draw(alone, **options)
    assert tokens.tolist() == [vocabulary - 1] * 4
    assert log_probs.tolist() == [0.0] * 4


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "large"),
    [(torch.float32, 1e38), (torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 65504.0)],
)
def test_extreme_logits(dtype, large, options):
    """Two that share all of the probability, among others that are as far away as the dtype goes."""
    logits = torch.full((64, 3000), -large, dtype=dtype)
    logits[:, 5:2900] = 0.0
    logits[:, 7] = logits[:, 2990] = large
    tokens, log_probs = draw(logits, **options)
    assert set(tokens.tolist()) == {7, 2990}
    torch.testing.assert_close(log_probs, torch.full((64,), -math.log(2)), rtol=1e-6, atol=0)
    tokens, log_probs = draw(torch.full((64, 4), -large, dtype=dtype), **options)  # all low, all equal
    assert set(tokens.tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(log_probs, torch.full((64,), -math.log(4)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [-1e4, 1e3, 1e5])
def test_shifting_all_logits_changes_no_token(shift):
    logits = (random_logits(30, 3001)[0] * 16).round() / 16  # stays exact under the shift
    plain, shifted = (draw(x, seed=6, temperature=0.8, top_p=0.9) for x in (logits, logits + shift))
    assert torch.equal(plain[0], shifted[0])
    torch.testing.assert_close(plain[1], shifted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, INF, None])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}], ids=str)
def test_a_row_without_a_distribution_is_named(dtype, bad, options):
    """A nan or +inf wherever it stands, or nothing but -inf (None)."""
    for place in (0, 70, 2500, 4999):
        logits, _ = random_logits(8, 5000, dtype=dtype)
        if bad is None:
            logits[5] = -INF
        else:
            logits[5, place] = bad
        with pytest.raises(ValueError, match="logits: row 5 has no distribution"):
            draw(logits, **options)
    draw(logits[:5], **options)


# ---------------------------------------------------------------------------------------- what a row depends on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [*FILTERS, {"temperature": 0.0}], ids=str)
def test_a_row_depends_on_nothing_else(dtype, options):
    """Not on the other rows nor their order, nor on how many threads there are: bit for bit."""
    logits, _ = random_logits(33, 4111, dtype=dtype)
    sequence, position = torch.arange(33) * 7, torch.arange(33) % 5
    options = {"temperature": 0.8, "seed": 12} | options

    def drawn(rows):
        return draw(logits[rows], sequence=sequence[rows], position=position[rows], **options)

    batch = drawn(torch.arange(33))
    before, results = torch.get_num_threads(), []
    for rows in (torch.arange(33).flip(0), torch.randperm(33)[:20], *torch.tensor([[0], [13], [32]])):
        results.append((rows, drawn(rows)))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append((torch.arange(33), drawn(torch.arange(33))))
    torch.set_num_threads(before)
    for rows, (tokens, log_probs) in results:
        assert torch.equal(tokens, batch[0][rows])
        assert same_bits(log_probs, batch[1][rows])


@kernel_only
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_it_allocates_nothing_of_the_vocabularys_size(options):
    logits, _ = random_logits(64, 8192)
    assert peak_allocation(lambda: draw(logits, **options)) <= 64 * 8 * 4  # the keys, the tokens, the log-probs


# ------------------------------------------------------------------------------------------------------- contract

KEY = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [[0.0]]}, "logits: got list, wanted a torch.Tensor"),
        ({"logits": torch.zeros(2, 5, dtype=torch.float64)}, "logits: got dtype float64, wanted float32"),
        ({"logits": torch.zeros(5)}, r"logits: got shape \(5,\), wanted 2 dimensions"),
        ({"logits": torch.zeros(2, 3, 5)}, r"logits: got shape \(2, 3, 5\), wanted 2 dimensions"),
        ({"logits": torch.zeros(2, 0)}, "logits: .* wanted at least one entry in the vocabulary"),
        ({"logits": torch.zeros(5, 2).T}, r"logits: got strides \(1, 2\), wanted a last stride of 1"),
        ({"logits": torch.zeros(3, 5)}, r"sequence: got shape \(2,\), wanted \(3,\)"),
        ({"seed": -1}, "seed: got -1, wanted an int in"),
        ({"seed": 2**63}, "seed: got 9223372036854775808, wanted an int in"),
        ({"seed": 1.0}, "seed: got 1.0, wanted an int in"),
        ({"seed": True}, "seed: got True, wanted an int in"),
        ({"seed": None}, "seed: got None, wanted an int in"),
        ({"seed": KEY.int()}, "seed: got dtype int32, wanted int64"),
        ({"seed": KEY[:1]}, r"seed: got shape \(1,\), wanted \(2,\), one for each row"),
        ({"sequence": 0}, "sequence: got int, wanted a torch.Tensor"),
        ({"sequence": KEY.int()}, "sequence: got dtype int32, wanted int64"),
        ({"sequence": KEY[None]}, r"sequence: got shape \(1, 2\), wanted \(2,\)"),
        ({"sequence": KEY.to("meta")}, "sequence: got device meta, wanted cpu"),
        ({"position": [0, 0]}, "position: got list, wanted a torch.Tensor"),
        ({"position": KEY.float()}, "position: got dtype float32, wanted int64"),
        ({"position": KEY[0]}, r"position: got shape \(\), wanted \(2,\)"),
        ({"position": KEY.to("meta")}, "position: got device meta, wanted cpu"),
        ({"temperature": -1.0}, "temperature: got -1.0, wanted a finite number"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"temperature": INF}, "temperature: got inf"),
        ({"temperature": 1e-39}, "temperature: got 1e-39"),
        ({"temperature": 4e38}, "temperature: got 4e"),
        ({"temperature": "hot"}, "temperature: got str, wanted a number"),
        ({"temperature": True}, "temperature: got bool, wanted a number"),
        ({"temperature": False}, "temperature: got bool, wanted a number"),
        ({"top_k": -1}, "top_k: got -1, wanted an int in"),
        ({"top_k": 2.0}, "top_k: got 2.0, wanted an int"),
        ({"top_k": True}, "top_k: got True, wanted an int"),
        ({"top_k": 2**63}, "top_k: got 9223372036854775808, wanted an int"),
        ({"top_p": 0.0}, "top_p: got 0.0, wanted a finite number >= 1.17"),
        ({"top_p": 1e-60}, "top_p: got 1e-60"),
        ({"top_p": 1.01}, "top_p: got 1.01"),
        ({"top_p": math.nan}, "top_p: got nan"),
        ({"top_p": None}, "top_p: got NoneType, wanted a number"),
        ({"min_p": -0.1}, "min_p: got -0.1, wanted a finite number >= 0 and <= 1"),
        ({"min_p": 1.01}, "min_p: got 1.01"),
        ({"min_p": math.nan}, "min_p: got nan"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"logits": torch.zeros(2, 5), "seed": 0, "sequence": KEY, "position": KEY} | change
    with pytest.raises(ValueError, match=message):
        F.sample_tokens(**arguments)


def raw(**change):
    numbers = torch.tensor([1.0, 1.0, 0.0])
    arguments = {"logits": torch.zeros(2, 5), "seed": KEY, "sequence": KEY, "position": KEY, "numbers": numbers}
    return torch.ops.fastrlhf.sample_tokens(*(arguments | {"top_k": 0} | change).values())


@kernel_only
@pytest.mark.parametrize(
    "change",
    [
        {"logits": torch.zeros(5)},
        {"logits": torch.zeros(2, 0)},
        {"logits": torch.zeros(5, 2).T},
        {"logits": torch.zeros(2, 5, dtype=torch.float64)},
        *({name: KEY[:1]} for name in ("seed", "sequence", "position")),
        *({name: KEY.int()} for name in ("seed", "sequence", "position")),
        {"numbers": torch.ones(2)},
        {"numbers": torch.ones(3).double()},
        *({"numbers": torch.tensor(numbers)} for numbers in ([math.nan, 1, 0], [-1.0, 1, 0], [1.0, 0, 0], [1.0, 1, 2])),
        {"top_k": -1},
    ],
)
def test_the_kernel_refuses_raw_calls_that_do_not_fit(change):
    raw()
    with pytest.raises(ValueError, match=next(iter(change)) + ": wanted|temperature: wanted|top_k >= 0"):
        raw(**change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    logits, _ = random_logits(5, 6, 37, dtype=dtype)
    keys = torch.randint(0, 100, (3, 5))
    for numbers, top_k in ((torch.tensor([0.9, 1.0, 0.0]), 0), (torch.tensor([0.9, 0.8, 0.1]), 7)):
        for rows in (logits[:, 0].contiguous(), logits[:, -1]):
            torch.library.opcheck(torch.ops.fastrlhf.sample_tokens.default, (rows, *keys, numbers, top_k))


def test_it_compiles_as_one_graph_and_new_numbers_compile_nothing_anew():
    """Twice at most: for the first numbers, which torch takes as constants, and for any."""
    logits, _ = random_logits(50, 37)
    rows = torch.arange(50)

    def step(logits, seed, x):
        return F.sample_tokens(
            logits * 2, seed=seed, sequence=rows, position=rows, temperature=2 * x, top_k=9, top_p=x, min_p=x / 9
        )

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed, x in enumerate((0.5, 0.6, 0.7, 0.8, 0.9)):
        ours, expected = (f(logits, seed, x) for f in (compiled, step))
        assert torch.equal(ours[0], expected[0])
        assert same_bits(ours[1], expected[1])
    assert counter.frame_count <= 2


@kernel_only
@pytest.mark.parametrize("capability", ["avx2", "portable"])
def test_the_other_builds(capability):
    if f"({capability})" in SERVED_BY:
        pytest.skip("this is the build the other tests ran")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-p", "no:cacheprovider"]
    command += ["-k", "passes or spell or rare or by_hand or large or equal or log_probs or extreme or depends"]
    environment = os.environ | {"FASTRLHF_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "FASTRLHF_CPU_CAPABILITY: got" in run.stdout + run.stderr:
        pytest.skip(f"no {capability} here")
    assert run.returncode == 0, run.stdout[-2000:]
