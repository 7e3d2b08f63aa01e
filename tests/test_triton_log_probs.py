"""The Triton kernels of token_log_probs(_and_entropy) against fp64.

Every `check_*` runs twice. Without a GPU: in Triton's interpreter, on the raw kernels. Triton reads TRITON_INTERPRET
when it is imported, and the audit in the same pytest run needs the compiler, so the checks run in one child process
(`python tests/test_triton_log_probs.py` by hand) and are reported one by one. With a GPU: compiled, through the public
`fastrlhf.functional`.
"""

import importlib
import json
import math
import sys
import time
import traceback
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from interpreter import run_checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


class Interpreter:
    """The raw kernels on CPU tensors."""

    device = "cpu"
    bf16_slack = 2**-7  # the interpreter truncates fp32 to bf16 where a GPU rounds: one unit in the last place more

    def __init__(self):
        self.ops = importlib.import_module("fastrlhf.kernels.log_probs")

    def __call__(self, logits, tokens, temperature=1.0, g=None, h=None, inplace=False):
        """Outputs [...] and, given g (and h, then with the entropy), grad [..., V]."""
        ops, entropy = self.ops, None
        if h is None:
            log_probs, normaliser = ops.token_log_probs(logits, tokens, temperature)
            backward = ops.token_log_probs_backward_ if inplace else ops.token_log_probs_backward
            args = (g, logits, tokens, normaliser, temperature)
        else:
            log_probs, entropy, normaliser = ops.token_log_probs_and_entropy(logits, tokens, temperature)
            backward = (
                ops.token_log_probs_and_entropy_backward_ if inplace else ops.token_log_probs_and_entropy_backward
            )
            args = (g, h, logits, tokens, normaliser, entropy, temperature)
        grad = None if g is None else backward(*args)
        return SimpleNamespace(log_probs=log_probs, entropy=entropy, grad=logits if inplace else grad)


class Functional:
    """The public functions on CUDA tensors."""

    device = "cuda"
    bf16_slack = 0.0

    def __call__(self, logits, tokens, temperature=1.0, g=None, h=None, inplace=False):
        from fastrlhf import functional as F

        z = logits.detach().requires_grad_(g is not None and not inplace)
        if inplace:  # over these very logits, which must not be a leaf
            z.add_(torch.zeros((), dtype=z.dtype, device=z.device, requires_grad=True))
        options = {"temperature": temperature, "inplace_backward": inplace}
        if h is None:
            outputs = (F.token_log_probs(z, tokens, **options),)
        else:
            outputs = F.token_log_probs_and_entropy(z, tokens, **options)
        grad = None if g is None else torch.autograd.grad(outputs, z, [x for x in (g, h) if x is not None])[0]
        return SimpleNamespace(log_probs=outputs[0], entropy=None if h is None else outputs[1], grad=grad)


def reference(logits, tokens, temperature, g, h, dtype):
    """The same by autograd in dtype: the truth in fp64, what eager PyTorch makes of it in fp32."""
    z = logits.detach().to(dtype).requires_grad_()
    counts = tokens != -100
    log_p = torch.log_softmax(torch.where(counts[..., None], z, 0.0) / temperature, -1)
    log_probs = torch.where(counts, log_p.gather(-1, tokens.clamp(min=0)[..., None])[..., 0], 0.0)
    surprise = torch.where(log_p == -INF, 0.0, log_p)
    entropy = torch.where(counts, -(log_p.exp() * surprise).sum(-1), 0.0)
    total = (log_probs * g).sum() + (0.0 if h is None else (entropy * h).sum())
    (grad,) = torch.autograd.grad(total, z)
    return SimpleNamespace(log_probs=log_probs.detach(), entropy=entropy.detach(), grad=grad)


def error(x, exact):
    return (x.double() - exact.double()).abs().max().item() if x.numel() else 0.0


