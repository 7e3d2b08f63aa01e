// What stands between the matrix products of a decoder layer: RMS norm, SwiGLU, rotary embedding, and their gradients.
// Everything is computed in fp32 and rounded once.

#include <math.h>

#include "activations.h"
#include "tables.h"
#include "units.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

template <class T>
float sum_of_squares(const T* x, int64_t n) {
  Vec s[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) {
      const Vec a = load(x + i + k * kWidth);
      s[k] = fma(a, a, s[k]);
    }
  for_each_vector(i, n, [&](int64_t j, int count) __attribute__((always_inline)) {
    const Vec a = load_first(x + j, count, 0.0f);
    s[0] = fma(a, a, s[0]);
  });
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

template <class T>
void normalise(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t n = a.columns;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * n;
    T* y = static_cast<T*>(a.y) + row * n;
    const auto rstd = static_cast<float>(1.0 / sqrt(static_cast<double>(sum_of_squares(x, n)) / n + a.eps));
    a.rstd[row] = rstd;
    const Vec scale(rstd);
    for_each_vector(0, n, [&](int64_t i, int count) __attribute__((always_inline)) {
      store_first(y + i, load_first(x + i, count, 0.0f) * scale * load_first(weight + i, count, 0.0f), count);
    });
  }
}

// dx = r (g w - x r^2 mean(g w x)), dw = sum over rows of g x r, here over those of a block.
template <class T>
void normalise_backward(const RmsNormGradArgs& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t n = a.columns;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kNormRows, stop = first + kNormRows < a.rows ? first + kNormRows : a.rows;
    float* dw = a.grad_weight == nullptr ? nullptr : a.grad_weight + block * n;
    if (dw != nullptr) memset(dw, 0, n * sizeof(float));
    for (int64_t row = first; row < stop; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * n;
      const T* g = static_cast<const T*>(a.grad) + row * n;
      const Vec rstd(a.rstd[row]);
      Vec along(0.0f);
      for_each_vector(0, n, [&](int64_t i, int count) __attribute__((always_inline)) {
        const Vec gx = load_first(g + i, count, 0.0f) * load_first(x + i, count, 0.0f);
        along = fma(gx, load_first(weight + i, count, 0.0f), along);
        if (dw != nullptr) store_first(dw + i, fma(gx, rstd, load_first(dw + i, count, 0.0f)), count);
      });
      if (a.grad_x == nullptr) continue;
      T* dx = static_cast<T*>(a.grad_x) + row * n;
      const Vec back(sum(along) / static_cast<float>(n) * a.rstd[row] * a.rstd[row]);
      for_each_vector(0, n, [&](int64_t i, int count) __attribute__((always_inline)) {
        const Vec gw = load_first(g + i, count, 0.0f) * load_first(weight + i, count, 0.0f);
        store_first(dx + i, rstd * (gw - load_first(x + i, count, 0.0f) * back), count);
      });
    }
  }
}

FASTRLHF_INLINE Vec sigmoid(Vec x) { return Vec(1.0f) / (Vec(1.0f) + exp_of(-x)); }

template <class T>
void gate_rows(const SwigluArgs& a, int64_t begin, int64_t end) {
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  T* y = static_cast<T*>(a.y);
  for_each_vector(begin, end, [&](int64_t i, int n) __attribute__((always_inline)) {
    store_first(y + i, silu(load_first(gate + i, n, 0.0f)) * load_first(up + i, n, 0.0f), n);
  });
}

// With s = sigmoid(gate): d up = g gate s, d gate = g up s (1 + gate (1 - s)).
template <class T>
void gate_rows_backward(const SwigluGradArgs& a, int64_t begin, int64_t end) {
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up), *g = static_cast<const T*>(a.grad);
  T *grad_gate = static_cast<T*>(a.grad_gate), *grad_up = static_cast<T*>(a.grad_up);
  const Vec one(1.0f);
  for_each_vector(begin, end, [&](int64_t i, int n) __attribute__((always_inline)) {
    const Vec x = load_first(gate + i, n, 0.0f), gs = load_first(g + i, n, 0.0f), s = sigmoid(x);
    store_first(grad_gate + i, gs * load_first(up + i, n, 0.0f) * s * fma(x, one - s, one), n);
    store_first(grad_up + i, gs * x * s, n);
  });
}

// Back, the rotation's transpose: the sines of the two halves change places and signs.
template <class T>
void rotate_rows(const RotateArgs& a, int64_t begin, int64_t end) {
  const int64_t half = a.head_dim / 2;
  const float sign = a.back ? -1.0f : 1.0f;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t sequence = token / a.length, position = token % a.length;
    const int64_t angle = sequence * a.angle_stride + position * a.head_dim;
    const float *cosine = a.cos + angle, *sine = a.sin + angle;
    const float *low_sine = a.back ? sine + half : sine, *high_sine = a.back ? sine : sine + half;
    const T* x = static_cast<const T*>(a.x) + sequence * a.sequence_stride + position * a.position_stride;
    T* y = static_cast<T*>(a.y) + token * a.heads * a.head_dim;
    for (int64_t head = 0; head < a.heads; ++head, x += a.head_stride, y += a.head_dim)
      for_each_vector(0, half, [&](int64_t i, int n) __attribute__((always_inline)) {
        const Vec low = load_first(x + i, n, 0.0f), high = load_first(x + half + i, n, 0.0f);
        const Vec from_high = load_first(low_sine + i, n, 0.0f) * Vec(-sign);
        const Vec from_low = load_first(high_sine + i, n, 0.0f) * Vec(sign);
        store_first(y + i, fma(low, load_first(cosine + i, n, 0.0f), high * from_high), n);
        store_first(y + half + i, fma(high, load_first(cosine + half + i, n, 0.0f), low * from_low), n);
      });
  }
}

}  // namespace

#define FASTRLHF_BY_DTYPE(function)                                \
  if (a.dtype == kFloat32) return function<float>(a, begin, end);  \
  if (a.dtype == kBFloat16) return function<bf16>(a, begin, end);  \
  return function<fp16>(a, begin, end);

void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end) { FASTRLHF_BY_DTYPE(normalise) }
void rms_norm_backward(const RmsNormGradArgs& a, int64_t begin, int64_t end) { FASTRLHF_BY_DTYPE(normalise_backward) }
void swiglu(const SwigluArgs& a, int64_t begin, int64_t end) { FASTRLHF_BY_DTYPE(gate_rows) }
void swiglu_backward(const SwigluGradArgs& a, int64_t begin, int64_t end) { FASTRLHF_BY_DTYPE(gate_rows_backward) }
void rotate(const RotateArgs& a, int64_t begin, int64_t end) { FASTRLHF_BY_DTYPE(rotate_rows) }

#undef FASTRLHF_BY_DTYPE

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
