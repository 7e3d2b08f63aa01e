// The schema of every op, once. Autograd and shape functions stand in fastrlhf/functional, the CPU kernels in csrc/cpu,
// the GPU kernels in kernels/triton; fastrlhf/fallback.py serves every device that has no kernel.
//
// Conventions: optional limits are passed as +inf for "none"; enumerations are the integers of csrc/cpu/kernels.h.
// Token-wise ops return their gradients next to the loss, because they are known as soon as the loss is.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastrlhf, m) {
  // log p = z_y/T - logsumexp(z/T). Rows whose token is -100 are not read and give 0.
  m.def("token_log_probs(Tensor logits, Tensor tokens, float temperature) -> (Tensor log_probs, Tensor logsumexp)");
  m.def(
      "token_log_probs_and_entropy(Tensor logits, Tensor tokens, float temperature)"
      " -> (Tensor log_probs, Tensor entropy, Tensor logsumexp)");
  // dz = (1/T) [g (delta - p) - h p (log p + H)], in the logits' dtype; the variants with _ write it over the logits.
  m.def(
      "token_log_probs_backward(Tensor grad_log_probs, Tensor logits, Tensor tokens, Tensor logsumexp,"
      " float temperature) -> Tensor");
  m.def(
      "token_log_probs_and_entropy_backward(Tensor grad_log_probs, Tensor grad_entropy, Tensor logits, Tensor tokens,"
      " Tensor logsumexp, Tensor entropy, float temperature) -> Tensor");
  m.def(
      "token_log_probs_backward_(Tensor grad_log_probs, Tensor(a!) logits, Tensor tokens, Tensor logsumexp,"
      " float temperature) -> ()");
  m.def(
      "token_log_probs_and_entropy_backward_(Tensor grad_log_probs, Tensor grad_entropy, Tensor(a!) logits,"
      " Tensor tokens, Tensor logsumexp, Tensor entropy, float temperature) -> ()");

  m.def(
      "kl_divergence(Tensor log_probs, Tensor ref_log_probs, int estimator, float clamp_input, float clamp_output)"
      " -> Tensor");
  // With respect to log_probs; the gradient of ref_log_probs is its negative.
  m.def(
      "kl_divergence_backward(Tensor grad, Tensor log_probs, Tensor ref_log_probs, int estimator, float clamp_input,"
      " float clamp_output) -> Tensor");

  m.def(
      "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? bootstrap_values, float gamma, float lam,"
      " int mask_mode) -> (Tensor advantages, Tensor returns)");

  m.def(
      "ppo_loss(Tensor log_probs, Tensor old_log_probs, Tensor advantages, Tensor mask, Tensor? weights,"
      " Tensor? advantage_stats, Tensor? entropy, Tensor? ref_log_probs, Tensor? denominator, float clip_low,"
      " float clip_high, float dual_clip, float log_ratio_clamp, float entropy_coef, float kl_coef, int kl_estimator,"
      " bool sequence_ratio, int aggregation, bool needs_grad)"
      " -> (Tensor loss, Tensor stats, Tensor grad_log_probs, Tensor grad_entropy)");
  m.def(
      "value_loss(Tensor values, Tensor? old_values, Tensor returns, Tensor mask, Tensor? denominator, float clip,"
      " int aggregation, bool needs_grad) -> (Tensor loss, Tensor stats, Tensor grad_values)");

  m.def("masked_mean(Tensor x, Tensor mask) -> (Tensor mean, Tensor count)");  // [R, C] -> [R], [R]
  m.def(
      "masked_whiten(Tensor x, Tensor mask, bool shift_mean, bool unbiased, float eps)"
      " -> (Tensor whitened, Tensor stats)");  // stats: mean, rstd, count

  m.def(
      "pairwise_reward_loss(Tensor chosen, Tensor rejected, Tensor? margin, float center_coef, bool needs_grad)"
      " -> (Tensor loss, Tensor stats, Tensor grad_chosen, Tensor grad_rejected)");
}
