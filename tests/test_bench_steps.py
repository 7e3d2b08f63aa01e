"""The benchmarks of whole PPO iterations, of steps on pairs, whose contenders are processes, and of scoring."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrlhf.bench import (
    decoding_models,
    dpo_step,
    pair_step,
    pair_worker,
    ppo_learning,
    ppo_step,
    ppo_worker,
    readme,
    records,
    reward_step,
    scoring,
)
from fastrlhf.bench.measure import Stopwatch, measure
from fastrlhf.bench.peers import trl_pairs, trl_ppo
from fastrlhf.bench.settings import TINY
from fastrlhf.trainers.master_weights import MasterWeights

ROOT = Path(__file__).parents[1]


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

    def test_learners_that_make_other_steps_are_refused(self):
        assert len(ppo_learning.checked("TRL", [{"optimizer_steps": 2}] * 3)) == 3
        with pytest.raises(RuntimeError, match=r"TRL made \[1, 2\] optimiser steps an iteration, wanted 2"):
            ppo_learning.checked("TRL", [{"optimizer_steps": 2}, {"optimizer_steps": 1}])

    def test_both_learners_get_the_same_hyper_parameters(self, tmp_path):
        from fastrlhf.trainers import PPOConfig

        plans = [ppo_learning.worker_plan(name, tmp_path, ["a"], 5, seed=7) for name in ppo_learning.PROVIDERS]
        assert all(plan.arguments | ppo_learning.HYPER | {"seed": 7} == plan.arguments for plan in plans)
        ours = PPOConfig(str(tmp_path), **plans[0].arguments)
        assert (ours.rollout_batch_size, ours.mini_batch_size, ours.max_steps) == (16, 8, 5)
        assert plans[1].arguments["total_episodes"] == 5 * ours.rollout_batch_size
        assert [(plan.eos, plan.as_written) for plan in plans] == [(True, True)] * 2
        plans = [ppo_learning.worker_plan(name, tmp_path, ["a"], 5, 7, eos=False) for name in ppo_learning.PROVIDERS]
        assert [(plan.eos, plan.as_written) for plan in plans] == [(False, True)] * 2
        assert plans[1].arguments["stop_token"] is None

    def test_in_the_readme(self, measured_rows, tmp_path):
        folder = tmp_path / "device"
        folder.mkdir()
        content = {**records.environment("cpu"), "family": "ppo", "peers": ppo_step.roll_call(), "complete": True}
        records.write(folder / "ppo.json", content | {"rows": measured_rows[0]})
        run = [[{"seconds": 1.0, "metrics": dict.fromkeys(ppo_learning.CURVES, 0.5)}] * 2] * 3
        learnt = ppo_learning.result({"ours": run, "TRL": run})
        records.write(folder / "ppo-learning.json", records.environment("cpu") | learnt)
        records.write(folder / "ppo-learning-full-length.json", records.environment("cpu") | learnt)
        made = readme.performance_tables(tmp_path)
        assert "The curves overlap: in 2 of 2" in made
        assert made.count("score ours 0.50 ± 0.00, score TRL 0.50 ± 0.00, KL ours 0.50") == 2
        assert "(bench/results/device/ppo-learning.png)" in made
        assert "(bench/results/device/ppo-learning-full-length.png)" in made
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
        "metrics": {"logps/chosen": -100.0, "margin": 0.5, "rewards/margins": 0.5},
    }
    return [json.loads(json.dumps(one)) | {"seconds": 99.0}, one]


TRL_NAMES = [pair_step.TRL_FP32, pair_step.TRL_BF16, pair_step.TRL_MIXED, pair_step.AS_IT_COMES]


@pytest.mark.parametrize("family", [dpo_step, reward_step], ids=lambda family: family.STEP.trainer)
class TestPairs:
    """The benchmarks of DPO's and reward models' steps."""

    @pytest.fixture
    def measured_rows(self, family, monkeypatch):
        plans = []
        monkeypatch.setattr(
            ppo_worker, "run", lambda plan, module: (plans.append(plan), made_up_steps(plan, module))[1]
        )
        monkeypatch.setattr(trl_pairs, "version", lambda: "1.16.0")
        return list(family.measure(TINY)), plans

    def test_every_row_is_there_with_its_targets_and_its_peers(self, family, measured_rows):
        rows, plans = measured_rows
        peak, trl, reward = records.PEAK_OF_TRL, TRL_NAMES, family is reward_step
        variants = list(reward_step.ENSEMBLES.values()) if reward else []
        assert [(row["dtype"], tuple(row["results"])) for row in rows] == [
            ("fp32", ("ours", *variants[:1], trl[0], trl[3])),
            ("bf16", ("ours", *variants[1:], *trl[:3])),
        ]
        wanted = 1.7 if reward else 1.5
        assert records.reached(rows[0]) == {trl[0]: (wanted, 4.0, True), peak: (1.0, 0.5, True)}
        assert records.reached(rows[1]) == {trl[1]: (1.5, 4.0, True), trl[2]: (1.5, 4.0, True), peak: (1.0, 0.5, True)}
        assert rows[0]["results"]["ours"]["median_ms"] == 1000.0  # without the step that warms up
        assert rows[0]["results"]["ours"]["reference_s"] == 2.0
        assert "reference_s" not in rows[0]["results"][trl[3]]
        ran = [(plan.provider, plan.dtype, plan.heads) for plan in plans]
        assert ran == [
            *[("ours", dtype, heads) for heads in ([1, 5] if reward else [1]) for dtype in ("float32", "bfloat16")],
            *[("TRL", dtype, 1) for dtype in ("float32", "bfloat16", "float32", "float32")],
        ]
        attention = TINY.dpo.attention
        assert [plan.attention for plan in plans[-4:]] == [attention[x] for x in ("fp32", "bf16", "bf16", "fp32")]
        assert len({json.dumps(plan.pairs) for plan in plans}) == 1
        own = {"precompute_ref_log_probs", "gradient_checkpointing", "bf16", "num_heads"}
        same = [{name: x for name, x in plan.arguments.items() if name not in own} for plan in plans]
        assert all(arguments == same[0] for arguments in same)

    def test_no_token_spans_the_border_of_prompt_and_completion(self, family, measured_rows):
        rows, plan = measured_rows[1][0].pairs, TINY.dpo
        assert len(rows) == plan.pairs * plan.steps
        for row in rows:
            assert len(row["prompt"].split()) == plan.prompt
            assert all(plan.least <= len(row[side].split()) <= plan.most for side in ("chosen", "rejected"))
            assert all(text.startswith(" ") for text in row.values())

    def test_unequal_work_is_an_error(self, family, measured_rows):
        steps = made_up_steps(measured_rows[1][0], "")
        with pytest.raises(RuntimeError, match=r"ours made \[1\] steps of the optimiser, wanted 2 times 1"):
            pair_step.check(family.STEP, TINY.dpo, "ours", steps[:1], [])
        other = [steps[0] | {"metrics": {"logps/chosen": -101.0, "margin": 0.6}}, steps[1]]
        with pytest.raises(RuntimeError, match=r"where ours has .*: the work is not the same"):
            pair_step.check(family.STEP, TINY.dpo, pair_step.TRL_FP32, other, steps)

    @pytest.mark.parametrize("provider", ["ours", "TRL"])
    def test_a_process_makes_the_work_that_is_planned(self, family, provider):
        if provider == "TRL" and "missing" in pair_step.roll_call()["TRL"]:
            pytest.skip(pair_step.roll_call()["TRL"]["missing"])
        step, plan = family.STEP, TINY.dpo
        contenders = {**step.ours, **step.variants, **step.trl}
        with pair_step.language_model(plan.model, (12, 10)) as found:
            rows = pair_step.pairs(found.tokenizer, found.texts, plan)
            made = {
                name: ppo_worker.run(
                    pair_step.worker_plan(step, plan, found.folder, rows, contenders[name]), pair_worker.__name__
                )
                for name in ("fp32", *({"ours": list(step.variants)[:1], "TRL": [pair_step.TRL_FP32]}[provider]))
            }
        for name, steps in made.items():
            pair_step.check(step, plan, name, steps, made["fp32"])
            found = pair_step.result(plan, steps)
            assert found["repetitions"] == 1
            assert 0 < found["backward_s"] + found["optimizer_s"] < steps[1]["seconds"]
            assert found["cpu_s"] > 0
            assert ("reference_s" in found) == (family is dpo_step)
            assert found["peak_mib"] > 100

    def test_in_the_readme(self, family, measured_rows, tmp_path):
        folder, name = tmp_path / "device", family.STEP.trainer
        folder.mkdir()
        content = {**records.environment("cpu"), "family": name, "peers": pair_step.roll_call(), "complete": True}
        records.write(folder / f"{name}.json", content | {"rows": measured_rows[0]})
        made = readme.performance_tables(tmp_path)
        assert "| TRL fp32 | 1.0 | 4 s | 7 | 0.5 | 0.1 |" in made
        for block in re.findall(r"(?:^\|.*\n)+", made + "\n", flags=re.MULTILINE):
            assert len({line.count("|") for line in block.splitlines()}) == 1


class TestScoring:
    def test_every_row_times_ours_and_transformers(self, tmp_path):
        rows = [measure(row, Stopwatch(), 0.0) for row in scoring.rows(TINY)]
        assert [(row["op"], row["dtype"]) for row in rows] == [
            (op, dtype) for dtype in TINY.dtypes for op in ("judge", "reward")
        ]
        for row in rows:
            assert set(row["results"]) == {"ours", scoring.TRANSFORMERS}
            assert all(result["median_ms"] > 0 for result in row["results"].values())
            assert row["tokens"] > 0
        folder = tmp_path / "device"
        folder.mkdir()
        content = {**records.environment("cpu"), "family": "scoring", "peers": scoring.roll_call(), "complete": True}
        records.write(folder / "scoring.json", content | {"rows": rows})
        assert "Verdicts of a judge and scores of a reward model" in readme.performance_tables(tmp_path)
