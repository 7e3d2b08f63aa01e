"""paged_attention: against dense attention in fp64, its cache, what a row depends on, and its contract."""

import functools
import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastrlhf import backends
from fastrlhf.functional.decoding import PAGE, new_cache

ops = torch.ops.fastrlhf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf
BORDERS = (1, 15, 16, 17, 31, 32, 33, 100)  # lengths around the ends of pages
SERVED_BY = backends.backend_table()["paged_attention"]["cpu"]
kernel_only = pytest.mark.skipif(SERVED_BY == "reference", reason="the reference serves paged_attention on CPU here")


class Call(NamedTuple):
    """The arguments of the op, by name."""

    qkv: Tensor
    keys: Tensor
    values: Tensor
    pages: Tensor
    sequence: Tensor
    position: Tensor
    cos: Tensor | None
    sin: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    numbers: Tensor
    window: int

    def run(self) -> Tensor:
        return ops.paged_attention(*self)

    def on_a_copy(self, **change) -> tuple[Tensor, "Call"]:
        """The result, and the call with the cache as it is afterwards."""
        call = self._replace(keys=self.keys.clone(), values=self.values.clone())._replace(**change)
        return call.run(), call

    def rows(self, rows) -> "Call":
        return self._replace(qkv=self.qkv[rows], sequence=self.sequence[rows], position=self.position[rows])


def make(
    lengths=BORDERS,
    *,
    new=1,
    heads=4,
    kv_heads=2,
    d=16,
    rotary=None,
    norms=False,
    softcap=INF,
    window=0,
    dtype=torch.float32,
    size=1.0,
    seed=0,
) -> Call:
    """The last `new` positions of sequences that are `lengths` long; those before them are in the cache already.

    Pages lie in any order, with some that are nobody's between them. Whatever nobody has written is nan, and so is the
    page that stands in `pages` behind the last one of a sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // PAGE) for length in lengths]
    count = sum(needed) + 3
    order = torch.randperm(count, generator=generator).int()
    pages, nobodys, used = order[-1].repeat(len(lengths), max(needed) + 1), order[-3:], 0
    keys, values = (x.fill_(math.nan) for x in new_cache(count, kv_heads, d, dtype, torch.device("cpu")))
    sequence, position = [], []
    for s, (length, n) in enumerate(zip(lengths, needed, strict=True)):
        pages[s, :n] = order[used : used + n]
        used += n
        first = max(0, length - new)
        for p in range(first):
            keys[pages[s, p // PAGE], :, :, p % PAGE] = torch.randn(kv_heads, d, generator=generator).to(dtype)
            values[pages[s, p // PAGE], :, p % PAGE] = torch.randn(kv_heads, d, generator=generator).to(dtype)
        sequence += [s] * (length - first)
        position += range(first, length)
    assert keys[nobodys.long()].isnan().all()
    rotary = d // 2 if rotary is None else rotary
    angles = torch.arange(max(lengths) + 5)[:, None] * 10_000.0 ** (-torch.arange(rotary) / max(rotary, 1)).double()
    qkv = size * torch.randn(len(sequence), (heads + 2 * kv_heads) * d, generator=generator)
    norm = [1 + 0.3 * torch.randn(d, generator=generator) if norms else None for _ in range(2)]
    return Call(
        *(qkv, keys, values, pages, torch.tensor(sequence), torch.tensor(position)),
        *((angles.cos().float(), angles.sin().float()) if rotary else (None, None)),
        *norm,
        torch.tensor([d**-0.5, softcap, 1e-6]),
        window,
    )


def heads_of(call: Call, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, heads, d] and k, v [N, kv_heads, d] of the rows, normalised and rotated."""
    kv_heads, d = call.keys.shape[1:3]
    x = call.qkv.to(dtype).unflatten(1, (-1, d))
    q, k, v = x[:, : -2 * kv_heads], x[:, -2 * kv_heads : -kv_heads], x[:, -kv_heads:]
    return _prepared(q, call.q_norm, call), _prepared(k, call.k_norm, call), v


