// One step of generalised advantage estimation, backwards in time: Schulman et al. 2016, equations 11 and 16.
#pragma once

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

struct GaeState {
  float next_value;      // V_{t+1}
  float next_advantage;  // A_{t+1}
};

FASTRLHF_INLINE float gae_step(GaeState& state, float reward, float value, float gamma, float gamma_lam) {
  const float delta = reward + gamma * state.next_value - value;
  const float advantage = delta + gamma_lam * state.next_advantage;
  state.next_value = value;
  state.next_advantage = advantage;
  return advantage;
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
