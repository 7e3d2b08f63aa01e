"""The Triton kernels of masked_mean and masked_whiten against fp64.

Every `check_*` runs twice, as in test_triton_log_probs.py: without a GPU in Triton's interpreter, in one child process
(`python tests/test_triton_masked.py` by hand), and with a GPU compiled, through the raw ops.
"""

import importlib.util
import itertools
import json
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from interpreter import run_checks
from oracle import EPS, assert_as_good_as_eager, poison, random_tokenwise, same_bits

from fastrlhf import reference

try:
    import triton
except ImportError:
    triton = None

INF, NAN = float("inf"), float("nan")


class Interpreter:
    """The raw kernels on CPU tensors, with chunks so small that there are many."""

    device = "cpu"
    chunk, lanes, counters = 64, 4, 8

    def __init__(self):
        from fastrlhf.kernels import masked

        masked.CHUNK, masked.LANES, masked.COUNTERS = self.chunk, self.lanes, self.counters
        self.masked_mean, self.raw_whiten = masked.masked_mean, masked.masked_whiten

    def masked_whiten(self, x, mask, *, shift_mean=True, unbiased=True, eps=1e-8):
        return self.raw_whiten(x, mask, shift_mean, unbiased, torch.tensor(eps))


class Compiled(Interpreter):
    """The raw ops on CUDA tensors."""

    device = "cuda"
    chunk, lanes, counters = 4096, 512, 1024

    def __init__(self):
        from fastrlhf import functional  # noqa: F401  (loads the ops)

        self.masked_mean, self.raw_whiten = torch.ops.fastrlhf.masked_mean, torch.ops.fastrlhf.masked_whiten


def lengths(run):
    """Divisible by 4 and not, one chunk and several, just beside a whole number of them, and more than go at a time."""
    chunk = run.chunk
    return (1, 4, 17, chunk - 4, chunk - 1, chunk, chunk + 1, 3 * chunk + 8, chunk * (run.lanes + 1) + 5)


def on(run, *tensors):
    return [x.to(run.device) for x in tensors]


def assert_mean_is_accurate(run, x, mask):
    """The epsilon: the mean's own rounding, and a sum over lanes, then over threads, of numbers as large as the largest
    (at most 40 additions in a row, whose errors do not all point one way)."""
    mean, count = run.masked_mean(*on(run, x, mask))
    clean = torch.where(mask, x, 0.0)
    eager, exact = (reference.masked_mean(clean.to(dtype), mask, dim=1) for dtype in (torch.float32, torch.float64))
    assert torch.equal(count.cpu(), mask.sum(1).float())
    assert mean.dtype == torch.float32
    assert_as_good_as_eager(mean.cpu(), eager, exact, 8 * EPS * max(1.0, clean.abs().max().item()))


def assert_whitened_accurately(run, x, mask, **options):
    """The epsilon: roundings of the deviation, of its reciprocal and of their product, for the largest of them."""
    whitened, stats = run.masked_whiten(*on(run, x, mask), **options)
    arguments = (options.get("shift_mean", True), options.get("unbiased", True), options.get("eps", 1e-8))
    clean = torch.where(mask, x, 0.0)
    eager, exact = (reference.whiten(clean.to(dtype), mask, *arguments) for dtype in (torch.float32, torch.float64))
    assert not whitened.cpu()[~mask].any()
    assert_as_good_as_eager(whitened.cpu(), eager[0], exact[0], 8 * EPS * max(1.0, exact[0].abs().max().item()))
    for name, a, b, c in zip(("mean", "rstd", "count"), stats.cpu(), eager[1:], exact[1:], strict=True):
        assert_as_good_as_eager(a, b, c, 8 * EPS * max(1.0, abs(c.item())), name)


# ------------------------------------------------------------------------------------------------------- the checks


def check_mean_of_every_length(run):
    for C in lengths(run):
        x, mask = random_tokenwise(1, 3, C, seed=C)
        assert_mean_is_accurate(run, poison(x, mask), mask)
    assert_mean_is_accurate(run, 1000 + x, mask)


