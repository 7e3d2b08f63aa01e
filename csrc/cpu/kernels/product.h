// Matrix products of blocks: C[rows, kPanel] (+)= A B, in fp32, on operands as they lie in memory.
//
// A block of kRows x kPanel sums stays in registers over all steps: a step loads a row of B's panel and broadcasts kRows
// elements of A, so both may have any strides but the innermost of B. What a sum is made of, and in which order, depends
// on the steps alone, not on the rows or columns beside it: that keeps a token's result from depending on the batch.
//
// An element is one fp32 number, or, where the processor multiplies bf16, a pair of bf16 numbers that follow each other
// along the summed dimension; a pair's products are added one after the other, unrounded before the addition. Where it
// does not, B may still lie in 16 bits, for half the memory to read.
#pragma once

#include "../simd.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

constexpr int kRows = 6;
// As many as fill the registers together with an operand of each kind.
#if defined(FASTRLHF_CAPABILITY_AVX512)
constexpr int kVectors = 4;
#elif defined(FASTRLHF_CAPABILITY_AVX2)
constexpr int kVectors = 2;
#else
constexpr int kVectors = 1;
#endif
constexpr int kPanel = kVectors * kWidth;
constexpr int kSteps = 512;  // after so many, sums go to memory: 128 KiB of a panel stay in L2 for the next rows

struct Single {
  using Element = float;  // of B
  using Left = float;     // of A
  using Operand = Vec;
  static constexpr int kDepth = 1;  // numbers in an element
  FASTRLHF_INLINE Operand broadcast(const Element* from) { return Vec(*from); }
  FASTRLHF_INLINE Operand load_operand(const Element* from) { return load(from); }
  FASTRLHF_INLINE Vec add(Operand a, Operand b, Vec sum) { return fma(a, b, sum); }
};

template <class T>
struct Widened {
  using Element = T;
  using Left = float;
  using Operand = Vec;
  static constexpr int kDepth = 1;
  FASTRLHF_INLINE Operand broadcast(const Left* from) { return Vec(*from); }
  FASTRLHF_INLINE Operand load_operand(const Element* from) { return load(from); }
  FASTRLHF_INLINE Vec add(Operand a, Operand b, Vec sum) { return fma(a, b, sum); }
};

#if defined(FASTRLHF_CAPABILITY_AVX512_BF16)
struct Pair {
  using Element = uint32_t;  // the first of the two in the lower bits
  using Left = uint32_t;
  using Operand = __m512i;
  static constexpr int kDepth = 2;
  FASTRLHF_INLINE Operand broadcast(const Element* from) { return _mm512_set1_epi32(static_cast<int>(*from)); }
  FASTRLHF_INLINE Operand load_operand(const Element* from) { return _mm512_loadu_si512(from); }
  FASTRLHF_INLINE Vec add(Operand a, Operand b, Vec sum) {
    return _mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Memory that will be needed next, asked for while the processor multiplies: at each step, a line of `block`s of kRows.
struct Ahead {
  const char* at = nullptr;
  int64_t step = 0, block = 0;  // in bytes
  int64_t blocks = 0;           // those after these ask for nothing
};

// Element (r, s) of A is a[r a_row + s a_step], row s of B begins at b[s b_step]. Adds to C, or overwrites it. `next`, if
// not null, lies like C and is what comes after it.
template <class P>
struct Product {
  const typename P::Left* a;
  int64_t a_row, a_step;
  const typename P::Element* b;
  int64_t b_step, steps;
  float* c;
  int64_t c_row;
  bool adds;
  Ahead ahead = {};
  const float* next = nullptr;
};

template <class P, int kCount>
void multiply_block(const Product<P>& x, int64_t row, int64_t first, int64_t steps, bool adds) {
  Vec sums[kCount][kVectors];
  for (int r = 0; r < kCount; ++r)
    for (int j = 0; j < kVectors; ++j) sums[r][j] = Vec(0.0f);
  const auto* a = x.a + row * x.a_row + first * x.a_step;
  const auto* b = x.b + first * x.b_step;
  const int64_t a_row = x.a_row, a_step = x.a_step, b_step = x.b_step;
  const bool asks = row / kRows < x.ahead.blocks;
  const int64_t ahead_step = asks ? x.ahead.step : 0;
  const char* ahead = reinterpret_cast<const char*>(a);  // there already
  if (asks) ahead = x.ahead.at + row / kRows * x.ahead.block + first * x.ahead.step;
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += b_step, ahead += ahead_step) {
    __builtin_prefetch(ahead, 0, 2);
    typename P::Operand panel[kVectors];
    for (int j = 0; j < kVectors; ++j) panel[j] = P::load_operand(b + j * kWidth);
    for (int r = 0; r < kCount; ++r) {
      const auto one = P::broadcast(a + r * a_row);
      for (int j = 0; j < kVectors; ++j) sums[r][j] = P::add(one, panel[j], sums[r][j]);
    }
  }
  if (x.next != nullptr)
    for (int r = 0; r < kCount; ++r)
      for (int j = 0; j < kPanel; j += 16) __builtin_prefetch(x.next + (row + r) * x.c_row + j, 1, 2);
  for (int r = 0; r < kCount; ++r)
    for (int j = 0; j < kVectors; ++j) {
      float* to = x.c + (row + r) * x.c_row + j * kWidth;
      store(to, adds ? load(to) + sums[r][j] : sums[r][j]);
    }
}

template <class P>
void multiply(const Product<P>& x, int64_t rows) {
  static_assert(kRows == 6, "the rest of the rows has its cases below");
  for (int64_t first = 0; first < x.steps; first += kSteps) {
    const int64_t steps = x.steps - first < kSteps ? x.steps - first : kSteps;
    const bool adds = x.adds || first > 0;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) multiply_block<P, kRows>(x, row, first, steps, adds);
    switch (rows - row) {
      case 5:
        multiply_block<P, 5>(x, row, first, steps, adds);
        break;
      case 4:
        multiply_block<P, 4>(x, row, first, steps, adds);
        break;
      case 3:
        multiply_block<P, 3>(x, row, first, steps, adds);
        break;
      case 2:
        multiply_block<P, 2>(x, row, first, steps, adds);
        break;
      case 1:
        multiply_block<P, 1>(x, row, first, steps, adds);
        break;
    }
  }
}

}  // namespace
}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
