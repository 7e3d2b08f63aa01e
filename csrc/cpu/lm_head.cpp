// The LM head on CPU, torch-facing side: chunks of tokens, and what is kept of them. The arithmetic is in
// kernels/lm_head.cpp, the products in kernels/product.h.
//
// Tokens that do not count are left out before anything is computed. A backward pass has the slopes of the log-probs when
// it begins and needs the logits of a stretch of the vocabulary at a time; a loss has them when a chunk's rows are
// complete, and keeps the chunk's logits until then.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "losses.h"
#include "rows.h"

namespace fastrlhf {
namespace {

constexpr int64_t kMostTokens = 1024;  // of a chunk: from there on, reading the weight again costs nothing to speak of
constexpr int64_t kStretch = 4 * kLmVocabulary;      // rows whose logits are recomputed at a time
constexpr int64_t kKeptStretch = 16 * kLmVocabulary;  // rows of kept logits between two barriers: they stay in L3
constexpr int64_t kTileBytes = 384 << 10;            // of a tile of the weight: L2 holds it, and a panel of hidden states

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

int64_t tile_rows(int64_t size) {
  int64_t rows = kLmTile;
  while (rows > 24 && rows * size * static_cast<int64_t>(sizeof(float)) > kTileBytes) rows /= 2;
  return rows;
}

struct Gradients {
  Tensor hidden, weight, bias;    // as the op returns them
  Tensor weight_sums, bias_sums;  // fp32; the same as weight and bias where those are fp32
  bool needs_hidden, needs_weight, needs_bias;
};

class LmHead {
 public:
  LmHead(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& tokens,
         const Tensor& head_numbers)
      : hidden_(with_last_stride(hidden)), weight_(with_last_stride(weight)) {
    require(hidden.dim() == 2 && hidden.is_cpu(), "hidden", "[N, H] on CPU");
    require(weight.dim() == 2 && weight.is_cpu() && weight.numel() >= 1 && weight.size(1) == hidden.size(1) &&
                weight.scalar_type() == hidden.scalar_type(),
            "weight", "[V, H] on CPU, V and H >= 1, in the dtype of hidden");
    require(tokens.is_cpu() && tokens.scalar_type() == ScalarType::Long && tokens.numel() == hidden.size(0), "tokens",
            "int64 on CPU, one for each row of hidden");
    if (bias.has_value()) {
      require(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                  bias->scalar_type() == hidden.scalar_type(),
              "bias", "[V] on CPU, in the dtype of hidden");
      bias_ = whole(*bias);
    }
    tokens_ = checked_tokens(tokens, weight.size(0));
    const float* number = numbers("numbers", head_numbers, 2);
    args_ = {};
    args_.temperature = checked_temperature(number[0]);
    args_.softcap = number[1];
    args_.hidden = hidden_.const_data_ptr();
    args_.weight = weight_.const_data_ptr();
    args_.weight_stride = weight_.stride(0);
    args_.bias = bias_.has_value() ? bias_->const_data_ptr() : nullptr;
    args_.vocabulary = weight.size(0);
    args_.size = weight.size(1);
    args_.dtype = dtype_of(hidden, "hidden");
    args_.tile = tile_rows(args_.size);
  }

  // The log-probs of the tokens in `counts`, and with `after`, which turns a chunk's rows into slopes, the gradients too.
  // after(first, n, grad_log_probs, grad_entropy): of n tokens from `first` on in `counts`.
  using After = std::function<void(int64_t first, int64_t n, float* grad_log_probs, float* grad_entropy)>;

  void forward(const std::vector<int64_t>& counts, int64_t chunk_bytes, float* log_probs, float* entropy,
               float* normaliser, Gradients* gradients, bool entropy_slopes, const After& after);
  void backward(const std::vector<int64_t>& counts, int64_t chunk_bytes, const float* normaliser, const float* entropy,
                const float* grad_log_probs, const float* grad_entropy, Gradients& gradients);

