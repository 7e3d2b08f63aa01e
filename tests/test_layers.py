"""rms_norm, swiglu and rotary_embedding, and their gradients."""

import math

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, same_bits

from fastrlhf import fallback, reference
from fastrlhf import functional as F
from fastrlhf.bench import eager

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 7, 16, 31, 64, 576, 1009)
EPSILON = 1e-5
USUAL = 1e-6  # where none is given


def drawn(*shapes, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def angles(batch, length, size, seed=0):
    """cos and sin that differ between the two halves, as nothing forbids."""
    (t,) = drawn((batch, length, size), scale=3.0, seed=seed)
    return t.cos(), t.sin()


def with_gradients(function, leaves, g, *args, **options):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = function(*leaves, *args, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))


def compare(ours, peer, exact_function, leaves, g, *args, sums=1.0, terms=0.0, **options):
    """sums: how many numbers the largest sum has, each of them rounded. terms: the largest number of a difference."""
    results = with_gradients(ours, leaves, g, *args, **options)
    theirs = with_gradients(peer, leaves, g, *(x.to(leaves[0].dtype) for x in args), **options)
    exact = with_gradients(
        exact_function, [x.double() for x in leaves], g.double(), *(x.double() for x in args), **options
    )
    for a, b, c in zip(results, theirs, exact, strict=True):
        assert a.dtype == leaves[0].dtype
        largest = c.abs().max().item() if c.numel() else 0.0
        slack = (8 + math.sqrt(sums)) * EPS * max(largest, terms) + torch.finfo(a.dtype).eps * largest
        assert_as_good_as_eager(a, b, c, slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [(1,), (3, 5), (33,), (100,)])
