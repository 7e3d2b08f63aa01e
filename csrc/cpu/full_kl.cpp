// full_kl on CPU: torch-facing side. The arithmetic is in kernels/full_kl.cpp.

#include "rows.h"

namespace fastrlhf {
namespace {

struct FullKl {
  Tensor mask_;  // keeps alive what the arguments point to
  std::vector<int64_t> row_offset, ref_row_offset;
  FullKlArgs args;
};

void prepare(FullKl& f, const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& mask,
             const Tensor& temperature, const Tensor& row_model) {
  check_rows("logits", logits);
  check_rows("ref_logits", ref_logits);
  require(same_shape(logits, ref_logits), "ref_logits", "the shape of logits");
  f.row_offset = row_offsets(logits);
  f.ref_row_offset = row_offsets(ref_logits);
  f.args = {};
  if (mask.has_value()) {
    f.mask_ = bools("mask", *mask, row_model);
    f.args.mask = read_mask(f.mask_);
  }
  f.args.logits = logits.const_data_ptr();
  f.args.ref_logits = ref_logits.const_data_ptr();
  f.args.row_offset = f.row_offset.data();
  f.args.ref_row_offset = f.ref_row_offset.data();
  f.args.vocabulary = logits.size(-1);
  f.args.dtype = dtype_of(logits);
  f.args.ref_dtype = dtype_of(ref_logits);
  f.args.temperature = read_temperature(temperature);
}

std::tuple<Tensor, Tensor, Tensor> full_kl(const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& mask,
                                           const Tensor& temperature) {
  const auto sizes = logits.sizes();
  const std::vector<int64_t> rows(sizes.begin(), sizes.empty() ? sizes.end() : sizes.end() - 1);
  Tensor kl = new_floats(rows), normaliser = new_normaliser(kl), ref_normaliser = new_normaliser(kl);
  FullKl f;
  prepare(f, logits, ref_logits, mask, temperature, kl);
  f.args.kl = write(kl);
  f.args.normaliser = write(normaliser);
  f.args.ref_normaliser = write(ref_normaliser);
  run(kernels().full_kl, f.args, kl.numel(), rows_worth_a_thread(f.args.vocabulary));
  return {kl, normaliser, ref_normaliser};
}

std::tuple<Tensor, Tensor> full_kl_backward(const Tensor& grad, const Tensor& logits, const Tensor& ref_logits,
                                            const OptionalTensor& mask, const Tensor& kl, const Tensor& normaliser,
                                            const Tensor& ref_normaliser, const Tensor& temperature, bool needs_grad,
                                            bool needs_ref_grad) {
  FullKl f;
  prepare(f, logits, ref_logits, mask, temperature, kl);
  const Tensor g = floats("grad", grad, kl), k = floats("kl", kl, kl), norm = checked_normaliser(normaliser, kl),
               ref_norm = checked_normaliser(ref_normaliser, kl);
  require(logits.dim() == kl.dim() + 1 && static_cast<size_t>(kl.numel()) == f.row_offset.size(), "kl",
          "the shape of logits without the vocabulary");
  const std::vector<int64_t> nothing = {0};
  const auto made = [&](const Tensor& x, bool needed) {
    return needed ? new_like(x) : torch::stable::empty({nothing.data(), 1}, x.scalar_type());
  };
  Tensor grad_logits = made(logits, needs_grad), grad_ref_logits = made(ref_logits, needs_ref_grad);
  f.args.grad = read(g);
  f.args.kl = const_cast<float*>(read(k));
  f.args.normaliser = const_cast<float*>(read(norm));
  f.args.ref_normaliser = const_cast<float*>(read(ref_norm));
  f.args.grad_logits = needs_grad ? grad_logits.mutable_data_ptr() : nullptr;
  f.args.grad_ref_logits = needs_ref_grad ? grad_ref_logits.mutable_data_ptr() : nullptr;
  if (needs_grad || needs_ref_grad) run(kernels().full_kl_backward, f.args, kl.numel(), rows_worth_a_thread(f.args.vocabulary));
  return {grad_logits, grad_ref_logits};
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("full_kl", TORCH_BOX(&fastrlhf::full_kl));
  m.impl("full_kl_backward", TORCH_BOX(&fastrlhf::full_kl_backward));
}
