"""masked_mean and masked_whiten."""

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, poison, random_tokenwise, same_bits

from fastrlhf import functional as F
from fastrlhf import reference


def run(function, x, mask, dtype, **options):
    leaf = x.to(dtype).clone().requires_grad_()
    result = function(leaf, mask, **options)
    weights = torch.linspace(-1, 2, max(result.numel(), 1))[: result.numel()].reshape(result.shape).to(dtype)
    return result.detach(), *torch.autograd.grad((result * weights).sum(), leaf)


def compare(name, x, mask, slack, **options):
    function, oracle = getattr(F, name), getattr(reference, name)
    ours, eager = run(function, x, mask, torch.float32, **options), run(oracle, x, mask, torch.float32, **options)
    exact = run(oracle, x, mask, torch.float64, **options)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert a.shape == c.shape
        assert_as_good_as_eager(a, b, c, slack)


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
@pytest.mark.parametrize("shape", [(5, 37), (1, 1), (3, 9001), (0, 4), (4, 0), (2, 3, 5)])
def test_mean_against_the_oracle(dim, shape):
    x, mask = random_tokenwise(1, *shape)
    compare("masked_mean", x, mask, 4 * EPS, dim=dim)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shape", [(5, 37), (1, 1), (3, 9001), (0, 4), (7,)])
def test_whiten_against_the_oracle(shift_mean, unbiased, shape):
    x, mask = random_tokenwise(1, *shape)
    mask.view(-1)[:1] = True
    compare("masked_whiten", x, mask, 32 * EPS, shift_mean=shift_mean, unbiased=unbiased, eps=1e-4)


def test_by_hand():
    x, mask = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert F.masked_mean(x, mask).item() == 2.0
    assert F.masked_mean(x, mask, 1).tolist() == [1.5, 3.0]
    assert F.masked_mean(x, mask, 0).tolist() == [2.0, 2.0, 0.0]
    torch.testing.assert_close(F.masked_whiten(x, mask), torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    biased = F.masked_whiten(x, mask, unbiased=False, shift_mean=False)
    root = 1.5**0.5
    torch.testing.assert_close(biased, torch.tensor([[2 - root, 2.0, 0.0], [2 + root, 0.0, 0.0]]))


def test_whitened_numbers_have_mean_zero_and_variance_one():
    x, mask = random_tokenwise(1, 9, 5001)
    white = F.masked_whiten(100 + 7 * x, mask)[mask].double()
    assert abs(white.mean()) < 1e-5
    assert white.var().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("constant", [0.1, 0.3, 1000.1])
@pytest.mark.parametrize("n", [37, 333, 5003])
def test_equal_numbers_are_whitened_to_exactly_zero(constant, n):
    x, mask = torch.full((n,), constant), torch.ones(n)
    mask[: n // 3 : 2] = 0
    for function in (F.masked_whiten, reference.masked_whiten):
        assert not function(x, mask).any()
        torch.testing.assert_close(function(x, mask, shift_mean=False), x * mask, rtol=0, atol=0)
    assert F.masked_mean(x, mask).item() == pytest.approx(x[0].item(), rel=1e-6)


def test_a_mean_may_be_infinite():
    inf = float("inf")
    for x, expected in (([inf, 1.0], inf), ([1.0, -inf], -inf), ([3e38, -3e38], 0.0)):
        assert F.masked_mean(torch.tensor(x), torch.ones(2)).item() == expected
    assert F.masked_mean(torch.tensor([inf, -inf]), torch.ones(2)).isnan()


def test_under_the_mask_nothing_matters():
    x, mask = random_tokenwise(1, 4, 50)
    for options in ({}, {"shift_mean": False}):
        clean = run(F.masked_whiten, x, mask, torch.float32, **options)
        dirty = run(F.masked_whiten, poison(x, mask), mask, torch.float32, **options)
        assert all(same_bits(a, b) for a, b in zip(clean, dirty, strict=True))
    for dim in (None, 0, 1):
        clean, dirty = (run(F.masked_mean, v, mask, torch.float32, dim=dim) for v in (x, poison(x, mask)))
        assert all(same_bits(a, b) for a, b in zip(clean, dirty, strict=True))


def test_nothing_counts():
    nan, mask = torch.full((3, 4), float("nan")), torch.zeros(3, 4)
    for result in (F.masked_mean(nan, mask), F.masked_mean(nan, mask, 0), F.masked_whiten(nan, mask)):
        assert not result.any()


def test_a_single_position_is_whitened_to_zero():
    assert F.masked_whiten(torch.tensor([5.0, 7.0]), torch.tensor([1, 0])).tolist() == [0.0, 0.0]


def test_threads_change_no_bit():
    x, mask = random_tokenwise(1, 3, 50_000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append((F.masked_mean(x, mask), F.masked_whiten(x, mask)))
    torch.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: F.masked_mean(x, x[0]), r"mask: got shape \(3,\), wanted \(2, 3\)"),
        (lambda x: F.masked_mean(x, x, 2), r"dim: got 2, wanted a dimension of x, which has shape \(2, 3\)"),
        (lambda x: F.masked_mean(x, x, "rows"), "dim: got 'rows', wanted one dimension of x as an int"),
        (lambda x: F.masked_mean(x.long(), x), "x: got dtype int64, wanted float32, bfloat16, float16"),
        (lambda x: F.masked_whiten(x, x, eps=-1.0), "eps: got -1.0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))


def test_opcheck_and_compile():
    x, mask = random_tokenwise(1, 3, 5)
    ops = torch.ops.fastrlhf
    torch.library.opcheck(ops.masked_mean.default, (x.clone().requires_grad_(), mask))
    torch.library.opcheck(
        ops.masked_whiten.default, (x.clone().requires_grad_(), mask, True, True, torch.tensor([1e-8]))
    )
    compiled = torch.compile(
        lambda x, m: F.masked_whiten(x, m).pow(3).sum() + F.masked_mean(x, m, 1).sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    compiled(leaves[0], mask).backward()
    (F.masked_whiten(leaves[1], mask).pow(3).sum() + F.masked_mean(leaves[1], mask, 1).sum()).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
