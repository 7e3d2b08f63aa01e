"""token_log_probs and token_log_probs_and_entropy: numbers, masks, odd shapes, adversarial floats."""

import math

import pytest
import torch
from oracle import (
    EPS,
    MIXED_SHAPES,
    assert_as_good_as_eager,
    peak_allocation,
    poison,
    random_logits,
    same_bits,
)

from fastrlhf import functional as F
from fastrlhf import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradients(function, logits, tokens, temperature, g, h):
    logits = logits.detach().clone().requires_grad_()
    log_probs, entropy = function(logits, tokens, temperature=temperature)
    (grad,) = torch.autograd.grad((log_probs * g + entropy * h).sum(), logits)
    return log_probs.detach(), entropy.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MIXED_SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_against_the_oracle(dtype, shape, temperature):
    logits, tokens = random_logits(*shape, dtype=dtype)
    tokens.view(-1)[-1] = -100
    g, h = torch.randn(tokens.shape), torch.randn(tokens.shape)
    ours = gradients(F.token_log_probs_and_entropy, logits, tokens, temperature, g, h)
    eager = gradients(reference.token_log_probs_and_entropy, logits, tokens, temperature, g, h)
    exact = gradients(reference.token_log_probs_and_entropy, logits.double(), tokens, temperature, g, h)
    # log-probs and entropies are around 10 to 30 in size: half an ulp of that. Gradients: the rounding of log s, around
    # 10, and of its product with log2(e) (1e-6), times p, and the rounding of the dtype they come in.
    assert_as_good_as_eager(ours[0], eager[0], exact[0], 32 * EPS, "log_probs")
    assert_as_good_as_eager(ours[1], eager[1], exact[1], 32 * EPS, "entropy")
    slack = 8 * EPS * (g.abs().max() + 12 * h.abs().max()).item() / temperature
    assert_as_good_as_eager(ours[2], eager[2], exact[2], slack, "gradient")
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert ours[2].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_entropy_it_is_the_same(dtype):
    logits, tokens = random_logits(6, 3001, dtype=dtype)
    logits.requires_grad_()
    alone = F.token_log_probs(logits, tokens, temperature=0.9)
    both, _ = F.token_log_probs_and_entropy(logits, tokens, temperature=0.9)
    assert same_bits(alone.detach(), both.detach())
    g = torch.randn(6)
    assert torch.equal(*(torch.autograd.grad(x, logits, g)[0] for x in (alone, both)))


def test_numbers_computed_by_hand():
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]])).requires_grad_()
    log_probs, entropy = F.token_log_probs_and_entropy(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(log_probs, torch.tensor([math.log(2 / 8), math.log(1 / 2)]))
    torch.testing.assert_close(entropy[1].item(), 1.5 * math.log(2), rtol=1e-6, atol=0)
    log_probs.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.125, 0.75, -0.625], [-0.25, -0.25, 0.5]]))


def test_temperature_divides_the_logits():
    logits, tokens = random_logits(4, 100)
    hot = F.token_log_probs_and_entropy(logits, tokens, temperature=2.0)
    halved = F.token_log_probs_and_entropy(logits / 2, tokens)
    torch.testing.assert_close(hot, halved)


@pytest.mark.parametrize("shift", [-1e4, 1e3, 1e5])
def test_shifting_all_logits_changes_nothing(shift):
    logits, tokens = random_logits(8, 5003)
    logits = (logits * 16).round() / 16  # stays exact under the shift
    g, h = torch.randn(8), torch.randn(8)
    plain = gradients(F.token_log_probs_and_entropy, logits, tokens, 1.0, g, h)
    shifted = gradients(F.token_log_probs_and_entropy, logits + shift, tokens, 1.0, g, h)
    for a, b in zip(plain, shifted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_row_sum_to_zero():
    logits, tokens = random_logits(8, 5003)
    *_, grad = gradients(F.token_log_probs_and_entropy, logits, tokens, 0.8, torch.randn(8), torch.randn(8))
    assert grad.double().sum(-1).abs().max() < 1e-5


def test_one_token_in_the_vocabulary():
    logits = torch.full((2, 1), 7.5, requires_grad=True)
    log_probs, entropy = F.token_log_probs_and_entropy(logits, torch.tensor([0, 0]))
    (log_probs + entropy).sum().backward()
    assert log_probs.tolist() == entropy.tolist() == [0.0, 0.0]
    assert logits.grad.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)])
def test_no_rows(shape):
    logits = torch.zeros(shape, requires_grad=True)
    log_probs, entropy = F.token_log_probs_and_entropy(logits, torch.zeros(shape[:-1], dtype=torch.int64))
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == shape[:-1]
    assert logits.grad.shape == shape


