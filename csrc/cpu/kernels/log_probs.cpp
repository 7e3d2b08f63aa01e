// Log-probability, entropy and logsumexp of a row of logits in one read of it, and the row's gradient.
//
// Forward: with t = (x - m) log2(e) / T, lanes collect s = sum 2^t and u = sum t 2^t, so that
//
//   logsumexp = m/T + ln s,    log p(y) = x_y/T - logsumexp,    H = (log2 s - u / s) ln2.
//
// m need not be the maximum, which nobody looks for: floats lose nothing while the sums stay far from their range. It is
// taken from the first few elements, and a block of the row is summed again with a larger m only where its sum says that
// some t ran far ahead. Blocks are added up in double.
//
// Backward: p = 2^((x/T - logsumexp) log2(e)). In a row whose logsumexp is so large that its rounding would show in p, it
// is computed again.

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

template <class T, bool kEntropy>
void forward(const LogProbArgs& a, int64_t begin, int64_t end) {
  const float scale = scale_for(a.temperature);
  for (int64_t row = begin; row < end; ++row) {
    double log_prob = 0.0, entropy = 0.0, logsumexp = 0.0;
    if (a.tokens[row] != kIgnored) {
      const T* x = static_cast<const T*>(a.logits) + a.row_offset[row];
      const RowSums sums = sum_row<T, kEntropy>(x, a.vocabulary, scale);
      logsumexp = logsumexp_of(sums, scale) / a.temperature;
      log_prob = static_cast<double>(read_one(x + a.tokens[row])) / a.temperature - logsumexp;
      entropy = kLn2 * (log2(sums.s) - sums.u / sums.s);
      // Where one token has all the probability: rounding, and what is left of impossible tokens, 2^-126 each.
      if (entropy < 1e-30) entropy = 0.0;
    }
    a.log_probs[row] = static_cast<float>(log_prob);
    a.logsumexp[row] = static_cast<float>(logsumexp);
    if (kEntropy) a.entropy[row] = static_cast<float>(entropy);
  }
}

constexpr float kRoundingShows = 64.0f;  // |logsumexp| beyond which half an ulp, and so the error of p, is above 4e-6

// What one row's gradient is made of: dz = one_hot a - p (a + b (log2 p + H)), with a = g/T, b = h ln2 / T and H in bits.
struct RowGradient {
  float pivot, scale, shift;  // log2 p = (x - pivot) scale - shift
  float a, b, entropy;
};

template <bool kEntropy>
FASTRLHF_INLINE Vec minus_p_times(Vec x, const RowGradient& r) {
  const Vec log_p = fma(x - Vec(r.pivot), Vec(r.scale), Vec(-r.shift));
  const Power power = exp2_held(log_p);
  const Vec p = product_or_zero(power, log_p);
  if (!kEntropy) return p * Vec(-r.a);
  return p * fma(Vec(-r.b), power.held + Vec(r.entropy), Vec(-r.a));  // held: 0 times -inf would be a nan
}

template <class T, bool kEntropy>
void row_gradient(const T* x, T* out, int64_t n, int64_t token, const RowGradient& r) {
  const float at_token = first(minus_p_times<kEntropy>(Vec(read_one(x + token)), r));
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
  store_first(out + token, Vec(at_token + r.a), 1);  // from fp32, not from the rounded -p
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
    RowGradient r = {0.0f, scale, 0.0f, g / a.temperature, 0.0f, 0.0f};
    normaliser(x, a.vocabulary, a.temperature, a.logsumexp[row], kRoundingShows, r.pivot, r.shift);
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
