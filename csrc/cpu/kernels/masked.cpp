// Counts and moments of the elements that count, unit by unit, and whitening with them.

#include "../simd.h"
#include "tables.h"
#include "units.h"
// After simd.h, whose functions it uses.
#include "moments.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

void count(const CountArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Span span = span_of(a.units, unit);
    a.result[unit] = count_kept(a.mask + span.start, span.length);
  }
}

void moments(const MomentsArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Span span = span_of(a.units, unit);
    const float* x = a.x + span.start;
    const uint8_t* mask = a.mask + span.start;
    Spread spread;
    const auto element = [&](int64_t i, int n) __attribute__((always_inline)) {
      const Mask keep = load_mask_first(mask + i, n);
      add(spread, load_kept(x + i, keep, n), keep);
    };
    for_each_vector(span.length, element, [&] { flush(spread); });
    a.result[unit] = moments_of(spread);
  }
}

void whiten(const WhitenArgs& args, int64_t begin, int64_t end) {
  const WhitenArgs a = args;
  const Vec mean(a.mean), rstd(a.rstd), shift(a.shift);
  for_each_vector(begin, end, [&](int64_t i, int n) __attribute__((always_inline)) {
    const Mask keep = load_mask_first(a.mask + i, n);
    const Vec white = fma(load_kept(a.x + i, keep, n) - mean, rstd, shift);
    store_first(a.whitened + i, select(keep, white, Vec(0.0f)), n);
  });
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
