"""The Triton kernels of gae, gae_packed and rollout_advantages against fp64.

Every `check_*` runs twice, as in test_triton_log_probs.py: without a GPU in Triton's interpreter, in one child process
(`python tests/test_triton_advantages.py` by hand), and with a GPU compiled, through the public `fastrlhf.functional`.
"""

import importlib.util
import itertools
import json
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from interpreter import run_checks
from oracle import EPS, assert_as_good_as_eager, poison, random_tokenwise, same_bits

from fastrlhf import fallback, reference

try:
    import triton
except ImportError:
    triton = None

MODES = fallback.MASK_MODES
ESTIMATORS = fallback.KL_ESTIMATORS
INF, NAN = float("inf"), float("nan")
DISCOUNTS = {"gamma": 0.99, "lam": 0.9}


class Interpreter:
    """The raw kernels on CPU tensors. Its scans take a Python call an element, hence the small tiles."""

    device = "cpu"
    tile, lanes = 8, 2

    def __init__(self):
        from fastrlhf.kernels import advantages

        self.ops, self.own = advantages, (advantages.TILE, advantages.LANES)
        advantages.TILE, advantages.LANES = self.tile, self.lanes

    def with_its_own_tiles(self, function, *args, **options):
        try:
            self.ops.TILE, self.ops.LANES = self.own
            return getattr(self, function)(*args, **options)
        finally:
            self.ops.TILE, self.ops.LANES = self.tile, self.lanes

    def gae(self, rewards, values, mask=None, *, gamma=1.0, lam=0.95, mask_mode="carry", bootstrap_values=None):
        options = torch.tensor([gamma, lam])
        return self.ops.gae(rewards, values, mask, bootstrap_values, options, MODES.index(mask_mode))

    def gae_packed(
        self, rewards, values, ends, mask=None, *, gamma=1.0, lam=0.95, mask_mode="carry", bootstrap_values=None
    ):
        options = torch.tensor([gamma, lam])
        return self.ops.gae_packed(rewards, values, ends, mask, bootstrap_values, options, MODES.index(mask_mode))

    def rollout_advantages(
        self,
        scores,
        log_probs,
        ref_log_probs,
        values,
        mask,
        *,
        kl_coef,
        kl_estimator="k1",
        score_clip=None,
        token_rewards=None,
        gamma=1.0,
        lam=0.95,
        mask_mode="carry",
        bootstrap_values=None,
    ):
        options = torch.tensor([kl_coef, INF if score_clip is None else score_clip, gamma, lam])
        enumerations = (ESTIMATORS.index(kl_estimator), MODES.index(mask_mode))
        tensors = (scores, log_probs, ref_log_probs, values, mask, token_rewards, bootstrap_values)
        return self.ops.rollout_advantages(*tensors, options, *enumerations)


class Functional:
    """The public functions on CUDA tensors."""

    device = "cuda"
    tile, lanes = 1024, 512

    def __init__(self):
        from fastrlhf import functional

        self.gae, self.gae_packed = functional.gae, functional.gae_packed
        self.rollout_advantages = functional.rollout_advantages

    def with_its_own_tiles(self, function, *args, **options):
        return getattr(self, function)(*args, **options)


def lengths(run):
    """Divisible by 4 and not, one tile and several, and just beside a whole number of them."""
    tile = run.tile
    return (1, 3, tile - 1, tile, tile + 1, 2 * tile, 3 * tile - 4, 3 * tile + 5)


def on(run, *tensors):
    return [x if x is None else x.to(run.device) for x in tensors]


def assert_accurate(names, ours, arguments, options, function):
    """At most twice eager's error. The epsilon: a few roundings of what is added up at every step.

    An advantage is a sum of differences of numbers as large as `scale`, each discounted, and the discount itself comes
    in fp32: 4 roundings a step, over the 1 / (1 - gamma lambda) steps that are felt (never more than there are).
    """

    def exact_in(dtype):
        def convert(x):
            return x.cpu().to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        args = [convert(x).cpu() if isinstance(x, torch.Tensor) else x for x in arguments]
        return function(*args, **{k: convert(x) for k, x in options.items()})

    eager, exact = exact_in(torch.float32), exact_in(torch.float64)
    felt = min(1 / (1 - 0.99 * options["gamma"] * options["lam"]), 1e3)
    scale = max(1.0, *(x.abs().max().item() for x in exact[:2] if x.numel()))
    for name, a, b, c in zip(names, ours, eager, exact, strict=True):
        assert a.shape == c.shape
        assert a.dtype == torch.float32
        slack = 4 * EPS * felt * scale if name in ("advantages", "returns") else 8 * EPS * max(1.0, _largest(c))
        assert_as_good_as_eager(a.cpu(), b, c, slack, name)


