// From hidden states to row statistics of logits, and from there to the gradients of the LM head, tile by tile.
//
// Logits lie with the vocabulary outside and the tokens inside, z[v][n]. That way three of the four matrix products take
// their large operands as they are (weight rows [v][h], logits and their gradient [v][n]); only the hidden states of a
// chunk, which are small, are packed: by_token for z = W x^T, by_hidden for dW = dz x. And a vector holds one logit of
// kWidth tokens, so that statistics and gradients need no sum across lanes.
//
// A tile is some rows of the vocabulary that fit into L2 with all of H. What becomes of its logits happens while they are
// hot. A segment is the kSegment rows whose statistics are added up in fp32; segments are added up in double, by row_of.
//
// The products that sum over tokens or over the vocabulary do so in blocks of fixed length, kTokens and kVocabulary, so
// results depend neither on the threads nor on where chunks begin.

#include <math.h>

#include "../kernels.h"
#include "../simd.h"
#include "activations.h"
#include "buffer.h"
#include "product.h"
#include "row_sums.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

constexpr int64_t kTokens = kLmTokens;
constexpr int64_t kVocabulary = kLmVocabulary;
constexpr int64_t kHiddenBlock = kLmHiddenBlock;
constexpr float kLowest = -3.4028235e38f;

static_assert(kTokens % kLmPadding == 0 && kLmPadding % kPanel == 0, "a block of tokens is made of panels");

// ------------------------------------------------------------------------------------------ into elements of a product

template <class T>
FASTRLHF_INLINE float number(const T* from) {
  return first(load_first(from, 1, 0.0f));
}

// `n` numbers as a row of elements.
template <class P, class T>
struct Convert {
  static void row(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = number(from + i);
  }
  // Two rows, of which the second may be null, as one row of elements that are summed over them; of one number, the first.
  static void rows(const T* a, const T*, int64_t n, float* to) { row(a, n, to); }
  static float element(const T* row, int64_t, int64_t s) { return number(row + s); }
};

#if defined(FASTRLHF_CAPABILITY_AVX512_BF16)
template <>
struct Convert<Pair, bf16> {
  static void row(const bf16* from, int64_t n, uint32_t* to) {
    memcpy(to, from, n * sizeof(bf16));
    if (n % 2) to[n / 2] = from[n - 1].bits;
  }
  static void rows(const bf16* a, const bf16* b, int64_t n, uint32_t* to) {
    if (b == nullptr)
      for (int64_t i = 0; i < n; ++i) to[i] = a[i].bits;
    else
      for (int64_t i = 0; i < n; ++i) to[i] = a[i].bits | static_cast<uint32_t>(b[i].bits) << 16;
  }
  static uint32_t element(const bf16* row, int64_t n, int64_t s) {
    return row[2 * s].bits | (2 * s + 1 < n ? static_cast<uint32_t>(row[2 * s + 1].bits) << 16 : 0u);
  }
};
#endif

template <class P>
FASTRLHF_INLINE int64_t elements(int64_t n) {
  return (n + P::kDepth - 1) / P::kDepth;
}

template <class T>
FASTRLHF_INLINE const T* hidden_row(const LmHeadArgs& a, int64_t token) {
  return token < a.tokens ? static_cast<const T*>(a.hidden) + a.row_offset[token] : nullptr;
}

template <class P, class T>
void pack(const LmHeadArgs& a, int64_t begin, int64_t end) {
  using E = typename P::Element;
  const int64_t depth = elements<P>(a.size), panels = (a.size + kPanel - 1) / kPanel;
  const int64_t token_elements = elements<P>(a.padded);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kLmPadding;
    for (int64_t n = start; n < start + kLmPadding; ++n) {
      E* to = static_cast<E*>(a.by_token) + n / kPanel * kPanel * depth + n % kPanel;
      const T* row = hidden_row<T>(a, n);
      for (int64_t s = 0; s < depth; ++s) to[s * kPanel] = row == nullptr ? E(0) : Convert<P, T>::element(row, a.size, s);
    }
    if (a.by_hidden == nullptr) continue;
    for (int64_t n = start; n < start + kLmPadding; n += P::kDepth)
      for (int64_t p = 0; p < panels; ++p) {
        E* to = static_cast<E*>(a.by_hidden) + (p * token_elements + n / P::kDepth) * kPanel;
        const int64_t columns = a.size - p * kPanel < kPanel ? a.size - p * kPanel : kPanel;
        memset(to, 0, kPanel * sizeof(E));
        const T *row = hidden_row<T>(a, n), *next = hidden_row<T>(a, n + 1);
        if (row == nullptr) continue;
        Convert<P, T>::rows(row + p * kPanel, next == nullptr ? nullptr : next + p * kPanel, columns, to);
      }
  }
}

