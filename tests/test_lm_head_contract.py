"""The LM head ops' manners: bits that nothing may change, gradients where asked, errors, torch.library and compile."""

import itertools
import math

import pytest
import torch
from oracle import peak_allocation, same_bits, worst
from test_lm_head import ALL_ON, LOSSES, outcome, random_dpo, random_head, random_ppo, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend

from fastrlhf import backends
from fastrlhf import functional as F

ops = torch.ops.fastrlhf
BACKEND = backends.backend_table()["linear_token_log_probs"]["cpu"]
native = pytest.mark.skipif(not BACKEND.startswith("c++"), reason=f"of our kernels, not of plain PyTorch: {BACKEND}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def log_probs_case(dtype, n=200, h=130, v=1009):
    hidden, weight, tokens, bias = random_head(n, h, v, dtype, bias=True)
    tokens[3::7] = -100
    generator = torch.Generator().manual_seed(4)
    g, k = (torch.randn(n, generator=generator) for _ in range(2))
    return hidden, weight, tokens, g, k, bias


def everything(dtype, **options):
    """Every result and gradient of every op, in a flat list."""
    results, grads = outcome(
        F.linear_token_log_probs_and_entropy, *log_probs_case(dtype), softcap=9.0, temperature=0.8, **options
    )
    hidden, weight, tokens, *_, bias = log_probs_case(dtype)
    ppo, tensors = random_ppo(3, 71, 63, 1009, dtype, bias=True)
    losses = [
        (F.linear_cross_entropy, (hidden, weight, bias, tokens), {"temperature": 0.8}),
        *(
            (F.linear_ppo_loss, ppo, tensors | ALL_ON | {"aggregation": a})
            for a in ("token-mean", "seq-mean-token-mean")
        ),
        (F.linear_dpo_loss, random_dpo((20, 100, 50, 30), 63, 1009, dtype, bias=True), {}),
    ]
    found = list(itertools.chain(results, *grads))
    for function, arguments, more in losses:
        loss, stats, grads = with_gradients(function, *arguments, **more, **options)
        found += [loss, stats, *grads]
    return found


def assert_same(one, other):
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a, b), f"result {i}: differs by {worst(a, b.double()):.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chunk_size_changes_no_bit(dtype):
    expected = everything(dtype)
    for chunk_bytes in (1, 100_000, 1_000_003, 1 << 62):
        assert_same(expected, everything(dtype, chunk_bytes=chunk_bytes))


def test_more_tokens_than_any_chunk_has():
    hidden, weight, tokens, g, k, bias = log_probs_case(torch.float32, 2500, 16, 97)
    call = (F.linear_token_log_probs_and_entropy, hidden, weight, tokens, g, k, bias)
    whole, small = (outcome(*call, **options) for options in ({}, {"chunk_bytes": 1}))
    assert_same(itertools.chain(whole[0], *whole[1]), itertools.chain(small[0], *small[1]))


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype):
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(everything(dtype))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(results[0], other)


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch_verl_7704(dtype):
    hidden, weight, tokens, g, k, bias = log_probs_case(dtype)

    def rows(index):
        call = (hidden[index], weight, tokens[index], g[index], k[index], bias)
        results, grads = outcome(F.linear_token_log_probs_and_entropy, *call, temperature=0.8)
        return [*results, *(grad[0] for grad in grads)]

    whole = rows(torch.arange(200))
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    for index in ([0], [17], [199], range(3, 70), range(0, 200, 2), shuffled):
        index = torch.as_tensor(list(index))
        assert_same([x[index] for x in whole], rows(index))


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_minibatch_has_the_ratio_one_at_step_zero(dtype):
    """Old log-probs of the whole rollout, the loss of some of its sequences."""
    (hidden, weight, bias, tokens, _, advantages, mask), _ = random_ppo(8, 43, 130, 1009, dtype, bias=True)
    old = F.linear_token_log_probs(hidden, weight, tokens, bias=bias, softcap=9.0)
    for rows in (slice(3, 5), slice(1, None, 3), [7, 0]):
        call = (x[rows] for x in (tokens, old, advantages, mask))
        _, stats = F.linear_ppo_loss(hidden[rows], weight, *call, bias=bias, softcap=9.0)
        assert (stats.ratio_min, stats.ratio_max, stats.approx_kl) == (1.0, 1.0, 0.0)


