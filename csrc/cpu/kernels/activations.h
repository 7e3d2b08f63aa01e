// Functions of a vector that are no sums.
#pragma once

#include "../kernels.h"
#include "../simd.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

FASTRLHF_INLINE Vec tanh_of(Vec x) {
  const Vec e = exp_parts(clamp(x + x, -40.0f, 40.0f), true).minus_one;  // +-1 there already
  return e / (e + Vec(2.0f));
}

FASTRLHF_INLINE Vec exp_of(Vec x) { return product(exp2_held(x * Vec(1.44269504f))); }

FASTRLHF_INLINE Vec silu(Vec x) { return x / (Vec(1.0f) + exp_of(-x)); }

// x Phi(x), by the tail Phi(-|x|) = polynomial exp(-x^2 / 2) of Abramowitz and Stegun 7.1.26 (1.5e-7): unlike 1 + erf, it
// keeps its digits where it is small.
FASTRLHF_INLINE Vec gelu(Vec x) {
  const Vec z = abs(x) * Vec(0.70710678f), t = Vec(1.0f) / fma(z, Vec(0.3275911f), Vec(1.0f));
  Vec q = fma(t, Vec(1.061405429f), Vec(-1.453152027f));
  q = fma(t, q, Vec(1.421413741f));
  q = fma(t, q, Vec(-0.284496736f));
  q = fma(t, q, Vec(0.254829592f));
  const Vec tail = x * Vec(0.5f) * t * q * exp_of(-(z * z));
  return select(less(x, Vec(0.0f)), tail, x - tail);
}

FASTRLHF_INLINE Vec gelu_by_tanh(Vec x) {
  const Vec inner = x * fma(x * x, Vec(0.044715f * 0.79788456f), Vec(0.79788456f));
  return Vec(0.5f) * x * (Vec(1.0f) + tanh_of(inner));
}

FASTRLHF_INLINE Vec activated(Vec x, int activation) {
  if (activation == kSilu) return silu(x);
  if (activation == kGelu) return gelu(x);
  if (activation == kGeluByTanh) return gelu_by_tanh(x);
  return x;
}

}  // namespace
}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