def _largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def rollout(B, T, seed=0, poisoned=True):
    """scores, log_probs, ref_log_probs, values, mask; and token_rewards, bootstrap_values."""
    log_probs, ref, values, token_rewards, mask = random_tokenwise(4, B, T, seed=seed)
    scores = 3 * torch.randn(B, generator=torch.Generator().manual_seed(seed))
    if poisoned:
        log_probs, ref, token_rewards = (poison(x, mask) for x in (log_probs, ref, token_rewards))
    return (scores, log_probs, ref, values, mask), token_rewards, scores.flip(0) / 4


NAMES = ("advantages", "returns", "kl", "advantage_stats")


# ------------------------------------------------------------------------------------------------------- the checks


def check_gae_in_every_mode_and_length(run):
    for T, mask_mode, masked in itertools.product(lengths(run), MODES, (False, True)):
        rewards, values, mask = random_tokenwise(2, 2, T, seed=T)
        last = torch.tensor([-1.0, 1.0]) if (T + masked) % 2 else None
        if masked and mask_mode != "none":
            rewards, values = poison(rewards, mask), poison(values, mask)
        inputs = (rewards, values, mask if masked else None)
        options = {"mask_mode": mask_mode, "bootstrap_values": last, **DISCOUNTS}
        ours = run.gae(*on(run, *inputs), **options | {"bootstrap_values": on(run, last)[0]})
        assert_accurate(NAMES[:2], ours, inputs, options, reference.gae)
        if masked and mask_mode != "none":
            assert not any(x.cpu()[~mask].any() for x in ours)


def check_gae_with_the_tiles_of_a_gpu(run):
    rewards, values, mask = random_tokenwise(2, 1, 1025)
    ours = run.with_its_own_tiles("gae", *on(run, rewards, values, mask), **DISCOUNTS)
    assert_accurate(NAMES[:2], ours, (rewards, values, mask), DISCOUNTS, reference.gae)


