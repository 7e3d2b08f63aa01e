// Count, mean and squared deviations of a short stretch, in two looks at memory that is still in L1: no cancellation.
// Both look at the distance to a pivot, the first element that counts: equal numbers have exactly themselves as their
// mean, and no deviation, however the number rounds.
#pragma once

#include "units.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

// value(i, n) gives the vector of elements i .. i + n.
template <class Value>
FASTRLHF_INLINE Moments moments_of(int64_t length, int64_t counted, const uint8_t* mask, const Value& value) {
  if (counted == 0) return {0.0, 0.0, 0.0};
  int64_t at = 0;
  while (mask[at] == 0) ++at;
  float start = first(value(at, 1));
  if (!(__builtin_fabsf(start) < 1e30f)) start = 0.0f;  // inf - inf would be a nan, and a huge distance an inf
  const Vec pivot(start);
  Sum total;
  for_each_vector(
      length,
      [&](int64_t i, int n) { add(total, select(load_mask_first(mask + i, n), value(i, n) - pivot, Vec(0.0f))); },
      [&] { flush(total); });
  const double distance = total.total / counted;
  const Vec center(static_cast<float>(distance));
  Sum squares;
  for_each_vector(
      length,
      [&](int64_t i, int n) {
        const Vec d = select(load_mask_first(mask + i, n), (value(i, n) - pivot) - center, Vec(0.0f));
        add(squares, d * d);
      },
      [&] { flush(squares); });
  return {static_cast<double>(counted), start + distance, squares.total};
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
