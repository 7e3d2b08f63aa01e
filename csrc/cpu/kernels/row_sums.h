// sum 2^t and sum t 2^t over a row of logits, t = (x - m) log2(e) / T, in one read. See log_probs.cpp.
#pragma once

#include <math.h>

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

constexpr int64_t kBlock = 2048;  // elements; 8 KiB of fp32 stay in L1 for the rare second look
constexpr int64_t kFirst = 64;    // elements that the first m is the maximum of
constexpr float kTooLarge = 65536.0f;    // a block's sum from which on the digits of u / s would suffer
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2e = 1.44269504088896340736;

// log2(e) / T as the kernels multiply with it. Its rounding is a change of T by 3e-8, which whoever leaves the domain of
// powers of two takes back by dividing by it (log_sum).
FASTRLHF_INLINE float scale_for(float temperature) { return static_cast<float>(kLog2e / temperature); }

struct RowSums {
  float m;
  double s, u;
};

// ln s, at the temperature that was asked for.
FASTRLHF_INLINE double log_sum(const RowSums& row, float scale, float temperature) {
  return log2(row.s) / scale / temperature;
}

struct BlockSums {
  float s, u;
};

template <bool kEntropy>
FASTRLHF_INLINE void add_powers(Vec x, Vec m, Vec scale, Vec& s, Vec& u) {
  const Power p = exp2_held((x - m) * scale);
  s = fma(p.whole, p.part, s);
  if (kEntropy) u = fma(product(p), p.held, u);  // held, because 0 times -inf would be a nan
}

template <class T, bool kEntropy>
BlockSums sum_block(const T* x, int64_t n, float origin, float factor) {
  const Vec m(origin), scale(factor), zero(0.0f);
  Vec s[4] = {zero, zero, zero, zero}, u[4] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; k += 2) {
      Vec a, b;
      load_pair(x + i + k * kWidth, a, b);
      add_powers<kEntropy>(a, m, scale, s[k], u[k]);
      add_powers<kEntropy>(b, m, scale, s[k + 1], u[k + 1]);
    }
  for (; i < n; i += kWidth) {
    const int rest = n - i < kWidth ? static_cast<int>(n - i) : kWidth;
    add_powers<kEntropy>(load_first(x + i, rest, -INFINITY), m, scale, s[0], u[0]);
  }
  return {sum((s[0] + s[1]) + (s[2] + s[3])), kEntropy ? sum((u[0] + u[1]) + (u[2] + u[3])) : 0.0f};
}

template <class T>
float largest_of(const T* x, int64_t n) {
  Vec top(-INFINITY);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) top = larger(load(x + i), top);
  if (i < n) top = larger(load_first(x + i, static_cast<int>(n - i), -INFINITY), top);
  return largest(top);
}

FASTRLHF_INLINE float larger_of(float a, float b) { return a > b ? a : b; }

// The maximum of the first elements; in a row that begins with -inf, of all, which takes a read more.
template <class T>
FASTRLHF_INLINE float first_m(const T* x, int64_t n) {
  const float m = largest_of(x, n < kFirst ? n : kFirst);
  return m == -INFINITY ? largest_of(x, n) : m;
}

template <class T, bool kEntropy>
RowSums sum_row(const T* x, int64_t n, float scale) {
  RowSums row = {first_m(x, n), 0.0, 0.0};
  if (row.m == -INFINITY) row.s = NAN;  // nothing but -inf: there is no distribution
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t length = n - i < kBlock ? n - i : kBlock;
    BlockSums block = sum_block<T, kEntropy>(x + i, length, row.m, scale);
    if (!(block.s < kTooLarge)) {
      const float top = largest_of(x + i, length);
      if (top > row.m) {  // unlike where a nan made the sum one
        const double delta = (static_cast<double>(row.m) - top) * scale, factor = exp2(delta);
        row.u = factor == 0.0 ? 0.0 : factor * (row.u + delta * row.s);
        row.s *= factor;
        row.m = top;
        block = sum_block<T, kEntropy>(x + i, length, row.m, scale);
      }
    }
    row.s += block.s;
    row.u += block.u;
  }
  return row;
}

}  // namespace
}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
