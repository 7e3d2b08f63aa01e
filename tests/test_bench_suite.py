"""A run of the kernels' benchmarks at tiny sizes, and the way from it to the README."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_checks import FakeStopwatch, clockwork
from rich.console import Console

from fastrlhf.bench import (
    accuracy,
    contests,
    lm_head,
    peers,
    readme,
    records,
    report,
    suite,
)
from fastrlhf.bench.measure import Contender, Row, Stopwatch, measure
from fastrlhf.bench.peers.base import Run
from fastrlhf.bench.settings import FULL, TINY
from fastrlhf.cli import main

ROOT = Path(__file__).parents[1]


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
            "`bench ppo`, `bench dpo`, `bench reward`, `bench scoring`, `bench compat` or `bench ppo_learning`"
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