  std::vector<int64_t> counting() const {
    std::vector<int64_t> counts;
    const int64_t* ids = static_cast<const int64_t*>(tokens_.const_data_ptr());
    for (int64_t n = 0; n < tokens_.numel(); ++n)
      if (ids[n] != kIgnored) counts.push_back(n);
    return counts;
  }
  Gradients new_gradients(bool needs_hidden, bool needs_weight, bool needs_bias, bool weight_grad_in_fp32) const;
  void finish(Gradients& gradients, const std::vector<int64_t>& counts) const;

 private:
  // One chunk's memory, and its place in `args_`.
  struct Chunk {
    Tensor by_token, by_hidden, logits, parts, target_logits, slopes, grad_hidden, log_probs, entropy, normaliser;
    std::vector<int64_t> offsets, targets;
  };

  static Tensor with_last_stride(const Tensor& x) {
    return x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1) ? x : torch::stable::contiguous(x);
  }
  int64_t segments() const { return ceil_div(args_.vocabulary, kLmSegment); }
  // Balanced, and a multiple of kLmTokens unless one chunk is all.
  static int64_t chunk_length(int64_t tokens, int64_t chunk_bytes, int64_t numbers_a_token) {
    const int64_t fit = chunk_bytes / (numbers_a_token * static_cast<int64_t>(sizeof(float)));
    const int64_t most = std::min(std::max(fit / kLmTokens * kLmTokens, kLmTokens), kMostTokens);
    return std::min(round_up(ceil_div(tokens, ceil_div(tokens, most)), kLmTokens), round_up(tokens, kLmPadding));
  }
  void place(Chunk& chunk, const std::vector<int64_t>& counts, int64_t first, int64_t n, bool by_hidden);
  void set_slopes(Chunk& chunk, int64_t n, const float* grad_log_probs, const float* grad_entropy);
  void add_gradients(Chunk& chunk, Gradients& gradients, bool recompute, bool last_chunk);

