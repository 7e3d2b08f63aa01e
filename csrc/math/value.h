// The squared error of one value, clipped around the old one: as in the code of Schulman et al. 2017. See math/ppo.h.
#pragma once

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {

template <class V, class M>
struct ValueError {
  V loss;
  V slope;    // d loss / d value
  M clipped;  // the value held at the clip has the larger error
};

template <class V, class M>
FASTRLHF_INLINE ValueError<V, M> value_error(V value, V target, V low, V high) {
  const V held = select(equal(low, low), smaller(high, larger(low, value)), low);  // an old value of nan shows
  const V error = value - target, held_error = held - target;
  const V loss = V(0.5f) * error * error, held_loss = V(0.5f) * held_error * held_error;
  const M clipped = less(loss, held_loss);
  return {larger(loss, held_loss), select(clipped, V(0.0f), select(equal(held, held), error, held)), clipped};
}

}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
