// gae on CPU: torch-facing side.

#include "tensors.h"

namespace fastrlhf {
namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const OptionalTensor& mask,
                               const OptionalTensor& bootstrap_values, const Tensor& options, int64_t mask_mode) {
  require(rewards.dim() == 2, "rewards", "[B, T]");
  require(mask_mode >= kCarry && mask_mode <= kNone, "mask_mode", "0 to 2: carry, zero, none");
  const Tensor r = floats("rewards", rewards, rewards), v = floats("values", values, rewards);
  OptionalTensor m, b;
  if (mask.has_value()) m = bools("mask", *mask, rewards);
  if (bootstrap_values.has_value()) {
    require(bootstrap_values->dim() == 1 && bootstrap_values->size(0) == rewards.size(0), "bootstrap_values", "[B]");
    b = floats("bootstrap_values", *bootstrap_values, *bootstrap_values);
  }
  const float* discounts = numbers("options", options, 2);
  Tensor advantages = new_floats_like(rewards), returns = new_floats_like(rewards);
  const GaeArgs args = {read(r),
                        read(v),
                        m.has_value() ? read_mask(*m) : nullptr,
                        read(b),
                        write(advantages),
                        write(returns),
                        rewards.size(1),
                        discounts[0],
                        discounts[1],
                        static_cast<MaskMode>(mask_mode)};
  const int64_t length = rewards.size(1) > 0 ? rewards.size(1) : 1;
  run(kernels().gae, args, rewards.size(0), 1 + kUnit / length);
  return {advantages, returns};
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("gae", TORCH_BOX(&fastrlhf::gae));
}
