// gae, gae_packed and rollout_advantages on CPU: torch-facing side. The arithmetic is in kernels/advantages.cpp.

#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace fastrlhf {
namespace {

MaskMode checked_mode(int64_t mask_mode) {
  require(mask_mode >= kCarry && mask_mode <= kNone, "mask_mode", "0 to 2: carry, zero, none");
  return static_cast<MaskMode>(mask_mode);
}

OptionalTensor one_a_sequence(const char* name, const OptionalTensor& x, int64_t sequences) {
  if (!x.has_value()) return std::nullopt;
  require(x->dim() == 1 && x->size(0) == sequences, name, "[B]");
  return floats(name, *x, *x);
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const OptionalTensor& mask,
                               const OptionalTensor& bootstrap_values, const Tensor& options, int64_t mask_mode) {
  require(rewards.dim() == 2, "rewards", "[B, T]");
  const int64_t rows = rewards.size(0), length = rewards.size(1);
  const Tensor r = floats("rewards", rewards, rewards), v = floats("values", values, rewards);
  const OptionalTensor m = bools("mask", mask, rewards), b = one_a_sequence("bootstrap_values", bootstrap_values, rows);
  const float* discounts = numbers("options", options, 2);
  Tensor advantages = new_floats_like(rewards), returns = new_floats_like(rewards);
  const GaeArgs args = {read(r),        read(v), read_mask(m), read(b),      write(advantages),
                        write(returns), nullptr, length,       discounts[0], discounts[1],
                        checked_mode(mask_mode)};
  run(kernels().gae, args, rows, grain_of(length));
  return {advantages, returns};
}

// cu_seqlens as int64: in place where it is, else in `copy`. IndexError if it is not an ascent from 0 to n.
const int64_t* checked_ends(const Tensor& ends, int64_t n, Scratch<int64_t>& copy) {
  const int64_t count = ends.numel();
  const bool wide = ends.scalar_type() == ScalarType::Long;
  require(ends.is_cpu() && ends.dim() == 1 && count > 0 && ends.is_contiguous() &&
              (wide || ends.scalar_type() == ScalarType::Int),
          "cu_seqlens", "[B + 1], int32 or int64, contiguous, on CPU");
  const auto* at = static_cast<const int64_t*>(ends.const_data_ptr());
  if (!wide) {
    const auto* narrow = static_cast<const int32_t*>(ends.const_data_ptr());
    std::copy(narrow, narrow + count, copy.begin());
    at = copy.data();
  }
  if (at[0] == 0 && at[count - 1] == n && std::is_sorted(at, at + count)) return at;
  std::string shown = "[";
  if (count < 12) {
    for (int64_t i = 0; i < count; ++i) shown += (i > 0 ? ", " : "") + std::to_string(at[i]);
    shown += "]";
  } else {
    shown = std::to_string(count) + " numbers from " + std::to_string(at[0]) + " to " + std::to_string(at[count - 1]);
  }
  throw std::out_of_range("cu_seqlens: got " + shown + ", wanted numbers that never fall, from 0 to " +
                          std::to_string(n));
}

std::tuple<Tensor, Tensor> gae_packed(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens,
                                      const OptionalTensor& mask, const OptionalTensor& bootstrap_values,
                                      const Tensor& options, int64_t mask_mode) {
  require(rewards.dim() == 1, "rewards", "[N]");
  const int64_t tokens = rewards.size(0), sequences = cu_seqlens.numel() - 1;
  const Tensor r = floats("rewards", rewards, rewards), v = floats("values", values, rewards);
  const Tensor seqlens = whole(cu_seqlens);
  Scratch<int64_t> copy(sequences + 1);
  const int64_t* ends = checked_ends(seqlens, tokens, copy);
  const OptionalTensor m = bools("mask", mask, rewards),
                       b = one_a_sequence("bootstrap_values", bootstrap_values, sequences);
  const float* discounts = numbers("options", options, 2);
  Tensor advantages = new_floats_like(rewards), returns = new_floats_like(rewards);
  const GaeArgs args = {read(r),        read(v), read_mask(m), read(b),      write(advantages),
                        write(returns), ends,    0,            discounts[0], discounts[1],
                        checked_mode(mask_mode)};
  // By tokens, not by sequences, which may be of any length: each goes with its first token.
  const auto first_from = [&](int64_t token) { return std::lower_bound(ends, ends + sequences, token) - ends; };
  const auto part = [&](int64_t begin, int64_t end) { kernels().gae(args, first_from(begin), first_from(end)); };
  if (tokens > 0) torch::stable::parallel_for(0, tokens, kThreadsWorth, part);
  return {advantages, returns};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rollout_advantages(
    const Tensor& scores, const Tensor& log_probs, const Tensor& ref_log_probs, const Tensor& values,
    const Tensor& mask, const OptionalTensor& token_rewards, const OptionalTensor& bootstrap_values,
    const Tensor& options, int64_t kl_estimator, int64_t mask_mode) {
  require(log_probs.dim() == 2, "log_probs", "[B, T]");
  const int64_t rows = log_probs.size(0), length = log_probs.size(1);
  const OptionalTensor s = one_a_sequence("scores", scores, rows), t = floats("token_rewards", token_rewards, log_probs),
                       b = one_a_sequence("bootstrap_values", bootstrap_values, rows);
  const Tensor lp = floats("log_probs", log_probs, log_probs), v = floats("values", values, log_probs),
               ref = floats("ref_log_probs", ref_log_probs, log_probs), m = bools("mask", mask, log_probs);
  require(kl_estimator >= kK1 && kl_estimator <= kAbs, "kl_estimator", "0 to 3: k1, k2, k3, abs");
  const float* option = numbers("options", options, 4);
  Tensor advantages = new_floats_like(lp), returns = new_floats_like(lp), kl = new_floats({rows});
  Scratch<Moments> parts(rows);
  const RolloutArgs args = {read(s),
                            read(lp),
                            read(ref),
                            read(v),
                            read_mask(m),
                            read(t),
                            read(b),
                            write(advantages),
                            write(returns),
                            write(kl),
                            parts.data(),
                            length,
                            option[0],
                            option[1],
                            option[2],
                            option[3],
                            static_cast<int>(kl_estimator),
                            checked_mode(mask_mode)};
  run(kernels().rollout, args, rows, grain_of(length));
  const Moments total = combine(parts.begin(), parts.end());
  return {advantages, returns, kl, scalars({total.mean, inverse_deviation(total, true, 1e-8)})};
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("gae", TORCH_BOX(&fastrlhf::gae));
  m.impl("gae_packed", TORCH_BOX(&fastrlhf::gae_packed));
  m.impl("rollout_advantages", TORCH_BOX(&fastrlhf::rollout_advantages));
}
