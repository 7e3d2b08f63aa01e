"""From hidden states to log-probs and losses: numbers, layouts, masks, adversarial floats, and the two-step path."""

import itertools
import math
import random

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, poison, same_bits, worst

from fastrlhf import functional as F
from fastrlhf import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIR = DTYPES[:2]
# N, H, V: odd ones, and the edges of blocks of 64 tokens, 96 rows of the vocabulary and 64 hidden numbers; several
# blocks of 1024 hidden numbers.
SHAPES = (
    *((0, 3, 5), (1, 1, 1), (5, 16, 1), (1, 3, 2), (64, 64, 96), (65, 130, 97), (65, 16, 383), (200, 63, 1009)),
    *((64, 576, 192), (5, 576, 5003), (200, 1, 2), (33, 16, 20011), (2, 2100, 97)),
)
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "temperature": {"temperature": 0.7},
    "everything": {"bias": True, "softcap": 6.0, "temperature": 1.6},
}
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
ESTIMATORS = ("k1", "k2", "k3", "abs")


def random_head(n, h, v, dtype=torch.float32, *, bias=False, seed=0):
    """hidden [n, h], weight and bias that make logits around 3 in size, tokens at the edges of tiles and elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden, weight = normal(n, h), 3 * normal(v, h) / h**0.5
    tokens = torch.randint(v, (n,), generator=generator)
    tokens[:4] = torch.tensor([0, v - 1, 95, 96])[:n] % v
    return hidden.to(dtype), weight.to(dtype), tokens, normal(v).to(dtype) if bias else None


def eager(hidden, weight, tokens, *, bias=None, temperature=1.0, softcap=None):
    """As everybody writes it: logits in the dtype of hidden and weight."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return reference.token_log_probs_and_entropy(logits, tokens, temperature=temperature)


def wide(x, dtype):
    return x if x is None or not x.is_floating_point() else x.to(dtype)


def slack_of_logits(h: int) -> float:
    """Logits around 3, log-probs around 10 to 30: half an ulp of those, and what the h roundings of a dot product,
    each of a partial sum of about that size, come to as a random walk: five of its standard deviations."""
    return EPS * (32 + 3 * h**0.5)


def slack_of_gradient(exact: torch.Tensor, terms: float, h: int, dtype: torch.dtype) -> float:
    """Of a sum of `terms` in size, times p: the relative error of p, which is the absolute one of the logits. In 16
    bits the rounding of dz before it is multiplied, which eager does too, and that of the result."""
    rounding = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    size = largest(exact)
    return 2 * slack_of_logits(h) * max(size, terms) + rounding * size


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def outcome(function, hidden, weight, tokens, g, h, bias=None, **options):
    """(log_probs, entropy), and the gradients of hidden, weight (and bias) for the log-probs, the entropy and both."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    options = options if bias is None else options | {"bias": leaves[2]}
    results = function(*leaves[:2], tokens, **options)
    wanted = (((results[0],), (g,)), ((results[1],), (h,)), (results, (g, h)))
    grads = [torch.autograd.grad(outputs, leaves, given, retain_graph=True) for outputs, given in wanted]
    return [x.detach() for x in results], grads


def compare(hidden, weight, tokens, bias=None, **options):
    """log-probs, entropies and gradients against the oracle in fp64."""
    generator = torch.Generator().manual_seed(1)
    g, h = (torch.randn(tokens.shape, generator=generator) for _ in range(2))
    temperature, size = options.get("temperature", 1.0), hidden.shape[-1]
    head = (hidden, weight, bias)
    as_fp32, as_fp64 = ([wide(x, dtype) for x in head] for dtype in (torch.float32, torch.float64))
    results, grads = outcome(F.linear_token_log_probs_and_entropy, *head[:2], tokens, g, h, bias, **options)
    eager_grads = outcome(eager, *head[:2], tokens, g, h, bias, **options)[1]
    with torch.no_grad():  # logits are never rounded to 16 bits
        eager_results = eager(*as_fp32[:2], tokens, bias=as_fp32[2], **options)
    exact = outcome(
        reference.linear_token_log_probs_and_entropy,
        *as_fp64[:2],
        tokens,
        g.double(),
        h.double(),
        as_fp64[2],
        **options,
    )
    for i, name in enumerate(("log_probs", "entropy")):
        assert results[i].dtype == torch.float32
        assert results[i].shape == tokens.shape
        assert_as_good_as_eager(
            results[i], eager_results[i], exact[0][i], slack_of_logits(size) / min(temperature, 1.0), name
        )
    terms = [max(largest(g), largest(h)) * factor for factor in (largest(weight), largest(hidden), 1.0)]
    for which, ours, others, truths in zip(("g", "h", "g and h"), grads, eager_grads, exact[1], strict=True):
        names = ("hidden", "weight", "bias")
        for name, a, b, c, x, term in zip(names, ours, others, truths, head, terms, strict=False):
            assert a.dtype == x.dtype
            slack = slack_of_gradient(c, term, size, a.dtype) / min(temperature, 1.0)
            assert_as_good_as_eager(a, b, c, slack, f"gradient of {name} for {which}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", HEADS)
def test_against_the_oracle(dtype, shape, head):
    options = dict(HEADS[head])
    hidden, weight, tokens, bias = random_head(*shape, dtype, bias=options.pop("bias", False))
    if head in ("softcap", "everything"):
        tokens[3::5] = -100
    compare(hidden, weight, tokens, bias, **options)


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(temperature):
    compare(*random_head(65, 63, 383)[:3], temperature=temperature)


def test_numbers_computed_by_hand():
    """The identity as hidden states: the logits are the weight's columns."""
    hidden = torch.eye(2).requires_grad_()
    weight = torch.log(torch.tensor([[1.0, 1.0], [2.0, 1.0], [5.0, 2.0]])).requires_grad_()
    log_probs, entropy = F.linear_token_log_probs_and_entropy(hidden, weight, torch.tensor([1, 2]))
    torch.testing.assert_close(log_probs, torch.tensor([math.log(2 / 8), math.log(1 / 2)]))
    torch.testing.assert_close(entropy[1].item(), 1.5 * math.log(2), rtol=1e-6, atol=0)
    log_probs.sum().backward()
    dz = torch.tensor([[-0.125, 0.75, -0.625], [-0.25, -0.25, 0.5]])
    torch.testing.assert_close(weight.grad, dz.T)
    torch.testing.assert_close(hidden.grad, dz @ weight.detach())


