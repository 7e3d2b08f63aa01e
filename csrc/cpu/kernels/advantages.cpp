// Generalised advantage estimation, of given rewards and of a rollout's, one sequence after the other.
//
// A sequence is scanned from its end, a vector at a time; vectors are counted from the last token that is scanned. With
// "carry" only tokens that count are: those that lie side by side where they are, others after they were gathered into a
// buffer, chunk by chunk. Tokens left over at a chunk's begin, too few for a vector, are computed at once and again with
// the next chunk, whose first vector they begin. So a token's bits depend on the tokens after it, not on the gaps.
//
// Sequences go by from the last to the first: memory is then read backwards throughout, which the processors' prefetchers
// do badly and `Streams` does for them.

#include "../simd.h"
// After simd.h, whose functions they use.
#include "../../math/gae.h"
#include "../../math/kl.h"
#include "moments.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

constexpr int64_t kChunk = 1024;

struct Discounts {
  Vec gamma, power_1, power_2, power_4, power_8;  // powers of gamma lam
  Vec to_next;                                    // of its distance to the vector that follows, for each lane
};

Discounts discounts(float gamma, float lam) {
  float to_next[kWidth];
  const double step = static_cast<double>(gamma) * lam;
  double power = 1.0;
  for (int i = kWidth - 1; i >= 0; --i) to_next[i] = static_cast<float>(power *= step);
  const auto power_of = [&](int n) { return Vec(to_next[kWidth - n]); };
  return {Vec(gamma), power_of(1), power_of(2), power_of(4), power_of(8), load(to_next)};
}

// The advantages of a vector, given the value of the token after it (first lane) and its advantage (all lanes). The lanes
// are joined in stretches of 1, 2, 4 and 8. A lane depends on those after it alone: before the first token may be anything.
FASTRLHF_INLINE Vec scan(Vec reward, Vec value, Vec later_value, Vec later_advantage, const Discounts& d) {
  const Vec zero(0.0f);
  Vec a = gae_delta(reward, value, later_lanes<1>(value, later_value), d.gamma);
  a = gae_advantage(a, later_lanes<1>(a, zero), d.power_1);
  a = gae_advantage(a, later_lanes<2>(a, zero), d.power_2);
  a = gae_advantage(a, later_lanes<4>(a, zero), d.power_4);
  if (kWidth > 8) a = gae_advantage(a, later_lanes<kWidth / 2>(a, zero), d.power_8);
  return gae_advantage(a, later_advantage, d.to_next);
}

// What a sequence reads and writes, from its first token on.
struct Streams {
  const float *values, *inputs[3];  // those that are not there are null
  const uint8_t* mask;
  float *advantages, *returns;

  // Fetches what stands a chunk before token i; of the mask, which is looked through before anything else, four.
  __attribute__((always_inline)) void fetch_before(int64_t i) const {
    __builtin_prefetch(values + i - kChunk, 0, 2);
    for (const float* input : inputs)
      if (input != nullptr) __builtin_prefetch(input + i - kChunk, 0, 2);
    if (mask != nullptr && i % 64 < kWidth) __builtin_prefetch(mask + i - 4 * kChunk, 0, 2);
    __builtin_prefetch(advantages + i - kChunk, 1, 2);
    __builtin_prefetch(returns + i - kChunk, 1, 2);
  }
};

// What the rest of a sequence, towards its end, leaves to the chunks before.
struct Later {
  Vec value, advantage;  // of the next token, in the first lane and in all lanes
  Vec rewards, values;   // of the tokens that wait to become a vector
  int64_t waiting;
};

struct alignas(64) Buffer {
  // A vector of room before, for the lanes before the first token, and two after, for those that follow the last one.
  float rewards[kChunk + 3 * kWidth], values[kChunk + 3 * kWidth];
};

// Turns n rewards into advantages, and takes along what waits.
FASTRLHF_INLINE void scan_chunk(float* rewards, const float* values, int64_t n, Later& later, const Discounts& discounts) {
  const Discounts d = discounts;  // here and below: in registers, whatever the stores might point at
  Vec later_value = later.value, later_advantage = later.advantage;
  int64_t i = n + later.waiting;
  for (; i >= kWidth; i -= kWidth) {
    const Vec value = load(values + i - kWidth);
    const Vec a = scan(load(rewards + i - kWidth), value, later_value, later_advantage, d);
    store(rewards + i - kWidth, a);
    later_value = value;
    later_advantage = broadcast_first(a);
  }
  later = {later_value, later_advantage, load(rewards), load(values), i};
  if (i == 0) return;
  const Vec value = load(values + i - kWidth);
  store(rewards + i - kWidth, scan(load(rewards + i - kWidth), value, later_value, later_advantage, d));
}

