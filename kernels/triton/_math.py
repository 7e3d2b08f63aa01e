"""Formulas of one token, as in csrc/math: inlined into the kernels of every family."""

import math

import triton
import triton.language as tl

# Enumerations of csrc/cpu/kernels.h.
K1 = tl.constexpr(0)
K2 = tl.constexpr(1)
K3 = tl.constexpr(2)
ABS = tl.constexpr(3)

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _hold(x, low, high):
    """x within [low, high]; a nan stays one."""
    return tl.maximum(tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL), low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _power_of_two(n):
    """2^n for whole numbers n in [-126, 127]."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_with_residual(x):
    """exp(x), and exp(x) - 1 - x, which keeps its digits near 0, where the naive sum would be all rounding."""
    held = _hold(x, -104.0, 89.0)  # exp is 0 and inf there
    n = tl.floor(tl.fma(held, _LOG2_E, 0.5))
    r = tl.fma(n, -0.693145752, held)  # ln 2 in two parts, the first with room for an exact product
    r = tl.fma(n, -1.42860677e-06, r)
    q = tl.fma(r, 1.381446724e-03, 8.368780836e-03)
    q = tl.fma(r, q, 4.166839272e-02)
    q = tl.fma(r, q, 1.666651964e-01)
    q = tl.fma(r, q, 4.999999404e-01)
    tail = r * r * q
    half = tl.floor(n * 0.5)  # twice, since 2^128 is no fp32 and 2^-150 no normal one
    result = (1.0 + (r + tail)) * _power_of_two(half) * _power_of_two(n - half)
    # Held below infinity, so that the residual there is inf and not inf - inf.
    return result, tl.where(n == 0.0, tail, result - 1.0 - tl.minimum(x, 1e30, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def tanh(x):
    """tanh to about an ulp, near 0 too, where 1 - 2 / (e^2x + 1) would be all rounding."""
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(a * (2.0 * _LOG2_E)) + 1.0)
    square = x * x
    q = tl.fma(square, -5.9058974e-03, 2.0805411e-02)
    q = tl.fma(square, q, -5.3786691e-02)
    q = tl.fma(square, q, 1.3331959e-01)
    q = tl.fma(square, q, -3.3333299e-01)
    return tl.where(a < 0.6, tl.fma(x * square, q, x), tl.where(x < 0.0, -far, far))


@triton.jit
def kl_estimate(log_ratio, estimator):
    """An estimate of KL(p || q) from one token sampled from p, log_ratio = log p - log q, and its slope by log p.

    Schulman 2020, "Approximating KL Divergence". estimator is one of the integers above, at run time.
    """
    value = log_ratio
    slope = tl.where(log_ratio == log_ratio, 1.0, log_ratio)
    if estimator == K2:
        value = 0.5 * log_ratio * log_ratio
        slope = log_ratio
    elif estimator == K3:
        inverse_ratio, value = exp_with_residual(-log_ratio)
        # 1 - exp(-d) is d - k3, which does not cancel near 0.
        slope = tl.where(tl.abs(log_ratio) < 0.34, log_ratio - value, 1.0 - inverse_ratio)
    elif estimator == ABS:
        value = tl.abs(log_ratio)
        slope = tl.where(log_ratio < 0.0, -1.0, tl.where(log_ratio > 0.0, 1.0, log_ratio))
    return value, slope


@triton.jit
def kl_estimate_clamped(log_ratio, estimator, clamp_input, clamp_output):
    """kl_estimate of the log-ratio held in [-clamp_input, clamp_input], held in [-clamp_output, clamp_output].

    The slope is 0 where a limit holds, and only there: a nan is not held by anything, and shows.
    """
    value, slope = kl_estimate(_hold(log_ratio, -clamp_input, clamp_input), estimator)
    slope = tl.where((tl.abs(log_ratio) > clamp_input) | (tl.abs(value) > clamp_output), 0.0, slope)
    return _hold(value, -clamp_output, clamp_output), slope
