"""pairwise_reward_loss and dpo_loss: numbers by hand, the oracle, and what pairs far apart do to them."""

import math

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, random_tokenwise

from fastrlhf import functional as F
from fastrlhf import reference

VARIANTS = ("sigmoid", "robust", "hinge", "ipo")
ops = torch.ops.fastrlhf


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def run(function, pair, constants, options, dtype):
    pair = [x.to(dtype).clone().requires_grad_() for x in pair]
    loss, stats = function(*pair, *(x.to(dtype) for x in constants), **options)
    return loss.detach(), torch.as_tensor(list(stats)), *torch.autograd.grad(loss, pair)


def compare(name, pair, constants, options):
    function, oracle = getattr(F, name), getattr(reference, name)
    ours, eager = (run(f, pair, constants, options, torch.float32) for f in (function, oracle))
    exact = run(oracle, pair, constants, options, torch.float64)
    for a, b, c, part in zip(ours, eager, exact, ("loss", "stats", "chosen", "rejected"), strict=True):
        assert_as_good_as_eager(a, b, c, 4 * EPS * max(1.0, c.abs().max().item() if c.numel() else 0.0), part)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center_coef", [0.0, 0.01])
@pytest.mark.parametrize("pairs", [0, 1, 101])
def test_pairwise_reward_loss_against_the_oracle(margin, center_coef, pairs):
    chosen, rejected, margins, _ = random_tokenwise(3, pairs)
    options = {"center_coef": center_coef}

    def with_margin(function):
        return lambda c, r, m, **kw: function(c, r, margin=m, **kw)

    if not margin:
        return compare("pairwise_reward_loss", (chosen, rejected), (), options)
    ours, eager, exact = (
        run(with_margin(f), (chosen, rejected), (margins.abs(),), options, dtype)
        for f, dtype in (
            (F.pairwise_reward_loss, torch.float32),
            (reference.pairwise_reward_loss, torch.float32),
            (reference.pairwise_reward_loss, torch.float64),
        )
    )
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_as_good_as_eager(a, b, c, 4 * EPS)


