// masked_mean and masked_whiten on CPU: torch-facing side.

#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace fastrlhf {

// Chan, Golub and LeVeque 1983: exact, where subtracting squared means would cancel.
Moments combine(const Moments& a, const Moments& b) {
  if (a.count == 0.0) return b;
  if (b.count == 0.0) return a;
  const double count = a.count + b.count, step = b.mean - a.mean;
  return {count, a.mean + step * (b.count / count), a.squares + b.squares + step * step * (a.count * b.count / count)};
}

double inverse_deviation(const Moments& m, bool unbiased, double eps) {
  return 1.0 / std::sqrt(m.squares / std::max(unbiased ? m.count - 1.0 : m.count, 1.0) + eps);
}

namespace {

Scratch<Moments> moments_of_units(const Tensor& x, const Tensor& mask, const Units& units) {
  Scratch<Moments> result(number_of(units));
  const MomentsArgs args = {read(x), read_mask(mask), units, result.data()};
  run(kernels().moments, args, number_of(units), 4 * grain_of(units.length));
  return result;
}

std::tuple<Tensor, Tensor> masked_mean(const Tensor& x, const Tensor& mask) {
  require(x.dim() == 2, "x", "[R, C]");
  const Tensor kept = floats("x", x, x), m = bools("mask", mask, x);
  const int64_t rows = x.size(0), columns = x.size(1);
  const int64_t length = std::min(std::max<int64_t>(columns, 1), kUnit);
  const Units units = {rows, columns, length, (columns + length - 1) / length};
  Scratch<Moments> parts = moments_of_units(kept, m, units);
  Tensor mean = new_floats({rows}), count = new_floats({rows});
  for (int64_t row = 0; row < rows; ++row) {
    const Moments* first = parts.data() + row * units.per_row;
    const Moments total = combine(first, first + units.per_row);
    write(mean)[row] = static_cast<float>(total.mean);
    write(count)[row] = static_cast<float>(total.count);
  }
  return {mean, count};
}

std::tuple<Tensor, Tensor> masked_whiten(const Tensor& x, const Tensor& mask, bool shift_mean, bool unbiased,
                                         const Tensor& eps) {
  const Tensor kept = floats("x", x, x), m = bools("mask", mask, x);
  Scratch<Moments> parts = moments_of_units(kept, m, flat_units(x.numel()));
  const Moments total = combine(parts.begin(), parts.end());
  const auto mean = static_cast<float>(total.mean);
  const auto rstd = static_cast<float>(inverse_deviation(total, unbiased, *numbers("eps", eps, 1)));
  Tensor whitened = new_floats_like(x);
  const WhitenArgs args = {read(kept), read_mask(m), write(whitened), mean, rstd, shift_mean ? 0.0f : mean};
  run(kernels().whiten, args, x.numel(), 4 * kThreadsWorth);
  return {whitened, scalars({mean, rstd, total.count})};
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("masked_mean", TORCH_BOX(&fastrlhf::masked_mean));
  m.impl("masked_whiten", TORCH_BOX(&fastrlhf::masked_whiten));
}
