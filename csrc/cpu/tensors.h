// From torch's tensors to plain memory, with the checks that keep a raw call from reading outside it. The public
// functions in fastrlhf/functional say more about what was wrong; these are for whoever calls torch.ops directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "capability.h"
#include "kernels.h"

namespace fastrlhf {

constexpr int64_t kMostDims = 64;

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

inline Tensor whole(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor checked(const char* name, const Tensor& x, const Tensor& model, ScalarType dtype, const char* wanted) {
  require(x.is_cpu() && x.scalar_type() == dtype && same_shape(x, model), name, wanted);
  return whole(x);
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
inline OptionalTensor bools(const char* name, const OptionalTensor& x, const Tensor& model) {
  return x.has_value() ? OptionalTensor(bools(name, *x, model)) : std::nullopt;
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
inline const uint8_t* read_mask(const OptionalTensor& x) { return x.has_value() ? read_mask(*x) : nullptr; }
inline float* write(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Not through the dispatcher, as torch::stable::empty goes: for small calls that is most of the time.
inline Tensor new_floats(const int64_t* sizes, int64_t dims) {
  int64_t strides[kMostDims], step = 1;
  require(dims <= kMostDims, "the first argument", "at most 64 dimensions");
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, aoti_torch_dtype_float32(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor new_floats(std::initializer_list<int64_t> shape) { return new_floats(shape.begin(), shape.size()); }
inline Tensor new_floats(const std::vector<int64_t>& shape) { return new_floats(shape.data(), shape.size()); }
inline Tensor new_floats_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return new_floats(sizes.data(), sizes.size());
}
inline Tensor grad_like(const Tensor& x, bool wanted) { return wanted ? new_floats_like(x) : new_floats({0}); }
inline Tensor scalar(double x) {
  Tensor result = new_floats({});
  *write(result) = static_cast<float>(x);
  return result;
}
// The statistics of an op.
inline Tensor scalars(std::initializer_list<double> numbers) {
  Tensor result = new_floats({static_cast<int64_t>(numbers.size())});
  float* to = write(result);
  for (const double x : numbers) *to++ = static_cast<float>(x);
  return result;
}
inline double ratio_or_zero(double total, double count) { return count == 0.0 ? 0.0 : total / count; }

// n numbers that are about to be written; few of them lie on the stack.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : large_(n > kSmall ? new T[n] : nullptr), size_(n) {}
  T* data() { return large_ ? large_.get() : small_; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  static constexpr int64_t kSmall = 32;
  T small_[kSmall];
  std::unique_ptr<T[]> large_;
  int64_t size_;
};

constexpr int64_t kThreadsWorth = 16384;  // tokens: the pool takes some microseconds to wake
constexpr int64_t kUnit = 4096;  // elements of a unit where the layout gives no reason for another length

inline Units flat_units(int64_t elements) { return {1, elements, kUnit, (elements + kUnit - 1) / kUnit}; }
inline Units row_units(int64_t rows, int64_t columns) {
  return {rows, columns, columns > 0 ? columns : 1, columns > 0 ? 1 : 0};
}
// How many rows or units of `length` tokens are worth a thread of their own.
inline int64_t grain_of(int64_t length) { return 1 + kThreadsWorth / (length > 0 ? length : 1); }
inline int64_t number_of(const Units& units) { return units.rows * units.per_row; }

// Runs kernel(args, begin, end) over [0, n) in torch's thread pool. `grain`: how many are worth a thread of their own.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t n, int64_t grain) {
  if (n <= 0) return;
  if (n <= grain) return kernel(args, 0, n);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The moments of all units together.
Moments combine(const Moments& a, const Moments& b);
inline Moments combine(const Moments* begin, const Moments* end) {
  Moments total = {0.0, 0.0, 0.0};
  for (; begin != end; ++begin) total = combine(total, *begin);
  return total;
}
// 1 / sqrt(variance + eps)
double inverse_deviation(const Moments& m, bool unbiased, double eps);

}  // namespace fastrlhf
