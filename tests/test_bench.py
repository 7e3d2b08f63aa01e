"""The clockwork of the benchmarks, the limits, and the script for a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_checks import FakeStopwatch, clockwork

from fastrlhf.bench import (
    limits,
    records,
    report,
    suite,
)
from fastrlhf.bench.measure import LEAST, MOST, Contender, Limit, Roofline, Row, Stopwatch, interleave, measure, memory

ROOT = Path(__file__).parents[1]


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
