// Linear layers of few rows, as decoding has them: bound by reading the weight, or a little later by the products.
//
// A weight lies in panels of kPackedRows of its rows, element after element along K: what a step of product.h loads lies
// together, and a panel is one stream through memory. The rows of x are broadcast. Each of a row's sums runs over K in
// order, alone: it has the same bits in every batch.

#include <math.h>

#include "../kernels.h"
#include "../simd.h"
#include "activations.h"
#include "buffer.h"
#include "product.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

constexpr int64_t kRowBlock = 8 * kRows;  // whose results stay in L1 until they are finished
constexpr int64_t kSubPanels = kPackedRows / kPanel;

static_assert(kPackedRows % kPanel == 0, "a panel is made of those of product.h");

FASTRLHF_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of A, a little more than K apart: 2^k apart they would fight for the same lines of the caches.
template <class P>
FASTRLHF_INLINE int64_t depth_of(int64_t columns) {
  return (columns + P::kDepth - 1) / P::kDepth;
}
template <class P>
FASTRLHF_INLINE int64_t left_stride(int64_t columns) {
  return depth_of<P>(columns) + 16;
}

// ------------------------------------------------------------------------------------------------------------- packing


template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

template <class T, class E>
void convert_row(const T* from, int64_t n, E* to) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int count = static_cast<int>(smaller_of(kWidth, n - i));
    store_first(to + i, load_first(from + i, count, 0.0f), count);
  }
}
template <class T>
void convert_row(const T* from, int64_t n, T* to) {
  memcpy(to, from, n * sizeof(T));
}

// to[s * kPanel + r] = from[r * stride + s], for the kPanel rows of a panel.
template <class U>
void transpose(const U* from, int64_t stride, int64_t steps, U* to) {
#if defined(FASTRLHF_CAPABILITY_AVX512)
  if (sizeof(U) == 4) {
    // Few rows at a time: the processor follows no more than that many streams ahead.
    for (int r = 0; r < kPanel; r += 16)
      for (int64_t s = 0; s + 16 <= steps; s += 16)
        transpose_16(from + r * stride + s, stride, to + s * kPanel + r, kPanel);
    for (int64_t s = steps / 16 * 16; s < steps; ++s)
      for (int r = 0; r < kPanel; ++r) to[s * kPanel + r] = from[r * stride + s];
    return;
  }
#endif
  for (int64_t s = 0; s < steps; ++s)
    for (int r = 0; r < kPanel; ++r) to[s * kPanel + r] = from[r * stride + s];
}

// E: what is stored of a number. U: as wide as an element.
template <class P, class T, class E, class U>
void pack(const PackArgs& a, int64_t begin, int64_t end) {
  const int64_t depth = depth_of<P>(a.columns), stride = depth * P::kDepth + 32;
  Buffer<E> rows(kPanel * stride);
  memset(rows.data(), 0, kPanel * stride * sizeof(E));
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t sub = 0; sub < kSubPanels; ++sub) {
      const int64_t first_row = panel * kPackedRows + sub * kPanel;
      E* to = static_cast<E*>(a.packed) + (a.first + panel * a.step) * a.panel_size + sub * depth * P::kDepth * kPanel;
      const T* from = static_cast<const T*>(a.weight) + first_row * a.weight_stride;
      if (Same<T, E>::value && first_row + kPanel <= a.rows && a.columns % P::kDepth == 0 &&
          a.weight_stride % P::kDepth == 0) {
        transpose(reinterpret_cast<const U*>(from), a.weight_stride / P::kDepth, depth, reinterpret_cast<U*>(to));
        continue;
      }
      for (int64_t r = 0; r < kPanel; ++r) {
        E* row = rows.data() + r * stride;
        if (first_row + r < a.rows)
          convert_row(from + r * a.weight_stride, a.columns, row);
        else
          memset(row, 0, a.columns * sizeof(E));
      }
      transpose(reinterpret_cast<const U*>(rows.data()), stride / P::kDepth, depth, reinterpret_cast<U*>(to));
    }
}

template <class P, class E, class U>
void pack_from(const PackArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == kFloat32) return pack<P, float, E, U>(a, begin, end);
  if (a.dtype == kBFloat16) return pack<P, bf16, E, U>(a, begin, end);
  return pack<P, fp16, E, U>(a, begin, end);
}

// ------------------------------------------------------------------------------------------------------------ rows of x

template <class P>
FASTRLHF_INLINE void store_left(float* to, int64_t i, Vec x, int count) {
  store_first(to + i, x, count);
}
#if defined(FASTRLHF_CAPABILITY_AVX512_BF16)
template <class P>
FASTRLHF_INLINE void store_left(uint32_t* to, int64_t i, Vec x, int count) {
  store_first(reinterpret_cast<bf16*>(to) + i, x, count);
}
#endif

