"""A vocabulary that is spread over a process group, against one process that has all of it and against fp64.

Starting a process takes seconds: for each number of ranks there is one group of them, each executing this file
(`python tests/test_vocab_parallel.py RANK WORLD FILE`) and running every `check_*`, which are reported one by one.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from oracle import EPS, assert_as_good_as_eager, peak_allocation, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from fastrlhf import backends, reference
from fastrlhf import functional as F
from fastrlhf.functional import _vocab_parallel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")
SHARDS = {2: ((12, 25), (1, 36), (600, 601)), 3: ((1, 1, 1), (12, 20, 5), (600, 1, 601))}
SIZE = 16  # of the hidden states
HEADS = (
    {},
    {"bias": True},
    {"softcap": 4.0},
    {"bias": True, "softcap": 6.0, "temperature": 0.7},
)


class Run:
    """This rank, and its part of things."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.group = rank, world, dist.group.WORLD
        self.shards = SHARDS[world]
        self.uneven = self.shards[1]

    def part(self, tensors, shards):
        """Of the logits their columns; of weight and bias their rows; hidden states are everyone's."""
        dims = {"logits": -1, "weight": 0, "bias": 0}
        return {k: x.split(shards, dims[k])[self.rank] if k in dims else x for k, x in tensors.items()}

    def assert_same_everywhere(self, *tensors):
        for x in tensors:
            x = x.float().contiguous()
            everyones = [torch.empty_like(x) for _ in range(self.world)]
            dist.all_gather(everyones, x)
            assert all(same_bits(x, other) for other in everyones)


def sample_tokens(shards, generator):
    """Both ends of every shard, some between them, and two that do not count."""
    sizes = torch.tensor(shards)
    ends = sizes.cumsum(0)
    somewhere = torch.randint(sum(shards), (13,), generator=generator)
    tokens = torch.cat([ends - 1, ends - sizes, somewhere])
    tokens[[7, -1]] = -100
    return tokens


def sample_logits(shards, dtype=torch.float32):
    """Logits around 3 of the whole vocabulary, tokens, and gradients of log-probs and entropies."""
    generator = torch.Generator().manual_seed(sum(shards))
    tokens = sample_tokens(shards, generator)
    logits = 3 * torch.randn(len(tokens), sum(shards), generator=generator)
    return {"logits": logits.to(dtype)}, tokens, torch.randn(2, len(tokens), generator=generator)


def sample_head(shards, dtype=torch.float32, *, bias=False, shape=None):
    """hidden, weight (and bias) that make logits around 3, tokens, and gradients as above."""
    generator = torch.Generator().manual_seed(sum(shards))
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tokens = sample_tokens(shards, generator)
    tokens = tokens if shape is None else tokens[: shape.numel()].view(shape)
    head = {"hidden": normal(*tokens.shape, SIZE), "weight": 3 * normal(sum(shards), SIZE) / SIZE**0.5}
    head |= {"bias": normal(sum(shards))} if bias else {}
    return {name: x.to(dtype) for name, x in head.items()}, tokens, normal(2, *tokens.shape)


