// Log-probability, entropy and normaliser of a row of logits in one read of it, and the row's gradient.
//
// Forward: with t = (x - m) log2(e) / T, lanes collect s = sum 2^t and u = sum t 2^t, so that
//
//   log p(y) = (x_y - m)/T - ln s,    H = (log2 s - u / s) ln2.
//
// m need not be the maximum, which nobody looks for: floats lose nothing while the sums stay far from their range. It is
// taken from the first few elements, and a block of the row is summed again with a larger m only where its sum says that
// some t ran far ahead. Blocks are added up in double.
//
// Backward: p = 2^((x - m) log2(e) / T - log2 s), from the forward pass's m and ln s.

#include <math.h>

#include "../kernels.h"
#include "../simd.h"
#include "row_sums.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

template <class T>
FASTRLHF_INLINE float read_one(const T* x) {
  return first(load_first(x, 1, 0.0f));
}

// -inf for a row of nothing but -inf, nan for one with a nan among them. Both have no distribution, but a shard of the
// vocabulary may well be the first.
template <class T>
float nothing_or_nan(const T* x, int64_t n) {
  Vec total(0.0f);
  for (int64_t i = 0; i < n; i += kWidth)
    total = total + load_first(x + i, n - i < kWidth ? static_cast<int>(n - i) : kWidth, -INFINITY);
  return sum(total);
}

template <class T, bool kEntropy>
void forward(const LogProbArgs& a, int64_t begin, int64_t end) {
  const float scale = scale_for(a.temperature);
  for (int64_t row = begin; row < end; ++row) {
    double log_prob = 0.0, entropy = 0.0;
    float m = 0.0f, log_s = 0.0f;
    if (a.tokens[row] != kIgnored) {
      const T* x = static_cast<const T*>(a.logits) + a.row_offset[row];
      const RowSums sums = sum_row<T, kEntropy>(x, a.vocabulary, scale);
      const double exact = log_sum(sums, scale, a.temperature);
      m = sums.m == -INFINITY ? nothing_or_nan(x, a.vocabulary) : sums.m;
      log_s = static_cast<float>(exact);
      const float at_token = a.tokens[row] == kElsewhere ? NAN : read_one(x + a.tokens[row]);
      log_prob = (static_cast<double>(at_token) - m) / a.temperature - exact;
      entropy = kLn2 * (log2(sums.s) - sums.u / sums.s);
      if (entropy < 0.0) entropy = 0.0;  // rounding, where one token has all the probability
    }
    a.log_probs[row] = static_cast<float>(log_prob);
    a.normaliser[2 * row] = m;
    a.normaliser[2 * row + 1] = log_s;
    if (kEntropy) a.entropy[row] = static_cast<float>(entropy);
  }
}

// What one row's gradient is made of: dz = one_hot a - p (a + b (log2 p + H)), with a = g/T, b = h ln2 / T and H in bits.
struct RowGradient {
  float m, scale, log_s;  // log2 p = (x - m) scale - log_s
  float a, b, entropy;
};

template <bool kEntropy>
FASTRLHF_INLINE Vec minus_p_times(Vec x, const RowGradient& r) {
  const Vec log_p = fma(x - Vec(r.m), Vec(r.scale), Vec(-r.log_s));
  const Power power = exp2_held(log_p);
  const Vec p = product(power);
  if (!kEntropy) return p * Vec(-r.a);
  return p * fma(Vec(-r.b), power.held + Vec(r.entropy), Vec(-r.a));  // held: 0 times -inf would be a nan
}

template <class T, bool kEntropy>
void row_gradient(const T* x, T* out, int64_t n, int64_t token, const RowGradient& r) {
  const bool here = token != kElsewhere;
  const float at_token = here ? first(minus_p_times<kEntropy>(Vec(read_one(x + token)), r)) : 0.0f;
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    Vec dz[4];
    for (int k = 0; k < 4; k += 2) load_pair(x + i + k * kWidth, dz[k], dz[k + 1]);
    for (int k = 0; k < 4; ++k) dz[k] = minus_p_times<kEntropy>(dz[k], r);
    for (int k = 0; k < 4; k += 2) store_pair(out + i + k * kWidth, dz[k], dz[k + 1]);
  }
  for (; i < n; i += kWidth) {
    const int rest = n - i < kWidth ? static_cast<int>(n - i) : kWidth;
    store_first(out + i, minus_p_times<kEntropy>(load_first(x + i, rest, -INFINITY), r), rest);
  }
  if (here) store_first(out + token, Vec(at_token + r.a), 1);  // from fp32, not from the rounded -p
}

template <class T, bool kEntropy>
void backward(const LogProbGradArgs& a, int64_t begin, int64_t end) {
  const float scale = scale_for(a.temperature);
  for (int64_t row = begin; row < end; ++row) {
    T* out = static_cast<T*>(a.grad_logits) + a.grad_row_offset[row];
    const float g = a.grad_log_probs[row], h = kEntropy ? a.grad_entropy[row] : 0.0f;
    if (a.tokens[row] == kIgnored || (g == 0.0f && h == 0.0f)) {
      memset(out, 0, a.vocabulary * sizeof(T));  // not even read: a row that does not count may hold anything
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + a.row_offset[row];
    const float m = a.normaliser[2 * row], log_s = a.normaliser[2 * row + 1];
    RowGradient r = {m, scale, log_s * static_cast<float>(kLog2e), g / a.temperature, 0.0f, 0.0f};
    if (kEntropy) {
      r.b = h * static_cast<float>(kLn2) / a.temperature;
      r.entropy = a.entropy[row] * static_cast<float>(kLog2e);
    }
    row_gradient<T, kEntropy>(x, out, a.vocabulary, a.tokens[row], r);
  }
}

}  // namespace

void log_probs(const LogProbArgs& a, int64_t begin, int64_t end) {
  const bool entropy = a.entropy != nullptr;
  if (a.dtype == kFloat32) return entropy ? forward<float, true>(a, begin, end) : forward<float, false>(a, begin, end);
  if (a.dtype == kBFloat16) return entropy ? forward<bf16, true>(a, begin, end) : forward<bf16, false>(a, begin, end);
  return entropy ? forward<fp16, true>(a, begin, end) : forward<fp16, false>(a, begin, end);
}

void log_probs_backward(const LogProbGradArgs& a, int64_t begin, int64_t end) {
  const bool entropy = a.grad_entropy != nullptr;
  if (a.dtype == kFloat32) return entropy ? backward<float, true>(a, begin, end) : backward<float, false>(a, begin, end);
  if (a.dtype == kBFloat16) return entropy ? backward<bf16, true>(a, begin, end) : backward<bf16, false>(a, begin, end);
  return entropy ? backward<fp16, true>(a, begin, end) : backward<fp16, false>(a, begin, end);
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