def check_mean_of_more_rows_than_counters(run):
    x, mask = random_tokenwise(1, 2 * run.counters + 3, run.chunk + 1)
    assert_mean_is_accurate(run, x, mask)


def check_whitening_of_every_length(run):
    choices = itertools.cycle(itertools.product((True, False), (True, False), (1e-8, 1e-2)))
    for C, (shift_mean, unbiased, eps) in zip(lengths(run), choices, strict=False):
        x, mask = random_tokenwise(1, C, seed=C)
        mask[-1] = True
        options = {"shift_mean": shift_mean, "unbiased": unbiased, "eps": eps if C > 1 else 1e-2}
        assert_whitened_accurately(run, poison(x, mask), mask, **options)


def check_whitening_numbers_with_a_large_mean(run):
    """The mean in fp32 alone would be off by 3 % of a standard deviation."""
    noise, mask = random_tokenwise(1, 7 * run.chunk + 1)
    for mean in (1e2, 1e6):
        assert_whitened_accurately(run, mean + noise, mask)


def check_by_hand(run):
    x, mask = on(run, torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]) != 0)
    mean, count = run.masked_mean(x, mask)
    assert mean.tolist() == [1.5, 3.0]
    assert count.tolist() == [2.0, 1.0]
    white, stats = run.masked_whiten(x, mask)
    torch.testing.assert_close(white.cpu(), torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(stats.cpu(), torch.tensor([2.0, 1.0, 3.0]))
    white, _ = run.masked_whiten(x, mask, unbiased=False, shift_mean=False)
    root = 1.5**0.5
    torch.testing.assert_close(white.cpu(), torch.tensor([[2 - root, 2.0, 0.0], [2 + root, 0.0, 0.0]]))


def check_equal_numbers_are_whitened_to_exactly_zero(run):
    for constant, n in itertools.product((0.1, 0.3, 1000.1), (37, 5 * run.chunk + 3)):
        x, mask = torch.full((n,), constant), torch.ones(n, dtype=torch.bool)
        mask[: n // 3 : 2] = False
        x, mask = on(run, x, mask)
        assert not run.masked_whiten(x, mask)[0].any()
        white, stats = run.masked_whiten(x, mask, shift_mean=False)
        assert torch.equal(white, x * mask)
        assert stats[0] == x[0]


def check_chunks_far_apart(run):
    """Each chunk nearly constant: all variance lies between them."""
    x, mask = random_tokenwise(1, 6 * run.chunk)
    x = x / 1000 + torch.arange(6).repeat_interleave(run.chunk) * 100
    mask[run.chunk : 2 * run.chunk] = False
    assert_whitened_accurately(run, x, mask)


def check_a_mean_may_be_infinite(run):
    for numbers, expected in (([INF, 1.0], INF), ([1.0, -INF], -INF), ([3e38, -3e38], 0.0)):
        x = torch.tensor([numbers])
        assert run.masked_mean(*on(run, x, torch.ones(1, 2, dtype=torch.bool)))[0].item() == expected
    x = torch.tensor([[INF, -INF], [1.0, NAN]])
    assert run.masked_mean(*on(run, x, torch.ones(2, 2, dtype=torch.bool)))[0].isnan().all()


def check_nan_is_not_hidden(run):
    x, mask = random_tokenwise(1, 3 * run.chunk)
    mask[7] = True
    for bad in (NAN, INF, -INF):
        x[7] = bad
        assert run.masked_whiten(*on(run, x, mask))[0].cpu()[mask].isnan().all()


def check_nothing_counts(run):
    for shape in ((3, 4), (2, 3 * run.chunk), (0, 4), (4, 0)):
        x, mask = on(run, torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool))
        mean, count = run.masked_mean(x, mask)
        assert mean.shape == count.shape == shape[:1]
        whitened, stats = run.masked_whiten(x, mask)
        assert whitened.shape == shape
        assert not any(y.any() for y in (mean, count, whitened))
        torch.testing.assert_close(stats.cpu(), torch.tensor([0.0, 1e4, 0.0]))


def check_bits_do_not_depend_on_neighbours_or_address(run):
    for C in (run.chunk + 4, 2 * run.chunk + 5):
        x, mask = on(run, *random_tokenwise(1, 1, C))
        alone, whitened = run.masked_mean(x, mask), run.masked_whiten(x, mask)
        for again, once in ((run.masked_mean(x, mask), alone), (run.masked_whiten(x, mask), whitened)):
            assert all(same_bits(a, b) for a, b in zip(again, once, strict=True))
        for shift in (0, 1, 2, 4):
            others, other_mask = on(run, *random_tokenwise(1, 5, C + 6, seed=1))
            others[3, shift : shift + C], other_mask[3, shift : shift + C] = x[0], mask[0]
            x_view, mask_view = others[:, shift : shift + C], other_mask[:, shift : shift + C]
            for a, b in zip(run.masked_mean(x_view, mask_view), alone, strict=True):
                assert same_bits(a[3:4], b)
            flat, flat_mask = others[3, shift : shift + C], other_mask[3, shift : shift + C]
            for a, b in zip(run.masked_whiten(flat, flat_mask), whitened, strict=True):
                assert same_bits(a.flatten(), b.flatten())
        turned, turned_mask = (y.expand(2, C).t().contiguous().t() for y in (x, mask))
        assert all(same_bits(a[:1], b) for a, b in zip(run.masked_mean(turned, turned_mask), alone, strict=True))


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


# -------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def interpreted():
    return run_checks(__file__)


@pytest.mark.parametrize("check", CHECKS)
def test_in_interpreter(check, interpreted):
    assert not interpreted[check], interpreted[check]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_on_gpu(check):
    CHECKS[check](Compiled())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(512, 1024), (1, 20_000_000), (4096, 2048)])
