// Per-token KL estimates and their gradient.

#include "../simd.h"
// After simd.h, whose functions it uses.
#include "../../math/kl.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

void kl(const KlArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kWidth) {
    const int n = end - i < kWidth ? static_cast<int>(end - i) : kWidth;
    const Vec log_ratio = load_first(a.log_probs + i, n, 0.0f) - load_first(a.ref_log_probs + i, n, 0.0f);
    const KlEstimate<Vec> e = kl_estimate_clamped(log_ratio, a.estimator, a.clamp_input, a.clamp_output);
    store_first(a.result + i, a.grad == nullptr ? e.value : e.slope * load_first(a.grad + i, n, 0.0f), n);
  }
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
