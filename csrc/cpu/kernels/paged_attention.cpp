// Attention of single rows to a paged KV cache.
//
// Keys lie [head_dim][kPage]: a vector holds the scores of several positions, and a score is a sum in one lane, in the order
// of head_dim. Weights and values are added up in the order of the positions. So a row's result has the same bits
// whether it comes with the rest of its prompt or alone, whatever is beside it, and wherever its pages lie.
//
// The query heads that share a key head are taken together, kGroup at a time: a key that was loaded serves all of them.

#include <math.h>

#include "../kernels.h"
#include "../simd.h"
#include "activations.h"
#include "buffer.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

constexpr int kGroup = 4;
constexpr int kPageVectors = kPage / kWidth;
constexpr int kSpan = 64 / kWidth;  // vectors of a value that are added up at a time

static_assert(kPage % kWidth == 0, "a page is made of vectors");

FASTRLHF_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// x of one head, normalised and rotated to a position, into `to`, padded with zeros to a multiple of kWidth.
void prepare_head(const AttentionArgs& a, const float* x, const float* norm, int64_t position, float factor, float* to) {
  const int64_t d = a.head_dim;
  float rstd = 1.0f;
  if (norm != nullptr) {
    Vec squares(0.0f);
    for (int64_t i = 0; i < d; i += kWidth) {
      const Vec v = load_first(x + i, static_cast<int>(smaller_of(kWidth, d - i)), 0.0f);
      squares = fma(v, v, squares);
    }
    rstd = static_cast<float>(1.0 / sqrt(static_cast<double>(sum(squares)) / d + a.eps));
  }
  for (int64_t i = 0; i < d; i += kWidth) {
    const int count = static_cast<int>(smaller_of(kWidth, d - i));
    Vec v = load_first(x + i, count, 0.0f);
    if (norm != nullptr) v = v * Vec(rstd) * load_first(norm + i, count, 0.0f);
    store(to + i, v);
  }
  if (a.cos != nullptr) {
    const int64_t r = a.rotary;
    const float *c = a.cos + position * r, *s = a.sin + position * r;
    for (int64_t i = 0; i < r; i += kWidth) {
      const int count = static_cast<int>(smaller_of(kWidth, r - i));
      const Vec low = load_first(to + i, count, 0.0f), high = load_first(to + r + i, count, 0.0f);
      const Vec cosine = load_first(c + i, count, 0.0f), sine = load_first(s + i, count, 0.0f);
      store_first(to + i, low * cosine - high * sine, count);
      store_first(to + r + i, high * cosine + low * sine, count);
    }
  }
  if (factor != 1.0f)
    for (int64_t i = 0; i < d; i += kWidth) store(to + i, load(to + i) * Vec(factor));
}

FASTRLHF_INLINE int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

template <class T>
void cache(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t d = a.head_dim;
  Buffer<float> k(padded(d));
  T narrow[kWidth];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t position = a.position[row], slot = position % kPage;
    const int64_t page = a.pages[a.sequence[row] * a.pages_stride + position / kPage];
    const float* from = a.qkv + row * a.qkv_stride + a.heads * d;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      prepare_head(a, from + head * d, a.k_norm, position, 1.0f, k.data());
      T* keys = static_cast<T*>(a.keys) + (page * a.kv_heads + head) * d * kPage + slot;
      for (int64_t i = 0; i < d; i += kWidth) {
        store(narrow, load(k.data() + i));
        const int count = static_cast<int>(smaller_of(kWidth, d - i));
        for (int j = 0; j < count; ++j) keys[(i + j) * kPage] = narrow[j];
      }
      T* values = static_cast<T*>(a.values) + ((page * a.kv_heads + head) * kPage + slot) * d;
      const float* v = from + (a.kv_heads + head) * d;
      for (int64_t i = 0; i < d; i += kWidth) {
        const int count = static_cast<int>(smaller_of(kWidth, d - i));
        store_first(values + i, load_first(v + i, count, 0.0f), count);
      }
    }
  }
}