template <class P>
void rows_of(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  const int64_t n = a.columns;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + row * a.x_stride;
    auto* to = static_cast<typename P::Left*>(a.left) + row * left_stride<P>(n);
    if (P::kDepth > 1) memset(to + n / P::kDepth, 0, sizeof *to);
    float mean = 0.0f, rstd = 1.0f;
    if (a.norm == kLayerNorm) {
      Vec total(0.0f);
      for (int64_t i = 0; i < n; i += kWidth)
        total = total + load_first(x + i, static_cast<int>(smaller_of(kWidth, n - i)), 0.0f);
      mean = sum(total) / static_cast<float>(n);
    }
    if (a.norm != kNoNorm) {
      Vec squares(0.0f);
      for (int64_t i = 0; i < n; i += kWidth) {
        const Vec d = load_first(x + i, static_cast<int>(smaller_of(kWidth, n - i)), mean) - Vec(mean);
        squares = fma(d, d, squares);
      }
      rstd = static_cast<float>(1.0 / sqrt(static_cast<double>(sum(squares)) / n + a.eps));
    }
    for (int64_t i = 0; i < n; i += kWidth) {
      const int count = static_cast<int>(smaller_of(kWidth, n - i));
      Vec v = load_first(x + i, count, 0.0f);
      if (a.norm != kNoNorm) {
        v = (v - Vec(mean)) * Vec(rstd);
        if (a.norm_weight != nullptr) v = v * load_first(a.norm_weight + i, count, 0.0f);
        if (a.norm_bias != nullptr) v = v + load_first(a.norm_bias + i, count, 0.0f);
      }
      store_left<P>(to, i, v, count);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- the product

// Rows first .. first + rows of x times a panel, into c[rows][kPackedRows].
template <class P>
void multiply_panel(const PackedLinearArgs& a, int64_t panel, int64_t first, int64_t rows, float* c) {
  const int64_t depth = depth_of<P>(a.columns), stride = left_stride<P>(a.columns);
  const auto* left = static_cast<const typename P::Left*>(a.left) + first * stride;
  const auto* weight =
      static_cast<const typename P::Element*>(a.packed) + panel * (a.panel_size / P::kDepth);
  for (int64_t sub = 0; sub < kSubPanels; ++sub)
    multiply<P>({left, stride, 1, weight + sub * depth * kPanel, kPanel, depth, c + sub * kPanel, kPackedRows, false}, rows);
}

template <class P>
void linear(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  Buffer<float> sums(2 * kRowBlock * kPackedRows);
  float *c = sums.data(), *up = c + kRowBlock * kPackedRows;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * kPackedRows, columns = smaller_of(kPackedRows, a.width - column);
    for (int64_t first = 0; first < a.rows; first += kRowBlock) {
      const int64_t rows = smaller_of(kRowBlock, a.rows - first);
      multiply_panel<P>(a, a.gated ? 2 * panel : panel, first, rows, c);
      if (a.gated) multiply_panel<P>(a, 2 * panel + 1, first, rows, up);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < columns; j += kWidth) {
          const int count = static_cast<int>(smaller_of(kWidth, columns - j));
          const auto biased = [&](const float* from, int64_t shift) {
            const Vec x = load(from + r * kPackedRows + j);
            return a.bias == nullptr ? x : x + load_first(a.bias + shift + column + j, count, 0.0f);
          };
          Vec y = activated(biased(c, 0), a.activation);
          if (a.gated) y = y * biased(up, a.width);
          float* to = a.out + (first + r) * a.out_stride + column + j;
          if (a.adds) y = load_first(to, count, 0.0f) + y;
          store_first(to, y, count);
        }
    }
  }
}

#if defined(FASTRLHF_CAPABILITY_AVX512_BF16)
using OfBf16 = Pair;
using BitsOfBf16 = uint32_t;
#else
using OfBf16 = Widened<bf16>;
using BitsOfBf16 = uint16_t;
#endif

}  // namespace

void pack_weight(const PackArgs& a, int64_t begin, int64_t end) {
  if (a.packed_dtype == kFloat32) return pack_from<Single, float, uint32_t>(a, begin, end);
  if (a.packed_dtype == kBFloat16) return pack_from<OfBf16, bf16, BitsOfBf16>(a, begin, end);
  return pack_from<Widened<fp16>, fp16, uint16_t>(a, begin, end);
}

void packed_rows(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  return a.dtype == kBFloat16 ? rows_of<OfBf16>(a, begin, end) : rows_of<Single>(a, begin, end);
}

void packed_linear(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == kFloat32) return linear<Single>(a, begin, end);
  if (a.dtype == kBFloat16) return linear<OfBf16>(a, begin, end);
  return linear<Widened<fp16>>(a, begin, end);
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
