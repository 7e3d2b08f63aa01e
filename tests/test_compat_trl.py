"""fastrlhf.compat.trl beside TRL's own functions: values, gradients, dtypes, every option."""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext

import pytest
import torch
from compat_checks import assert_same, outcome
from compat_peers import OLDER_TRL, module
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from transformers import LlamaForCausalLM

import fastrlhf
from fastrlhf.bench import compat_training
from fastrlhf.bench.peers.base import keep
from fastrlhf.bench.settings import TINY
from fastrlhf.bench.sources import NotThere, definitions
from fastrlhf.compat import _patch, original
from fastrlhf.compat import trl as ours

pytestmark = pytest.mark.usefixtures("peers")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VERSIONS = ("1.12.0", "1.13.0", "1.14.2", "1.15.0")
# Of a sum of exponentials and its logarithm, each in fp32 or rounded once: half a dozen roundings.
ROUNDINGS = 6


@pytest.fixture(scope="module")
def utils(peers):
    return module("trl.trainer.utils")


@pytest.fixture(scope="module")
def kernel(utils):
    return module("trl.kernels.chunked_logprob").ChunkedLogProbFunction


@functools.cache
def older(version: str, file: str, names: tuple[str, ...]):
    """Functions of an older TRL, taken out of its file: to import all of them takes half a minute."""
    if not (OLDER_TRL / version).is_dir():
        pytest.skip(f"TRL {version} is not installed; `make .venv/.peers` does that")
    context = {"torch": torch, "F": torch.nn.functional, "_CHUNKED_LOGPROB_TOKEN_CHUNK_SIZE": 4096}
    context |= {"maybe_gather_lm_head_ctx": lambda *_: nullcontext(), "is_triton_available": lambda: False}
    context |= {"_fused_logprob_entropy": None, "_supports_trl_loss_kernel": lambda *_: False}
    return definitions(OLDER_TRL / version / "trl" / file, keep(*names), context)


