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

FASTRLHF_INLINE double unit_scale(double denominator, bool per_token_mean, int64_t counted) {
  if (counted == 0 || denominator == 0.0) return 0.0;
  return 1.0 / (per_token_mean ? denominator * counted : denominator);
}

struct PpoAccumulators {
  Sum surrogate, approx_kl, ratio, entropy, kl, sequence_slope;
  int64_t clipped = 0, dual_clipped = 0;
  Vec ratio_min = Vec(__builtin_inff()), ratio_max = Vec(-__builtin_inff());
};

FASTRLHF_INLINE void flush_all(PpoAccumulators& s) {
  flush(s.surrogate);
  flush(s.approx_kl);
  flush(s.ratio);
  flush(s.entropy);
  flush(s.kl);
  flush(s.sequence_slope);
}

double mean_log_ratio(const PpoArgs& a, const Span& span, int64_t counted) {
  if (counted == 0) return 0.0;
  Sum total;
  for_each_vector(
      span.length,
      [&](int64_t i, int n) __attribute__((always_inline)) {
        const int64_t j = span.start + i;
        const Mask keep = load_mask_first(a.mask + j, n);
        add(total, load_kept(a.log_probs + j, keep, n) - load_kept(a.old_log_probs + j, keep, n));
      },
      [&] { flush(total); });
  return total.total / counted;
}

// The ratio of a sequence is the exponential of a mean: each of its tokens carries 1/counted of the summed slope.
void share_slope(const PpoArgs& a, const Span& span, Vec share) {
  for_each_vector(0, span.length, [&](int64_t i, int n) {
    float* at = a.grad_log_probs + span.start + i;
    const Mask keep = load_mask_first(a.mask + span.start + i, n);
    store_first(at, select(keep, load_first(at, n, 0.0f) + share, Vec(0.0f)), n);
  });
}

enum PpoCase { kSurrogateAlone, kWithK3, kAnything };

