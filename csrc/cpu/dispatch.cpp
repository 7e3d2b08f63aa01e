// From the capability that was chosen to the kernels of that build.

#include "capability.h"
#include "kernels/tables.h"

#define FASTRLHF_TABLE(capability)                                                                              \
  {capability::log_probs, capability::log_probs_backward, capability::lm_head_pack,                             \
   capability::lm_head_logits, capability::lm_head_rows, capability::lm_head_gradient,                          \
   capability::lm_head_hidden_gradient, capability::lm_head_store_hidden, capability::narrow,                   \
   capability::full_kl, capability::full_kl_backward, capability::rms_norm, capability::rms_norm_backward,      \
   capability::swiglu, capability::swiglu_backward, capability::rotate, capability::pack_weight,                \
   capability::packed_rows, capability::packed_linear, capability::cache_rows, capability::attention,           \
   capability::sample, capability::kl, capability::gae, capability::rollout, capability::count,                 \
   capability::ppo, capability::value, capability::moments, capability::whiten}

FASTRLHF_DECLARE_KERNELS(portable)
#if defined(FASTRLHF_HAVE_X86_BUILDS)
FASTRLHF_DECLARE_KERNELS(avx2)
FASTRLHF_DECLARE_KERNELS(avx512)
FASTRLHF_DECLARE_KERNELS(avx512_bf16)
#endif

namespace fastrlhf {

const Kernels& kernels() {
  static const Kernels table_portable = FASTRLHF_TABLE(portable);
#if defined(FASTRLHF_HAVE_X86_BUILDS)
  static const Kernels table_avx2 = FASTRLHF_TABLE(avx2);
  static const Kernels table_avx512 = FASTRLHF_TABLE(avx512);
  static const Kernels table_avx512_bf16 = FASTRLHF_TABLE(avx512_bf16);
  switch (cpu_capability()) {
    case Capability::avx512_bf16:
      return table_avx512_bf16;
    case Capability::avx512:
      return table_avx512;
    case Capability::avx2:
      return table_avx2;
    case Capability::portable:
      break;
  }
#endif
  return table_portable;
}

}  // namespace fastrlhf
