"""Calibration of pairwise probabilities, and what a report says of a reward model, against worlds that are known."""

import json
import math

import pytest
import torch

from fastrlhf.rewards.calibration import (
    cross_fitted,
    expected_calibration_error,
    fit_temperature,
    log_loss,
    reliability,
)
from fastrlhf.rewards.head_report import flat_metrics, head_report
from fastrlhf.rewards.preference_report import accuracy_by, length_bias, preference_report, write_report
from fastrlhf.rewards.settings import RewardSettings

# Differences of utility and how often of 15 comparisons the better text wins, in exact proportion to Bradley-Terry.
EXACT = {math.log(2): 10, math.log(6.5): 13, math.log(0.5): 5}


def exact_world():
    """Score differences, chosen - rejected, of 45 comparisons under the true utilities."""
    return torch.tensor([d for d, wins in EXACT.items() for d in [d] * wins + [-d] * (15 - wins)], dtype=torch.float64)


class TestExactWorld:
    def test_the_true_utilities_are_calibrated_and_as_right_as_can_be(self):
        report = preference_report(exact_world(), torch.zeros(45))
        assert report["accuracy"] == pytest.approx((10 + 13 + 10) / 45)  # Bayes: the likelier order, always
        assert report["ece"] == pytest.approx(0, abs=1e-12)
        assert report["temperature"] == pytest.approx(1, abs=1e-9)
        entropy = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (10 / 15, 13 / 15, 5 / 15)]
        assert report["log_loss"] == pytest.approx(sum(entropy) / 3, rel=1e-12)

    @pytest.mark.parametrize("scale", [1e-5, 0.5, 3.0, 4e4])
    def test_a_scale_is_found_and_taken_off(self, scale):
        differences = exact_world() * scale
        assert fit_temperature(differences) == pytest.approx(scale, rel=1e-9)
        assert expected_calibration_error(torch.sigmoid(differences / fit_temperature(differences))) < 1e-9

    def test_many_samples(self):
        """n pairs in 10 bins: the ECE of the truth is about sqrt(10 / n) x 0.4."""
        torch.manual_seed(0)
        truth = torch.randn(100_000, dtype=torch.float64) * 1.5
        differences = torch.where(torch.rand_like(truth) < torch.sigmoid(truth), truth, -truth)
        overconfident = preference_report(3 * differences, torch.zeros_like(truth))
        assert overconfident["ece"] > 0.1
        assert overconfident["ece_calibrated"] < 0.008
        assert overconfident["temperature"] == pytest.approx(3, rel=0.03)
        assert overconfident["log_loss_calibrated"] < overconfident["log_loss"]


class TestFunctions:
    def test_ece_by_hand(self):
        # a tie is as likely right as wrong, which is what a confidence of 0.5 says
        differences = torch.tensor([1.0, -3.0, 0.0])
        first, second = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
        assert expected_calibration_error(torch.sigmoid(differences)) == pytest.approx(((1 - first) + second) / 3)

    def test_bins(self):
        bins = reliability(torch.tensor([0.55, 0.95, 0.97, 0.02]), bins=5)
        assert [each.pairs for each in bins] == [1, 0, 0, 0, 3]
        assert (bins[0].low, bins[0].high, bins[-1].high) == (0.5, 0.6, 1.0)
        assert bins[-1].accuracy == pytest.approx(2 / 3)
        assert bins[-1].confidence == pytest.approx((0.95 + 0.97 + 0.98) / 3)
        assert math.isnan(bins[1].accuracy)

    def test_pairs_all_in_order_end_at_the_bound(self):
        scale = 2.5**0.5  # the root mean square
        assert fit_temperature(torch.tensor([1.0, 2.0])) == pytest.approx(0.01 * scale)
        assert fit_temperature(torch.tensor([-1.0, -2.0])) == pytest.approx(100 * scale)
        assert fit_temperature(torch.zeros(2)) == 1

    def test_each_half_is_scaled_by_the_other(self):
        differences = torch.stack([exact_world() * 2, exact_world() * 5], dim=1).flatten()
        scaled = cross_fitted(differences)
        torch.testing.assert_close(scaled[0::2], exact_world() * 2 / 5)
        torch.testing.assert_close(scaled[1::2], exact_world() * 5 / 2)

    def test_log_loss(self):
        assert log_loss(torch.zeros(3)) == pytest.approx(math.log(2))

    @pytest.mark.parametrize("bad", [torch.empty(0), torch.tensor([0.5, math.nan]), torch.tensor([1.5])])
    def test_bad_probabilities(self, bad):
        with pytest.raises(ValueError, match="probabilities: "):
            reliability(bad)

    def test_bad_differences(self):
        with pytest.raises(ValueError, match="differences: 2 given"):
            fit_temperature(torch.tensor([1.0, math.inf]))