// -------------------------------------------------------------------------------------------------- logits of a tile

FASTRLHF_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of weight as elements, a little more than H apart: 2^k apart they would fight for the same lines of the caches.
template <class P>
FASTRLHF_INLINE int64_t weight_stride(const LmHeadArgs& a) {
  return elements<P>(a.size) + 16;
}

template <class P, class T>
void load_weight(const LmHeadArgs& a, int64_t v, int64_t rows, typename P::Element* to) {
  for (int64_t r = 0; r < rows; ++r)
    Convert<P, T>::row(static_cast<const T*>(a.weight) + (v + r) * a.weight_stride, a.size, to + r * weight_stride<P>(a));
}

// Logits of a tile, whose weight is packed, for a panel of tokens; with the first panel, asks for the weight of the next.
template <class P, class T>
void multiply_tile(const LmHeadArgs& a, const typename P::Element* weight, int64_t v, int64_t rows, int64_t panel,
                   float* z, int64_t stride) {
  const int64_t depth = elements<P>(a.size);
  const auto* tokens = static_cast<const typename P::Element*>(a.by_token) + panel * kPanel * depth;
  Ahead ahead;
  if (panel == 0 && v + 2 * rows <= a.vocabulary) {
    ahead.at = reinterpret_cast<const char*>(static_cast<const T*>(a.weight) + (v + rows) * a.weight_stride);
    ahead.step = kRows * P::kDepth * sizeof(T);
    ahead.block = kRows * a.weight_stride * sizeof(T);
    ahead.blocks = rows / kRows;
  }
  multiply<P>({weight, weight_stride<P>(a), 1, tokens, kPanel, depth, z, stride, false, ahead}, rows);
}