  Tensor hidden_, weight_, tokens_;
  OptionalTensor bias_;
  LmHeadArgs args_;
};

Gradients LmHead::new_gradients(bool needs_hidden, bool needs_weight, bool needs_bias, bool weight_grad_in_fp32) const {
  const ScalarType dtype = weight_.scalar_type();
  const bool fp32 = dtype == ScalarType::Float;
  const auto some = [](std::initializer_list<int64_t> shape, ScalarType type, bool wanted) {
    return wanted ? torch::stable::empty(std::vector<int64_t>(shape), type)
                  : torch::stable::empty(std::vector<int64_t>{0}, type);
  };
  const int64_t v = args_.vocabulary, h = args_.size;
  Gradients g = {some({hidden_.size(0), h}, dtype, needs_hidden),
                 some({v, h}, weight_grad_in_fp32 ? ScalarType::Float : dtype, needs_weight),
                 some({v}, dtype, needs_bias && bias_.has_value()),
                 {},
                 {},
                 needs_hidden,
                 needs_weight,
                 needs_bias && bias_.has_value()};
  g.weight_sums = g.weight;  // until there is more than one chunk to sum up; see add_gradients
  g.bias_sums = fp32 || !g.needs_bias ? g.bias : new_floats({v});
  return g;
}

void narrow_into(const Tensor& to, const Tensor& from) {
  if (to.mutable_data_ptr() == from.mutable_data_ptr()) return;
  const NarrowArgs args = {read(from), to.mutable_data_ptr(), dtype_of(to)};
  run(kernels().narrow, args, to.numel(), kThreadsWorth);
}

void zero(const Tensor& x) { memset(x.mutable_data_ptr(), 0, x.numel() * (x.scalar_type() == ScalarType::Float ? 4 : 2)); }

// What no chunk wrote: the rows of tokens that were left out, or everything. Then the sums, rounded.
void LmHead::finish(Gradients& g, const std::vector<int64_t>& counts) const {
  if (g.needs_hidden && static_cast<int64_t>(counts.size()) < g.hidden.size(0)) {
    const int64_t bytes = args_.size * (args_.dtype == kFloat32 ? 4 : 2);
    char* rows = static_cast<char*>(g.hidden.mutable_data_ptr());
    size_t next = 0;
    for (int64_t n = 0; n < g.hidden.size(0); ++n) {
      if (next < counts.size() && counts[next] == n)
        ++next;
      else
        memset(rows + n * bytes, 0, bytes);
    }
  }
  if (counts.empty()) {
    if (g.needs_weight) zero(g.weight);
    if (g.needs_bias) zero(g.bias);
    return;
  }
  if (g.needs_weight) narrow_into(g.weight, g.weight_sums);
  if (g.needs_bias) narrow_into(g.bias, g.bias_sums);
}

// The chunk of n tokens from counts[first] on: packed, with memory for the rest.
void LmHead::place(Chunk& chunk, const std::vector<int64_t>& counts, int64_t first, int64_t n, bool by_hidden) {
  const int64_t* ids = static_cast<const int64_t*>(tokens_.const_data_ptr());
  chunk.offsets.resize(n);
  chunk.targets.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    chunk.offsets[i] = counts[first + i] * hidden_.stride(0);
    chunk.targets[i] = ids[counts[first + i]];
  }
  args_.row_offset = chunk.offsets.data();
  args_.grad_row = counts.data() + first;
  args_.targets = chunk.targets.data();
  args_.tokens = n;
  args_.first_chunk = first == 0;
  const int64_t padded = round_up(n, kLmPadding);
  if (padded != args_.padded) {  // of the first chunk, and perhaps of the last
    args_.padded = padded;
    args_.stride = padded + 16;  // not a power of two; see weight_stride in kernels/lm_head.cpp
    chunk.by_token = new_floats({padded, args_.size});
    chunk.by_hidden = by_hidden ? new_floats({padded, round_up(args_.size, kLmPadding)}) : new_floats({0});
    args_.by_token = chunk.by_token.mutable_data_ptr();
    args_.by_hidden = by_hidden ? chunk.by_hidden.mutable_data_ptr() : nullptr;
  }
  run(kernels().lm_head_pack, args_, padded / kLmPadding, 1);
}

void LmHead::set_slopes(Chunk& chunk, int64_t n, const float* grad_log_probs, const float* grad_entropy) {
  constexpr double kLn2 = 0.69314718055994530942;
  const int64_t padded = args_.padded;
  float* to = write(chunk.slopes);
  std::fill(to, to + kLmSlopes * padded, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    to[i] = args_.normaliser[2 * i];
    to[padded + i] = args_.normaliser[2 * i + 1] * static_cast<float>(1.0 / kLn2);
    to[2 * padded + i] = grad_log_probs[i] / args_.temperature;
    if (grad_entropy == nullptr) continue;
    to[3 * padded + i] = grad_entropy[i] * static_cast<float>(kLn2) / args_.temperature;
    to[4 * padded + i] = args_.entropy[i] * static_cast<float>(1.0 / kLn2);
  }
  args_.slopes = to;
  args_.with_entropy = grad_entropy != nullptr;
}

