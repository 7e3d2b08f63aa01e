// Per-token KL estimates and their gradient.

#include "../simd.h"
// After simd.h, whose functions it uses.
#include "../../math/kl.h"
#include "tables.h"
#include "units.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

template <int kEstimator>
void kl_of(const KlArgs& args, int64_t begin, int64_t end) {
  const KlArgs a = args;
  const auto log_ratio = [&](int64_t i, int n) __attribute__((always_inline)) {
    return load_first(a.log_probs + i, n, 0.0f) - load_first(a.ref_log_probs + i, n, 0.0f);
  };
  const float none = __builtin_inff();
  if (a.grad == nullptr && a.clamp_input == none && a.clamp_output == none)
    return for_each_vector(begin, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      store_first(a.result + i, kl_estimate(log_ratio(i, n), kEstimator).value, n);
    });
  for_each_vector(begin, end, [&](int64_t i, int n) __attribute__((always_inline)) {
    const auto e = kl_estimate_clamped(log_ratio(i, n), kEstimator, a.clamp_input, a.clamp_output);
    store_first(a.result + i, a.grad == nullptr ? e.value : e.slope * load_first(a.grad + i, n, 0.0f), n);
  });
}

}  // namespace

void kl(const KlArgs& a, int64_t begin, int64_t end) {
  constexpr void (*kOf[])(const KlArgs&, int64_t, int64_t) = {kl_of<kK1>, kl_of<kK2>, kl_of<kK3>, kl_of<kAbs>};
  kOf[a.estimator](a, begin, end);
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
