"""The Triton kernels of paged_attention against the reference in fp64.

Every `check_*` runs twice, as in test_triton_log_probs.py: without a GPU in Triton's interpreter, in one child process
(`python tests/test_triton_decoding.py` by hand), and with a GPU compiled, through the raw op.
"""

import importlib
import json
import sys
import time
import traceback
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from interpreter import run_checks
from oracle import EPS, assert_as_good_as_eager, same_bits

from fastrlhf import reference
from fastrlhf.functional.decoding import PAGE, new_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


class Interpreter:
    """The raw kernels on CPU tensors."""

    device = "cpu"
    bf16_slack = 2**-7  # the interpreter truncates fp32 to bf16 where a GPU rounds: one unit in the last place more

    def __init__(self):
        self.ops = importlib.import_module("fastrlhf.kernels.decoding")
        self.op = self.ops.paged_attention

    def __call__(self, case, rows=slice(None), split=True):
        """Rows of a case, into whose cache they are written; [N, heads d]. split: whether chunks have programs."""
        given = tensors(case, rows, self.device)
        numbers = torch.tensor([case.scale, case.softcap, case.eps])
        with mock.patch.object(self.ops, "PROGRAMS_PER_MULTIPROCESSOR", 4 if split else 0):
            return self.op(*given, numbers, case.window)


class Compiled(Interpreter):
    """The raw op on CUDA tensors."""

    device = "cuda"
    bf16_slack = 0.0

    def __init__(self):
        super().__init__()
        self.op = torch.ops.fastrlhf.paged_attention


def tensors(case, rows, device):
    """The tensors of a call for some rows, the cache itself and not a copy."""
    per_row = (case.sequence[rows], case.position[rows])
    given = (case.qkv[rows], case.keys, case.values, case.pages, *per_row, case.cos, case.sin, case.q_norm, case.k_norm)
    return [x if x is None else x.to(device) for x in given]


def make(
    run,
    lengths=(40, 3),
    *,
    heads=2,
    kv_heads=1,
    d=16,
    rotary=0,
    normed=False,
    softcap=INF,
    window=0,
    dtype=torch.float32,
    cache=None,
    seed=0,
):
    """Sequences of these lengths, all in qkv, on pages in no order out of more than they need, full of nan."""
    rng = torch.Generator().manual_seed(seed)
    widest = max(lengths) // PAGE + 2
    needed = len(lengths) * widest
    pages = torch.randperm(needed + 3, generator=rng)[:needed].view(len(lengths), widest).int()
    keys, values = new_cache(needed + 3, kv_heads, d, cache or dtype, run.device)
    for x in (keys, values):
        x.fill_(NAN)
    place = [(i, p) for i, n in enumerate(lengths) for p in range(n)]
    sequence, position = torch.tensor(place).view(-1, 2).T
    angles = torch.rand(max(lengths), rotary, generator=rng) * 6.28 if rotary else None
    qkv = torch.randn(len(place), (heads + 2 * kv_heads) * d, generator=rng)
    q_norm, k_norm = 1 + 0.3 * torch.randn(2, d, generator=rng)
    case = SimpleNamespace(
        qkv=qkv.to(dtype),
        keys=keys,
        values=values,
        pages=pages,
        sequence=sequence,
        position=position,
        cos=angles.cos() if rotary else None,
        sin=angles.sin() if rotary else None,
        q_norm=q_norm if normed else None,
        k_norm=k_norm if normed else None,
        scale=d**-0.5,
        softcap=softcap,
        eps=1e-6,
        window=window,
    )
    for name, x in vars(case).items():
        if isinstance(x, torch.Tensor):
            setattr(case, name, x.to(run.device))
    return case


def expected(case, rows, dtype, keys, values):
    """Those rows by the reference in dtype, from a cache to which it writes too."""
    fields = {name: getattr(case, name) for name in ("pages", "cos", "sin", "q_norm", "k_norm", "scale", "softcap")}
    fields |= {name: getattr(case, name)[rows] for name in ("sequence", "position")}
    qkv = case.qkv[rows].to(dtype)
    return reference.paged_attention(qkv, keys, values, eps=case.eps, window=case.window, **fields)


def prefill(case, rows):
    """Writes rows as the reference does, which is faster than the interpreter."""
    expected(case, rows, torch.float32, case.keys, case.values)