def test_one_row_without_leading_dimensions():
    logits, _ = random_logits(11)
    result = F.token_log_probs(logits, torch.tensor(3))
    assert result.shape == ()
    torch.testing.assert_close(result, torch.log_softmax(logits, -1)[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_are_read_in_place(dtype):
    whole, _ = random_logits(4, 6, 257, dtype=dtype)
    for view in (whole[:, :-1], whole[1::2], whole.transpose(0, 1), whole[..., 3:200], whole[:1].expand(3, 6, 257)):
        tokens = torch.randint(0, view.shape[-1], view.shape[:-1])
        g, h = torch.randn(tokens.shape), torch.randn(tokens.shape)
        strided = F.token_log_probs_and_entropy(view, tokens)
        packed = F.token_log_probs_and_entropy(view.contiguous(), tokens)
        assert all(same_bits(a, b) for a, b in zip(strided, packed, strict=True))
        leaf = view.detach().requires_grad_()
        a, b = F.token_log_probs_and_entropy(leaf, tokens)
        (grad,) = torch.autograd.grad((a * g + b * h).sum(), leaf)
        *_, expected = gradients(F.token_log_probs_and_entropy, view.contiguous(), tokens, 1.0, g, h)
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_change_no_bit(dtype):
    logits, tokens = random_logits(9, 1023, dtype=dtype)
    counts = torch.arange(9) % 3 != 0
    tokens = torch.where(counts, tokens, -100)
    g, h = torch.randn(9), torch.randn(9)
    clean = gradients(F.token_log_probs_and_entropy, logits, tokens, 1.0, g, h)
    dirty_logits = poison(logits, counts.unsqueeze(-1).expand_as(logits))
    dirty = gradients(F.token_log_probs_and_entropy, dirty_logits, tokens, 1.0, g, h)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    for result in dirty:
        assert not result[~counts].any()


def test_everything_ignored_gives_zeros():
    logits = torch.full((3, 17), float("nan"), requires_grad=True)
    log_probs, entropy = F.token_log_probs_and_entropy(logits, torch.full((3,), -100))
    (log_probs.sum() + entropy.sum()).backward()
    assert not log_probs.any()
    assert not entropy.any()
    assert not logits.grad.any()


def test_a_row_with_no_incoming_gradient_gets_exact_zeros():
    logits = torch.tensor([[float("nan"), 1.0], [0.0, 1.0]], requires_grad=True)
    F.token_log_probs(logits, torch.tensor([0, 1]))[1].backward()
    assert logits.grad[0].tolist() == [0.0, 0.0]


def test_forbidden_tokens_have_probability_zero():
    """-inf logits (a filtered vocabulary): 0 log 0 = 0 in the entropy, no nan in any gradient."""
    logits, tokens = random_logits(5, 3000)
    allowed = torch.rand(5, 3000) > 0.5
    allowed.scatter_(1, tokens[:, None], True)
    logits = torch.where(allowed, logits, float("-inf"))
    logits[0, :2500] = float("-inf")  # a whole block of them
    tokens[0] = 2900
    logits[0, 2900] = 0.0
    g, h = torch.randn(5), torch.randn(5)
    ours = gradients(F.token_log_probs_and_entropy, logits, tokens, 1.0, g, h)
    exact = gradients(reference.token_log_probs_and_entropy, logits.double(), tokens, 1.0, g, h)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert not ours[2][logits == float("-inf")].any()


def test_a_forbidden_token_was_asked_for():
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    log_probs, entropy = F.token_log_probs_and_entropy(logits, torch.tensor([1]))
    assert log_probs.item() == -math.inf
    assert math.isfinite(entropy.item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 5, 2500, 4999])
def test_nan_and_inf_are_not_hidden(bad, position):
    logits, tokens = random_logits(2, 5000)
    logits[0, position] = bad
    log_probs, entropy = F.token_log_probs_and_entropy(logits, tokens)
    assert log_probs.isnan().tolist() == entropy.isnan().tolist() == [True, False]


def test_nothing_is_possible():
    log_probs = F.token_log_probs(torch.full((1, 9), float("-inf")), torch.tensor([0]))
    assert log_probs.isnan().all()  # as torch.log_softmax


@pytest.mark.parametrize("size", [1e30, -1e30, 3e38, -3e38])
def test_huge_logits(size):
    logits = torch.zeros(1, 3000)
    logits[0, 2700] = size
    log_probs, entropy = F.token_log_probs_and_entropy(logits, torch.tensor([2700]))
    assert log_probs.item() == (0.0 if size > 0 else pytest.approx(size))
    assert entropy.item() == pytest.approx(0.0 if size > 0 else math.log(2999), rel=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_inplace_backward_gives_the_same_gradient(inplace, entropy):
    leaf, tokens = random_logits(4, 6, 515)
    leaf.requires_grad_()
    logits = (leaf * 1.0)[:, :-1]
    before = logits.detach().clone()
    if entropy:
        results = F.token_log_probs_and_entropy(logits, tokens[:, :-1], inplace_backward=inplace)
    else:
        results = (F.token_log_probs(logits, tokens[:, :-1], inplace_backward=inplace),)
    total = sum((x * x).sum() for x in results)
    (grad,) = torch.autograd.grad(total, logits)
    assert (grad.data_ptr() == logits.data_ptr()) == inplace
    assert torch.equal(logits.detach(), before) == (not inplace)
    again = before.requires_grad_()
    a, b = F.token_log_probs_and_entropy(again, tokens[:, :-1])
    (expected,) = torch.autograd.grad((a * a).sum() + (b * b).sum() * entropy, again)
    assert torch.equal(grad, expected)


def test_inplace_backward_twice_is_an_error():
    leaf, tokens = random_logits(4, 5)
    logits = leaf.requires_grad_() * 1.0
    log_probs = F.token_log_probs(logits, tokens, inplace_backward=True).sum()
    log_probs.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.backward()


def test_only_one_of_the_two_results_is_used():
    logits, tokens = random_logits(4, 700)
    zero, one = torch.zeros(4), torch.ones(4)
    for index in (0, 1):
        leaf = logits.clone().requires_grad_()
        F.token_log_probs_and_entropy(leaf, tokens)[index].sum().backward()
        weights = (one, zero) if index == 0 else (zero, one)
        *_, expected = gradients(F.token_log_probs_and_entropy, logits, tokens, 1.0, *weights)
        assert torch.equal(leaf.grad, expected)


def test_no_graph_where_nobody_asks_for_gradients():
    logits, tokens = random_logits(4, 5)
    assert not F.token_log_probs(logits, tokens).requires_grad
    with torch.no_grad():
        assert not F.token_log_probs(logits.requires_grad_(), tokens).requires_grad


def test_forward_allocates_nothing_of_the_vocabularys_size():
    """An 80 GB spike to log entropy (TRL #4013)."""
    logits, tokens = random_logits(64, 8192)
    assert peak_allocation(lambda: F.token_log_probs_and_entropy(logits, tokens)) == 4 * 64 * 4  # its three results
    assert peak_allocation(lambda: reference.token_log_probs_and_entropy(logits, tokens)) >= 64 * 8192 * 4


def test_a_slice_is_not_copied():
    """64-bit strides instead of .contiguous(), forward and backward."""
    whole, tokens = random_logits(8, 33, 4096)
    logits, tokens = whole[:, :-1].detach().requires_grad_(), tokens[:, :-1]
    g, rows = torch.randn(8, 32), 8 * 32 * 4
    assert peak_allocation(lambda: F.token_log_probs_and_entropy(logits, tokens)) <= 5 * rows
    log_probs = F.token_log_probs(logits, tokens)
    gradient = logits.numel() * 4  # which is due; a copy beside it would be as much again
    allocated = peak_allocation(lambda: torch.autograd.grad(log_probs, logits, g))
    assert gradient <= allocated <= gradient + 5 * rows


@pytest.mark.parametrize("entropy", [False, True])
def test_inplace_backward_allocates_nothing_of_the_vocabularys_size(entropy):
    leaf, tokens = random_logits(64, 8192)
    logits = leaf.requires_grad_() * 1.0
    function = F.token_log_probs_and_entropy if entropy else F.token_log_probs
    results = function(logits, tokens, inplace_backward=True)
    g = torch.randn(64)
    grads = (g, g) if entropy else g
    assert peak_allocation(lambda: torch.autograd.grad(results, logits, grads)) < 64 * 8192


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("shift", [-1e4, 1e2, 1e3, 1e5])
def test_gradients_of_large_logits_are_as_precise_as_eagers(shift, entropy):
    """One stored number, a logsumexp of 1e5, would know two digits after the point."""
    logits, tokens = random_logits(8, 5003)
    logits = logits + shift
    g, h = torch.randn(8), torch.randn(8) * entropy
    ours = gradients(F.token_log_probs_and_entropy, logits, tokens, 1.0, g, h)
    eager = gradients(reference.token_log_probs_and_entropy, logits, tokens, 1.0, g, h)
    exact = gradients(reference.token_log_probs_and_entropy, logits.double(), tokens, 1.0, g, h)
    slack = 8 * EPS * (g.abs().max() + 12 * h.abs().max()).item()
    assert_as_good_as_eager(ours[2], eager[2], exact[2], slack, "gradient")
