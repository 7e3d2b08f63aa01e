// simd.h in AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

constexpr int kWidth = 8;

struct Vec {
  __m256 v;
  Vec() = default;
  __attribute__((always_inline)) Vec(__m256 x) : v(x) {}
  __attribute__((always_inline)) explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
};
struct Mask {
  __m256 m;  // all bits of a lane set, or none
};

FASTRLHF_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
FASTRLHF_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
FASTRLHF_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
FASTRLHF_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
FASTRLHF_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
FASTRLHF_INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
FASTRLHF_INLINE Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
FASTRLHF_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
FASTRLHF_INLINE Vec round_even(Vec a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTRLHF_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  // In two halves, so that results down to the denormals and up to infinity come out right for |n| <= 250.
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a.v, low), high);
}

// a 2^n, where n stands in the lowest bits of k; the result has to be normal.
FASTRLHF_INLINE Vec add_to_exponent(Vec a, Vec k) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(k.v), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), exponent));
}

FASTRLHF_INLINE Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
FASTRLHF_INLINE Mask equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
FASTRLHF_INLINE Mask differs(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_OQ)}; }
FASTRLHF_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
FASTRLHF_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
FASTRLHF_INLINE Mask operator~(Mask a) {
  return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
FASTRLHF_INLINE Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no.v, yes.v, m.m); }
FASTRLHF_INLINE int count(Mask m) { return __builtin_popcount(_mm256_movemask_ps(m.m)); }
FASTRLHF_INLINE Mask first_lanes(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
}
FASTRLHF_INLINE Mask load_mask(const uint8_t* from) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}

FASTRLHF_INLINE float first(Vec a) { return _mm256_cvtss_f32(a.v); }
FASTRLHF_INLINE float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
FASTRLHF_INLINE float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
FASTRLHF_INLINE float smallest(Vec a) {
  __m128 x = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_min_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
}

FASTRLHF_INLINE Vec load(const float* from) { return _mm256_loadu_ps(from); }
FASTRLHF_INLINE Vec load(const bf16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FASTRLHF_INLINE Vec load(const fp16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Two vectors at once, for whoever does not care which element is where: of bf16, the even ones and the odd ones.
template <class T>
FASTRLHF_INLINE void load_pair(const T* from, Vec& a, Vec& b) {
  a = load(from);
  b = load(from + kWidth);
}
FASTRLHF_INLINE void load_pair(const bf16* from, Vec& a, Vec& b) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)));
}

FASTRLHF_INLINE void store(float* to, Vec x) { _mm256_storeu_ps(to, x.v); }
FASTRLHF_INLINE void store(bf16* to, Vec x) {
  // Round to nearest even: add 0x7fff, and one more if the last kept bit is set. A nan would carry into an infinity.
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
// What load_pair took apart.
template <class T>
FASTRLHF_INLINE void store_pair(T* to, Vec a, Vec b) {
  store(to, a);
  store(to + kWidth, b);
}
FASTRLHF_INLINE void store_pair(bf16* to, Vec a, Vec b) {
  // As in store; a nan that arithmetic made, or that came as bf16, has no low bits to carry.
  const auto rounded = [](Vec x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  };
  const __m256i low = _mm256_srli_epi32(rounded(a), 16);
  const __m256i both = _mm256_or_si256(low, _mm256_and_si256(rounded(b), _mm256_set1_epi32(0xffff0000)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), both);
}
FASTRLHF_INLINE void store(fp16* to, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

FASTRLHF_INLINE Vec load_kept(const float* from, Mask keep, int) {  // touches no memory outside its lanes
  return _mm256_maskload_ps(from, _mm256_castps_si256(keep.m));
}

FASTRLHF_INLINE bool all(Mask m) { return _mm256_movemask_ps(m.m) == 0xff; }
FASTRLHF_INLINE Vec compress(Vec a, Mask keep) {
  float lanes[kWidth], kept[kWidth] = {0};
  store(lanes, a);
  for (int i = 0, n = 0, bits = _mm256_movemask_ps(keep.m); i < kWidth; ++i) {
    kept[n] = lanes[i];
    n += bits >> i & 1;
  }
  return load(kept);
}
FASTRLHF_INLINE Vec expand(Vec a, Mask keep) {
  float lanes[kWidth], spread[kWidth];
  store(lanes, a);
  for (int i = 0, n = 0, bits = _mm256_movemask_ps(keep.m); i < kWidth; ++i) {
    spread[i] = lanes[n];
    n += bits >> i & 1;
  }
  return _mm256_and_ps(load(spread).v, keep.m);
}
template <int k>
FASTRLHF_INLINE Vec later_lanes(Vec a, Vec after) {
  const __m256i lane = _mm256_setr_epi32(k, k + 1, k + 2, k + 3, k + 4, k + 5, k + 6, k + 7);  // modulo 8
  return _mm256_blend_ps(_mm256_permutevar8x32_ps(a.v, lane), _mm256_permutevar8x32_ps(after.v, lane),
                         0xff & (0xff << (kWidth - k)));
}
FASTRLHF_INLINE Vec broadcast_first(Vec a) { return _mm256_broadcastss_ps(_mm256_castps256_ps128(a.v)); }

constexpr int kBytes = 32;
FASTRLHF_INLINE int count_bytes(const uint8_t* from) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const int zeros = _mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256()));
  return kBytes - __builtin_popcount(zeros);
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