def assert_accurate(run, logits, tokens, temperature, g, h):
    """At most twice the error of eager PyTorch on the same values in fp32, plus an epsilon.

    The epsilon is a few roundings of fp32, those of log p becoming a relative error of p.
    """
    ours = run(logits, tokens, temperature, g, h)
    exact = reference(logits, tokens, temperature, g, h, torch.float64)
    eager = reference(logits, tokens, temperature, g, h, torch.float32)
    eager.grad = eager.grad.to(logits.dtype)
    upstream = g.abs().max().item() + (0.0 if h is None else h.abs().max().item() * (1 + exact.entropy.max().item()))
    epsilon = {
        "log_probs": 2**-20 + 2**-23 * exact.log_probs.abs().max().item(),
        "entropy": 2**-20,
        "grad": 4e-6 * upstream / temperature,
    }
    if logits.dtype == torch.bfloat16:
        epsilon["grad"] += run.bf16_slack * exact.grad.abs().max().item()
    for name in ("log_probs", "grad") if h is None else ("log_probs", "entropy", "grad"):
        x, limit = getattr(ours, name), 2 * error(getattr(eager, name), getattr(exact, name)) + epsilon[name]
        assert x.shape == getattr(exact, name).shape
        assert error(x, getattr(exact, name)) <= limit, (name, error(x, getattr(exact, name)), limit)


def sample(run, *shape, dtype=torch.float32, scale=3.0, seed=0):
    """Logits [*shape], tokens, g and h [*shape[:-1]]."""
    rng = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=rng) * scale).to(dtype)
    tokens = torch.randint(0, shape[-1], shape[:-1], generator=rng)
    g, h = torch.randn(2, *shape[:-1], generator=rng)
    return tuple(x.to(run.device) for x in (logits, tokens, g, h))


# ------------------------------------------------------------------------------------------------------- the checks


def check_odd_vocabularies_in_every_dtype(run):
    for dtype in DTYPES:
        for V in (1, 2, 7, 509, 2048, 4096, 4099, 8200):
            logits, tokens, g, h = sample(run, 3, V, dtype=dtype, seed=V)
            tokens[1] = -100
            assert_accurate(run, logits, tokens, 0.7, g, None)
            assert_accurate(run, logits, tokens, 0.7, g, h)


def check_large_logits(run):
    for scale in (1.0, 10.0, 100.0):
        for temperature in (1.0, 0.3):
            logits, tokens, g, h = sample(run, 4, 1003, scale=scale)
            assert_accurate(run, logits, tokens, temperature, g, h)


def check_shifting_all_logits_changes_nothing(run):
    for V in (5003, 512):
        logits, tokens, g, h = sample(run, 4, V)
        logits = (logits * 16).round() / 16  # stays exact under the shift
        for upstream in ((g, None), (g, h)):
            plain = run(logits, tokens, 1.0, *upstream)
            for shift in (-1e4, 1e2, 1e3, 1e5):
                shifted = run(logits + shift, tokens, 1.0, *upstream)
                for name in ("log_probs", "grad") if upstream[1] is None else ("log_probs", "entropy", "grad"):
                    a, b = getattr(plain, name), getattr(shifted, name)
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def check_strided_rows_are_read_where_they_lie(run):
    base, tokens, g, h = sample(run, 3, 4, 257)
    small, few = (slice(None), slice(None, -1)), (slice(1, None), slice(None, None, 2))
    for index in (small, few):
        view = base[index]
        assert_accurate(run, view, tokens[index], 1.3, g[index], h[index])
    turned = (x.transpose(0, 1) for x in (base, tokens, g, h))
    view, tokens, g, h = turned
    assert_accurate(run, view, tokens, 1.3, g, h)
    base, tokens, g, h = sample(run, 2, 3, 4, 2, 65)  # three strides left after merging: several launches
    view, tokens, g, h = (x[:, ::2, ::3] for x in (base, tokens, g, h))
    assert_accurate(run, view, tokens, 1.3, g, h)
    view, tokens, g, h = base[0, 0, 0, 0], tokens[0, 0, 0, 0], g[0, 0, 0, 0], h[0, 0, 0, 0]  # [V] and a scalar
    assert_accurate(run, view, tokens, 1.3, g, h)


def check_ignored_rows_are_zero_and_unread(run):
    logits, tokens, g, h = sample(run, 4, 100, dtype=torch.bfloat16)
    tokens[[0, 2]] = -100
    logits[0], logits[2] = NAN, INF
    g[0] = NAN
    for ours in (run(logits, tokens, 0.7, g, h), run(logits, tokens, 0.7, g)):
        assert (ours.log_probs[[0, 2]] == 0).all()
        assert (ours.grad[[0, 2]] == 0).all()
        assert ours.grad[[1, 3]].isfinite().all()
        assert ours.entropy is None or (ours.entropy[[0, 2]] == 0).all()


