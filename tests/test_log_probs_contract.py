"""token_log_probs: what others got wrong, argument errors, determinism, torch.library and torch.compile."""

import math
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from oracle import random_logits, same_bits

from fastrlhf import backends, reference
from fastrlhf import functional as F

ops = torch.ops.fastrlhf


@pytest.mark.parametrize("vocabulary", [2047, 2048, 2049, 4097, 6143, 32003])
def test_vocabulary_not_a_multiple_of_the_block_verl_2656(vocabulary):
    """An unmasked tail adds phantom exp(0): seen most where all logits are far below 0."""
    logits = torch.full((2, vocabulary), -80.0)
    log_probs, entropy = F.token_log_probs_and_entropy(logits, torch.tensor([0, vocabulary - 1]))
    expected = torch.log(torch.tensor(float(vocabulary)))
    torch.testing.assert_close(log_probs, -expected.expand(2))
    torch.testing.assert_close(entropy, expected.expand(2))


def test_all_logits_negative_skyrl_2141():
    """A running maximum that starts at 0 underflows every term."""
    logits, tokens = random_logits(4, 3000)
    log_probs, entropy = F.token_log_probs_and_entropy(logits - 500.0, tokens)
    exact = reference.token_log_probs_and_entropy((logits - 500.0).double(), tokens)
    torch.testing.assert_close(log_probs.double(), exact[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-6, atol=1e-5)


def test_rising_logits_rescale_the_running_sum():
    logits = torch.linspace(-300, 300, 50_000).expand(2, -1).contiguous()
    tokens = torch.tensor([49_999, 40_000])
    ours = F.token_log_probs_and_entropy(logits, tokens)
    exact = reference.token_log_probs_and_entropy(logits.double(), tokens)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-6, atol=1e-5)


def test_offsets_beyond_two_to_the_31_liger_803():
    rows_apart, vocabulary = 2**31 + 64, 515
    memory = torch.empty(rows_apart + vocabulary, dtype=torch.bfloat16)  # 4 GiB of address space, two pages touched
    logits = memory.as_strided((2, vocabulary), (rows_apart, 1))
    values, tokens = random_logits(2, vocabulary, dtype=torch.bfloat16)
    logits.copy_(values)
    assert same_bits(F.token_log_probs(logits, tokens), F.token_log_probs(values, tokens))


def test_more_than_65535_rows_liger_1294():
    logits, tokens = random_logits(70_001, 3)
    logits.requires_grad_()
    log_probs = F.token_log_probs(logits, tokens)
    log_probs.sum().backward()
    expected = torch.log_softmax(logits.detach(), -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs.detach(), expected)
    assert logits.grad[-1].abs().sum() > 0


def test_entropy_has_a_gradient_trl_5597():
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    F.token_log_probs_and_entropy(logits, torch.tensor([0]))[1].sum().backward()
    exact = logits.detach().double().requires_grad_()
    reference.token_log_probs_and_entropy(exact, torch.tensor([0]))[1].sum().backward()
    assert logits.grad.abs().max() > 0.1
    torch.testing.assert_close(logits.grad.double(), exact.grad)


def test_entropy_is_at_the_temperature_of_the_log_probs_openrlhf():
    logits, tokens = random_logits(3, 50)
    _, entropy = F.token_log_probs_and_entropy(logits, tokens, temperature=0.5)
    p = torch.softmax(logits / 0.5, -1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))