@native
@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "seq-mean-token-mean"])
def test_a_sequences_gradient_does_not_depend_on_its_batch(aggregation):
    (*head, tokens, old, advantages, mask), tensors = random_ppo(5, 71, 63, 383, bias=True)
    options = ALL_ON | {"aggregation": aggregation, "denominator": 1.0}

    def gradient(rows):
        call = (x[rows] for x in (tokens, old, advantages, mask))
        some = {name: x[rows] for name, x in tensors.items()}
        return with_gradients(F.linear_ppo_loss, head[0][rows], *head[1:], *call, **some, **options)[2][0]

    batch = gradient(slice(0, 5))
    for b in (0, 2, 4):
        assert same_bits(batch[b : b + 1], gradient(slice(b, b + 1)))


def test_memory_that_was_never_written_is_not_read():
    """Asked for deterministic algorithms, torch fills what it allocates with nan."""
    expected = everything(torch.float32), everything(torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        filled = everything(torch.float32), everything(torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(expected, filled, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_and_without_gradients_the_numbers_are_the_same(dtype):
    hidden, weight, tokens, *_, bias = log_probs_case(dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    call = lambda: F.linear_token_log_probs_and_entropy(*leaves[:2], tokens, bias=leaves[2])  # noqa: E731
    with_graph = call()
    alone = F.linear_token_log_probs(*leaves[:2], tokens, bias=leaves[2])
    with torch.no_grad():
        without = call()
    assert all(x.requires_grad for x in (*with_graph, alone))
    assert not any(x.requires_grad for x in without)
    for a, b in zip((*with_graph, alone), (*without, without[0]), strict=True):
        assert same_bits(a.detach(), b)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_same_without_gradients(name):
    function, (hidden, weight, bias, *rest), options = LOSSES[name]
    expected = with_gradients(function, hidden, weight, bias, *rest, **options)
    leaf = hidden.detach().clone().requires_grad_()
    with torch.no_grad():
        loss, stats = function(leaf, weight, *rest, bias=bias, **options)
    assert not loss.requires_grad
    assert same_bits(loss, expected[0])
    assert torch.equal(torch.stack(list(stats)).double(), expected[1])
    loss, stats = function(leaf, weight, *rest, bias=bias, **options)
    assert loss.requires_grad
    assert not any(x.requires_grad for x in stats)
    assert all(x.shape == () and x.dtype == torch.float32 for x in stats)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_does_not_matter(dtype):
    expected = everything(torch.float32)
    inputs = log_probs_case(torch.float32, 5, 3, 7)
    torch.set_default_dtype(dtype)
    try:
        results, _ = outcome(F.linear_token_log_probs_and_entropy, *inputs)
        loss, _ = F.linear_cross_entropy(*inputs[:3], denominator=7, softcap=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(x.dtype == torch.float32 for x in (*results, loss))
    assert_same(expected, everything(torch.float32))


# ------------------------------------------------------------------------------------------ gradient only where asked

CALLS = {
    "log-probs": lambda x, w, b, t: F.linear_token_log_probs(x, w, t, bias=b).sum(),
    "entropy": lambda x, w, b, t: F.linear_token_log_probs_and_entropy(x, w, t, bias=b)[1].sum(),
    "cross entropy": lambda x, w, b, t: F.linear_cross_entropy(x, w, t, bias=b)[0],
    "ppo": lambda x, w, b, t: F.linear_ppo_loss(x, w, t, ONES - 4, ONES, ONES, bias=b, entropy_coef=0.1)[0],
    "ppo, sequence": lambda x, w, b, t: F.linear_ppo_loss(
        x.view(2, 35, -1),
        w,
        t.view(2, 35),
        *[y.view(2, 35) for y in (ONES - 4, ONES, ONES)],
        bias=b,
        ratio_level="sequence",
        entropy_coef=0.1,
    )[0],
    "dpo": lambda x, w, b, t: F.linear_dpo_loss(x, w, t, torch.tensor([0, 30, 70]), -ONES[:1], ONES[:1], bias=b)[0],
}
ONES = torch.ones(70)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_gradient_only_where_asked(name, dtype):
    *head, tokens, bias = (random_head(70, 16, 97, dtype, bias=True)[i] for i in (0, 1, 2, 3))
    tensors = (*head, bias)

    def grads(needs):
        leaves = [x.detach().clone().requires_grad_(needed) for x, needed in zip(tensors, needs, strict=True)]
        loss = CALLS[name](*leaves, tokens)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
        return [x.grad for x in leaves]

    full = grads((True, True, True))
    for needs in itertools.product((True, False), repeat=3):
        for grad, expected, needed in zip(grads(needs), full, needs, strict=True):
            assert (grad is not None) == needed
            assert not needed or torch.equal(grad, expected)


def raw_head(dtype=torch.float32, n=9, h=5, v=37):
    hidden, weight, tokens, bias = random_head(n, h, v, dtype, bias=True)
    tokens[4] = -100
    return hidden, weight, bias, tokens, torch.tensor([0.9, 7.0]), 1 << 20


def raw_ppo(head, *needs, sequences=False):
    n = head[0].shape[0]
    shape = (3, n // 3) if sequences else (n,)
    x = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    hidden, weight, bias, tokens, *rest = head
    mask = torch.arange(n).view(shape) % 4 != 0
    options = torch.tensor([0.2, 0.2, math.inf, 20.0, 0.1, 0.2])
    stats, denominator = torch.tensor([0.1, 2.0]), torch.tensor(5.0)
    tokens = torch.where(mask, tokens.view(shape), -100)
    more = (stats, x[3], denominator, options, 2, 2 if sequences else 0, *needs)
    return hidden, weight, bias, tokens, *rest, x[0] - 3, x[1], mask, x[2], *more


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=4)))
def test_raw_ops_compute_no_gradient_nobody_needs(dtype, needs):
    hidden, weight, bias, tokens, numbers, chunk = head = raw_head(dtype)
    _, entropy, normaliser = ops.linear_token_log_probs(*head)
    g = torch.ones(9)
    results = (
        ops.linear_token_log_probs_backward(
            g, g, hidden, weight, bias, tokens, normaliser, entropy, numbers, chunk, *needs
        ),
        ops.linear_cross_entropy(*head, None, *needs)[2:],
        ops.linear_ppo_loss(*raw_ppo(head, *needs))[2:],
    )
    dtypes = (dtype, torch.float32 if needs[3] else dtype, dtype)
    for grads in results:
        for grad, model, needed, expected in zip(grads, (hidden, weight, bias), needs[:3], dtypes, strict=True):
            assert grad.shape == (model.shape if needed else (0,))
            assert grad.dtype == expected or not needed


@pytest.mark.parametrize("name", CALLS)
def test_a_frozen_weight_costs_nothing(name):
    """Its gradient would take 8 MB, a chunk of logits takes half of one."""
    hidden, weight, tokens, bias = random_head(70, 1024, 2048)
    hidden.requires_grad_()
    frozen = peak_allocation(lambda: CALLS[name](hidden, weight, bias, tokens).backward())
    weight.requires_grad_()
    with torch.no_grad():
        evaluated = peak_allocation(lambda: CALLS[name](hidden, weight, bias, tokens))
    trained = peak_allocation(lambda: CALLS[name](hidden, weight, bias, tokens).backward())
    assert max(frozen, evaluated) < weight.nbytes <= trained


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_main_grad_is_added_to(name, dtype):
    hidden, weight, tokens, bias = random_head(70, 16, 97, dtype, bias=True)
    plain = weight.clone().requires_grad_()
    CALLS[name](hidden, plain, bias, tokens).backward()
    weight = weight.clone().requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(97, 16), False
    CALLS[name](hidden, weight, bias, tokens).backward()
    once = weight.main_grad.clone()
    assert weight.grad is None
    assert weight.grad_added_to_main_grad
    assert torch.equal(once.to(dtype), plain.grad)  # the same sum, before it is rounded
    assert dtype == torch.float32 or not torch.equal(once, once.to(dtype).float())
    CALLS[name](hidden, weight, bias, tokens).backward()
    torch.testing.assert_close(weight.main_grad, 2 * once, rtol=1e-6, atol=1e-6)
    (-2.0 * CALLS[name](hidden, weight, bias, tokens)).backward()
    torch.testing.assert_close(weight.main_grad, torch.zeros(97, 16), rtol=0, atol=1e-5 * once.abs().max().item())


@pytest.mark.parametrize("name", CALLS)
def test_main_grad_of_a_frozen_weight_stays(name):
    hidden, weight, tokens, bias = random_head(70, 16, 97, bias=True)
    weight.main_grad = torch.zeros(97, 16)
    CALLS[name](hidden.requires_grad_(), weight, bias, tokens).backward()
    assert not weight.main_grad.any()
    assert not hasattr(weight, "grad_added_to_main_grad")
    assert hidden.grad.any()


def test_many_micro_batches_lose_nothing_in_main_grad():
    """What .grad in bf16 loses: small steps on a large sum."""
    hidden, weight, tokens, _ = random_head(64 * 8, 16, 97, torch.bfloat16)
    exact = weight.double().requires_grad_()
    logits = hidden.double() @ exact.T
    torch.nn.functional.cross_entropy(logits, tokens, reduction="sum").backward()
    in_grad, in_main_grad = (weight.clone().requires_grad_() for _ in range(2))
    in_main_grad.main_grad = torch.zeros(97, 16)
    for leaf in (in_grad, in_main_grad):
        for x, t in zip(hidden.split(8), tokens.split(8), strict=True):
            F.linear_cross_entropy(x, leaf, t, denominator=1.0)[0].backward()
    assert 4 * worst(in_main_grad.main_grad, exact.grad) < worst(in_grad.grad, exact.grad)


# ----------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("name", CALLS)
def test_autocast_is_the_cast_it_makes(name):
    hidden, weight, tokens, bias = random_head(70, 16, 97, bias=True)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    cast = [x.detach().bfloat16().requires_grad_() for x in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        loss = CALLS[name](*leaves, tokens)
        grads = torch.autograd.grad(loss, leaves)
    expected = CALLS[name](*cast, tokens)
    assert loss.dtype == torch.float32
    assert loss == expected
    for grad, other in zip(grads, torch.autograd.grad(expected, cast), strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, other.float())


def test_autocast_of_mixed_dtypes():
    """Hidden states that a bf16 layer made, of fp32 parameters; and nothing to do where all are bf16."""
    hidden, weight, tokens, _ = random_head(70, 16, 97)
    with pytest.raises(ValueError, match=r"weight: got dtype torch\.float32, wanted torch\.bfloat16"):
        F.linear_token_log_probs(hidden.bfloat16(), weight, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = F.linear_token_log_probs(hidden.bfloat16(), weight, tokens)
        same = F.linear_token_log_probs(hidden.bfloat16(), weight.bfloat16(), tokens)
    assert same_bits(mixed, same)


# ------------------------------------------------------------------------------------------------------------- errors

HEAD = {"hidden": torch.zeros(2, 3, 5), "weight": torch.zeros(7, 5), "tokens": torch.zeros(2, 3, dtype=torch.int64)}
TOKENWISE = {name: torch.zeros(2, 3) for name in ("old_log_probs", "advantages", "mask")}
WRONG_HEADS = [
    ({"hidden": torch.zeros(2, 3, 5, dtype=torch.float64)}, "hidden: got dtype float64, wanted float32"),
    ({"hidden": [[0.0]]}, "hidden: got list, wanted a torch.Tensor"),
    ({"hidden": torch.zeros(2, 3, 4)}, r"weight: got shape \(7, 5\), wanted \[V, 4\], V >= 1, for hidden \(2, 3, 4\)"),
    ({"hidden": torch.zeros(2, 5)}, r"tokens: got shape \(2, 3\), wanted \(2,\), the shape of hidden \(2, 5\) without"),
    ({"hidden": torch.zeros(2, 3, 0), "weight": torch.zeros(7, 0)}, r"weight: got shape \(7, 0\), wanted \[V, 1\]"),
    ({"weight": torch.zeros(0, 5)}, r"weight: got shape \(0, 5\), wanted \[V, 5\], V >= 1"),
    ({"weight": torch.zeros(35)}, r"weight: got shape \(35,\), wanted 2 dimensions"),
    ({"weight": torch.zeros(7, 5, dtype=torch.bfloat16)}, r"weight: got dtype torch\.bfloat16, wanted torch\.float32"),
    ({"weight": torch.zeros(7, 5, device="meta")}, "weight: got device meta, wanted cpu, the device of hidden"),
    ({"bias": torch.zeros(5)}, r"bias: got shape \(5,\), wanted \(7,\)"),
    ({"bias": torch.zeros(7, 1)}, r"bias: got shape \(7, 1\), wanted 1 dimension"),
    ({"bias": torch.zeros(7, dtype=torch.float16)}, r"bias: got dtype torch\.float16, wanted torch\.float32"),
    ({"bias": torch.zeros(7, device="meta")}, "bias: got device meta, wanted cpu"),
    ({"tokens": torch.zeros(2, 3, dtype=torch.int32)}, "tokens: got dtype int32, wanted int64"),
    ({"temperature": 0.0}, "temperature: got 0.0, wanted a finite number >= 1.17"),
    ({"temperature": -1}, "temperature: got -1"),
    ({"temperature": math.nan}, "temperature: got nan"),
    ({"temperature": 1e-50}, "temperature: got 1e-50"),
    ({"temperature": "hot"}, "temperature: got str, wanted a number"),
    ({"softcap": 0.0}, "softcap: got 0.0, wanted a finite number >= 1.17"),
    ({"softcap": -30}, "softcap: got -30"),
    ({"softcap": math.inf}, "softcap: got inf"),
    ({"softcap": 1e-50}, "softcap: got 1e-50"),
    ({"softcap": True}, "softcap: got bool, wanted a number"),
    ({"chunk_bytes": 0}, "chunk_bytes: got 0, wanted a positive number of bytes"),
    ({"chunk_bytes": 1e6}, r"chunk_bytes: got 1000000\.0"),
    ({"chunk_bytes": True}, "chunk_bytes: got True"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_HEADS)
@pytest.mark.parametrize(
    ("function", "more"),
    [
        (F.linear_token_log_probs, {}),
        (F.linear_token_log_probs_and_entropy, {}),
        (F.linear_cross_entropy, {}),
        (F.linear_ppo_loss, TOKENWISE),
    ],
)
def test_wrong_heads_are_named(function, more, change, message):
    with pytest.raises(ValueError, match=message):
        function(**(HEAD | more | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(2)}, r"advantages: got shape \(2,\), wanted \(2, 3\), the shape of tokens"),
        (
            {"old_log_probs": torch.zeros(2, 1)},
            r"old_log_probs: got shape \(2, 1\), wanted \(2, 3\), the shape of tokens",
        ),
        ({"old_log_probs": torch.zeros(2, 3, dtype=torch.float64)}, "old_log_probs: got dtype float64"),
        ({"mask": torch.ones(1, 3)}, r"mask: got shape \(1, 3\), wanted \(2, 3\), the shape of tokens"),
        ({"mask": None}, "mask: got NoneType, wanted a torch.Tensor"),
        ({"weights": torch.ones(3)}, r"weights: got shape \(3,\)"),
        ({"advantages": torch.zeros(2, 3, device="meta")}, "advantages: got device meta, wanted cpu"),
        ({"tokens": [[0]]}, "tokens: got list"),
        ({"advantage_stats": torch.ones(3)}, r"advantage_stats: got shape \(3,\), wanted \(2,\)"),
        ({"kl_coef": 0.1}, "ref_log_probs: got None, wanted a tensor, because kl_coef=0.1"),
        ({"aggregation": "mean"}, "aggregation: got 'mean', wanted one of 'token-mean'"),
        ({"ratio_level": "word"}, "ratio_level: got 'word'"),
        ({"kl_estimator": "k4"}, "kl_estimator: got 'k4'"),
        ({"clip_low": 1.1}, "clip_low: got 1.1"),
        ({"dual_clip": 1.0}, "dual_clip: got 1.0"),
        ({"entropy_coef": math.nan}, "entropy_coef: got nan"),
        ({"denominator": 0}, "denominator: got 0"),
        ({"denominator": torch.ones(2)}, r"denominator: got shape \(2,\), wanted one number"),
    ],
)
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_ppo_names_wrong_arguments(change, message, ratio_level):
    with pytest.raises(ValueError, match=message):
        F.linear_ppo_loss(**(HEAD | TOKENWISE | {"ratio_level": ratio_level} | change))


def test_sequences_are_needed_for_sequence_options():
    x = torch.zeros(6)
    call = (torch.zeros(6, 5), torch.zeros(7, 5), x.long(), x, x, x)
    for options in ({"aggregation": "seq-mean-token-sum"}, {"ratio_level": "sequence"}):
        with pytest.raises(ValueError, match=r"tokens: got shape \(6,\), wanted \[B, T\], because"):
            F.linear_ppo_loss(*call, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"variant": "ipo"}, ValueError, "variant: got 'ipo', wanted a variant of summed log-probs; see dpo_loss"),
        ({"variant": "kto"}, ValueError, "variant: got 'kto', wanted one of"),
        ({"beta": 0}, ValueError, "beta: got 0"),
        ({"label_smoothing": 0.5}, ValueError, "label_smoothing: got 0.5"),
        ({"cu_seqlens": torch.tensor([0, 3, 6, 6])}, ValueError, r"cu_seqlens: got shape \(4,\), wanted \(3,\)"),
        (
            {"cu_seqlens": torch.tensor([0.0, 3.0, 6.0])},
            ValueError,
            "cu_seqlens: got dtype float32, wanted int32, int64",
        ),
        ({"cu_seqlens": torch.tensor([0, 3, 6], device="meta")}, ValueError, "cu_seqlens: got device meta"),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, IndexError, r"cu_seqlens: got \[0, 3, 7\], wanted .* from 0 to 6"),
        (
            {"cu_seqlens": torch.tensor([0, 3, 5])},
            IndexError,
            r"cu_seqlens: got \[0, 3, 5\], wanted numbers that never",
        ),
        ({"cu_seqlens": torch.tensor([-3, 3, 6])}, IndexError, r"cu_seqlens: got \[-3, 3, 6\]"),
        ({"cu_seqlens": torch.tensor([0, 9, 6])}, IndexError, r"cu_seqlens: got \[0, 9, 6\]"),
        (
            {"ref_rejected": torch.zeros(2)},
            ValueError,
            r"ref_rejected: got shape \(2,\), wanted \(1,\), the shape of ref_",
        ),
        ({"ref_chosen": torch.zeros(1, device="meta")}, ValueError, "ref_chosen: got device meta, wanted cpu"),
        (
            {"tokens": torch.zeros(2, 3, dtype=torch.int64)},
            ValueError,
            r"tokens: got shape \(2, 3\), wanted 1 dimension",
        ),
        ({"hidden": torch.zeros(5, 5)}, ValueError, r"tokens: got shape \(6,\), wanted \(5,\), the shape of hidden"),
        ({"softcap": 0}, ValueError, "softcap: got 0"),
        ({"chunk_bytes": -1}, ValueError, "chunk_bytes: got -1"),
    ],
)
def test_dpo_names_wrong_arguments(change, error, message):
    head = {"hidden": torch.zeros(6, 5), "weight": torch.zeros(7, 5), "tokens": torch.zeros(6, dtype=torch.int64)}
    rest = {"cu_seqlens": torch.tensor([0, 3, 6]), "ref_chosen": torch.zeros(1), "ref_rejected": torch.zeros(1)}
    with pytest.raises(error, match=message):
        F.linear_dpo_loss(**(head | rest | change))