void LmHead::add_gradients(Chunk& chunk, Gradients& g, bool recompute, bool last_chunk) {
  const int64_t stretch = recompute ? kStretch : kKeptStretch;
  const int64_t blocks = ceil_div(args_.size, kLmHiddenBlock), parts = args_.padded / kLmPadding;
  args_.recompute = recompute;
  const bool whole = args_.first_chunk && last_chunk;  // nothing to sum up
  if (g.needs_weight && !whole && g.weight_sums.scalar_type() != ScalarType::Float)
    g.weight_sums = new_floats({args_.vocabulary, args_.size});
  const bool sums = g.weight_sums.scalar_type() == ScalarType::Float;
  args_.grad_weight = g.needs_weight && sums ? write(g.weight_sums) : nullptr;
  args_.grad_weight_rounded = g.needs_weight && !sums ? g.weight.mutable_data_ptr() : nullptr;
  args_.grad_bias = g.needs_bias ? write(g.bias_sums) : nullptr;
  // Enough tasks to be shared evenly: some for each thread.
  const int64_t wanted = 3 * static_cast<int64_t>(torch::stable::get_num_threads());
  args_.splits = std::min(parts, std::max<int64_t>(1, ceil_div(wanted, blocks)));
  if (g.needs_hidden) {
    if (chunk.grad_hidden.numel() != args_.size * args_.stride) chunk.grad_hidden = new_floats({args_.size, args_.stride});
    args_.grad_hidden = write(chunk.grad_hidden);
    args_.grad_hidden_rows = g.hidden.mutable_data_ptr();
  }
  for (args_.first = 0; args_.first < args_.vocabulary; args_.first += stretch) {
    args_.count = std::min(stretch, args_.vocabulary - args_.first);
    if (recompute) args_.origin = args_.first;
    run(kernels().lm_head_gradient, args_, ceil_div(args_.count, args_.tile), 1);
    if (g.needs_hidden) run(kernels().lm_head_hidden_gradient, args_, blocks * args_.splits, 1);
  }
  if (g.needs_hidden) run(kernels().lm_head_store_hidden, args_, args_.tokens, 16);
}

void LmHead::forward(const std::vector<int64_t>& counts, int64_t chunk_bytes, float* log_probs, float* entropy,
                     float* normaliser, Gradients* gradients, bool entropy_slopes, const After& after) {
  const bool backward_too = gradients != nullptr;
  const int64_t tokens = static_cast<int64_t>(counts.size());
  if (tokens == 0) return;
  const int64_t numbers_a_token = backward_too ? args_.vocabulary + 3 * args_.size : args_.size + 3 * segments();
  const int64_t length = chunk_length(tokens, chunk_bytes, numbers_a_token);
  const bool by_hidden = backward_too && gradients->needs_weight;
  Chunk chunk = {};
  chunk.log_probs = new_floats({length});
  chunk.entropy = new_floats({length});
  chunk.normaliser = new_floats({length, 2});
  args_.log_probs = write(chunk.log_probs);
  args_.entropy = write(chunk.entropy);
  args_.normaliser = write(chunk.normaliser);
  std::vector<float> grad_log_probs(length), grad_entropy(length);
  for (int64_t first = 0; first < tokens; first += length) {
    const int64_t n = std::min(length, tokens - first), before = args_.padded;
    place(chunk, counts, first, n, by_hidden);
    if (args_.padded != before) {
      chunk.parts = new_floats({segments(), 3, args_.padded});
      chunk.target_logits = new_floats({args_.padded});
      if (backward_too) {
        chunk.logits = new_floats({args_.vocabulary, args_.stride});
        chunk.slopes = new_floats({kLmSlopes, args_.padded});
      }
    }
    args_.parts = write(chunk.parts);
    args_.target_logits = write(chunk.target_logits);
    args_.logits = backward_too ? write(chunk.logits) : nullptr;
    args_.origin = 0;
    run(kernels().lm_head_logits, args_, segments(), 1);
    run(kernels().lm_head_rows, args_, n, 64);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = counts[first + i];
      log_probs[row] = args_.log_probs[i];
      entropy[row] = args_.entropy[i];
      if (normaliser == nullptr) continue;
      normaliser[2 * row] = args_.normaliser[2 * i];
      normaliser[2 * row + 1] = args_.normaliser[2 * i + 1];
    }
    if (!backward_too) continue;
    after(first, n, grad_log_probs.data(), grad_entropy.data());
    set_slopes(chunk, n, grad_log_probs.data(), entropy_slopes ? grad_entropy.data() : nullptr);
    add_gradients(chunk, *gradients, false, first + n == tokens);
  }
}

