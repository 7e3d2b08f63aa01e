// Count, mean and squared deviations in one look, by way of the distances to a pivot, the first number that counts: equal
// numbers have exactly themselves as their mean and no deviation, however the mean rounds. Nor does the variance cancel:
// the pivot is one of n numbers, so its squared distance to the mean is at most n times the variance.
#pragma once

#include "units.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

struct Spread {
  Sum distances, squares;
  float pivot = 0.0f;
  int64_t counted = 0;
};

FASTRLHF_INLINE void add(Spread& s, Vec x, Mask keep) {
  if (s.counted == 0 && count(keep) > 0) {
    s.pivot = first(compress(x, keep));
    if (!(__builtin_fabsf(s.pivot) < 1e30f)) s.pivot = 0.0f;  // inf - inf would be a nan, and a huge distance an inf
  }
  s.counted += count(keep);
  const Vec d = select(keep, x - Vec(s.pivot), Vec(0.0f));
  add(s.distances, d);
  s.squares.lanes = fma(d, d, s.squares.lanes);
}

FASTRLHF_INLINE void flush(Spread& s) {
  flush(s.distances);
  flush(s.squares);
}

FASTRLHF_INLINE Moments moments_of(Spread& s) {
  if (s.counted == 0) return {0.0, 0.0, 0.0};
  flush(s);
  const double count = static_cast<double>(s.counted), step = s.distances.total / count;
  const double squares = s.squares.total - s.distances.total * step;
  return {count, s.pivot + step, squares < 0.0 ? 0.0 : squares};
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