@pytest.mark.parametrize("token", [-1, 7, -101, 2**40, -(2**62)])
def test_tokens_outside_the_vocabulary(token):
    hidden, weight = torch.zeros(3, 5, requires_grad=True), torch.zeros(7, 5)
    tokens, ones = torch.tensor([0, token, 6]), torch.ones(3)
    message = rf"tokens: got {token} at position 1, wanted a token in \[0, 7\)"
    for call in (
        lambda: F.linear_token_log_probs(hidden, weight, tokens),
        lambda: F.linear_cross_entropy(hidden, weight, tokens),
        lambda: F.linear_ppo_loss(hidden, weight, tokens, ones, ones, ones),
        lambda: F.linear_dpo_loss(hidden, weight, tokens, torch.tensor([0, 1, 3]), ones[:1], ones[:1]),
    ):
        with pytest.raises(IndexError, match=message):
            call()
    masked = torch.tensor([1, 0, 1])
    assert F.linear_ppo_loss(hidden, weight, tokens, ones, ones, masked)[0].isfinite()


@pytest.mark.parametrize("name", CALLS)
def test_double_backward_and_forward_mode_are_refused(name):
    hidden, weight, tokens, bias = random_head(70, 16, 97, bias=True)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    plain, grads = (torch.autograd.grad(CALLS[name](*leaves, tokens), leaves, create_graph=c) for c in (False, True))
    for x, y in zip(plain, grads, strict=True):
        torch.testing.assert_close(x, y.detach())
        with pytest.raises(NotImplementedError, match="double backward is not implemented"):
            y.pow(2).sum().backward(retain_graph=True)
    head = [x.detach() for x in leaves]
    for i, x in enumerate(head):
        with pytest.raises(NotImplementedError, match="got a tangent, wanted none: forward-mode AD is not implemented"):
            torch.func.jvp(
                lambda y, i=i: CALLS[name](*head[:i], y, *head[i + 1 :], tokens), (x,), (torch.ones_like(x),)
            )


