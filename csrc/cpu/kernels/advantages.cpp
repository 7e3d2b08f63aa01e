// Generalised advantage estimation, of given rewards and of a rollout's, one sequence after the other.
//
// A sequence is scanned from its end, a vector at a time. With "carry" only tokens that count are: long runs of them where
// they lie, others after they were gathered into a buffer. Tokens left over at the begin of a run, too few for a vector,
// are computed at once and again with the run before, which completes their vector. So vectors are counted from the last
// token that counts, and a token's bits depend on the tokens after it, not on the gaps.
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

// What the rest of a sequence, towards its end, leaves to the tokens before.
struct Later {
  Vec value, advantage;  // of the next token, in the first lane and in all lanes
  Vec rewards, values;   // of the tokens that wait to become a vector, in the first lanes
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

// Tokens begin .. end, at most a chunk, of which those with a 0 in the mask are left out. token(i, n, &reward, &value) reads
// tokens i .. i + n, which may be anything where they do not count; report(i, n, advantages) sees what was written.
template <class Token, class Report>
FASTRLHF_INLINE void gathered(int64_t begin, int64_t end, Later& later, const Discounts& d, const Streams& s,
                              const Token& token, const Report& report) {
  Buffer buffer;
  float *rewards = buffer.rewards + kWidth, *values = buffer.values + kWidth;
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
}

FASTRLHF_INLINE Mask last_lanes(int n) { return ~first_lanes(kWidth - n); }

// Tokens begin .. end, all of them. kZero: those that do not count are steps of reward 0 and value 0.
template <bool kZero, class Token, class Report>
FASTRLHF_INLINE void in_place(int64_t begin, int64_t end, Later& later, const Discounts& discounts,
                              const Streams& streams, const Token& token, const Report& report) {
  const Discounts d = discounts;
  const Streams s = streams;
  const Vec zero(0.0f);
  Vec later_value = later.value, later_advantage = later.advantage;
  int waiting = static_cast<int>(later.waiting);
  const auto step = [&](int64_t i, int n) __attribute__((always_inline)) {
    s.fetch_before(i);
    const Mask keep = kZero ? load_mask_first(s.mask + i, n) : first_lanes(n);
    Vec reward, own_value;
    token(i, n, reward, own_value);
    if (kZero) {
      reward = select(keep, reward, zero);
      own_value = select(keep, own_value, zero);
    }
    Vec value = own_value;
    const Mask wait = last_lanes(n < kWidth ? waiting : 0), filled = last_lanes(n < kWidth ? waiting + n : kWidth);
    if (n < kWidth) {  // they go before those that wait
      reward = select(wait, expand(later.rewards, wait), expand(reward, filled & ~wait));
      value = select(wait, expand(later.values, wait), expand(value, filled & ~wait));
    }
    Vec a = scan(reward, value, later_value, later_advantage, d);
    if (n == kWidth || all(filled)) {
      later_value = value;
      later_advantage = broadcast_first(a);
      waiting = 0;
    } else {
      later.rewards = compress(reward, filled);
      later.values = compress(value, filled);
      waiting += n;
    }
    if (n < kWidth) a = compress(a, filled & ~wait);
    if (kZero) a = select(keep, a, zero);
    store_first(s.advantages + i, a, n);
    store_first(s.returns + i, a + own_value, n);
    report(i, n, a);
  };
  int64_t i = end;
  if (waiting > 0) {
    const int64_t n = end - begin < kWidth - waiting ? end - begin : kWidth - waiting;
    step(i -= n, static_cast<int>(n));
  }
  for (; i - begin >= kWidth; i -= kWidth) step(i - kWidth, kWidth);
  if (i > begin) step(begin, static_cast<int>(i - begin));
  later.value = later_value;
  later.advantage = later_advantage;
  later.waiting = waiting;
}

// How far before `end` the mask goes on to be 1, or to be 0.
int64_t run_begin(const uint8_t* mask, int64_t end, bool counts) {
  while (end >= kBytes && count_bytes(mask + end - kBytes) == (counts ? kBytes : 0)) end -= kBytes;
  while (end > 0 && (mask[end - 1] != 0) == counts) --end;
  return end;
}

constexpr int64_t kLongRun = 64;

template <class Token, class Report>
FASTRLHF_INLINE void sequence(MaskMode mode, int64_t length, float bootstrap_value, const Discounts& d,
                              const Streams& s, const Token& token, const Report& report) {
  Later later = {Vec(bootstrap_value), Vec(0.0f), Vec(0.0f), Vec(0.0f), 0};
  if (mode == kZero) return in_place<true>(0, length, later, d, s, token, report);
  if (mode == kNone) return in_place<false>(0, length, later, d, s, token, report);
  for (int64_t end = length; end > 0;) {
    const int64_t last = run_begin(s.mask, end, false);
    memset(s.advantages + last, 0, (end - last) * sizeof(float));
    memset(s.returns + last, 0, (end - last) * sizeof(float));
    end = run_begin(s.mask, last, true);
    if (last - end >= kLongRun) {
      in_place<false>(end, last, later, d, s, token, report);
    } else if (last > 0) {
      end = last < kChunk ? 0 : last - kChunk;
      gathered(end, last, later, d, s, token, report);
    }
  }
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
    sequence(mode, length, bootstrap_value, d, s, token, [](int64_t, int, Vec) {});
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
    const int64_t last = run_begin(s.mask, a.length, false) - 1;  // -1: no token counts
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
      if (i <= last && last < i + n) {
        const int lane = static_cast<int>(last - i);
        const Mask at_last = first_lanes(lane + 1) & ~first_lanes(lane);
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
    sequence(a.mask_mode, a.length, bootstrap_value, d, s, token, report);
    flush(kl);
    a.kl[b] = static_cast<float>(kl.total);
    a.moments[b] = moments_of(spread);
  }
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
