// simd.h in plain C++: eight lanes in an array, which compilers turn into SSE, NEON or whatever there is.
#pragma once

#include <math.h>

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

constexpr int kWidth = 8;

struct Vec {
  float lane[kWidth];
  Vec() = default;
  __attribute__((always_inline)) explicit Vec(float x) {
    for (int i = 0; i < kWidth; ++i) lane[i] = x;
  }
};
struct Mask {
  uint32_t lane[kWidth];  // all bits set, or none
};

FASTRLHF_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FASTRLHF_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

#define FASTRLHF_LANES(Type, expression)                            \
  Type r;                                                           \
  for (int i = 0; i < kWidth; ++i) r.lane[i] = (expression);        \
  return r;

FASTRLHF_INLINE Vec operator+(Vec a, Vec b) { FASTRLHF_LANES(Vec, a.lane[i] + b.lane[i]) }
FASTRLHF_INLINE Vec operator-(Vec a, Vec b) { FASTRLHF_LANES(Vec, a.lane[i] - b.lane[i]) }
FASTRLHF_INLINE Vec operator*(Vec a, Vec b) { FASTRLHF_LANES(Vec, a.lane[i] * b.lane[i]) }
FASTRLHF_INLINE Vec operator/(Vec a, Vec b) { FASTRLHF_LANES(Vec, a.lane[i] / b.lane[i]) }
FASTRLHF_INLINE Vec fma(Vec a, Vec b, Vec c) { FASTRLHF_LANES(Vec, a.lane[i] * b.lane[i] + c.lane[i]) }
FASTRLHF_INLINE Vec larger(Vec a, Vec b) { FASTRLHF_LANES(Vec, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]) }
FASTRLHF_INLINE Vec smaller(Vec a, Vec b) { FASTRLHF_LANES(Vec, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]) }
FASTRLHF_INLINE Vec abs(Vec a) { FASTRLHF_LANES(Vec, float_of(bits_of(a.lane[i]) & 0x7fffffffu)) }
FASTRLHF_INLINE Vec round_even(Vec a) {
  // Adding and taking away 1.5 * 2^23 leaves no room for a fraction. Right for |a| < 2^22; both callers stay far below.
  FASTRLHF_LANES(Vec, (a.lane[i] + 12582912.0f) - 12582912.0f)
}
FASTRLHF_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  // In two halves, so that results down to the denormals and up to infinity come out right for |n| <= 250.
  Vec r;
  for (int i = 0; i < kWidth; ++i) {
    // The integer is read out of the sum's mantissa: a conversion of nan would be undefined, and nan is welcome here.
    const int32_t whole = static_cast<int32_t>(bits_of(n.lane[i] + 12582912.0f)) - 0x4b400000;
    const int32_t half = whole >> 1;
    const float low = float_of(static_cast<uint32_t>(half + 127) << 23);
    const float high = float_of(static_cast<uint32_t>(whole - half + 127) << 23);
    r.lane[i] = a.lane[i] * low * high;
  }
  return r;
}

// a 2^n, where n stands in the lowest bits of k; the result has to be normal.
FASTRLHF_INLINE Vec add_to_exponent(Vec a, Vec k) {
  FASTRLHF_LANES(Vec, float_of(bits_of(a.lane[i]) + (bits_of(k.lane[i]) << 23)))
}

FASTRLHF_INLINE Mask less(Vec a, Vec b) { FASTRLHF_LANES(Mask, a.lane[i] < b.lane[i] ? ~0u : 0u) }
FASTRLHF_INLINE Mask equal(Vec a, Vec b) { FASTRLHF_LANES(Mask, a.lane[i] == b.lane[i] ? ~0u : 0u) }
FASTRLHF_INLINE Mask differs(Vec a, Vec b) {
  FASTRLHF_LANES(Mask, (a.lane[i] < b.lane[i]) | (b.lane[i] < a.lane[i]) ? ~0u : 0u)
}
FASTRLHF_INLINE Mask operator&(Mask a, Mask b) { FASTRLHF_LANES(Mask, a.lane[i] & b.lane[i]) }
FASTRLHF_INLINE Mask operator|(Mask a, Mask b) { FASTRLHF_LANES(Mask, a.lane[i] | b.lane[i]) }
FASTRLHF_INLINE Mask operator~(Mask a) { FASTRLHF_LANES(Mask, ~a.lane[i]) }
FASTRLHF_INLINE Vec select(Mask m, Vec yes, Vec no) {
  FASTRLHF_LANES(Vec, float_of((m.lane[i] & bits_of(yes.lane[i])) | (~m.lane[i] & bits_of(no.lane[i]))))
}
FASTRLHF_INLINE int count(Mask m) {
  int n = 0;
  for (int i = 0; i < kWidth; ++i) n += m.lane[i] & 1;
  return n;
}
FASTRLHF_INLINE Mask first_lanes(int n) { FASTRLHF_LANES(Mask, i < n ? ~0u : 0u) }
FASTRLHF_INLINE Mask load_mask(const uint8_t* from) { FASTRLHF_LANES(Mask, from[i] != 0 ? ~0u : 0u) }

