// Tensors [..., V] whose rows a kernel walks along, wherever they lie.
#pragma once

#include <limits>

#include "tensors.h"

namespace fastrlhf {

inline DType dtype_of(const Tensor& x, const char* name = "logits") {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      throw std::invalid_argument(std::string(name) + ": wanted float32, bfloat16 or float16");
  }
}

// Where each row of x[..., V] starts, in elements; rows may lie anywhere (logits[:, :-1] needs no copy).
inline std::vector<int64_t> row_offsets(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t leading = x.dim() - 1;
  std::vector<int64_t> offsets = {0};
  for (int64_t d = 0; d < leading; ++d) {
    std::vector<int64_t> finer;
    finer.reserve(offsets.size() * sizes[d]);
    for (const int64_t offset : offsets)
      for (int64_t i = 0; i < sizes[d]; ++i) finer.push_back(offset + i * strides[d]);
    offsets.swap(finer);
  }
  return offsets;
}

// m and log s of each row, with logsumexp(z/T) = m/T + log s.
inline Tensor new_normaliser(const Tensor& rows) {
  const auto sizes = rows.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.push_back(2);
  return new_floats(shape);
}

inline Tensor checked_normaliser(const Tensor& x, const Tensor& rows) {
  require(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == rows.dim() + 1 && x.size(-1) == 2 &&
              x.numel() == 2 * rows.numel(),
          "normaliser", "fp32 on CPU, two numbers a row");
  return whole(x);
}

// Fewer elements than this are done before another thread has woken up.
inline int64_t rows_worth_a_thread(int64_t vocabulary) { return 1 + 32768 / vocabulary; }

inline void check_rows(const char* name, const Tensor& x) {
  require(x.is_cpu() && x.dim() >= 1 && x.size(-1) >= 1, name, "[..., V] on CPU, V >= 1");
  require(x.size(-1) == 1 || x.stride(-1) == 1, name, "a contiguous last dimension");
}

inline Tensor new_like(const Tensor& x) { return torch::stable::empty(x.sizes(), x.scalar_type()); }

inline Tensor checked_tokens(const Tensor& tokens, int64_t vocabulary) {
  Tensor flat = whole(tokens);
  const auto* ids = static_cast<const int64_t*>(flat.const_data_ptr());
  for (int64_t i = 0, n = flat.numel(); i < n; ++i)
    if (ids[i] != kIgnored && ids[i] != kElsewhere && (ids[i] < 0 || ids[i] >= vocabulary))
      throw std::out_of_range("tokens: got " + std::to_string(ids[i]) + " at position " + std::to_string(i) +
                              ", wanted a token in [0, " + std::to_string(vocabulary) + "), or -100 to ignore it");
  return flat;
}

inline float checked_temperature(float t) {
  using Float = std::numeric_limits<float>;
  require(t >= Float::min() && t <= Float::max(), "temperature", "a positive normal fp32 number");
  return t;
}
inline float read_temperature(const Tensor& temperature) {
  return checked_temperature(*numbers("temperature", temperature, 1));
}

}  // namespace fastrlhf