def check_rows_without_gradient_get_zero_whatever_they_hold(run):
    logits, tokens, g, h = sample(run, 3, 70)
    logits[1] = NAN
    g[1] = h[1] = 0.0
    ours = run(logits, tokens, 1.0, g, h)
    assert (ours.grad[1] == 0).all()
    assert ours.grad.isfinite().all()


def check_no_rows(run):
    logits, tokens, g, h = sample(run, 0, 50)
    ours = run(logits, tokens, 1.0, g, h)
    assert ours.log_probs.shape == ours.entropy.shape == (0,)
    assert ours.grad.shape == (0, 50)


def check_in_place_gives_the_same_bits_and_spares_the_padding(run):
    for dtype in (torch.float32, torch.bfloat16):
        for V, stride in ((4099, 4104), (4099, 4100), (8, 16)):
            logits, tokens, g, h = sample(run, 3, stride, dtype=dtype)
            tokens = tokens % V
            tokens[1] = -100
            before = logits.clone()
            for upstream in ((g, None), (g, h)):
                fresh = run(before[:, :V], tokens, 0.9, *upstream).grad
                logits.copy_(before)
                written = run(logits[:, :V], tokens, 0.9, *upstream, inplace=True).grad
                assert torch.equal(fresh, written)
                assert torch.equal(logits[:, :V], fresh)
                assert torch.equal(logits[:, V:], before[:, V:])


def check_properties(run):
    logits, tokens, g, h = sample(run, 5, 777)
    ours, shifted = run(logits, tokens, 1.0, g, h), run(logits + 8.0, tokens, 1.0, g, h)
    assert ours.grad.double().sum(-1).abs().max() < 1e-5  # softmax does not see a shift
    assert error(ours.log_probs, shifted.log_probs) < 1e-5
    assert error(ours.entropy, shifted.entropy) < 1e-5
    assert torch.equal(ours.log_probs, run(logits, tokens, 1.0, g).log_probs)  # with the entropy or without
    flat = run(torch.zeros(1, 64, device=run.device), tokens[:1] % 64, 1.0, g[:1], h[:1])
    assert abs(flat.entropy.item() - math.log(64)) < 1e-6
    assert abs(flat.log_probs.item() + math.log(64)) < 1e-6


def check_tokens_outside_the_vocabulary_read_nothing(run):
    logits, tokens, _, _ = sample(run, 2, 10)
    tokens[0], tokens[1] = 10, 2**33 + 1
    assert run(logits, tokens).log_probs.isnan().all()


def check_rows_whose_token_lies_in_another_shard_of_the_vocabulary(run):
    """All but the log-prob is as ever; the gradient lacks the one-hot."""
    logits, tokens, g, h = sample(run, 3, 4099)
    elsewhere, rows = torch.full_like(tokens, -(2**63)), torch.arange(3, device=run.device)
    for upstream in ((g, None), (g, h)):
        ours, here = run(logits, elsewhere, 0.7, *upstream), run(logits, tokens, 0.7, *upstream)
        assert ours.log_probs.isnan().all()
        assert upstream[1] is None or torch.equal(ours.entropy, here.entropy)
        expected = here.grad.double()
        expected[rows, tokens] -= g.double() / 0.7
        assert error(ours.grad[rows, tokens], expected[rows, tokens]) < 4e-7 * g.abs().max().item()
        expected[rows, tokens] = ours.grad[rows, tokens].double()
        assert torch.equal(ours.grad.double(), expected)


def check_nan_and_infinity_are_not_hidden(run):
    logits, tokens, g, h = sample(run, 2, 5000)
    logits[0, 4321], logits[1, 17] = NAN, INF
    ours = run(logits, tokens, 1.0, g, h)
    assert ours.log_probs.isnan().all()
    assert ours.entropy.isnan().all()


# ------------------------------------------------------------------------------- where others broke (named after it)


def check_bug_verl_2656_and_2899_tail_block_adds_phantom_mass(run):
    for V in (5, 1000, 4097):
        logits = torch.full((1, V), -50.0, device=run.device)
        tokens = torch.tensor([V - 1], device=run.device)
        assert abs(run(logits, tokens).log_probs.item() + math.log(V)) < 1e-5