FASTRLHF_INLINE float first(Vec a) { return a.lane[0]; }
FASTRLHF_INLINE float sum(Vec a) {
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
  return a.lane[0];
}
FASTRLHF_INLINE float largest(Vec a) {
  float r = a.lane[0];
  for (int i = 1; i < kWidth; ++i) r = a.lane[i] > r ? a.lane[i] : r;
  return r;
}
FASTRLHF_INLINE float smallest(Vec a) {
  float r = a.lane[0];
  for (int i = 1; i < kWidth; ++i) r = a.lane[i] < r ? a.lane[i] : r;
  return r;
}

FASTRLHF_INLINE float to_float(float x) { return x; }
FASTRLHF_INLINE float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
FASTRLHF_INLINE float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // Shifting the bits into place leaves an exponent that is 112 too small; the product repairs it, denormals included.
  const float finite = float_of(rest << 13) * 5.192296858534828e+33f;  // 2^112
  return float_of(sign | (rest >= 0x7c00u ? 0x7f800000u | (rest & 0x3ffu) << 13 : bits_of(finite)));
}
FASTRLHF_INLINE void from_float(float x, float* to) { *to = x; }
FASTRLHF_INLINE void from_float(float x, bf16* to) {
  const uint32_t bits = bits_of(x);
  to->bits = x != x ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
FASTRLHF_INLINE void from_float(float x, fp16* to) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, rest = bits_of(x) & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: denormal, rounded by an addition that aligns the last bit
    half = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
FASTRLHF_INLINE Vec load(const T* from) { FASTRLHF_LANES(Vec, to_float(from[i])) }
template <class T>
FASTRLHF_INLINE void store(T* to, Vec x) {
  for (int i = 0; i < kWidth; ++i) from_float(x.lane[i], to + i);
}

// Two vectors at once, for whoever does not care which element is where.
template <class T>
FASTRLHF_INLINE void load_pair(const T* from, Vec& a, Vec& b) {
  a = load(from);
  b = load(from + kWidth);
}

FASTRLHF_INLINE Vec load_kept(const float* from, Mask keep, int n) {
  Vec x(0.0f);
  memcpy(x.lane, from, n * sizeof(float));
  return select(keep, x, Vec(0.0f));
}

FASTRLHF_INLINE bool all(Mask m) { return count(m) == kWidth; }
FASTRLHF_INLINE Vec compress(Vec a, Mask keep) {
  Vec r(0.0f);
  for (int i = 0, n = 0; i < kWidth; ++i) {
    r.lane[n] = a.lane[i];
    n += keep.lane[i] & 1;
  }
  return r;
}
FASTRLHF_INLINE Vec expand(Vec a, Mask keep) {
  Vec r;
  for (int i = 0, n = 0; i < kWidth; ++i) {
    r.lane[i] = float_of(bits_of(a.lane[n]) & keep.lane[i]);
    n += keep.lane[i] & 1;
  }
  return r;
}
template <int k>
FASTRLHF_INLINE Vec later_lanes(Vec a, Vec after) {
  FASTRLHF_LANES(Vec, i + k < kWidth ? a.lane[i + k] : after.lane[i + k - kWidth])
}
FASTRLHF_INLINE Vec broadcast_first(Vec a) { return Vec(a.lane[0]); }

constexpr int kBytes = 8;
FASTRLHF_INLINE int count_bytes(const uint8_t* from) {
  int n = 0;
  for (int i = 0; i < kBytes; ++i) n += from[i] != 0;
  return n;
}

template <class T>
FASTRLHF_INLINE void store_pair(T* to, Vec a, Vec b) {
  store(to, a);
  store(to + kWidth, b);
}

#undef FASTRLHF_LANES

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