// Scores of kQueries queries and all positions of kPages pages.
template <int kQueries, int kPages, class T>
void score_pages(const T* const* keys, const float* queries, int64_t query_stride, int64_t d, float* scores,
                 int64_t stride) {
  Vec sums[kQueries][kPages * kPageVectors];
  for (int g = 0; g < kQueries; ++g)
    for (int j = 0; j < kPages * kPageVectors; ++j) sums[g][j] = Vec(0.0f);
  for (int64_t i = 0; i < d; ++i)
    for (int p = 0; p < kPages; ++p)
      for (int j = 0; j < kPageVectors; ++j) {
        const Vec key = load(keys[p] + i * kPage + j * kWidth);
        for (int g = 0; g < kQueries; ++g) {
          Vec& to = sums[g][p * kPageVectors + j];
          to = fma(Vec(queries[g * query_stride + i]), key, to);
        }
      }
  for (int g = 0; g < kQueries; ++g)
    for (int j = 0; j < kPages * kPageVectors; ++j) store(scores + g * stride + j * kWidth, sums[g][j]);
}

// What a row sees: positions first .. last of its sequence.
struct Seen {
  int64_t first, last;
  const int32_t* pages;
  int64_t first_page() const { return first / kPage; }
  int64_t count_pages() const { return last / kPage - first / kPage + 1; }
};

// Scores to weights, not yet divided by their sum, which is returned.
float weigh(const AttentionArgs& a, const Seen& seen, float* scores) {
  const int64_t start = seen.first_page() * kPage, n = seen.count_pages() * kPage;
  Vec top(-INFINITY);
  for (int64_t i = 0; i < n; i += kWidth) {
    Vec s = load(scores + i);
    if (a.softcap < INFINITY) s = Vec(a.softcap) * tanh_of(s * Vec(1.0f / a.softcap));
    const int64_t before = seen.first - start - i, upto = seen.last + 1 - start - i;
    if (before > 0) s = select(first_lanes(static_cast<int>(smaller_of(before, kWidth))), Vec(-INFINITY), s);
    if (upto < kWidth) s = select(first_lanes(static_cast<int>(upto > 0 ? upto : 0)), s, Vec(-INFINITY));
    store(scores + i, s);
    top = larger(s, top);
  }
  const Vec m(largest(top));
  Vec total(0.0f);
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec p = exp_of(load(scores + i) - m);
    store(scores + i, p);
    total = total + p;
  }
  return sum(total);
}

template <int kQueries, class T>
void add_values(const AttentionArgs& a, const Seen& seen, int64_t head, const float* weights, int64_t stride,
                const float* totals, float* out) {
  const int64_t d = a.head_dim, start = seen.first_page() * kPage;
  for (int64_t span = 0; span < d; span += kSpan * kWidth) {
    Vec sums[kQueries][kSpan];
    for (int g = 0; g < kQueries; ++g)
      for (int j = 0; j < kSpan; ++j) sums[g][j] = Vec(0.0f);
    const bool whole = span + kSpan * kWidth <= d;
    for (int64_t page = seen.first_page(); page <= seen.last / kPage; ++page) {
      const T* values = static_cast<const T*>(a.values) + (seen.pages[page] * a.kv_heads + head) * kPage * d + span;
      const int64_t from = page * kPage > seen.first ? page * kPage : seen.first;
      const int64_t stop = smaller_of((page + 1) * kPage, seen.last + 1);
      for (int64_t at = from; at < stop; ++at) {
        const T* v = values + at % kPage * d;
        for (int j = 0; j < kSpan; ++j) {
          const int64_t rest = d - span - j * kWidth;
          if (!whole && rest <= 0) break;
          const Vec value = whole ? load(v + j * kWidth) : load_first(v + j * kWidth, static_cast<int>(smaller_of(rest, kWidth)), 0.0f);
          for (int g = 0; g < kQueries; ++g) sums[g][j] = fma(Vec(weights[g * stride + at - start]), value, sums[g][j]);
        }
      }
    }
    for (int g = 0; g < kQueries; ++g)
      for (int j = 0; j < kSpan; ++j) {
        const int64_t rest = d - span - j * kWidth;
        if (rest <= 0) break;
        store_first(out + g * d + span + j * kWidth, sums[g][j] / Vec(totals[g]), static_cast<int>(smaller_of(rest, kWidth)));
      }
  }
}