def test_on_gpu_at_real_sizes(shape):
    run = Compiled()
    x, mask = random_tokenwise(1, *shape)
    assert_mean_is_accurate(run, x, mask)
    assert_whitened_accurately(run, x, mask)
    x, mask = on(run, x, mask)
    once = (*run.masked_mean(x, mask), *run.masked_whiten(x, mask))
    for _ in range(20):  # whoever happens to arrive last
        again = (*run.masked_mean(x, mask), *run.masked_whiten(x, mask))
        assert all(same_bits(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.skipif(triton is None or triton.knobs.runtime.interpret, reason="needs Triton's compiler")
def test_aligned_rows_move_128_bits_an_access():
    """(loads, stores) of the last kernel launched, which has a narrow way too: all of a tile's, and none from parts."""
    path = Path(__file__).parents[1] / "bench" / "gpu_audit.py"
    spec = importlib.util.spec_from_file_location("gpu_audit", path)
    with mock.patch.dict(sys.modules, {"gpu_audit": importlib.util.module_from_spec(spec)}):
        gpu_audit = sys.modules["gpu_audit"]
        spec.loader.exec_module(gpu_audit)
        calls = gpu_audit.load_family("masked").launches(
            gpu_audit.load_kernels(gpu_audit.KERNELS / "masked.py"), torch.float32
        )
        expected = {"masked_mean": (8, 0), "masked_whiten": (8, 8)}
        for op, wide in expected.items():
            with gpu_audit.compile_only(90) as launches:
                function, args = calls[op][0]
                function(*args)
            lines = [line for _, line in gpu_audit.disassemble(launches[-1].binary.asm["cubin"])[1]]
            assert (gpu_audit.widths(lines, "LDG")[128], gpu_audit.widths(lines, "STG").get(128, 0)) == wide


def main():
    run, results = Interpreter(), {}
    for name, check in CHECKS.items():
        try:
            check(run)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], sep="\n", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
