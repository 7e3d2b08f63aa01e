"""The Triton kernels of ppo_loss and value_loss against fp64.

Without a GPU, in child processes with Triton's interpreter, where the kernels serve the CPU: the `check_*` of this file
(`python tests/test_triton_losses.py` by hand), and the tests of test_losses.py and test_losses_contract.py as they are.
With a GPU: the checks, compiled.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from oracle import EPS, assert_as_good_as_eager, poison, random_tokenwise, same_bits

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
KERNELS = {"losses": ("ppo_loss", "value_loss"), "preferences": ("pairwise_reward_loss", "dpo_loss")}
INF, NAN = float("inf"), float("nan")
EVERYTHING = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.4, "log_ratio_clamp": 0.6}
COEFFICIENTS = {"entropy_coef": 0.3, "kl_coef": 0.2}


class Run:
    """The public functions on one device, behind which the Triton kernels stand."""

    def __init__(self, device):
        from fastrlhf import functional, reference
        from fastrlhf.kernels import losses, preferences

        self.device, self.F, self.reference, self.losses = device, functional, reference, losses
        if device == "cpu":
            self.library = torch.library.Library("fastrlhf", "IMPL")
            for module, names in zip((losses, preferences), KERNELS.values(), strict=True):
                for name in names:
                    self.library.impl(name, getattr(module, name), "CPU")

    @contextlib.contextmanager
    def launches(self):
        """The names of the kernels launched inside."""
        names = []
        kernel_type = type(self.losses._ppo_kernel)
        run = kernel_type.run

        def record(kernel, *args, **options):
            names.append(kernel.fn.__name__)
            return run(kernel, *args, **options)

        with mock.patch.object(kernel_type, "run", record):
            yield names


def ppo_batch(*shape, seed=0):
    log_probs, old, advantages, weights, entropy, ref, mask = random_tokenwise(6, *shape, seed=seed)
    mask[0, 0] = True
    if shape[0] > 2:
        mask[1] = False  # a sequence without a single token
    optional = {"weights": weights.abs(), "entropy": entropy.abs(), "ref_log_probs": ref}
    return [log_probs, old, advantages + 1.5, mask], optional | {"advantage_stats": torch.tensor([0.3, 1.7])}


def results(function, device, arguments, optional, options, dtype=torch.float32, leaves=("entropy",)):
    """Loss, statistics, and the gradients of the first argument and of the optional ones that can have one."""

    def convert(x):
        return (x.to(dtype) if x.is_floating_point() else x).to(device)

    arguments = [None if x is None else convert(x) for x in arguments]
    optional = {name: convert(x) for name, x in optional.items()}
    inputs = [arguments[0].detach().requires_grad_()]
    arguments[0] = inputs[0]
    for name in set(leaves) & set(optional):
        optional[name] = optional[name].detach().requires_grad_()
        inputs.append(optional[name])
    loss, stats = function(*arguments, **optional, **options)
    grads = torch.autograd.grad(loss, inputs)
    stats = stats if isinstance(stats, torch.Tensor) else torch.stack(list(stats))
    return [x.detach().cpu() for x in (loss, stats, *grads)]


def assert_accurate(run, name, arguments, optional, options):
    """At most twice eager's error. The epsilons: a few roundings of the largest number in the result.

    A mean of n numbers of size s is added up over a tree of depth log2 n and a loop; 16 EPS s covers both and the
    division. Statistics are such means, too, of numbers up to the largest of them.
    """
    ours = results(getattr(run.F, name), run.device, arguments, optional, options)
    eager = results(getattr(run.reference, name), "cpu", arguments, optional, options)
    exact = results(getattr(run.reference, name), "cpu", arguments, optional, options, torch.float64)
    for i, what in enumerate(("loss", "stats", "gradient", "gradient of the entropy")[: len(ours)]):
        slack = 16 * EPS * max(1.0 if i < 2 else 0.0, exact[i].abs().max().item())
        assert_as_good_as_eager(ours[i], eager[i], exact[i], slack, f"{what} of {name} with {options}")
    return ours


def assert_same(a, b):
    assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------- the checks


def check_ppo_at_every_size(run):
    """One token, a tile, one less and one more, several; in one row and in many."""
    tile = run.losses.TILE
    shapes = ((1, 1), (1, 3), (1, tile - 1), (1, tile), (1, tile + 1), (3, tile - 1), (4, 2 * tile + 5), (70, 7))
    choices = itertools.cycle(itertools.product(("token", "sequence"), AGGREGATIONS))
    for i, shape in enumerate(shapes):
        arguments, optional = ppo_batch(*shape, seed=i)
        for _ in range(3):
            ratio_level, aggregation = next(choices)
            options = EVERYTHING | COEFFICIENTS | {"aggregation": aggregation, "ratio_level": ratio_level}
            assert_accurate(run, "ppo_loss", arguments, optional, options)


def check_ppo_options_crossed(run):
    """Every optional tensor with and without every other, in turn with all the choices."""
    arguments, optional = ppo_batch(4, 261)
    choices = itertools.cycle(
        itertools.product(("k1", "k2", "k3", "abs"), AGGREGATIONS, ("token", "sequence"), (None, 37.0))
    )
    for k in range(len(optional) + 1):
        for names in itertools.combinations(optional, k):
            for _ in range(3):
                estimator, aggregation, ratio_level, denominator = next(choices)
                options = {"kl_estimator": estimator, "aggregation": aggregation, "ratio_level": ratio_level}
                options |= {"denominator": denominator, **(EVERYTHING if k % 2 else {})}
                options |= {"entropy_coef": 0.3} if "entropy" in names else {}
                options |= {"kl_coef": 0.2} if "ref_log_probs" in names and denominator else {}
                assert_accurate(run, "ppo_loss", arguments, {name: optional[name] for name in names}, options)


def check_value_loss_at_every_size(run):
    tile = run.losses.TILE
    choices = itertools.cycle(itertools.product(AGGREGATIONS, (None, 0.2), (None, 7.0)))
    for i, shape in enumerate(((1, 1), (1, tile - 1), (1, tile), (1, tile + 1), (3, 2 * tile + 5), (70, 7))):
        values, old, returns, mask = random_tokenwise(3, *shape, seed=i)
        mask[0, 0] = True
        for _ in range(3):
            aggregation, clip, denominator = next(choices)
            options = {"aggregation": aggregation, "clip": clip, "denominator": denominator}
            old_values = None if clip is None else old
            assert_accurate(run, "value_loss", [values, old_values, returns, mask], {}, options)


def check_more_tiles_and_sequences_than_programs(run):
    """Then programs loop over tiles and sequences, and several of them count the mask in a launch of its own."""
    with mock.patch.multiple(run.losses, PROGRAMS=3, COUNT_ITSELF=0):
        for shape in ((1, 7 * run.losses.TILE + 5), (3, 3 * run.losses.MASK_TILE + 1), (11, 3)):
            arguments, optional = ppo_batch(*shape)
            options = COEFFICIENTS | {"clip_low": 0.1}
            with run.launches() as names:
                ours = results(run.F.ppo_loss, run.device, arguments, optional, options)
            assert names == ["_rows_kernel", "_ppo_kernel"]
            assert ours[1][9] == arguments[3].sum()
            assert_accurate(run, "ppo_loss", arguments, optional, options)
            options |= {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean"}
            assert_accurate(run, "ppo_loss", arguments, optional, options)
            values, old, returns, mask = arguments[0], arguments[1], arguments[2] - 1000, arguments[3]
            assert_accurate(run, "value_loss", [values, old, returns, mask], {}, {"clip": 0.2})


def check_number_of_launches(run):
    """As the docstring of the kernels says: one for PPO and one for the values up to 64k tokens."""
    arguments, optional = ppo_batch(8, 100)

    def launches(function, arguments, **options):
        with run.launches() as names:
            results(function, run.device, arguments, optional if function is run.F.ppo_loss else {}, options)
        return names

    assert launches(run.F.ppo_loss, arguments, **COEFFICIENTS) == ["_ppo_kernel"]
    assert launches(run.F.value_loss, arguments, clip=0.2) == ["_value_kernel"]
    with mock.patch.object(run.losses, "COUNT_ITSELF", 0):
        assert launches(run.F.ppo_loss, arguments) == ["_rows_kernel", "_ppo_kernel"]
        assert launches(run.F.value_loss, arguments) == ["_rows_kernel", "_value_kernel"]
        assert launches(run.F.ppo_loss, arguments, denominator=9) == ["_ppo_kernel"]
        sums = {"aggregation": "seq-mean-token-sum", "denominator": 9}
        assert launches(run.F.ppo_loss, arguments, **sums) == ["_ppo_kernel"]
        with run.launches() as names, torch.no_grad():
            run.F.ppo_loss(*(x.to(run.device) for x in arguments))
            run.F.value_loss(*(x.to(run.device) for x in arguments))
        assert names == ["_ppo_kernel", "_value_kernel"]
    assert len(launches(run.F.ppo_loss, arguments, ratio_level="sequence")) == 2
    empty = [x[:0] for x in arguments]
    with run.launches() as names:
        run.F.ppo_loss(*(x.to(run.device) for x in empty))
        run.F.value_loss(*(x.to(run.device) for x in empty))
    assert names == []


def check_who_counts_the_mask_changes_no_bit(run):
    arguments, optional = ppo_batch(5, 1237)
    for denominator in (None, arguments[3].sum()):
        itself = results(run.F.ppo_loss, run.device, arguments, optional, COEFFICIENTS | {"denominator": denominator})
        with mock.patch.object(run.losses, "COUNT_ITSELF", 0):
            first = results(run.F.ppo_loss, run.device, arguments, optional, COEFFICIENTS)
        assert_same(itself, first)


def check_alignment_and_neighbours_change_no_bit(run):
    """Slices at every offset to a 16-byte boundary, between nans."""
    tile = run.losses.TILE
    for shape in ((1, tile + 3), (3, 112)):
        arguments, optional = ppo_batch(*shape)
        stats = {"advantage_stats": optional.pop("advantage_stats")}
        options = EVERYTHING | COEFFICIENTS | {"aggregation": "seq-mean-token-mean"}
        value_options = {"clip": 0.2, "aggregation": "seq-mean-token-mean"}

        def shifted(x, by):
            filler = True if x.dtype == torch.bool else NAN
            buffer = torch.full((x.numel() + 32,), filler, dtype=x.dtype, device=run.device)
            view = buffer[by : by + x.numel()].view(x.shape)
            return view.copy_(x)

        for ratio_level in ("token", "sequence"):
            options["ratio_level"] = ratio_level
            outcomes = []
            for by in (0, 1, 2, 16):
                moved = [shifted(x, by) for x in arguments]
                others = {name: shifted(x, by) for name, x in optional.items()} | stats
                outcomes.append(results(run.F.ppo_loss, run.device, moved, others, options))
                outcomes[-1] += results(run.F.value_loss, run.device, moved, {}, value_options)
            for other in outcomes[1:]:
                assert_same(outcomes[0], other)


def check_what_stands_under_the_mask_changes_no_bit(run):
    arguments, optional = ppo_batch(4, 611)
    mask, stats = arguments[3], {"advantage_stats": optional.pop("advantage_stats")}
    dirty = [poison(x, mask) for x in arguments[:3]] + [mask]
    dirty_optional = {name: poison(x, mask) for name, x in optional.items()} | stats
    for aggregation, ratio_level in itertools.product(AGGREGATIONS, ("token", "sequence")):
        options = EVERYTHING | COEFFICIENTS | {"aggregation": aggregation, "ratio_level": ratio_level}
        clean = results(run.F.ppo_loss, run.device, arguments, optional | stats, options)
        assert_same(clean, results(run.F.ppo_loss, run.device, dirty, dirty_optional, options))
        assert not clean[2][~mask].any()
        assert not clean[3][~mask].any()
        options = {"clip": 0.2, "aggregation": aggregation}
        clean = results(run.F.value_loss, run.device, arguments, {}, options)
        assert_same(clean, results(run.F.value_loss, run.device, dirty, {}, options))


def check_nothing_counts(run):
    nan, nobody = torch.full((3, 70), NAN), torch.zeros(3, 70, dtype=torch.bool)
    for aggregation, ratio_level, denominator in itertools.product(AGGREGATIONS, ("token", "sequence"), (None, 3.0)):
        options = {"aggregation": aggregation, "denominator": denominator}
        ppo_options = COEFFICIENTS | options | {"ratio_level": ratio_level}
        optional = dict.fromkeys(("weights", "entropy", "ref_log_probs"), nan)
        ours = results(run.F.ppo_loss, run.device, [nan, nan, nan, nobody], optional, ppo_options)
        ours += results(run.F.value_loss, run.device, [nan, nan, nan, nobody], {}, options | {"clip": 0.2})
        assert not any(x.any() for x in ours)


def check_again_gives_the_same_bits(run):
    """Also when the programs come in another order, so that another one is last."""
    arguments, optional = ppo_batch(3, 1999)
    for function, tensors, options in ((run.F.ppo_loss, optional, COEFFICIENTS), (run.F.value_loss, {}, {"clip": 0.2})):
        first = results(function, run.device, arguments, tensors, options)
        assert_same(first, results(function, run.device, arguments, tensors, options))
        if run.device == "cpu":
            from triton.runtime.interpreter import interpreter_builder as grid

            index = type(grid).set_grid_idx
            backwards = lambda grid, x, y, z, index=index: index(grid, grid.grid_dim[0] - 1 - x, y, z)  # noqa: E731
            with mock.patch.object(type(grid), "set_grid_idx", backwards):
                assert_same(first, results(function, run.device, arguments, tensors, options))


def check_a_sequence_does_not_depend_on_its_batch(run):
    arguments, optional = ppo_batch(5, 333)
    stats = {"advantage_stats": optional.pop("advantage_stats")}
    for aggregation, ratio_level in itertools.product(AGGREGATIONS[1:], ("token", "sequence")):
        options = EVERYTHING | COEFFICIENTS | {"aggregation": aggregation, "ratio_level": ratio_level, "denominator": 3}
        batch = results(run.F.ppo_loss, run.device, arguments, optional | stats, options)
        one = [x[2:3] for x in arguments], {name: x[2:3] for name, x in optional.items()} | stats
        alone = results(run.F.ppo_loss, run.device, *one, options)
        assert same_bits(batch[2][2:3], alone[2])
        assert same_bits(batch[3][2:3], alone[3])


def check_small_divergences_keep_their_digits(run):
    """r - 1 - log r of a log-ratio of 1e-4 is 5e-9: a difference of ones would be all rounding."""
    old = torch.zeros(1, 700)
    log_probs = old + 1e-4
    mask = torch.ones(1, 700, dtype=torch.bool)
    options = {"kl_estimator": "k3", "kl_coef": 1.0}
    ours = results(run.F.ppo_loss, run.device, [log_probs, old, old, mask], {"ref_log_probs": old}, options)
    near = log_probs[0, 0].double()
    assert ours[1][1].item() == pytest.approx((torch.expm1(near) - near).item(), rel=1e-5)
    assert ours[1][8].item() == pytest.approx((torch.expm1(-near) + near).item(), rel=1e-5)
    assert ours[2][0, 0].item() * 700 == pytest.approx(-torch.expm1(-near).item(), rel=1e-5)


def check_large_ratios_keep_their_digits(run):
    log_probs = torch.linspace(-100, 88, 700)[None]
    zeros, mask = torch.zeros(1, 700), torch.ones(1, 700, dtype=torch.bool)
    options = {"log_ratio_clamp": None, "clip_high": 1e38, "clip_low": 1.0}
    (grad,) = results(run.F.ppo_loss, run.device, [log_probs, zeros, zeros - 1, mask], {}, options)[2:]
    exact = log_probs.double().exp() / 700
    assert ((grad - exact).abs() <= 4 * EPS * exact + 1e-37).all()


def check_infinities_and_nans_show_or_are_held(run):
    inputs = torch.tensor([[-INF, -1.0, 200.0, -200.0, 0.0]]), torch.tensor([[-1.0, -INF, 0.0, 0.0, 0.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0]])
    for ratio_level in ("token", "sequence"):
        options = {"ratio_level": ratio_level}
        loss, stats, grad = results(run.F.ppo_loss, run.device, [*inputs, advantages, mask], {}, options)
        assert loss.isfinite() == (ratio_level == "token")  # inf - inf has no mean
        assert torch.equal(grad, torch.tensor([[0.0, 0.0, 0.0, 0.0, -0.2]])) or ratio_level == "sequence"
    for position in range(3):  # in any of these, a nan that counts reaches the loss and its own gradient
        arguments = [torch.zeros(1, 40), torch.zeros(1, 40), torch.ones(1, 40)]
        arguments[position][0, 7] = NAN
        loss, stats, grad = results(run.F.ppo_loss, run.device, [*arguments, torch.ones(1, 40).bool()], {}, {})
        assert loss.isnan()
        assert torch.equal(grad.isnan(), torch.arange(40)[None] == 7)
        assert stats[4:7].isnan().all() == (position < 2)
        arguments[position][0, 7] = NAN
        options = {"ratio_level": "sequence"}
        loss, _, grad = results(run.F.ppo_loss, run.device, [*arguments, torch.ones(1, 40).bool()], {}, options)
        assert loss.isnan()
        assert grad.isnan().all()  # a sequence has one ratio
        loss, _, grad = results(run.F.value_loss, run.device, [*arguments, torch.ones(1, 40).bool()], {}, {"clip": 9})
        assert loss.isnan()
        assert torch.equal(grad.isnan(), torch.arange(40)[None] == 7)


def check_a_coefficient_of_zero_only_monitors(run):
    arguments, _ = ppo_batch(3, 600)
    arguments[3][0, :3] = True
    far, entropy = arguments[0].clone(), torch.ones(3, 600)
    far[0, 0], far[0, 1], entropy[0, 2] = -INF, NAN, INF
    for estimator in ("k1", "k2", "k3", "abs"):
        plain = results(run.F.ppo_loss, run.device, arguments, {}, {})
        tensors = {"ref_log_probs": far, "entropy": entropy}
        watched = results(run.F.ppo_loss, run.device, arguments, tensors, {"kl_estimator": estimator})
        assert same_bits(plain[0], watched[0])
        assert same_bits(plain[2], watched[2])
        assert watched[1][8].isnan()
        assert watched[1][7] == INF


def check_explained_variance_far_from_zero_and_beside_an_outlier(run):
    generator = torch.Generator().manual_seed(0)
    noise, spread = torch.randn(2, 3, 1500, generator=generator)
    mask = torch.rand(3, 1500, generator=generator) > 0.4
    for shift, outlier in ((1000.0, 0.0), (0.0, 3e4), (-1e5, 0.0)):
        returns = spread + shift
        returns[0, mask[0].int().argmax()] += outlier
        values = returns + 0.5 * noise
        stats = results(run.F.value_loss, run.device, [values, None, returns, mask], {}, {})[1]
        error, target = (returns - values)[mask].double(), returns[mask].double()
        assert stats[3].item() == pytest.approx(1 - (error.var() / target.var()).item(), abs=1e-4)
        size = target.abs().mean().item()  # a few roundings of what is added up
        assert stats[1].item() == pytest.approx(values[mask].double().mean().item(), abs=8 * EPS * size)
        assert stats[2].item() == pytest.approx(target.mean().item(), abs=8 * EPS * size)
    for constant in (0.1, 0.3, 1000.1):  # nothing is explained where all returns are equal
        stats = results(run.F.value_loss, run.device, [noise, None, torch.full_like(noise, constant), mask], {}, {})[1]
        assert stats[3] == 0.0
        assert stats[2] == torch.tensor(constant)


def check_at_step_zero_the_ratio_is_one(run):
    arguments, _ = ppo_batch(3, 700)
    arguments[1] = arguments[0].clone()
    for ratio_level in ("token", "sequence"):
        loss, stats, _ = results(run.F.ppo_loss, run.device, arguments, {}, {"ratio_level": ratio_level})
        assert stats[4:7].tolist() == [1.0, 1.0, 1.0]
        assert stats[1:4].tolist() == [0.0, 0.0, 0.0]
        assert stats[0] == loss


def check_layouts_other_than_contiguous(run):
    arguments, optional = ppo_batch(7, 130)
    base = results(run.F.ppo_loss, run.device, arguments, optional, COEFFICIENTS)
    turned = [x.t().contiguous().t() for x in arguments]
    others = {name: x.t().contiguous().t() if x.dim() == 2 else x for name, x in optional.items()}
    assert_same(base, results(run.F.ppo_loss, run.device, turned, others, COEFFICIENTS))
    flat = [x.flatten() for x in arguments]
    others = {name: x.flatten() for name, x in optional.items()}
    assert_same([x.flatten() for x in base], [x.flatten() for x in _flat(run, flat, others)])


def _flat(run, arguments, optional):
    return results(run.F.ppo_loss, run.device, arguments, optional, COEFFICIENTS)


def check_wrong_tensors_are_refused_by_the_kernels_too(run):
    x = torch.zeros(3, 4, device=run.device)
    mask, clip = torch.ones(3, 4, dtype=torch.bool, device=run.device), torch.tensor([INF])
    for wrong in (x[:2], x.half()):
        with pytest.raises(ValueError, match="returns: got"):
            run.losses.value_loss(x, None, wrong, mask, None, clip, 0, True)
    with pytest.raises(ValueError, match="mask: got"):
        run.losses.value_loss(x, None, x, x, None, clip, 0, True)
    with pytest.raises(ValueError, match=r"wanted \[B, T\]"):
        run.losses.value_loss(x[0], None, x[0], mask[0], None, clip, 1, True)


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


# -------------------------------------------------------------------------------------------------------- the runs


def child(file, *arguments):
    """A child process in which Triton interprets and its kernels serve the CPU, where the C++ ones stand aside."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "FASTRLHF_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(file), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def outcomes(file):
    """{check: traceback, or "" if it passed}, from one child process."""
    done = child(file)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted():
    return outcomes(__file__)