def eager_head(hidden, weight, tokens, *, bias=None, temperature=1.0, softcap=None):
    """As everybody writes it: logits in the dtype of hidden and weight."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return reference.token_log_probs_and_entropy(logits, tokens, temperature=temperature)


def leaves_of(tensors):
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def wide(tensors):
    return {name: x.double() for name, x in tensors.items()}


def outcome(function, tensors, grads, **options):
    """The results of function(**tensors, **options), and the gradients of the tensors, given those of the results."""
    leaves = leaves_of(tensors)
    results = function(**leaves, **options)
    found = torch.autograd.grad(results[: len(grads)], list(leaves.values()), list(grads))
    return [x.detach() for x in results], dict(zip(leaves, found, strict=True))


# Log-probs and entropies are around 10 to 30 in size, half an ulp of which is rounded away by each of log s, the local
# log-prob and the result. With a head there are the roundings of a dot product too, each of a partial sum of about the
# size of the logits: as a random walk, five of its standard deviations.
SLACK_OF_LOGITS = 32 * EPS
SLACK_OF_HEAD = (32 + 3 * SIZE**0.5) * EPS


def assert_gradients(ours, peers, exact, slack, ranks=1):
    """The error of log p is a relative one of p. In 16 bits dz, the sum of each rank and the result are rounded."""
    for name, truth in exact.items():
        mine = ours[name]
        rounding = 0.0 if mine.dtype == torch.float32 else (2 + ranks) * torch.finfo(mine.dtype).eps
        for peer in peers:
            assert mine.dtype == peer[name].dtype
            allowed = (2 * slack + rounding) * truth.abs().max().item()
            assert_as_good_as_eager(mine, peer[name], truth, allowed, f"gradient of {name}")


# -------------------------------------------------------------------------------------------------------- the logits


def assert_logits(run, tensors, tokens, grads, shards, slack, **options):
    """As good as eager PyTorch and as one process, and the same on all ranks."""
    exact = outcome(reference.token_log_probs_and_entropy, wide(tensors), grads, tokens=tokens, **options)
    eager = outcome(reference.token_log_probs_and_entropy, tensors, grads, tokens=tokens, **options)
    single = outcome(F.token_log_probs_and_entropy, tensors, grads, tokens=tokens, **options)
    options |= {"tokens": tokens, "group": run.group}
    ours = outcome(F.token_log_probs_and_entropy, run.part(tensors, shards), grads, **options)
    run.assert_same_everywhere(*ours[0])
    for i, name in enumerate(("log_probs", "entropy")):
        assert ours[0][i].dtype == torch.float32
        for peer in (eager, single):
            allowed = slack + 2 * EPS * exact[0][i].abs().max().item()
            assert_as_good_as_eager(ours[0][i], peer[0][i], exact[0][i], allowed, name)
    peers = [run.part(x[1], shards) for x in (eager, single)]
    assert_gradients(ours[1], peers, run.part(exact[1], shards), slack)


def check_logits(run):
    for dtype, shards, temperature in itertools.product(DTYPES, run.shards, (1.0, 0.7)):
        slack = SLACK_OF_LOGITS / temperature
        assert_logits(run, *sample_logits(shards, dtype), shards, slack, temperature=temperature)


def check_one_rank_is_far_above_or_below_the_others(run):
    """No sum loses them, none overflows."""
    for shift, loud in itertools.product((-1e4, 1e3, 1e5, -1e30, 1e30), range(run.world)):
        tensors, tokens, grads = sample_logits(run.uneven)
        tensors["logits"].split(run.uneven, 1)[loud].add_(shift)
        assert_logits(run, tensors, tokens, grads, run.uneven, SLACK_OF_LOGITS)


def check_log_probs_alone(run):
    tensors, tokens, (g, _) = sample_logits(run.uneven)
    local = run.part(tensors, run.uneven)
    options = {"tokens": tokens, "temperature": 0.9, "group": run.group}
    alone = outcome(lambda **kw: (F.token_log_probs(**kw),), local, [g], **options)
    both = outcome(F.token_log_probs_and_entropy, local, [g], **options)
    assert same_bits(alone[0][0], both[0][0])
    assert torch.equal(alone[1]["logits"], both[1]["logits"])


def check_inplace_backward(run):
    tensors, tokens, grads = sample_logits(run.uneven, torch.bfloat16)
    options = {"temperature": 0.7, "group": run.group}
    for entropy in (False, True):
        outcomes = []
        for inplace in (False, True):
            z = leaves_of(run.part(tensors, run.uneven))["logits"] * 1
            if entropy:
                results = F.token_log_probs_and_entropy(z, tokens, inplace_backward=inplace, **options)
            else:
                results = (F.token_log_probs(z, tokens, inplace_backward=inplace, **options),)
            (grad,) = torch.autograd.grad(results, z, list(grads[: len(results)]))
            assert (grad.data_ptr() == z.data_ptr()) == inplace
            outcomes.append((*results, grad))
        assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def check_every_shape_of_rows(run):
    generator = torch.Generator().manual_seed(1)
    for shape in ((), (0,), (2, 3), (2, 0, 3)):
        tensors = {"logits": torch.randn(*shape, sum(run.uneven), generator=generator)}
        tokens = torch.full(shape, sum(run.uneven) - 1)
        grads = torch.randn(2, *shape, generator=generator)
        whole = outcome(F.token_log_probs_and_entropy, tensors, grads, tokens=tokens)
        local = run.part(tensors, run.uneven)
        ours = outcome(F.token_log_probs_and_entropy, local, grads, tokens=tokens, group=run.group)
        torch.testing.assert_close(ours, (whole[0], run.part(whole[1], run.uneven)))


def check_logits_of_minus_infinity(run):
    """Some; a whole shard of them; the token's own, within its shard and in a shard of nothing else; all."""
    shards, generator = run.uneven, torch.Generator().manual_seed(2)
    tensors, tokens, grads = sample_logits(shards)
    logits = tensors["logits"]
    logits[torch.rand(logits.shape, generator=generator) < 0.4] = -INF
    logits.scatter_(1, tokens.clamp(min=0)[:, None], 0.5)
    tokens[:5] = torch.tensor([0, 0, sum(shards) - 1, sum(shards) - 1, sum(shards) - 1])
    logits[:, 0] = logits[:, -1] = 1.0  # the first and the last shard have something, but for these:
    logits[:2, shards[0] :] = -INF
    logits[2, : shards[0]] = -INF
    logits[3, -1] = -INF
    logits[4, -shards[-1] :] = -INF
    tokens[5], logits[5] = 0, -INF
    whole, local = leaves_of(tensors), leaves_of(run.part(tensors, shards))
    single = F.token_log_probs_and_entropy(**whole, tokens=tokens)
    ours = F.token_log_probs_and_entropy(**local, tokens=tokens, group=run.group)
    torch.testing.assert_close(ours, single, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert ours[0][:3].isfinite().all()
    assert ours[0][3:5].tolist() == [-INF, -INF]
    assert ours[1][3:5].isfinite().all()
    assert all(x[5].isnan() for x in ours)
    grads[:, 5] = 0.0
    grad, exact = (
        torch.autograd.grad(*x, list(grads))[0] for x in ((ours, local["logits"]), (single, whole["logits"]))
    )
    torch.testing.assert_close(grad, run.part({"logits": exact}, shards)["logits"], rtol=1e-5, atol=1e-6)


def check_nan_and_infinity_are_not_hidden(run):
    for bad, column, alone in itertools.product((NAN, INF), (0, -1), (False, True)):
        tensors, tokens, _ = sample_logits(run.uneven)
        if alone:  # a shard of nothing but -inf, were it not for this number
            tensors["logits"].split(run.uneven, 1)[column][0] = -INF
        tensors["logits"][0, column] = bad
        tokens[0] = run.uneven[0]  # on neither's rank, if there are three
        ours = F.token_log_probs_and_entropy(**run.part(tensors, run.uneven), tokens=tokens, group=run.group)
        assert all(x.isnan().nonzero().tolist() == [[0]] for x in ours)


def check_both_ways_to_say_that_nothing_is_possible(run):
    """m = -inf, as in C++ and PyTorch, or log s = -inf, as in Triton: such a shard adds nothing."""
    part = _vocab_parallel.shard(run.group, torch.tensor([0, 5]), 5)
    full = (torch.full((2,), -1.0), torch.full((2,), 0.5), torch.tensor([[2.0, 0.25]] * 2))
    for m, log_s in ((-INF, NAN), (torch.finfo(torch.float32).min, -INF)):
        empty = (torch.full((2,), NAN), torch.full((2,), NAN), torch.tensor([[m, log_s]] * 2))
        log_probs, *rest = _vocab_parallel.merge(full if run.rank == 0 else empty, part, torch.tensor([0.7]))
        assert log_probs.tolist() == [-1.0, -INF]
        assert all(torch.equal(a, b) for a, b in zip(rest, full[1:], strict=True))


def check_rows_that_do_not_count(run):
    tensors, tokens, grads = sample_logits(run.uneven)
    tensors["logits"][tokens == -100] = NAN
    for ids in (tokens, torch.full_like(tokens, -100)):
        options = {"tokens": ids, "group": run.group}
        results, found = outcome(F.token_log_probs_and_entropy, run.part(tensors, run.uneven), grads, **options)
        for x in (*results, found["logits"]):
            assert not x[ids == -100].any()
            assert x[ids != -100].isfinite().all()


def check_nothing_of_the_vocabularys_size_is_allocated(run):
    if backends.REFERENCE_FORCED:  # plain PyTorch keeps log p
        return
    logits, tokens = torch.randn(64, 4096), torch.zeros(64, dtype=torch.int64)
    assert peak_allocation(lambda: F.token_log_probs_and_entropy(logits, tokens, group=run.group)) < logits.numel()


# ---------------------------------------------------------------------------------------------------------- the head


def check_head(run):
    for dtype, shards, options in itertools.product(DTYPES, run.shards, HEADS):
        options = dict(options)
        head, tokens, grads = sample_head(shards, dtype, bias=options.pop("bias", False))
        options["tokens"] = tokens
        exact = outcome(eager_head, wide(head), grads, **options)
        eager = outcome(eager_head, head, grads, **options)
        single = outcome(F.linear_token_log_probs_and_entropy, head, grads, **options)
        local = run.part(head, shards)
        ours = outcome(F.linear_token_log_probs_and_entropy, local, grads, group=run.group, **options)
        again = outcome(F.linear_token_log_probs_and_entropy, local, grads, group=run.group, **options)
        run.assert_same_everywhere(*ours[0], ours[1]["hidden"])
        torch.testing.assert_close(ours, again, rtol=0, atol=0)
        slack = SLACK_OF_HEAD / options.get("temperature", 1.0)
        for i, name in enumerate(("log_probs", "entropy")):
            for peer in (eager, single):
                assert_as_good_as_eager(ours[0][i], peer[0][i], exact[0][i], slack, name)
        peers = [run.part(x[1], shards) for x in (eager, single)]
        assert_gradients(ours[1], peers, run.part(exact[1], shards), slack, run.world)


def check_sums_of_16_bit_gradients_are_made_in_fp32(run):
    """In bf16, 256 + 1 + 1 is 256."""
    x = torch.ones(run.world, dtype=torch.bfloat16)
    x[run.rank] = 256
    expected = torch.full((run.world,), 255.0 + run.world).bfloat16()
    assert torch.equal(_vocab_parallel.summed(x, run.group), expected)


def check_one_of_the_results_alone(run):
    head, tokens, grads = sample_head(run.uneven)
    options = {"tokens": tokens, "group": run.group}
    function, local = F.linear_token_log_probs_and_entropy, run.part(head, run.uneven)
    for index in range(2):
        only = [g if i == index else torch.zeros_like(g) for i, g in enumerate(grads)]
        both = outcome(function, local, only, **options)
        alone = outcome(lambda **kw: (function(**kw)[index],), local, [grads[index]], **options)  # noqa: B023
        torch.testing.assert_close(alone[1], both[1], rtol=0, atol=0)
    assert same_bits(F.linear_token_log_probs(**local, **options), both[0][0])


def check_gradients_only_where_asked(run):
    head, tokens, (g, _) = sample_head(run.uneven, bias=True)
    local = run.part(head, run.uneven)
    options = {"tokens": tokens, "group": run.group}
    _, expected = outcome(lambda **kw: (F.linear_token_log_probs(**kw),), local, [g], **options)
    for wanted in local:
        leaves = {name: x.detach().requires_grad_(name == wanted) for name, x in local.items()}
        F.linear_token_log_probs(**leaves, **options).backward(g)
        assert torch.equal(leaves.pop(wanted).grad, expected[wanted])
        assert all(x.grad is None for x in leaves.values())
    with torch.no_grad():
        assert not F.linear_token_log_probs(**leaves_of(local), **options).requires_grad


def check_main_grad(run):
    """Megatron's: the weight's gradient is added to it in fp32, and the shard's owner alone has it."""
    head, tokens, (g, _) = sample_head(run.uneven)
    leaves, ours = (leaves_of(run.part(head, run.uneven)) for _ in range(2))
    ours["weight"].main_grad = torch.ones_like(ours["weight"])
    for times in (1, 2):
        for x in (leaves, ours):
            F.linear_token_log_probs(**x, tokens=tokens, group=run.group).backward(g)
        assert ours["weight"].grad is None
        slack = times * 4 * EPS * (1 + leaves["weight"].grad.abs().max().item())  # sums that begin at 1
        torch.testing.assert_close(ours["weight"].main_grad - 1, leaves["weight"].grad, rtol=0, atol=slack)
        torch.testing.assert_close(ours["hidden"].grad, leaves["hidden"].grad, rtol=0, atol=0)


def check_a_shard_of_padding(run):
    """A vocabulary that was padded to a size that divides well, its padding forbidden by a bias of -inf."""
    shards = run.uneven
    head, tokens, grads = sample_head(shards, bias=True)
    real = sum(shards[:-1])
    tokens = torch.where(tokens < 0, tokens, tokens % real)
    head["bias"][real:] = -INF
    short = {name: x if name == "hidden" else x[:real] for name, x in head.items()}
    exact = outcome(eager_head, wide(short), grads, tokens=tokens)
    eager = outcome(eager_head, short, grads, tokens=tokens)
    options = {"tokens": tokens, "group": run.group}
    ours = outcome(F.linear_token_log_probs_and_entropy, run.part(head, shards), grads, **options)
    for i, name in enumerate(("log_probs", "entropy")):
        assert_as_good_as_eager(ours[0][i], eager[0][i], exact[0][i], SLACK_OF_HEAD, name)
    if run.rank < run.world - 1:
        peer, truth = (run.part(x[1], shards[:-1]) for x in (eager, exact))
        assert_gradients(ours[1], [peer], truth, SLACK_OF_HEAD, run.world)
    else:
        assert not ours[1]["weight"].any()
        assert not ours[1]["bias"].any()


def check_head_rows_that_do_not_count(run):
    head, tokens, grads = sample_head(run.uneven, bias=True)
    head["hidden"][tokens == -100] = NAN
    for ids in (tokens, torch.full_like(tokens, -100)):
        local, options = run.part(head, run.uneven), {"tokens": ids, "group": run.group}
        results, found = outcome(F.linear_token_log_probs_and_entropy, local, grads, **options)
        assert all(x.isfinite().all() for x in (*results, *found.values()))
        for x in (*results, found["hidden"]):
            assert not x[ids == -100].any()


def check_autocast(run):
    head, tokens, grads = sample_head(run.uneven)
    narrow = {name: x.bfloat16() for name, x in head.items()}
    options = {"tokens": tokens, "group": run.group}
    expected = outcome(F.linear_token_log_probs_and_entropy, run.part(narrow, run.uneven), grads, **options)
    leaves = leaves_of(run.part(head, run.uneven))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = F.linear_token_log_probs_and_entropy(**leaves, **options)
    found = torch.autograd.grad(results, list(leaves.values()), list(grads))
    assert all(same_bits(a.detach(), b) for a, b in zip(results, expected[0], strict=True))
    assert all(torch.equal(a, b.float()) for a, b in zip(found, expected[1].values(), strict=True))


# -------------------------------------------------------------------------------------------------------- the losses


def assert_loss(run, function, oracle, shards, head, slack, slope, **options):
    """Loss, statistics, and the gradients of 1.7 times the loss. slope: of the loss, for all log-probs together."""
    grads = [torch.tensor(1.7)]
    exact = outcome(oracle, wide(head), [torch.tensor(1.7, dtype=torch.float64)], **options)
    eager = outcome(oracle, head, grads, **options)
    single = outcome(flat(function), head, grads, **options)
    ours = outcome(flat(function), run.part(head, shards), grads, group=run.group, **options)
    run.assert_same_everywhere(*ours[0], ours[1]["hidden"])
    for peer in (eager, single):
        for name, mine, theirs, truth in zip(("loss", "stats"), ours[0], peer[0], exact[0], strict=True):
            assert_as_good_as_eager(mine, theirs, truth, slack * (slope + truth.abs().max().item()), name)
    peers = [run.part(x[1], shards) for x in (eager, single)]
    assert_gradients(ours[1], peers, run.part(exact[1], shards), 2 * slack, run.world)  # g has an error as p has


def flat(function):
    """The statistics as one tensor."""

    def call(**options):
        loss, stats = function(**options)
        return loss, torch.stack(list(stats))

    return call


PPO_OPTIONS = (
    {},
    {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0, "entropy_coef": 0.01, "denominator": 50},
    {"kl_coef": 0.1, "kl_estimator": "k3", "aggregation": "seq-mean-token-mean", "log_ratio_clamp": None},
    {"kl_coef": 0.1, "kl_estimator": "k2", "aggregation": "seq-mean-token-sum", "weights": True, "whitened": True},
    {"ratio_level": "sequence", "entropy_coef": 0.1, "kl_coef": 0.05, "kl_estimator": "k1", "weights": True},
    {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean", "denominator": torch.tensor(7)},
)


def check_ppo_loss(run):
    shape = torch.Size((3, 5))
    for options, heads, dtype in itertools.product(PPO_OPTIONS, (HEADS[0], HEADS[-1]), DTYPES[:2]):
        options, heads = dict(options), dict(heads)
        head, tokens, _ = sample_head(run.uneven, dtype, bias=heads.pop("bias", False), shape=shape)
        with torch.no_grad():
            log_probs, _ = reference.linear_token_log_probs_and_entropy(**head, tokens=tokens, **heads)
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(5, *shape, generator=generator)
        options |= {
            **{"tokens": tokens, "old_log_probs": log_probs + 0.3 * noise[0], "advantages": noise[1]},
            **{"mask": (noise[2] > -0.7) & (tokens != -100), **heads},
        }
        if options.get("kl_coef"):
            options["ref_log_probs"] = log_probs + 0.3 * noise[3]
        if options.get("weights"):
            options["weights"] = noise[4].abs()
        if options.pop("whitened", False):
            options["advantage_stats"] = torch.tensor([0.1, 1.3])
        slack = SLACK_OF_HEAD / options.get("temperature", 1.0)
        slope = 12 if options.get("aggregation") == "seq-mean-token-sum" else 4  # |A| r w, summed over three, or a mean
        assert_loss(run, F.linear_ppo_loss, reference.linear_ppo_loss, run.uneven, head, slack, slope, **options)


def check_cross_entropy(run):
    def oracle(tokens, denominator=None, **head):
        loss = reference.linear_cross_entropy(**head, tokens=tokens, denominator=denominator)
        _, entropy = reference.linear_token_log_probs_and_entropy(**head, tokens=tokens)
        count = (tokens != -100).sum()
        return loss, torch.stack([reference.divide(entropy.sum(), count), count.to(entropy.dtype)])

    for denominator, options, dtype in itertools.product((None, 29, torch.tensor(0.5)), HEADS, DTYPES[:2]):
        options = dict(options)
        head, tokens, _ = sample_head(run.uneven, dtype, bias=options.pop("bias", False))
        for ids in (tokens, torch.full_like(tokens, -100)):
            slack = SLACK_OF_HEAD / options.get("temperature", 1.0)
            slope = 1.0 if denominator is None else len(tokens) / float(denominator)
            wanted = {"tokens": ids, "denominator": denominator, **options}
            assert_loss(run, F.linear_cross_entropy, oracle, run.uneven, head, slack, slope, **wanted)


def check_dpo_loss(run):
    ends = [0, 4, 4, 9, 15]

    def oracle(cu_seqlens, ref_chosen, ref_rejected, variant, label_smoothing=0.0, **head):
        log_probs, _ = reference.linear_token_log_probs_and_entropy(**head)
        sums = torch.stack([log_probs[a:b].sum() for a, b in itertools.pairwise(ends)])
        options = {"variant": variant, "label_smoothing": label_smoothing}
        return reference.dpo_loss(*sums.chunk(2), ref_chosen, ref_rejected, **options)

    for variant, heads in itertools.product(("sigmoid", "robust", "hinge"), HEADS):
        heads = dict(heads)
        head, tokens, _ = sample_head(run.uneven, bias=heads.pop("bias", False), shape=torch.Size((15,)))
        options = {"tokens": tokens, "cu_seqlens": torch.tensor(ends), "variant": variant, **heads}
        options |= {"ref_chosen": torch.tensor([-20.0, 0.3]), "ref_rejected": torch.tensor([-30.0, -35.0])}
        options |= {"label_smoothing": 0.1} if variant == "robust" else {}
        slack = SLACK_OF_HEAD / options.get("temperature", 1.0)
        slope = len(tokens)  # of the rewards' sums, at most
        assert_loss(run, F.linear_dpo_loss, oracle, run.uneven, head, slack, slope, **options)


# ------------------------------------------------------------------------------------------------------ the contract


def check_torch_compile(run):
    """One graph, forward and backward, and no new one for a new temperature."""

    def step(hidden, weight, tokens, group, temperature, linear):
        options = {"temperature": temperature, "group": group}
        if linear:
            log_probs, entropy = F.linear_token_log_probs_and_entropy(hidden, weight, tokens, **options)
        else:
            log_probs, entropy = F.token_log_probs_and_entropy(hidden @ weight.T, tokens, **options)
        return (log_probs * 2 - 0.1 * entropy).sum()

    head, tokens, _ = sample_head(run.uneven)
    for linear in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, fullgraph=True, backend=counter)
        for temperature in (0.9, 0.8, 0.7):
            grads = []
            for function in (step, compiled):
                leaves = leaves_of(run.part(head, run.uneven))
                function(**leaves, tokens=tokens, group=run.group, temperature=temperature, linear=linear).backward()
                grads.append([x.grad for x in leaves.values()])
            torch.testing.assert_close(*grads)
        assert counter.frame_count <= 2


def check_a_group_of_some_ranks(run):
    """Of one, which is as none, and of the last two, whose first is not the first of all."""
    alone = [dist.new_group([rank]) for rank in range(run.world)][run.rank]
    pair = dist.new_group([run.world - 2, run.world - 1])
    tensors, tokens, grads = sample_logits((12, 25))
    single = outcome(F.token_log_probs_and_entropy, tensors, grads, tokens=tokens)
    ours = outcome(F.token_log_probs_and_entropy, tensors, grads, tokens=tokens, group=alone)
    torch.testing.assert_close(ours, single, rtol=0, atol=4 * EPS)
    if run.rank < run.world - 2:
        with pytest.raises(ValueError, match="group: got int, wanted a process group of"):
            F.token_log_probs(**tensors, tokens=tokens, group=pair)
        return
    split = lambda x: {"logits": x["logits"].split((12, 25), 1)[run.rank - run.world + 2]}  # noqa: E731
    ours = outcome(F.token_log_probs_and_entropy, split(tensors), grads, tokens=tokens, group=pair)
    torch.testing.assert_close(ours, (single[0], split(single[1])))


def check_tokens_outside_the_vocabulary(run):
    shards = run.uneven
    head, tokens, _ = sample_head(shards)
    local = run.part(head, shards)
    logits = local["hidden"] @ local["weight"].T
    for token in (-1, -101, sum(shards), 2**40):
        tokens[2] = token
        message = rf"tokens: got {token} at position 2, wanted a token in \[0, {sum(shards)}\)"
        with pytest.raises(IndexError, match=message):
            F.token_log_probs(logits, tokens, group=run.group)
        with pytest.raises(IndexError, match=message):
            F.linear_token_log_probs(**local, tokens=tokens, group=run.group)
    with mock.patch.object(_vocab_parallel, "check_tokens"):  # as on a GPU, where reading the tokens would stall it
        log_probs, entropy = F.token_log_probs_and_entropy(logits, tokens, group=run.group)
    assert log_probs.isnan().nonzero().tolist() == [[2]]
    assert entropy.isfinite().all()


def check_double_backward_is_an_error(run):
    head, tokens, _ = sample_head(run.uneven)
    leaves = leaves_of(run.part(head, run.uneven))
    log_probs = F.linear_token_log_probs(**leaves, tokens=tokens, group=run.group)
    (grad,) = torch.autograd.grad((log_probs**2).sum(), leaves["weight"], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


# ----------------------------------------------------------------------------------------------------- who runs them

CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


@functools.cache
def reports(world: int) -> list[dict[str, str]]:
    """Of each rank: {check: traceback, or "" if it passed}, up to the first that failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__]
        children = [
            subprocess.Popen(
                [*command, str(rank), str(world), os.path.join(folder, "meet")],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        outputs = [child.communicate() for child in children]
    return [
        json.loads(output.splitlines()[-1]) if child.returncode == 0 else dict.fromkeys(CHECKS, f"died: {errors}")
        for child, (output, errors) in zip(children, outputs, strict=True)
    ]


@pytest.mark.parametrize("world", SHARDS)
@pytest.mark.parametrize("name", CHECKS)
def test_over_a_group(name, world):
    for rank, results in enumerate(reports(world)):
        failure = results.get(name, f"not run: {list(results)[-1]} failed before")
        assert not failure, f"rank {rank}: {failure}"


@pytest.mark.parametrize("group", [0, "world", [0, 1], object()])
def test_what_is_no_group(group):
    message = f"group: got {type(group).__name__}, wanted a process group of torch.distributed that this process is in"
    tokens = torch.zeros(2, dtype=torch.int64)
    for function, inputs in (
        (F.token_log_probs, (torch.zeros(2, 5), tokens)),
        (F.token_log_probs_and_entropy, (torch.zeros(2, 5), tokens)),
        (F.linear_token_log_probs, (torch.zeros(2, 3), torch.zeros(5, 3), tokens)),
        (F.linear_token_log_probs_and_entropy, (torch.zeros(2, 3), torch.zeros(5, 3), tokens)),
        (F.linear_cross_entropy, (torch.zeros(2, 3), torch.zeros(5, 3), tokens)),
    ):
        with pytest.raises(ValueError, match=message):
            function(*inputs, group=group)


def main():
    rank, world, meet = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    run, results = Run(rank, world), {}
    for name, check in CHECKS.items():
        try:
            check(run)
            results[name] = ""
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()
            print(name, results[name], sep="\n", file=sys.stderr)
            break  # the other ranks may wait for this one, and learn by its end that it is gone
    print(json.dumps(results))
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"group: got one of a torch\.distributed that is not initialized"):
        F.token_log_probs(torch.zeros(1, 5), torch.tensor([0]), group=run.group)


if __name__ == "__main__":
    main()