def test_meta_tensors_have_shapes():
    hidden, weight, tokens, bias = (x.to("meta") for x in random_head(70, 16, 97, torch.bfloat16, bias=True))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    log_probs = F.linear_token_log_probs(hidden, weight, tokens, bias=bias)
    assert log_probs.shape == (70,)
    assert log_probs.dtype == torch.float32
    x = torch.zeros(70, device="meta")
    losses = (
        F.linear_cross_entropy(hidden, weight, tokens, bias=bias)[0],
        F.linear_ppo_loss(hidden, weight, tokens, x, x, x, bias=bias)[0],
    )
    for loss in (log_probs.sum(), *losses):
        for grad, leaf in zip(torch.autograd.grad(loss, leaves), leaves, strict=True):
            assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)


# -------------------------------------------------------------------------------------------------------------- sizes


def test_more_than_65535_rows_liger_1294():
    hidden, weight, tokens, _ = random_head(70_001, 2, 3)
    hidden.requires_grad_()
    log_probs = F.linear_token_log_probs(hidden, weight, tokens)
    log_probs.sum().backward()
    expected = torch.log_softmax(hidden.detach() @ weight.T, -1)
    torch.testing.assert_close(log_probs.detach(), expected.gather(1, tokens[:, None])[:, 0])
    torch.testing.assert_close(hidden.grad, (torch.nn.functional.one_hot(tokens, 3) - expected.exp()) @ weight)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_offsets_beyond_two_to_the_31_liger_803(which):
    """4 GiB of address space, a few pages touched."""
    inputs = dict(zip(("hidden", "weight"), random_head(3, 16, 5, torch.bfloat16)[:2], strict=True))
    x, apart = inputs[which], 2**30 + 64
    memory = torch.empty((len(x) - 1) * apart + 16, dtype=torch.bfloat16)
    far = memory.as_strided(x.shape, (apart, 1))
    far.copy_(x)
    tokens, results = torch.tensor([0, 4, 2]), []
    for head in (inputs, inputs | {which: far}):
        leaves = [y.detach().requires_grad_() for y in head.values()]
        log_probs = F.linear_token_log_probs(*leaves, tokens)
        results.append((log_probs.detach(), *torch.autograd.grad(log_probs.sum(), leaves)))
    assert_same(*results)