// The common cases, without weights, entropy and sequence ratio, have a loop of their own, which stays in registers.
template <PpoCase kCase>
void ppo_unit(const PpoArgs& args, int64_t unit) {
  const PpoArgs a = args;
  constexpr bool kPlain = kCase != kAnything;
  const bool has_reference = kPlain ? kCase == kWithK3 : a.ref_log_probs != nullptr;
  const int estimator = kPlain ? static_cast<int>(kK3) : a.kl_estimator;
  const Span span = span_of(a.units, unit);
  const int64_t counted = a.counts[unit];
  const double share = unit_scale(a.denominator, a.per_token_mean, counted);
  const Vec zero(0.0f), scale(static_cast<float>(share)), grad_entropy(static_cast<float>(-a.entropy_coef * share));
  const bool by_sequence = !kPlain && a.sequence_ratio;
  const Vec sequence_log_ratio(by_sequence ? static_cast<float>(mean_log_ratio(a, span, counted)) : 0.0f);

  PpoAccumulators s;
  const auto token = [&](int64_t i, int n) __attribute__((always_inline)) {
    const int64_t j = span.start + i;
    const Mask keep = load_mask_first(a.mask + j, n);
    const Vec log_prob = load_kept(a.log_probs + j, keep, n);
    Vec log_ratio = log_prob - load_kept(a.old_log_probs + j, keep, n);
    if (by_sequence) log_ratio = select(keep, sequence_log_ratio, zero);
    const Vec cost = (Vec(a.advantage_mean) - load_kept(a.advantages + j, keep, n)) * Vec(a.advantage_rstd);
    auto t = surrogate<Vec, Mask>(log_ratio, cost, a.clip_low, a.clip_high, a.dual_clip, a.log_ratio_clamp);
    if (!kPlain && a.weights != nullptr) {
      const Vec weight = load_kept(a.weights + j, keep, n);
      t.loss = t.loss * weight;
      t.slope = t.slope * weight;
    }
    add(s.surrogate, t.loss, keep);
    add(s.approx_kl, t.approx_kl);  // 0 where the token does not count
    add(s.ratio, t.ratio, keep);
    s.ratio_min = select(keep, smaller(t.ratio, s.ratio_min), s.ratio_min);
    s.ratio_max = select(keep, larger(t.ratio, s.ratio_max), s.ratio_max);
    s.clipped += count(t.clipped);
    s.dual_clipped += count(t.dual_clipped);

    Vec slope = t.slope;
    if (by_sequence) {
      add(s.sequence_slope, slope, keep);
      slope = zero;
    }
    if (has_reference) {
      const auto e = kl_estimate(log_prob - load_kept(a.ref_log_probs + j, keep, n), estimator);
      add(s.kl, e.value);  // likewise
      if (a.kl_coef != 0.0f) slope = fma(Vec(a.kl_coef), e.slope, slope);  // 0 * inf would be a nan
    }
    if (!kPlain && a.entropy != nullptr) add(s.entropy, load_kept(a.entropy + j, keep, n));
    if (a.grad_log_probs != nullptr) store_first(a.grad_log_probs + j, select(keep, slope * scale, zero), n);
    if (!kPlain && a.grad_entropy != nullptr) store_first(a.grad_entropy + j, select(keep, grad_entropy, zero), n);
  };
  for_each_vector(span.length, token, [&] { flush_all(s); });
  if (by_sequence && a.grad_log_probs != nullptr && counted > 0)
    share_slope(a, span, Vec(static_cast<float>(s.sequence_slope.total / counted * share)));

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

template <bool kClipped>
void value_unit(const ValueArgs& args, int64_t unit) {
  const ValueArgs a = args;
  const Span span = span_of(a.units, unit);
  const Vec zero(0.0f), scale(static_cast<float>(unit_scale(a.denominator, a.per_token_mean, a.counts[unit])));
  const Vec clip(a.clip);
  Sum loss;
  int64_t clipped = 0;
  Spread values, targets, errors;
  const auto token = [&](int64_t i, int n) __attribute__((always_inline)) {
    const int64_t j = span.start + i;
    const Mask keep = load_mask_first(a.mask + j, n);
    const Vec value = load_kept(a.values + j, keep, n), target = load_kept(a.returns + j, keep, n);
    Vec low(-__builtin_inff()), high(__builtin_inff());
    if (kClipped) {
      const Vec old = load_kept(a.old_values + j, keep, n);
      low = old - clip;
      high = old + clip;
    }
    const auto e = value_error<Vec, Mask>(value, target, low, high);
    add(loss, e.loss);
    clipped += count(e.clipped);
    add(values, value, keep);
    add(targets, target, keep);
    add(errors, target - value, keep);
    if (a.grad_values != nullptr) store_first(a.grad_values + j, select(keep, e.slope * scale, zero), n);
  };
  for_each_vector(span.length, token, [&] {
    flush(loss);
    flush(values);
    flush(targets);
    flush(errors);
  });
  a.result[unit] = {loss.total, static_cast<double>(clipped), moments_of(values), moments_of(targets),
                    moments_of(errors)};
}

}  // namespace

void ppo(const PpoArgs& a, int64_t begin, int64_t end) {
  const bool plain = a.weights == nullptr && a.entropy == nullptr && !a.sequence_ratio;
  const bool alone = a.ref_log_probs == nullptr;
  auto one = ppo_unit<kAnything>;
  if (plain && alone) one = ppo_unit<kSurrogateAlone>;
  if (plain && !alone && a.kl_estimator == kK3) one = ppo_unit<kWithK3>;
  for (int64_t unit = begin; unit < end; ++unit) one(a, unit);
}

void value(const ValueArgs& a, int64_t begin, int64_t end) {
  const auto one = a.old_values == nullptr ? value_unit<false> : value_unit<true>;
  for (int64_t unit = begin; unit < end; ++unit) one(a, unit);
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
