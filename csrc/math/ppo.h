// The clipped surrogate of one token: Schulman et al. 2017, equation 7, as a loss, with dual clip (Ye et al. 2020).
//
// Headers in math/ are formulas and nothing else. V is a vector of lanes on CPU and a float on CUDA; the including file
// has defined fma, larger, smaller, clamp, abs, less, equal, differs, select and exp_parts for it, with the conventions
// of cpu/simd.h, and FASTRLHF_INLINE and FASTRLHF_CAPABILITY (the namespace).
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

// cost: -A, whatever where a token does not count, if its log_ratio is 0 there: such a token is never clipped.
template <class V, class M>
FASTRLHF_INLINE Surrogate<V, M> surrogate(V log_ratio, V cost, float low, float high, float dual_clip,
                                          float log_ratio_clamp) {
  const V held = clamp(log_ratio, -log_ratio_clamp, log_ratio_clamp), zero(0.0f);
  const M held_back = differs(log_ratio, held);  // not of a nan, which has to show in the slope
  const auto e = exp_parts(held, log_ratio_clamp <= 80.0f);
  const V plain = cost * e.value, at_clip = cost * clamp(e.value, low, high);
  const M clipped = less(plain, at_clip);
  V loss = select(clipped, at_clip, plain);
  M dual_clipped = less(zero, zero);
  if (dual_clip < __builtin_inff()) {
    const V bound = cost * V(dual_clip);
    dual_clipped = less(zero, cost) & less(bound, loss);
    loss = select(dual_clipped, bound, loss);
  }
  const V slope = select(held_back | clipped | dual_clipped, zero, plain);
  return {e.value, loss, slope, e.residual, clipped, dual_clipped};
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
