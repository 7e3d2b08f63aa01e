"""fastrlhf.compat.liger beside Liger's own functions: values, gradients, metrics, every option.

What Liger has for GPUs alone runs in Triton's interpreter, in a child process (`python tests/test_compat_liger.py`).
"""

from __future__ import annotations

import inspect
import itertools
import json
import sys
import traceback

import pytest
import torch
from compat_checks import assert_same, outcome
from compat_peers import module, peers_on_path
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import run_checks

import fastrlhf
from fastrlhf.compat import liger as ours
from fastrlhf.compat._liger_dpo import TYPES
from fastrlhf.compat._liger_grpo import PPO_LIKE, WEIGHTED

pytestmark = pytest.mark.usefixtures("peers")
LOSS_TYPES = (*PPO_LIKE, "luspo", *WEIGHTED)
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of a loss that sums some dozens of ratios, each with the error of a log-probability in the exponent.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}


@pytest.fixture(scope="module")
def liger(peers):
    return module("liger_kernel.chunked_loss")


def tensor(*shape: int, dtype=torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def random_mask(batch: int, length: int, share: float, seed: int) -> torch.Tensor:
    """With gaps; a row may be empty."""
    return (torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share).int()


@st.composite
def grpo_cases(draw):
    """(module options, forward arguments, leaves)."""
    batch, length, size, vocabulary = (draw(st.integers(1, most)) for most in (4, 6, 5, 20))
    dtype = FLOATS[draw(st.sampled_from(["fp32", "fp32", "bf16"]))]
    seed = draw(st.integers(0, 2**16))
    loss_type = draw(st.sampled_from(LOSS_TYPES))
    level = "token" if loss_type in WEIGHTED else draw(st.sampled_from(["token", "token", "sequence"]))
    plain = draw(st.booleans())
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": draw(st.sampled_from([0.0, 0.04, 0.5])),
        "epsilon_low": draw(st.sampled_from([0.1, 0.2])),
        "epsilon_high": draw(st.sampled_from([0.2, 0.5, 3.0])),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "max_completion_length": length + 2,
        "use_ref_model": draw(st.booleans()),
        "chunk_size": draw(st.integers(1, 3)),
        "delta": None if plain else draw(st.sampled_from([None, 1.1])),
        "use_bias_correction_kl": False if plain else draw(st.booleans()),
        "sapo_temperature_pos": draw(st.sampled_from([1.0, 0.5])),
        "vespo_k_pos": draw(st.sampled_from([2.0, 1.0])),
    }
    hidden, weight = tensor(batch, length, size, dtype=dtype, seed=seed), tensor(vocabulary, size, dtype=dtype, seed=1)
    bias = draw(st.sampled_from([None, tensor(vocabulary, dtype=dtype, seed=2)]))
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = random_mask(batch, length, draw(st.sampled_from([0.3, 0.8, 1.0])), seed)
    logits = hidden.float() @ weight.float().T + (0.0 if bias is None else bias.float())
    log_probs = (logits / options["temperature"]).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    near = [log_probs + tensor(batch, length, scale=scale, seed=3 + i) for i, scale in enumerate((0.4, 0.3))]
    by_hidden = options["use_ref_model"] and draw(st.booleans())
    reference = (tensor(batch, length, size, dtype=dtype, seed=5), tensor(vocabulary, size, dtype=dtype, seed=6), None)
    ratios = 1 + 0.3 * torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    ratio = draw(st.sampled_from([None, None, ratios, ratios[:, :1], ratios[:, 0]]))
    arguments = [
        *(hidden, weight, tokens, mask, tensor(batch, seed=4), bias),
        *(None if by_hidden else near[0], draw(st.sampled_from([None, near[1], near[1]]))),
        *(reference if by_hidden else (None, None, None)),
        *(ratio, draw(st.sampled_from([None, None, 7.0]))),
    ]
    return options, arguments, [0, 1] + ([5] if bias is not None else [])


