// Generalised advantage estimation: Schulman et al. 2016, equations 11 and 16. See math/ppo.h.
#pragma once

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

// delta_t = r_t + gamma V_{t+1} - V_t
template <class V>
FASTRLHF_INLINE V gae_delta(V reward, V value, V next_value, V gamma) {
  return fma(gamma, next_value, reward) - value;
}

// A_t = delta_t + gamma lam A_{t+1}. The same step, with the next power of gamma lam, joins two stretches of a scan.
template <class V>
FASTRLHF_INLINE V gae_advantage(V delta, V later, V gamma_lam) {
  return fma(gamma_lam, later, delta);
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
