"""What moves the weight of the KL penalty while training."""

from __future__ import annotations

import math
from typing import Protocol

from fastrlhf.trainers.ppo.config import PPOConfig

# Ziegler et al. 2019, section 2.2: the relative error is held within this.
MAX_ERROR = 0.2
# How far the uncertainty controller goes from where it began, up or down.
MAX_FACTOR = 10.0


class KLController(Protocol):
    """Has the `coef` of this iteration, and is told once an iteration what KL came of it."""

    coef: float

    def update(self, kl: float, responses: int, disagreement: float | None = None) -> None:
        """kl: mean over the iteration's responses, on all ranks, of their KL to the reference, in nats. responses: how
        many these were. disagreement: their mean, between the members of reward ensembles. Every rank must give the
        same numbers, or their coefficients part."""

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


class FixedKLController:
    """The coefficient it was made with: after a resume, too, what the arguments say."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, responses: int, disagreement: float | None = None) -> None:
        pass

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        pass


class AdaptiveKLController:
    """Moves the coefficient until the KL of a response is `target` nats (Ziegler et al. 2019, arXiv:1909.08593, 2.2).

    e = clip(KL / target - 1, -0.2, 0.2);  coef <- coef (1 + e responses / horizon).
    The paper's gain K_beta is responses / horizon, so that the batch size does not change the speed; it is at most 1,
    without which a batch of many horizons would turn the sign of the coefficient. While the error is at its bound, the
    coefficient moves by about a factor e^0.2 = 1.22 in `horizon` responses. A KL that is not finite, whose iteration
    is not one to learn from, changes nothing.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, responses: int, disagreement: float | None = None) -> None:
        if math.isfinite(kl):
            error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
            self.coef *= 1 + error * min(responses / self.horizon, 1)

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class UncertaintyKLController:
    """Moves the coefficient with the disagreement of the reward models: less trust, a shorter leash.

    d <- a d + (1 - a) disagreement, a = e^(-responses / horizon);  coef = start d / d_0, within a factor of 10.
    d_0 is the disagreement of the first iteration, when the policy writes what the reward models know best. Where the
    policy leaves that, members of an ensemble come apart (Coste et al. 2023, arXiv:2310.02743), and the
    penalty grows in proportion, as in UP-RLHF (Zhai et al. 2023, arXiv:2401.00243), which takes the uncertainty of each
    response off its reward. A disagreement that is not finite, or a first one of 0, changes nothing.
    """

    def __init__(self, coef: float, horizon: int) -> None:
        self.start = self.coef = coef
        self.horizon = horizon
        self.first: float | None = None
        self.average: float | None = None

    def update(self, kl: float, responses: int, disagreement: float | None = None) -> None:
        if disagreement is None:
            raise ValueError(
                "kl_controller='uncertainty' follows the disagreement of reward models, and no reward function has "
                "one: give a reward model with num_heads, or several with reward_ensemble"
            )
        if not math.isfinite(disagreement):
            return
        if not self.first:
            self.first = self.average = disagreement
            return
        kept = math.exp(-responses / self.horizon)
        self.average = kept * self.average + (1 - kept) * disagreement
        factor = self.average / self.first
        self.coef = self.start * min(max(factor, 1 / MAX_FACTOR), MAX_FACTOR)

    def state_dict(self) -> dict[str, float | None]:
        return {"coef": self.coef, "first": self.first, "average": self.average}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.coef, self.first, self.average = state["coef"], state["first"], state["average"]


def create_kl_controller(args: PPOConfig) -> KLController:
    """The one that `args.kl_controller` names."""
    match args.kl_controller:
        case "fixed":
            return FixedKLController(args.kl_coef)
        case "adaptive":
            return AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon)
        case "uncertainty":
            return UncertaintyKLController(args.kl_coef, args.kl_horizon)
    raise ValueError(f"kl_controller={args.kl_controller!r} must be one of fixed, adaptive, uncertainty")