// "carry" with gaps. token(i, n, &reward, &value) reads tokens i .. i + n, which may be anything where they do not count;
// report(i, n, advantages) sees what was written.
template <class Token, class Report>
FASTRLHF_INLINE void gathered(int64_t length, float bootstrap_value, const Discounts& d, const Streams& s,
                              const Token& token, const Report& report) {
  Buffer buffer;
  float *rewards = buffer.rewards + kWidth, *values = buffer.values + kWidth;
  Later later = {Vec(bootstrap_value), Vec(0.0f), Vec(0.0f), Vec(0.0f), 0};
  for (int64_t end = length; end > 0;) {
    const int64_t begin = end < kChunk ? 0 : end - kChunk;
    int64_t at = 0;
    for_each_vector(begin, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      s.fetch_before(i);
      const Mask keep = load_mask_first(s.mask + i, n);
      Vec reward, value;
      token(i, n, reward, value);
      store(rewards + at, all(keep) ? reward : compress(reward, keep));
      store(values + at, all(keep) ? value : compress(value, keep));
      at += count(keep);
    });
    store(rewards + at, later.rewards);
    store(values + at, later.values);
    scan_chunk(rewards, values, at, later, d);
    at = 0;
    for_each_vector(begin, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Mask keep = load_mask_first(s.mask + i, n);
      const Vec dense = load(rewards + at), a = all(keep) ? dense : expand(dense, keep);
      store_first(s.advantages + i, a, n);
      store_first(s.returns + i, a + load_kept(s.values + i, keep, n), n);
      report(i, n, a);
      at += count(keep);
    });
    end = begin;
  }
}

// Tokens begin .. end, side by side. kZero: those that do not count are steps of reward 0 and value 0.
template <bool kZero, class Token, class Report>
FASTRLHF_INLINE void in_place(int64_t begin, int64_t end, float bootstrap_value, const Discounts& discounts,
                              const Streams& streams, const Token& token, const Report& report) {
  const Discounts d = discounts;
  const Streams s = streams;
  const Vec zero(0.0f);
  Vec later_value(bootstrap_value), later_advantage = zero;
  const auto step = [&](int64_t i, int n) __attribute__((always_inline)) {
    s.fetch_before(i);
    const Mask keep = kZero ? load_mask_first(s.mask + i, n) : first_lanes(n);
    Vec reward, value;
    token(i, n, reward, value);
    if (kZero) {
      reward = select(keep, reward, zero);
      value = select(keep, value, zero);
    }
    const Mask place = ~first_lanes(kWidth - n);  // the last lanes, where a vector that is not full has its tokens
    const Vec at_end = n == kWidth ? value : expand(value, place);
    Vec a = scan(n == kWidth ? reward : expand(reward, place), at_end, later_value, later_advantage, d);
    later_value = at_end;
    later_advantage = broadcast_first(a);
    if (n < kWidth) a = compress(a, place);
    if (kZero) a = select(keep, a, zero);
    store_first(s.advantages + i, a, n);
    store_first(s.returns + i, a + value, n);
    report(i, n, a);
  };
  int64_t i = end;
  for (; i - begin >= kWidth; i -= kWidth) step(i - kWidth, kWidth);
  if (i > begin) step(begin, static_cast<int>(i - begin));
}

// The tokens that count lie in begin .. end.
struct Kept {
  int64_t begin, end;
};

Kept kept_of(const uint8_t* mask, int64_t length) {
  Kept kept = {0, length};
  while (kept.end >= kBytes && count_bytes(mask + kept.end - kBytes) == 0) kept.end -= kBytes;
  while (kept.end > 0 && mask[kept.end - 1] == 0) --kept.end;
  while (kept.begin < kept.end && mask[kept.begin] == 0) ++kept.begin;
  return kept;
}