void LmHead::backward(const std::vector<int64_t>& counts, int64_t chunk_bytes, const float* normaliser,
                      const float* entropy, const float* grad_log_probs, const float* grad_entropy, Gradients& g) {
  const int64_t tokens = static_cast<int64_t>(counts.size());
  if (tokens == 0) return;
  const int64_t stretch = std::min(kStretch, args_.vocabulary);
  const int64_t length = chunk_length(tokens, chunk_bytes, stretch + 3 * args_.size);
  Chunk chunk = {};
  chunk.entropy = new_floats({length});
  chunk.normaliser = new_floats({length, 2});
  args_.entropy = write(chunk.entropy);
  args_.normaliser = write(chunk.normaliser);
  std::vector<float> slopes(length), entropy_slopes(length);
  for (int64_t first = 0; first < tokens; first += length) {
    const int64_t n = std::min(length, tokens - first), before = args_.padded;
    place(chunk, counts, first, n, g.needs_weight);
    if (args_.padded != before) {
      chunk.logits = new_floats({stretch, args_.stride});
      chunk.slopes = new_floats({kLmSlopes, args_.padded});
    }
    args_.logits = write(chunk.logits);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = counts[first + i];
      args_.normaliser[2 * i] = normaliser[2 * row];
      args_.normaliser[2 * i + 1] = normaliser[2 * row + 1];
      args_.entropy[i] = entropy[row];
      slopes[i] = grad_log_probs[row];
      entropy_slopes[i] = grad_entropy == nullptr ? 0.0f : grad_entropy[row];
    }
    set_slopes(chunk, n, slopes.data(), grad_entropy == nullptr ? nullptr : entropy_slopes.data());
    add_gradients(chunk, g, true, first + n == tokens);
  }
}

// ---------------------------------------------------------------------------------------------------------- the ops

int64_t checked_chunk(int64_t chunk_bytes) {
  require(chunk_bytes > 0, "chunk_bytes", "a positive number of bytes");
  return chunk_bytes;
}

Tensor zeros_for(int64_t n, int64_t each = 1) {
  Tensor x = each == 1 ? new_floats({n}) : new_floats({n, each});
  std::fill_n(write(x), n * each, 0.0f);
  return x;
}

std::tuple<Tensor, Tensor, Tensor> linear_token_log_probs(const Tensor& hidden, const Tensor& weight,
                                                          const OptionalTensor& bias, const Tensor& tokens,
                                                          const Tensor& head_numbers, int64_t chunk_bytes) {
  LmHead head(hidden, weight, bias, tokens, head_numbers);
  const int64_t n = tokens.numel();
  Tensor log_probs = zeros_for(n), entropy = zeros_for(n), normaliser = zeros_for(n, 2);
  head.forward(head.counting(), checked_chunk(chunk_bytes), write(log_probs), write(entropy), write(normaliser), nullptr,
               false, nullptr);
  return {log_probs, entropy, normaliser};
}

std::tuple<Tensor, Tensor, Tensor> linear_token_log_probs_backward(
    const Tensor& grad_log_probs, const OptionalTensor& grad_entropy, const Tensor& hidden, const Tensor& weight,
    const OptionalTensor& bias, const Tensor& tokens, const Tensor& normaliser, const Tensor& entropy,
    const Tensor& head_numbers, int64_t chunk_bytes, bool needs_hidden, bool needs_weight, bool needs_bias,
    bool weight_grad_in_fp32) {
  LmHead head(hidden, weight, bias, tokens, head_numbers);
  const Tensor g = floats("grad_log_probs", grad_log_probs, tokens), ent = floats("entropy", entropy, tokens);
  const OptionalTensor h = floats("grad_entropy", grad_entropy, tokens);
  const Tensor norm = checked_normaliser(normaliser, tokens);
  const float *slope = read(g), *entropy_slope = read(h);
  std::vector<int64_t> counts = head.counting();
  // A row nobody wants a gradient of may hold anything, and costs nothing.
  counts.erase(std::remove_if(counts.begin(), counts.end(),
                              [&](int64_t n) { return slope[n] == 0.0f && (entropy_slope == nullptr || entropy_slope[n] == 0.0f); }),
               counts.end());
  Gradients gradients = head.new_gradients(needs_hidden, needs_weight, needs_bias, weight_grad_in_fp32);
  head.backward(counts, checked_chunk(chunk_bytes), read(norm), read(ent), slope, entropy_slope, gradients);
  head.finish(gradients, counts);
  return {gradients.hidden, gradients.weight, gradients.bias};
}

using LossAndGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

LossAndGradients linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                                      const Tensor& tokens, const Tensor& head_numbers, int64_t chunk_bytes,
                                      const OptionalTensor& denominator, bool needs_hidden, bool needs_weight,
                                      bool needs_bias, bool weight_grad_in_fp32) {
  LmHead head(hidden, weight, bias, tokens, head_numbers);
  const std::vector<int64_t> counts = head.counting();
  const double tokens_that_count = static_cast<double>(counts.size());
  const double divisor = denominator.has_value() ? *numbers("denominator", *denominator, 1) : tokens_that_count;
  const float slope = static_cast<float>(-ratio_or_zero(1.0, divisor));
  Tensor log_probs = zeros_for(tokens.numel()), entropy = zeros_for(tokens.numel());
  Gradients gradients = head.new_gradients(needs_hidden, needs_weight, needs_bias, weight_grad_in_fp32);
  const bool needs_any = gradients.needs_hidden || gradients.needs_weight || gradients.needs_bias;
  head.forward(counts, checked_chunk(chunk_bytes), write(log_probs), write(entropy), nullptr,
               needs_any ? &gradients : nullptr, false,
               [&](int64_t, int64_t n, float* grad, float*) { std::fill(grad, grad + n, slope); });
  head.finish(gradients, counts);
  double log_prob = 0.0, surprise = 0.0;
  for (const int64_t n : counts) {
    log_prob += read(log_probs)[n];
    surprise += read(entropy)[n];
  }
  const Tensor stats = scalars({ratio_or_zero(surprise, tokens_that_count), tokens_that_count});
  return {scalar(-ratio_or_zero(log_prob, divisor)), stats, gradients.hidden, gradients.weight, gradients.bias};
}

// The inputs of a chunk of the PPO loss, in a row.
class PpoChunk {
 public:
  PpoChunk(const Tensor& old_log_probs, const Tensor& advantages, const OptionalTensor& weights,
           const OptionalTensor& ref_log_probs)
      : old_(read(old_log_probs)), advantages_(read(advantages)), weights_(read(weights)), ref_(read(ref_log_probs)) {}

  // The same arrays of the tokens at `rows`.
  void gather(const int64_t* rows, int64_t n, const float* log_probs, PpoArgs& args) {
    args.log_probs = taken(0, log_probs, rows, n);
    args.old_log_probs = taken(1, old_, rows, n);
    args.advantages = taken(2, advantages_, rows, n);
    args.weights = taken(3, weights_, rows, n);
    args.ref_log_probs = taken(4, ref_, rows, n);
  }

 private:
  const float* taken(int which, const float* from, const int64_t* rows, int64_t n) {
    if (from == nullptr) return nullptr;
    std::vector<float>& to = taken_[which];
    to.resize(n);
    for (int64_t i = 0; i < n; ++i) to[i] = from[rows[i]];
    return to.data();
  }

  const float *old_, *advantages_, *weights_, *ref_;
  std::vector<float> taken_[5];
};

