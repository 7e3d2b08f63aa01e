// sample_tokens on CPU: torch-facing side. The arithmetic is in kernels/sampling.cpp.

#include "rows.h"

namespace fastrlhf {
namespace {

Tensor per_row(const char* name, const Tensor& x, const Tensor& logits) {
  require(x.is_cpu() && x.scalar_type() == ScalarType::Long && x.dim() == 1 && x.size(0) == logits.size(0), name,
          "int64 on CPU, one for each row of logits");
  return whole(x);
}

const int64_t* read_integers(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

std::tuple<Tensor, Tensor> sample_tokens(const Tensor& logits, const Tensor& seed, const Tensor& sequence,
                                         const Tensor& position, const Tensor& options, int64_t top_k) {
  check_rows("logits", logits);
  require(logits.dim() == 2, "logits", "[B, V]");
  const Tensor seeds = per_row("seed", seed, logits), sequences = per_row("sequence", sequence, logits);
  const Tensor positions = per_row("position", position, logits);
  const float* number = numbers("numbers", options, 3);
  const float temperature = number[0] == 0.0f ? 0.0f : checked_temperature(number[0]);
  require(top_k >= 0 && number[1] > 0.0f && number[1] <= 1.0f && number[2] >= 0.0f && number[2] <= 1.0f, "numbers",
          "top_k >= 0, top_p in (0, 1], min_p in [0, 1]");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  Tensor tokens = torch::stable::empty({rows}, ScalarType::Long), log_probs = new_floats({rows});
  const auto offsets = row_offsets(logits);
  auto* sampled = static_cast<int64_t*>(tokens.mutable_data_ptr());
  const SampleArgs args = {logits.const_data_ptr(), offsets.data(), vocabulary,  dtype_of(logits),
                           temperature,             number[1],      number[2],   top_k,
                           read_integers(seeds),    read_integers(sequences),    read_integers(positions),
                           sampled,                 write(log_probs)};
  run(kernels().sample, args, rows, rows_worth_a_thread(vocabulary));
  for (int64_t row = 0; row < rows; ++row)
    if (sampled[row] < 0)
      throw std::invalid_argument("logits: row " + std::to_string(row) +
                                  " has no distribution (a nan, +inf or nothing but -inf)");
  return {tokens, log_probs};
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("sample_tokens", TORCH_BOX(&fastrlhf::sample_tokens));
}