def check_bug_verl_and_skyrl_2141_all_logits_negative(run):
    for dtype in (torch.float32, torch.bfloat16):
        for low in (-1e4, -1e30, torch.finfo(dtype).min):
            for temperature in (1.0, 0.5):
                logits = torch.full((2, 300), low, dtype=dtype, device=run.device)
                tokens = torch.tensor([3, 299], device=run.device)
                one = torch.ones(2, device=run.device)
                ours = run(logits, tokens, temperature, one, one)
                assert (ours.log_probs + math.log(300)).abs().max() < 1e-5
                assert (ours.entropy - math.log(300)).abs().max() < 1e-5
    logits[:, 3] = 0.0  # one live logit among the masked ones
    ours = run(logits, tokens[:1].expand(2), 1.0, one, one)
    assert (ours.log_probs == 0).all()
    assert (ours.entropy == 0).all()
    assert (ours.grad == 0).all()


def check_bug_minus_infinity_makes_entropy_nan(run):
    logits, tokens, g, h = sample(run, 3, 9000)
    logits[0, ::2], logits[1, :8500], logits[2, 1:] = -INF, -INF, -INF
    tokens[0], tokens[1], tokens[2] = 1, 8999, 0
    ours = run(logits, tokens, 1.0, g, h)
    exact = reference(logits, tokens, 1.0, g, h, torch.float64)
    assert error(ours.log_probs, exact.log_probs) < 1e-5
    assert error(ours.entropy, exact.entropy) < 1e-5
    assert (ours.grad[logits == -INF] == 0).all()
    assert ours.grad.isfinite().all()
    tokens[0] = 0  # a token of probability 0
    assert run(logits, tokens).log_probs[0] == -INF


def check_bug_liger_803_and_trl_int32_offsets(run):
    """Two rows more than 2^31 elements apart. On CPU the pages between are never touched, so they cost nothing."""
    stride = 2**31 + 1000
    logits = torch.empty(stride + 100, dtype=torch.bfloat16, device=run.device).as_strided((2, 100), (stride, 1))
    small, tokens, g, h = sample(run, 2, 100, dtype=torch.bfloat16)
    logits.copy_(small)
    for view in (logits, logits.unsqueeze(1).expand(2, 2, 100)[:, :1]):
        shape = view.shape[:-1]
        ours = run(view, tokens.view(shape), 1.0, g.view(shape), h.view(shape))
        near = run(small, tokens, 1.0, g, h)
        assert torch.equal(ours.log_probs.flatten(), near.log_probs)
        assert torch.equal(ours.grad.flatten(), near.grad.flatten())
    run(logits, tokens, 1.0, g, h, inplace=True)
    assert torch.equal(logits, near.grad)


def check_bug_liger_1294_more_than_65535_rows(run):
    """What refuses them is a GPU. The interpreter would take minutes; there, the audit looks at the grids."""
    logits, tokens, g, h = sample(run, 65_600 if run.device == "cuda" else 70, 9)
    assert_accurate(run, logits, tokens, 1.0, g, h)


def check_bug_openrlhf_entropy_at_temperature_one(run):
    logits = torch.tensor([[0.0, math.log(3.0)]], device=run.device)
    tokens, one = torch.tensor([1], device=run.device), torch.ones(1, device=run.device)
    ours = run(logits, tokens, 0.5, one, one)  # p = (1, 9) / 10
    assert abs(ours.log_probs.item() - math.log(0.9)) < 1e-6
    assert abs(ours.entropy.item() + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)) < 1e-6


def check_bug_trl_5597_entropy_without_gradient(run):
    logits = torch.tensor([[0.0, math.log(3.0)]], device=run.device)
    tokens = torch.tensor([0], device=run.device)
    zero, one = torch.zeros(1, device=run.device), torch.ones(1, device=run.device)
    entropy = math.log(4) - 0.75 * math.log(3)
    expected = torch.tensor([[-0.25 * (math.log(0.25) + entropy), -0.75 * (math.log(0.75) + entropy)]])
    assert error(run(logits, tokens, 1.0, zero, one).grad.cpu(), expected) < 1e-6


def check_bug_verl_5662_log_probs_rounded_to_bf16(run):
    logits, tokens, _, h = sample(run, 4, 500, dtype=torch.bfloat16)
    ours = run(logits, tokens, 1.0, h, h)
    for x in (ours.log_probs, ours.entropy):
        assert x.dtype == torch.float32
        assert (x != x.bfloat16().float()).all()
    assert ours.grad.dtype == torch.bfloat16