// Scratch of a thread, as large as the longest row needs it.
class Rows {
 public:
  ~Rows() { free(data_); }
  float* sized(int64_t n) {
    if (n > size_) {
      free(data_);
      data_ = static_cast<float*>(aligned_alloc(64, (n * sizeof(float) + 64) / 64 * 64));
      if (data_ == nullptr) abort();  // no exception leaves a parallel region
      size_ = n;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

template <int kQueries, class T>
void attend_group(const AttentionArgs& a, const Seen& seen, int64_t row, int64_t head, int64_t first_query, Rows& scratch,
                  float* queries) {
  const int64_t d = a.head_dim, width = padded(d);
  for (int g = 0; g < kQueries; ++g)
    prepare_head(a, a.qkv + row * a.qkv_stride + (first_query + g) * d, a.q_norm, a.position[row], a.scale,
                 queries + g * width);
  const int64_t count = seen.count_pages(), stride = count * kPage;
  float* scores = scratch.sized(kQueries * stride);
  const auto keys_of = [&](int64_t i) {
    return static_cast<const T*>(a.keys) + (seen.pages[seen.first_page() + i] * a.kv_heads + head) * d * kPage;
  };
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    const T* keys[2] = {keys_of(i), keys_of(i + 1)};
    score_pages<kQueries, 2>(keys, queries, width, d, scores + i * kPage, stride);
  }
  if (i < count) {
    const T* keys[1] = {keys_of(i)};
    score_pages<kQueries, 1>(keys, queries, width, d, scores + i * kPage, stride);
  }
  float totals[kQueries];
  for (int g = 0; g < kQueries; ++g) totals[g] = weigh(a, seen, scores + g * stride);
  add_values<kQueries, T>(a, seen, head, scores, stride, totals, a.out + (row * a.heads + first_query) * d);
}

template <class T>
void attend(const AttentionArgs& a, int64_t begin, int64_t end) {
  static_assert(kGroup == 4, "the rest of a group has its cases below");
  const int64_t group = a.heads / a.kv_heads;
  Rows scratch;
  Buffer<float> queries(kGroup * padded(a.head_dim));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / a.kv_heads, head = unit % a.kv_heads, last = a.position[row];
    const int64_t first = a.window > 0 && last >= a.window ? last - a.window + 1 : 0;
    const Seen seen = {first, last, a.pages + a.sequence[row] * a.pages_stride};
    for (int64_t g = 0; g < group; g += kGroup) {
      const int64_t query = head * group + g;
      switch (smaller_of(kGroup, group - g)) {
        case 4:
          attend_group<4, T>(a, seen, row, head, query, scratch, queries.data());
          break;
        case 3:
          attend_group<3, T>(a, seen, row, head, query, scratch, queries.data());
          break;
        case 2:
          attend_group<2, T>(a, seen, row, head, query, scratch, queries.data());
          break;
        default:
          attend_group<1, T>(a, seen, row, head, query, scratch, queries.data());
      }
    }
  }
}

}  // namespace

void cache_rows(const AttentionArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == kFloat32) return cache<float>(a, begin, end);
  if (a.dtype == kBFloat16) return cache<bf16>(a, begin, end);
  return cache<fp16>(a, begin, end);
}

void attention(const AttentionArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == kFloat32) return attend<float>(a, begin, end);
  if (a.dtype == kBFloat16) return attend<bf16>(a, begin, end);
  return attend<fp16>(a, begin, end);
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
