"""The KL coefficient: fixed, adaptive, and following the reward models' disagreement."""

import json
import math

import pytest

from fastrlhf.trainers import PPOConfig
from fastrlhf.trainers.ppo.kl_controllers import (
    AdaptiveKLController,
    FixedKLController,
    UncertaintyKLController,
    create_kl_controller,
)


def test_fixed():
    controller = FixedKLController(0.1)
    controller.update(100.0, 64)
    assert controller.coef == 0.1


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.25),  # KL / target - 1 = 0.1
        (5.4, 1 - 0.1 * 0.25),
        (60.0, 1 + 0.2 * 0.25),  # at the bound
        (0.0, 1 - 0.2 * 0.25),
        (-3.0, 1 - 0.2 * 0.25),  # k1 of few samples may be negative
    ],
)
def test_adaptive_by_hand(kl, factor):
    controller = AdaptiveKLController(0.1, target=6.0, horizon=400)
    controller.update(kl, 100)
    assert controller.coef == pytest.approx(0.1 * factor, rel=1e-12)


def test_speed_does_not_depend_on_the_batch_size():
    results = []
    for responses in (1, 10):
        controller = AdaptiveKLController(1.0, target=1.0, horizon=10_000)
        for _ in range(10_000 // responses):
            controller.update(9.0, responses)
        results.append(controller.coef)
    # (1 + 0.2 / n)^n against e^0.2, off by a factor of about 0.2^2 / 2n: n is 1000 at least
    assert results == pytest.approx([math.exp(0.2)] * 2, rel=0.02 / 1000 * 1.3)


def test_it_settles_where_the_kl_is_the_target():
    # A policy whose KL is inverse to the coefficient: 2 / 0.25 = 8
    controller = AdaptiveKLController(3.0, target=8.0, horizon=100)
    for _ in range(200):
        controller.update(2 / controller.coef, 50)
    assert controller.coef == pytest.approx(0.25, rel=1e-6)


def test_a_batch_of_many_horizons_keeps_the_sign():
    controller = AdaptiveKLController(0.1, target=6.0, horizon=10)
    controller.update(0.0, 1000)
    assert controller.coef == pytest.approx(0.08)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_changes_nothing(kl):
    controller = AdaptiveKLController(0.1, target=6.0, horizon=100)
    controller.update(kl, 64)
    assert controller.coef == 0.1


def test_state_goes_on_bit_for_bit():
    def three_steps(controller, kls):
        for kl in kls:
            controller.update(kl, 7)
        return controller.coef

    kls = [1.0, 5.7, 13.0, 6.1, 2.0, 6.05]
    first = AdaptiveKLController(0.1, 6.0, 100)
    three_steps(first, kls[:3])
    second = AdaptiveKLController(0.1, 6.0, 100)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert three_steps(second, kls[3:]) == three_steps(AdaptiveKLController(0.1, 6.0, 100), kls)


def test_a_fixed_coefficient_is_what_the_arguments_say():
    controller = FixedKLController(0.2)
    controller.load_state_dict(FixedKLController(0.1).state_dict())
    assert controller.coef == 0.2


def test_from_arguments(tmp_path):
    def create(**options):
        return create_kl_controller(PPOConfig(str(tmp_path), report_to="none", kl_coef=0.3, **options))

    fixed, adaptive = create(), create(kl_controller="adaptive", kl_target=2.0, kl_horizon=50)
    assert isinstance(fixed, FixedKLController)
    assert fixed.coef == 0.3
    assert isinstance(adaptive, AdaptiveKLController)
    assert (adaptive.coef, adaptive.target, adaptive.horizon) == (0.3, 2.0, 50)


class TestUncertainty:
    def test_by_hand(self):
        controller = UncertaintyKLController(0.1, horizon=100)
        controller.update(3.0, 50, 0.4)  # the first says what is usual
        assert controller.coef == 0.1
        controller.update(3.0, 50, 0.8)
        kept = math.exp(-0.5)
        assert controller.coef == pytest.approx(0.1 * (kept * 0.4 + (1 - kept) * 0.8) / 0.4, rel=1e-12)

    def test_it_settles_in_proportion(self):
        controller = UncertaintyKLController(0.1, horizon=10)
        for disagreement in [0.5] + [1.5] * 50:
            controller.update(0.0, 10, disagreement)
        assert controller.coef == pytest.approx(0.3, rel=1e-9)

    @pytest.mark.parametrize(("disagreement", "coef"), [(1e9, 1.0), (0.0, 0.01)])
    def test_within_a_factor_of_ten(self, disagreement, coef):
        controller = UncertaintyKLController(0.1, horizon=10)
        for value in [0.5] + [disagreement] * 50:
            controller.update(0.0, 10, value)
        assert controller.coef == pytest.approx(coef)

    def test_what_changes_nothing(self):
        controller = UncertaintyKLController(0.1, horizon=10)
        for disagreement in (0.0, math.nan, 0.5, math.inf):
            controller.update(0.0, 10, disagreement)
        assert (controller.coef, controller.first, controller.average) == (0.1, 0.5, 0.5)

    def test_without_an_ensemble(self):
        with pytest.raises(ValueError, match="follows the disagreement of reward models"):
            UncertaintyKLController(0.1, 10).update(0.0, 10)

    def test_state_goes_on_bit_for_bit(self):
        seen = [0.5, 0.7, 0.9, 0.4, 0.6]
        straight, first = (UncertaintyKLController(0.1, 50) for _ in range(2))
        for value in seen:
            straight.update(0.0, 8, value)
        for value in seen[:2]:
            first.update(0.0, 8, value)
        second = UncertaintyKLController(0.1, 50)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for value in seen[2:]:
            second.update(0.0, 8, value)
        assert second.state_dict() == straight.state_dict()

    def test_from_arguments(self, tmp_path):
        options = {"kl_controller": "uncertainty", "kl_coef": 0.2, "kl_horizon": 7}
        controller = create_kl_controller(PPOConfig(str(tmp_path), report_to="none", **options))
        assert isinstance(controller, UncertaintyKLController)
        assert (controller.coef, controller.horizon) == (0.2, 7)
        with pytest.raises(ValueError, match=r"kl_coef=0.0 must be greater than 0 for kl_controller='uncertainty'"):
            PPOConfig(str(tmp_path), report_to="none", kl_controller="uncertainty", kl_coef=0.0)
