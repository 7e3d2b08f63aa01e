// masked_mean and masked_whiten on CPU: torch-facing side.

#include <cmath>

#include "tensors.h"

namespace fastrlhf {

std::vector<int64_t> count_units(const uint8_t* mask, const Units& units) {
  std::vector<int64_t> counts(number_of(units), 0);
  const auto count = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Span span = span_of(units, unit);
      counts[unit] = count_kept(mask + span.start, span.length);
    }
  };
  if (!counts.empty()) torch::stable::parallel_for(0, counts.size(), 16, count);
  return counts;
}

// Chan, Golub and LeVeque 1983: exact, where subtracting squared means would cancel.
Moments combine(const Moments& a, const Moments& b) {
  if (a.count == 0.0) return b;
  if (b.count == 0.0) return a;
  const double count = a.count + b.count, step = b.mean - a.mean;
  return {count, a.mean + step * (b.count / count), a.squares + b.squares + step * step * (a.count * b.count / count)};
}

namespace {

std::vector<Moments> moments_of_units(const Tensor& x, const Tensor& mask, const Units& units) {
  std::vector<Moments> result(number_of(units), Moments{0.0, 0.0, 0.0});
  const MomentsArgs args = {read(x), read_mask(mask), units, result.data()};
  run(kernels().moments, args, number_of(units), 1 + kUnit / units.length);
  return result;
}

std::tuple<Tensor, Tensor> masked_mean(const Tensor& x, const Tensor& mask) {
  require(x.dim() == 2, "x", "[R, C]");
  const Tensor kept = floats("x", x, x), m = bools("mask", mask, x);
  const int64_t rows = x.size(0), columns = x.size(1);
  const int64_t length = std::min(std::max<int64_t>(columns, 1), kUnit);
  const Units units = {rows, columns, length, (columns + length - 1) / length};
  const auto parts = moments_of_units(kept, m, units);
  Tensor mean = new_floats({rows}), count = new_floats({rows});
  for (int64_t row = 0; row < rows; ++row) {
    Moments total = {0.0, 0.0, 0.0};
    for (int64_t i = 0; i < units.per_row; ++i) total = combine(total, parts[row * units.per_row + i]);
    write(mean)[row] = static_cast<float>(total.mean);
    write(count)[row] = static_cast<float>(total.count);
  }
  return {mean, count};
}

std::tuple<Tensor, Tensor> masked_whiten(const Tensor& x, const Tensor& mask, bool shift_mean, bool unbiased,
                                         const Tensor& eps) {
  const Tensor kept = floats("x", x, x), m = bools("mask", mask, x);
  Moments total = {0.0, 0.0, 0.0};
  for (const Moments& part : moments_of_units(kept, m, flat_units(x.numel()))) total = combine(total, part);
  const double variance = total.squares / std::max(unbiased ? total.count - 1.0 : total.count, 1.0);
  const double rstd = 1.0 / std::sqrt(variance + *numbers("eps", eps, 1));
  Tensor whitened = new_floats_like(x), stats = new_floats({3});
  const auto mean = static_cast<float>(total.mean);
  const WhitenArgs args = {read(kept), read_mask(m),                 write(whitened),
                           mean,       static_cast<float>(rstd), shift_mean ? 0.0f : mean};
  run(kernels().whiten, args, x.numel(), kUnit);
  write(stats)[0] = mean;
  write(stats)[1] = static_cast<float>(rstd);
  write(stats)[2] = static_cast<float>(total.count);
  return {whitened, stats};
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("masked_mean", TORCH_BOX(&fastrlhf::masked_mean));
  m.impl("masked_whiten", TORCH_BOX(&fastrlhf::masked_whiten));
}