def assert_accurate(run, case, rows=slice(None)):
    """All tokens but those of `rows` are written first; these rows then give what the reference gives, and write it.

    The epsilon: roundings of scores, which are errors of the weights, for values of the largest size; where the cache
    has 16 bits, a key or value on the border between two of its numbers may come out as either.
    """
    written = torch.zeros(len(case.position), dtype=torch.bool, device=run.device)
    written[rows] = True
    if not written.all():
        prefill(case, ~written)
    keys, values = case.keys.clone(), case.values.clone()
    ours = run(case, rows)
    caches = [(keys.clone(), values.clone()) for _ in range(2)]
    eager, exact = (expected(case, rows, x, *c) for x, c in zip((torch.float32, torch.float64), caches, strict=True))
    assert ours.dtype == torch.float32
    assert ours.isfinite().all()
    largest = case.values.nan_to_num().abs().max().item()
    slack = 16 * EPS * largest
    if case.keys.dtype == torch.bfloat16:
        slack += run.bf16_slack * 4 * largest
    assert_as_good_as_eager(ours, eager, exact, slack)
    for mine, theirs in ((case.keys, caches[0][0]), (case.values, caches[0][1])):
        assert torch.equal(mine.isnan(), theirs.isnan())
        step = {torch.float32: 8 * EPS, torch.bfloat16: 2**-7, torch.float16: 2**-10}[mine.dtype]
        gap = (mine.float() - theirs.float()).nan_to_num().abs()
        assert (gap <= step * theirs.float().nan_to_num().abs() + 8 * EPS).all()


# --------------------------------------------------------------------------------------------------------- the checks


def check_one_token_by_hand(run):
    """It attends to itself alone: its value comes out."""
    case = make(run, (1,), heads=4, kv_heads=2)
    out = run(case).view(4, 16)
    v = case.qkv[0, 6 * 16 :].view(2, 16).repeat_interleave(2, 0)
    assert (out - v).abs().max() <= EPS * v.abs().max()
    page = case.pages[0, 0].long()
    assert torch.equal(case.values[page, :, 0], v[::2])
    assert torch.equal(case.keys[page, :, :, 0], case.qkv[0, 4 * 16 : 6 * 16].view(2, 16))


def check_heads_and_their_groups(run):
    for heads, kv_heads, d in ((1, 1, 8), (3, 3, 24), (4, 2, 64), (7, 1, 16), (12, 1, 40), (2, 1, 256)):
        case = make(run, (21, 1), heads=heads, kv_heads=kv_heads, d=d)
        assert_accurate(run, case, case.position >= 19)


def check_dtypes_of_rows_and_cache(run):
    for dtype in DTYPES:
        for cache in DTYPES:
            case = make(run, (18, 5), dtype=dtype, cache=cache, rotary=8, normed=True)
            assert_accurate(run, case, case.position >= 15)


def check_rotation(run):
    for rotary in (1, 4, 8):
        case = make(run, (35,), rotary=rotary)
        assert_accurate(run, case, case.position >= 31)


def check_norms(run):
    for case in (make(run, (35,), d=24, normed=True), make(run, (35,), normed=True, rotary=5)):
        case.qkv *= 100.0
        assert_accurate(run, case, case.position >= 31)
    case = make(run, (20,), normed=True)
    case.k_norm = None
    case.eps = 0.5
    assert_accurate(run, case, case.position >= 17)
    case = make(run, (20,), normed=True)
    case.q_norm, case.k_norm = case.q_norm.bfloat16(), case.k_norm.bfloat16()
    assert_accurate(run, case, case.position >= 17)


def check_softcap(run):
    for softcap in (0.5, 30.0):
        case = make(run, (35,), softcap=softcap, heads=3)
        case.qkv *= 4.0
        assert_accurate(run, case, case.position >= 31)


