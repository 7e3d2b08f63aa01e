// A token from each row of logits: one random number, and the distribution function inverted in two steps.
//
// The row's mass is summed up by blocks; the block that the number falls into is walked through element by element. What
// the filters keep is described by one number, the least logit that stays: top_k and top_p find theirs by selection over
// the digits of the logits' order, which reads the row once and the part that shares the first digits again.

#include <math.h>

#include "../kernels.h"
#include "../simd.h"
#include "buffer.h"
#include "row_sums.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

// ------------------------------------------------------------------------------------------------------ random numbers

// Philox4x32-10 of Salmon et al. 2011, section 3.3. A double in [0, 1) from 53 bits of the first two words.
double uniform(uint64_t seed, uint64_t sequence, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), static_cast<uint32_t>(sequence),
                   static_cast<uint32_t>(sequence >> 32)};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  const uint64_t bits = (static_cast<uint64_t>(c[0] >> 5) << 26) + (c[1] >> 6);
  return static_cast<double>(bits) / 9007199254740992.0;  // 2^53
}

// ------------------------------------------------------------------------------------------------------------- filters

// Unsigned, in the order of the floats.
FASTRLHF_INLINE uint32_t key_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
FASTRLHF_INLINE float logit_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

struct Entry {
  uint32_t key;
  float weight;
};

// The largest logit such that those not below it weigh `wanted` together; the least of all if there is none.
float select_from_top(Entry* entries, int64_t n, double wanted) {
  static const int shifts[3] = {21, 10, 0}, digits[3] = {11, 11, 10};
  Buffer<double> sums(2048);
  double above = 0.0;
  uint32_t prefix = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = shifts[level];
    const uint32_t size = 1u << digits[level];
    memset(sums.data(), 0, size * sizeof(double));
    for (int64_t i = 0; i < n; ++i) sums.data()[entries[i].key >> shift & (size - 1)] += entries[i].weight;
    uint32_t digit = size, least = size;
    while (digit > 0) {
      --digit;
      if (sums.data()[digit] == 0.0) continue;  // nobody: every entry weighs something
      least = digit;
      if (above + sums.data()[digit] >= wanted) break;
      above += sums.data()[digit];
    }
    digit = least;
    prefix |= digit << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i)
      if ((entries[i].key >> shift & (size - 1)) == digit) entries[kept++] = entries[i];
    n = kept;
  }
  return logit_of(prefix);
}

FASTRLHF_INLINE Vec mass_of(Vec x, float m, float scale, float least) {
  return select(less(x, Vec(least)), Vec(0.0f), product(exp2_held((x - Vec(m)) * Vec(scale))));
}

template <class T>
double mass_of_block(const T* x, int64_t n, float m, float scale, float least) {
  Vec total(0.0f);
  for (int64_t i = 0; i < n; i += kWidth)
    total = total + mass_of(load_first(x + i, n - i < kWidth ? static_cast<int>(n - i) : kWidth, -INFINITY), m, scale, least);
  return sum(total);
}

struct Entries {
  int64_t count;
  double weight;
};

// Those of x[0 .. n) that are not below `least`, and possible, with their masses, or 1 each.
template <class T>
Entries gather(const T* x, int64_t n, float m, float scale, float least, bool masses, Entry* to) {
  float logits[kWidth], mass[kWidth];
  Entries found = {0, 0.0};
  for (int64_t i = 0; i < n; i += kWidth) {
    const int lanes = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    const Vec v = load_first(x + i, lanes, -INFINITY);
    if (all(less(v, Vec(least)))) continue;
    store(logits, v);
    store(mass, mass_of(v, m, scale, least));
    for (int j = 0; j < lanes; ++j) {
      if (!(logits[j] >= least && mass[j] > 0.0f)) continue;
      const float weight = masses ? mass[j] : 1.0f;
      to[found.count++] = {key_of(logits[j]), weight};
      found.weight += weight;
    }
  }
  return found;
}

// select_from_top over what is not below `least`. The most likely tokens usually weigh enough, and are few.
template <class T>
float select_likely(const T* x, int64_t n, float m, float scale, float least, bool masses, double wanted, Entry* entries) {
  for (float bits = 6.0f;; bits *= 2.0f) {
    const float bound = m - bits / scale;
    const bool everything = !(bound > least) || bits > 150.0f;  // 2^-127 is 0 already
    const Entries found = gather(x, n, m, scale, everything ? least : bound, masses, entries);
    if (everything || found.weight >= wanted) return select_from_top(entries, found.count, wanted);
  }
}

