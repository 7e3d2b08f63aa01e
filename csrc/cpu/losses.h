// What ppo_loss shares with the losses that begin at the LM head.
#pragma once

#include <tuple>
#include <utility>

#include "tensors.h"

namespace fastrlhf {

// How a loss is divided: over units of fixed length for a mean over tokens, over sequences for everything else.
struct Division {
  Units units;
  Scratch<int64_t> counts;
  double tokens = 0.0, denominator = 0.0;
  bool per_token_mean;
};

// Whitening: what comes as advantage_stats.
std::pair<float, float> mean_and_rstd(const Tensor& advantage_stats);

Division divide(const Tensor& x, const Tensor& mask, const OptionalTensor& denominator, int64_t aggregation,
                bool by_sequence);

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss(
    const Tensor& log_probs, const Tensor& old_log_probs, const Tensor& advantages, const Tensor& mask,
    const OptionalTensor& weights, const OptionalTensor& advantage_stats, const OptionalTensor& entropy,
    const OptionalTensor& ref_log_probs, const OptionalTensor& denominator, const Tensor& options,
    int64_t kl_estimator, bool sequence_ratio, int64_t aggregation, bool needs_grad);

}  // namespace fastrlhf