class TestReport:
    def test_nan_scores_are_counted(self):
        with pytest.raises(
            ValueError, match="2 of 3 pairs have a score that is not finite; the first is pair 1, with 1"
        ):
            preference_report(torch.tensor([1.0, 1.0, math.inf]), torch.tensor([0.0, math.nan, 0.0]))

    def test_bands_hold_as_many_pairs_and_equal_values_together(self):
        values = torch.tensor([0.0, 0, 0, 0, 1, 2, 3, 4, 5, 6])
        table = accuracy_by(values, torch.tensor([1.0, 1, -1, 0, 1, 1, 1, 1, -1, -1]))
        assert (table[0]["low"], table[0]["high"], table[0]["pairs"]) == (0, 0, 4)
        assert sum(band["pairs"] for band in table) == 10
        assert table[0]["accuracy"] == pytest.approx(2.5 / 4)
        assert table[-1]["accuracy"] == 0

    def test_length_bias_by_hand(self):
        bias = length_bias(torch.tensor([3, -2, 0, 5]), torch.tensor([1.0, 1.0, -1.0, -2.0]))
        assert bias["longer_chosen"] == pytest.approx(2 / 3)
        assert bias["longer_preferred"] == pytest.approx(1 / 3)  # of 3, -2 and 5 only the first
        assert length_bias(torch.zeros(2), torch.ones(2))["correlation"] is None

    def test_gaps_that_nobody_said_are_left_out(self):
        some = preference_report(torch.ones(3), torch.zeros(3), gaps=torch.tensor([1.0, math.nan, 2.0]))
        assert sum(band["pairs"] for band in some["by_gap"]) == 2
        assert "by_gap" not in preference_report(torch.ones(1), torch.zeros(1), gaps=torch.tensor([math.nan]))

    def test_files(self, tmp_path):
        report = preference_report(exact_world() * 2, torch.zeros(45), length_differences=torch.arange(45))
        assert write_report(str(tmp_path / "reports"), "000010", report) == str(tmp_path / "reports" / "000010.json")
        assert json.loads((tmp_path / "reports" / "000010.json").read_text()) == report
        assert (tmp_path / "reports" / "000010.png").read_bytes()[:4] == b"\x89PNG"


class TestHeads:
    NOTHING = torch.tensor([[math.nan, 1.0], [math.nan, -1.0]])

    def test_an_ensemble_is_its_mean(self):
        scores = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])  # [pairs, 2, heads]
        report = head_report(scores, self.NOTHING, RewardSettings("ensemble", ["a", "b"]))
        assert report["accuracy"] == 0.75  # a difference of 2, and one of 0
        assert report["head_accuracy"] == [0.5, 1.0]
        assert report["disagreement"] == pytest.approx((2**0.5 + 2**0.5) / 2)  # of (1, 3) and of (-1, 1)
        assert report["head_means"] == [0.5, 1.0]

    def test_objectives_have_their_own_labels(self):
        scores = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
        said = torch.cat([self.NOTHING, torch.tensor([[2.0, -1.0], [0.0, -3.0]])], dim=1)
        report = head_report(scores, said, RewardSettings("objectives", ["kind", "brief"]))
        assert report["objectives"]["kind"]["pairs"] == 1
        assert report["objectives"]["kind"]["accuracy"] == 1
        assert report["objectives"]["brief"]["accuracy"] == 0  # the rejected text was the better one, twice
        assert [band["high"] for band in report["objectives"]["brief"]["by_gap"]] == [1, 3]
        assert flat_metrics(report)["accuracy"] == 0.5
        assert flat_metrics(report)["kind_accuracy"] == 1

    def test_an_objective_without_labels(self):
        said = torch.cat([self.NOTHING, torch.zeros(2, 1)], dim=1)
        with pytest.raises(ValueError, match="no held-out pair has a label for 'kind'"):
            head_report(torch.zeros(2, 2, 1), said, RewardSettings("objectives", ["kind"]))


class TestSettings:
    def test_round_trip(self, tmp_path):
        settings = RewardSettings("ensemble", ["a", "b"], "all", means=[1.0, 2.0], stds=[0.5, 0.25], temperatures=[1.5])
        settings.save(str(tmp_path))
        assert RewardSettings.load(str(tmp_path)) == settings

    def test_none(self, tmp_path):
        assert RewardSettings.load(str(tmp_path)) == RewardSettings()

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "not valid JSON"),
            ('{"head": 3}', "wanted an object with heads, means"),
            ('{"heads": "many"}', "heads='many' must be one of single"),
            ('{"means": [1, 2]}', "2 means for 1 heads"),
            ('{"temperatures": [1, 2]}', "2 temperatures, wanted 1"),
        ],
    )
    def test_unusable(self, tmp_path, text, said):
        (tmp_path / "reward_model.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            RewardSettings.load(str(tmp_path))
