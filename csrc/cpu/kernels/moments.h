// Count, mean and squared deviations of a short stretch, in two looks at memory that is still in L1: no cancellation.
#pragma once

#include "units.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

// value(i, n) gives the vector of elements i .. i + n.
template <class Value>
FASTRLHF_INLINE Moments moments_of(int64_t length, int64_t counted, const uint8_t* mask, const Value& value) {
  if (counted == 0) return {0.0, 0.0, 0.0};
  Sum total;
  for_each_vector(
      length,
      [&](int64_t i, int n) { add(total, select(load_mask_first(mask + i, n), value(i, n), Vec(0.0f))); },
      [&] { flush(total); });
  const double mean = total.total / counted;
  const Vec center(static_cast<float>(mean));
  Sum squares;
  for_each_vector(
      length,
      [&](int64_t i, int n) {
        const Vec d = select(load_mask_first(mask + i, n), value(i, n) - center, Vec(0.0f));
        add(squares, d * d);
      },
      [&] { flush(squares); });
  return {static_cast<double>(counted), mean, squares.total};
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