@native
def test_no_more_of_the_logits_is_allocated_than_a_chunk():
    """41 MB they would take. Beside the chunk's: hidden states that were packed, and the statistics of segments."""
    n, h, v = 512, 16, 20_011
    hidden, weight, tokens, _ = random_head(n, h, v)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    gradients, a_chunk, scratch = 4 * (n + v) * h, 4 * 64 * v, 1 << 20
    with torch.no_grad():
        assert peak_allocation(lambda: F.linear_token_log_probs(hidden, weight, tokens, chunk_bytes=1)) < scratch
    log_probs = F.linear_token_log_probs(hidden, weight, tokens, chunk_bytes=1)
    backward = peak_allocation(lambda: torch.autograd.grad(log_probs, leaves, torch.ones(n)))
    assert gradients <= backward <= gradients + a_chunk + scratch
    loss = peak_allocation(lambda: F.linear_cross_entropy(hidden, weight, tokens, chunk_bytes=1))
    assert gradients <= loss <= gradients + a_chunk + scratch
    eager = peak_allocation(lambda: hidden @ weight.T)
    assert eager >= 4 * n * v > 3 * loss


# ------------------------------------------------------------------------------------------ torch.library and compile


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "contiguous"), (torch.bfloat16, "strided")])
def test_opcheck(dtype, layout):
    hidden, weight, bias, tokens, numbers, chunk = raw_head(dtype)
    if layout == "strided":
        wider = random_head(9, 8, 41, dtype)
        hidden, weight = wider[0][:, 1:6], wider[1][2:39, :5].T.contiguous().T
    head = (hidden, weight, bias, tokens, numbers, chunk)
    trained = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)] if layout == "contiguous" else None
    _, entropy, normaliser = ops.linear_token_log_probs(*head)
    g, k = torch.randn(9), torch.randn(9)
    opcheck = torch.library.opcheck
    for x, needs in ((head, (False,) * 4), ((*(trained or head[:3]), *head[3:]), (True, True, True, False))):
        opcheck(ops.linear_token_log_probs.default, x)
        opcheck(ops.linear_cross_entropy.default, (*x, torch.tensor(4.0), *needs))
        opcheck(ops.linear_ppo_loss.default, raw_ppo(x, *needs, sequences=True))
    for grad_entropy, needs in ((k, (True, True, True, False)), (None, (False, True, False, True))):
        saved = (normaliser, entropy, numbers, chunk, *needs)
        opcheck(ops.linear_token_log_probs_backward.default, (g, grad_entropy, *head[:4], *saved))
    opcheck(ops.linear_token_log_probs.default, (hidden, weight, None, tokens, numbers, chunk))


