// The clipped surrogate of one token: Schulman et al. 2017, equation 7, as a loss, with dual clip (Ye et al. 2020).
//
// Headers in math/ are formulas and nothing else. V is a vector of lanes on CPU and a float on CUDA; the including file
// has defined larger, smaller, clamp, abs, less, equal, select and exp_with_residual for it, with the conventions of
// cpu/simd.h, and FASTRLHF_INLINE and FASTRLHF_CAPABILITY (the namespace).
#pragma once

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

template <class V, class M>
struct Surrogate {
  V ratio;
  V loss;       // max(-A r, -A clip(r)), bounded by dual_clip |A| where A < 0
  V slope;      // d loss / d log r: -A r, or 0 where a clip holds
  V approx_kl;  // r - 1 - log r: k3 for KL(old || new)
  M clipped, dual_clipped;
};

template <class V, class M>
FASTRLHF_INLINE Surrogate<V, M> surrogate(V log_ratio, V advantage, float low, float high, float dual_clip,
                                          float log_ratio_clamp) {
  const V held = clamp(log_ratio, -log_ratio_clamp, log_ratio_clamp);
  const M held_back = less(V(log_ratio_clamp), abs(log_ratio));  // not of a nan, which has to show in the slope
  Surrogate<V, M> s;
  s.ratio = exp_with_residual(held, s.approx_kl);
  const V cost = V(0.0f) - advantage;
  const V plain = cost * s.ratio, at_clip = cost * clamp(s.ratio, low, high);
  s.clipped = less(plain, at_clip);
  s.loss = select(s.clipped, at_clip, plain);
  const V bound = cost * V(dual_clip);
  s.dual_clipped = less(advantage, V(0.0f)) & less(bound, s.loss);
  s.loss = select(s.dual_clipped, bound, s.loss);
  s.slope = select(held_back | s.clipped | s.dual_clipped, V(0.0f), plain);
  return s;
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