// Bias and softcap, in place.
template <class T>
void finish_logits(const LmHeadArgs& a, int64_t v, int64_t rows, float* z, int64_t stride) {
  const bool capped = a.softcap < INFINITY;
  if (a.bias == nullptr && !capped) return;
  const Vec cap(a.softcap), inverse(1.0f / a.softcap);
  for (int64_t r = 0; r < rows; ++r) {
    const Vec shift(a.bias == nullptr ? 0.0f : number(static_cast<const T*>(a.bias) + v + r));
    for (int64_t i = 0; i < kPanel; i += kWidth) {
      Vec x = load(z + r * stride + i) + shift;
      if (capped) x = cap * tanh_of(x * inverse);
      store(z + r * stride + i, x);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- statistics

// m, s and u of row_sums.h for each token, in `parts`, which lie `padded` apart. A part without logits is kLowest, 0, 0.
FASTRLHF_INLINE void merge(Vec& m, Vec& s, Vec& u, Vec m2, Vec s2, Vec u2, Vec scale) {
  const Vec top = larger(m, m2);
  const Power one = exp2_held((m - top) * scale), two = exp2_held((m2 - top) * scale);
  const Vec weight = product(one), weight2 = product(two);
  u = fma(fma(one.held, s, u), weight, fma(two.held, s2, u2) * weight2);
  s = fma(s, weight, s2 * weight2);
  m = top;
}

void add_statistics(const float* z, int64_t stride, int64_t rows, float scale, float* parts, int64_t padded) {
  Vec top[kVectors], s[kVectors], u[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    top[j] = Vec(kLowest);
    s[j] = u[j] = Vec(0.0f);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int j = 0; j < kVectors; ++j) top[j] = larger(load(z + r * stride + j * kWidth), top[j]);
  for (int64_t r = 0; r < rows; ++r)
    for (int j = 0; j < kVectors; ++j) add_powers<true>(load(z + r * stride + j * kWidth), top[j], Vec(scale), s[j], u[j]);
  for (int j = 0; j < kVectors; ++j) {
    float *at_m = parts + j * kWidth, *at_s = at_m + padded, *at_u = at_s + padded;
    Vec m = load(at_m), sum = load(at_s), moment = load(at_u);
    merge(m, sum, moment, top[j], s[j], u[j], Vec(scale));
    store(at_m, m);
    store(at_s, sum);
    store(at_u, moment);
  }
}

template <class P, class T>
void logits(const LmHeadArgs& a, int64_t begin, int64_t end) {
  const float scale = scale_for(a.temperature);
  Buffer<typename P::Element> weight(a.tile * weight_stride<P>(a));
  Buffer<float> scratch(a.logits == nullptr ? a.tile * kPanel : 0);
  for (int64_t segment = begin; segment < end; ++segment) {
    float* parts = a.parts + segment * 3 * a.padded;
    for (int64_t n = 0; n < a.padded; ++n) {
      parts[n] = kLowest;
      parts[n + a.padded] = parts[n + 2 * a.padded] = 0.0f;
    }
    const int64_t stop = smaller_of((segment + 1) * kLmSegment, a.vocabulary);
    for (int64_t v = segment * kLmSegment; v < stop; v += a.tile) {
      const int64_t rows = smaller_of(a.tile, stop - v);
      load_weight<P, T>(a, v, rows, weight.data());
      for (int64_t panel = 0; panel < a.padded / kPanel; ++panel) {
        const bool kept = a.logits != nullptr;
        float* z = kept ? a.logits + v * a.stride + panel * kPanel : scratch.data();
        const int64_t stride = kept ? a.stride : kPanel;
        multiply_tile<P, T>(a, weight.data(), v, rows, panel, z, stride);
        finish_logits<T>(a, v, rows, z, stride);
        for (int64_t n = panel * kPanel, i = 0; i < kPanel && n < a.tokens; ++n, ++i)
          if (a.targets[n] >= v && a.targets[n] < v + rows) a.target_logits[n] = z[(a.targets[n] - v) * stride + i];
        add_statistics(z, stride, rows, scale, parts + panel * kPanel, a.padded);
      }
    }
  }
}

// Log-prob, entropy and normaliser of each token from all segments, as in log_probs.cpp.
void rows_of(const LmHeadArgs& a, int64_t begin, int64_t end) {
  const float scale = scale_for(a.temperature);
  const int64_t segments = (a.vocabulary + kLmSegment - 1) / kLmSegment;
  for (int64_t n = begin; n < end; ++n) {
    RowSums row = {kLowest, 0.0, 0.0};
    for (int64_t i = 0; i < segments; ++i) row.m = larger_of(a.parts[i * 3 * a.padded + n], row.m);
    for (int64_t i = 0; i < segments; ++i) {
      const float* part = a.parts + i * 3 * a.padded + n;
      const double s = part[a.padded], delta = (static_cast<double>(part[0]) - row.m) * scale, factor = exp2(delta);
      row.s += factor * s;
      row.u += factor * (part[2 * a.padded] + delta * s);
    }
    if (row.s == 0.0) {  // nothing but -inf: there is no distribution
      row.m = -INFINITY;
      row.s = NAN;
    }
    const double log_s = log_sum(row, scale, a.temperature), entropy = kLn2 * (log2(row.s) - row.u / row.s);
    const bool elsewhere = a.targets[n] == kElsewhere;
    const double log_prob = (static_cast<double>(a.target_logits[n]) - row.m) / a.temperature - log_s;
    a.log_probs[n] = elsewhere ? NAN : static_cast<float>(log_prob);
    a.entropy[n] = static_cast<float>(entropy < 0.0 ? 0.0 : entropy);
    a.normaliser[2 * n] = row.m;
    a.normaliser[2 * n + 1] = static_cast<float>(log_s);
  }
}

// -------------------------------------------------------------------------------------------------------- gradients

// What the gradient of a token's logits is made of; see RowGradient in log_probs.cpp.
struct Slopes {
  Vec m, log_s, a, b, entropy;
};

struct Scales {
  Vec scale, inverse_cap;
};

template <bool kEntropy, bool kCapped>
FASTRLHF_INLINE Vec gradient_of(Vec z, const Slopes& t, const Scales& scales) {
  const Power power = exp2_held(fma(z - t.m, scales.scale, -t.log_s));
  Vec factor = -t.a;
  if (kEntropy) factor = fma(-t.b, power.held + t.entropy, factor);
  Vec dz = product(power) * factor;
  if (kCapped) {
    const Vec share = z * scales.inverse_cap;
    dz = fma(-share * share, dz, dz);
  }
  return dz;
}

// A token whose own logit is in the tile.
struct Hit {
  int64_t row, token;
  float own;       // what the one-hot adds
  float gradient;  // all of it
};

template <class P>
struct Tile {
  float* z;            // logits, and then their gradient as hidden_gradient takes it
  int64_t rows;
  typename P::Element* by_token;  // pairs of tokens, `pairs` apart; null where z is that already
  int64_t pairs;
};

template <bool kEntropy>
FASTRLHF_INLINE Slopes slopes_at(const LmHeadArgs& a, int64_t n) {
  Slopes t = {load(a.slopes + n), load(a.slopes + a.padded + n), load(a.slopes + 2 * a.padded + n), Vec(0.0f), Vec(0.0f)};
  if (kEntropy) {
    t.b = load(a.slopes + 3 * a.padded + n);
    t.entropy = load(a.slopes + 4 * a.padded + n);
  }
  return t;
}

template <bool kEntropy, bool kCapped>
int64_t find_hits(const LmHeadArgs& a, int64_t v, int64_t rows, const float* z, const Scales& scales, Hit* hits) {
  int64_t found = 0;
  for (int64_t n = 0; n < a.tokens; ++n) {
    if (a.targets[n] < v || a.targets[n] >= v + rows) continue;
    const int64_t row = a.targets[n] - v;
    const float* slope = a.slopes + n;
    const float logit = z[row * a.stride + n];
    Slopes t = {Vec(slope[0]), Vec(slope[a.padded]), Vec(slope[2 * a.padded]), Vec(0.0f), Vec(0.0f)};
    if (kEntropy) {
      t.b = Vec(slope[3 * a.padded]);
      t.entropy = Vec(slope[4 * a.padded]);
    }
    float own = slope[2 * a.padded];  // one-hot: a, through the cap
    if (kCapped) {
      const float share = logit * first(scales.inverse_cap);
      own -= share * share * own;
    }
    hits[found++] = {row, n, own, first(gradient_of<kEntropy, kCapped>(Vec(logit), t, scales)) + own};
  }
  return found;
}

template <class P>
struct GradientRows;

template <>
struct GradientRows<Single> {
  template <bool kEntropy, bool kCapped>
  static void vector(const Tile<Single>& tile, const LmHeadArgs& a, int64_t n, const Scales& scales, float* sums) {
    const Slopes t = slopes_at<kEntropy>(a, n);
    for (int64_t r = 0; r < tile.rows; ++r) {
      float* at = tile.z + r * a.stride + n;
      const Vec dz = gradient_of<kEntropy, kCapped>(load(at), t, scales);
      store(at, dz);
      if (sums != nullptr) store(sums + r * kWidth, load(sums + r * kWidth) + dz);
    }
  }
  static void put(const Tile<Single>& tile, const LmHeadArgs& a, const Hit& hit) {
    tile.z[hit.row * a.stride + hit.token] = hit.gradient;
  }
};

#if defined(FASTRLHF_CAPABILITY_AVX512_BF16)
FASTRLHF_INLINE bf16 rounded(float x) {
  bf16 to[kWidth];
  store(to, Vec(x));
  return to[0];
}

// Of two rows of the vocabulary at a time: bf16 in pairs of tokens for the weight's gradient, and in pairs of the two rows,
// over the first one's logits, for that of the hidden states.
template <>
struct GradientRows<Pair> {
  template <bool kEntropy, bool kCapped>
  static void vector(const Tile<Pair>& tile, const LmHeadArgs& a, int64_t n, const Scales& scales, float* sums) {
    const Slopes t = slopes_at<kEntropy>(a, n);
    for (int64_t r = 0; r < tile.rows; r += 2) {
      float* at = tile.z + r * a.stride + n;
      const Vec dz = gradient_of<kEntropy, kCapped>(load(at), t, scales);
      Vec next(0.0f);
      if (r + 1 < tile.rows) next = gradient_of<kEntropy, kCapped>(load(at + a.stride), t, scales);
      if (sums != nullptr) {
        store(sums + r * kWidth, load(sums + r * kWidth) + dz);
        store(sums + (r + 1) * kWidth, load(sums + (r + 1) * kWidth) + next);
      }
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(next.v, dz.v);  // 16 of the one row, then 16 of the other
      const __m256i one = _mm512_castsi512_si256(both), other = _mm512_extracti64x4_epi64(both, 1);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile.by_token + r * tile.pairs + n / 2), one);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile.by_token + (r + 1) * tile.pairs + n / 2), other);
      const __m512i low = _mm512_cvtepu16_epi32(one), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(other), 16);
      _mm512_storeu_si512(at, _mm512_or_si512(low, high));
    }
  }
  static void put(const Tile<Pair>& tile, const LmHeadArgs& a, const Hit& hit) {
    const bf16 dz = rounded(hit.gradient);
    auto* by_token = reinterpret_cast<bf16*>(tile.by_token + hit.row * tile.pairs) + hit.token;
    auto* by_row = reinterpret_cast<bf16*>(tile.z + hit.row / 2 * 2 * a.stride + hit.token) + hit.row % 2;
    memcpy(by_token, &dz, sizeof dz);  // not assigned: the memory is of other types, and read as those
    memcpy(by_row, &dz, sizeof dz);
  }
};
#endif