def check_rollout_in_every_mode_and_length(run):
    choices = itertools.cycle(itertools.product(ESTIMATORS, (None, 1.5), (False, True), (False, True)))
    for T, mask_mode in itertools.product(lengths(run), MODES):
        for estimator, clip, with_rewards, bootstrapped in itertools.islice(choices, 2):
            B = 3
            inputs, token_rewards, last = rollout(B, T, seed=T)
            if mask_mode != "none":
                inputs = (*inputs[:3], poison(inputs[3], inputs[4]), inputs[4])
            options = {"kl_coef": 0.2, "kl_estimator": estimator, "score_clip": clip, "mask_mode": mask_mode}
            options |= {
                "token_rewards": token_rewards if with_rewards else None,
                "bootstrap_values": last if bootstrapped else None,
                **DISCOUNTS,
            }
            here = {k: x.to(run.device) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
            ours = run.rollout_advantages(*on(run, *inputs), **here)
            assert_accurate(NAMES, ours, inputs, options, reference.rollout_advantages)


def check_rollout_with_the_tiles_of_a_gpu(run):
    inputs, _, _ = rollout(1, 1030)
    options = {"kl_coef": 0.1, "kl_estimator": "k3", **DISCOUNTS}
    ours = run.with_its_own_tiles("rollout_advantages", *on(run, *inputs), **options)
    assert_accurate(NAMES, ours, inputs, options, reference.rollout_advantages)


def check_packed_is_padded_to_the_last_bit(run):
    tile = run.tile
    sizes = [5, 0, 1, tile, 2 * tile + 3, tile - 1]
    rewards, values, mask = random_tokenwise(2, sum(sizes))
    last = torch.linspace(-2, 2, len(sizes))
    ends = torch.tensor([0, *itertools.accumulate(sizes)])
    padded = [torch.full((len(sizes), max(sizes) + 2), NAN) for _ in range(2)]
    padded_mask = torch.zeros(padded[0].shape, dtype=torch.bool)
    for b, size in enumerate(sizes):
        here = slice(int(ends[b]), int(ends[b + 1]))
        padded[0][b, :size], padded[1][b, :size], padded_mask[b, :size] = rewards[here], values[here], mask[here]
    both = padded_mask.new_zeros(padded_mask.shape)
    for b, size in enumerate(sizes):
        both[b, :size] = True
    expected = run.gae(*on(run, *padded, padded_mask), bootstrap_values=on(run, last)[0], **DISCOUNTS)
    for dtype in (torch.int32, torch.int64):
        arguments = on(run, rewards, values, ends.to(dtype), mask)
        ours = run.gae_packed(*arguments, bootstrap_values=on(run, last)[0], **DISCOUNTS)
        for a, b in zip(ours, expected, strict=True):
            assert same_bits(a.cpu(), b.cpu()[both])
    for mask_mode in MODES:
        options = {"mask_mode": mask_mode, **DISCOUNTS}
        ours = run.gae_packed(*on(run, rewards, values, ends, mask), **options)
        assert_accurate(NAMES[:2], ours, (rewards, values, ends, mask), options, reference.gae_packed)


def check_wrong_ends_lead_nowhere(run):
    """Inputs and outputs end where the ends point beyond: a GPU would fault, the interpreter crash or read garbage."""
    rewards, values, _ = random_tokenwise(2, 10)
    ends = torch.tensor([-(2**40), 4, 2, 2**40, 2**62])
    ours = run.gae_packed(*on(run, rewards, values, ends), **DISCOUNTS)
    first = run.gae(*on(run, rewards[None, :4], values[None, :4]), **DISCOUNTS)
    third = run.gae(*on(run, rewards[None, 2:], values[None, 2:]), **DISCOUNTS)
    for a, b, c in zip(ours, first, third, strict=True):
        assert same_bits(a[4:], c[0, 2:])
        assert same_bits(a[:2], b[0, :2])


def check_by_hand(run):
    """KL 0.5 at every token, fined 0.2 each; the score 2, clipped to 1, at the last token that counts, which is 2."""
    one = torch.ones(1, 4)
    mask = torch.tensor([[1, 0, 1, 0]]) != 0
    values = torch.tensor([[0.5, NAN, 0.25, NAN]])
    inputs = on(run, torch.tensor([2.0]), -one, -1.5 * one, values, mask)
    ours = run.rollout_advantages(*inputs, kl_coef=0.2, score_clip=1.0, gamma=0.5, lam=0.5)
    a2 = -0.1 + 1.0 - 0.25
    a0 = -0.1 + 0.5 * 0.25 - 0.5 + 0.25 * a2
    mean = (a0 + a2) / 2
    expected = (
        torch.tensor([[a0, 0.0, a2, 0.0]]),
        torch.tensor([[a0 + 0.5, 0.0, a2 + 0.25, 0.0]]),
        torch.tensor([1.0]),
        torch.tensor([mean, (2 * (a2 - mean) ** 2 + 1e-8) ** -0.5]),
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)


def check_bug_trl_3750_and_5338_score_after_the_end(run):
    """At the last token that counts, in whichever tile; nowhere, where there is none."""
    T = 3 * run.tile
    for last in (-1, 0, run.tile - 1, run.tile, T - 1):
        mask = torch.arange(T).unsqueeze(0) <= last
        zero = torch.zeros(1, T)
        inputs = on(run, torch.tensor([7.0]), zero, zero, zero, mask)
        advantages, _, _, _ = run.rollout_advantages(*inputs, kl_coef=0.1, gamma=0.0, lam=0.0)
        expected = torch.zeros(1, T)
        if last >= 0:
            expected[0, last] = 7.0
        assert torch.equal(advantages.cpu(), expected)


def check_k3_keeps_its_digits_near_zero(run):
    T = 64
    difference = torch.logspace(-12, 1, T, base=2.0) * (-1.0) ** torch.arange(T)
    log_probs = difference.view(T, 1)
    zero, ones = torch.zeros(T, 1), torch.ones(T, 1, dtype=torch.bool)
    inputs = on(run, torch.zeros(T), log_probs, zero, zero, ones)
    _, _, kl, _ = run.rollout_advantages(*inputs, kl_coef=0.1, kl_estimator="k3")
    exact = reference.kl_estimate(log_probs.double(), "k3")[:, 0]
    assert ((kl.cpu() - exact) / exact).abs().max() < 8 * EPS


def check_large_values_that_lie_close_together(run):
    """With gamma 1 the recursion sees differences of values only, which are exact. Adding up values would lose 1e-4."""
    rewards, noise, mask = random_tokenwise(2, 3, 3 * run.tile + 1)
    values = 1000 + noise / 64
    options = {"gamma": 1.0, "lam": 0.95}
    last = torch.full((3,), 1000.0)
    arguments = (rewards / 64, values, mask)
    ours = run.gae(*on(run, *arguments), bootstrap_values=on(run, last)[0], **options)[0].cpu()
    doubles = [x.double() if x.is_floating_point() else x for x in arguments]
    exact = reference.gae(*doubles, bootstrap_values=last.double(), **options)[0]
    eager = reference.gae(*arguments, bootstrap_values=last, **options)[0]
    assert_as_good_as_eager(ours, eager, exact, 64 * EPS)


def check_bug_verl_7704_batch_invariance_lost(run):
    """The same row, alone or anywhere in a batch, aligned or not, with more or less padding: the same bits."""
    for T in (run.tile + 4, run.tile + 5):
        inputs, token_rewards, last = rollout(1, T)
        options = {"kl_coef": 0.1, "kl_estimator": "k3", **DISCOUNTS}

        def call(inputs, token_rewards, last, options=options):
            here = {"token_rewards": on(run, token_rewards)[0], "bootstrap_values": on(run, last)[0]}
            return [x.cpu() for x in run.rollout_advantages(*on(run, *inputs), **here, **options)]

        alone = call(inputs, token_rewards, last)
        again = call(inputs, token_rewards, last)
        assert all(same_bits(a, b) for a, b in zip(alone, again, strict=True))
        for shift, padding in ((0, 0), (0, 3), (1, 0), (2, 1)):
            others, other_rewards, other_last = rollout(5, shift + T + padding, seed=1)
            scores, *tokenwise, mask = others
            mask[3] = False
            views = []
            for x, row in zip((*tokenwise, mask, other_rewards), (*inputs[1:], token_rewards), strict=True):
                x[3, shift : shift + T] = row[0]
                views.append(x[:, shift:])
            scores[3], other_last[3] = inputs[0][0], last[0]
            batch = call((scores, *views[:4]), views[4], other_last)
            for a, b in zip(batch[:2], alone[:2], strict=True):
                assert same_bits(a[3:4, :T], b)
            assert same_bits(batch[2][3:4], alone[2])


def check_rows_beyond_one_round_of_lanes(run):
    B = 3 * run.lanes + 2
    inputs, _, _ = rollout(B, 5, seed=3)
    options = {"kl_coef": 0.1, **DISCOUNTS}
    ours = run.rollout_advantages(*on(run, *inputs), **options)
    assert_accurate(NAMES, ours, inputs, options, reference.rollout_advantages)


def check_equal_advantages_whiten_to_zero(run):
    B, T = 2 * run.lanes + 1, run.tile + 3
    _, _, mask = random_tokenwise(2, B, T)
    zero, tenth = torch.zeros(B, T), torch.full((B, T), 0.1)
    inputs = on(run, torch.zeros(B), zero, zero, zero, mask)
    ours = run.rollout_advantages(*inputs, kl_coef=0.0, gamma=0.0, token_rewards=on(run, tenth)[0])
    mean, rstd = ours[3].cpu()
    assert mean == tenth[0, 0]
    assert abs(rstd - 1e4) < 1e-2


def check_nothing_counts(run):
    for mask_mode in ("carry", "zero"):
        for B, T in ((3, 7), (0, 4), (4, 0)):
            nan, mask = torch.full((B, T), NAN), torch.zeros(B, T, dtype=torch.bool)
            inputs = on(run, torch.ones(B), nan, nan, nan, mask)
            advantages, returns, kl, stats = run.rollout_advantages(*inputs, kl_coef=0.1, mask_mode=mask_mode)
            assert advantages.shape == returns.shape == (B, T)
            assert kl.shape == (B,)
            assert not any(x.any() for x in (advantages, returns, kl))
            torch.testing.assert_close(stats.cpu(), torch.tensor([0.0, 1e4]))
            ours = run.gae(*on(run, nan, nan, mask), mask_mode=mask_mode)
            assert not torch.stack(ours).any()
    nothing = on(run, torch.zeros(0), torch.zeros(0), torch.zeros(1, dtype=torch.int32))
    assert run.gae_packed(*nothing)[0].shape == (0,)


def check_nan_and_infinity_are_not_hidden(run):
    inputs, _, _ = rollout(2, 9, poisoned=False)
    scores, log_probs, ref, values, mask = inputs
    mask[:] = True
    nowhere = on(run, torch.full_like(scores, NAN), *inputs[1:])
    assert run.rollout_advantages(*nowhere, kl_coef=0.1, score_clip=1.0)[0].isnan().all()
    for where, bad in itertools.product((log_probs, ref, values), (NAN, INF)):
        was, where[1, 4] = where[1, 4].item(), bad
        for estimator in ESTIMATORS:
            ours = run.rollout_advantages(*on(run, *inputs), kl_coef=0.1, kl_estimator=estimator)
            assert not ours[0][1, :4].isfinite().any() or (estimator == "k3" and bad == INF)
            assert ours[0][0].isfinite().all()
        where[1, 4] = was


def check_an_infinite_kl_that_is_only_watched_is_no_reward(run):
    inputs, _, _ = rollout(1, 9, poisoned=False)
    inputs[4][:], inputs[2][0, 3] = True, -INF
    ours = run.rollout_advantages(*on(run, *inputs), kl_coef=0.0)
    assert ours[0].isfinite().all()
    assert ours[2].item() == INF


def check_bug_roll_447_masked_values_leak(run):
    rewards, values, mask = random_tokenwise(2, 4, run.tile + 9)
    for mode in ("carry", "zero"):
        clean = run.gae(*on(run, rewards, values, mask), mask_mode=mode)
        for dirt in (poison, lambda x, m: torch.where(m, x, 100.0)):
            dirty = run.gae(*on(run, dirt(rewards, mask), dirt(values, mask), mask), mask_mode=mode)
            assert all(same_bits(a, b) for a, b in zip(clean, dirty, strict=True))


def check_rows_are_read_where_they_lie(run):
    for T in (8, 9):
        rewards, values, mask = random_tokenwise(2, 6, 2 * T)
        expected = run.gae(*on(run, *(x[::2, :T].contiguous() for x in (rewards, values, mask))), **DISCOUNTS)
        ours = run.gae(*(x[::2, :T] for x in on(run, rewards, values, mask)), **DISCOUNTS)
        turned = (x[::2, :T].t().contiguous().t() for x in on(run, rewards, values, mask))
        for a, b, c in zip(expected, ours, run.gae(*turned, **DISCOUNTS), strict=True):
            assert same_bits(a, b)
            assert same_bits(a, c)


def check_any_one_of_the_tensors_may_be_unaligned(run):
    inputs, token_rewards, _ = rollout(2, 8)
    tensors = [*on(run, *inputs, token_rewards)]
    expected = run.rollout_advantages(*tensors[:5], token_rewards=tensors[5], kl_coef=0.1)
    for i in range(1, 6):
        room = torch.empty(17, dtype=tensors[i].dtype, device=run.device)
        shifted = room[1:].view(2, 8).copy_(tensors[i])
        views = [shifted if i == j else x for j, x in enumerate(tensors)]
        ours = run.rollout_advantages(*views[:5], token_rewards=views[5], kl_coef=0.1)
        assert all(same_bits(a, b) for a, b in zip(ours, expected, strict=True))
        if i > 2:
            rewards, values, mask = views[5], views[3], views[4]
            for a, b in zip(run.gae(rewards, values, mask), run.gae(tensors[5], tensors[3], tensors[4]), strict=True):
                assert same_bits(a, b)


def check_bug_liger_803_and_trl_int32_offsets(run):
    """Two rows more than 2^31 elements apart. On CPU the pages between are never touched, so they cost nothing."""
    T, stride = 10, 2**31 + 1000
    rewards, values, near = on(run, *random_tokenwise(2, 2, T))
    far = torch.empty(stride + T, dtype=torch.bool, device=run.device).as_strided((2, T), (stride, 1))
    far.copy_(near)
    for a, b in zip(run.gae(rewards, values, far), run.gae(rewards, values, near), strict=True):
        assert same_bits(a, b)


def check_wrong_shapes_and_dtypes_are_refused(run):
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    good = (torch.zeros(2), x, x, x, mask)
    for i, bad in ((0, torch.zeros(3)), (2, torch.zeros(2, 2)), (3, torch.zeros(6)), (4, mask[:1])):
        inputs = on(run, *(bad if i == j else y for j, y in enumerate(good)))
        with pytest.raises(ValueError, match="got"):
            run.rollout_advantages(*inputs, kl_coef=0.1)
    with pytest.raises(ValueError, match="values: got"):
        run.gae(*on(run, x, x[:1]))


def check_the_counter_is_back_at_zero(run):
    from fastrlhf.kernels import masked

    inputs, _, _ = rollout(3, 5)
    run.rollout_advantages(*on(run, *inputs), kl_coef=0.1)
    assert masked._arrivals
    assert not any(x.any() for x in masked._arrivals.values())


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


# -------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def interpreted():
    return run_checks(__file__)


@pytest.mark.parametrize("check", CHECKS)
def test_in_interpreter(check, interpreted):
    assert not interpreted[check], interpreted[check]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_on_gpu(check):
    CHECKS[check](Functional())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(512, 1024), (64, 8192), (3000, 130)])
