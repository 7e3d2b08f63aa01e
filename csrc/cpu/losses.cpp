// ppo_loss and value_loss on CPU: torch-facing side. Counts the tokens, runs the kernel over units
// and adds the units up in order.

#include <algorithm>
#include <cmath>
#include <limits>

#include "losses.h"

namespace fastrlhf {

std::pair<float, float> mean_and_rstd(const Tensor& advantage_stats) {
  require(advantage_stats.dim() == 1 && advantage_stats.size(0) == 2, "advantage_stats", "[2]: mean and 1/std");
  const Tensor stats = floats("advantage_stats", advantage_stats, advantage_stats);
  return {read(stats)[0], read(stats)[1]};
}

Division divide(const Tensor& x, const Tensor& mask, const OptionalTensor& denominator, int64_t aggregation,
                bool by_sequence) {
  require(aggregation >= kTokenMean && aggregation <= kSeqMeanTokenMean, "aggregation",
          "0 to 2: token-mean, seq-mean-token-sum, seq-mean-token-mean");
  by_sequence = by_sequence || aggregation != kTokenMean;
  require(!by_sequence || x.dim() == 2, "the first argument", "[B, T], because sequences are aggregated");
  const Units units = by_sequence ? row_units(x.size(0), x.size(1)) : flat_units(x.numel());
  Division d = {units, Scratch<int64_t>(number_of(units))};
  run(kernels().count, {read_mask(mask), units, d.counts.data()}, number_of(units), 16 * grain_of(units.length));
  d.per_token_mean = aggregation == kSeqMeanTokenMean;
  double sequences = 0.0;
  for (const int64_t n : d.counts) {
    d.tokens += static_cast<double>(n);
    sequences += n > 0 ? 1.0 : 0.0;
  }
  d.denominator = aggregation == kTokenMean ? d.tokens : sequences;
  if (denominator.has_value()) {
    require(denominator->is_cpu() && denominator->scalar_type() == ScalarType::Float && denominator->numel() == 1,
            "denominator", "one fp32 number on CPU");
    d.denominator = *read(*denominator);
  }
  return d;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss(
    const Tensor& log_probs, const Tensor& old_log_probs, const Tensor& advantages, const Tensor& mask,
    const OptionalTensor& weights, const OptionalTensor& advantage_stats, const OptionalTensor& entropy,
    const OptionalTensor& ref_log_probs, const OptionalTensor& denominator, const Tensor& options,
    int64_t kl_estimator, bool sequence_ratio, int64_t aggregation, bool needs_grad) {
  const Tensor lp = floats("log_probs", log_probs, log_probs);
  const Tensor old = floats("old_log_probs", old_log_probs, log_probs);
  const Tensor adv = floats("advantages", advantages, log_probs);
  const Tensor kept = bools("mask", mask, log_probs);
  const OptionalTensor w = floats("weights", weights, log_probs), ent = floats("entropy", entropy, log_probs),
                       ref = floats("ref_log_probs", ref_log_probs, log_probs);
  require(kl_estimator >= kK1 && kl_estimator <= kAbs, "kl_estimator", "0 to 3: k1, k2, k3, abs");
  const float* option = numbers("options", options, 6);
  const float entropy_coef = option[4], kl_coef = option[5];
  float mean = 0.0f, rstd = 1.0f;
  if (advantage_stats.has_value()) std::tie(mean, rstd) = mean_and_rstd(*advantage_stats);

  Division d = divide(lp, kept, denominator, aggregation, sequence_ratio);
  Tensor grad_log_probs = grad_like(lp, needs_grad), grad_entropy = grad_like(lp, needs_grad && ent.has_value());
  Scratch<PpoSums> parts(number_of(d.units));
  const PpoArgs args = {read(lp),
                        read(old),
                        read(adv),
                        read_mask(kept),
                        read(w),
                        read(ent),
                        read(ref),
                        d.units,
                        d.counts.data(),
                        d.denominator,
                        mean,
                        rstd,
                        1.0f - option[0],
                        1.0f + option[1],
                        option[2],
                        option[3],
                        entropy_coef,
                        kl_coef,
                        static_cast<int>(kl_estimator),
                        sequence_ratio,
                        d.per_token_mean,
                        needs_grad ? write(grad_log_probs) : nullptr,
                        needs_grad && ent.has_value() ? write(grad_entropy) : nullptr,
                        parts.data()};
  run(kernels().ppo, args, number_of(d.units), grain_of(d.units.length));

  PpoSums total = {};
  double policy_loss = 0.0, kl_loss = 0.0, entropy_loss = 0.0;
  total.ratio_min = std::numeric_limits<float>::infinity();
  total.ratio_max = -total.ratio_min;
  for (int64_t i = 0; i < number_of(d.units); ++i) {
    if (d.counts[i] == 0) continue;
    const double share = d.per_token_mean ? 1.0 / d.counts[i] : 1.0;
    policy_loss += parts[i].surrogate * share;
    kl_loss += parts[i].kl * share;
    entropy_loss += parts[i].entropy * share;
    total.approx_kl += parts[i].approx_kl;
    total.clipped += parts[i].clipped;
    total.dual_clipped += parts[i].dual_clipped;
    total.ratio += parts[i].ratio;
    total.entropy += parts[i].entropy;
    total.kl += parts[i].kl;
    total.ratio_min = std::min(total.ratio_min, parts[i].ratio_min);
    total.ratio_max = std::max(total.ratio_max, parts[i].ratio_max);
  }
  double loss = policy_loss;
  // Coefficients of 0 ask for the statistics alone, and 0 * inf would be a nan.
  if (kl_coef != 0.0) loss += kl_coef * kl_loss;
  if (entropy_coef != 0.0) loss -= entropy_coef * entropy_loss;
  // Minima lose a nan. The sum of the ratios does not, and nothing else makes it one: ratios are not negative.
  if (std::isnan(total.ratio)) total.ratio_min = total.ratio_max = std::numeric_limits<float>::quiet_NaN();

  const double n = d.tokens;
  const Tensor stats = scalars({ratio_or_zero(policy_loss, d.denominator), ratio_or_zero(total.approx_kl, n),
                                ratio_or_zero(total.clipped, n), ratio_or_zero(total.dual_clipped, n),
                                ratio_or_zero(total.ratio, n), n == 0.0 ? 0.0 : total.ratio_min,
                                n == 0.0 ? 0.0 : total.ratio_max, ratio_or_zero(total.entropy, n),
                                ratio_or_zero(total.kl, n), n});
  return {scalar(ratio_or_zero(loss, d.denominator)), stats, grad_log_probs, grad_entropy};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> value_loss(const Tensor& values, const OptionalTensor& old_values,
                                              const Tensor& returns, const Tensor& mask,
                                              const OptionalTensor& denominator, const Tensor& clip, int64_t aggregation,
                                              bool needs_grad) {
  const Tensor v = floats("values", values, values), r = floats("returns", returns, values);
  const Tensor kept = bools("mask", mask, values);
  const OptionalTensor old = floats("old_values", old_values, values);
  Division d = divide(v, kept, denominator, aggregation, false);
  Tensor grad = grad_like(v, needs_grad);
  Scratch<ValueSums> parts(number_of(d.units));
  const ValueArgs args = {read(v),         read(old), read(r),       read_mask(kept),
                          d.units,         d.counts.data(),          d.denominator,
                          *numbers("clip", clip, 1),   d.per_token_mean, needs_grad ? write(grad) : nullptr,
                          parts.data()};
  run(kernels().value, args, number_of(d.units), grain_of(d.units.length));

  double loss = 0.0, clipped = 0.0;
  Moments value = {0.0, 0.0, 0.0}, target = value, error = value;
  for (int64_t i = 0; i < number_of(d.units); ++i) {
    if (d.counts[i] == 0) continue;
    loss += parts[i].loss * (d.per_token_mean ? 1.0 / d.counts[i] : 1.0);
    clipped += parts[i].clipped;
    value = combine(value, parts[i].value);
    target = combine(target, parts[i].target);
    error = combine(error, parts[i].error);
  }
  const double explained = target.squares > 0.0 ? 1.0 - error.squares / target.squares : 0.0;
  const Tensor stats = scalars({ratio_or_zero(clipped, d.tokens), value.mean, target.mean, explained, d.tokens});
  return {scalar(ratio_or_zero(loss, d.denominator)), stats, grad};
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("ppo_loss", TORCH_BOX(&fastrlhf::ppo_loss));
  m.impl("value_loss", TORCH_BOX(&fastrlhf::value_loss));
}