template <class P, bool kEntropy, bool kCapped>
void logits_gradient(const Tile<P>& tile, const LmHeadArgs& a, int64_t v, Hit* hits) {
  const Scales scales = {Vec(scale_for(a.temperature)), Vec(1.0f / a.softcap)};
  const int64_t found = find_hits<kEntropy, kCapped>(a, v, tile.rows, tile.z, scales, hits);
  Buffer<float> lanes(a.grad_bias == nullptr ? 0 : kLmTile * kWidth);
  float* sums = a.grad_bias == nullptr ? nullptr : lanes.data();
  int64_t hit = 0;
  for (int64_t block = 0; block < a.padded; block += kTokens) {
    const int64_t stop = smaller_of(block + kTokens, a.padded);
    if (sums != nullptr) memset(sums, 0, kLmTile * kWidth * sizeof(float));
    for (int64_t n = block; n < stop; n += kWidth) {
      GradientRows<P>::template vector<kEntropy, kCapped>(tile, a, n, scales, sums);
      for (; hit < found && hits[hit].token < n + kWidth; ++hit) {
        GradientRows<P>::put(tile, a, hits[hit]);
        if (sums != nullptr) sums[hits[hit].row * kWidth + hits[hit].token - n] += hits[hit].own;
      }
    }
    if (sums == nullptr) continue;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float total = sum(load(sums + r * kWidth));
      a.grad_bias[v + r] = a.first_chunk && block == 0 ? total : a.grad_bias[v + r] + total;
    }
  }
}

