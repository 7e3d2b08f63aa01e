// The exact KL divergence between the distributions of two rows of logits, in one read of both, and its gradients.
//
// With t and r the two rows' exponents of two (row_sums.h), s and q the sums of 2^t and 2^r and w = sum 2^t (t - r),
//
//   KL = (w / s - log2 s + log2 q) ln2,    dz = (g/T) p (log p - log q - KL),    dz_ref = (g/T) (q - p).
//
// w is a mean of differences, not a difference of means: where the rows are close, so are t and r.

#include <math.h>

#include "../kernels.h"
#include "../simd.h"
#include "row_sums.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

// Where a row's exponents are measured from: t = (x - pivot) scale - shift.
struct Origin {
  float pivot, shift;
};

struct PairSums {
  float s, q, w;
};

FASTRLHF_INLINE Vec exponent(Vec x, Origin origin, float scale) {
  return fma(x - Vec(origin.pivot), Vec(scale), Vec(-origin.shift));
}

template <class T, class U>
PairSums sum_pair_block(const T* x, const U* y, int64_t n, Origin ox, Origin oy, float scale) {
  const Vec zero(0.0f);
  Vec s[2] = {zero, zero}, q[2] = {zero, zero}, w[2] = {zero, zero};
  const auto add = [&](Vec a, Vec b, int k) {
    const Vec t = exponent(a, ox, scale), r = exponent(b, oy, scale);
    const Power p = exp2_held(t), q_power = exp2_held(r);
    s[k] = fma(p.whole, p.part, s[k]);
    q[k] = fma(q_power.whole, q_power.part, q[k]);
    // Of tokens that are impossible under the policy not even an infinite r counts.
    w[k] = fma(product(p), select(less(t, Vec(-126.0f)), zero, t - r), w[k]);
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth)
    for (int k = 0; k < 2; ++k) add(load(x + i + k * kWidth), load(y + i + k * kWidth), k);
  for (; i < n; i += kWidth) {
    const int rest = n - i < kWidth ? static_cast<int>(n - i) : kWidth;
    add(load_first(x + i, rest, -INFINITY), load_first(y + i, rest, -INFINITY), 0);
  }
  return {sum(s[0] + s[1]), sum(q[0] + q[1]), sum(w[0] + w[1])};
}

struct KlSums {
  RowSums p, q;
  double w;
};

template <class T, class U>
KlSums sum_pair(const T* x, const U* y, int64_t n, float scale) {
  KlSums row = {{first_m(x, n), 0.0, 0.0}, {first_m(y, n), 0.0, 0.0}, 0.0};
  if (row.p.m == -INFINITY || row.q.m == -INFINITY) row.w = NAN;  // nothing but -inf: there is no distribution
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t length = n - i < kBlock ? n - i : kBlock;
    const auto summed = [&] { return sum_pair_block(x + i, y + i, length, {row.p.m, 0.0f}, {row.q.m, 0.0f}, scale); };
    PairSums block = summed();
    if (!(block.s < kTooLarge && block.q < kTooLarge)) {
      const float top = larger_of(largest_of(x + i, length), row.p.m);
      const float ref_top = larger_of(largest_of(y + i, length), row.q.m);
      const double delta = (static_cast<double>(row.p.m) - top) * scale;
      const double ref_delta = (static_cast<double>(row.q.m) - ref_top) * scale;
      const double factor = exp2(delta);
      row.w = factor == 0.0 ? 0.0 : factor * (row.w + (delta - ref_delta) * row.p.s);
      row.p.s *= factor;
      row.q.s *= exp2(ref_delta);
      row.p.m = top;
      row.q.m = ref_top;
      block = summed();
    }
    row.p.s += block.s;
    row.q.s += block.q;
    row.w += block.w;
  }
  return row;
}

template <class T, class U>
void forward(const FullKlArgs& a, int64_t begin, int64_t end) {
  const float scale = scale_for(a.temperature);
  for (int64_t row = begin; row < end; ++row) {
    double kl = 0.0, log_s = 0.0, ref_log_s = 0.0;
    float m = 0.0f, ref_m = 0.0f;
    if (a.mask == nullptr || a.mask[row] != 0) {
      const T* x = static_cast<const T*>(a.logits) + a.row_offset[row];
      const U* y = static_cast<const U*>(a.ref_logits) + a.ref_row_offset[row];
      const KlSums sums = sum_pair(x, y, a.vocabulary, scale);
      kl = kLn2 * (sums.w / sums.p.s - log2(sums.p.s) + log2(sums.q.s));
      if (kl < 0.0) kl = 0.0;  // rounding
      log_s = log_sum(sums.p, scale, a.temperature);
      ref_log_s = log_sum(sums.q, scale, a.temperature);
      m = sums.p.m;
      ref_m = sums.q.m;
    }
    a.kl[row] = static_cast<float>(kl);
    a.normaliser[2 * row] = m;
    a.normaliser[2 * row + 1] = static_cast<float>(log_s);
    a.ref_normaliser[2 * row] = ref_m;
    a.ref_normaliser[2 * row + 1] = static_cast<float>(ref_log_s);
  }
}