@settings(deadline=None, max_examples=300)
@given(case=grpo_cases())
def test_grpo(case, liger):
    options, arguments, leaves = case
    results = []
    for theirs in (False, True):
        made = (liger if theirs else ours).LigerFusedLinearGRPOLoss(compiled=False, **options)
        found, grads = outcome(made, arguments, leaves)
        metrics = list(found[1])
        if theirs and options["loss_type"] == "luspo" and options["importance_sampling_level"] == "sequence":
            metrics = metrics[:1] if options["beta"] else []
        results.append((found[:1], metrics, grads))
    (loss, metrics, grads), (their_loss, their_metrics, their_grads) = results
    atol = TOLERANCE[arguments[0].dtype] * max(1.0, their_loss[0].abs().item())
    largest = max(1.0, *(x.abs().amax().item() for x in their_grads))
    # A ratio beside the limit is clipped or not as it is rounded, and its gradient is 0 or not: in bf16 that happens,
    # unless all ratios are 1.
    exact, old_log_probs = arguments[0].dtype == torch.float32, arguments[7]
    compared = slice(None) if exact or old_log_probs is None else slice(0)
    assert_same(
        (loss, grads[compared]), (their_loss, their_grads[compared]), atol, TOLERANCE[arguments[0].dtype] * largest
    )
    if exact:
        size = max(1.0, *(x.item() for x in their_metrics), 1.0)
        assert_same((metrics[: len(their_metrics)], []), (their_metrics, []), 1e-4 * size, 0.0)


