// The table of CPU kernels, and their arguments: plain memory, so that the hot files need nothing of torch.
//
// Every kernel works on a range [begin, end) of rows, units or elements and is called from several threads at once; what
// it computes for one of them does not depend on how the range was cut.
#pragma once

#include <stdint.h>

namespace fastrlhf {

enum DType { kFloat32, kBFloat16, kFloat16 };
// The enumerations of the raw ops; fastrlhf/fallback.py has them by name.
enum KlEstimator { kK1, kK2, kK3, kAbs };
enum MaskMode { kCarry, kZero, kNone };
enum DpoVariant { kDpoSigmoid, kDpoRobust, kDpoHinge, kDpoIpo };
enum Norm { kNoNorm, kRmsNorm, kLayerNorm };
enum Activation { kIdentity, kSilu, kGelu, kGeluByTanh };
enum Aggregation { kTokenMean, kSeqMeanTokenSum, kSeqMeanTokenMean };

constexpr int64_t kIgnored = -100;
// The row counts, but its token lies in another shard of the vocabulary. Nothing that a mistake about labels yields, as
// -101 would be: those stay errors.
constexpr int64_t kElsewhere = INT64_MIN;

struct LogProbArgs {
  const void* logits;
  const int64_t* row_offset;  // in elements, for rows that lie anywhere
  const int64_t* tokens;
  int64_t vocabulary;
  DType dtype;
  float temperature;
  float* log_probs;
  float* entropy;     // null: not wanted
  float* normaliser;  // two a row: m and log s, logsumexp = m/T + log s
};

struct LogProbGradArgs {
  const void* logits;
  const int64_t* row_offset;
  void* grad_logits;  // may be the logits themselves
  const int64_t* grad_row_offset;
  const int64_t* tokens;
  int64_t vocabulary;
  DType dtype;
  float temperature;
  const float* grad_log_probs;
  const float* grad_entropy;  // null: no entropy was asked for
  const float* normaliser;
  const float* entropy;
};

// The LM head. Logits lie as [vocabulary][tokens of a chunk]; see kernels/lm_head.cpp. Blocks of fixed length, which the
// order of summation hangs on:
constexpr int64_t kLmTokens = 128;       // of tokens, in the gradients of weight and bias; chunks begin at multiples of it
constexpr int64_t kLmPadding = 64;       // `padded` is a multiple of it
constexpr int64_t kLmVocabulary = 384;   // of the vocabulary, in the gradient of the hidden states
constexpr int64_t kLmSegment = 768;      // of the vocabulary, in the statistics
constexpr int64_t kLmTile = 96;          // the most rows of the vocabulary that are in the works at a time
constexpr int64_t kLmHiddenBlock = 96;   // columns of a task of lm_head_hidden_gradient
constexpr int64_t kLmSlopes = 5;

struct LmHeadArgs {
  const void* hidden;
  const int64_t* row_offset;  // of the chunk's tokens, in elements
  const void* weight;
  int64_t weight_stride;
  const void* bias;  // null: none
  int64_t vocabulary, size;
  DType dtype;
  float temperature, softcap;  // infinity: none
  int64_t tile;                // rows of a tile: even, at most kLmTile, a divisor of the blocks above
  int64_t tokens, padded, stride;  // of the chunk; stride: between the rows of `logits` and of `grad_hidden`
  const int64_t* targets;
  void* by_token;   // the packed hidden states
  void* by_hidden;  // null: not needed
  float* logits;    // from row `origin` on; null: logits live as long as their statistics need them
  int64_t origin;
  float* parts;          // [segments][3][padded]
  float* target_logits;  // [padded]
  float* log_probs;      // of the chunk's tokens, as are the next two
  float* entropy;
  float* normaliser;
  // Of the gradients: rows first .. first + count of the vocabulary.
  const float* slopes;  // [kLmSlopes][padded]: m, log2 s, a, b, entropy in bits; see RowGradient in kernels/log_probs.cpp
  bool with_entropy;
  bool recompute;    // logits are not there yet
  bool first_chunk;  // overwrite the sums over tokens
  int64_t first, count, splits;
  float* grad_weight;      // [V, H]; null: not wanted, as are the others
  void* grad_weight_rounded;  // in its place, in the dtype, where one chunk is all
  float* grad_bias;        // [V]
  float* grad_hidden;      // [H][stride]
  void* grad_hidden_rows;  // where it goes in the end
  const int64_t* grad_row;
};

struct NarrowArgs {
  const float* from;
  void* to;
  DType dtype;
};

struct FullKlArgs {
  const void* logits;
  const void* ref_logits;
  const int64_t* row_offset;
  const int64_t* ref_row_offset;
  const uint8_t* mask;  // null: every row counts
  int64_t vocabulary;
  DType dtype, ref_dtype;
  float temperature;
  float* kl;  // these three: written forward, read backward
  float* normaliser;
  float* ref_normaliser;
  const float* grad;
  void* grad_logits;      // contiguous; null: not wanted
  void* grad_ref_logits;  // likewise
};

// Linear layers of few rows. A panel holds kPackedRows rows of a weight in the order of kernels/packed_linear.cpp.
constexpr int64_t kPackedRows = 64;

struct PackArgs {
  const void* weight;
  int64_t weight_stride, rows, columns;
  DType dtype, packed_dtype;
  void* packed;
  int64_t panel_size, first, step;  // panel_size in elements
};

struct PackedLinearArgs {
  const float* x;
  int64_t x_stride, rows, columns;
  void* left;  // the rows as the product takes them
  const void* packed;
  int64_t panel_size;
  DType dtype;
  const float* bias;         // null: none
  int norm;
  const float* norm_weight;  // null: 1
  const float* norm_bias;    // null: 0
  float eps;
  int activation;
  bool gated, adds;
  float* out;
  int64_t out_stride, width;  // width: columns of out
};

// Rows of a block, in the gradient of a norm's weight: what the order of summation hangs on.
constexpr int64_t kNormRows = 32;

struct RmsNormArgs {
  const void* x;
  const void* weight;
  DType dtype;  // of all but rstd
  int64_t columns;
  float eps;
  void* y;
  float* rstd;
};

struct RmsNormGradArgs {
  const void* grad;
  const void* x;
  const void* weight;
  const float* rstd;
  DType dtype;
  int64_t rows, columns;
  void* grad_x;        // null: not wanted
  float* grad_weight;  // [blocks][columns]; null: not wanted
};

struct SwigluArgs {
  const void* gate;
  const void* up;
  DType dtype;
  void* y;
};

struct SwigluGradArgs {
  const void* grad;
  const void* gate;
  const void* up;
  DType dtype;
  void* grad_gate;
  void* grad_up;
};

struct RotateArgs {
  const void* x;
  DType dtype;
  int64_t length, heads, head_dim;
  int64_t sequence_stride, position_stride, head_stride;  // of x, in elements
  const float* cos;
  const float* sin;
  int64_t angle_stride;  // from one sequence's angles to the next one's; 0: all have the same
  bool back;
  void* y;
};

// Positions of a page of the KV cache.
constexpr int64_t kPage = 16;

struct AttentionArgs {
  const float* qkv;
  int64_t qkv_stride;
  void* keys;    // [pages][kv_heads][head_dim][kPage]
  void* values;  // [pages][kv_heads][kPage][head_dim]
  DType dtype;
  const int32_t* pages;
  int64_t pages_stride;
  const int64_t* sequence;
  const int64_t* position;
  const float* cos;  // [positions][rotary]; null: no rotation, as sin
  const float* sin;
  int64_t rotary;  // half of the elements that are rotated
  const float* q_norm;  // null: none
  const float* k_norm;
  float scale, softcap, eps;
  int64_t window;  // 0: all
  int64_t heads, kv_heads, head_dim;
  float* out;
};

struct SampleArgs {
  const void* logits;
  const int64_t* row_offset;
  int64_t vocabulary;
  DType dtype;
  float temperature, top_p, min_p;  // temperature 0: the most likely token
  int64_t top_k;
  const int64_t* seed;
  const int64_t* sequence;
  const int64_t* position;
  int64_t* tokens;  // -1 for a row without a distribution
  float* log_probs;
};

// [rows, columns] cut into units of at most `length` columns. A unit is summed by one thread, units are added up in
// order: results are the same for every number of threads.
struct Units {
  int64_t rows, columns, length, per_row;
};

// Where a unit lies in memory. Static, so that every hot file keeps a copy of its own.
struct Span {
  int64_t start, length;
};

static inline Span span_of(const Units& units, int64_t unit) {
  const int64_t row = unit / units.per_row, column = unit % units.per_row * units.length;
  const int64_t rest = units.columns - column;
  return {row * units.columns + column, rest < units.length ? rest : units.length};
}

struct Moments {
  double count, mean, squares;  // squares: sum of (x - mean)^2
};

struct CountArgs {
  const uint8_t* mask;
  Units units;
  int64_t* result;  // one for each unit
};

struct MomentsArgs {
  const float* x;
  const uint8_t* mask;
  Units units;
  Moments* result;  // one for each unit
};

struct WhitenArgs {
  const float* x;
  const uint8_t* mask;
  float* whitened;
  float mean, rstd, shift;  // (x - mean) * rstd + shift
};

struct KlArgs {
  const float* log_probs;
  const float* ref_log_probs;
  const float* grad;  // null: write the value, else grad times the slope
  float* result;
  int estimator;
  float clamp_input, clamp_output;
};

struct GaeArgs {
  const float* rewards;
  const float* values;
  const uint8_t* mask;            // null: everything counts
  const float* bootstrap_values;  // null: 0
  float* advantages;
  float* returns;
  const int64_t* ends;  // sequence b is ends[b] .. ends[b + 1]; null: all have `length`
  int64_t length;
  float gamma, lam;
  MaskMode mask_mode;
};

struct RolloutArgs {
  const float* scores;
  const float* log_probs;
  const float* ref_log_probs;
  const float* values;
  const uint8_t* mask;
  const float* token_rewards;     // null: none
  const float* bootstrap_values;  // null: 0
  float* advantages;
  float* returns;
  float* kl;         // one for each sequence, as are
  Moments* moments;  // of its advantages
  int64_t length;
  float kl_coef, score_clip, gamma, lam;
  int kl_estimator;
  MaskMode mask_mode;
};

struct PpoSums {
  double surrogate, approx_kl, clipped, dual_clipped, ratio, entropy, kl;
  float ratio_min, ratio_max;
};

struct PpoArgs {
  const float* log_probs;
  const float* old_log_probs;
  const float* advantages;
  const uint8_t* mask;
  const float* weights;        // null: 1
  const float* entropy;        // null: none
  const float* ref_log_probs;  // null: none
  Units units;
  const int64_t* counts;  // tokens that count, in each unit
  double denominator;     // what the sum over units is divided by
  float advantage_mean, advantage_rstd;
  float clip_low, clip_high;  // the bounds 1 - low and 1 + high
  float dual_clip, log_ratio_clamp, entropy_coef, kl_coef;
  int kl_estimator;
  bool sequence_ratio, per_token_mean;  // per_token_mean: divide a unit's sum by its count
  float* grad_log_probs;                // null: not wanted
  float* grad_entropy;                  // null: not wanted
  PpoSums* result;                      // one for each unit, not yet divided by anything
};

struct ValueSums {
  double loss, clipped;
  Moments value, target, error;  // error: target - value
};

struct ValueArgs {
  const float* values;
  const float* old_values;  // null: no clip
  const float* returns;
  const uint8_t* mask;
  Units units;
  const int64_t* counts;
  double denominator;
  float clip;
  bool per_token_mean;
  float* grad_values;  // null: not wanted
  ValueSums* result;
};

struct Kernels {
  void (*log_probs)(const LogProbArgs&, int64_t begin, int64_t end);
  void (*log_probs_backward)(const LogProbGradArgs&, int64_t begin, int64_t end);
  void (*lm_head_pack)(const LmHeadArgs&, int64_t begin, int64_t end);             // blocks of kLmPadding
  void (*lm_head_logits)(const LmHeadArgs&, int64_t begin, int64_t end);           // segments
  void (*lm_head_rows)(const LmHeadArgs&, int64_t begin, int64_t end);             // tokens
  void (*lm_head_gradient)(const LmHeadArgs&, int64_t begin, int64_t end);         // tiles
  void (*lm_head_hidden_gradient)(const LmHeadArgs&, int64_t begin, int64_t end);  // blocks of H times splits
  void (*lm_head_store_hidden)(const LmHeadArgs&, int64_t begin, int64_t end);     // tokens
  void (*narrow)(const NarrowArgs&, int64_t begin, int64_t end);                   // elements
  void (*full_kl)(const FullKlArgs&, int64_t begin, int64_t end);
  void (*full_kl_backward)(const FullKlArgs&, int64_t begin, int64_t end);
  void (*rms_norm)(const RmsNormArgs&, int64_t begin, int64_t end);               // rows
  void (*rms_norm_backward)(const RmsNormGradArgs&, int64_t begin, int64_t end);  // blocks of kNormRows
  void (*swiglu)(const SwigluArgs&, int64_t begin, int64_t end);                  // elements
  void (*swiglu_backward)(const SwigluGradArgs&, int64_t begin, int64_t end);     // elements
  void (*rotate)(const RotateArgs&, int64_t begin, int64_t end);                  // tokens
  void (*pack_weight)(const PackArgs&, int64_t begin, int64_t end);            // panels
  void (*packed_rows)(const PackedLinearArgs&, int64_t begin, int64_t end);    // rows
  void (*packed_linear)(const PackedLinearArgs&, int64_t begin, int64_t end);  // panels of out
  void (*cache_rows)(const AttentionArgs&, int64_t begin, int64_t end);        // rows
  void (*attention)(const AttentionArgs&, int64_t begin, int64_t end);         // rows times kv_heads
  void (*sample)(const SampleArgs&, int64_t begin, int64_t end);               // rows
  void (*kl)(const KlArgs&, int64_t begin, int64_t end);
  void (*gae)(const GaeArgs&, int64_t begin, int64_t end);
  void (*rollout)(const RolloutArgs&, int64_t begin, int64_t end);
  void (*count)(const CountArgs&, int64_t begin, int64_t end);
  void (*ppo)(const PpoArgs&, int64_t begin, int64_t end);
  void (*value)(const ValueArgs&, int64_t begin, int64_t end);
  void (*moments)(const MomentsArgs&, int64_t begin, int64_t end);
  void (*whiten)(const WhitenArgs&, int64_t begin, int64_t end);
};

// The table for cpu_capability().
const Kernels& kernels();

}  // namespace fastrlhf
