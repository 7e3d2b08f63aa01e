// rms_norm, swiglu and rotate on CPU: torch-facing side. The arithmetic is in kernels/layers.cpp.

#include "rows.h"

namespace fastrlhf {
namespace {

Tensor same(const char* name, const Tensor& x, const Tensor& model) {
  require(x.is_cpu() && x.scalar_type() == model.scalar_type() && same_shape(x, model), name,
          "CPU, shape and dtype of the first argument");
  return whole(x);
}

Tensor norm_weight(const Tensor& x, const Tensor& weight) {
  require(x.is_cpu() && x.dim() >= 1 && x.size(-1) >= 1, "x", "[..., H] on CPU, H >= 1");
  require(weight.is_cpu() && weight.dim() == 1 && weight.size(0) == x.size(-1) &&
              weight.scalar_type() == x.scalar_type(),
          "weight", "[H] on CPU, in the dtype of x");
  return whole(weight);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, const Tensor& eps) {
  const Tensor rows = whole(x), w = norm_weight(x, weight);
  const int64_t columns = x.size(-1), count = x.numel() / columns;
  Tensor y = new_like(rows), rstd = new_floats({count});
  const RmsNormArgs args = {rows.const_data_ptr(), w.const_data_ptr(), dtype_of(x, "x"), columns,
                            *numbers("eps", eps, 1), y.mutable_data_ptr(), write(rstd)};
  run(kernels().rms_norm, args, count, rows_worth_a_thread(columns));
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, bool needs_x, bool needs_weight) {
  const Tensor rows = whole(x), w = norm_weight(x, weight), g = same("grad", grad, x);
  const int64_t columns = x.size(-1), count = x.numel() / columns, blocks = (count + kNormRows - 1) / kNormRows;
  require(rstd.is_cpu() && rstd.scalar_type() == ScalarType::Float && rstd.numel() == count && rstd.is_contiguous(),
          "rstd", "fp32 on CPU, one number a row");
  const std::vector<int64_t> nothing = {0};
  Tensor grad_x = needs_x ? new_like(rows) : torch::stable::empty(nothing, x.scalar_type());
  Tensor grad_weight = needs_weight ? new_like(w) : torch::stable::empty(nothing, x.scalar_type());
  std::unique_ptr<float[]> parts(needs_weight ? new float[blocks * columns] : nullptr);
  const RmsNormGradArgs args = {g.const_data_ptr(), rows.const_data_ptr(), w.const_data_ptr(), read(rstd),
                                dtype_of(x, "x"), count, columns, needs_x ? grad_x.mutable_data_ptr() : nullptr,
                                parts.get()};
  run(kernels().rms_norm_backward, args, blocks, 1 + rows_worth_a_thread(columns) / kNormRows);
  if (needs_weight) {
    // Block after block in double: the same bits for every number of threads.
    std::vector<double> total(columns, 0.0);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = 0; i < columns; ++i) total[i] += parts[block * columns + i];
    const std::vector<float> rounded(total.begin(), total.end());
    const NarrowArgs narrow = {rounded.data(), grad_weight.mutable_data_ptr(), dtype_of(x, "x")};
    run(kernels().narrow, narrow, columns, 4 * kThreadsWorth);
  }
  return {grad_x, grad_weight};
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  const Tensor a = same("gate", gate, gate), b = same("up", up, gate);
  Tensor y = new_like(a);
  const SwigluArgs args = {a.const_data_ptr(), b.const_data_ptr(), dtype_of(gate, "gate"), y.mutable_data_ptr()};
  run(kernels().swiglu, args, a.numel(), kThreadsWorth);
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const Tensor a = same("gate", gate, gate), b = same("up", up, gate), g = same("grad", grad, gate);
  Tensor grad_gate = new_like(a), grad_up = new_like(a);
  const SwigluGradArgs args = {g.const_data_ptr(), a.const_data_ptr(), b.const_data_ptr(), dtype_of(gate, "gate"),
                               grad_gate.mutable_data_ptr(), grad_up.mutable_data_ptr()};
  run(kernels().swiglu_backward, args, a.numel(), kThreadsWorth);
  return {grad_gate, grad_up};
}

Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
  require(x.is_cpu() && x.dim() == 4 && x.size(3) % 2 == 0 && (x.size(3) == 0 || x.stride(3) == 1), "x",
          "[B, L, heads, d] on CPU, d even, with a contiguous last dimension");
  const auto angles = [&](const char* name, const Tensor& t) {
    require(t.is_cpu() && t.dim() == 3 && t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
                (t.size(0) == 1 || t.size(0) == x.size(0)) && t.size(1) == x.size(1) && t.size(2) == x.size(3),
            name, "[B, L, d] or [1, L, d] on CPU, fp32, contiguous");
    return read(t);
  };
  const float *cosine = angles("cos", cos), *sine = angles("sin", sin);
  require(cos.size(0) == sin.size(0), "sin", "the shape of cos");
  Tensor y = new_like(x);
  if (x.numel() == 0) return y;
  const RotateArgs args = {x.const_data_ptr(), dtype_of(x, "x"), x.size(1), x.size(2), x.size(3), x.stride(0),
                           x.stride(1), x.stride(2), cosine, sine, cos.size(0) == 1 ? 0 : x.size(1) * x.size(3), back,
                           y.mutable_data_ptr()};
  run(kernels().rotate, args, x.size(0) * x.size(1), rows_worth_a_thread(x.size(2) * x.size(3)));
  return y;
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("rms_norm", TORCH_BOX(&fastrlhf::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&fastrlhf::rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&fastrlhf::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&fastrlhf::swiglu_backward));
  m.impl("rotate", TORCH_BOX(&fastrlhf::rotate));
}
