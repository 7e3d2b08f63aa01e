"""What moves the weight of the KL penalty while training."""

from __future__ import annotations

import math
from typing import Protocol

from fastrlhf.trainers.ppo.config import PPOConfig

# Ziegler et al. 2019, section 2.2: the relative error is held within this.
MAX_ERROR = 0.2


class KLController(Protocol):
    """Has the `coef` of this iteration, and is told once an iteration what KL came of it."""

    coef: float

    def update(self, kl: float, responses: int) -> None:
        """kl: mean over the iteration's responses, on all ranks, of their KL to the reference, in nats. responses: how
        many these were. Every rank must give the same numbers, or their coefficients part."""

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


class FixedKLController:
    """The coefficient it was made with: after a resume, too, what the arguments say."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, responses: int) -> None:
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

    def update(self, kl: float, responses: int) -> None:
        if math.isfinite(kl):
            error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
            self.coef *= 1 + error * min(responses / self.horizon, 1)

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


def create_kl_controller(args: PPOConfig) -> KLController:
    """The one that `args.kl_controller` names."""
    match args.kl_controller:
        case "fixed":
            return FixedKLController(args.kl_coef)
        case "adaptive":
            return AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon)
    raise ValueError(f"kl_controller={args.kl_controller!r} must be one of fixed, adaptive")