template <class Token, class Report>
FASTRLHF_INLINE void sequence(MaskMode mode, int64_t length, const Kept& kept, float bootstrap_value,
                              const Discounts& d, const Streams& s, const Token& token, const Report& report) {
  if (mode == kZero) return in_place<true>(0, length, bootstrap_value, d, s, token, report);
  if (mode == kNone) return in_place<false>(0, length, bootstrap_value, d, s, token, report);
  if (count_kept(s.mask + kept.begin, kept.end - kept.begin) < kept.end - kept.begin)
    return gathered(length, bootstrap_value, d, s, token, report);
  const auto clear = [&](int64_t begin, int64_t end) {
    memset(s.advantages + begin, 0, (end - begin) * sizeof(float));
    memset(s.returns + begin, 0, (end - begin) * sizeof(float));
  };
  clear(kept.end, length);
  clear(0, kept.begin);
  in_place<false>(kept.begin, kept.end, bootstrap_value, d, s, token, report);
}

}  // namespace

void gae(const GaeArgs& a, int64_t begin, int64_t end) {
  const Discounts d = discounts(a.gamma, a.lam);
  const MaskMode mode = a.mask == nullptr ? kNone : a.mask_mode;
  for (int64_t b = end - 1; b >= begin; --b) {
    const int64_t start = a.ends == nullptr ? b * a.length : a.ends[b];
    const int64_t length = a.ends == nullptr ? a.length : a.ends[b + 1] - start;
    const Streams s = {a.values + start, {a.rewards + start}, mode == kNone ? nullptr : a.mask + start,
                       a.advantages + start, a.returns + start};
    const auto token = [&](int64_t i, int n, Vec& reward, Vec& value) __attribute__((always_inline)) {
      reward = load_first(s.inputs[0] + i, n, 0.0f);
      value = load_first(s.values + i, n, 0.0f);
    };
    const float bootstrap_value = a.bootstrap_values == nullptr ? 0.0f : a.bootstrap_values[b];
    const Kept kept = mode == kCarry ? kept_of(s.mask, length) : Kept{0, length};
    sequence(mode, length, kept, bootstrap_value, d, s, token, [](int64_t, int, Vec) {});
  }
}

void rollout(const RolloutArgs& a, int64_t begin, int64_t end) {
  const Discounts d = discounts(a.gamma, a.lam);
  const Vec fine(-a.kl_coef), zero(0.0f);
  for (int64_t b = end - 1; b >= begin; --b) {
    const int64_t start = b * a.length;
    const auto from = [&](const float* x) { return x == nullptr ? nullptr : x + start; };
    const Streams s = {from(a.values), {from(a.log_probs), from(a.ref_log_probs), from(a.token_rewards)},
                       a.mask + start, a.advantages + start, a.returns + start};
    const Kept kept = kept_of(s.mask, a.length);
    float score = a.scores[b];
    score = score < -a.score_clip ? -a.score_clip : a.score_clip < score ? a.score_clip : score;  // nan stays
    Sum kl;
    const auto token = [&](int64_t i, int n, Vec& reward, Vec& value) __attribute__((always_inline)) {
      const Mask keep = load_mask_first(s.mask + i, n);
      const Vec log_ratio = load_kept(s.inputs[0] + i, keep, n) - load_kept(s.inputs[1] + i, keep, n);
      const Vec estimate = kl_estimate(log_ratio, a.kl_estimator).value;  // 0 where the token does not count
      add(kl, estimate);
      if (i % kFlush < kWidth) flush(kl);
      reward = a.kl_coef == 0.0f ? zero : fine * estimate;  // monitored alone, an infinite KL is no reward
      if (s.inputs[2] != nullptr) reward = reward + load_kept(s.inputs[2] + i, keep, n);
      const int64_t last = kept.end - 1 - i;
      if (last >= 0 && last < n) {
        const Mask at_last = first_lanes(static_cast<int>(last) + 1) & ~first_lanes(static_cast<int>(last));
        reward = select(at_last, reward + Vec(score), reward);
      }
      value = load_first(s.values + i, n, 0.0f);
    };
    Spread spread;
    const auto report = [&](int64_t i, int n, Vec advantage) __attribute__((always_inline)) {
      add(spread, advantage, load_mask_first(s.mask + i, n));
      if (i % kFlush < kWidth) flush(spread);
    };
    const float bootstrap_value = a.bootstrap_values == nullptr ? 0.0f : a.bootstrap_values[b];
    sequence(a.mask_mode, a.length, kept, bootstrap_value, d, s, token, report);
    flush(kl);
    a.kl[b] = static_cast<float>(kl.total);
    a.moments[b] = moments_of(spread);
  }
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