def test_what_stands_under_the_mask_changes_nothing():
    arguments = [tensor(2, 4, 3), tensor(9, 3), torch.arange(8).view(2, 4), random_mask(2, 4, 0.5, 0), tensor(2), None]
    near = [tensor(2, 4, scale=0.3, seed=i) - 2.0 for i in (1, 2)]
    for loss_type in (*PPO_LIKE, *WEIGHTED):
        made = ours.LigerFusedLinearGRPOLoss(loss_type=loss_type, max_completion_length=4)
        clean = outcome(made, [*arguments, *near], [0, 1])
        poisoned = [torch.where(arguments[3] != 0, x, torch.nan) for x in near]
        hidden = torch.where(arguments[3][..., None] != 0, arguments[0], torch.inf)
        other = outcome(made, [hidden, *arguments[1:], *poisoned], [0, 1])
        for a, b in zip([clean[0][0], *clean[0][1], *clean[1]], [other[0][0], *other[0][1], *other[1]], strict=True):
            assert torch.equal(a, b), loss_type


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type: got 'ppo', wanted one of grpo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level: got 'word'"),
        ({"importance_sampling_level": "sequence", "loss_type": "sapo"}, "wanted 'token', because loss_type='sapo'"),
        ({"loss_type": "dr_grpo"}, "max_completion_length: got None"),
        ({"beta": 0.1}, "ref_per_token_logps: got None"),
    ],
)
def test_bad_options(options, message):
    arguments = (tensor(1, 2, 3), tensor(9, 3), torch.tensor([[1, 2]]), torch.ones(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearGRPOLoss(**({"use_ref_model": "beta" in options} | options))(*arguments)
    with pytest.raises(ValueError, match="vllm_is_ratio: got shape"):
        ours.LigerFusedLinearGRPOLoss(use_ref_model=False)(*arguments, vllm_is_ratio=torch.ones(1, 3))
    with pytest.raises(ValueError, match="delta: got -1"):
        ours.LigerFusedLinearGRPOLoss(delta=-1)


def test_the_base_class_runs_in_one_chunk(liger):
    """A loss of somebody's own on LigerFusedLinearPPOBase, patched against unpatched."""
    base = module("liger_kernel.chunked_loss.fused_linear_ppo").LigerFusedLinearPPOBase
    calls = []

    class Squares(base):
        @staticmethod
        def ppo_loss_fn(per_token_logps, attention_mask, full_attention_mask, **_):
            calls.append(per_token_logps.shape)
            loss = (per_token_logps**2 * attention_mask).sum() / full_attention_mask.sum()
            return loss, (per_token_logps.mean(-1),)

        @classmethod
        def forward(cls, ctx, hidden, weight, tokens, mask, advantages):
            return super().forward(cls, ctx, hidden, weight, tokens, mask, advantages, compiled=False)

        @staticmethod
        def backward(ctx, grad, *_):
            return base.backward(ctx, grad)[:5]

    arguments = [tensor(3, 4, 5), tensor(9, 5), torch.randint(9, (3, 4)), torch.ones(3, 4), tensor(3)]
    unpatched = outcome(lambda *x: Squares.apply(*x)[0], arguments, [0, 1])
    with fastrlhf.patch("liger"):
        patched = outcome(lambda *x: Squares.apply(*x)[0], arguments, [0, 1])
    assert calls == [(1, 4)] * 3 + [(3, 4)]
    assert_same(patched, unpatched, 1e-4, 1e-4)


@st.composite
def dpo_cases(draw):
    pairs, length, size, vocabulary = (draw(st.integers(1, most)) for most in (3, 6, 5, 20))
    dtype = FLOATS[draw(st.sampled_from(["fp32", "fp32", "bf16"]))]
    seed = draw(st.integers(0, 2**16))
    options = {
        "loss_type": draw(st.sampled_from(TYPES)),
        "label_smoothing": draw(st.sampled_from([0.1, 0.3])),
        "beta": draw(st.sampled_from([0.1, 0.5])),
        "alpha": draw(st.sampled_from([1.0, 0.3])),
        "compute_nll_loss": draw(st.booleans()),
        "use_ref_model": draw(st.booleans()),
        "average_log_prob": draw(st.booleans()),
        "ignore_index": draw(st.sampled_from([-100, 0])),
        "chunk_size": draw(st.integers(1, 2)),
        "discopop_tau": draw(st.sampled_from([0.05, 1.0])),
    }
    vocabulary = max(2, vocabulary)  # with nothing to count among the chosen ones, Liger's loss is nan
    hidden = tensor(2 * pairs, length, size, dtype=dtype, seed=seed)
    weight = tensor(vocabulary, size, dtype=dtype, scale=0.5, seed=1)
    target = torch.randint(vocabulary, (2 * pairs, length), generator=torch.Generator().manual_seed(seed))
    mask = random_mask(2 * pairs, length, draw(st.sampled_from([0.5, 1.0])), seed)
    mask[:, 0] = 1  # an empty response gives nan on both sides, where it is averaged
    target = torch.where(mask != 0, target.clamp(min=1), options["ignore_index"])
    bias = draw(st.sampled_from([None, tensor(vocabulary, dtype=dtype, seed=2)]))
    reference = (tensor(2 * pairs, length, size, dtype=dtype, seed=3), tensor(vocabulary, size, dtype=dtype, seed=4))
    reference = (*reference, bias) if options["use_ref_model"] else (None, None, None)
    return options, [weight, hidden, target, bias, *reference], [0, 1] + ([3] if bias is not None else [])


@settings(deadline=None, max_examples=150)
@given(case=dpo_cases())
def test_dpo(case, liger):
    options, arguments, leaves = case
    results = []
    for package in (ours, liger):
        (loss, more), grads = outcome(package.LigerFusedLinearDPOLoss(compiled=False, **options), arguments, leaves)
        results.append(([loss, *more], grads))
    mine, theirs = results
    rel = TOLERANCE[arguments[0].dtype]
    size = max(1.0, *(x.detach().abs().amax().nan_to_num().item() for x in theirs[0]))
    # sppo_hard squares log-probs over beta, discopop divides by tau and takes an exp: the error grows with both.
    size *= {"sppo_hard": 10.0, "discopop": 10.0 / options["discopop_tau"]}.get(options["loss_type"], 1.0)
    largest = max(1.0, *(x.abs().amax().nan_to_num().item() for x in theirs[1]))
    assert_same(mine, theirs, rel * size, rel * size * largest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, "loss_type: got 'ipo', wanted one of sigmoid"),
        ({"loss_type": "exo_pair"}, "label_smoothing: got 0.0, wanted more than 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing: got 0.5"),
    ],
)
def test_bad_options_of_dpo(options, message):
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearDPOLoss(**options)


def test_signatures(liger):
    triton_loss = module("liger_kernel.transformers.grpo_loss")
    pairs = [(getattr(ours, x), getattr(liger, x)) for x in ("LigerFusedLinearGRPOLoss", "LigerFusedLinearDPOLoss")]
    pairs += [(a.forward, b.forward) for a, b in pairs]
    pairs += [(getattr(ours, x), getattr(triton_loss, x)) for x in ("triton_grpo_loss", "fused_selective_log_softmax")]
    pairs += [(ours.chunk_forward, triton_loss.LigerFusedLinearPPOBase.chunk_forward)]
    for mine, theirs in pairs:
        found, expected = (
            [(x.name, x.default) for x in inspect.signature(f).parameters.values()] for f in (mine, theirs)
        )
        assert found == expected
    for mine, name in ((ours.liger_fused_linear_grpo, "grpo"), (ours.liger_fused_linear_dpo, "dpo")):
        function = getattr(module(f"liger_kernel.chunked_loss.{name}_loss"), f"LigerFusedLinear{name.upper()}Function")
        expected = [(x.name, x.default) for x in inspect.signature(function.forward).parameters.values()][1:]
        assert [(x.name, x.default) for x in inspect.signature(mine).parameters.values()] == expected


