// kl_divergence on CPU: torch-facing side.

#include "tensors.h"

namespace fastrlhf {
namespace {

Tensor elementwise(const Tensor* grad, const Tensor& log_probs, const Tensor& ref_log_probs, int64_t estimator,
                   const Tensor& clamp) {
  const Tensor p = floats("log_probs", log_probs, log_probs), q = floats("ref_log_probs", ref_log_probs, log_probs);
  require(estimator >= kK1 && estimator <= kAbs, "estimator", "0 to 3: k1, k2, k3, abs");
  const float* limits = numbers("clamp", clamp, 2);
  OptionalTensor g;
  if (grad != nullptr) g = floats("grad", *grad, log_probs);
  Tensor result = new_floats_like(log_probs);
  const KlArgs args = {read(p),       read(q), read(g), write(result), static_cast<int>(estimator),
                       limits[0], limits[1]};
  run(kernels().kl, args, log_probs.numel(), 4 * kThreadsWorth);
  return result;
}

Tensor kl_divergence(const Tensor& log_probs, const Tensor& ref_log_probs, int64_t estimator, const Tensor& clamp) {
  return elementwise(nullptr, log_probs, ref_log_probs, estimator, clamp);
}

Tensor kl_divergence_backward(const Tensor& grad, const Tensor& log_probs, const Tensor& ref_log_probs,
                              int64_t estimator, const Tensor& clamp) {
  return elementwise(&grad, log_probs, ref_log_probs, estimator, clamp);
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("kl_divergence", TORCH_BOX(&fastrlhf::kl_divergence));
  m.impl("kl_divergence_backward", TORCH_BOX(&fastrlhf::kl_divergence_backward));
}