@pytest.mark.parametrize("check", CHECKS)
def test_in_interpreter(check, interpreted):
    assert not interpreted[check], interpreted[check]


def test_the_contract_of_the_cpu_kernels_holds_in_the_interpreter():
    done = child(__file__, "contract")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100%" in done.stdout


def test_loops_over_tokens_move_128_bits_an_access():
    """Of every tensor but the mask, whose four bytes a thread are 32."""
    from test_gpu_audit import gpu_audit

    kernels, family = gpu_audit.load_kernels(gpu_audit.KERNELS / "losses.py"), gpu_audit.load_family("losses")
    for op, reads, writes in (("ppo_loss[everything]", 6, 2), ("value_loss", 3, 1)):
        function, args = family.launches(kernels, torch.float32)[op][0]
        with gpu_audit.compile_only(90) as launches:
            function(*args)
        _, code = gpu_audit.disassemble(launches[-1].binary.asm["cubin"])
        loops = [(gpu_audit.widths(body, "LDG"), gpu_audit.widths(body, "STG")) for body in gpu_audit.loops(code)]
        assert ({128: reads, 32: 1}, {128: writes}) in loops


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_gpu(check):
    CHECKS[check](Run("cuda"))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("shape", [(64, 1024), (512, 1024), (4096, 2048), (3001, 131)])
