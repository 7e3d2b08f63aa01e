// The kernels that the hot files define in the namespace of each capability.
#pragma once

#include "../kernels.h"

#define FASTRLHF_DECLARE_KERNELS(capability)                                              \
  namespace fastrlhf {                                                                    \
  namespace capability {                                                                  \
  void log_probs(const LogProbArgs&, int64_t begin, int64_t end);                         \
  void log_probs_backward(const LogProbGradArgs&, int64_t begin, int64_t end);            \
  void lm_head_pack(const LmHeadArgs&, int64_t begin, int64_t end);                       \
  void lm_head_logits(const LmHeadArgs&, int64_t begin, int64_t end);                     \
  void lm_head_rows(const LmHeadArgs&, int64_t begin, int64_t end);                       \
  void lm_head_gradient(const LmHeadArgs&, int64_t begin, int64_t end);                   \
  void lm_head_hidden_gradient(const LmHeadArgs&, int64_t begin, int64_t end);            \
  void lm_head_store_hidden(const LmHeadArgs&, int64_t begin, int64_t end);               \
  void narrow(const NarrowArgs&, int64_t begin, int64_t end);                             \
  void full_kl(const FullKlArgs&, int64_t begin, int64_t end);                            \
  void full_kl_backward(const FullKlArgs&, int64_t begin, int64_t end);                   \
  void rms_norm(const RmsNormArgs&, int64_t begin, int64_t end);                          \
  void rms_norm_backward(const RmsNormGradArgs&, int64_t begin, int64_t end);             \
  void swiglu(const SwigluArgs&, int64_t begin, int64_t end);                             \
  void swiglu_backward(const SwigluGradArgs&, int64_t begin, int64_t end);                \
  void rotate(const RotateArgs&, int64_t begin, int64_t end);                             \
  void pack_weight(const PackArgs&, int64_t begin, int64_t end);                          \
  void packed_rows(const PackedLinearArgs&, int64_t begin, int64_t end);                  \
  void packed_linear(const PackedLinearArgs&, int64_t begin, int64_t end);                \
  void cache_rows(const AttentionArgs&, int64_t begin, int64_t end);                      \
  void attention(const AttentionArgs&, int64_t begin, int64_t end);                       \
  void sample(const SampleArgs&, int64_t begin, int64_t end);                             \
  void kl(const KlArgs&, int64_t begin, int64_t end);                                     \
  void gae(const GaeArgs&, int64_t begin, int64_t end);                                   \
  void rollout(const RolloutArgs&, int64_t begin, int64_t end);                           \
  void count(const CountArgs&, int64_t begin, int64_t end);                               \
  void ppo(const PpoArgs&, int64_t begin, int64_t end);                                   \
  void value(const ValueArgs&, int64_t begin, int64_t end);                               \
  void moments(const MomentsArgs&, int64_t begin, int64_t end);                           \
  void whiten(const WhitenArgs&, int64_t begin, int64_t end);                             \
  }                                                                                       \
  }

#if defined(FASTRLHF_CAPABILITY)
FASTRLHF_DECLARE_KERNELS(FASTRLHF_CAPABILITY)
#endif
