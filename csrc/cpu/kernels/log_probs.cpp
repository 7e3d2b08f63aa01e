// Log-probability, entropy and logsumexp of a row of logits in one read of it, and the row's gradient.
//
// Forward: the row goes by in blocks. Within a block, lanes collect s = sum exp2(t) and u = sum t exp2(t) with
// t = (x - m) log2(e) / T, where m is a recent maximum, not necessarily the latest: as long as no t is above 1 nothing
// loses precision, so a block is summed again with a new m only when its maximum ran that far ahead. That is rare after
// the first block, and saves the pass that looks for the maximum. Blocks are added up in double.
//
//   log p(y) = (x_y - m)/T - log s,    H = log s - ln2 u / s,    logsumexp = m/T + log s.
//
// Backward: p = exp(x/T - logsumexp). In a row whose logsumexp is so large that its rounding would show in p, m and s
// are computed again.

#include <math.h>

#include "../kernels.h"
#include "../simd.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

constexpr int64_t kBlock = 2048;  // elements; 8 KiB of fp32 stay in L1 for the rare second look
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2e = 1.44269504088896340736;
constexpr float kRoundingShows = 64.0f;  // |logsumexp| beyond which half an ulp is above 4e-6

struct RowSums {
  float shift;  // m
  double s, u;
};

struct BlockSums {
  float s, u, largest;
};

template <bool kEntropy>
FASTRLHF_INLINE void add(Vec x, Vec shift, Vec scale, Vec& s, Vec& u, Vec& top) {
  top = larger(x, top);
  const Vec t = larger(Vec(-150.0f), (x - shift) * scale);  // -inf would make t exp2(t) a nan
  const Vec e = exp2_nonpositive(t);
  s = s + e;
  if (kEntropy) u = fma(e, t, u);
}

template <class T, bool kEntropy>
BlockSums sum_block(const T* x, int64_t n, float shift, float scale) {
  const Vec m(shift), c(scale), zero(0.0f);
  Vec s[4] = {zero, zero, zero, zero}, u[4] = {zero, zero, zero, zero};
  Vec top[4] = {Vec(-INFINITY), Vec(-INFINITY), Vec(-INFINITY), Vec(-INFINITY)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) add<kEntropy>(load(x + i + k * kWidth), m, c, s[k], u[k], top[k]);
  for (; i < n; i += kWidth) {
    const int rest = n - i < kWidth ? static_cast<int>(n - i) : kWidth;
    add<kEntropy>(load_first(x + i, rest, -INFINITY), m, c, s[0], u[0], top[0]);
  }
  const Vec high = larger(larger(top[0], top[1]), larger(top[2], top[3]));
  return {sum((s[0] + s[1]) + (s[2] + s[3])), kEntropy ? sum((u[0] + u[1]) + (u[2] + u[3])) : 0.0f, largest(high)};
}

template <class T>
float largest_of(const T* x, int64_t n) {
  Vec top(-INFINITY);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) top = larger(load(x + i), top);
  if (i < n) top = larger(load_first(x + i, static_cast<int>(n - i), -INFINITY), top);
  return largest(top);
}

template <class T, bool kEntropy>
RowSums sum_row(const T* x, int64_t n, float scale) {
  RowSums row = {largest_of(x, n < kBlock ? n : kBlock), 0.0, 0.0};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t length = n - i < kBlock ? n - i : kBlock;
    // While all was -inf, any finite shift gives the zeros that are due, and lets a nan through.
    BlockSums block = sum_block<T, kEntropy>(x + i, length, row.shift == -INFINITY ? 0.0f : row.shift, scale);
    if ((block.largest - row.shift) * scale > 1.0f) {
      if (row.shift != -INFINITY) {
        const double delta = (static_cast<double>(row.shift) - block.largest) * scale, factor = exp2(delta);
        row.u = factor == 0.0 ? 0.0 : factor * (row.u + delta * row.s);
        row.s *= factor;
      }
      row.shift = block.largest;
      block = sum_block<T, kEntropy>(x + i, length, row.shift, scale);
    }
    row.s += block.s;
    row.u += block.u;
  }
  return row;
}