def test_log_probs_are_not_rounded_to_bf16_verl_5662():
    logits, tokens = random_logits(64, 500, dtype=torch.bfloat16)
    log_probs = F.token_log_probs(logits, tokens)
    assert log_probs.dtype == torch.float32
    assert not torch.equal(log_probs, log_probs.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch_verl_7704(dtype):
    logits, tokens = random_logits(33, 4111, dtype=dtype)
    batch = F.token_log_probs_and_entropy(logits, tokens)
    for i in (0, 13, 32):
        alone = F.token_log_probs_and_entropy(logits[i : i + 1], tokens[i : i + 1])
        assert all(same_bits(a[i : i + 1], b) for a, b in zip(batch, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 512.0])
def test_a_rows_gradient_does_not_depend_on_its_batch(dtype, shift):
    logits, tokens = random_logits(33, 4111, dtype=dtype)
    g, h = torch.randn(2, 33)

    def gradient(rows):
        leaf = (logits[rows] + shift).requires_grad_()
        log_probs, entropy = F.token_log_probs_and_entropy(leaf, tokens[rows], temperature=0.8)
        return torch.autograd.grad((log_probs, entropy), leaf, (g[rows], h[rows]))[0]

    batch = gradient(slice(0, 33))
    for i in (0, 13, 32):
        assert torch.equal(batch[i], gradient(slice(i, i + 1))[0])


def test_the_number_of_threads_changes_no_bit():
    logits, tokens = random_logits(37, 4111)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(F.token_log_probs_and_entropy(logits, tokens))
    torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_autocast_changes_no_bit():
    logits, tokens = random_logits(4, 500, dtype=torch.bfloat16)
    results = []
    for enabled in (False, True):
        leaf = logits.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = F.token_log_probs_and_entropy(leaf, tokens)
        assert all(x.dtype == torch.float32 for x in outputs)
        results.append((*outputs, torch.autograd.grad(sum(x.sum() for x in outputs), leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("token", [-1, 5, -101, 2**40])
def test_the_reference_refuses_tokens_outside_the_vocabulary_too(token):
    tokens = torch.tensor([0, token])
    for function in (reference.token_log_probs, reference.token_log_probs_and_entropy):
        with pytest.raises(IndexError, match=rf"tokens: got {token} at position 1, wanted a token in \[0, 5\)"):
            function(torch.zeros(2, 5), tokens)


def test_the_reference_gives_nan_for_such_a_token_where_it_may_not_raise(monkeypatch):
    """Reading the tokens of another device would stall it, and a gather out of bounds would end the process."""
    monkeypatch.setattr(reference, "check_tokens", lambda *_: None)
    tokens = torch.tensor([1, 5, -1, -100, 2**40])
    log_probs = reference.token_log_probs(torch.zeros(5, 5), tokens)
    assert log_probs.isnan().tolist() == [False, True, True, False, True]
    ones, logits = torch.ones(5), torch.zeros(5, 5)
    normaliser = torch.tensor([0.0, math.log(5)]).expand(5, 2)
    grad = reference.token_log_probs_and_entropy_backward(ones, None, logits, tokens, normaliser, None, 1.0)
    torch.testing.assert_close(grad[1], torch.full((5,), -0.2))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x[:1].expand(3, 7), r"logits: got shape \(3, 7\) with strides \(0, 1\), wanted rows that do not"),
        (
            lambda x: x.flatten().as_strided((3, 7), (5, 1)),
            r"logits: .* with strides \(5, 1\), wanted rows that do not",
        ),
        (
            lambda x: x[:, None].expand(3, 2, 7),
            "logits: .* wanted rows that do not overlap, because inplace_backward=True",
        ),
        (lambda x: x.detach().clone().requires_grad_(), "logits: got a leaf that requires grad"),
        (lambda x: x.detach().clone().requires_grad_().view(3, 7), "logits: got a leaf that requires grad"),
    ],
)
def test_inplace_backward_refuses_what_it_would_spoil(make, message, entropy):
    logits = make(torch.randn(3, 7, requires_grad=True) * 1)
    tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        (F.token_log_probs_and_entropy if entropy else F.token_log_probs)(logits, tokens, inplace_backward=True)


def test_inplace_backward_takes_every_layout_whose_rows_lie_apart():
    base = torch.randn(4, 6, 9, requires_grad=True) * 1
    for logits in (base, base[:, :-1], base.transpose(0, 1), base[1::2, ::3, 2:7], base[:1, :, :3], base[..., :1]):
        tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        assert F.token_log_probs(logits, tokens, inplace_backward=True).requires_grad


@pytest.mark.parametrize("token", [-1, 5, -101, 2**40])
def test_tokens_outside_the_vocabulary(token):
    with pytest.raises(IndexError, match=rf"tokens: got {token} at position 1, wanted a token in \[0, 5\)"):
        F.token_log_probs(torch.zeros(2, 5), torch.tensor([0, token]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 5, dtype=torch.float64)}, "logits: got dtype float64, wanted float32"),
        ({"logits": [[0.0]]}, "logits: got list, wanted a torch.Tensor"),
        ({"logits": torch.zeros(2, 5)}, r"tokens: got shape \(2, 3\), wanted \(2,\)"),
        ({"logits": torch.zeros(2, 3, 0)}, "wanted at least one entry in the vocabulary"),
        ({"logits": torch.zeros(2, 5, 3).mT}, "last stride of 1"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.int32)}, "tokens: got dtype int32, wanted int64"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens: got shape \(3,\), wanted \(2, 3\)"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "tokens: got device meta, wanted cpu"),
        ({"temperature": 0.0}, "temperature: got 0.0, wanted a finite number >= 1.17"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": 4e38}, "temperature: got 4e"),
        ({"temperature": 1e-39}, "temperature: got 1e-39"),
        ({"temperature": 1e-50}, "temperature: got 1e-50"),
        ({"temperature": [1.0]}, "temperature: got list, wanted a number"),
        ({"temperature": True}, "temperature: got bool, wanted a number"),
        ({"temperature": "hot"}, "temperature: got str, wanted a number"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"logits": torch.zeros(2, 3, 5), "tokens": torch.zeros(2, 3, dtype=torch.int64)} | change
    for function in (F.token_log_probs, F.token_log_probs_and_entropy):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    logits, tokens = random_logits(3, 4, 37, dtype=dtype)
    tokens[0, 0] = -100
    g, h = torch.randn(3, 4), torch.randn(3, 4)
    _, entropy, normaliser = ops.token_log_probs_and_entropy(logits, tokens, torch.tensor([0.9]))
    for view in (logits, logits[:, :-1]):
        n = view.shape[1]
        t, saved = tokens[:, :n], (normaliser[:, :n], entropy[:, :n])
        leaf = view.clone().requires_grad_() if view is logits else view
        torch.library.opcheck(ops.token_log_probs.default, (leaf, t, torch.tensor([0.9])))
        torch.library.opcheck(ops.token_log_probs_and_entropy.default, (leaf, t, torch.tensor([0.9])))
        backward = (g[:, :n], view.clone(), t, saved[0], torch.tensor([0.9]))
        torch.library.opcheck(ops.token_log_probs_backward.default, backward)
        torch.library.opcheck(ops.token_log_probs_backward_.default, backward)
        backward = (g[:, :n], h[:, :n], view.clone(), t, *saved, torch.tensor([0.9]))
        torch.library.opcheck(ops.token_log_probs_and_entropy_backward.default, backward)
        torch.library.opcheck(ops.token_log_probs_and_entropy_backward_.default, backward)


def step(logits, tokens, temperature, inplace):
    log_probs, entropy = F.token_log_probs_and_entropy(
        logits * 2, tokens, temperature=temperature, inplace_backward=inplace
    )
    return (log_probs * 2 - 0.1 * entropy).sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_as_one_graph(backend, inplace):
    if backend == "inductor" and inplace:
        pytest.skip("the same graph as without inplace; compiling it twice tests nothing")
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    logits, tokens = random_logits(3, 4, 37)
    grads = []
    for function in (step, compiled):
        leaf = logits.clone().requires_grad_()
        function(leaf, tokens, 0.9, inplace).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_new_lengths_compile_once_more_and_no_more():
    """Recompiling for every sequence length (Liger, TRL kernels). A new temperature does recompile: torch.compile takes
    the float arguments of any op as constants."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in (4, 7, 9, 12, 15, 18):
        logits, tokens = random_logits(3, length, 37)
        torch.testing.assert_close(compiled(logits, tokens, 0.9, False), step(logits, tokens, 0.9, False))
    assert counter.frame_count == 2


def available_memory() -> int:
    """Bytes that can be had without swapping (Linux; 0 where nobody says)."""
    try:
        return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    except OSError:
        return 0


@pytest.mark.skipif(backends.REFERENCE_FORCED, reason="plain PyTorch would need 40 GB")
@pytest.mark.skipif(available_memory() < 9 << 30, reason="needs 9 GB of memory")
def test_more_than_2_31_elements_liger_803():
    """Offsets of 32 bits would wrap around. Rows that do not count are not read, which keeps this fast."""
    anchor = torch.zeros((), dtype=torch.bfloat16, requires_grad=True)
    logits = torch.zeros(2**15 + 2, 2**16, dtype=torch.bfloat16)
    tokens = torch.full((len(logits),), -100)
    rows = [0, 2**15 - 1, 2**15, 2**15 + 1]
    some, tokens[rows] = random_logits(4, 2**16, dtype=torch.bfloat16)
    logits[rows] = some
    results = [
        F.token_log_probs_and_entropy(x, t, inplace_backward=True)
        for x, t in ((_Attached.apply(logits, anchor), tokens), (_Attached.apply(some, anchor), tokens[rows]))
    ]
    big, small = map(torch.stack, results)
    assert same_bits(big[:, rows].detach(), small.detach())
    assert not big[:, 1 : 2**15 - 1].any()
    (big.sum() + small.sum()).backward()
    assert torch.equal(logits[rows].view(torch.int16), some.view(torch.int16))
    assert not logits[1].any()


class _Attached(torch.autograd.Function):
    """x itself, as the result of an operation on `anchor`: the memory that a gradient may be written over."""

    @staticmethod
    def forward(ctx, x, anchor):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return None, None