FASTRLHF_INLINE Origin origin_of(const float* normaliser) {
  return {normaliser[0], normaliser[1] * static_cast<float>(kLog2e)};
}

// Either output may be missing.
template <class T, class U>
void pair_gradient(const T* x, const U* y, T* dx, U* dy, int64_t n, Origin ox, Origin oy, float scale, float slope,
                   float kl) {
  const float in_bits = slope * static_cast<float>(kLn2), kl_bits = kl * static_cast<float>(kLog2e);
  for (int64_t i = 0; i < n; i += kWidth) {
    const int rest = n - i < kWidth ? static_cast<int>(n - i) : kWidth;
    const Vec t = exponent(load_first(x + i, rest, -INFINITY), ox, scale);
    const Vec r = exponent(load_first(y + i, rest, -INFINITY), oy, scale);
    const Vec p = product(exp2_held(t));
    if (dx != nullptr) {
      const Vec pull = p * ((t - r) - Vec(kl_bits)) * Vec(in_bits);
      store_first(dx + i, select(less(t, Vec(-126.0f)), Vec(0.0f), pull), rest);
    }
    if (dy != nullptr) store_first(dy + i, (product(exp2_held(r)) - p) * Vec(slope), rest);
  }
}

template <class T, class U>
void backward(const FullKlArgs& a, int64_t begin, int64_t end) {
  const float scale = scale_for(a.temperature);
  const int64_t n = a.vocabulary;
  for (int64_t row = begin; row < end; ++row) {
    T* dx = a.grad_logits == nullptr ? nullptr : static_cast<T*>(a.grad_logits) + row * n;
    U* dy = a.grad_ref_logits == nullptr ? nullptr : static_cast<U*>(a.grad_ref_logits) + row * n;
    if ((a.mask != nullptr && a.mask[row] == 0) || a.grad[row] == 0.0f) {
      if (dx != nullptr) memset(dx, 0, n * sizeof(T));
      if (dy != nullptr) memset(dy, 0, n * sizeof(U));
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + a.row_offset[row];
    const U* y = static_cast<const U*>(a.ref_logits) + a.ref_row_offset[row];
    const Origin ox = origin_of(a.normaliser + 2 * row), oy = origin_of(a.ref_normaliser + 2 * row);
    pair_gradient(x, y, dx, dy, n, ox, oy, scale, a.grad[row] / a.temperature, a.kl[row]);
  }
}

template <class Pointer>
struct ElementOf;
template <class T>
struct ElementOf<T*> {
  using type = T;
};
template <class Pointer>
using Element = typename ElementOf<Pointer>::type;

// Calls f(T, U) with a null pointer of the type of each tensor's elements.
template <class F>
void with_dtypes(const FullKlArgs& a, const F& f) {
  const auto with_ref = [&](auto* x) {
    if (a.ref_dtype == kFloat32) return f(x, static_cast<float*>(nullptr));
    if (a.ref_dtype == kBFloat16) return f(x, static_cast<bf16*>(nullptr));
    return f(x, static_cast<fp16*>(nullptr));
  };
  if (a.dtype == kFloat32) return with_ref(static_cast<float*>(nullptr));
  if (a.dtype == kBFloat16) return with_ref(static_cast<bf16*>(nullptr));
  return with_ref(static_cast<fp16*>(nullptr));
}

}  // namespace

void full_kl(const FullKlArgs& a, int64_t begin, int64_t end) {
  with_dtypes(a, [&](auto* x, auto* y) {
    forward<Element<decltype(x)>, Element<decltype(y)>>(a, begin, end);
  });
}

void full_kl_backward(const FullKlArgs& a, int64_t begin, int64_t end) {
  with_dtypes(a, [&](auto* x, auto* y) {
    backward<Element<decltype(x)>, Element<decltype(y)>>(a, begin, end);
  });
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