def test_softcap_and_bias_by_hand():
    """Logits of 2 tanh((x w + b) / 2): 0 and 2 tanh(1); dz = (-p_1, p_1) (1 - tanh^2)."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight, bias = torch.tensor([[0.0], [1.5]], requires_grad=True), torch.tensor([0.0, 0.5], requires_grad=True)
    log_prob = F.linear_token_log_probs(hidden, weight, torch.tensor([0]), bias=bias, softcap=2.0)
    capped = 2 * math.tanh(1)
    p, slope = 1 / (1 + math.exp(-capped)), 1 - math.tanh(1) ** 2
    assert log_prob.item() == pytest.approx(-capped + math.log(p), rel=1e-6)
    log_prob.sum().backward()
    torch.testing.assert_close(bias.grad, torch.tensor([p, -p * slope]))
    torch.testing.assert_close(weight.grad[:, 0], bias.grad)
    torch.testing.assert_close(hidden.grad, torch.tensor([[-p * slope * 1.5]]))


@pytest.mark.parametrize("dtype", PAIR)
@pytest.mark.parametrize(
    "layout", ["leading", "slice", "every other", "transposed", "expanded", "columns", "every other column"]
)
def test_hidden_states_in_any_layout(dtype, layout):
    whole, weight, _, bias = random_head(4 * 34, 130, 383, dtype, bias=True)
    whole = whole.view(4, 34, 130)
    hidden = {
        "leading": whole,
        "slice": whole[:, :-1],
        "every other": whole[::3, 1::2],
        "transposed": whole.transpose(0, 1),
        "expanded": whole[:1].expand(3, 34, 130),
        "columns": whole[..., 3:100],
        "every other column": whole[..., ::2],
    }[layout]
    tokens = torch.randint(383, hidden.shape[:-1], generator=torch.Generator().manual_seed(3))
    compare(hidden, weight[:, : hidden.shape[-1]], tokens, bias)


@pytest.mark.parametrize("dtype", PAIR)
@pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "every other row", "every other column"])
def test_weights_in_any_layout(dtype, layout):
    """Shards of a vocabulary, a wider matrix, a tied or transposed one; a bias that is strided too."""
    hidden, whole, _, bias = random_head(65, 63, 400, dtype, bias=True)
    wider = random_head(1, 130, 400, dtype)[1]
    weight, bias = {
        "rows": (whole[97:300], bias[97:300]),
        "columns": (wider[:, 5:68], bias),
        "transposed": (whole.T.contiguous().T, bias),
        "every other row": (whole[::2], bias[::2]),
        "every other column": (wider[:, :126:2], bias),
    }[layout]
    tokens = torch.randint(len(weight), (65,), generator=torch.Generator().manual_seed(3))
    compare(hidden, weight, tokens, bias)


def test_one_token_without_leading_dimensions():
    hidden, weight, _, _ = random_head(1, 16, 11)
    result = F.linear_token_log_probs(hidden[0], weight, torch.tensor(3))
    assert result.shape == ()
    torch.testing.assert_close(result, torch.log_softmax(hidden[0] @ weight.T, -1)[3])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_no_tokens(shape):
    hidden, (_, weight, _, bias) = torch.zeros(*shape, 16, requires_grad=True), random_head(1, 16, 97, bias=True)
    leaves = hidden, weight.requires_grad_(), bias.requires_grad_()
    tokens = torch.zeros(shape, dtype=torch.int64)
    log_probs, entropy = F.linear_token_log_probs_and_entropy(hidden, weight, tokens, bias=bias)
    assert log_probs.shape == entropy.shape == shape
    losses = [log_probs.sum() + entropy.sum(), F.linear_cross_entropy(hidden, weight, tokens, bias=bias)[0]]
    x = torch.zeros(shape)
    losses.append(F.linear_ppo_loss(hidden, weight, tokens, x, x, x, bias=bias)[0])
    for loss in losses:
        assert loss.item() == 0.0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_change_no_bit(dtype):
    hidden, weight, tokens, bias = random_head(150, 63, 383, dtype, bias=True)
    counts = torch.arange(150) % 3 != 0
    tokens, g = torch.where(counts, tokens, -100), torch.randn(150)
    dirty = poison(hidden, counts.unsqueeze(-1).expand_as(hidden))
    call = (weight, tokens, g, -g, bias)
    clean, dirty = (outcome(F.linear_token_log_probs_and_entropy, x, *call) for x in (hidden, dirty))
    for a, b in zip(itertools.chain(clean[0], *clean[1]), itertools.chain(dirty[0], *dirty[1]), strict=True):
        assert torch.equal(a, b)
    for result in (*dirty[0], *(grads[0] for grads in dirty[1])):
        assert not result[~counts].any()


@pytest.mark.parametrize("n", [3, 130])
def test_everything_ignored_gives_zeros(n):
    _, weight, tokens, bias = random_head(n, 16, 97, bias=True)
    hidden, tokens = torch.full((n, 16), math.nan), torch.full_like(tokens, -100)
    g = torch.randn(n)
    results, grads = outcome(F.linear_token_log_probs_and_entropy, hidden, weight, tokens, g, g, bias)
    assert not any(x.any() for x in itertools.chain(results, *grads))
    assert [x.shape for x in grads[0]] == [hidden.shape, weight.shape, bias.shape]
    leaf = hidden.requires_grad_()
    loss, stats = F.linear_cross_entropy(leaf, weight, tokens, bias=bias)
    loss.backward()
    assert not any(x.any() for x in (loss, *stats, leaf.grad))


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_log_probs_are_never_rounded_to_16_bits_verl_5662(dtype):
    hidden, weight, tokens, _ = random_head(200, 130, 1009, dtype)
    exact = reference.linear_token_log_probs_and_entropy(hidden.double(), weight.double(), tokens)
    ours = F.linear_token_log_probs_and_entropy(hidden, weight, tokens)
    for a, b, c in zip(ours, eager(hidden, weight, tokens), exact, strict=True):
        assert worst(b, c) > 100 * worst(a, c)


def rounded_once(ours, left, right, dtype, h):
    """Whether `ours` is left @ right (in fp64), its terms rounded to `dtype` at most once, and their sum once.

    A rounding of x is off by at most half an ulp, which is at most eps |x| / 2, and evenly spread over that:
    independent ones add up to a random walk, of which six standard deviations are allowed.
    """
    half = torch.finfo(dtype).eps / 2
    exact, walk = left @ right, ((left**2) @ (right**2)).sqrt()
    slack = 2 * slack_of_logits(h) * left.abs() @ right.abs() + torch.finfo(dtype).tiny
    error = (ours.double() - exact).abs()
    return bool((error <= half * (exact.abs() * (1 + half) + 6 / 3**0.5 * walk) + slack).all())


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("loss", [False, True])
def test_gradients_are_summed_in_fp32_and_rounded_once(dtype, loss):
    """Over many tokens, in many chunks, and over a large vocabulary."""
    for shape in ((3001, 16, 97), (5, 16, 20011)):
        hidden, weight, tokens, bias = random_head(*shape, dtype, bias=True)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        if loss:
            result, g = F.linear_cross_entropy(*leaves[:2], tokens, bias=bias, chunk_bytes=1, denominator=1.0)[0], -1.0
        else:
            g = torch.randn(shape[0], generator=torch.Generator().manual_seed(2))
            result = F.linear_token_log_probs(*leaves[:2], tokens, bias=bias, chunk_bytes=1) @ g
            g = g.double().unsqueeze(-1)
        grads = torch.autograd.grad(result, leaves)
        x, w, b = (x.detach().double() for x in leaves)
        delta = torch.nn.functional.one_hot(tokens, shape[2]).double()
        dz = g * (delta - torch.softmax(x @ w.T + b, -1))
        assert rounded_once(grads[0], dz, w, dtype, shape[1])
        assert rounded_once(grads[1], dz.T, x, dtype, shape[1])
        assert rounded_once(grads[2].unsqueeze(-1), dz.T, torch.ones(shape[0], 1).double(), dtype, shape[1])


# --------------------------------------------------------------------------------------------------------- properties


def test_a_softcap_out_of_reach_changes_nothing():
    hidden, weight, tokens, _ = random_head(65, 63, 383)
    g = torch.randn(65)
    capped, plain = (
        outcome(F.linear_token_log_probs_and_entropy, hidden, weight, tokens, g, g, softcap=softcap)
        for softcap in (1e6, None)
    )
    for a, b in zip((*capped[0], *capped[1][2]), (*plain[0], *plain[1][2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_shifting_all_logits_changes_nothing(shift):
    """Logits are sixteenths, which stay exact under the shift."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-4, 5, shape, generator=generator) / 4 for shape in ((70, 16), (383, 16)))
    bias, tokens = torch.randint(-9, 9, (383,), generator=generator) / 4, torch.arange(70) * 5
    g = torch.randn(70, generator=generator)
    call = (hidden, weight, tokens, g, -g)
    plain, shifted = (outcome(F.linear_token_log_probs_and_entropy, *call, b) for b in (bias, bias + shift))
    for a, b in zip((*plain[0], *plain[1][2]), (*shifted[0], *shifted[1][2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_logits_sum_to_zero():
    """Over the vocabulary they are the bias's; with a column of ones in W, the hidden state's."""
    hidden, weight, tokens, bias = random_head(65, 63, 1009, bias=True)
    weight[:, 7] = 1.0
    g = torch.randn(65)
    _, grads = outcome(F.linear_token_log_probs_and_entropy, hidden, weight, tokens, g, g, bias, temperature=0.8)
    for grad_hidden, grad_weight, grad_bias in grads:
        assert abs(grad_bias.double().sum().item()) < 1e-4
        assert grad_weight.double().sum(0).abs().max() < 1e-4
        assert grad_hidden[:, 7].abs().max() < 1e-5


def test_a_temperature_and_softcap_divided_by_s_are_logits_multiplied_by_s():
    hidden, weight, tokens, _ = random_head(65, 63, 383)
    scale = 0.25
    g = torch.randn(65)
    scaled, divided = (
        outcome(F.linear_token_log_probs_and_entropy, hidden, w, tokens, g, g, temperature=t, softcap=c)
        for w, t, c in ((scale * weight, 1.5, 2.0), (weight, 1.5 / scale, 2.0 / scale))
    )
    grads = (divided[1][2][0], divided[1][2][1] / scale)
    for a, b in zip((*scaled[0], *scaled[1][2]), (*divided[0], *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_vocabulary_of_one_token():
    hidden, weight, tokens, bias = random_head(70, 16, 1, bias=True)
    results, grads = outcome(
        F.linear_token_log_probs_and_entropy, hidden, weight, tokens, torch.ones(70), -torch.ones(70), bias
    )
    assert not any(x.any() for x in itertools.chain(results, *grads))


@pytest.mark.parametrize("direction", [1, -1])
def test_logits_that_rise_or_fall_along_the_vocabulary(direction):
    """A running maximum that must be rescaled, or that starts where all that follows underflows."""
    hidden, weight, tokens, _ = random_head(65, 16, 5003)
    bias = direction * torch.linspace(-300, 300, 5003)
    exact = reference.linear_token_log_probs_and_entropy(
        *(x.double() for x in (hidden, weight)), tokens, bias=bias.double()
    )
    ours = F.linear_token_log_probs_and_entropy(hidden, weight, tokens, bias=bias)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("shift", [-80.0, -1e4, 1e4])
def test_logits_far_from_zero_skyrl_2141_verl_2656(shift):
    """Phantom rows of a tile's tail, exp(0 - m) each, and a running maximum that starts at 0."""
    for v in (1, 95, 97, 383):
        bias = torch.full((v,), shift)
        results = F.linear_token_log_probs_and_entropy(
            torch.zeros(3, 4), torch.zeros(v, 4), torch.tensor([0, v // 2, v - 1]), bias=bias
        )
        torch.testing.assert_close(results[0], torch.full((3,), -math.log(v)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(results[1], torch.full((3,), math.log(v)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", PAIR)
@pytest.mark.parametrize("forbidden", [slice(0, 200), slice(150, 383), slice(0, None, 2)])
def test_forbidden_tokens_have_probability_zero(dtype, forbidden):
    """A bias of -inf (padding of the vocabulary): 0 log 0 = 0 in the entropy, no nan in any gradient."""
    hidden, weight, _, bias = random_head(65, 63, 383, dtype, bias=True)
    bias[forbidden] = -math.inf
    allowed = bias.isfinite().nonzero()[:, 0]
    tokens = allowed[torch.arange(65) % len(allowed)]
    g = torch.randn(65, generator=torch.Generator().manual_seed(0))
    results, grads = outcome(F.linear_token_log_probs_and_entropy, hidden, weight, tokens, g, -g, bias)
    among_themselves = torch.arange(65) % len(allowed)
    fewer, fewer_grads = outcome(
        F.linear_token_log_probs_and_entropy, hidden, weight[allowed], among_themselves, g, -g, bias[allowed]
    )
    for a, b in zip(results, fewer, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for ours, others in zip(grads, fewer_grads, strict=True):
        assert not any(x[forbidden].any() for x in ours[1:])
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-5}
        for a, b in zip((ours[0], *(x[allowed] for x in ours[1:])), others, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_a_forbidden_token_was_asked_for():
    hidden, weight, tokens, bias = random_head(3, 16, 97, bias=True)
    bias[tokens[1]] = -math.inf
    g = torch.ones(3)
    results, grads = outcome(F.linear_token_log_probs_and_entropy, hidden, weight, tokens, g, g, bias)
    assert results[0].tolist()[1] == -math.inf
    assert results[0][::2].isfinite().all()
    assert results[1].isfinite().all()
    assert all(x.isfinite().all() for x in itertools.chain(*grads))


def test_nothing_is_possible():
    hidden, weight, tokens, bias = random_head(3, 16, 97, bias=True)
    assert F.linear_token_log_probs(hidden, weight, tokens, bias=bias - math.inf).isnan().all()  # as torch.log_softmax


@pytest.mark.parametrize("dtype", PAIR)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_and_inf_are_not_hidden(dtype, bad, softcap):
    hidden, weight, tokens, _ = random_head(130, 63, 383, dtype)
    weight[:, 7] = weight[:, 7].abs() + 0.01
    options = {"softcap": softcap}
    clean = F.linear_token_log_probs_and_entropy(hidden, weight, tokens, **options)
    hidden[70, 7] = bad  # logits of nan, or of inf everywhere; a softcap holds those
    shows = torch.zeros(130, dtype=torch.bool)
    shows[70] = math.isnan(bad) or softcap is None
    for a, b in zip(F.linear_token_log_probs_and_entropy(hidden, weight, tokens, **options), clean, strict=True):
        assert torch.equal(a.isnan(), shows)
        others = torch.arange(130) != 70
        assert same_bits(a[others], b[others])
    hidden[70, 7] = 0.0
    for row in (0, 95, 96, 382):
        broken = weight.clone()
        broken[row, 3] = math.nan
        results = F.linear_token_log_probs_and_entropy(hidden, broken, tokens, **options)
        assert all(x.isnan().all() for x in results)


@pytest.mark.parametrize("rows", [slice(0, 1000), slice(3, 4), slice(1999, 2000)])
def test_a_nan_among_logits_that_weigh_nothing_shows(rows):
    """Whole blocks of the vocabulary have a probability of 0, or nothing but nan."""
    weight, bias = torch.zeros(2000, 2), torch.full((2000,), -1e4)
    weight[rows] = math.nan
    bias[1000:1900] = 0.0
    results = F.linear_token_log_probs_and_entropy(torch.ones(1, 2), weight, torch.tensor([1500]), bias=bias)
    assert all(x.isnan().all() for x in results)


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_huge_logits(size):
    weight = torch.zeros(300, 2)
    weight[270] = torch.tensor([size, 0.0])
    hidden = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    log_probs, entropy = F.linear_token_log_probs_and_entropy(hidden, weight, torch.tensor([270, 270]))
    assert log_probs.tolist() == [0.0, pytest.approx(-size)]
    assert entropy.tolist() == [0.0, pytest.approx(math.log(299), rel=1e-6)]


# ------------------------------------------------------------------------------------------------------------- losses


def with_gradients(function, hidden, weight, bias, *arguments, dtype=None, **options):
    """Loss, statistics, and the gradients of hidden, weight (and bias); with a dtype, everything in that."""
    convert = (lambda x: x) if dtype is None else (lambda x: wide(x, dtype) if isinstance(x, torch.Tensor) else x)
    leaves = [convert(x).detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    options = {name: convert(x) for name, x in options.items()} | ({} if bias is None else {"bias": leaves[2]})
    loss, stats = function(*leaves[:2], *map(convert, arguments), **options)
    stats = [x.item() for x in stats]
    return loss.detach(), torch.tensor(stats, dtype=torch.float64), torch.autograd.grad(loss, leaves)


def compare_loss(ours, two_step, oracle, hidden, *call, extra=0.0, **options):
    """Against the two-step path, from logits in fp32, by the oracle in fp64. `extra`: more slack, relative."""
    a, b = (with_gradients(function, hidden, *call, **options) for function in (ours, two_step))
    exact = with_gradients(oracle, hidden, *call, dtype=torch.float64, **options)
    h = hidden.shape[-1]
    slack = 2 * slack_of_logits(h) + extra  # of log-probs and entropies, and as much again of what is made of them
    assert a[0].dtype == torch.float32
    assert a[0].shape == ()
    for name, x, y, z in zip(("loss", "stats"), a, b, exact, strict=False):
        size = z.abs().clamp(min=1.0)
        assert_as_good_as_eager(x / size, y / size, z / size, slack, name)
    for name, x, y, z in zip(("hidden", "weight", "bias"), a[2], b[2], exact[2], strict=False):
        slack = 2 * slack_of_gradient(z, 0.0, h, x.dtype) + extra * largest(z)
        assert_as_good_as_eager(x, y, z, slack, f"gradient of {name}")


def logits_in_fp32(hidden, weight, bias, softcap):
    logits = torch.nn.functional.linear(*(wide(x, torch.float32) for x in (hidden, weight, bias)))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def two_step_cross_entropy(hidden, weight, tokens, *, bias=None, temperature=1.0, softcap=None, denominator=None):
    logits = logits_in_fp32(hidden, weight, bias, softcap)
    log_probs, entropy = F.token_log_probs_and_entropy(logits, tokens, temperature=temperature)
    count = (tokens != -100).sum()
    loss = -log_probs.sum() / (count if denominator is None else denominator)
    return loss, (entropy.detach().sum() / count, count)


def exact_cross_entropy(hidden, weight, tokens, *, denominator=None, **head):
    _, entropy = reference.linear_token_log_probs_and_entropy(hidden, weight, tokens, **head)
    count = (tokens != -100).sum()
    loss = reference.linear_cross_entropy(hidden, weight, tokens, denominator=denominator, **head)
    return loss, (entropy.detach().sum() / count, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("denominator", [None, 7.0, torch.tensor(300)])
def test_cross_entropy_against_the_two_step_path(dtype, head, denominator):
    options = dict(HEADS[head]) | {"denominator": denominator}
    hidden, weight, tokens, bias = random_head(150, 63, 383, dtype, bias=options.pop("bias", False))
    tokens[1::4] = -100
    functions = (F.linear_cross_entropy, two_step_cross_entropy, exact_cross_entropy)
    compare_loss(*functions, hidden, weight, bias, tokens, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_over_a_large_vocabulary(dtype):
    """Logits are kept, and multiplied by the weight some thousands of rows at a time."""
    hidden, weight, tokens, bias = random_head(70, 16, 12_393, dtype, bias=True)
    functions = (F.linear_cross_entropy, two_step_cross_entropy, exact_cross_entropy)
    compare_loss(*functions, hidden, weight, bias, tokens, softcap=6.0)


def test_cross_entropy_is_torchs():
    hidden, weight, tokens, bias = random_head(65, 63, 383, bias=True)
    tokens[5] = -100
    loss, stats = F.linear_cross_entropy(hidden, weight, tokens, bias=bias)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.T + bias, tokens))
    assert stats.tokens == 64


def random_ppo(b, t, h, v, dtype=torch.float32, *, seed=0, bias=False, temperature=1.0, softcap=None):
    """hidden, weight, bias; tokens, old_log_probs, advantages, mask; weights and ref_log_probs by name."""
    hidden, weight, tokens, bias = random_head(b * t, h, v, dtype, bias=bias, seed=seed)
    head = {"bias": bias, "temperature": temperature, "softcap": softcap}
    log_probs = reference.linear_token_log_probs_and_entropy(hidden, weight, tokens, **head)[0].view(b, t)
    generator = torch.Generator().manual_seed(seed)
    old, ref, advantages, weights = (torch.randn(b, t, generator=generator) for _ in range(4))
    mask = torch.rand(b, t, generator=generator) > 0.33
    arguments = (tokens.view(b, t), log_probs + 0.4 * old, advantages + 0.5, mask)
    return (hidden.view(b, t, h), weight, bias, *arguments), {
        "weights": weights.abs(),
        "ref_log_probs": log_probs + 0.3 * ref,
    }


def two_step_ppo(hidden, weight, tokens, old, advantages, mask, *, bias=None, temperature=1.0, softcap=None, **options):
    logits = logits_in_fp32(hidden, weight, bias, softcap)
    tokens = torch.where(mask, tokens, -100)
    log_probs, entropy = F.token_log_probs_and_entropy(logits, tokens, temperature=temperature)
    return F.ppo_loss(log_probs, old, advantages, mask, entropy=entropy, **options)


PPO = (F.linear_ppo_loss, two_step_ppo, reference.linear_ppo_loss)
ALL_ON = {
    "clip_low": 0.1,
    "clip_high": 0.3,
    "dual_clip": 1.4,
    "log_ratio_clamp": 0.6,
    "entropy_coef": 0.3,
    "kl_coef": 0.2,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 7.0, torch.tensor(11)])
def test_ppo_against_the_two_step_path(dtype, ratio_level, aggregation, denominator):
    call, tensors = random_ppo(5, 37, 63, 383, dtype)
    call[-1][1] = False  # a sequence without a single token
    options = {"ratio_level": ratio_level, "aggregation": aggregation, "denominator": denominator}
    compare_loss(*PPO, *call, **tensors, **ALL_ON, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ppo_with_every_kl_estimator(estimator):
    call, tensors = random_ppo(5, 37, 63, 383)
    options = {"kl_coef": 0.5, "kl_estimator": estimator, "ref_log_probs": tensors["ref_log_probs"]}
    compare_loss(*PPO, *call, **options)


@pytest.mark.parametrize("seed", range(40))
def test_ppo_with_any_options(seed):
    choose = random.Random(seed)
    head = {"softcap": choose.choice([None, 4.0]), "temperature": choose.choice([1.0, 0.8, 1.7])}
    shape = choose.choice([(2, 1), (3, 15), (2, 32), (3, 43), (2, 131), (1, 200)])
    size, dtype = choose.choice([(1, 5), (16, 96), (63, 383), (130, 97)]), choose.choice(DTYPES)
    call, tensors = random_ppo(*shape, *size, dtype, seed=seed, bias=choose.random() < 0.5, **head)
    generator = torch.Generator().manual_seed(seed)
    call = (*call[:-1], torch.rand(shape, generator=generator) < choose.choice([0.1, 0.6, 1.0]))
    options = head | {
        "clip_low": choose.choice([0.0, 0.1, 1.0]),
        "clip_high": choose.choice([0.0, 0.28, 5.0]),
        "dual_clip": choose.choice([None, 1.2, 3.0]),
        "log_ratio_clamp": choose.choice([None, 0.5, 20.0]),
        "ratio_level": choose.choice(["token", "token", "sequence"]),
        "aggregation": choose.choice(AGGREGATIONS),
        "denominator": choose.choice([None, 11.0]),
        "advantage_stats": choose.choice([None, torch.tensor([0.5, 2.0])]),
        "entropy_coef": choose.choice([0.0, 0.01, -0.3]),
        "kl_coef": choose.choice([0.0, 0.05, -1.0]),
        "kl_estimator": choose.choice(ESTIMATORS),
    }
    options |= {name: x for name, x in tensors.items() if choose.random() < 0.5}
    options["kl_coef"] = options["kl_coef"] if "ref_log_probs" in options else 0.0
    compare_loss(*PPO, *call, **options)


def test_ppo_by_hand():
    """Of tokens with p = 1/4 and 1/2, ratios of 2 (clipped at 1.2) and 1.1."""
    hidden = torch.eye(2).requires_grad_()
    weight = torch.log(torch.tensor([[1.0, 1.0], [2.0, 1.0], [5.0, 2.0]])).requires_grad_()
    old = torch.log(torch.tensor([1 / 8, 1 / 2.2]))
    loss, stats = F.linear_ppo_loss(
        hidden, weight, torch.tensor([1, 2]), old, torch.tensor([1.0, 2.0]), torch.ones(2), entropy_coef=0.0
    )
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 + 2.2) / 2, rel=1e-6)
    assert stats.ratio_max.item() == pytest.approx(2.0, rel=1e-6)
    assert stats.clip_fraction.item() == 0.5
    entropies = [-sum(p * math.log(p) for p in row) for row in ((1 / 8, 1 / 4, 5 / 8), (1 / 4, 1 / 4, 1 / 2))]
    assert stats.entropy.item() == pytest.approx(sum(entropies) / 2, rel=1e-6)
    dz = -1.1 * torch.tensor([[0.0, 0.0, 0.0], [-0.25, -0.25, 0.5]])
    torch.testing.assert_close(weight.grad, dz.T)
    torch.testing.assert_close(hidden.grad, dz @ weight.detach())


@pytest.mark.parametrize("dtype", PAIR)
def test_at_step_zero_the_ratio_is_one(dtype):
    """The log-probs of linear_ppo_loss are those of linear_token_log_probs, to the last bit."""
    (hidden, weight, bias, tokens, _, advantages, mask), _ = random_ppo(6, 50, 63, 383, dtype, bias=True)
    old = F.linear_token_log_probs(hidden, weight, tokens, bias=bias, temperature=0.9)
    call = (hidden.requires_grad_(), weight, tokens, old, F.masked_whiten(advantages, mask), mask)
    loss, stats = F.linear_ppo_loss(*call, bias=bias, temperature=0.9, dual_clip=3.0)
    assert (stats.ratio_mean, stats.ratio_min, stats.ratio_max) == (1.0, 1.0, 1.0)
    assert (stats.approx_kl, stats.clip_fraction, stats.dual_clip_fraction) == (0.0, 0.0, 0.0)
    assert abs(loss.item()) < 1e-6


def test_an_ignored_token_that_counts_is_one_of_log_prob_zero():
    """As on the two-step path: -100 says that the row is not read, the mask that the token counts."""
    (hidden, weight, bias, tokens, *rest, mask), tensors = random_ppo(4, 37, 16, 97)
    tokens[1, 3] = tokens[2, :5] = -100
    mask[1, 3] = mask[2, 2] = True
    compare_loss(*PPO, hidden, weight, bias, tokens, *rest, mask, **tensors, **(ALL_ON | {"log_ratio_clamp": 20.0}))
    hidden[1, 3] = math.nan
    loss, _, grads = with_gradients(F.linear_ppo_loss, hidden, weight, bias, tokens, *rest, mask)
    assert loss.isfinite()
    assert not grads[0][1, 3].any()


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", PAIR)
def test_what_stands_under_the_mask_changes_no_bit(ratio_level, aggregation, dtype):
    (hidden, weight, bias, tokens, old, advantages, mask), tensors = random_ppo(4, 43, 63, 383, dtype)
    mask[1] = False
    options = ALL_ON | {
        "ratio_level": ratio_level,
        "aggregation": aggregation,
        "advantage_stats": torch.tensor([0.3, 2.0]),
    }
    clean = with_gradients(F.linear_ppo_loss, hidden, weight, bias, tokens, old, advantages, mask, **tensors, **options)
    dirty = with_gradients(
        F.linear_ppo_loss,
        *(poison(hidden, mask.unsqueeze(-1).expand_as(hidden)), weight, bias),
        torch.where(mask, tokens, torch.tensor([-1, 383, 2**40])[torch.arange(tokens.numel()) % 3].view_as(tokens)),
        *(poison(old, mask), poison(advantages, mask), mask),
        **{name: poison(x, mask) for name, x in tensors.items()},
        **options,
    )
    for a, b in zip((*clean[:2], *clean[2]), (*dirty[:2], *dirty[2]), strict=True):
        assert torch.equal(a, b)
    assert not dirty[2][0][~mask].any()


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_counts(ratio_level, aggregation):
    (hidden, weight, _, tokens, old, _, mask), _ = random_ppo(3, 43, 16, 97)
    nan, mask = torch.full_like(old, math.nan), torch.zeros_like(mask)
    call = (torch.full_like(hidden, math.nan), weight, torch.zeros(97), torch.full_like(tokens, -7), nan, nan, mask)
    tensors = {"weights": nan, "ref_log_probs": nan}
    loss, stats, grads = with_gradients(
        F.linear_ppo_loss, *call, **tensors, **ALL_ON, ratio_level=ratio_level, aggregation=aggregation
    )
    assert not any(x.any() for x in (loss, stats, *grads))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_with_a_global_denominator_give_the_gradient_of_the_batch_liger_1082(aggregation):
    (*head, tokens, old, advantages, mask), _ = random_ppo(6, 33, 16, 97)
    count = mask.sum() if aggregation == "token-mean" else (mask.sum(-1) > 0).sum()
    gradients = []
    for parts in ([slice(0, 6)], [slice(0, 1), slice(1, 4), slice(4, 6)]):
        hidden, weight = (x.clone().requires_grad_() for x in head[:2])
        for rows in parts:
            call = (x[rows] for x in (tokens, old, advantages, mask))
            F.linear_ppo_loss(hidden[rows], weight, *call, aggregation=aggregation, denominator=count)[0].backward()
        gradients.append((hidden.grad, weight.grad))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    plain = with_gradients(F.linear_ppo_loss, *head, tokens, old, advantages, mask, aggregation=aggregation)
    torch.testing.assert_close(plain[2], gradients[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_coefficient_of_zero_only_monitors(estimator):
    (hidden, weight, bias, *rest, mask), tensors = random_ppo(4, 29, 16, 97)
    mask[0, :2] = True
    far = tensors["ref_log_probs"].clone()
    far[0, 0], far[0, 1] = -math.inf, math.nan
    plain, monitored = (
        with_gradients(F.linear_ppo_loss, hidden, weight, bias, *rest, mask, **options)
        for options in ({}, {"ref_log_probs": far, "kl_estimator": estimator})
    )
    for a, b in zip((plain[0], *plain[2]), (monitored[0], *monitored[2]), strict=True):
        assert same_bits(a, b)
    assert monitored[1][8].isnan()


def test_nan_shows_in_the_statistics():
    (hidden, weight, bias, *rest, mask), _ = random_ppo(4, 29, 16, 97)
    hidden[2, 3], mask[2, 3] = math.nan, True
    loss, stats, grads = with_gradients(F.linear_ppo_loss, hidden, weight, bias, *rest, mask)
    assert loss.isnan()
    assert stats[4:8].isnan().all()  # ratio_mean, ratio_min, ratio_max, entropy
    assert grads[0][2, 3].isnan().all()
    others = torch.ones_like(mask)
    others[2, 3] = False
    assert grads[0][others].isfinite().all()


def test_impossible_tokens_meet_the_clamp():
    """A log-prob of -inf: no slope beyond the clamp, and nothing turns into nan."""
    (hidden, weight, bias, *rest, mask), _ = random_ppo(4, 29, 16, 97, bias=True)
    bias[rest[0][1, 3]] = -math.inf
    mask[1, 3] = True
    compare_loss(*PPO, hidden, weight, bias, *rest, mask, entropy_coef=0.1)
    loss, _, grads = with_gradients(F.linear_ppo_loss, hidden, weight, bias, *rest, mask)
    assert loss.isfinite()
    assert not grads[0][1, 3].any()


def random_dpo(lengths, h, v, dtype=torch.float32, *, bias=False):
    """hidden, weight, bias, tokens, cu_seqlens, and log-probs of whole responses under a reference."""
    hidden, weight, tokens, bias = random_head(sum(lengths), h, v, dtype, bias=bias)
    log_probs, _ = reference.linear_token_log_probs_and_entropy(hidden, weight, tokens, bias=bias)
    sums = torch.stack([x.sum() for x in log_probs.split(lengths)])
    near = sums + 3 * torch.randn(len(sums), generator=torch.Generator().manual_seed(5))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    return hidden, weight, bias, tokens, cu_seqlens, *near.chunk(2)


def dpo_path(log_probs_of, dpo_loss):
    """Log-probs of tokens, summed response by response."""

    def path(hidden, weight, tokens, cu_seqlens, *refs, bias=None, temperature=1.0, softcap=None, **options):
        head = {"bias": bias, "temperature": temperature, "softcap": softcap}
        log_probs = log_probs_of(hidden, weight, tokens, **head).split(cu_seqlens.diff().tolist())
        return dpo_loss(*torch.stack([x.sum() for x in log_probs]).chunk(2), *refs, **options)

    return path


def two_step_log_probs(hidden, weight, tokens, *, bias, temperature, softcap):
    return F.token_log_probs(logits_in_fp32(hidden, weight, bias, softcap), tokens, temperature=temperature)


def exact_log_probs(*arguments, **head):
    return reference.linear_token_log_probs_and_entropy(*arguments, **head)[0]


DPO = (F.linear_dpo_loss, dpo_path(two_step_log_probs, F.dpo_loss), dpo_path(exact_log_probs, reference.dpo_loss))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize(("variant", "label_smoothing"), [("sigmoid", 0.0), ("robust", 0.2), ("hinge", 0.0)])
@pytest.mark.parametrize("lengths", [(3, 40, 0, 1, 65, 7), (5000, 4999)])
def test_dpo_against_the_two_step_path(dtype, integers, variant, label_smoothing, lengths):
    """Over thousands of tokens too: added in fp32 one by one, their log-probs would be off in the second digit."""
    hidden, weight, bias, tokens, cu_seqlens, *refs = random_dpo(lengths, 3, 97, dtype, bias=True)
    tokens[2] = -100
    options = {"beta": 0.1, "variant": variant, "label_smoothing": label_smoothing}
    # The sums are rounded to fp32, theirs and the references'.
    extra = 4 * EPS * max(x.abs().max().item() for x in refs) * options["beta"]
    compare_loss(*DPO, hidden, weight, bias, tokens, cu_seqlens.to(integers), *refs, **options, extra=extra)


def test_dpo_of_padded_responses():
    """As the docstring says to call it."""
    hidden, weight, bias, tokens, cu_seqlens, *refs = random_dpo((7, 3, 5, 7), 16, 97)
    padded, wide_tokens = torch.full((4, 7, 16), math.nan), torch.full((4, 7), -100)
    for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        padded[b, : end - start], wide_tokens[b, : end - start] = hidden[start:end], tokens[start:end]
    packed_loss, packed_stats, _ = with_gradients(F.linear_dpo_loss, hidden, weight, bias, tokens, cu_seqlens, *refs)
    call = (padded.flatten(0, 1), weight, bias, wide_tokens.flatten(), torch.arange(0, 4 * 7 + 1, 7), *refs)
    loss, stats, _ = with_gradients(F.linear_dpo_loss, *call)
    torch.testing.assert_close((loss, stats), (packed_loss, packed_stats))


# ------------------------------------------------------------------------------------------ what autograd does with it


def loss_cases():
    ppo, tensors = random_ppo(4, 37, 16, 97, bias=True)
    dpo = random_dpo((20, 40, 30, 10), 16, 97, bias=True)
    tensors |= ALL_ON
    return {
        "cross entropy": (F.linear_cross_entropy, ppo[:4], {}),
        "ppo": (F.linear_ppo_loss, ppo, tensors),
        "ppo, sequence": (F.linear_ppo_loss, ppo, tensors | {"ratio_level": "sequence"}),
        "dpo": (F.linear_dpo_loss, dpo, {}),
    }


LOSSES = loss_cases()


def graph_of(name, dtype=torch.float32):
    """The leaves of a loss, and how to compute it from them."""
    function, (hidden, weight, bias, *rest), options = LOSSES[name]
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return leaves, lambda: function(*leaves[:2], *rest, bias=leaves[2], **options)[0]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", PAIR)
def test_the_incoming_gradient_is_multiplied_in(name, dtype):
    leaves, loss = graph_of(name, dtype)
    plain = torch.autograd.grad(loss(), leaves)
    for scale in (2.5, 0.0, -1.0):
        scaled = torch.autograd.grad(scale * loss(), leaves)
        for a, b in zip(scaled, plain, strict=True):
            assert a.dtype == dtype
            rounding = 2 * torch.finfo(dtype).eps * b.abs().max().item()
            torch.testing.assert_close(a, scale * b, rtol=1e-5, atol=1e-5 * abs(scale) + abs(scale) * rounding)


@pytest.mark.parametrize("name", LOSSES)
def test_backward_twice_and_a_loss_used_twice(name):
    leaves, loss = graph_of(name)
    plain = torch.autograd.grad(loss(), leaves)
    once = loss()
    once.backward(retain_graph=True)
    once.backward()
    for leaf, grad in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)
    once = loss()
    both = torch.autograd.grad(once + 0.5 * once * once.detach(), leaves)
    for a, b in zip(both, plain, strict=True):
        torch.testing.assert_close(a, (1 + 0.5 * once.item()) * b, rtol=1e-5, atol=1e-6)
    once = loss()
    one_by_one = [torch.autograd.grad(3 * once, leaf, retain_graph=leaf is not leaves[-1])[0] for leaf in leaves]
    for a, b in zip(one_by_one, plain, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=1e-5, atol=1e-6)


def test_gradcheck_of_the_oracle():
    call, tensors = random_ppo(2, 3, 3, 5, bias=True)
    hidden, weight, bias, tokens, old, advantages, mask = (wide(x, torch.float64) for x in call)
    tokens[0, 1] = -100
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    head = {"temperature": 0.8, "softcap": 3.0}
    options = head | ALL_ON | {name: x.double() for name, x in tensors.items()}
    functions = (
        lambda x, w, b: reference.linear_token_log_probs_and_entropy(x, w, tokens, bias=b, **head),
        lambda x, w, b: reference.linear_cross_entropy(x, w, tokens, bias=b, denominator=3, **head),
        lambda x, w, b: reference.linear_ppo_loss(x, w, tokens, old, advantages, mask, bias=b, **options)[0],
    )
    assert all(torch.autograd.gradcheck(function, leaves) for function in functions)
