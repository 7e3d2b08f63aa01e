// simd.h in AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

constexpr int kWidth = 16;

struct Vec {
  __m512 v;
  Vec() = default;
  __attribute__((always_inline)) Vec(__m512 x) : v(x) {}
  __attribute__((always_inline)) explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
};
struct Mask {
  __mmask16 m;
};

FASTRLHF_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
FASTRLHF_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
FASTRLHF_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
FASTRLHF_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FASTRLHF_INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
FASTRLHF_INLINE Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
FASTRLHF_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
FASTRLHF_INLINE Vec round_even(Vec a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTRLHF_INLINE Vec scale_by_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }

FASTRLHF_INLINE Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
FASTRLHF_INLINE Mask equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
FASTRLHF_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
FASTRLHF_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
FASTRLHF_INLINE Mask operator~(Mask a) { return {static_cast<__mmask16>(~a.m)}; }
FASTRLHF_INLINE Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m.m, no.v, yes.v); }
FASTRLHF_INLINE int count(Mask m) { return __builtin_popcount(m.m); }
FASTRLHF_INLINE Mask first_lanes(int n) { return {static_cast<__mmask16>((1u << n) - 1)}; }
FASTRLHF_INLINE Mask load_mask(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm_test_epi8_mask(bytes, bytes)};
}

FASTRLHF_INLINE float first(Vec a) { return _mm512_cvtss_f32(a.v); }
FASTRLHF_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
FASTRLHF_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
FASTRLHF_INLINE float smallest(Vec a) { return _mm512_reduce_min_ps(a.v); }

FASTRLHF_INLINE Vec load(const float* from) { return _mm512_loadu_ps(from); }
FASTRLHF_INLINE Vec load(const bf16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
FASTRLHF_INLINE Vec load(const fp16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

FASTRLHF_INLINE void store(float* to, Vec x) { _mm512_storeu_ps(to, x.v); }
FASTRLHF_INLINE void store(bf16* to, Vec x) {
  // Round to nearest even: add 0x7fff, and one more if the last kept bit is set. A nan would carry into an infinity.
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7fc00000)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
}
FASTRLHF_INLINE void store(fp16* to, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

// Masked loads and stores touch no memory outside their lanes; these go before the general ones of simd.h.
FASTRLHF_INLINE Vec load_first(const float* from, int n, float fill) {
  return n == kWidth ? load(from) : _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n).m, from);
}
FASTRLHF_INLINE void store_first(float* to, Vec x, int n) {
  if (n == kWidth) return store(to, x);
  _mm512_mask_storeu_ps(to, first_lanes(n).m, x.v);
}
FASTRLHF_INLINE Vec load_kept(const float* from, Mask keep, int) { return _mm512_maskz_loadu_ps(keep.m, from); }

FASTRLHF_INLINE bool all(Mask m) { return m.m == 0xffff; }
FASTRLHF_INLINE Vec compress(Vec a, Mask keep) { return _mm512_maskz_compress_ps(keep.m, a.v); }
FASTRLHF_INLINE Vec expand(Vec a, Mask keep) { return _mm512_maskz_expand_ps(keep.m, a.v); }
template <int k>
FASTRLHF_INLINE Vec later_lanes(Vec a, Vec after) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(after.v), _mm512_castps_si512(a.v), k));
}
FASTRLHF_INLINE Vec broadcast_first(Vec a) { return _mm512_broadcastss_ps(_mm512_castps512_ps128(a.v)); }

constexpr int kBytes = 64;
FASTRLHF_INLINE int count_bytes(const uint8_t* from) {
  const __m512i bytes = _mm512_loadu_si512(from);
  return __builtin_popcountll(_mm512_test_epi8_mask(bytes, bytes));
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
