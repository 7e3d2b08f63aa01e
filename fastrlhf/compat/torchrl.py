"""torchrl (https://github.com/pytorch/rl), 0.11 to 0.14: what `fastrlhf.patch("torchrl")` binds.

    import fastrlhf

    fastrlhf.patch("torchrl")
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    advantage, target = vec_generalized_advantage_estimate(0.99, 0.95, value, next_value, reward, done, terminated)

Where a value needs a gradient, and under torch.compile, the sums are made of log2(T) steps in plain torch; discounts
that are tensors of more than one number, or outside [0, 1], are left to torchrl.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.compat._common import cast, discounted_sums, fits
from fastrlhf.compat._patch import original

PACKAGE = "torchrl"
VERSIONS = ">=0.11,<0.15"
FUNCTIONAL = "torchrl.objectives.value.functional"


def generalized_advantage_estimate(
    gamma: float,
    lmbda: float,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
    exact_dtype: bool = False,
) -> tuple[Tensor, Tensor]:
    """(advantages, value targets), both in the shape of the inputs: [*batch, T, *features], time at time_dim; fp32.

    done, terminated: bool. The sums end at a done, and what is terminated has no next value; terminated is done without
    it.
    """
    return _gae(
        "generalized_advantage_estimate",
        (gamma, lmbda, state_value, next_state_value, reward, done, terminated),
        time_dim,
        exact_dtype,
    )


def vec_generalized_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
    exact_dtype: bool = False,
) -> tuple[Tensor, Tensor]:
    """`generalized_advantage_estimate`, which is as fast."""
    return _gae(
        "vec_generalized_advantage_estimate",
        (gamma, lmbda, state_value, next_state_value, reward, done, terminated),
        time_dim,
        exact_dtype,
    )


def _gae(name: str, arguments: tuple, time_dim: int, exact_dtype: bool) -> tuple[Tensor, Tensor]:
    gamma, lmbda, value, following, reward, done, terminated = arguments
    terminated = done if terminated is None else terminated
    dims = value.dim()
    axis = time_dim if time_dim < 0 else time_dim - dims
    ours = fits(value, following, reward) and -dims <= axis < 0 and (dims > 1 or time_dim == -1)
    ours = ours and all(flag.dtype == torch.bool and flag.shape == value.shape for flag in (done, terminated))
    if not (ours and value.numel() and _is_discount(gamma) and _is_discount(lmbda)):
        return original(f"{FUNCTIONAL}.{name}")(*arguments, time_dim=time_dim)
    moved = value.movedim(axis, -1).shape
    rows = [x.movedim(axis, -1).reshape(-1, moved[-1]) for x in (value, following, reward, done)]
    rows.append(rows[-1] if terminated is done else terminated.movedim(axis, -1).reshape(-1, moved[-1]))
    return tuple(
        cast(x.view(moved).movedim(-1, axis), exact_dtype, value, following, reward)
        for x in _rows(float(gamma), float(lmbda), *rows)
    )


def _is_discount(x: float | Tensor) -> bool:
    return not (isinstance(x, Tensor) and (x.numel() != 1 or x.requires_grad)) and 0 <= float(x) <= 1


def _rows(
    gamma: float, lam: float, value: Tensor, following: Tensor, reward: Tensor, done: Tensor, terminated: Tensor
) -> tuple[Tensor, Tensor]:
    """Of rows [N, T]."""
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (value, following, reward))
    if differentiable or torch.compiler.is_compiling():
        delta = reward + gamma * torch.where(terminated, 0.0, following) - value
        advantage = discounted_sums(delta.float(), torch.where(done, 0.0, gamma * lam))
        return advantage, advantage + value
    if _within(done) or (terminated is not done and _within(terminated)):
        return _segments(gamma, lam, value, following, reward, done, terminated)
    if not torch.equal(following[:, :-1], value[:, 1:]):
        # Our op takes the next value from the row of values: the difference to the one given is a reward.
        reward = reward.to(torch.float32, copy=True)
        reward[:, :-1].add_(following[:, :-1], alpha=gamma).sub_(value[:, 1:], alpha=gamma)
    last = torch.where(terminated[:, -1], 0.0, following[:, -1])
    return F.gae(reward, value, gamma=gamma, lam=lam, bootstrap_values=last)


def _within(flags: Tensor) -> bool:
    """Whether rows have one before the last column. Counting is faster than asking whether there is any."""
    return bool(flags.count_nonzero() != flags[:, -1].count_nonzero())


def _segments(
    gamma: float, lam: float, value: Tensor, following: Tensor, reward: Tensor, done: Tensor, terminated: Tensor
) -> tuple[Tensor, Tensor]:
    """Of rows [N, T], each of which ends at every done and at T."""
    reward = torch.add(reward, torch.where(terminated, 0.0, following), alpha=gamma).float()
    reward[:, :-1].sub_(torch.where(done[:, :-1], 0.0, value[:, 1:]), alpha=gamma)
    ends = done.clone()
    ends[:, -1] = True
    cu_seqlens = torch.nn.functional.pad(ends.flatten().nonzero().flatten() + 1, (1, 0))
    results = F.gae_packed(reward.flatten(), value.flatten(), cu_seqlens, gamma=gamma, lam=lam)
    return tuple(x.view_as(reward) for x in results)


REPLACEMENTS = {
    f"{FUNCTIONAL}.generalized_advantage_estimate": generalized_advantage_estimate,
    f"{FUNCTIONAL}.vec_generalized_advantage_estimate": vec_generalized_advantage_estimate,
}
_FP32 = "fp32 inside and out; torchrl computes in the dtype of its inputs"
MORE_ACCURATE = {
    f"{FUNCTIONAL}.generalized_advantage_estimate": _FP32,
    f"{FUNCTIONAL}.vec_generalized_advantage_estimate": f"{_FP32}, and leaves out discounts below 1e-7",
}