def _prepared(x: Tensor, norm: Tensor | None, call: Call) -> Tensor:
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + call.numbers[2].to(x.dtype)).sqrt() * norm.to(x.dtype)
    if call.cos is None:
        return x
    y, r = x.clone(), call.cos.shape[1]
    for i in range(r):  # a plane at a time
        cos, sin = (table[call.position, i, None].to(x.dtype) for table in (call.cos, call.sin))
        y[..., i] = x[..., i] * cos - x[..., i + r] * sin
        y[..., i + r] = x[..., i + r] * cos + x[..., i] * sin
    return y


def dense(call: Call, dtype) -> Tensor:
    """Attention of each row to the keys and values that its sequence has in the cache, a head at a time."""
    q, _, _ = heads_of(call, dtype)
    scale, softcap, _ = call.numbers.to(dtype)
    group, rows = q.shape[1] // call.keys.shape[1], []
    for n, (s, last) in enumerate(zip(call.sequence.tolist(), call.position.tolist(), strict=True)):
        at = torch.arange(max(0, last + 1 - call.window) if call.window else 0, last + 1)
        page = call.pages[s].long()[at // PAGE]
        keys, values = call.keys[page, :, :, at % PAGE].to(dtype), call.values[page, :, at % PAGE].to(dtype)
        for h in range(q.shape[1]):
            scores = scale * (keys[:, h // group] @ q[n, h])
            if softcap < INF:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append(scores.softmax(0) @ values[:, h // group])
    return torch.stack(rows).view(len(q), -1)


def compare(call: Call) -> None:
    """The result by the cache that the op left behind, and that by the cache it found.

    A weight is a power of e, known to 4 EPS, over a sum of such: with values up to v, 8 EPS v. A new key is a few
    products in fp32, rounded to the cache's dtype.
    """
    ours, after = call.on_a_copy()
    assert ours.dtype == torch.float32
    assert ours.shape == (len(call.qkv), call.qkv.shape[1] - 2 * call.keys[0, ..., 0].numel())
    slack = 8 * EPS * after.values.double().nan_to_num().abs().max().item()
    assert_as_good_as_eager(ours, dense(after, torch.float32), dense(after, torch.float64), slack)

    _, k, v = heads_of(call, torch.float64)
    page, slot = call.pages[call.sequence, call.position // PAGE].long(), call.position % PAGE
    half_an_ulp = torch.finfo(call.keys.dtype).eps / 2 * k.abs()
    assert ((after.keys[page, :, :, slot].double() - k).abs() <= half_an_ulp + 8 * EPS * k.abs().max()).all()
    assert torch.equal(after.values[page, :, slot], v.to(call.values.dtype))
    for written, found in ((after.keys, call.keys), (after.values.mT, call.values.mT)):
        written = written.clone()
        written[page, :, :, slot] = found[page, :, :, slot]
        assert torch.equal(*(x.contiguous().view(torch.uint8) for x in (written, found.clone())))


def assert_same(a: Tensor, b: Tensor) -> None:
    """Bit for bit, where it is the kernel that serves; torch's products add up in an order that hangs on the shapes."""
    if SERVED_BY == "reference":
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
    else:
        assert torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 16, 24, 64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (7, 1)])
def test_against_dense_attention(dtype, d, heads, kv_heads):
    compare(make(heads=heads, kv_heads=kv_heads, d=d, dtype=dtype, seed=d))


VARIANTS = (
    {"rotary": 0},
    {"rotary": 3},  # of 12: part of a head
    {"norms": True},
    {"norms": True, "rotary": 0},
    {"softcap": 3.0},
    {"softcap": 50.0},
    *({"window": w} for w in (1, 2, 15, 16, 17, 40, 1000)),
    {"norms": True, "rotary": 6, "softcap": 10.0, "window": 20},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("new", [1, 19])
def test_the_variants_of_the_architectures(dtype, variant, new):
    compare(make(new=new, d=24, dtype=dtype, seed=new, **variant))


def test_every_position_of_three_pages():
    """As a step of decoding, and all of them as a prompt."""
    compare(make(range(1, 3 * PAGE + 2), d=8))
    compare(make([3 * PAGE + 1], new=3 * PAGE + 1, d=8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts(dtype):
    compare(make([2049, 1, 1500], heads=2, kv_heads=1, d=64, dtype=dtype))


@pytest.mark.parametrize("heads", range(1, 12))
def test_any_number_of_heads_to_a_key_head(heads):
    compare(make((5, 40), heads=heads, kv_heads=1, d=8))
    compare(make((5, 40), heads=3 * heads, kv_heads=3, d=8))


def test_the_mean_of_the_values_where_all_scores_are_equal():
    """By hand: queries of zeros."""
    call = make([20], new=20, heads=2, kv_heads=1, d=8)
    call.qkv[:, :16] = 0.0
    values = call.qkv[:, 24:].double()
    expected = values.cumsum(0) / torch.arange(1, 21)[:, None]
    torch.testing.assert_close(call.run().double(), expected.repeat(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_that_grow_or_fall_far_beyond_the_range_of_exp(sign, window):
    """Only the largest of them counts: the value at the last or at the first position that is seen."""
    call = make([70], new=70, heads=1, kv_heads=1, d=8, rotary=0, window=window)
    call.qkv[:, :16] = 0.0
    call.qkv[:, 0], call.qkv[:, 8] = 1000.0, sign * torch.arange(70.0)
    at = torch.arange(70)
    chosen = at if sign > 0 else (at - 3).clamp(min=0) if window else 0 * at
    assert torch.equal(call.run(), call.qkv[chosen, 16:])


@pytest.mark.parametrize("size", [1e-20, 1e-4, 30.0])
def test_small_and_large_queries_and_keys(size):
    """With scores up to 2000 in size, whose last digits weigh: an error of theirs is one of the weights."""
    call = make((17, 50), new=3, d=64, size=size)
    ours, after = call.on_a_copy()
    q, _, _ = heads_of(after, torch.float64)
    largest = 64**-0.5 * q.abs().sum(-1).max().item() * after.keys.double().nan_to_num().abs().max().item()
    v = after.values.double().nan_to_num().abs().max().item()
    exact, eager = (dense(after, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_good_as_eager(ours, eager, exact, (8 + largest) * EPS * v)


# ----------------------------------------------------------------------------------------- what a row depends on


@functools.cache
def varied(dtype) -> Call:
    return make((40, 17, 3, 33, 16), new=9, heads=6, kv_heads=2, d=24, rotary=10, norms=True, window=30, dtype=dtype)


def one_at_a_time(call: Call) -> tuple[Tensor, Call]:
    call = call._replace(keys=call.keys.clone(), values=call.values.clone())
    return torch.cat([call.rows(slice(i, i + 1)).run() for i in range(len(call.qkv))]), call


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_in_one_call_is_its_tokens_one_by_one(dtype):
    for call in (varied(dtype), make([50], new=50, d=64, dtype=dtype)):
        together, after = call.on_a_copy()
        alone, after_alone = one_at_a_time(call)
        assert_same(together, alone)
        assert_same(after.keys, after_alone.keys)
        assert_same(after.values, after_alone.values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_may_come_in_pieces(dtype):
    call = make([50], new=50, d=16, dtype=dtype)
    whole, _ = call.on_a_copy()
    pieces = call._replace(keys=call.keys.clone(), values=call.values.clone())
    assert_same(torch.cat([pieces.rows(slice(*ends)).run() for ends in ((0, 7), (7, 16), (16, 17), (17, 50))]), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_rows_changes_nothing(dtype):
    call = varied(dtype)
    expected, after = call.on_a_copy()
    rows = torch.randperm(len(call.qkv))
    ours, after_ours = call.rows(rows).on_a_copy()
    assert_same(ours, expected[rows])
    assert_same(after_ours.keys, after.keys)
    assert_same(after_ours.values, after.values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rest_of_the_batch_changes_nothing(dtype):
    call = varied(dtype)
    expected, _ = call.on_a_copy()
    for s in range(5):
        rows = call.sequence == s
        assert_same(call.rows(rows).on_a_copy()[0], expected[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_the_pages_lie_changes_nothing(dtype):
    call = varied(dtype)
    expected, _ = call.on_a_copy()
    order = torch.randperm(len(call.keys))
    there = order.argsort().int()[call.pages.long()]
    assert_same(call.on_a_copy(keys=call.keys[order], values=call.values[order], pages=there)[0], expected)


def test_the_number_of_threads_changes_nothing():
    call = make(BORDERS, new=20, heads=8, kv_heads=4, d=64)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(call.on_a_copy()[0])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shared_prompt_is_in_the_cache_once(dtype):
    """Two sequences whose first two pages are the same ones, and the same two with copies of them."""
    call = make([40, 44, 60], new=5, dtype=dtype)
    shared = call._replace(pages=call.pages.clone())
    shared.pages[1, :2] = shared.pages[0, :2]
    copied = call._replace(keys=call.keys.clone(), values=call.values.clone())
    for cache in (copied.keys, copied.values):
        cache[copied.pages[1, :2].long()] = cache[copied.pages[0, :2].long()]
    assert_same(shared.on_a_copy()[0], copied.on_a_copy()[0])
    assert not torch.equal(shared.on_a_copy()[0], call.on_a_copy()[0])


def test_strided_rows():
    """As a slice of a wider buffer."""
    call = varied(torch.float32)
    wide = torch.full((2 * len(call.qkv), call.qkv.shape[1] + 5), math.nan)
    wide[::2, 2:-3] = call.qkv
    every_second = torch.stack([call.sequence, call.position], 1)
    strided = call._replace(qkv=wide[::2, 2:-3], sequence=every_second[:, 0], position=every_second[:, 1])
    assert_same(strided.on_a_copy()[0], call.on_a_copy()[0])


def test_no_rows():
    call = make().rows(slice(0, 0))
    found = call.keys.clone()
    out = call.run()
    assert out.shape == (0, 64)
    assert out.dtype == torch.float32
    assert same_bits(call.keys, found)


# ------------------------------------------------------------------------------------------------------- contract


def small(**change) -> Call:
    """Two sequences at their 18th and 5th position; two pages each, of five."""
    d = 8
    call = Call(
        qkv=torch.ones(2, 4 * d),
        keys=torch.ones(5, 1, d, PAGE),
        values=torch.ones(5, 1, PAGE, d),
        pages=torch.tensor([[3, 1], [0, 4]], dtype=torch.int32),
        sequence=torch.tensor([0, 1]),
        position=torch.tensor([17, 4]),
        cos=torch.ones(32, 4),
        sin=torch.zeros(32, 4),
        q_norm=torch.ones(d),
        k_norm=torch.ones(d),
        numbers=torch.tensor([0.3, INF, 1e-6]),
        window=0,
    )
    return call._replace(**change)


@kernel_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"sequence": torch.tensor([0, s])}, f"sequence: got {s}, wanted") for s in (-1, 2, 2**40)),
        *(({"position": torch.tensor([p, 4])}, f"position: got {p}, wanted") for p in (-1, 32, 2**40, -(2**62))),
        ({"position": torch.tensor([17, 4]), "cos": torch.ones(17, 4), "sin": torch.ones(17, 4)}, "position: got 17"),
        *(({"pages": torch.tensor([[3, p], [0, 4]]).int()}, f"pages: got {p}, wanted") for p in (-1, 5, 2**30)),
        *(({"pages": torch.tensor([[p, 3], [0, 4]]).int()}, f"pages: got {p}, wanted") for p in (-1, 5)),
        ({"pages": torch.zeros(2, 0).int()}, "position: got 17"),
        ({"pages": torch.zeros(0, 2).int()}, "sequence: got 0"),
    ],
)
def test_places_outside_memory_are_an_index_error(change, message):
    small().run()
    with pytest.raises(IndexError, match=message):
        small(**change).run()


@kernel_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.ones(2, 33)}, "qkv: wanted"),
        ({"qkv": torch.ones(2, 16)}, "qkv: wanted"),  # no query head
        ({"qkv": torch.ones(2, 0)}, "qkv: wanted"),
        ({"qkv": torch.ones(64)}, "qkv: wanted"),
        ({"qkv": torch.ones(2, 32).double()}, "qkv: wanted"),
        ({"qkv": torch.ones(32, 2).T}, "qkv: wanted"),
        ({"qkv": torch.ones(2, 56), "keys": torch.ones(5, 2, 8, 16), "values": torch.ones(5, 2, 16, 8)}, "qkv: wanted"),
        ({"keys": torch.ones(5, 1, 8, 8)}, "keys: wanted"),
        ({"keys": torch.ones(5, 8, 16)}, "keys: wanted"),
        ({"keys": torch.ones(5, 1, 16, 8).mT}, "keys: wanted"),
        ({"keys": torch.ones(5, 1, 0, 16)}, "keys: wanted"),
        ({"keys": torch.ones(5, 1, 8, 16).double(), "values": torch.ones(5, 1, 16, 8).double()}, "keys: wanted"),
        ({"values": torch.ones(4, 1, 16, 8)}, "values: wanted"),
        ({"values": torch.ones(5, 1, 8, 16)}, "values: wanted"),
        ({"values": torch.ones(5, 1, 16, 8).bfloat16()}, "values: wanted"),
        ({"values": torch.ones(5, 1, 8, 16).mT}, "values: wanted"),
        ({"pages": torch.zeros(2, 2).long()}, "pages: wanted"),
        ({"pages": torch.zeros(4).int()}, "pages: wanted"),
        ({"pages": torch.zeros(2, 2).int().T}, "pages: wanted"),
        ({"sequence": torch.zeros(2).int()}, "sequence: wanted"),
        ({"sequence": torch.zeros(1).long()}, "sequence: wanted"),
        ({"position": torch.zeros(2).int()}, "position: wanted"),
        ({"position": torch.zeros(3).long()}, "position: wanted"),
        ({"cos": None}, "sin: wanted"),
        ({"sin": None}, "sin: wanted"),
        ({"sin": torch.ones(32, 3)}, "sin: wanted"),
        ({"cos": torch.ones(32, 5), "sin": torch.ones(32, 5)}, "cos: wanted"),
        ({"cos": torch.ones(32, 4).half(), "sin": torch.ones(32, 4).half()}, "cos: wanted"),
        ({"cos": torch.ones(4, 32).T}, "cos: wanted"),
        ({"q_norm": torch.ones(7)}, "q_norm: wanted"),
        ({"k_norm": torch.ones(9)}, "k_norm: wanted"),
        ({"k_norm": torch.ones(8).bfloat16()}, "k_norm: wanted"),
        ({"numbers": torch.ones(2)}, "numbers: wanted"),
        ({"numbers": torch.ones(3).double()}, "numbers: wanted"),
        ({"window": -1}, "window: wanted"),
    ],
)
def test_what_does_not_fit_is_a_value_error(change, message):
    small().run()
    with pytest.raises(ValueError, match=message):
        small(**change).run()


@kernel_only
def test_pages_out_of_the_window_are_not_looked_at():
    """Whoever drops them may leave anything in the table."""
    call = make([100], window=20)
    expected, _ = call.on_a_copy()
    dropped = call.pages.clone()
    dropped[0, :5] = -1
    assert_same(call.on_a_copy(pages=dropped)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    call = small()
    call = call._replace(keys=call.keys.to(dtype), values=call.values.to(dtype))
    for variant in (call, call._replace(cos=None, sin=None, q_norm=None, k_norm=None, window=3)):
        torch.library.opcheck(ops.paged_attention.default, tuple(variant))


def test_it_compiles_as_one_graph_and_new_rows_compile_once_more():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(call):
        return ops.paged_attention(call[0] * 2, *call[1:]) + 1

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for new in (2, 3, 5, 9, 12):
        call = make([40], new=new)
        ours, expected = (call._replace(keys=call.keys.clone(), values=call.values.clone()) for _ in range(2))
        torch.testing.assert_close(compiled(tuple(ours)), step(tuple(expected)))
        assert same_bits(ours.keys, expected.keys)
        assert same_bits(ours.values, expected.values)
    assert counter.frame_count <= 2


@kernel_only
@pytest.mark.parametrize("capability", ["avx2", "portable"])
def test_the_other_builds(capability):
    if f"({capability})" in SERVED_BY:
        pytest.skip("this is the build the other tests ran")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-p", "no:cacheprovider"]
    command += ["-k", "dense or architectures or heads or long or range_of_exp or one_by_one or batch or shared"]
    environment = os.environ | {"FASTRLHF_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "FASTRLHF_CPU_CAPABILITY: got" in run.stdout + run.stderr:
        pytest.skip(f"no {capability} here")
    assert run.returncode == 0, run.stdout[-2000:]
