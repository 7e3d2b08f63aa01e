// How the kernels go through a unit of `Units`, and add it up. See ../kernels.h.
#pragma once

#include "../kernels.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

// fp32 lanes are emptied into doubles this often (in elements): long sums stay as exact as torch's pairwise ones.
constexpr int64_t kFlush = 32 * kWidth;

// Calls body(i, n) for the vectors of [begin, end): n elements from i on, n < kWidth only in the last one. A body that is
// to stay in registers has to say always_inline: there are two calls.
template <class Body>
FASTRLHF_INLINE void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) body(i, kWidth);
  if (i < end) body(i, static_cast<int>(end - i));
}

// Calls body(i, n) for the vectors of [0, length): n elements from i on, n < kWidth only in the last one; after
// every kFlush elements and at the end, flush().
template <class Body, class Flush>
FASTRLHF_INLINE void for_each_vector(int64_t length, const Body& body, const Flush& flush) {
  for (int64_t block = 0; block < length; block += kFlush) {
    const int64_t stop = length - block < kFlush ? length : block + kFlush;
    int64_t i = block;
    for (; i + kWidth <= stop; i += kWidth) body(i, kWidth);
    if (i < stop) body(i, static_cast<int>(stop - i));
    flush();
  }
}

FASTRLHF_INLINE int64_t count_kept(const uint8_t* mask, int64_t length) {
  int64_t n = 0, i = 0;
  for (; i + kBytes <= length; i += kBytes) n += count_bytes(mask + i);
  for (; i < length; ++i) n += mask[i] != 0;
  return n;
}

// A sum in fp32 lanes that empties into a double.
struct Sum {
  Vec lanes = Vec(0.0f);
  double total = 0.0;
};
FASTRLHF_INLINE void add(Sum& sum_so_far, Vec x) { sum_so_far.lanes = sum_so_far.lanes + x; }
FASTRLHF_INLINE void add(Sum& sum_so_far, Vec x, Mask keep) {
  sum_so_far.lanes = select(keep, sum_so_far.lanes + x, sum_so_far.lanes);
}
FASTRLHF_INLINE void flush(Sum& sum_so_far) {
  sum_so_far.total += sum(sum_so_far.lanes);
  sum_so_far.lanes = Vec(0.0f);
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
