// The token-wise losses: sums, statistics and gradients in one pass over the tokens of a unit. A sequence-level ratio
// needs the sequence's mean log-ratio before that pass and the sequence's summed slope after it.
//
// What stands under a zero of the mask is replaced by 0 as it is loaded, so that nothing after that can depend on it.

#include "../simd.h"
// After simd.h, whose functions they use.
#include "../../math/kl.h"
#include "../../math/ppo.h"
#include "../../math/value.h"
#include "moments.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

FASTRLHF_INLINE Vec load_kept(const float* from, Mask keep, int n) {
  return select(keep, load_first(from, n, 0.0f), Vec(0.0f));
}

FASTRLHF_INLINE double unit_scale(double denominator, bool per_token_mean, int64_t counted) {
  if (counted == 0 || denominator == 0.0) return 0.0;
  return 1.0 / (per_token_mean ? denominator * counted : denominator);
}

struct PpoAccumulators {
  Sum surrogate, approx_kl, ratio, entropy, kl, sequence_slope;
  int64_t clipped = 0, dual_clipped = 0;
  Vec ratio_min, ratio_max;
};

FASTRLHF_INLINE void flush_all(PpoAccumulators& s) {
  flush(s.surrogate);
  flush(s.approx_kl);
  flush(s.ratio);
  flush(s.entropy);
  flush(s.kl);
  flush(s.sequence_slope);
}

void ppo_unit(const PpoArgs& a, int64_t unit) {
  const Span span = span_of(a.units, unit);
  const int64_t counted = a.counts[unit], at = span.start;
  const Vec zero(0.0f), scale(static_cast<float>(unit_scale(a.denominator, a.per_token_mean, counted)));

  Vec sequence_log_ratio = zero;
  if (a.sequence_ratio && counted > 0) {
    Sum total;
    for_each_vector(
        span.length,
        [&](int64_t i, int n) {
          const Mask keep = load_mask_first(a.mask + at + i, n);
          add(total, load_kept(a.log_probs + at + i, keep, n) - load_kept(a.old_log_probs + at + i, keep, n));
        },
        [&] { flush(total); });
    sequence_log_ratio = Vec(static_cast<float>(total.total / counted));
  }

  PpoAccumulators s;
  s.ratio_min = Vec(__builtin_inff());
  s.ratio_max = Vec(-__builtin_inff());
  const auto token = [&](int64_t i, int n) {
    const int64_t j = at + i;
    const Mask keep = load_mask_first(a.mask + j, n);
    const Vec log_prob = load_kept(a.log_probs + j, keep, n);
    Vec log_ratio = log_prob - load_kept(a.old_log_probs + j, keep, n);
    if (a.sequence_ratio) log_ratio = select(keep, sequence_log_ratio, zero);
    const Vec advantage = (load_kept(a.advantages + j, keep, n) - Vec(a.advantage_mean)) * Vec(a.advantage_rstd);
    auto t = surrogate<Vec, Mask>(log_ratio, select(keep, advantage, zero), a.clip_low, a.clip_high, a.dual_clip,
                                  a.log_ratio_clamp);
    if (a.weights != nullptr) {
      const Vec weight = load_kept(a.weights + j, keep, n);
      t.loss = t.loss * weight;
      t.slope = t.slope * weight;
    }
    add(s.surrogate, t.loss);
    add(s.approx_kl, t.approx_kl);
    add(s.ratio, select(keep, t.ratio, zero));
    s.ratio_min = smaller(select(keep, t.ratio, s.ratio_min), s.ratio_min);
    s.ratio_max = larger(select(keep, t.ratio, s.ratio_max), s.ratio_max);
    s.clipped += count(t.clipped);
    s.dual_clipped += count(t.dual_clipped);

    Vec slope = t.slope;
    if (a.sequence_ratio) {
      add(s.sequence_slope, slope);
      slope = zero;
    }
    if (a.ref_log_probs != nullptr) {
      const auto e = kl_estimate(log_prob - load_kept(a.ref_log_probs + j, keep, n), a.kl_estimator);
      add(s.kl, select(keep, e.value, zero));
      if (a.kl_coef != 0.0f) slope = fma(Vec(a.kl_coef), e.slope, slope);  // 0 * inf would be a nan
    }
    if (a.entropy != nullptr) add(s.entropy, load_kept(a.entropy + j, keep, n));
    if (a.grad_log_probs != nullptr) store_first(a.grad_log_probs + j, select(keep, slope * scale, zero), n);
    if (a.grad_entropy != nullptr)
      store_first(a.grad_entropy + j, select(keep, Vec(-a.entropy_coef) * scale, zero), n);
  };
  for_each_vector(span.length, token, [&] { flush_all(s); });

  if (a.sequence_ratio && a.grad_log_probs != nullptr && counted > 0) {
    // The ratio is the exponential of a mean: each of its tokens carries 1/counted of the summed slope.
    const Vec share(static_cast<float>(s.sequence_slope.total / counted));
    for_each_vector(
        span.length,
        [&](int64_t i, int n) {
          const Vec grad = load_first(a.grad_log_probs + at + i, n, 0.0f);
          const Mask keep = load_mask_first(a.mask + at + i, n);
          store_first(a.grad_log_probs + at + i, select(keep, fma(share, scale, grad), zero), n);
        },
        [] {});
  }

  a.result[unit] = {s.surrogate.total,
                    s.approx_kl.total,
                    static_cast<double>(s.clipped),
                    static_cast<double>(s.dual_clipped),
                    s.ratio.total,
                    s.entropy.total,
                    s.kl.total,
                    smallest(s.ratio_min),
                    largest(s.ratio_max)};
}

void value_unit(const ValueArgs& a, int64_t unit) {
  const Span span = span_of(a.units, unit);
  const int64_t counted = a.counts[unit], at = span.start;
  const Vec zero(0.0f), scale(static_cast<float>(unit_scale(a.denominator, a.per_token_mean, counted)));
  const Vec clip(a.clip);
  Sum loss;
  int64_t clipped = 0;
  const auto token = [&](int64_t i, int n) {
    const int64_t j = at + i;
    const Mask keep = load_mask_first(a.mask + j, n);
    const Vec value = load_kept(a.values + j, keep, n), target = load_kept(a.returns + j, keep, n);
    Vec low(-__builtin_inff()), high(__builtin_inff());
    if (a.old_values != nullptr) {
      const Vec old = load_kept(a.old_values + j, keep, n);
      low = old - clip;
      high = old + clip;
    }
    const auto e = value_error<Vec, Mask>(value, target, low, high);
    add(loss, e.loss);
    clipped += count(e.clipped);
    if (a.grad_values != nullptr) store_first(a.grad_values + j, select(keep, e.slope * scale, zero), n);
  };
  for_each_vector(span.length, token, [&] { flush(loss); });

  const uint8_t* mask = a.mask + at;
  const auto value = [&](int64_t i, int n) { return load_first(a.values + at + i, n, 0.0f); };
  const auto target = [&](int64_t i, int n) { return load_first(a.returns + at + i, n, 0.0f); };
  const auto error = [&](int64_t i, int n) { return target(i, n) - value(i, n); };
  a.result[unit] = {loss.total, static_cast<double>(clipped), moments_of(span.length, counted, mask, value),
                    moments_of(span.length, counted, mask, target), moments_of(span.length, counted, mask, error)};
}

}  // namespace

void ppo(const PpoArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) ppo_unit(a, unit);
}

void value(const ValueArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) value_unit(a, unit);
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