def test_rms_norm_against_the_oracle(dtype, width, rows):
    x, weight, g = drawn((*rows, width), (width,), (*rows, width), dtype=dtype)
    # dx is a difference of two numbers of this size: where x is all that its mean is made of, nothing is left of them.
    terms = (g.double() * weight * (x.double().square().mean(-1, keepdim=True) + USUAL).rsqrt()).abs().max().item()
    sums = math.prod(rows) + width
    compare(F.rms_norm, eager.rms_norm, reference.rms_norm, [x, weight], g, sums=sums, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (17,), (3, 5, 33), (40, 1536)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_swiglu_against_the_oracle(dtype, shape, scale):
    gate, up, g = drawn(shape, shape, shape, dtype=dtype, scale=scale)
    compare(F.swiglu, eager.swiglu, reference.swiglu, [gate, up], g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batches", [(1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("heads_and_size", [(1, 2), (3, 6), (9, 64), (2, 40)])
def test_rotary_embedding_against_the_oracle(dtype, batches, heads_and_size):
    heads, size = heads_and_size
    x, g = drawn(*[(batches[0], heads, 7, size)] * 2, dtype=dtype)
    # Rounded once beforehand, or the errors of eager's angles would be ours.
    cos, sin = (t.to(dtype).float() for t in angles(batches[1], 7, size))
    compare(F.rotary_embedding, eager.rotary_embedding, reference.rotary_embedding, [x], g, cos, sin)


def test_by_hand():
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    root = math.sqrt(12.5 + EPSILON)
    torch.testing.assert_close(F.rms_norm(x, weight, eps=EPSILON), torch.tensor([[3 / root, 8 / root]]))
    torch.testing.assert_close(
        F.swiglu(torch.tensor([2.0, -1.0]), torch.tensor([3.0, 4.0])),
        torch.tensor([6 / (1 + math.exp(-2)), -4 / (1 + math.e)]),
    )
    quarter = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    torch.testing.assert_close(
        F.rotary_embedding(torch.tensor([[[[1.0, 2.0]]]]), *quarter), torch.tensor([[[[-2.0, 1.0]]]])
    )


def test_turning_keeps_lengths_and_products_of_equal_distance():
    position = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    cos, sin = position.cos()[None], position.sin()[None]
    q, k = (x.expand(1, 1, 6, 4) for x in drawn((1, 1, 1, 4), (1, 1, 1, 4)))
    q, k = (F.rotary_embedding(x, cos, sin)[0, 0] for x in (q, k))
    torch.testing.assert_close(q.norm(dim=-1), q[:1].norm(dim=-1).expand(6))
    products = q @ k.T
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("extreme", [1e-30, 1e18, 3e4])
def test_large_and_small_numbers(extreme):
    x, weight = drawn((4, 70), (70,))
    x = x * extreme
    exact = reference.rms_norm(x.double(), weight.double(), eps=EPSILON)
    torch.testing.assert_close(F.rms_norm(x, weight, eps=EPSILON).double(), exact, rtol=1e-5, atol=0)
    gate = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4], requires_grad=True)
    up = torch.full((6,), 2.0, requires_grad=True)
    y = F.swiglu(gate, up)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 180.0, 400.0, 2e4]))
    gradients = torch.autograd.grad(y.sum(), (gate, up))
    torch.testing.assert_close(gradients[0], torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0]))
    torch.testing.assert_close(gradients[1], torch.tensor([0.0, 0.0, 0.0, 90.0, 200.0, 1e4]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_show_where_they_are(bad):
    x, weight = drawn((3, 40), (40,))
    x[1, 17] = bad
    y = F.rms_norm(x, weight, eps=EPSILON)
    assert y[1, 17].isnan()
    assert y[0::2].isfinite().all()
    gate, up = drawn((50,), (50,))
    gate[20] = up[40] = math.nan
    assert F.swiglu(gate, up).isnan().nonzero().flatten().tolist() == [20, 40]


def test_strides_batch_and_threads_change_no_bit():
    x, weight, g = drawn((70, 515), (515,), (70, 515))
    q, gq = drawn((2, 33, 3, 64), (2, 33, 3, 64))
    cos, sin = angles(2, 33, 64)
    gate, up = drawn((90, 600), (90, 600))

    def everything():
        norm = with_gradients(F.rms_norm, [x, weight], g, eps=EPSILON)
        turned = with_gradients(F.rotary_embedding, [q.transpose(1, 2)], gq.transpose(1, 2), cos, sin)
        return [*norm, *turned, *with_gradients(F.swiglu, [gate, up], gate)]

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    several = everything()
    torch.set_num_threads(1)
    one = everything()
    torch.set_num_threads(before)
    assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(several, one, strict=True))

    apart = F.rms_norm(x.T.contiguous().T, weight, eps=EPSILON)
    assert same_bits(apart, several[0])
    assert same_bits(F.rms_norm(x[5], weight, eps=EPSILON), several[0][5])
    heads_first = q.transpose(1, 2).contiguous()
    assert same_bits(F.rotary_embedding(heads_first, cos, sin).contiguous(), several[3].contiguous())
    transposed = heads_first.transpose(2, 3).contiguous().transpose(2, 3)
    assert same_bits(F.rotary_embedding(transposed, cos, sin).contiguous(), several[3].contiguous())


def test_only_the_gradients_that_are_needed():
    x, weight = drawn((3, 40), (40,))
    y = F.rms_norm(x.requires_grad_(), weight, eps=EPSILON)
    y.sum().backward()
    assert x.grad is not None
    weight.requires_grad_()
    F.rms_norm(x.detach(), weight, eps=EPSILON).sum().backward()
    assert weight.grad is not None
    gate, up = drawn((5,), (5,))
    F.swiglu(gate, up.requires_grad_()).sum().backward()
    assert up.grad is not None


def test_nothing_of_no_rows():
    weight = torch.ones(4, requires_grad=True)
    y = F.rms_norm(torch.ones(0, 4, requires_grad=True), weight, eps=EPSILON)
    y.sum().backward()
    assert y.shape == (0, 4)
    assert weight.grad.tolist() == [0.0] * 4
    assert F.swiglu(torch.ones(0, 3), torch.ones(0, 3)).shape == (0, 3)
    assert F.rotary_embedding(torch.ones(2, 3, 0, 4), *[torch.ones(1, 0, 4)] * 2).shape == (2, 3, 0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fallback_does_the_same(dtype):
    x, weight, g, up = drawn((6, 48), (48,), (6, 48), (6, 48), dtype=dtype)
    q, gq = drawn((2, 5, 3, 8), (2, 5, 3, 8), dtype=dtype)
    cos, sin = angles(1, 5, 8)
    eps = torch.tensor([EPSILON])
    _, rstd = fallback.rms_norm(x, weight, eps)
    calls = {
        "rms_norm": (x, weight, eps),
        "rms_norm_backward": (g, x, weight, rstd, True, True),
        "swiglu": (x, up),
        "swiglu_backward": (g, x, up),
        "rotate": (q, cos, sin, False),
    }
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for name, arguments in calls.items():
        torch.testing.assert_close(
            getattr(torch.ops.fastrlhf, name)(*arguments), getattr(fallback, name)(*arguments), **close
        )
    back = torch.ops.fastrlhf.rotate(gq, cos, sin, True)
    torch.testing.assert_close(back, fallback.rotate(gq, cos, sin, True), **close)


def test_bad_input():
    x, weight = torch.ones(2, 3), torch.ones(3)
    for arguments, message in (
        ((x, torch.ones(4)), r"weight: got shape \(4,\), wanted \(3,\)"),
        ((x, weight.bfloat16()), "weight: got dtype bfloat16, wanted float32"),
        ((x.double(), weight.double()), "x: got dtype float64"),
        ((torch.ones(()), weight), r"x: got shape \(\), wanted \[\.\.\., H\]"),
        (([1.0], weight), "x: got list, wanted a torch.Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            F.rms_norm(*arguments)
    with pytest.raises(ValueError, match=r"eps: got -1\.0, wanted a finite number > 0"):
        F.rms_norm(x, weight, eps=-1.0)
    with pytest.raises(ValueError, match="up: got dtype bfloat16, wanted float32"):
        F.swiglu(x, x.bfloat16())
    with pytest.raises(ValueError, match=r"up: got shape \(3,\), wanted \(2, 3\)"):
        F.swiglu(x, weight)
    q, angle = torch.ones(2, 3, 5, 4), torch.ones(2, 5, 4)
    for arguments, message in (
        ((q[..., :3], angle, angle), r"x: got shape \(2, 3, 5, 3\), wanted .* d even"),
        ((q[0], angle, angle), "x: got shape .* wanted 4 dimensions"),
        ((q, angle[:, :4], angle), r"cos: got shape \(2, 4, 4\), wanted \(2, 5, 4\) or \(1, 5, 4\)"),
        ((q, angle, angle[:1]), r"sin: got shape \(1, 5, 4\), wanted \(2, 5, 4\), the shape of cos"),
    ):
        with pytest.raises(ValueError, match=message):
            F.rotary_embedding(*arguments)


def test_it_compiles_and_is_differentiated_once():
    x, weight = drawn((3, 40), (40,))
    leaf = x.clone().requires_grad_()
    y = F.rms_norm(leaf, weight, eps=EPSILON)
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()
    for name, arguments in (
        ("rms_norm", (leaf, weight, torch.tensor([EPSILON]))),
        ("swiglu", (leaf, leaf.detach().clone().requires_grad_())),
        ("rotate", (torch.randn(1, 5, 2, 4, requires_grad=True), *angles(1, 5, 4), False)),
    ):
        torch.library.opcheck(getattr(torch.ops.fastrlhf, name).default, arguments)