# In Triton's interpreter.


def logits_case(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 37, generator=generator)
    ids = torch.randint(37, (3, 5), generator=generator)
    mask = random_mask(3, 5, 0.7, seed)
    mask[1] = 0
    log_probs = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = (log_probs + 0.3 * torch.randn(3, 5, generator=generator) for _ in range(2))
    return logits, old, ref, ids, torch.randn(3, generator=generator), mask


def check_selective_log_softmax():
    theirs = module("liger_kernel.ops.grpo_loss").fused_selective_log_softmax
    logits, _, _, ids, _, mask = logits_case()
    longer = torch.cat([ids[:, :2], ids], 1)
    for arguments in ((ids,), (longer, 0.5), (ids, 1.0, mask), (longer, 1.0, torch.cat([mask, mask], 1))):
        torch.testing.assert_close(ours.fused_selective_log_softmax(logits, *arguments), theirs(logits, *arguments))


def check_triton_grpo_loss():
    theirs = module("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    logits, old, ref, ids, advantages, mask = logits_case()
    variants = [
        {"loss_type": loss_type, "reduce": reduce, "importance_sampling_level": level, "beta": beta}
        for loss_type, level, (reduce, beta) in itertools.product(
            LOSS_TYPES, ("token", "sequence"), ((False, 0.1), (True, 0.0))
        )
        if level == "token" or loss_type not in WEIGHTED
    ]
    ratio = 1 + 0.2 * torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    more = [
        {"beta": 0.1, "use_bias_correction_kl": True, "delta": 1.1},
        {"vllm_is_ratio": ratio, "num_items_in_batch": 9},
    ]
    more += [{"vllm_is_ratio": ratio[:, 0]}, {"temperature": 0.6, "eps_low": 0.1, "eps_high": 0.3}]
    variants += [{**x, "reduce": True, "importance_sampling_level": y} for x in more for y in ("token", "sequence")]
    variants += [{"loss_type": "vespo", "vllm_is_ratio": ratio[:, :1], "reduce": True}]
    for options, with_old in itertools.product(variants, (True, False)):
        arguments = [logits, old if with_old else None, ref, ids, advantages, mask if with_old else None]
        mine, reference = (grpo_outcome(f, arguments, options) for f in (ours.triton_grpo_loss, theirs))
        if options.get("loss_type") == "luspo" and options["reduce"]:
            # Its gradient takes the weights [B, 1] of the sequences for [B, L] and reads beside them.
            mine, reference = (mine[0], []), (reference[0], [])
        try:
            assert_same(mine, reference, 1e-4, 1e-4)
        except AssertionError as error:
            raise AssertionError(f"{options}, {'with' if with_old else 'without'} old: {error}") from None


def grpo_outcome(function, arguments, options):
    return outcome(lambda x, *rest: flat(function(x * 1.0, *rest, **options)), arguments, [0])


def flat(results):
    """(loss, *metrics), the metrics without gradient."""
    loss, *more = results
    more = more[0] if more and isinstance(more[0], list) else more
    return (loss, *(x if x is None else x.detach() for x in more))


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def interpreted(peers):
    module("liger_kernel")
    return run_checks(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name, interpreted):
    assert interpreted[name] == ""


def test_the_gradient_is_written_over_the_logits_where_it_may_be():
    logits, old, ref, ids, advantages, mask = logits_case()
    leaf = logits.clone().requires_grad_()
    made = leaf * 1.0
    ours.triton_grpo_loss(made, old, ref, ids, advantages, mask, reduce=True)[0].backward()
    assert torch.equal(made.detach(), leaf.grad)
    ours.triton_grpo_loss(leaf, old, ref, ids, advantages, mask, reduce=True)[0].backward()  # a leaf keeps its values
    assert torch.equal(leaf.detach(), logits)


def main():
    results = {}
    with peers_on_path():
        for name, check in CHECKS.items():
            try:
                check()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
                print(name, results[name], sep="\n", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