def test_on_gpu_at_real_sizes(shape):
    run = Run("cuda")
    arguments, optional = ppo_batch(*shape)
    for options in ({}, {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean"}):
        options = EVERYTHING | COEFFICIENTS | options
        ours = assert_accurate(run, "ppo_loss", arguments, optional, options)
        for _ in range(10):  # whoever happens to be last
            assert_same(ours, results(run.F.ppo_loss, "cuda", arguments, optional, options))
    ours = assert_accurate(run, "value_loss", arguments, {}, {"clip": 0.2})
    for _ in range(10):
        assert_same(ours, results(run.F.value_loss, "cuda", arguments, {}, {"clip": 0.2}))


@pytest.mark.gpu
@on_gpu
def test_on_gpu_streams_and_graphs_do_not_disturb_each_other():
    run = Run("cuda")
    log_probs, old, advantages, mask = (x.cuda() for x in ppo_batch(900, 300)[0])
    log_probs.requires_grad_()

    def step():
        loss, stats = run.F.ppo_loss(log_probs, old, advantages, mask)
        return loss.detach(), torch.stack(list(stats)), *torch.autograd.grad(loss, log_probs)

    expected = step()
    torch.cuda.synchronize()
    streams, graphs, found = [torch.cuda.Stream() for _ in range(4)], [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            found.append(step())
    for _ in range(20):
        for stream, graph in zip(streams, [*graphs, None, None], strict=True):
            with torch.cuda.stream(stream):
                if graph is None:
                    found.append(step())
                else:
                    graph.replay()
    torch.cuda.synchronize()
    for outcome in found:
        assert_same(outcome, expected)


@pytest.mark.gpu
@on_gpu
def test_on_gpu_bug_liger_803_and_trl_int32_offsets():
    n = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    values, returns = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
    mask = torch.zeros(n, dtype=torch.bool, device="cuda")
    mask[-3:] = True
    returns[-3:] = torch.tensor([1.0, 2.0, 6.0], device="cuda")
    loss, stats = Run("cuda").F.value_loss(values.requires_grad_(), None, returns, mask)
    (grad,) = torch.autograd.grad(loss, values)
    assert loss.item() == pytest.approx(41 / 6)
    assert (stats.tokens.item(), stats.return_mean.item()) == (3.0, 3.0)
    torch.testing.assert_close(grad[-4:].cpu(), torch.tensor([0.0, -1 / 3, -2 / 3, -2.0]))
    assert not grad[:-3].any()


def main(checks, arguments):
    run = Run("cpu")
    if arguments == ["contract"]:
        here = Path(__file__).parent
        # Slow here and the like of a check above, or not of these kernels.
        left_out = ("any_options", "ppo_loss_against_the_oracle", "shapes", "threads", "refused", "micro_batches")
        left_out = " and ".join(f"not {name}" for name in left_out)
        files = [str(here / name) for name in ("test_losses.py", "test_losses_contract.py")]
        return pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", left_out, *files])
    found = {}
    for name, check in checks.items():
        try:
            check(run)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            print(name, found[name], sep="\n", file=sys.stderr)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(CHECKS, sys.argv[1:]))
