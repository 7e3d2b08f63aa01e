// Means and squared deviations over the elements that count, unit by unit, and whitening with them.

#include "../simd.h"
#include "tables.h"
#include "units.h"
// After simd.h, whose functions it uses.
#include "moments.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

void moments(const MomentsArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Span span = span_of(a.units, unit);
    const float* x = a.x + span.start;
    const uint8_t* mask = a.mask + span.start;
    a.result[unit] = moments_of(span.length, count_kept(mask, span.length), mask, [&](int64_t i, int n) {
      return load_first(x + i, n, 0.0f);
    });
  }
}

void whiten(const WhitenArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kWidth) {
    const int n = end - i < kWidth ? static_cast<int>(end - i) : kWidth;
    const Vec x = load_first(a.x + i, n, 0.0f);
    const Vec white = fma(x - Vec(a.mean), Vec(a.rstd), Vec(a.shift));
    store_first(a.whitened + i, select(load_mask_first(a.mask + i, n), white, Vec(0.0f)), n);
  }
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