def step(hidden, weight, bias, tokens, old, advantages, mask, temperature=0.9, coefficient=0.1):
    head = {"bias": bias, "temperature": temperature, "softcap": 20 * temperature}
    hidden = hidden * 2
    log_probs, entropy = F.linear_token_log_probs_and_entropy(hidden, weight, tokens, **head)
    loss, stats = F.linear_ppo_loss(
        hidden, weight, tokens, old, advantages, mask, **head, entropy_coef=coefficient, denominator=11
    )
    cross_entropy, _ = F.linear_cross_entropy(hidden, weight, tokens, **head)
    refs = old[:, 0].chunk(2)
    ends = torch.arange(0, tokens.numel() + 1, tokens.shape[1])
    preferences, _ = F.linear_dpo_loss(hidden.flatten(0, 1), weight, tokens.flatten(), ends, *refs, **head)
    return (log_probs - 0.1 * entropy).sum() + loss + cross_entropy + preferences, stats.approx_kl


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    torch._dynamo.reset()
    (*head, tokens, old, advantages, mask), _ = random_ppo(4, 7, 16, 37, bias=True)
    function = step if backend == "aot_eager" else small_step
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in head]
        loss, kl = run(*leaves, tokens, old, advantages, mask)
        results.append((loss.detach(), kl, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)


def small_step(hidden, weight, bias, tokens, old, advantages, mask):
    """Less to compile."""
    loss, stats = F.linear_ppo_loss(hidden * 2, weight, tokens, old, advantages, mask, bias=bias, softcap=20)
    return loss * 2, stats.approx_kl


def test_new_lengths_and_numbers_compile_once_more_and_no_more():
    """Recompiling for every sequence length or temperature (Liger, TRL kernels)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i, length in enumerate((4, 7, 9, 12, 15)):
        call, _ = random_ppo(4, length, 16, 37, bias=True)
        numbers = (0.5 + i / 10, 0.1 + i / 10)
        torch.testing.assert_close(compiled(*call, *numbers), step(*call, *numbers))
    assert counter.frame_count == 2