def check_windows(run):
    """Inside a page, over its edge, as wide as a chunk and wider than the sequence; and pages before it may be gone."""
    for window in (1, 2, 15, 16, 17, 256, 1000):
        case = make(run, (300,), window=window)
        prefill(case, case.position < 298)
        gone = case.pages[0, : max(298 - window + 1, 0) // PAGE].long()
        case.keys[gone], case.values[gone] = NAN, NAN
        case.pages[0, : len(gone)] = 2**30  # and their place in the table
        ours = run(case, case.position >= 298)
        case.pages[0, : len(gone)] = gone[:1].int() if len(gone) else 0
        rows, caches = case.position >= 298, (case.keys.clone(), case.values.clone())
        eager, exact = (expected(case, rows, x, *caches) for x in (torch.float32, torch.float64))
        assert_as_good_as_eager(ours, eager, exact, 16 * EPS * case.values.nan_to_num().abs().max().item())


def check_a_long_context(run):
    """Several chunks, with a program each or one for all: the same bits. A score far above the rest in one of them."""
    for options in ({}, {"window": 400}, {"softcap": 20.0, "cache": torch.float16}):
        case = make(run, (700, 256, 257), heads=3, rotary=8, **options)
        case.qkv[400, 3 * 16 :] *= 20.0
        rows = torch.tensor([699, 511, 700 + 255, 700 + 256 + 256, 399], device=run.device)
        assert_accurate(run, case, rows)
        split = run(case, rows)
        assert same_bits(split, run(case, rows, split=False))
        assert same_bits(split[1:2], run(case, rows[1:2]))


def check_a_row_depends_on_nothing_else(run):
    """With its prompt in one call or token by token, alone or not, on these pages or on others: the same bits."""
    for cache in (torch.float32, torch.bfloat16):
        case = make(run, (30, 19), heads=4, kv_heads=2, rotary=8, normed=True, cache=cache)
        together = run(case)
        elsewhere = make(run, (30, 19), heads=4, kv_heads=2, rotary=8, normed=True, cache=cache)
        elsewhere.pages = elsewhere.pages.flip(0, 1).contiguous()
        run(elsewhere, elsewhere.position < 16)
        for p in (16, 17, 18, 19, 29):
            rows = (elsewhere.position >= p) & (elsewhere.position < (29 if p == 19 else p + 1))
            assert same_bits(run(elsewhere, rows), together[rows])


def check_sequences_that_share_pages(run):
    """Samples of one prompt read its pages; each writes to its own."""
    case = make(run, (36, 36))
    shared = case.qkv[:36].clone()
    case.qkv[36 : 36 + 32] = shared[:32]
    apart = run(case)
    both = make(run, (36, 36))
    both.qkv.copy_(case.qkv)
    both.pages[1, :2] = both.pages[0, :2]
    run(both, slice(0, 32))
    rows = both.position >= 32
    assert same_bits(run(both, rows), apart[rows])


def check_strided_rows(run):
    case = make(run, (20,), d=24)
    plain = run(case)
    wide = torch.full((20, 5 * 24), NAN, device=run.device)
    wide[:, 3 : 3 + 4 * 24] = case.qkv
    case.qkv = wide[:, 3 : 3 + 4 * 24]
    assert same_bits(run(case), plain)


def check_nan_is_not_hidden(run):
    case = make(run, (20,), heads=2, kv_heads=2)
    case.qkv[7, 2 * 16] = NAN  # a key of the first head
    out = run(case).view(20, 2, 16)
    assert out[7:, 0].isnan().all()
    assert out[:7].isfinite().all()
    assert out[:, 1].isfinite().all()


def check_no_rows(run):
    case = make(run, (3,), heads=3)
    out = run(case, slice(0, 0))
    assert out.shape == (0, 48)
    assert out.dtype == torch.float32
    assert case.keys.isnan().all()


def check_raw_calls_that_do_not_fit(run):
    def change(**fields):
        case = make(run, (3,), heads=2, rotary=4, normed=True)
        run(case)
        for name, x in fields.items():
            setattr(case, name, x(getattr(case, name)))
        return case

    for name, x in (
        ("qkv", lambda x: x[:, :-1]),
        ("qkv", lambda x: x.double()),
        ("qkv", lambda x: x.T.contiguous().T),
        ("qkv", lambda x: x[:, : 2 * 16]),
        ("keys", lambda x: x[..., :8]),
        ("keys", lambda x: x.mT),
        ("keys", lambda x: x[:, :, :12].contiguous()),
        ("values", lambda x: x.half()),
        ("values", lambda x: x[:, :, :, :8].contiguous()),
        ("pages", lambda x: x.long()),
        ("sequence", lambda x: x.int()),
        ("position", lambda x: x[None]),
        ("cos", lambda x: x.half()),
        ("cos", lambda x: x.repeat(1, 3)),
        ("sin", lambda x: None),
        ("sin", lambda x: x[:2]),
        ("q_norm", lambda x: x[:8]),
        ("k_norm", lambda x: x.double()),
        ("window", lambda x: -1),
    ):
        with pytest.raises(ValueError, match=name):
            run(change(**{name: x}))


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(32, 8, 128), (14, 2, 64), (9, 3, 64), (8, 1, 256), (12, 12, 80)])
def test_on_gpu_at_real_sizes(dtype, heads, kv_heads, d):
    run = Compiled()
    case = make(run, (1500, 700, 33), heads=heads, kv_heads=kv_heads, d=d, rotary=d // 2, dtype=dtype)
    rows = torch.tensor([1499, 1500 + 699, 2232], device="cuda")
    together = run(case)
    assert same_bits(run(case, rows), together[rows])
    assert_accurate(run, case, rows)


@pytest.mark.gpu
@on_gpu
def test_on_gpu_in_a_graph_and_without_waiting():
    """A graph's replay does what a call would as positions grow past chunks. Nothing waits for the device."""
    run = Compiled()
    case, other = (make(run, (600, 600), heads=4, kv_heads=2, rotary=8) for _ in range(2))
    for x in (case, other):
        run(x, x.position < 500)
    place = torch.tensor([500, 1100], device="cuda")
    step = SimpleNamespace(**vars(case))
    step.qkv, step.sequence, step.position = (x[place] for x in (case.qkv, case.sequence, case.position))
    run(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(step)
    for _ in range(20):
        place += 1
        step.qkv.copy_(case.qkv[place])
        step.position.copy_(case.position[place])
        graph.replay()
        now = torch.arange(2, device="cuda") * 600 + place[0]
        torch.cuda.set_sync_debug_mode("error")
        expected_now = run(other, now)
        torch.cuda.set_sync_debug_mode("default")
        assert same_bits(captured, expected_now)


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
