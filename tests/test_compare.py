"""The comparison: its known results, its parts by hand, and the whole of it on a tiny model."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny import save_tiny_model, save_tiny_preferences

from fastrlhf import compare
from fastrlhf.bench import readme
from fastrlhf.cli import main
from fastrlhf.compare import bradley_terry, claims, methods, overoptimization, recipe, report, samples
from fastrlhf.compare.bradley_terry import World, best_of_n_exactly
from fastrlhf.compare.overoptimization import BEST_OF_N, RL, Curve, fit, terms
from fastrlhf.compare.recipe import CompareArguments
from fastrlhf.compare.rewards import VARIANTS
from fastrlhf.demo import workspace
from fastrlhf.rollout import ScoredSamples, best_of_n_kl, best_of_n_scores


class TestWorld:
    @pytest.mark.parametrize("n", [1, 2, 5, 16])
    def test_best_of_n_of_two_outcomes_by_hand(self, n):
        worse = torch.tensor([0.75, 0.25], dtype=torch.float64)
        missed = 0.75**n  # no sample is the better one
        kl = missed * math.log(missed / 0.75) + (1 - missed) * math.log((1 - missed) / 0.25)
        wins = missed * 0.75 / 2 + (1 - missed) * (0.75 + 0.25 / 2)
        assert best_of_n_exactly(worse, n) == pytest.approx((kl, wins), abs=1e-15)

    def test_the_kl_is_below_its_bound_and_comes_up_to_it(self):
        for n in (2, 4, 16, 64):
            found = [best_of_n_exactly(torch.full((v,), 1 / v, dtype=torch.float64), n)[0] for v in (10, 100, 10_000)]
            assert found == sorted(found)
            # Of V equal outcomes the density n u^(n-1) is a mean over steps of 1/V: what is lost is below n^2 / V^2.
            assert 0 < best_of_n_kl(n) - found[-1] < n**2 / 10_000**2

    def test_outcomes_of_unequal_probability(self):
        probabilities = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        kl, wins = best_of_n_exactly(probabilities / probabilities.sum(), 8)
        assert 0 < kl < best_of_n_kl(8)
        assert 0.5 < wins < 8 / 9

    @pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
    def test_best_of_n_wins_n_of_n_plus_1(self, n):
        # The mean rank of the best of n of 1 ... N is n (N + 1) / (n + 1), whatever N.
        ranks = torch.arange(1, 65, dtype=torch.float64) / 65
        assert best_of_n_scores(ranks)[n - 1].item() == pytest.approx(n / (n + 1), rel=1e-12)
        equal = torch.full((100_000,), 1e-5, dtype=torch.float64)
        assert best_of_n_exactly(equal, n)[1] == pytest.approx(n / (n + 1), abs=1e-8)

    def test_gold_score_of_normal_samples_falls_short_by_the_correlation(self):
        # gold = r proxy + sqrt(1 - r^2) noise: E[gold of the best by proxy] = r E[proxy of the best].
        proxy, noise = torch.randn(2, 4000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gold = 0.6 * proxy + 0.8 * noise
        difference = best_of_n_scores(proxy, gold) - 0.6 * best_of_n_scores(proxy)
        errors = difference.std(0) / math.sqrt(len(difference))
        assert (difference.mean(0).abs() < 4 * errors).all()

    def test_a_reward_model_reaches_the_bayes_optimum(self):
        rows = bradley_terry.reward_model_rows(0)
        bayes = rows[0]["bayes_accuracy"]
        assert all(row["accuracy"] <= bayes for row in rows)  # exact: nobody is better
        regrets = [bayes - row["accuracy"] for row in rows]
        assert regrets == sorted(regrets, reverse=True)
        assert regrets[-1] < 1e-3 < regrets[0]
        # A calibrated model's error on n pairs in 10 bins is about 10 sqrt(p (1 - p) / (10 n)) / 10 < 2e-3.
        assert rows[-1]["ece"] < 6e-3 < rows[0]["ece"]

    def test_known_utilities_are_the_optimum(self):
        world = World(1)
        pairs = world.pairs(1000)
        assert bradley_terry.expected_accuracy(pairs, world.weights) == bradley_terry.bayes_accuracy(pairs)
        assert bradley_terry.expected_accuracy(pairs, -world.weights) == pytest.approx(
            1 - bradley_terry.bayes_accuracy(pairs)
        )

    def test_the_command(self, tmp_path, monkeypatch):
        monkeypatch.setattr(bradley_terry, "TRAINING_PAIRS", (100, 20_000))
        monkeypatch.setattr(bradley_terry, "HELD_OUT_PAIRS", 20_000)
        folders = ["--output_dir", str(tmp_path / "out"), "--results_dir", str(tmp_path / "kept")]
        assert main(["compare", "--synthetic", *folders]) == 0
        kept = json.loads((tmp_path / "kept" / bradley_terry.SUMMARY).read_text())
        assert len(kept["claims"]) == 5
        assert [row["pairs"] for row in kept["reward_model"]] == [100, 20_000]
        summary = {**kept, "curves": [{**row, "true_beta": row["true_beta"] + 1} for row in kept["curves"]]}
        assert [claim.holds for claim in bradley_terry.check(summary)][-1] is False


class TestFit:
    @pytest.mark.parametrize("method", [BEST_OF_N, RL])
    def test_coefficients_come_back_from_their_formulas(self, method):
        distance = torch.linspace(0, 4, 30, dtype=torch.float64)
        d = distance[1:]
        score = torch.zeros(30, dtype=torch.float64)
        score[1:] = d * (1.7 - 0.4 * d) if method == BEST_OF_N else d * (1.7 - 0.4 * d.log())
        found = fit(method, distance, score)
        assert found.coefficients.tolist() == pytest.approx([1.7, 0.4], rel=1e-12)
        assert found.rms < 1e-12
        assert found.covariance.diagonal().sqrt().max() < 1e-12

    @pytest.mark.parametrize("method", [BEST_OF_N, RL])
    def test_errors_say_how_far_the_coefficients_are_from_the_truth(self, method):
        distance = torch.linspace(0, 3, 40, dtype=torch.float64)
        true = torch.tensor([1.5, 0.8], dtype=torch.float64)
        noise = torch.randn(400, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = [fit(method, distance, terms(method, distance) @ true + each) for each in noise]
        away = torch.stack([(x.coefficients - true) / x.covariance.diagonal().sqrt() for x in found])
        # Student's t with 38 degrees of freedom: variance 38/36, of which 400 draws give a tenth at most either way.
        assert away.var(0).tolist() == pytest.approx([38 / 36] * 2, rel=0.25)
        assert away.mean(0).abs().max() < 4 / math.sqrt(400)

    def test_prompts_give_the_error_of_their_mean(self):
        distance = torch.linspace(0, 2, 20, dtype=torch.float64)
        true = torch.tensor([1.0, 0.3], dtype=torch.float64)
        scale = 1 + torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = fit(BEST_OF_N, distance, scale * (terms(BEST_OF_N, distance) @ true))
        assert found.coefficients.tolist() == pytest.approx((true * scale.mean()).tolist())
        error = scale.std().item() / math.sqrt(200)
        assert found.covariance.diagonal().sqrt().tolist() == pytest.approx([1.0 * error, 0.3 * error])

    def test_the_mean_of_a_curve(self):
        distance = torch.linspace(0, 3, 10, dtype=torch.float64)
        found = fit(BEST_OF_N, distance, 2 * distance - 0.5 * distance**2)
        # The integral of 2 d - d^2 / 2 up to 3 is 4.5, over 3.
        assert found.mean_up_to(3.0)[0] == pytest.approx(1.5, abs=1e-4)

    def test_of_too_few_points_nothing_is_known(self):
        found = fit(RL, torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.zeros(4))
        assert set(found.as_dict().values()) == {None}
        assert math.isnan(found.mean_up_to(2.0)[0])


def sample(rewards, finished):
    count = len(rewards)
    return ScoredSamples(0, "p", [f" {i}" for i in range(count)], rewards, {}, None, [1] * count, finished)


class TestParts:
    def test_pairs_are_the_best_and_the_worst_that_ended(self):
        found = [
            sample([1.0, 3.0, 2.0, 9.0], [True, True, True, False]),
            sample([1.0, 1.0], [True, True]),
            sample([1.0, 2.0], [True, False]),
        ]
        assert list(methods.best_against_worst(found)) == [{"prompt": "p", "chosen": " 1", "rejected": " 0"}]
        with pytest.raises(ValueError, match="no prompt has two responses that ended by themselves"):
            methods.best_against_worst(found[1:])

    def test_claims_can_fail(self):
        def curve(method, variant, height):
            distance = torch.linspace(0, 2, 9)
            gold = height * distance - 0.1 * distance**2 + 0.01 * torch.arange(9).remainder(2)
            gold = torch.stack([gold, gold + 0.1 * distance]) if method == BEST_OF_N else gold
            return Curve(method, variant, distance, gold, gold)

        def found(better):
            return [
                curve(method, variant, 1.0 + (better if variant.ensemble else 0.0))
                for method in (BEST_OF_N, RL)
                for variant in VARIANTS
            ]

        def table(low):
            rate = {"mean": 0.6, "interval": [low, 0.7]}
            return {name: {f"win_rate_{judge}": rate for judge in ("gold", "vader")} for name in ("ppo", "dpo")}

        good = claims.check(table(0.51), found(0.2), {"a": {"ece_calibrated": 0.05}})
        bad = claims.check(table(0.49), found(-0.2), {"a": {"ece_calibrated": 0.051}})
        assert len(good) == len(bad) == 4 + 4 + 1
        assert all(claim.holds for claim in good)
        assert not any(claim.holds for claim in bad)
        assert good[4].numbers.startswith("mean difference +0.200")

    def test_seeds_are_not_settings(self):
        one, three = CompareArguments(seeds=1), CompareArguments()
        assert one.settings() == three.settings() != CompareArguments(quick=True).settings()
        with pytest.raises(ValueError, match="seeds=0 must be at least 1"):
            CompareArguments(seeds=0)


TINY = replace(
    recipe.QUICK,
    response_length=8,
    eval_prompts=8,
    eval_pairs=24,
    sft_steps=20,
    sft_batch_size=8,
    sft_learning_rate=1e-2,
    reward_steps=3,
    ppo_steps=2,
    ppo_learning_rate=1e-2,
    rollout_batch_size=8,
    checkpoint_steps=2,
    rejection_prompts=8,
    dpo_prompts=16,
    dpo_batch_size=8,
    small_set_steps=1,
    curve_prompts=4,
    curve_steps=4,
    ensemble_heads=2,
)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "QUICK", TINY)
    monkeypatch.setattr(workspace, "release_memory", lambda: None)  # there is little, and looking for it takes long
    monkeypatch.setattr(CompareArguments, "adapted", lambda self, found: replace(found, seed=self.seed, reward_pairs=8))
    return CompareArguments(
        quick=True,
        model=save_tiny_model(tmp_path / "model"),
        dataset=save_tiny_preferences(tmp_path / "pairs.jsonl", 300),
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        results_dir=str(tmp_path / "results" / "quality"),
    )


def test_the_whole_comparison_on_a_tiny_model_interrupted_once(arguments, tmp_path, monkeypatch):
    done, train = [], methods.DPOTrainer.train

    def cut_off(self, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods.DPOTrainer, "train", cut_off)
    with pytest.raises(KeyboardInterrupt):
        compare.run(arguments)
    written = (tmp_path / "run" / "samples-0" / samples.SAMPLES).stat().st_mtime_ns
    monkeypatch.setattr(methods.DPOTrainer, "train", train)
    stage = methods.rejection_sampling
    monkeypatch.setitem(methods.TRAININGS, "rejection-sampling", ("", lambda *_: done.append(1) or stage(*_)))
    summary = compare.run(arguments)
    assert not done
    assert (tmp_path / "run" / "samples-0" / samples.SAMPLES).stat().st_mtime_ns == written
    assert not list((tmp_path / "run").glob("*/checkpoint-*"))

    kept = tmp_path / "results" / "quality"
    assert json.loads((kept / report.SUMMARY).read_text()) == summary
    assert (kept / report.FIGURE).stat().st_size > 10_000
    table = summary["table"]
    assert list(table) == ["sft", "best-of-4", "best-of-16", "rejection-sampling", "dpo", "ppo", "grpo"]
    for name, row in table.items():
        wanted = {"gold_mean", "vader_mean", "proxy_mean", "kl", "length", "distinct_2", "reward_calls", "seconds"}
        assert wanted <= set(row), name
        assert all(math.isfinite(x["mean"]) and x["std"] is None for x in row.values()), name
        if name != "sft":
            low, high = row["win_rate_gold"]["interval"]
            assert 0 <= low <= row["win_rate_gold"]["mean"] <= high <= 1
    assert table["best-of-16"]["kl"]["mean"] == best_of_n_kl(16)
    assert table["best-of-16"]["reward_calls"]["mean"] == 16 * TINY.eval_prompts
    assert table["ppo"]["reward_calls"]["mean"] == TINY.ppo_steps * TINY.rollout_batch_size

    curves = {(x["method"], x["reward_model"]): x for x in summary["overoptimization"]}
    assert len(curves) == 8
    bon = curves["best-of-n", "large"]
    assert len(bon["distance"]) == 1 + TINY.num_candidates
    assert bon["gold"][0] == pytest.approx(0, abs=1e-6)
    assert len(curves["ppo", "small-ensemble"]["distance"]) == TINY.curve_steps
    assert len(summary["claims"]) == 4 + 4 + 4

    text = readme.with_tables("<!-- compare table -->\n<!-- /compare table -->\n", tmp_path / "results")
    assert "| best of 16 |" in text
    assert "(bench/results/quality/overoptimization.png)" in text
    assert all(claim["statement"] in text for claim in summary["claims"])

    # One more seed goes on from what is there.
    more = compare.plan(2, "", _Sized(), TINY)
    names = [name for name, *_ in more]
    assert set(names) > set(json.loads((tmp_path / "run" / "state.json").read_text())["stages"])
    assert len(names) == len(set(names))


class _Sized:
    pairs = gold_pairs = None
    eval_prompts = [None] * 8


def test_the_best_of_n_is_the_best_by_the_reward():
    proxy = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    gold = torch.tensor([[5.0, 6.0, 9.0, 7.0]])
    curve = overoptimization.best_of_n_curve(VARIANTS[0], gold, proxy, torch.tensor([[0.0, 1.0, 5.0, 3.0]]))
    assert curve.gold[0, -1].item() == pytest.approx(9 - gold.mean().item())
    assert curve.proxy[0, -1].item() == pytest.approx(2 - proxy.mean().item())


def test_no_table_without_results(tmp_path):
    text = "<!-- compare table -->\n<!-- /compare table -->\n"
    assert readme.with_tables(text, tmp_path) == text