template <class T>
void round_to(T* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int count = static_cast<int>(smaller_of(kWidth, n - i));
    store_first(to + i, load_first(from + i, count, 0.0f), count);
  }
}

template <class P>
void weight_gradient(const LmHeadArgs& a, const typename P::Element* dz, int64_t dz_row, int64_t rows, float* sums) {
  const int64_t token_elements = elements<P>(a.padded);
  float edge[kLmTile * kPanel];
  for (int64_t p = 0; p * kPanel < a.size; ++p) {
    const int64_t columns = smaller_of(kPanel, a.size - p * kPanel);
    const auto* tokens = static_cast<const typename P::Element*>(a.by_hidden) + p * token_elements * kPanel;
    float* to = sums + p * kPanel;
    for (int64_t block = 0; block < a.padded; block += kTokens) {
      const int64_t s = block / P::kDepth, steps = smaller_of(kTokens, a.padded - block) / P::kDepth;
      const bool adds = !a.first_chunk || block > 0;
      if (columns == kPanel) {
        const float* next = block == 0 && p * kPanel + 2 * kPanel <= a.size ? to + kPanel : nullptr;
        multiply<P>({dz + s, dz_row, 1, tokens + s * kPanel, kPanel, steps, to, a.size, adds, {}, next}, rows);
        continue;
      }
      multiply<P>({dz + s, dz_row, 1, tokens + s * kPanel, kPanel, steps, edge, kPanel, false}, rows);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < columns; ++i)
          to[r * a.size + i] = adds ? to[r * a.size + i] + edge[r * kPanel + i] : edge[r * kPanel + i];
    }
  }
}