// The least logit that the filters keep.
template <class T>
float least_kept(const SampleArgs& a, const T* x, float m, float scale) {
  float least = -INFINITY;
  const int64_t n = a.vocabulary;
  const bool few = a.top_k > 0 && a.top_k < n, part = a.top_p < 1.0f;
  if (few || part) {
    Buffer<Entry> entries(n + kWidth);
    if (few) least = select_likely(x, n, m, scale, least, false, static_cast<double>(a.top_k), entries.data());
    if (part) {
      double total = 0.0;
      for (int64_t i = 0; i < n; i += kBlock)
        total += mass_of_block(x + i, n - i < kBlock ? n - i : kBlock, m, scale, least);
      least = select_likely(x, n, m, scale, least, true, a.top_p * total, entries.data());
    }
  }
  if (a.min_p > 0.0f) {
    const double bound = m + static_cast<double>(a.temperature) * log(static_cast<double>(a.min_p));
    float rounded = static_cast<float>(bound);
    if (rounded < bound) rounded = nextafterf(rounded, INFINITY);
    least = larger_of(rounded, least);
  }
  return least;
}

// ---------------------------------------------------------------------------------------------------------------- draw

template <class T>
int64_t draw(const SampleArgs& a, const T* x, float m, float scale, double u) {
  const float least = least_kept(a, x, m, scale);
  const int64_t n = a.vocabulary, blocks = (n + kBlock - 1) / kBlock;
  Buffer<double> masses(blocks);
  const auto length_of = [&](int64_t block) { return n - block * kBlock < kBlock ? n - block * kBlock : kBlock; };
  double total = 0.0;
  for (int64_t b = 0; b < blocks; ++b) {
    masses.data()[b] = mass_of_block(x + b * kBlock, length_of(b), m, scale, least);
    total += masses.data()[b];
  }
  const double wanted = u * total;
  double before = 0.0;
  int64_t block = 0, last = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (masses.data()[b] == 0.0) continue;
    block = b;
    if (before + masses.data()[b] > wanted) break;
    before += masses.data()[b];
  }
  float mass[kWidth];
  for (int64_t i = 0; i < length_of(block); i += kWidth) {
    const int lanes = static_cast<int>(length_of(block) - i < kWidth ? length_of(block) - i : kWidth);
    store(mass, mass_of(load_first(x + block * kBlock + i, lanes, -INFINITY), m, scale, least));
    for (int j = 0; j < lanes; ++j) {
      if (mass[j] == 0.0f) continue;
      last = block * kBlock + i + j;
      before += mass[j];
      if (before > wanted) return last;
    }
  }
  return last;  // the block's sum was rounded up
}

template <class T>
int64_t first_of(const T* x, int64_t n, float wanted) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int lanes = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    const Vec v = load_first(x + i, lanes, -INFINITY);
    if (count(equal(v, Vec(wanted))) == 0) continue;
    float logits[kWidth];
    store(logits, v);
    for (int j = 0; j < lanes; ++j)
      if (logits[j] == wanted) return i + j;
  }
  return 0;
}

template <class T>
void sample_rows(const SampleArgs& a, int64_t begin, int64_t end) {
  const bool greedy = a.temperature == 0.0f;
  const float temperature = greedy ? 1.0f : a.temperature, scale = scale_for(temperature);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + a.row_offset[row];
    const RowSums sums = sum_row<T, false>(x, a.vocabulary, scale);
    const float top = largest_of(x, a.vocabulary);
    if (!(sums.s > 0.0 && sums.s < INFINITY) || !(top > -INFINITY && top < INFINITY)) {
      a.tokens[row] = -1;
      a.log_probs[row] = NAN;
      continue;
    }
    const int64_t token =
        greedy ? first_of(x, a.vocabulary, top)
               : draw(a, x, top, scale, uniform(a.seed[row], a.sequence[row], a.position[row]));
    const float at_token = first(load_first(x + token, 1, 0.0f));
    a.tokens[row] = token;
    a.log_probs[row] =
        static_cast<float>((static_cast<double>(at_token) - sums.m) / temperature - log_sum(sums, scale, temperature));
  }
}

}  // namespace

void sample(const SampleArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == kFloat32) return sample_rows<float>(a, begin, end);
  if (a.dtype == kBFloat16) return sample_rows<bf16>(a, begin, end);
  return sample_rows<fp16>(a, begin, end);
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
