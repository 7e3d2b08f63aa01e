// From torch's tensors to plain memory, with the checks that keep a raw call from reading outside it. The public
// functions in fastrlhf/functional say more about what was wrong; these are for whoever calls torch.ops directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "capability.h"
#include "kernels.h"

namespace fastrlhf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// std::invalid_argument arrives in Python as ValueError, std::out_of_range as IndexError.
inline void require(bool good, const char* name, const char* wanted) {
  if (!good) throw std::invalid_argument(std::string(name) + ": wanted " + wanted);
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline Tensor checked(const char* name, const Tensor& x, const Tensor& model, ScalarType dtype, const char* wanted) {
  require(x.is_cpu() && x.scalar_type() == dtype && same_shape(x, model), name, wanted);
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}
inline Tensor floats(const char* name, const Tensor& x, const Tensor& model) {
  return checked(name, x, model, ScalarType::Float, "fp32 on CPU, in the shape of the first argument");
}
inline Tensor bools(const char* name, const Tensor& x, const Tensor& model) {
  return checked(name, x, model, ScalarType::Bool, "bool on CPU, in the shape of the first argument");
}
inline OptionalTensor floats(const char* name, const OptionalTensor& x, const Tensor& model) {
  return x.has_value() ? OptionalTensor(floats(name, *x, model)) : std::nullopt;
}

// The numbers of an op: `count` of them, wherever the other tensors are.
inline const float* numbers(const char* name, const Tensor& x, int64_t count) {
  require(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.numel() == count && x.is_contiguous(), name,
          "the op's numbers, fp32 on CPU (see csrc/ops.cpp)");
  return static_cast<const float*>(x.const_data_ptr());
}

inline const float* read(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
inline const float* read(const OptionalTensor& x) { return x.has_value() ? read(*x) : nullptr; }
inline const uint8_t* read_mask(const Tensor& x) { return static_cast<const uint8_t*>(x.const_data_ptr()); }
inline float* write(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline Tensor new_floats(const std::vector<int64_t>& shape) {
  return torch::stable::empty({shape.data(), shape.size()}, ScalarType::Float);
}
inline Tensor new_floats_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return new_floats(std::vector<int64_t>(sizes.begin(), sizes.end()));
}
inline Tensor scalar(double x) {
  Tensor result = new_floats({});
  *write(result) = static_cast<float>(x);
  return result;
}

constexpr int64_t kUnit = 4096;  // elements of a unit where the layout gives no reason for another length

inline Units flat_units(int64_t elements) { return {1, elements, kUnit, (elements + kUnit - 1) / kUnit}; }
inline Units row_units(int64_t rows, int64_t columns) {
  return {rows, columns, columns > 0 ? columns : 1, columns > 0 ? 1 : 0};
}
inline int64_t number_of(const Units& units) { return units.rows * units.per_row; }

// Runs kernel(args, begin, end) over [0, n) in torch's thread pool. `grain`: how many are worth a thread of their own.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t n, int64_t grain) {
  if (n <= 0) return;
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Tokens that count in each unit.
std::vector<int64_t> count_units(const uint8_t* mask, const Units& units);
// The moments of all units together.
Moments combine(const Moments& a, const Moments& b);

}  // namespace fastrlhf
