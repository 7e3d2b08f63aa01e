"""The Triton kernels of sample_tokens against the reference in fp64.

Every `check_*` runs twice, as in test_triton_log_probs.py: without a GPU in Triton's interpreter, in one child process
(`python tests/test_triton_sampling.py` by hand), and with a GPU compiled, through the public function.
"""

import importlib
import json
import math
import sys
import time
import traceback
from unittest import mock

import pytest
import torch
from interpreter import run_checks
from oracle import EPS, same_bits

from fastrlhf import reference

try:
    import triton
    import triton.language as tl

    from fastrlhf.kernels.sampling import _uniform, philox
except ImportError:
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")
FILTERS = ({"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 300, "top_p": 0.95, "min_p": 0.001})


class Interpreter:
    """The raw kernels on CPU tensors."""

    device = "cpu"

    def __init__(self):
        self.ops = importlib.import_module("fastrlhf.kernels.sampling")

    def sample_tokens(self, logits, *, seed, sequence, position, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
        numbers = torch.tensor([temperature, top_p, min_p])
        return self.ops.sample_tokens(logits, seed, sequence, position, numbers, top_k)

    def __call__(self, logits, *, seed=11, sequence=None, position=None, **options):
        """Tokens and log-probs; row i is at position 3 i of sequence i where nothing else is said."""
        rows = torch.arange(len(logits), device=self.device)
        sequence = rows if sequence is None else sequence
        position = 3 * rows if position is None else position
        seed = torch.full_like(rows, seed) if isinstance(seed, int) else seed
        return self.sample_tokens(logits, seed=seed, sequence=sequence, position=position, **options)

    def least_kept(self, logits, **options):
        """[B], what the filters say to the launch that draws."""
        with mock.patch.object(self.ops, "_draw_kernel") as draw:
            self(logits, **options)
        return draw.__getitem__.return_value.call_args.args[5]


class Compiled(Interpreter):
    """The public function on CUDA tensors."""

    device = "cuda"

    def sample_tokens(self, logits, **options):
        from fastrlhf import functional as F

        return F.sample_tokens(logits, **options)


def sample(run, *shape, dtype=torch.float32, scale=3.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=rng) * scale).to(dtype).to(run.device)


def as_fp32(options):
    """As the kernels get them."""
    return {name: x if name == "top_k" else torch.tensor(x).item() for name, x in options.items()}


def kept_by_reference(logits, **options):
    filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | as_fp32(options)
    return reference.kept_tokens(logits.cpu(), **filters)


def assert_drawn(run, logits, **options):
    """The token at which the sum in fp64 passes the number, or one between those at which it passes the number less and
    plus what rounding can do to sums of the kept masses in fp32.

    A mass has a relative error of 4 EPS and 1.5 EPS of its exponent's size, at most the row's range; a lane adds up 16
    of them, and lanes and parts meet in 13 additions. It goes for the part and for the whole.
    """
    tokens, _ = run(logits, **options)
    tokens, x = tokens.cpu(), logits.cpu().double()
    temperature = as_fp32(options).get("temperature", 1.0)
    kept = kept_by_reference(logits, **options)
    masses = torch.where(kept, (x - x.amax(-1, keepdim=True)) / temperature, -INF).exp()
    sums = masses.cumsum(-1) / masses.sum(-1, keepdim=True)
    rows = torch.arange(len(logits))
    u = reference.uniform(torch.full_like(rows, 11), rows, 3 * rows)[:, None]
    least = torch.where(x > -INF, x, INF).amin(-1, keepdim=True)
    slack = 2 * EPS * (4 + 16 + 13 + 1.5 * (x.amax(-1, keepdim=True) - least) / temperature)
    assert kept.gather(1, tokens[:, None]).all()
    after, before = (
        sums.gather(1, tokens[:, None]) - y for y in (0, masses.gather(1, tokens[:, None]) / masses.sum(-1, True))
    )
    assert (u >= before - slack).all()
    assert (u <= after + slack).all()
    return tokens


# ---------------------------------------------------------------------------------------------------- random numbers

if triton:

    @triton.jit
    def words_kernel(words_ptr, out_ptr):
        at = words_ptr + tl.program_id(0) * 6
        c0, c1, c2, c3 = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
        c0, c1, c2, c3 = philox(
            c0.to(tl.uint32),
            c1.to(tl.uint32),
            c2.to(tl.uint32),
            c3.to(tl.uint32),
            tl.load(at + 4).to(tl.uint32),
            tl.load(at + 5).to(tl.uint32),
        )
        out = out_ptr + tl.program_id(0) * 4
        tl.store(out, c0.to(tl.int64))
        tl.store(out + 1, c1.to(tl.int64))
        tl.store(out + 2, c2.to(tl.int64))
        tl.store(out + 3, c3.to(tl.int64))

    @triton.jit
    def uniform_kernel(keys_ptr, out_ptr):
        at = keys_ptr + tl.program_id(0) * 3
        tl.store(out_ptr + tl.program_id(0), _uniform(tl.load(at), tl.load(at + 1), tl.load(at + 2)))


def check_philox_gives_the_known_answers(run):
    """philox4x32 with 10 rounds, from kat_vectors of the paper's Random123."""
    known = (
        ("0 0 0 0 0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    )
    given, wanted = (
        torch.tensor([[int(word, 16) for word in pair[i].split()] for pair in known], device=run.device) for i in (0, 1)
    )
    out = torch.empty_like(wanted)
    words_kernel[(3,)](given, out)
    assert torch.equal(out, wanted)


def check_numbers_have_the_bits_of_the_reference(run):
    keys = torch.randint(-(2**63), 2**63 - 1, (25, 3), generator=torch.Generator().manual_seed(3))
    keys[:8] %= 1000
    keys[8:16] &= 0xFFFFFFFF
    keys[16] = 0
    keys = keys.to(run.device)
    out = torch.empty(25, dtype=torch.float64, device=run.device)
    uniform_kernel[(25,)](keys, out)
    assert torch.equal(out, reference.uniform(*keys.T))


def check_tokens_of_a_flat_distribution_spell_the_number(run):
    """Equal masses are summed without rounding: of 2^16 tokens, the one drawn is made of the number's first 16 bits."""
    seed, sequence, position = torch.randint(0, 2**40, (3, 3), generator=torch.Generator().manual_seed(3)).to(
        run.device
    )
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.zeros(1, 2**16, dtype=dtype, device=run.device).expand(3, -1)
        tokens, log_probs = run(logits, seed=seed, sequence=sequence, position=position)
        assert torch.equal(tokens, (reference.uniform(seed, sequence, position) * 2**16).long())
        assert (log_probs + 16 * math.log(2)).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------------- the tokens


def check_the_token_is_the_one_at_which_the_sum_passes_the_number(run):
    for dtype in DTYPES:
        for V, rows in ((1, 1), (2, 2), (509, 4), (2048, 2), (4099, 2), (20_001, 2)):
            logits = sample(run, rows, V, dtype=dtype, seed=V)
            logits[::2, 1::5] = -INF
            for temperature in (1.0, 0.3) if V < 1000 else (1.7,):
                assert_drawn(run, logits, temperature=temperature)


def check_they_are_the_tokens_of_the_reference(run):
    """In rows where no sum lies so near to the number that rounding decides."""
    rows = torch.arange(4, device=run.device)
    logits = sample(run, 4, 1009, dtype=torch.bfloat16)
    for options in ({"temperature": 0.8}, {"temperature": 0.9, "top_k": 60, "top_p": 0.9, "min_p": 0.002}):
        key = {"seed": 0 * rows + 5, "sequence": 7 * rows, "position": rows % 3}
        tokens, log_probs = run(logits, **key, **options)
        expected, exact = reference.sample_tokens(logits.double(), **key, **as_fp32(options))
        assert tokens.dtype == torch.int64
        assert log_probs.dtype == torch.float32
        assert torch.equal(tokens, expected)
        assert (log_probs - exact).abs().max() < 1e-5


def check_filters_keep_the_tokens_that_the_reference_keeps(run):
    for dtype in DTYPES:
        logits = sample(run, 2, 1009, dtype=dtype, scale=1.5)
        logits[1, ::3] = -INF
        for options in FILTERS:
            options = options | {"temperature": 0.7}
            least = run.least_kept(logits, **options)
            kept = (logits.float() >= least[:, None]) & (logits > -INF)
            assert torch.equal(kept.cpu(), kept_by_reference(logits, **options)), (dtype, options)


def check_top_k_counts_one_by_one(run):
    """Ties, zeros of both signs, both signs of everything else, and fewer than k that are possible at all."""
    row = torch.tensor([1.0, 0.0, -0.0, 2.0, 1.0, 1e-40, -1e-40, -3e38, 3e38, -INF, -2.0, -2.0, 5e-3, -INF, 0.0, -7.25])
    logits = row.to(run.device).repeat(1, 1)
    for k in (1, 2, 3, 6, 7, 10, 11, 14, 15):
        kept = logits >= run.least_kept(logits, top_k=k)[:, None]
        assert torch.equal(kept.cpu(), row[None] >= row.topk(k).values[-1]), k


def check_kept_tokens_by_hand(run):
    for p, options, expected in (
        ((0.4, 0.3, 0.2, 0.1), {"top_p": 0.6}, [0, 1]),
        ((0.4, 0.3, 0.2, 0.1), {"top_p": 0.75}, [0, 1, 2]),
        ((0.1, 0.2, 0.4, 0.3), {"top_k": 2, "top_p": 0.55}, [2]),  # 4/7 of what top_k left
        ((0.1, 0.2, 0.4, 0.3), {"min_p": 0.45}, [1, 2, 3]),
        ((0.1, 0.2, 0.4, 0.3), {"min_p": 0.3, "temperature": 2.0}, [0, 1, 2, 3]),  # 0.1 / 0.4 is 1/2 there
        ((0.1, 0.2, 0.4, 0.3), {"top_p": 0.83, "temperature": 0.5}, [2, 3]),  # 25 of 30
        ((0.1, 0.3, 0.1, 0.3, 0.2), {"top_p": 0.1}, [1, 3]),
        ((0.1, 0.3, 0.1, 0.3, 0.2), {"top_p": 0.85}, [0, 1, 2, 3, 4]),
        ((0.1, 0.3, 0.1, 0.3, 0.2), {"min_p": 1.0}, [1, 3]),
        ((0.5, 0.0, 0.3, 0.0, 0.2), {"top_p": 0.9999}, [0, 2, 4]),
    ):
        logits = torch.tensor([p], device=run.device).log()
        kept = (logits >= run.least_kept(logits, **options)[:, None]) & (logits > -INF)
        assert kept[0].nonzero().flatten().tolist() == expected, (p, options)


def check_drawn_among_the_kept(run):
    for dtype in (torch.float32, torch.bfloat16):
        logits = sample(run, 2, 9001, dtype=dtype)  # two chunks, or one
        for options in (FILTERS[0], FILTERS[3]):
            assert_drawn(run, logits, temperature=0.8, **options)


def check_what_leaves_one_token_is_greedy(run):
    logits = sample(run, 2, 700, seed=4)
    greedy, _ = run(logits, temperature=0.0)
    assert torch.equal(greedy, logits.argmax(-1))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert torch.equal(run(logits, **options)[0], greedy)


def check_greedy_takes_the_first_of_equals(run):
    """Filters change nothing."""
    for dtype in DTYPES:
        places = ((0, 1), (17, 16), (511, 512), (8192, 8191), (16_400, 16_385), (16_999,))
        logits = torch.full((len(places) + 2, 17_000), -1.5, dtype=dtype, device=run.device)
        for row, where in zip(logits, places, strict=False):
            row[list(where)] = 2.5
        logits[-1] = torch.finfo(dtype).min
        logits[-1, :16_390] = -INF
        expected = [*map(min, places), 0, 16_390]
        for options in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.3}):
            assert run(logits, temperature=0.0, **options)[0].tolist() == expected


def check_log_probs_have_the_bits_of_token_log_probs(run):
    log_probs_of = importlib.import_module("fastrlhf.kernels.log_probs").token_log_probs
    for dtype in DTYPES:
        for V, options in ((1, {}), (509, FILTERS[3]), (20_001, {"temperature": 0.7}), (4099, {"temperature": 0.0})):
            logits = sample(run, 2, V, dtype=dtype)
            logits[1] -= 500
            tokens, log_probs = run(logits, **options)
            temperature = torch.tensor(options.get("temperature", 1.0) or 1.0)
            assert same_bits(log_probs, log_probs_of(logits, tokens, temperature)[0])


def check_a_rare_token_at_either_end_comes_where_it_should(run):
    """With a probability of 1e-4, for the first or last 1e-4 of the numbers."""
    p = 1 / (1 + math.exp(9.25))
    u = reference.uniform(torch.tensor(2), torch.arange(100_000), torch.tensor(0))
    for rare, common, edge in ((0, 9999, u), (9999, 0, 1 - u)):
        logits = torch.full((1, 10_000), -INF, device=run.device)
        logits[0, rare], logits[0, common] = -9.25, 0.0
        chosen = (edge < 2 * p).nonzero().flatten()[:12]
        assert 3 <= (edge[chosen] < p).sum() <= 9
        tokens, _ = run(
            logits.expand(len(chosen), -1), seed=2, sequence=chosen.to(run.device), position=0 * chosen.to(run.device)
        )
        assert torch.equal(tokens.cpu(), torch.where(edge[chosen] < p, rare, common))


def check_forbidden_tokens_never_come(run):
    for V in (40, 9000):
        alone = torch.full((2, V), -INF, device=run.device)
        alone[0, V - 1] = alone[1, V // 2] = -30.0
        for options in ({}, FILTERS[3], {"temperature": 0.0}):
            tokens, log_probs = run(alone, **options)
            assert tokens.tolist() == [V - 1, V // 2]
            assert log_probs.tolist() == [0.0, 0.0]


def check_extreme_logits(run):
    """Two that share all of the probability, among others that are as far away as the dtype goes."""
    for dtype, large in ((torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 65504.0)):
        logits = torch.full((2, 9000), -large, dtype=dtype, device=run.device)
        logits[:, 5:8900] = 0.0
        logits[:, 7] = logits[:, 8990] = large
        for options in ({}, {"top_p": 0.9, "min_p": 0.02}):
            tokens, log_probs = run(logits, **options)
            assert set(tokens.tolist()) <= {7, 8990}
            assert (log_probs + math.log(2)).abs().max() < 1e-6
        tokens, log_probs = run(torch.full((2, 4), -large, dtype=dtype, device=run.device), **options)
        assert (log_probs + math.log(4)).abs().max() < 1e-6


def check_rows_without_a_distribution(run):
    """A nan or +inf, or nothing but -inf: log-prob nan, some token, and nothing for the row beside it."""
    for dtype in (torch.float32, torch.bfloat16):
        filters = ({"top_k": 5, "top_p": 0.9, "min_p": 0.1},) if dtype == torch.bfloat16 else ()
        for options in ({}, {"temperature": 0.0}, *filters):
            logits = sample(run, 4, 9000, dtype=dtype)
            alone = run(
                logits[3:],
                sequence=torch.tensor([3], device=run.device),
                position=torch.tensor([9], device=run.device),
                **options,
            )
            logits[0, 8999], logits[1, 17], logits[2] = NAN, INF, -INF
            tokens, log_probs = run(logits, **options)
            assert log_probs[:3].isnan().all()
            assert ((tokens >= 0) & (tokens < 9000)).all()
            assert tokens[3] == alone[0][0]
            assert log_probs[3] == alone[1][0]


# ------------------------------------------------------------------------------------------- what a row depends on


def check_a_row_depends_on_nothing_else(run):
    """Alone or anywhere in a batch, at a 16-byte boundary or not: the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({"temperature": 0.8}, {"top_k": 30}) if dtype == torch.bfloat16 else ({"temperature": 0.8},):
            row = sample(run, 1, 9001, dtype=dtype)
            one = torch.ones(1, dtype=torch.int64, device=run.device)
            alone = run(row, sequence=one, position=one, **options)
            padded = torch.zeros(3, 9008, dtype=dtype, device=run.device)[:, :9001]
            for batch in (sample(run, 3, 9001, dtype=dtype, seed=1), padded):
                batch[1:] = row
                batch[0] *= 7.0
                keys = torch.tensor([5, 1, 1], device=run.device)
                tokens, log_probs = run(batch, sequence=keys, position=keys, **options)
                assert (tokens[1:] == alone[0]).all()
                assert (log_probs[1:] == alone[1]).all()


def check_more_chunks_than_are_looked_at_together(run):
    V = 40_000 if run.device == "cpu" else 600_000
    parts = tl.constexpr(2) if run.device == "cpu" else run.ops._PARTS
    with mock.patch.object(run.ops, "_PARTS", parts):
        logits = sample(run, 4, V, scale=1.0)
        logits[2, : V // 2] = -INF
        logits[3, V // 2 :] = -INF
        assert len(set((assert_drawn(run, logits) * 5 // V).tolist())) > 1
        greedy, _ = run(logits, temperature=0.0)
        assert torch.equal(greedy, logits.argmax(-1))


def check_strided_rows_and_keys(run):
    logits = sample(run, 4, 3, 257)
    keys = torch.randint(0, 1000, (3, 8), device=run.device)[:, ::2]
    for view in (logits[:, -1, :-1], logits[:, 1, 1:200], logits[2, :1].expand(4, -1)):
        strided = run(view, seed=keys[0], sequence=keys[1], position=keys[2])
        packed = run(view.contiguous(), **dict(zip(("seed", "sequence", "position"), keys.contiguous(), strict=True)))
        assert torch.equal(strided[0], packed[0])
        assert same_bits(strided[1], packed[1])


def check_rows_2_to_the_31_elements_apart(run):
    stride = 2**31 + 1000
    far = torch.empty(stride + 100, dtype=torch.bfloat16, device=run.device).as_strided((2, 100), (stride, 1))
    near = sample(run, 2, 100, dtype=torch.bfloat16)
    far.copy_(near)
    for options in ({}, {"top_k": 10}):
        for a, b in zip(run(far, **options), run(near, **options), strict=True):
            assert torch.equal(a, b)


def check_no_rows(run):
    tokens, log_probs = run(torch.zeros(0, 5, device=run.device))
    assert tokens.shape == log_probs.shape == (0,)
    assert (tokens.dtype, log_probs.dtype) == (torch.int64, torch.float32)


def check_raw_calls_that_do_not_fit(run):
    key = torch.zeros(2, dtype=torch.int64, device=run.device)
    good = {"logits": torch.zeros(2, 5, device=run.device), "seed": key, "sequence": key, "position": key}
    good |= {"numbers": torch.tensor([1.0, 1.0, 0.0]), "top_k": 0}
    for change in (
        {"logits": torch.zeros(5, device=run.device)},
        {"logits": torch.zeros(2, 0, device=run.device)},
        {"logits": torch.zeros(5, 2, device=run.device).T},
        {"logits": torch.zeros(2, 5, dtype=torch.float64, device=run.device)},
        *({name: key[:1]} for name in ("seed", "sequence", "position")),
        *({name: key.int()} for name in ("seed", "sequence", "position")),
        {"numbers": torch.tensor([NAN, 1.0, 0.0])},
        {"numbers": torch.tensor([-1.0, 1.0, 0.0])},
        {"numbers": torch.tensor([1.0, 0.0, 0.0])},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            run.ops.sample_tokens(*(good | change).values())


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


# -------------------------------------------------------------------------------------------------------- the runs

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def interpreted():
    return run_checks(__file__)


@pytest.mark.parametrize("check", CHECKS)
def test_in_interpreter(check, interpreted):
    assert not interpreted[check], interpreted[check]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_gpu(check):
    CHECKS[check](Compiled())


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("V", [50_257, 151_936])
@pytest.mark.parametrize("rows", [1, 64, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_gpu_at_real_sizes(V, rows, dtype):
    run = Compiled()
    logits = sample(run, rows, V, dtype=dtype)
    for options in ({}, {"temperature": 0.6}, {"top_k": 50}, {"min_p": 0.01}):
        assert_drawn(run, logits, **options)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}])
def test_on_gpu_a_million_draws_fit_the_distribution(options):
    """By Pearson's chi-square, which is nearly normal for so many cells."""
    run, number = Compiled(), 1_000_000
    logits = sample(run, 1, 50, scale=1.0)
    i = torch.arange(number, device="cuda")
    tokens, _ = run(logits.expand(number, -1), sequence=i // 1000, position=i % 1000, **options)
    kept = kept_by_reference(logits, **options)[0]
    p = torch.softmax(logits[0].cpu().double()[kept] / options.get("temperature", 1.0), 0)
    counts = tokens.cpu().bincount(minlength=50)
    assert not counts[~kept].any()
    statistic = ((counts[kept] - number * p) ** 2 / (number * p)).sum().item()
    cells = len(p) - 1
    assert abs(statistic - cells) < 4 * math.sqrt(2 * cells)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}, {"temperature": 0.0}])
def test_on_gpu_in_a_graph_and_without_waiting(options):
    """A graph's replay draws what a call would, for other logits and positions too. Nothing waits for the device."""
    run = Compiled()
    logits, position = sample(run, 8, 50_257), torch.arange(8, device="cuda")
    key = {"seed": position * 0 + 5, "sequence": position + 100, "position": position}
    run(logits, **key, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(logits, **key, **options)
    for step in range(3):
        logits.copy_(sample(run, 8, 50_257, seed=step))
        position += 1
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        expected = run(logits, **key, **options)
        torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def main():
    run, results = Interpreter(), {}
    for name, check in CHECKS.items():
        try:
            began = time.process_time()
            check(run)
            print(f"{time.process_time() - began:5.1f} s  {name}", file=sys.stderr)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], sep="\n", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