def test_pairwise_reward_loss_by_hand():
    chosen = torch.tensor([2.0, 0.0, 1.0], requires_grad=True)
    loss, stats = F.pairwise_reward_loss(chosen, torch.tensor([0.0, 1.0, 1.0]))
    loss.backward()
    expected = -(math.log(sigmoid(2)) + math.log(sigmoid(-1)) + math.log(0.5)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(chosen.grad, -torch.tensor([sigmoid(-2), sigmoid(1), 0.5]) / 3)
    assert stats.accuracy.item() == 0.5
    assert stats.difference.item() == pytest.approx(1 / 3)


def test_pairwise_reward_loss_far_out():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss, _ = F.pairwise_reward_loss(chosen, torch.zeros(2))
    loss.backward()
    assert loss.item() == 5000.0
    assert chosen.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize(
    ("variant", "label_smoothing"),
    [(v, 0.0) for v in VARIANTS] + [(v, e) for v in ("sigmoid", "robust") for e in (0.1, 0.4)],
)
@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("pairs", [0, 1, 101])
def test_dpo_loss_against_the_oracle(variant, label_smoothing, beta, pairs):
    *tensors, _ = random_tokenwise(4, pairs)
    options = {"variant": variant, "beta": beta, "label_smoothing": label_smoothing}
    compare("dpo_loss", [10 * x for x in tensors[:2]], [10 * x for x in tensors[2:]], options)


def test_dpo_loss_by_hand():
    """h = 2 and -1, beta 0.5."""
    chosen = torch.tensor([-1.0, -3.0], requires_grad=True)
    rejected = torch.tensor([-4.0, -2.0], requires_grad=True)
    reference_pair = (torch.tensor([-2.0, -2.0]), torch.tensor([-3.0, -2.0]))
    x = torch.tensor([1.0, -0.5])  # beta h
    up = torch.tensor([sigmoid(-1.0), sigmoid(0.5)])
    log = torch.tensor([math.log(sigmoid(1.0)), math.log(sigmoid(-0.5))])
    other = torch.tensor([math.log(sigmoid(-1.0)), math.log(sigmoid(0.5))])
    for variant, smoothing, losses, slopes in (
        ("sigmoid", 0.0, -log, -0.5 * up),
        ("sigmoid", 0.2, -0.8 * log - 0.2 * other, 0.5 * (0.2 * (1 - up) - 0.8 * up)),
        ("robust", 0.2, (-0.8 * log + 0.2 * other) / 0.6, -0.5 * (0.8 * up + 0.2 * (1 - up)) / 0.6),
        ("hinge", 0.0, 1 - x, torch.tensor([0.0, -0.5])),
        ("ipo", 0.0, (2 * x - 1) ** 2, 2 * (2 * x - 1)),
    ):
        options = {"beta": 0.5, "variant": variant, "label_smoothing": smoothing}
        loss, stats = F.dpo_loss(chosen, rejected, *reference_pair, **options)
        grads = torch.autograd.grad(loss, (chosen, rejected))
        torch.testing.assert_close(loss.detach(), losses.mean())
        torch.testing.assert_close(grads, (slopes / 2, -slopes / 2))
        assert stats.accuracy == 0.5
        torch.testing.assert_close(stats.margin, x.mean())
        torch.testing.assert_close(stats.chosen_reward, torch.tensor(0.0))
        torch.testing.assert_close(stats.rejected_reward, torch.tensor(-0.25))


def test_dpo_loss_far_out():
    chosen = torch.tensor([1e5, -1e5], requires_grad=True)
    zeros = torch.zeros(2)
    for variant, loss_at, slopes in (("sigmoid", 5000.0, [0.0, -0.1]), ("hinge", 5000.5, [0.0, -0.1])):
        loss, _ = F.dpo_loss(chosen, zeros, zeros, zeros, variant=variant)
        (grad,) = torch.autograd.grad(loss, chosen)
        assert loss.item() == pytest.approx(loss_at)
        torch.testing.assert_close(2 * grad, torch.tensor(slopes))


def test_equal_policies_lose_log_2():
    x = -10 * torch.rand(7)
    loss, stats = F.dpo_loss(x, x - 1, x, x - 1)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert stats.accuracy == 0.5
    assert stats.margin == 0.0


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_shows(variant, position):
    tensors = [torch.zeros(3) for _ in range(4)]
    tensors[position][1] = math.nan
    leaf = tensors[0].clone().requires_grad_()
    for function in (F.dpo_loss, reference.dpo_loss):
        loss, _ = function(leaf, *tensors[1:], variant=variant)
        assert loss.isnan()
    (grad,) = torch.autograd.grad(F.dpo_loss(leaf, *tensors[1:], variant=variant)[0], leaf)
    assert grad.isnan().tolist() == [False, True, False]
    if position < 2:
        assert F.pairwise_reward_loss(*tensors[:2])[0].isnan()
        assert F.pairwise_reward_loss(*tensors[:2], margin=torch.zeros(3))[0].isnan()


def test_inf_minus_inf_is_not_hidden():
    inf = torch.tensor([math.inf])
    assert F.pairwise_reward_loss(inf, inf)[0].isnan()


@pytest.mark.parametrize("function", [F.pairwise_reward_loss, lambda c, r: F.dpo_loss(c, r, c.detach(), r)])
def test_no_pairs(function):
    chosen = torch.zeros(0, requires_grad=True)
    loss, stats = function(chosen, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert not torch.stack(list(stats)).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: F.pairwise_reward_loss(x, x), r"chosen: got shape \(3, 4\), wanted 1 dimension"),
        (lambda x: F.pairwise_reward_loss(x[0], x[1], margin=x[:1, 0]), r"margin: got shape \(1,\), wanted \(4,\)"),
        (lambda x: F.pairwise_reward_loss(x[0], x[1], center_coef=-1), "center_coef: got -1"),
        (lambda x: F.dpo_loss(x, x, x, x), r"policy_chosen: got shape \(3, 4\), wanted 1 dimension"),
        (lambda x: F.dpo_loss(x[0], x[0], x[0, :1], x[0]), r"ref_chosen: got shape \(1,\), wanted \(4,\)"),
        (lambda x: F.dpo_loss(*x[[0] * 4], beta=0), "beta: got 0"),
        (lambda x: F.dpo_loss(*x[[0] * 4], variant="kto"), "variant: got 'kto', wanted one of 'sigmoid', 'robust'"),
        (lambda x: F.dpo_loss(*x[[0] * 4], label_smoothing=0.5), "label_smoothing: got 0.5"),
        (lambda x: F.dpo_loss(*x[[0] * 4], variant="ipo", label_smoothing=0.1), "label_smoothing: got 0.1, wanted 0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 4))


def test_opcheck_and_compile():
    *tensors, _ = random_tokenwise(4, 5)
    pair = [x.clone().requires_grad_() for x in tensors[:2]]
    opcheck = torch.library.opcheck
    opcheck(ops.pairwise_reward_loss.default, (*pair, tensors[2], torch.tensor([0.01]), True))
    for variant in range(4):
        numbers = torch.tensor([0.1, 0.2 if variant < 2 else 0.0])
        opcheck(ops.dpo_loss.default, (*pair, *tensors[2:], numbers, variant, True))
    opcheck(ops.dpo_loss.default, (*tensors, torch.tensor([0.1, 0.0]), 0, False))

    def step(chosen, rejected):
        pairwise, _ = F.pairwise_reward_loss(chosen * 1.5, rejected, center_coef=0.01)
        return pairwise + F.dpo_loss(chosen, rejected, *tensors[2:], label_smoothing=0.1)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = [f(*pair) for f in (step, compiled)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, pair) for loss in losses))
