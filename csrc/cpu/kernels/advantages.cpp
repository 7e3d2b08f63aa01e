// Generalised advantage estimation: one row after the other, each backwards in time.

#include "../simd.h"
// After simd.h, which defines FASTRLHF_INLINE.
#include "../../math/gae.h"
#include "tables.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

void gae(const GaeArgs& a, int64_t begin, int64_t end) {
  const float gamma_lam = a.gamma * a.lam;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * a.length;
    GaeState state = {a.bootstrap_values == nullptr ? 0.0f : a.bootstrap_values[row], 0.0f};
    for (int64_t i = start + a.length - 1; i >= start; --i) {
      const bool counts = a.mask == nullptr || a.mask_mode == kNone || a.mask[i] != 0;
      if (counts) {
        a.advantages[i] = gae_step(state, a.rewards[i], a.values[i], a.gamma, gamma_lam);
        a.returns[i] = a.advantages[i] + a.values[i];
        continue;
      }
      if (a.mask_mode == kZero) gae_step(state, 0.0f, 0.0f, a.gamma, gamma_lam);  // it passes, and is not reported
      a.advantages[i] = 0.0f;
      a.returns[i] = 0.0f;
    }
  }
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