template <class P, class T>
void gradient(const LmHeadArgs& a, int64_t begin, int64_t end) {
  using E = typename P::Element;
  Buffer<E> weight(a.recompute ? a.tile * weight_stride<P>(a) : 0);
  const int64_t pairs = P::kDepth == 1 ? 0 : a.padded / P::kDepth + 16;
  Buffer<E> by_token(kLmTile * pairs);
  Buffer<Hit> hits(a.tokens);
  Buffer<float> sums(a.grad_weight_rounded == nullptr ? 0 : a.tile * a.size);
  const auto logits_gradient_of = [&] {
    const bool capped = a.softcap < INFINITY;
    if (a.with_entropy) return capped ? logits_gradient<P, true, true> : logits_gradient<P, true, false>;
    return capped ? logits_gradient<P, false, true> : logits_gradient<P, false, false>;
  }();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t v = a.first + i * a.tile, rows = smaller_of(a.tile, a.first + a.count - v);
    float* z = a.logits + (v - a.origin) * a.stride;
    if (a.recompute) {
      load_weight<P, T>(a, v, rows, weight.data());
      for (int64_t panel = 0; panel < a.padded / kPanel; ++panel) {
        multiply_tile<P, T>(a, weight.data(), v, rows, panel, z + panel * kPanel, a.stride);
        finish_logits<T>(a, v, rows, z + panel * kPanel, a.stride);
      }
    }
    logits_gradient_of({z, rows, by_token.data(), pairs}, a, v, hits.data());
    const bool single = P::kDepth == 1;
    const E* dz = single ? reinterpret_cast<const E*>(z) : by_token.data();
    const int64_t dz_row = single ? a.stride : pairs;
    if (a.grad_weight != nullptr) weight_gradient<P>(a, dz, dz_row, rows, a.grad_weight + v * a.size);
    if (a.grad_weight_rounded == nullptr) continue;
    weight_gradient<P>(a, dz, dz_row, rows, sums.data());
    round_to(static_cast<T*>(a.grad_weight_rounded) + v * a.size, sums.data(), rows * a.size);
  }
}

