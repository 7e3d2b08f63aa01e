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
FASTRLHF_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
FASTRLHF_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FASTRLHF_INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
FASTRLHF_INLINE Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
FASTRLHF_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
FASTRLHF_INLINE Vec round_even(Vec a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTRLHF_INLINE Vec scale_by_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }

// 2^x = 2^(k/32) 2^f with |f| <= 1/64: a table of 32, and a parabola. At -127 all bits of 2^(k/32) are 0, and so is it.
FASTRLHF_INLINE void exp2_factors(Vec x, Vec held, Vec& whole, Vec& part) {
  // Bits of 2^(i/32), less what the shift of i below adds to them.
  const __m512i low = _mm512_setr_epi32(
      0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0,
      0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6);
  const __m512i high = _mm512_setr_epi32(
      0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd,
      0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3);
  const __m512 f = _mm512_reduce_ps(x.v, 5 << 4);  // of the x that came: a nan goes its way through here
  // 1.5 * 2^18 leaves 5 bits for the fraction: k, and in its upper bits the exponent.
  const __m512i k = _mm512_castps_si512(_mm512_add_ps(held.v, _mm512_set1_ps(393216.0f)));
  const __m512 slope = _mm512_fmadd_ps(f, _mm512_set1_ps(2.402265966e-01f), _mm512_set1_ps(6.931573153e-01f));
  whole = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutex2var_epi32(low, k, high), _mm512_slli_epi32(k, 18)));
  part = _mm512_fmadd_ps(f, slope, _mm512_set1_ps(1.0f));
}
// The smaller magnitude, with the sign of x.
FASTRLHF_INLINE Vec held_within_127(Vec x) { return _mm512_range_ps(x.v, _mm512_set1_ps(127.0f), 2); }

FASTRLHF_INLINE Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
FASTRLHF_INLINE Mask equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
FASTRLHF_INLINE Mask differs(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_OQ)}; }
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

// Two vectors at once, for whoever does not care which element is where: of bf16, the even ones and the odd ones.
template <class T>
FASTRLHF_INLINE void load_pair(const T* from, Vec& a, Vec& b) {
  a = load(from);
  b = load(from + kWidth);
}
FASTRLHF_INLINE void load_pair(const bf16* from, Vec& a, Vec& b) {
  const __m512i both = _mm512_loadu_si512(from);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
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
// What load_pair took apart.
template <class T>
FASTRLHF_INLINE void store_pair(T* to, Vec a, Vec b) {
  store(to, a);
  store(to + kWidth, b);
}
FASTRLHF_INLINE void store_pair(bf16* to, Vec a, Vec b) {
  // As in store; a nan that arithmetic made, or that came as bf16, has no low bits to carry.
  const auto rounded = [](Vec x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  };
  const __m512i low = _mm512_srli_epi32(rounded(a), 16);
  const __m512i both = _mm512_or_si512(low, _mm512_and_si512(rounded(b), _mm512_set1_epi32(0xffff0000)));
  _mm512_storeu_si512(to, both);
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

// to[j][i] = from[i][j] of 16 x 16 numbers of 32 bits. `to` is not wanted in the caches.
FASTRLHF_INLINE void transpose_16(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(static_cast<const uint32_t*>(from) + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + 2 + k]);
      a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + 2 + k]);
    }
  // a[i + c] has, in its 128-bit lane l, column 4 l + c of rows i .. i + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    b[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
    b[4 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    b[8 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
    b[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  auto* at = static_cast<uint32_t*>(to);
  if (reinterpret_cast<uintptr_t>(at) % 64 == 0 && to_stride % 16 == 0) {
    for (int j = 0; j < 16; ++j) _mm512_stream_si512(reinterpret_cast<__m512i*>(at + j * to_stride), b[j]);
  } else {
    for (int j = 0; j < 16; ++j) _mm512_storeu_si512(at + j * to_stride, b[j]);
  }
}

constexpr int kBytes = 64;
FASTRLHF_INLINE int count_bytes(const uint8_t* from) {
  const __m512i bytes = _mm512_loadu_si512(from);
  return __builtin_popcountll(_mm512_test_epi8_mask(bytes, bytes));
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
