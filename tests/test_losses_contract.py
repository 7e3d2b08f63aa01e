"""The losses' manners: masks, adversarial floats, argument errors, determinism, torch.library and compile."""

import math

import pytest
import torch
from oracle import poison, random_tokenwise, same_bits

from fastrlhf import functional as F
from fastrlhf import reference

ops = torch.ops.fastrlhf
ALL_ON = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0, "entropy_coef": 0.1, "kl_coef": 0.2}


def everything(shape=(4, 29), seed=0):
    log_probs, old, advantages, weights, entropy, ref, mask = random_tokenwise(6, *shape, seed=seed)
    return [log_probs, old, advantages], mask, {"weights": weights, "entropy": entropy, "ref_log_probs": ref}


def ppo(arguments, mask, tensors, **options):
    log_probs = arguments[0].clone().requires_grad_()
    entropy = tensors["entropy"].clone().requires_grad_()
    loss, stats = F.ppo_loss(log_probs, *arguments[1:], mask, **(tensors | {"entropy": entropy}), **(ALL_ON | options))
    return loss.detach(), torch.stack(list(stats)), *torch.autograd.grad(loss, (log_probs, entropy))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_what_stands_under_the_mask_changes_no_bit(aggregation, ratio_level):
    arguments, mask, tensors = everything()
    options = {"aggregation": aggregation, "ratio_level": ratio_level, "advantage_stats": torch.tensor([0.3, 2.0])}
    clean = ppo(arguments, mask, tensors, **options)
    dirty = ppo([poison(x, mask) for x in arguments], mask, {k: poison(x, mask) for k, x in tensors.items()}, **options)
    assert all(same_bits(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not clean[2][~mask].any()
    assert not clean[3][~mask].any()


def test_value_loss_under_the_mask():
    values, old, returns, mask = random_tokenwise(3, 4, 29)
    results = []
    for clean in (True, False):
        v, o, r = (x if clean else poison(x, mask) for x in (values, old, returns))
        leaf = v.clone().requires_grad_()
        loss, stats = F.value_loss(leaf, o, r, mask, clip=0.2)
        results.append((loss.detach(), torch.stack(list(stats)), *torch.autograd.grad(loss, leaf)))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("shape", [(3, 7), (0, 7), (3, 0)])
def test_nothing_counts(aggregation, shape):
    nan = torch.full(shape, float("nan"))
    mask = torch.zeros(shape, dtype=torch.bool)
    for ratio_level in ("token", "sequence"):
        results = ppo(
            [nan, nan, nan],
            mask,
            dict.fromkeys(("weights", "entropy", "ref_log_probs"), nan),
            aggregation=aggregation,
            ratio_level=ratio_level,
        )
        assert not any(x.any() for x in results)
    leaf = nan.clone().requires_grad_()
    loss, stats = F.value_loss(leaf, nan, nan, mask, clip=0.2, aggregation=aggregation)
    loss.backward()
    assert not loss.any()
    assert not torch.stack(list(stats)).any()
    assert not leaf.grad.any()


def test_impossible_tokens_and_overflowing_ratios():
    """+-inf log-probs meet the clamp; the gradient there is 0, and nothing turns into nan."""
    inf = math.inf
    log_probs = torch.tensor([[-inf, -1.0, 200.0, -200.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -inf, 0.0, 0.0]])
    loss, stats = F.ppo_loss(log_probs, old, torch.tensor([[1.0, -1.0, -1.0, 1.0]]), torch.ones(1, 4))
    loss.backward()
    assert loss.isfinite()
    assert log_probs.grad.tolist() == [[0.0] * 4]
    assert stats.ratio_max.item() == pytest.approx(math.exp(20), rel=1e-6)
    assert stats.ratio_min.item() == pytest.approx(math.exp(-20), rel=1e-6)


def test_an_unclamped_ratio_may_overflow_and_says_so():
    loss, _ = F.ppo_loss(
        torch.tensor([[100.0]]), torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1), log_ratio_clamp=None
    )
    assert loss.item() == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_a_token_that_counts_is_not_hidden(bad):
    """inf - inf too: a token impossible under both policies has no ratio."""
    x = torch.zeros(1, 3)
    broken = x.clone()
    broken[0, 1] = bad
    loss, _ = F.ppo_loss(broken, broken.clone(), x + 1, torch.ones(1, 3))
    assert loss.isnan()
    assert F.value_loss(broken, None, broken.clone(), torch.ones(1, 3))[0].isnan()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_a_coefficient_of_zero_only_monitors(estimator):
    """An infinite distance to the reference, or entropy, is reported; 0 * inf in the loss would be a nan."""
    arguments, mask, _ = everything()
    mask[0, :3] = True
    far, entropy = arguments[0].clone(), torch.ones_like(arguments[0])
    far[0, 0], far[0, 1], entropy[0, 2] = -math.inf, math.nan, math.inf
    results = []
    for tensors in ({}, {"ref_log_probs": far, "entropy": entropy, "kl_estimator": estimator}):
        leaf = arguments[0].clone().requires_grad_()
        loss, stats = F.ppo_loss(leaf, *arguments[1:], mask, **tensors)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert stats.kl.isnan()
    assert stats.entropy == math.inf
    loss, _ = reference.ppo_loss(*arguments, mask, **tensors)
    torch.testing.assert_close(loss, results[0][0])


def test_nan_shows_in_the_ratios():
    nan, zeros, ones = math.nan, torch.zeros(1, 40), torch.ones(1, 40)
    for bad in ([3], [0], [39], range(40)):
        log_probs = zeros.clone()
        log_probs[0, list(bad)] = nan
        leaf = log_probs.clone().requires_grad_()
        loss, stats = F.ppo_loss(leaf, zeros, ones, ones)
        loss.backward()
        assert all(x.isnan() for x in (loss, stats.ratio_min, stats.ratio_mean, stats.ratio_max))
        assert torch.equal(leaf.grad.isnan(), log_probs.isnan())


def test_nan_in_an_old_value_shows_where_it_clips():
    values, returns = torch.zeros(1, 40, requires_grad=True), torch.ones(1, 40)
    for position in (0, 5, 39):
        old = torch.zeros(1, 40)
        old[0, position] = math.nan
        loss, _ = F.value_loss(values, old, returns, torch.ones(1, 40), clip=0.2)
        assert loss.isnan()
        assert reference.value_loss(values, old, returns, torch.ones(1, 40), clip=0.2)[0].isnan()
        (grad,) = torch.autograd.grad(loss, values)
        assert torch.equal(grad.isnan(), old.isnan())
        assert F.value_loss(values, old, returns, torch.ones(1, 40))[0] == 0.5  # without clip nobody reads it


@pytest.mark.parametrize("far", [math.inf, -math.inf])
def test_an_infinite_log_ratio_has_an_infinite_kl(far):
    arguments = [torch.tensor([[far, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2)]
    assert F.ppo_loss(*arguments, log_ratio_clamp=None)[1].approx_kl == math.inf
    assert reference.ppo_loss(*arguments, log_ratio_clamp=None)[1][1] == math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_does_not_matter(dtype):
    arguments, mask, tensors = everything()
    expected = ppo(arguments, mask, tensors, denominator=7)
    torch.set_default_dtype(dtype)
    try:
        results = ppo(arguments, mask, tensors, denominator=7)
        F.value_loss(arguments[0], None, arguments[1], mask, denominator=7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_bits(a, b) for a, b in zip(expected, results, strict=True))


ONES = torch.ones(3, 4)
TOKENS = torch.zeros(3, dtype=torch.int64)
DIFFERENTIABLE = {
    "ppo_loss": lambda x: F.ppo_loss(x, ONES, ONES, ONES)[0],
    "ppo_loss, entropy": lambda x: F.ppo_loss(ONES, ONES, ONES, ONES, entropy=x, entropy_coef=0.1)[0],
    "value_loss": lambda x: F.value_loss(x, None, ONES, ONES)[0],
    "pairwise_reward_loss": lambda x: F.pairwise_reward_loss(x[0], ONES[0])[0],
    "dpo_loss": lambda x: F.dpo_loss(x[0], x[1], ONES[0], ONES[1])[0],
    "kl_divergence": lambda x: F.kl_divergence(x, ONES, estimator="k3"),
    "kl_divergence, reference": lambda x: F.kl_divergence(ONES, x, estimator="k2"),
    "masked_whiten": lambda x: F.masked_whiten(x, ONES).pow(2),
    "token_log_probs": lambda x: F.token_log_probs(x, TOKENS),
    "token_log_probs, in place": lambda x: F.token_log_probs(x * 1, TOKENS, inplace_backward=True),
    "token_log_probs_and_entropy": lambda x: F.token_log_probs_and_entropy(x, TOKENS)[1],
    "token_log_probs_and_entropy, in place": lambda x: F.token_log_probs_and_entropy(
        x * 1, TOKENS, inplace_backward=True
    )[1],
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_double_backward_is_refused(name):
    x = torch.randn(3, 4, requires_grad=True)
    plain, (grad,) = (torch.autograd.grad(DIFFERENTIABLE[name](x).sum(), x, create_graph=c) for c in (False, True))
    assert torch.equal(plain[0], grad)
    for penalty in (grad.pow(2).sum(), (grad * x).sum()):
        with pytest.raises(NotImplementedError, match="double backward is not implemented"):
            penalty.backward(retain_graph=True)


def test_a_mean_can_be_differentiated_twice():
    """It is linear, so its backward pass needs nothing of x."""
    assert torch.autograd.gradgradcheck(
        lambda x: F.masked_mean(x.float(), ONES, 1).double() ** 2,
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        eps=1e-2,
        atol=1e-3,
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(name):
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match="got a tangent, wanted none: forward-mode AD is not implemented"):
        torch.func.jvp(DIFFERENTIABLE[name], (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="got a tangent"):
        DIFFERENTIABLE[name](torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_a_batch_in_bf16_is_computed_in_fp32():
    arguments, mask, _ = everything()
    low = [x.bfloat16() for x in arguments]
    leaf = low[0].clone().requires_grad_()
    loss, _ = F.ppo_loss(leaf, *low[1:], mask)
    loss.backward()
    expected, _ = F.ppo_loss(*(x.float() for x in low), mask)
    assert loss.dtype == torch.float32
    assert loss == expected
    assert leaf.grad.dtype == torch.bfloat16


def test_token_losses_take_any_one_shape():
    arguments, mask, _ = everything()
    flat, _ = F.ppo_loss(*(x.reshape(-1) for x in arguments), mask.reshape(-1))
    assert flat == F.ppo_loss(*arguments, mask)[0]
    transposed, _ = F.ppo_loss(*(x.T for x in arguments), mask.T)
    torch.testing.assert_close(transposed, flat)


def test_the_number_of_threads_changes_no_bit():
    arguments, mask, tensors = everything((3, 20_000))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ppo(arguments, mask, tensors))
    torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_sequence_does_not_depend_on_its_batch():
    arguments, mask, tensors = everything((5, 333))
    options = {"aggregation": "seq-mean-token-sum", "denominator": 1.0}
    _, _, batch, _ = ppo(arguments, mask, tensors, **options)
    alone = ppo([x[2:3] for x in arguments], mask[2:3], {k: x[2:3] for k, x in tensors.items()}, **options)
    assert same_bits(batch[2:3], alone[2])


def test_gradients_nobody_needs_are_not_computed():
    arguments, mask, tensors = everything()
    raw = raw_ppo(arguments, mask, tensors, needs_grad=False)
    assert raw[2].numel() == raw[3].numel() == 0
    assert not F.ppo_loss(*arguments, mask)[0].requires_grad
    with torch.no_grad():
        assert not F.ppo_loss(arguments[0].requires_grad_(), *arguments[1:], mask)[0].requires_grad


def test_stats_carry_no_gradient():
    arguments, mask, _ = everything()
    loss, stats = F.ppo_loss(arguments[0].requires_grad_(), *arguments[1:], mask)
    assert loss.requires_grad
    assert not any(x.requires_grad for x in stats)
    assert all(x.shape == () for x in stats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(3)}, r"advantages: got shape \(3,\), wanted \(3, 4\), the shape of log_probs"),
        ({"old_log_probs": torch.zeros(3, 1)}, r"old_log_probs: got shape \(3, 1\), wanted \(3, 4\)"),
        ({"mask": torch.ones(1, 4)}, r"mask: got shape \(1, 4\)"),
        ({"mask": None}, "mask: got NoneType, wanted a torch.Tensor"),
        ({"advantages": torch.zeros(3, 4, dtype=torch.float64)}, "advantages: got dtype float64, wanted float32"),
        ({"advantages": torch.zeros(3, 4, device="meta")}, "advantages: got device meta, wanted cpu"),
        ({"aggregation": "mean"}, "aggregation: got 'mean', wanted one of 'token-mean', 'seq-mean-token-sum'"),
        ({"ratio_level": "word"}, "ratio_level: got 'word'"),
        ({"kl_estimator": "k4"}, "kl_estimator: got 'k4'"),
        ({"clip_low": -0.1}, "clip_low: got -0.1, wanted a finite number >= 0.0 and <= 1.0"),
        ({"clip_high": float("inf")}, "clip_high: got inf"),
        ({"dual_clip": 1.0}, "dual_clip: got 1.0, wanted a finite number > 1.0"),
        ({"log_ratio_clamp": 0}, "log_ratio_clamp: got 0"),
        ({"denominator": 0}, "denominator: got 0"),
        ({"denominator": [3]}, "denominator: got list, wanted a number"),
        ({"clip_low": (0.1,)}, "clip_low: got tuple, wanted a number"),
        ({"kl_coef": [0.1]}, "kl_coef: got list, wanted a number"),
        ({"kl_coef": float("nan")}, "kl_coef: got nan, wanted a finite number"),
        ({"denominator": torch.ones(2)}, r"denominator: got shape \(2,\), wanted one number"),
        ({"entropy_coef": 0.1}, "entropy: got None, wanted a tensor, because entropy_coef=0.1"),
        ({"kl_coef": 0.1}, "ref_log_probs: got None, wanted a tensor, because kl_coef=0.1"),
        ({"advantage_stats": torch.ones(3)}, r"advantage_stats: got shape \(3,\), wanted \(2,\)"),
        ({"weights": torch.ones(4)}, r"weights: got shape \(4,\)"),
    ],
)
def test_ppo_loss_names_wrong_arguments(change, message):
    names = ("log_probs", "old_log_probs", "advantages", "mask")
    with pytest.raises(ValueError, match=message):
        F.ppo_loss(**({name: torch.zeros(3, 4) for name in names} | change))


def test_sequences_are_needed_for_sequence_options():
    x = torch.zeros(6)
    for options in ({"aggregation": "seq-mean-token-sum"}, {"ratio_level": "sequence"}):
        with pytest.raises(ValueError, match=r"log_probs: got shape \(6,\), wanted \[B, T\], because"):
            F.ppo_loss(x, x, x, x, **options)


def test_value_loss_names_wrong_arguments():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"returns: got shape \(3,\), wanted \(3, 4\)"):
        F.value_loss(x, x, torch.zeros(3), x)
    with pytest.raises(ValueError, match=r"old_values: got None, wanted a tensor, because clip=0\.2"):
        F.value_loss(x, None, x, x, clip=0.2)


def raw_ppo(arguments, mask, tensors, needs_grad=True, call=ops.ppo_loss):
    options = (torch.tensor([0.2, 0.2, math.inf, 20.0, 0.1, 0.2]), 2, False, 0, needs_grad)
    stats, denominator = torch.tensor([0.1, 2.0]), torch.tensor(5.0)
    w, e, r = tensors["weights"], tensors["entropy"], tensors["ref_log_probs"]
    return call(*arguments, mask, w, stats, e, r, denominator, *options)


def test_opcheck():
    arguments, mask, tensors = everything((3, 5))
    opcheck = torch.library.opcheck
    leaf = arguments[0].clone().requires_grad_()
    leaf_tensors = tensors | {"entropy": tensors["entropy"].clone().requires_grad_()}

    def call(*args):
        return opcheck(ops.ppo_loss.default, args)

    raw_ppo([leaf, *arguments[1:]], mask, leaf_tensors, call=call)
    raw_ppo(arguments, mask, tensors, needs_grad=False, call=call)
    old, returns = arguments[1:]
    opcheck(ops.value_loss.default, (leaf, old, returns, mask, None, torch.tensor([0.2]), 2, True))
    opcheck(
        ops.value_loss.default,
        (arguments[0], None, returns, mask, torch.tensor(3.0), torch.tensor([math.inf]), 0, False),
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_as_one_graph(dynamic):
    arguments, mask, tensors = everything()

    def step(log_probs, old, advantages, mask, entropy, ref):
        loss, stats = F.ppo_loss(
            log_probs * 1.5, old, advantages, mask, entropy=entropy, ref_log_probs=ref, **ALL_ON, denominator=11
        )
        value, _ = F.value_loss(log_probs, old, advantages, mask, clip=0.2)
        return loss + value, stats.approx_kl

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (step, compiled):
        leaf = arguments[0].clone().requires_grad_()
        loss, kl = function(leaf, *arguments[1:], mask, tensors["entropy"], tensors["ref_log_probs"])
        loss.backward()
        results.append((loss.detach(), kl, leaf.grad))
    torch.testing.assert_close(*results)