template <class T>
FASTRLHF_INLINE float read_one(const T* x) {
  return first(load_first(x, 1, 0.0f));
}

template <class T, bool kEntropy>
void forward(const LogProbArgs& a, int64_t begin, int64_t end) {
  const float scale = static_cast<float>(kLog2e / a.temperature);
  for (int64_t row = begin; row < end; ++row) {
    double log_prob = 0.0, entropy = 0.0, logsumexp = 0.0;
    if (a.tokens[row] != kIgnored) {
      const T* x = static_cast<const T*>(a.logits) + a.row_offset[row];
      const RowSums sums = sum_row<T, kEntropy>(x, a.vocabulary, scale);
      const double log_s = log(sums.s);
      log_prob = (static_cast<double>(read_one(x + a.tokens[row])) - sums.shift) / a.temperature - log_s;
      logsumexp = static_cast<double>(sums.shift) / a.temperature + log_s;
      entropy = log_s - kLn2 * sums.u / sums.s;
      if (entropy < 0.0) entropy = 0.0;  // rounding, where one token has all the probability
    }
    a.log_probs[row] = static_cast<float>(log_prob);
    a.logsumexp[row] = static_cast<float>(logsumexp);
    if (kEntropy) a.entropy[row] = static_cast<float>(entropy);
  }
}

// What one row's gradient is made of: dz = one_hot a - p (a + b (log p + H)), with a = g/T and b = h/T.
struct RowGradient {
  float shift, inverse_temperature, log_s;  // log p = (x - shift)/T - log_s
  float a, b, entropy;
};

template <bool kEntropy>
FASTRLHF_INLINE Vec minus_p_times(Vec x, const RowGradient& r) {
  Vec log_p = fma(x - Vec(r.shift), Vec(r.inverse_temperature), Vec(-r.log_s));
  if (kEntropy) log_p = larger(Vec(-104.0f), log_p);  // p is 0 there, and 0 times -inf would be a nan
  const Vec p = exp2_nonpositive(log_p * Vec(static_cast<float>(kLog2e)));
  return p * (kEntropy ? fma(Vec(-r.b), log_p + Vec(r.entropy), Vec(-r.a)) : Vec(-r.a));
}

template <class T, bool kEntropy>
void row_gradient(const T* x, T* out, int64_t n, int64_t token, const RowGradient& r) {
  const float at_token = first(minus_p_times<kEntropy>(Vec(read_one(x + token)), r));
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    Vec dz[4];
    for (int k = 0; k < 4; ++k) dz[k] = minus_p_times<kEntropy>(load(x + i + k * kWidth), r);
    for (int k = 0; k < 4; ++k) store(out + i + k * kWidth, dz[k]);
  }
  for (; i < n; i += kWidth) {
    const int rest = n - i < kWidth ? static_cast<int>(n - i) : kWidth;
    store_first(out + i, minus_p_times<kEntropy>(load_first(x + i, rest, -INFINITY), r), rest);
  }
  store_first(out + token, Vec(at_token + r.a), 1);  // from fp32, not from the rounded -p
}

template <class T, bool kEntropy>
void backward(const LogProbGradArgs& a, int64_t begin, int64_t end) {
  const float scale = static_cast<float>(kLog2e / a.temperature);
  for (int64_t row = begin; row < end; ++row) {
    T* out = static_cast<T*>(a.grad_logits) + a.grad_row_offset[row];
    const float g = a.grad_log_probs[row], h = kEntropy ? a.grad_entropy[row] : 0.0f;
    if (a.tokens[row] == kIgnored || (g == 0.0f && h == 0.0f)) {
      memset(out, 0, a.vocabulary * sizeof(T));  // not even read: a row that does not count may hold anything
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + a.row_offset[row];
    RowGradient r = {0.0f, 1.0f / a.temperature, a.logsumexp[row], g / a.temperature, h / a.temperature, 0.0f};
    if (kEntropy) r.entropy = a.entropy[row];
    if (fabsf(r.log_s) > kRoundingShows) {
      const RowSums sums = sum_row<T, false>(x, a.vocabulary, scale);
      r.shift = sums.shift;
      r.log_s = static_cast<float>(log(sums.s));
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