LossAndGradients linear_ppo_loss(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                                 const Tensor& tokens, const Tensor& head_numbers, int64_t chunk_bytes,
                                 const Tensor& old_log_probs, const Tensor& advantages, const Tensor& mask,
                                 const OptionalTensor& weights, const OptionalTensor& advantage_stats,
                                 const OptionalTensor& ref_log_probs, const OptionalTensor& denominator,
                                 const Tensor& options, int64_t kl_estimator, int64_t aggregation, bool needs_hidden,
                                 bool needs_weight, bool needs_bias, bool weight_grad_in_fp32) {
  LmHead head(hidden, weight, bias, tokens, head_numbers);
  const Tensor old = floats("old_log_probs", old_log_probs, tokens), adv = floats("advantages", advantages, tokens);
  const Tensor kept = bools("mask", mask, tokens);
  const OptionalTensor w = floats("weights", weights, tokens), ref = floats("ref_log_probs", ref_log_probs, tokens);
  require(kl_estimator >= kK1 && kl_estimator <= kAbs, "kl_estimator", "0 to 3: k1, k2, k3, abs");
  const float* option = numbers("options", options, 6);
  float mean = 0.0f, rstd = 1.0f;
  if (advantage_stats.has_value()) std::tie(mean, rstd) = mean_and_rstd(*advantage_stats);

  Tensor log_probs = new_floats_like(tokens), entropy = new_floats_like(tokens);
  for (const Tensor& x : {log_probs, entropy}) std::fill_n(write(x), tokens.numel(), 0.0f);
  Division division = divide(log_probs, kept, denominator, aggregation, false);
  std::vector<int64_t> counts = head.counting();
  counts.erase(std::remove_if(counts.begin(), counts.end(), [&](int64_t n) { return read_mask(kept)[n] == 0; }),
               counts.end());

  // A chunk is one unit, whose sums nobody divides; shares of the tokens are multiplied in afterwards.
  const float entropy_coef = option[4];
  PpoChunk inputs(old, adv, w, ref);
  PpoSums unused;
  std::vector<uint8_t> all;
  int64_t count = 0;
  PpoArgs args = {};
  args.counts = &count;
  args.denominator = 1.0;
  args.advantage_mean = mean;
  args.advantage_rstd = rstd;
  args.clip_low = 1.0f - option[0];
  args.clip_high = 1.0f + option[1];
  args.dual_clip = option[2];
  args.log_ratio_clamp = option[3];
  args.kl_coef = option[5];
  args.kl_estimator = static_cast<int>(kl_estimator);
  args.result = &unused;
  const auto share_of = [&](int64_t row) {
    if (division.denominator == 0.0) return 0.0f;
    const int64_t per_unit = division.units.columns > 0 ? division.units.columns : 1;
    const double length = division.per_token_mean ? static_cast<double>(division.counts[row / per_unit]) : 1.0;
    return static_cast<float>(1.0 / (division.denominator * length));
  };
  const auto slopes = [&](int64_t first, int64_t n, float* grad_log_probs, float* grad_entropy) {
    const int64_t* rows = counts.data() + first;
    inputs.gather(rows, n, read(log_probs), args);
    all.assign(n, 1);
    count = n;
    args.mask = all.data();
    args.units = {1, n, n, 1};
    args.grad_log_probs = grad_log_probs;
    kernels().ppo(args, 0, 1);
    for (int64_t i = 0; i < n; ++i) {
      const float share = share_of(rows[i]);
      grad_log_probs[i] *= share;
      grad_entropy[i] = -entropy_coef * share;
    }
  };

  Gradients gradients = head.new_gradients(needs_hidden, needs_weight, needs_bias, weight_grad_in_fp32);
  const bool needs_any = gradients.needs_hidden || gradients.needs_weight || gradients.needs_bias;
  head.forward(counts, checked_chunk(chunk_bytes), write(log_probs), write(entropy), nullptr,
               needs_any ? &gradients : nullptr, entropy_coef != 0.0f, slopes);
  head.finish(gradients, counts);
  const auto [loss, stats, _, __] = ppo_loss(log_probs, old, adv, kept, w, advantage_stats, entropy, ref, denominator,
                                             options, kl_estimator, false, aggregation, false);
  return {loss, stats, gradients.hidden, gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("linear_token_log_probs", TORCH_BOX(&fastrlhf::linear_token_log_probs));
  m.impl("linear_token_log_probs_backward", TORCH_BOX(&fastrlhf::linear_token_log_probs_backward));
  m.impl("linear_cross_entropy", TORCH_BOX(&fastrlhf::linear_cross_entropy));
  m.impl("linear_ppo_loss", TORCH_BOX(&fastrlhf::linear_ppo_loss));
}