def test_on_gpu_at_real_sizes(shape):
    run = Functional()
    inputs, token_rewards, last = rollout(*shape)
    options = {"kl_coef": 0.05, "kl_estimator": "k3", "gamma": 1.0, "lam": 0.95}
    tensors = {"token_rewards": token_rewards, "bootstrap_values": last}
    here = {name: x.cuda() for name, x in tensors.items()}
    ours = run.rollout_advantages(*on(run, *inputs), **options, **here)
    assert_accurate(NAMES, ours, inputs, options | tensors, reference.rollout_advantages)
    for _ in range(20):  # whoever happens to arrive last
        again = run.rollout_advantages(*on(run, *inputs), **options, **here)
        assert all(same_bits(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_gpu_streams_and_graphs_do_not_share_a_counter():
    run = Functional()
    inputs = on(run, *rollout(2000, 300)[0])
    expected = run.rollout_advantages(*inputs, kl_coef=0.1)
    torch.cuda.synchronize()
    streams, results, graphs = [torch.cuda.Stream() for _ in range(4)], [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(run.rollout_advantages(*inputs, kl_coef=0.1))
    for _ in range(20):
        for stream, graph in zip(streams, [*graphs, None, None], strict=True):
            with torch.cuda.stream(stream):
                if graph is None:
                    results.append(run.rollout_advantages(*inputs, kl_coef=0.1))
                else:
                    graph.replay()
    torch.cuda.synchronize()
    for result in results:
        assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.skipif(triton is None or triton.knobs.runtime.interpret, reason="needs Triton's compiler")
def test_aligned_rows_move_128_bits_an_access():
    """(loads, stores) of the last kernel launched, which has a narrow way too: all of a tile's, and none from parts."""
    path = Path(__file__).parents[1] / "bench" / "gpu_audit.py"
    spec = importlib.util.spec_from_file_location("gpu_audit", path)
    with mock.patch.dict(sys.modules, {"gpu_audit": importlib.util.module_from_spec(spec)}):
        gpu_audit = sys.modules["gpu_audit"]
        spec.loader.exec_module(gpu_audit)
        calls = gpu_audit.load_family("advantages").launches(
            gpu_audit.load_kernels(gpu_audit.KERNELS / "advantages.py"), torch.float32
        )
        expected = {
            "gae": (4, 4),
            "gae[no mask]": (4, 4),
            "gae_packed[int32]": (4, 4),
            "rollout_advantages": (6, 4),
            "rollout_advantages[all]": (8, 4),
        }
        for op, wide in expected.items():
            with gpu_audit.compile_only(90) as launches:
                function, args = calls[op][0]
                function(*args)
            lines = [line for _, line in gpu_audit.disassemble(launches[-1].binary.asm["cubin"])[1]]
            assert (gpu_audit.widths(lines, "LDG")[128], gpu_audit.widths(lines, "STG").get(128, 0)) == wide


def main():
    run, results = Interpreter(), {}
    for name, check in CHECKS.items():
        try:
            check(run)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], sep="\n", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
