// A vector of fp32 lanes, in the instruction set this file is compiled for, and what the kernels need of it.
//
// The hot files (cpu/kernels/*.cpp) are compiled once for each capability, with -DFASTRLHF_CAPABILITY=avx512 and the
// like, and everything they define lives in the namespace of that name. That is not only tidy: an inline function of the
// same mangled name in two builds would be merged by the linker, and an AVX-512 copy of it could end up in the portable
// build. For the same reason hot files include no C++ standard header that defines code.
//
// Conventions: larger(a, b) is a > b ? a : b and smaller(a, b) is a < b ? a : b, so that a nan in b survives, as it does
// in torch.clamp when b is the value. Comparisons with nan are false, differs() too. `first` functions touch only the first n lanes.
// load_kept(from, keep, n) gives 0 in the other lanes, whatever stands there. compress moves the kept lanes to the front
// (what follows them is anything), expand moves them back, with 0 between. later_lanes<k>(a, after) is a[k] ..
// a[kWidth - 1], after[0] .. after[k - 1]. count_bytes counts those of kBytes bytes that are not 0.
#pragma once

#include <stdint.h>
#include <string.h>

#define FASTRLHF_INLINE static inline __attribute__((always_inline))

namespace fastrlhf {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace fastrlhf

#if defined(FASTRLHF_CAPABILITY_AVX512_BF16)  // all of AVX-512, and products of bf16 (kernels/product.h)
#define FASTRLHF_CAPABILITY_AVX512
#endif
#if defined(FASTRLHF_CAPABILITY_AVX512)
#include "simd_avx512.h"
#elif defined(FASTRLHF_CAPABILITY_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

FASTRLHF_INLINE Vec operator-(Vec a) { return Vec(0.0f) - a; }

template <class T>
FASTRLHF_INLINE Vec load_first(const T* from, int n, float fill) {
  if (n == kWidth) return load(from);
  T buffer[kWidth];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, from, n * sizeof(T));
  return select(first_lanes(n), load(buffer), Vec(fill));
}

template <class T>
FASTRLHF_INLINE void store_first(T* to, Vec x, int n) {
  if (n == kWidth) return store(to, x);
  T buffer[kWidth];
  store(buffer, x);
  memcpy(to, buffer, n * sizeof(T));
}

// The lanes whose byte in a torch.bool tensor is not 0.
FASTRLHF_INLINE Mask load_mask_first(const uint8_t* from, int n) {
  if (n == kWidth) return load_mask(from);
  uint8_t buffer[kWidth] = {0};
  memcpy(buffer, from, n);
  return load_mask(buffer);
}

FASTRLHF_INLINE Vec clamp(Vec x, float low, float high) { return smaller(Vec(high), larger(Vec(low), x)); }

// 2^x in two factors, the second near 1; whoever adds it up saves an operation and a rounding. `held` is the nearest to x
// in [-127, 127], which is finite. 0 from -127 down, 2^127 from there up; a nan in x gives nan. Relative error 1e-7 and
// rounding, above -126; exactly 1 at 0.
struct Power {
  Vec whole, part, held;
};
#if !defined(FASTRLHF_CAPABILITY_AVX512)  // which has instructions of its own for this
FASTRLHF_INLINE Power exp2_held(Vec x) {
  const Vec held = clamp(x, -127.0f, 127.0f);
  const Vec shifted = held + Vec(12582912.0f);  // 1.5 * 2^23: the integer nearest to x ends up in the lowest bits
  const Vec f = held - (shifted - Vec(12582912.0f));
  Vec p = fma(f, Vec(1.326472731e-03f), Vec(9.671512991e-03f));
  p = fma(f, p, Vec(5.550733581e-02f));
  p = fma(f, p, Vec(2.402224243e-01f));
  p = fma(f, p, Vec(6.931470037e-01f));
  return {add_to_exponent(Vec(1.0f), shifted), fma(f, p, Vec(1.0f)), held};
}
#else
FASTRLHF_INLINE Power exp2_held(Vec x) {
  Power p;
  p.held = held_within_127(x);
  exp2_factors(x, p.held, p.whole, p.part);
  return p;
}
#endif

FASTRLHF_INLINE Vec product(const Power& p) { return p.whole * p.part; }

struct ExpParts {
  Vec value, minus_one, residual;
};

// exp(x) over the whole range (relative error 3e-9 and rounding), exp(x) - 1, and exp(x) - 1 - x. The latter two keep
// their precision near 0, where the plain differences would be all rounding. bounded: |x| <= 80, or nan.
FASTRLHF_INLINE ExpParts exp_parts(Vec x, bool bounded) {
  const Vec one(1.0f);
  // r + tail is exp(r) - 1, for |r| <= ln 2 / 2.
  const auto tail_of = [](Vec r) __attribute__((always_inline)) {
    Vec q = fma(r, Vec(1.381446724e-03f), Vec(8.368780836e-03f));
    q = fma(r, q, Vec(4.166839272e-02f));
    q = fma(r, q, Vec(1.666651964e-01f));
    q = fma(r, q, Vec(4.999999404e-01f));
    return r * r * q;
  };
  // Policies that stand near each other are the usual case. The same bits come out below, n being 0.
  if (count(less(Vec(0.34f), abs(x))) == 0) {
    const Vec tail = tail_of(x), sum = x + tail;
    return {one + sum, sum, tail};
  }
  const Vec held = bounded ? x : clamp(x, -104.0f, 89.0f);  // exp is 0 and inf there
  const Vec n = round_even(held * Vec(1.44269504f));
  Vec r = fma(n, Vec(-0.693145752f), held);  // ln 2 in two parts, the first with room for an exact product
  r = fma(n, Vec(-1.42860677e-06f), r);
  const Vec tail = tail_of(r), sum = r + tail;
  const Vec value = scale_by_power_of_two(one + sum, n), minus_one = value - one;
  const Mask near = equal(n, Vec(0.0f));
  // x is held below infinity, so that the residual there is inf and not inf - inf.
  return {value, select(near, sum, minus_one), select(near, tail, minus_one - (bounded ? x : smaller(Vec(1e30f), x)))};
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
