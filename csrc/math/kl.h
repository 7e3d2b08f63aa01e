// Estimates of KL(p || q) from one token sampled from p: Schulman 2020, "Approximating KL Divergence". See math/ppo.h.
#pragma once

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

template <class V>
struct KlEstimate {
  V value;
  V slope;  // d value / d log p
};

// log_ratio = log p - log q. The estimators are numbered as in cpu/kernels.h.
template <class V>
FASTRLHF_INLINE KlEstimate<V> kl_estimate(V log_ratio, int estimator) {
  const V one = V(1.0f), zero = V(0.0f);
  switch (estimator) {
    case 0:  // k1
      return {log_ratio, one};
    case 1:  // k2
      return {V(0.5f) * log_ratio * log_ratio, log_ratio};
    case 2: {  // k3 = exp(-d) - 1 + d
      const auto e = exp_parts(zero - log_ratio, false);
      return {e.residual, zero - e.minus_one};
    }
    default:  // abs
      return {abs(log_ratio), select(less(log_ratio, zero), V(-1.0f), select(less(zero, log_ratio), one, zero))};
  }
}

// Slope 0 where a limit holds, and only there: a nan is not held by anything, and shows in the slope of every estimator.
template <class V>
FASTRLHF_INLINE KlEstimate<V> kl_estimate_clamped(V log_ratio, int estimator, float clamp_input, float clamp_output) {
  const V held = clamp(log_ratio, -clamp_input, clamp_input);
  KlEstimate<V> kl = kl_estimate(held, estimator);
  const V value = clamp(kl.value, -clamp_output, clamp_output);
  kl.slope = select(less(V(clamp_input), abs(log_ratio)) | less(V(clamp_output), abs(kl.value)), V(0.0f), kl.slope);
  kl.slope = select(equal(log_ratio, log_ratio), kl.slope, log_ratio);
  kl.value = value;
  return kl;
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