def check_bug_verl_7704_batch_invariance_lost(run):
    """The same row, alone or anywhere in a batch, aligned or not: the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        V = 5001
        row, token, g, h = sample(run, 1, V, dtype=dtype)
        alone = run(row, token, 0.8, g, h)
        others, tokens, gs, hs = sample(run, 9, V, dtype=dtype, seed=1)
        padded = torch.zeros(9, V + 7, dtype=dtype, device=run.device)[:, :V]  # 5008: every row at 16 bytes
        for batch in (others, padded):
            batch[:], tokens[:], gs[:], hs[:] = row, token, g, h
            batch[4], gs[4] = 1e4, -3.0
            ours = run(batch, tokens, 0.8, gs, hs)
            for i in (0, 1, 2, 3, 5, 6, 7, 8):
                assert torch.equal(ours.log_probs[i], alone.log_probs[0])
                assert torch.equal(ours.entropy[i], alone.entropy[0])
                assert torch.equal(ours.grad[i], alone.grad[0])


def check_split_rows_give_the_same_bits(run):
    """Few rows: a program for each chunk of a row. Many rows: one for all."""
    rows = importlib.import_module("fastrlhf.kernels._rows")
    for dtype in (torch.float32, torch.bfloat16):
        for V in (16_384, 20_001):
            logits, tokens, g, h = sample(run, 5, V, dtype=dtype)
            logits[1, :] += 1000.0  # its backward pass computes the statistics again
            logits[2, :], logits[2, V - 1] = -INF, 0.0
            logits[3, 16_000] = NAN
            tokens[2], tokens[4] = V - 1, -100
            for upstream in ((g, None), (g, h)):
                for inplace in (False, True):
                    split = run(logits.clone(), tokens, 0.8, *upstream, inplace=inplace)
                    with mock.patch.object(rows, "PROGRAMS_PER_MULTIPROCESSOR", 0):
                        whole = run(logits.clone(), tokens, 0.8, *upstream, inplace=inplace)
                    for name in ("log_probs", "grad") if upstream[1] is None else ("log_probs", "entropy", "grad"):
                        a, b = getattr(split, name), getattr(whole, name)
                        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (name, V, dtype, inplace)
            assert not split.log_probs[[0, 1]].isnan().any()
            assert split.log_probs[3].isnan()
            keep = [0, 1, 2, 4]
            assert_accurate(run, logits[keep], tokens[keep], 0.8, g[keep], h[keep])


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
    CHECKS[check](Functional())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("V", [50_257, 151_936])
@pytest.mark.parametrize("rows", [1, 300, 1024])
def test_on_gpu_at_real_sizes(V, rows):
    run = Functional()
    logits, tokens, g, h = sample(run, rows, V + 1, dtype=torch.bfloat16)
    tokens %= V
    for upstream in ((g, None), (g, h)):
        assert_accurate(run, logits[:, :V].contiguous(), tokens, 0.7, *upstream)
        assert_accurate(run, logits[:, :V], tokens, 0.7, *upstream)  # an odd stride
        torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_gpu_more_than_2_to_the_31_elements():
    V = 151_936
    rows = 2**31 // V + 2
    if torch.cuda.mem_get_info()[0] < 3 * rows * V * 2:
        pytest.skip("needs 13 GB of GPU memory")
    run = Functional()
    logits = torch.zeros(rows, V, dtype=torch.bfloat16, device=run.device)
    few, tokens, g, h = sample(run, 2, V, dtype=torch.bfloat16)
    logits[-2:] = few
    everywhere = [x.new_zeros(rows) for x in (tokens, g, h)]
    for x, y in zip(everywhere, (tokens, g, h), strict=True):
        x[-2:] = y
    far, near = run(logits, everywhere[0], 1.0, *everywhere[1:]), run(few, tokens, 1.0, g, h)
    for name in ("log_probs", "entropy", "grad"):
        assert torch.equal(getattr(far, name)[-2:], getattr(near, name))


def main():
    run, results = Interpreter(), {}
    for name, check in CHECKS.items():
        try:
            began = time.perf_counter()
            check(run)
            print(f"{time.perf_counter() - began:5.1f} s  {name}", file=sys.stderr)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], sep="\n", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
