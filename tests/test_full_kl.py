"""full_kl: the exact divergence over the vocabulary, and its gradients."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from oracle import EPS, MIXED_SHAPES, assert_as_good_as_eager, poison, random_logits, same_bits

from fastrlhf import functional as F
from fastrlhf import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pair(*shape, dtypes=(torch.float32, torch.float32), near=0.5, seed=0):
    """Logits of a policy, and of a reference that is `near` standard deviations away."""
    logits, _ = random_logits(*shape, seed=seed)
    ref_logits = logits + near * random_logits(*shape, seed=seed + 1)[0]
    return logits.to(dtypes[0]), ref_logits.to(dtypes[1])


def with_gradients(function, logits, ref_logits, g, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (logits, ref_logits)]
    kl = function(*leaves, **options)
    return kl.detach(), *torch.autograd.grad((kl * g).sum(), leaves)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)))
def test_against_the_oracle_in_every_pair_of_dtypes(dtypes):
    logits, ref_logits = pair(5, 2049, dtypes=dtypes)
    compare(logits, ref_logits, temperature=0.9)


@pytest.mark.parametrize("shape", MIXED_SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("near", [1e-3, 0.5, 3.0])
def test_against_the_oracle(shape, temperature, near):
    compare(*pair(*shape, near=near), temperature=temperature)


def compare(logits, ref_logits, **options):
    g = torch.randn(logits.shape[:-1])
    ours = with_gradients(F.full_kl, logits, ref_logits, g, **options)
    eager = with_gradients(reference.full_kl, logits, ref_logits, g, **options)
    exact = with_gradients(reference.full_kl, logits.double(), ref_logits.double(), g.double(), **options)
    assert ours[0].dtype == torch.float32
    for x, leaf in zip(ours[1:], (logits, ref_logits), strict=True):
        assert x.dtype == leaf.dtype
    # The sums of a row's 2^t are rounded at each step, by a few EPS of themselves; results in 16 bits once more. Where
    # the distributions are close, so are the p and q whose difference, times g / T, is a gradient: it has their errors.
    steepest = g.abs().max().item() / options["temperature"]
    for a, b, c, size in zip(ours, eager, exact, (1.0, steepest, steepest), strict=True):
        slack = 16 * EPS * max(size, c.abs().max().item()) + torch.finfo(a.dtype).eps * c.abs().max().item()
        assert_as_good_as_eager(a, b, c, slack)


def test_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    torch.testing.assert_close(F.full_kl(p.log(), q.log()), torch.tensor([expected]))


def test_equal_distributions_have_none():
    logits, _ = pair(4, 5003)
    kl, grad, ref_grad = with_gradients(F.full_kl, logits, logits, torch.ones(4))
    assert kl.tolist() == [0.0] * 4
    assert grad.abs().max() < 1e-6
    assert ref_grad.abs().max() < 1e-6


def test_it_is_the_mean_of_the_k1_estimates():
    logits, ref_logits = pair(1, 300)
    p = logits.softmax(-1)
    estimates = F.kl_divergence(logits.log_softmax(-1), ref_logits.log_softmax(-1), estimator="k1")
    torch.testing.assert_close(F.full_kl(logits, ref_logits), (p * estimates).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [(1e4, -1e3), (-1e5, 1e5)])
def test_shifting_the_logits_changes_nothing(shift):
    logits, ref_logits = ((x * 16).round() / 16 for x in pair(4, 3001))  # stays exact under the shift
    g = torch.randn(4)
    plain = with_gradients(F.full_kl, logits, ref_logits, g)
    shifted = with_gradients(F.full_kl, logits + shift[0], ref_logits + shift[1], g)
    for a, b in zip(plain, shifted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_impossible_tokens():
    inf = math.inf
    logits = torch.tensor([[-inf, 1.0, 2.0], [0.0, 1.0, 2.0], [-inf, 1.0, 2.0]], requires_grad=True)
    ref_logits = torch.tensor([[0.5, 1.0, 2.0], [-inf, 1.0, 2.0], [-inf, 0.0, 2.0]], requires_grad=True)
    kl = F.full_kl(logits, ref_logits)
    expected = reference.full_kl(logits.detach().double(), ref_logits.detach().double())
    assert kl[1].item() == inf
    torch.testing.assert_close(kl.double(), expected)
    kl[0::2].sum().backward()
    assert logits.grad.isfinite().all()
    assert ref_logits.grad.isfinite().all()
    assert logits.grad[0, 0] == logits.grad[2, 0] == ref_logits.grad[2, 0] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 70, 2500])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_infinity_show(bad, position, which):
    both = list(pair(1, 2600))
    both[which][0, position] = bad
    assert F.full_kl(*both).isnan().all()


def test_rows_that_begin_with_minus_infinity_or_grow_late():
    logits, ref_logits = pair(3, 5000)
    logits[0, :3000] = -math.inf
    ref_logits[1, 3000:] += 60.0
    logits[2, 4000:] += 90.0
    ref_logits[2] = logits[2].flip(0)
    compare_rows = torch.tensor([0, 1, 2])
    exact = reference.full_kl(logits.double(), ref_logits.double())
    torch.testing.assert_close(F.full_kl(logits, ref_logits)[compare_rows].double(), exact, rtol=1e-5, atol=1e-5)


def test_what_stands_under_the_mask_changes_no_bit():
    logits, ref_logits = pair(6, 1009)
    mask = torch.tensor([1, 0, 1, 0, 0, 1])
    g, wide = torch.randn(6), mask.bool().unsqueeze(-1).expand(6, 1009)
    clean = with_gradients(F.full_kl, logits, ref_logits, g, mask=mask)
    dirty = with_gradients(F.full_kl, poison(logits, wide), poison(ref_logits, wide), g, mask=mask)
    assert all(same_bits(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not any(x[mask == 0].any() for x in clean)
    assert not any(x.any() for x in with_gradients(F.full_kl, *[logits / 0] * 2, g, mask=torch.zeros(6)))


def test_strided_rows_and_batch_and_threads():
    logits, ref_logits = pair(4, 6, 515)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    whole = F.full_kl(logits, ref_logits)
    assert same_bits(F.full_kl(logits[:, :-1], ref_logits[:, :-1]), whole[:, :-1].contiguous())
    assert same_bits(F.full_kl(logits[2, 3], ref_logits[2, 3]), whole[2, 3])
    torch.set_num_threads(1)
    assert same_bits(F.full_kl(logits, ref_logits), whole)
    torch.set_num_threads(before)
    assert F.full_kl(logits[:0], ref_logits[:0]).shape == (0, 6)


def test_only_the_gradients_that_are_needed():
    logits, ref_logits = pair(3, 40)
    raw = torch.ops.fastrlhf.full_kl(logits, ref_logits, None, torch.tensor([1.0]))
    g = torch.ones(3)
    for needs in itertools.product((True, False), repeat=2):
        grads = torch.ops.fastrlhf.full_kl_backward(g, logits, ref_logits, None, *raw, torch.tensor([1.0]), *needs)
        assert [x.numel() > 0 for x in grads] == list(needs)
    kl = F.full_kl(logits.requires_grad_(), ref_logits)
    kl.sum().backward()
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(3), rtol=0, atol=1e-6)


def test_double_backward_and_forward_mode_are_refused():
    logits, ref_logits = pair(2, 7)
    (grad,) = torch.autograd.grad(F.full_kl(logits.requires_grad_(), ref_logits).sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.pow(2).sum().backward()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: F.full_kl(x, ref_logits), (logits.detach(),), (torch.ones(2, 7),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_logits": torch.zeros(3, 5)}, r"ref_logits: got shape \(3, 5\), wanted \(3, 4\), the shape of logits"),
        ({"logits": torch.zeros(())}, r"logits: got shape \(\), wanted at least one entry in the vocabulary"),
        ({"logits": torch.zeros(4, 3).T}, r"logits: got strides \(1, 3\), wanted a last stride of 1"),
        ({"ref_logits": torch.zeros(3, 4, dtype=torch.float64)}, "ref_logits: got dtype float64"),
        ({"ref_logits": torch.zeros(3, 4, device="meta")}, "ref_logits: got device meta, wanted cpu"),
        ({"mask": torch.ones(4)}, r"mask: got shape \(4,\), wanted \(3,\)"),
        ({"temperature": 0}, "temperature: got 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        F.full_kl(**({"logits": torch.zeros(3, 4), "ref_logits": torch.zeros(3, 4)} | change))


def test_opcheck_and_compile():
    logits, ref_logits = pair(3, 4, 37)
    mask = torch.rand(3, 4) > 0.3
    temperature = torch.tensor([0.9])
    op = torch.ops.fastrlhf.full_kl.default
    torch.library.opcheck(op, (logits.clone().requires_grad_(), ref_logits.clone().requires_grad_(), mask, temperature))
    torch.library.opcheck(op, (logits, ref_logits.bfloat16()[:, :], None, temperature))
    saved = op(logits, ref_logits, mask, temperature)
    backward = torch.ops.fastrlhf.full_kl_backward.default
    for needs in ((True, True), (False, True)):
        torch.library.opcheck(backward, (torch.randn(3, 4), logits, ref_logits, mask, *saved, temperature, *needs))
    compiled = torch.compile(F.full_kl, fullgraph=True, backend="aot_eager")
    g = torch.randn(3, 4)
    results = [with_gradients(f, logits, ref_logits, g, mask=mask, temperature=0.9) for f in (F.full_kl, compiled)]
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("capability", ["avx2", "portable"])
def test_the_other_builds(capability):
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "oracle or impossible or begin or bit"]
    environment = os.environ | {"FASTRLHF_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "FASTRLHF_CPU_CAPABILITY: got" in run.stdout + run.stderr:
        pytest.skip(f"no {capability} here")
    assert run.returncode == 0, run.stdout[-2000:]