def tensor(*shape: int, dtype=torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@st.composite
def logits_and_index(draw, more: bool = True):
    """(logits, index, temperature, row mask, the error that both sides may have)."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    vocabulary, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**16))
    dtype = FLOATS[draw(st.sampled_from(sorted(FLOATS)))]
    logits = tensor(*shape, vocabulary, dtype=dtype, scale=draw(st.sampled_from([0.0, 1.0, 30.0, 1000.0])), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    k = draw(st.sampled_from([(), (), (), (3,)])) if more else ()
    index = torch.randint(vocabulary, (*shape, *k), generator=generator)
    temperature = draw(st.sampled_from([1.0, 0.5, 1.7]))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    mask = draw(st.sampled_from([None, mask, mask.int()])) if not k else None
    if draw(st.booleans()):
        logits = logits[..., None].expand(*logits.shape, 2)[..., 0]  # a last stride that is not 1
    size = logits.abs().amax().item() / temperature
    atol = ROUNDINGS * torch.finfo(dtype).eps * (size + 4.0)
    return logits, index, temperature, mask, atol


@settings(deadline=None, max_examples=150)
@given(case=logits_and_index(), exact=st.booleans())
def test_selective_log_softmax(case, exact, utils):
    logits, index, temperature, mask, atol = case
    mine = outcome(lambda x: ours.selective_log_softmax(x, index, temperature, mask, exact_dtype=exact), [logits], [0])
    theirs = outcome(lambda x: utils.selective_log_softmax(x, index, temperature, mask), [logits], [0])
    assert_same(mine, theirs, atol, 4 * atol / temperature, dtypes=exact)
    assert mine[1][0].dtype == logits.dtype
    if not exact and index.dim() < logits.dim():
        assert mine[0][0].dtype == torch.float32


@settings(deadline=None, max_examples=100)
@given(case=logits_and_index(more=False), exact=st.booleans(), entropy_requires_grad=st.booleans())
def test_selective_log_softmax_and_entropy(case, exact, entropy_requires_grad, utils):
    logits, index, temperature, mask, atol = case
    options = (entropy_requires_grad, temperature, mask)
    mine = outcome(
        lambda x: ours.selective_log_softmax_and_entropy(x, index, *options, exact_dtype=exact), [logits], [0]
    )
    theirs = outcome(lambda x: utils.selective_log_softmax_and_entropy(x, index, *options), [logits], [0])
    # A probability has the relative error of its exponent; the entropy weights it by its logarithm.
    atol *= logits.abs().amax().item() / temperature + 4.0
    assert_same(mine, theirs, atol, 4 * atol / temperature, dtypes=exact)
    assert mine[0][1].requires_grad == theirs[0][1].requires_grad == entropy_requires_grad


@settings(deadline=None, max_examples=50)
@given(case=logits_and_index(more=False), exact=st.booleans(), chunk_size=st.sampled_from([1, 128]))
def test_entropy_from_logits(case, exact, chunk_size, utils):
    logits, _, _, _, atol = case
    atol *= logits.abs().amax().item() + 4.0
    mine = outcome(lambda x: ours.entropy_from_logits(x, chunk_size, exact_dtype=exact), [logits], [0])
    theirs = outcome(lambda x: utils.entropy_from_logits(x, chunk_size), [logits], [0])
    assert_same(mine, theirs, atol, 4 * atol, dtypes=exact)


def test_extreme_logits(utils):
    """Impossible tokens and rows without any; where TRL has nan for an entropy, ours has the number."""
    logits = tensor(5, 7)
    logits[0, 3] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 2] = torch.inf
    logits[3, 1] = torch.nan
    logits[4, 0] = 3e38
    index = torch.tensor([3, 0, 2, 2, 0])
    ours_, theirs = ours.selective_log_softmax(logits, index), utils.selective_log_softmax(logits, index)
    torch.testing.assert_close(ours_, theirs, atol=0.0, rtol=1e-6, equal_nan=True)
    assert utils.entropy_from_logits(logits)[0].isnan()
    p = logits[0].double().softmax(-1)
    assert ours.entropy_from_logits(logits)[0].item() == pytest.approx(torch.special.entr(p).sum().item(), rel=1e-6)


def test_what_stands_under_the_row_mask_changes_nothing():
    logits, index = tensor(4, 9), torch.arange(4)
    mask = torch.tensor([1, 0, 1, 0])
    poisoned = logits.clone()
    poisoned[1], poisoned[3] = torch.nan, torch.inf
    for function in (ours.selective_log_softmax, ours.selective_log_softmax_and_entropy):
        clean, other = (outcome(lambda x, f=function: f(x, index, row_mask=mask), [x], [0]) for x in (logits, poisoned))
        for a, b in zip(clean[0] + clean[1], other[0] + other[1], strict=True):
            assert torch.equal(a, b)


def test_temperatures_are_positive(utils):
    for function in (ours.selective_log_softmax, utils.selective_log_softmax):
        with pytest.raises(ValueError, match="temperature"):
            function(tensor(2, 3), torch.tensor([0, 1]), temperature=0.0)


def test_fp64_goes_to_trl(utils):
    logits, index = tensor(3, 8).double(), torch.tensor([1, 2, 3])
    with fastrlhf.patch("trl"):
        found = utils.selective_log_softmax(logits, index, temperature=2.0)
        both = utils.selective_log_softmax_and_entropy(logits, index)
        entropy = utils.entropy_from_logits(logits)
    assert found.dtype == both[0].dtype == entropy.dtype == torch.float64
    assert torch.equal(found, utils.selective_log_softmax(logits, index, temperature=2.0))
    torch.testing.assert_close(entropy, both[1])


def test_under_torch_compile():
    logits, hidden, weight, index = tensor(4, 9), tensor(4, 5), tensor(9, 5), torch.arange(4)
    outputs = ("entropy", "mean_logits", "is_top1")
    calls = [
        (lambda x: ours.selective_log_softmax(x, index, 0.7), [logits]),
        (lambda x: ours.selective_log_softmax_and_entropy(x, index, True, 0.7), [logits]),
        (lambda *x: ours.ChunkedLogProbFunction.apply(*x, None, index, 0.7, 8, 5.0, 2.0, outputs), [hidden, weight]),
    ]
    for function, inputs in calls:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = (outcome(f, inputs, range(len(inputs))) for f in (compiled, function))
        assert_same(*results, 1e-6, 1e-6)


def test_signatures(utils, kernel):
    """Theirs, and what their versions do not have stands behind, with a default."""
    for name in ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"):
        assert_signature(getattr(ours, name), getattr(utils, name))
    assert_signature(ours.ChunkedLogProbFunction.apply, kernel.forward, skip=1)


def assert_signature(mine, theirs, skip: int = 0) -> None:
    expected = list(inspect.signature(theirs).parameters.values())[skip:]
    found = list(inspect.signature(mine).parameters.values())
    assert [(x.name, x.default) for x in found[: len(expected)]] == [(x.name, x.default) for x in expected]
    assert all(x.default is not x.empty for x in found[len(expected) :])


@st.composite
def heads(draw):
    """(hidden, weight, bias, targets, temperature, chunk size, softcap, scale, the error that both sides may have)."""
    n, size, vocabulary = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(1, 30))
    dtype = FLOATS[draw(st.sampled_from(["fp32", "bf16"]))]
    spread = draw(st.sampled_from([0.1, 1.0, 5.0]))
    hidden, weight = tensor(n, size, dtype=dtype, seed=1), tensor(vocabulary, size, dtype=dtype, scale=spread, seed=2)
    bias = draw(st.sampled_from([None, tensor(vocabulary, dtype=dtype, seed=3)]))
    targets = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    temperature, chunk_size = draw(st.sampled_from([1.0, 0.6])), draw(st.sampled_from([7, 32768]))
    softcap, scale = draw(st.sampled_from([None, 5.0])), draw(st.sampled_from([1.0, 0.25, 2.0]))
    z = hidden.double() @ weight.double().T
    largest = ((z if bias is None else z + bias).abs().amax().item()) * scale / temperature
    atol = ROUNDINGS * torch.finfo(dtype).eps * (largest + size + 4.0)
    return hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, atol


def grad_atol(case, atol: float) -> float:
    """Of gradients: sums over the vocabulary or the tokens of products with weights or hidden states."""
    hidden, weight, *_, temperature, _, _, scale, _ = case
    factor = max(hidden.abs().amax().item(), weight.abs().amax().item(), 1.0) * scale / temperature
    return 4 * atol * factor * max(hidden.shape[0], weight.shape[0]) ** 0.5


@settings(deadline=None, max_examples=150)
@given(
    case=heads(),
    outputs=st.lists(st.sampled_from(("log_probs", *ours.OPTIONAL_OUTPUTS)), unique=True).map(tuple),
)
def test_chunked_log_probs(case, outputs, kernel):
    *head, atol = case
    leaves = [0, 1] + ([2] if head[2] is not None else [])
    mine = outcome(lambda *x: ours.ChunkedLogProbFunction.apply(*x, outputs), head, leaves)
    theirs = outcome(lambda *x: kernel.apply(*x, outputs), head, leaves)
    if head[0].dtype != torch.float32:  # of equal logits, rounding decides which is the largest
        mine[0][4] = theirs[0][4]
    spread = atol / ROUNDINGS / torch.finfo(head[0].dtype).eps  # of a logit, by which the entropy weights its error
    assert_same(mine, theirs, atol * spread, grad_atol(case, atol * spread))
    log_probs_alone = outcome(lambda *x: ours.ChunkedLogProbFunction.apply(*x, ())[0], head, leaves)
    reference = outcome(lambda *x: kernel.apply(*x, ())[0], head, leaves)
    assert_same(log_probs_alone, reference, atol, grad_atol(case, atol))


@pytest.mark.parametrize("version", VERSIONS)
def test_older_versions_have_the_names_and_signatures(version):
    """All places are where `patch` will look for them, with parameters that ours have too."""
    for place in _patch._expected(ours, version):
        file, _, name = place.removeprefix("trl.").replace(".", "/").rpartition("/")
        context = {"OPTIONAL_OUTPUTS": ours.OPTIONAL_OUTPUTS}
        theirs = (
            definitions(OLDER_TRL / version / "trl" / f"{file}.py", keep(name), context | {"torch": torch})[name]
            if (OLDER_TRL / version).is_dir()
            else pytest.skip(f"TRL {version} is not installed")
        )
        if not isinstance(theirs, type):
            assert_signature(ours.REPLACEMENTS[place], theirs)
        elif name == "ChunkedLogProbFunction":
            assert_signature(ours.REPLACEMENTS[place].apply, theirs.forward, skip=1)


@pytest.mark.parametrize("version", ["1.12.0", "1.13.0", "1.14.2"])
@settings(deadline=None, max_examples=40)
@given(case=heads())
def test_chunked_log_probs_of_older_versions(case, version):
    theirs = older(version, "trainer/utils.py", ("_ChunkedLogProbFunction",))["_ChunkedLogProbFunction"]
    *head, atol = case
    spread = atol / ROUNDINGS / torch.finfo(head[0].dtype).eps
    if version == "1.12.0":  # without a bias, and its entropy has no gradient
        del head[2]
        mine, reference = (
            outcome(lambda *x, f=f: (f(*x)[0], f(*x)[1].detach()), head, [0, 1])
            for f in (ours._ChunkedLogProbFunction.apply, theirs.apply)
        )
    else:
        leaves = [0, 1] + ([2] if head[2] is not None else [])
        mine, reference = (outcome(f.apply, head, leaves) for f in (ours._ChunkedLogProbFunction, theirs))
    assert_same(mine, reference, atol * spread, grad_atol(case, atol * spread))


def test_defaults_of_older_versions():
    hidden, weight, targets = tensor(3, 4), tensor(9, 4), torch.tensor([1, 2, 8])
    expected = ours.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.5, 4)[:2]
    for arguments in ((hidden, weight, targets, 0.5, 4), (hidden, weight, None, targets, 0.5, 4)):
        for a, b in zip(ours._ChunkedLogProbFunction.apply(*arguments), expected, strict=True):
            assert torch.equal(a, b)
    capped = ours._ChunkedLogProbFunction.apply(hidden, weight, targets, 0.5, 4, 2.0, 3.0)[0]
    assert torch.equal(capped, ours.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.5, 4, 2.0, 3.0)[0])


class TestHeads:
    """What add_fused_lm_head does around the function."""

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "cast_lm_head_to_fp32": True}])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_model(self, utils, options, dtype):
        model = LlamaForCausalLM(tiny_config()).to(dtype)
        labels = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
        ids = labels.clone()
        labels[0, :4] = labels[1, 7:] = -100
        outputs = ("log_probs", *ours.OPTIONAL_OUTPUTS)
        found = []
        for patched in (False, True):
            with fastrlhf.patch("trl") if patched else nullcontext():
                utils.add_fused_lm_head(model, outputs=outputs, **options)
                result = model(input_ids=ids, labels=labels, fused_lm_head=True)
                result.loss.backward()
            del model.forward
            grads = [x.grad.clone() for x in model.parameters() if x.grad is not None]
            model.zero_grad()
            fields = [getattr(result, name) for name in ("loss", "log_probs", *ours.OPTIONAL_OUTPUTS[:-1])]
            found.append((fields, grads))
            assert result.is_top1.dtype == torch.bool
        atol = ROUNDINGS * torch.finfo(dtype).eps * 10
        assert_same(*found, atol, atol)

    def test_autocast_and_mixed_dtypes(self, kernel):
        hidden, weight, targets = tensor(5, 8), tensor(20, 8), torch.arange(5)
        for inputs, context in (
            ((hidden, weight), torch.autocast("cpu", torch.bfloat16)),
            ((hidden.bfloat16(), weight), nullcontext()),
            ((hidden, weight.bfloat16()), nullcontext()),
        ):
            with context:
                mine, theirs = (
                    outcome(
                        lambda h, w, f=f: f.apply(h, w, None, targets, 1.0, 8, None, 1.0, ("entropy",)), inputs, [0, 1]
                    )
                    for f in (ours.ChunkedLogProbFunction, kernel)
                )
            assert_same(mine, theirs, 0.2, 0.2)

    def test_no_tokens_keep_the_graph(self):
        hidden = torch.zeros(0, 4, requires_grad=True)
        log_probs = ours.ChunkedLogProbFunction.apply(hidden, tensor(6, 4), None, torch.zeros(0).long(), 1.0, 8)[0]
        log_probs.sum().backward()
        assert hidden.grad.shape == (0, 4)

    def test_a_frozen_head_costs_no_gradient(self):
        hidden, weight = tensor(3, 4).requires_grad_(), tensor(6, 4)
        ours.ChunkedLogProbFunction.apply(hidden, weight, None, torch.arange(3), 1.0, 8)[0].sum().backward()
        assert hidden.grad is not None
        assert weight.grad is None

    def test_what_is_left_to_trl(self, kernel, monkeypatch):
        """fp64, a scale of 0, and weights that ZeRO-3 has to gather in the backward pass."""
        asked = []
        theirs = type("Theirs", (), {"apply": staticmethod(lambda *x: asked.append(len(x)))})
        monkeypatch.setattr(ours, "original", lambda place: theirs)
        weight, sharded = tensor(6, 4), torch.nn.Parameter(tensor(6, 4))
        sharded.ds_id = 1
        rest = (None, torch.arange(3), 1.0, 8)
        ours.ChunkedLogProbFunction.apply(tensor(3, 4).double(), weight.double(), *rest)
        ours.ChunkedLogProbFunction.apply(tensor(3, 4), weight, *rest, None, 0.0)
        ours.ChunkedLogProbFunction.apply(tensor(3, 4), sharded, *rest)
        ours._ChunkedLogProbFunction.apply(tensor(3, 4), sharded, *rest)
        assert asked == [9, 9, 9, 6]


@pytest.mark.parametrize("trainer", compat_training.TRAINERS)
def test_trainers_make_the_same_steps(trainer, utils, tmp_path, monkeypatch):
    """Patched against unpatched, 5 steps of a tiny model: what they log is the same up to rounding."""
    calls = []
    scored = ours._log_probs
    monkeypatch.setattr(ours, "_log_probs", lambda *x: (calls.append(1), scored(*x))[1])
    plans = [compat_training.Plan(trainer, patched, TINY.training, 1) for patched in (False, True)]
    theirs = compat_training.train(plans[0], str(tmp_path))
    assert not calls
    found = compat_training.train(plans[1], str(tmp_path))
    assert len(calls) >= len(found["logs"]) == len(theirs["logs"]) == TINY.training.steps
    # Adam divides a gradient by its size, so a rounding can be as large as a step of the learning rate, 1e-4, here.
    assert compat_training.difference(found["logs"], theirs["logs"]) < TINY.training.steps * 1e-4
    assert (theirs["bound"], found["bound"] > 3) == (0, True)
    assert found["peak_mib"] > 100
    assert len(found["ms"]) == TINY.training.steps


@st.composite
def values_and_mask(draw):
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 9)))
    seed = draw(st.integers(0, 2**16))
    values = tensor(*shape, dtype=FLOATS[draw(st.sampled_from(["fp32", "bf16"]))], seed=seed)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.3, 0.8, 1.0]))
    return values, draw(st.sampled_from([mask, mask, mask.float(), 0.5 * mask.float()]))


@settings(deadline=None, max_examples=60)
@given(case=values_and_mask(), axis=st.sampled_from([None, 0, 1, -1, (0, 1)]), flag=st.booleans())
def test_masked_statistics_of_1_12(case, axis, flag):
    theirs = older("1.12.0", "experimental/ppo/ppo_trainer.py", ("masked_mean", "masked_var", "masked_whiten"))
    values, mask = case
    eps = torch.finfo(values.dtype).eps
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ours, "original", lambda place: theirs[place.rpartition(".")[2]])
        results = [
            outcome(lambda x, f=f: f(x, mask, axis), [values], [0]) for f in (ours.masked_mean, theirs["masked_mean"])
        ]
        if (mask.sum() if axis is None else mask.sum(axis)).count_nonzero() < results[0][0][0].numel():
            results = [(values, []) for values, _ in results]  # of a mean of nothing, TRL's gradient is nan as well
        assert_same(*results, 8 * eps, 8 * eps)
        if mask.sum() < 2:
            return
        for name in ("masked_var", "masked_whiten"):
            pair = (getattr(ours, name), theirs[name])
            results = [outcome(lambda x, f=f: f(x, mask, flag), [values], [0]) for f in pair]
            # Whitened values of two positions are +-1/sqrt(2) by nearly equal numbers: their spread divides the error.
            spread = values[mask != 0].float().std().item()
            limit = 40 * eps * (1 + spread**2) * max(1.0, 1 / (spread**2 + 1e-4)) ** 2
            assert_same(*results, limit, limit)


def test_masked_statistics_of_nothing():
    values, mask = tensor(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert ours.masked_mean(values, mask).isnan()
    assert ours.masked_mean(values, mask, 1).isnan().all()
    with pytest.raises(ValueError, match="mask: got no 1"):
        ours.masked_var(values, mask)


def test_original_finds_theirs_patched_or_not(utils):
    place = "trl.trainer.utils.selective_log_softmax"
    theirs = utils.selective_log_softmax
    assert original(place) is theirs
    with fastrlhf.patch("trl"):
        assert utils.selective_log_softmax is ours.selective_log_softmax
        assert original(place) is theirs


def test_the_names_are_gone_in_none_of_the_versions():
    with pytest.raises(NotThere):
        older("1.13.0", "trainer/utils.py", ("no_such_name",))