// dx^T[h][n] += sum_v W[v][h] dz[v][n], over the `count` rows of the vocabulary from `first` on. Tasks: blocks of H times
// `splits` of the tokens. All tasks of a thread take the same rows at a time, so that their dz stays in L2.
template <class P, class T>
void hidden_gradient(const LmHeadArgs& a, int64_t begin, int64_t end) {
  using E = typename P::Element;
  Buffer<E> weight(kVocabulary / P::kDepth * kHiddenBlock);
  const int64_t all_panels = a.padded / kPanel;
  for (int64_t block = 0; block < a.count; block += kVocabulary) {
    const int64_t rows = smaller_of(kVocabulary, a.count - block), steps = elements<P>(rows);
    const T* from = static_cast<const T*>(a.weight) + (a.first + block) * a.weight_stride;
    const auto* dz = reinterpret_cast<const E*>(a.logits + (a.first + block - a.origin) * a.stride);
    const bool adds = a.first > 0 || block > 0, more = block + 2 * kVocabulary <= a.count;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task / a.splits * kHiddenBlock, columns = smaller_of(kHiddenBlock, a.size - h);
      for (int64_t s = 0; s < steps; ++s) {
        const T* row = from + s * P::kDepth * a.weight_stride + h;
        const T* second = s * P::kDepth + 1 < rows ? row + a.weight_stride : nullptr;
        Convert<P, T>::rows(row, second, columns, weight.data() + s * kHiddenBlock);
      }
      const int64_t split = task % a.splits;
      const int64_t first_panel = all_panels * split / a.splits, stop_panel = all_panels * (split + 1) / a.splits;
      for (int64_t panel = first_panel; panel < stop_panel; ++panel) {
        Ahead ahead;  // the same columns of the next rows; of pairs of rows, each panel asks for one
        if (more && panel - first_panel < P::kDepth) {
          const T* next = from + (kVocabulary + panel - first_panel) * a.weight_stride + h;
          ahead = {reinterpret_cast<const char*>(next), P::kDepth * a.weight_stride * static_cast<int64_t>(sizeof(T)), 64,
                   (columns * static_cast<int64_t>(sizeof(T)) + 63) / 64};
        }
        multiply<P>({weight.data(), 1, kHiddenBlock, dz + panel * kPanel, P::kDepth * a.stride, steps,
                     a.grad_hidden + h * a.stride + panel * kPanel, a.stride, adds, ahead},
                    columns);
      }
    }
  }
}

// dx of each token, from dx^T.
template <class T>
void store_hidden(const LmHeadArgs& a, int64_t begin, int64_t end) {
  float row[kWidth];
  for (int64_t n = begin; n < end; ++n) {
    T* to = static_cast<T*>(a.grad_hidden_rows) + a.grad_row[n] * a.size;
    for (int64_t h = 0; h < a.size; h += kWidth) {
      const int count = static_cast<int>(smaller_of(kWidth, a.size - h));
      for (int i = 0; i < kWidth; ++i) row[i] = i < count ? a.grad_hidden[(h + i) * a.stride + n] : 0.0f;
      store_first(to + h, load(row), count);
    }
  }
}

template <class T>
void narrow(const NarrowArgs& a, int64_t begin, int64_t end) {
  round_to(static_cast<T*>(a.to) + begin, a.from + begin, end - begin);
}

#if defined(FASTRLHF_CAPABILITY_AVX512_BF16)
using OfBf16 = Pair;
#else
using OfBf16 = Single;
#endif

#define FASTRLHF_BY_DTYPE(function, a, begin, end)                                \
  if ((a).dtype == kFloat32) return function<Single, float>(a, begin, end);       \
  if ((a).dtype == kBFloat16) return function<OfBf16, bf16>(a, begin, end);       \
  return function<Single, fp16>(a, begin, end);

}  // namespace

void lm_head_pack(const LmHeadArgs& a, int64_t begin, int64_t end) { FASTRLHF_BY_DTYPE(pack, a, begin, end) }
void lm_head_logits(const LmHeadArgs& a, int64_t begin, int64_t end) { FASTRLHF_BY_DTYPE(logits, a, begin, end) }
void lm_head_rows(const LmHeadArgs& a, int64_t begin, int64_t end) { rows_of(a, begin, end); }
void lm_head_gradient(const LmHeadArgs& a, int64_t begin, int64_t end) { FASTRLHF_BY_DTYPE(gradient, a, begin, end) }
void lm_head_hidden_gradient(const LmHeadArgs& a, int64_t begin, int64_t end) {
  FASTRLHF_BY_DTYPE(hidden_gradient, a, begin, end)
}
void lm_head_store_hidden(const LmHeadArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == kFloat32) return store_hidden<float>(a, begin, end);
  if (a.dtype == kBFloat16) return store_hidden<bf16>(a, begin, end);
  return store_hidden<fp16>(a, begin, end);
}
void narrow(const NarrowArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == kFloat32) return narrow<float>(a, begin, end);
  if (a.dtype == kBFloat16) return narrow<bf16>(a, begin, end);
  return narrow<fp16>(a, begin, end);
}

#undef FASTRLHF_BY_DTYPE

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
