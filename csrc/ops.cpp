// The schema of every op, once. Autograd and shape functions stand in fastrlhf/functional, the CPU kernels in csrc/cpu,
// the GPU kernels in kernels/triton; fastrlhf/fallback.py serves every device that has no kernel.
//
// Conventions. Numbers (temperature, coefficients, limits) come as fp32 tensors in CPU memory, whatever the device: read
// there without a stall, and not compile-time constants of torch.compile, as floats would be. Optional limits are +inf
// for "none"; enumerations are the integers of csrc/cpu/kernels.h. Token-wise losses return their gradients next to the
// loss, because they are known as soon as the loss is.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastrlhf, m) {
  // log p = z_y/T - logsumexp(z/T). Rows whose token is -100 are not read and give 0. normaliser: [..., 2], m and log s
  // with logsumexp(z/T) = m/T + log s; as one number it would lose the digits that p is made of.
  m.def("token_log_probs(Tensor logits, Tensor tokens, Tensor temperature) -> (Tensor log_probs, Tensor normaliser)");
  m.def(
      "token_log_probs_and_entropy(Tensor logits, Tensor tokens, Tensor temperature)"
      " -> (Tensor log_probs, Tensor entropy, Tensor normaliser)");
  // dz = (1/T) [g (delta - p) - h p (log p + H)], in the logits' dtype; the variants with _ write it over the logits.
  m.def(
      "token_log_probs_backward(Tensor grad_log_probs, Tensor logits, Tensor tokens, Tensor normaliser,"
      " Tensor temperature) -> Tensor");
  m.def(
      "token_log_probs_and_entropy_backward(Tensor grad_log_probs, Tensor grad_entropy, Tensor logits, Tensor tokens,"
      " Tensor normaliser, Tensor entropy, Tensor temperature) -> Tensor");
  m.def(
      "token_log_probs_backward_(Tensor grad_log_probs, Tensor(a!) logits, Tensor tokens, Tensor normaliser,"
      " Tensor temperature) -> ()");
  m.def(
      "token_log_probs_and_entropy_backward_(Tensor grad_log_probs, Tensor grad_entropy, Tensor(a!) logits,"
      " Tensor tokens, Tensor normaliser, Tensor entropy, Tensor temperature) -> ()");

  // The same from hidden [N, H] and the LM head, for tokens [N]. Logits are x W^T + bias, capped to softcap tanh(z /
  // softcap), and exist some rows or tiles at a time, of about chunk_bytes. numbers: [2], temperature, softcap. A token of
  // INT64_MIN counts, but is none of this weight's (a vocabulary that is spread over devices): its log-prob is nan.
  m.def(
      "linear_token_log_probs(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor numbers,"
      " int chunk_bytes) -> (Tensor log_probs, Tensor entropy, Tensor normaliser)");
  // Each gradient in its tensor's dtype, the weight's in fp32 if so wanted, and empty if not needed.
  m.def(
      "linear_token_log_probs_backward(Tensor grad_log_probs, Tensor? grad_entropy, Tensor hidden, Tensor weight,"
      " Tensor? bias, Tensor tokens, Tensor normaliser, Tensor entropy, Tensor numbers, int chunk_bytes,"
      " bool needs_hidden, bool needs_weight, bool needs_bias, bool weight_grad_in_fp32)"
      " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  // The mean of -log p over the tokens that count. stats: [2], mean entropy and count.
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor numbers, int chunk_bytes,"
      " Tensor? denominator, bool needs_hidden, bool needs_weight, bool needs_bias, bool weight_grad_in_fp32)"
      " -> (Tensor loss, Tensor stats, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  // ppo_loss of those log-probs and entropies. tokens and all after chunk_bytes in one shape, of N elements; where the
  // mask is 0, tokens are -100.
  m.def(
      "linear_ppo_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor numbers, int chunk_bytes,"
      " Tensor old_log_probs, Tensor advantages, Tensor mask, Tensor? weights, Tensor? advantage_stats,"
      " Tensor? ref_log_probs, Tensor? denominator, Tensor options, int kl_estimator, int aggregation,"
      " bool needs_hidden, bool needs_weight, bool needs_bias, bool weight_grad_in_fp32)"
      " -> (Tensor loss, Tensor stats, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");

  // KL = sum_j p_j (log p_j - log q_j), p and q the softmax of both at T. Rows whose mask is 0 are not read and give 0.
  m.def(
      "full_kl(Tensor logits, Tensor ref_logits, Tensor? mask, Tensor temperature)"
      " -> (Tensor kl, Tensor normaliser, Tensor ref_normaliser)");
  // dz = (g/T) p (log p - log q - KL), dz_ref = (g/T) (q - p), each in its logits' dtype and empty if not needed.
  m.def(
      "full_kl_backward(Tensor grad, Tensor logits, Tensor ref_logits, Tensor? mask, Tensor kl, Tensor normaliser,"
      " Tensor ref_normaliser, Tensor temperature, bool needs_grad, bool needs_ref_grad)"
      " -> (Tensor grad_logits, Tensor grad_ref_logits)");

  // clamp: [2], of the log-ratio, of the estimate.
  m.def("kl_divergence(Tensor log_probs, Tensor ref_log_probs, int estimator, Tensor clamp) -> Tensor");
  // With respect to log_probs; the gradient of ref_log_probs is its negative.
  m.def(
      "kl_divergence_backward(Tensor grad, Tensor log_probs, Tensor ref_log_probs, int estimator, Tensor clamp)"
      " -> Tensor");

  // options: [2], gamma, lam.
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? bootstrap_values, Tensor options, int mask_mode)"
      " -> (Tensor advantages, Tensor returns)");
  // [N] values of sequences one after the other; sequence b is cu_seqlens[b] .. cu_seqlens[b + 1] (int32 or int64).
  m.def(
      "gae_packed(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? mask, Tensor? bootstrap_values,"
      " Tensor options, int mask_mode) -> (Tensor advantages, Tensor returns)");
  // options: [4], kl_coef, score_clip, gamma, lam. kl: [B], summed over the tokens that count. advantage_stats: [2],
  // mean and 1/sqrt(unbiased variance + 1e-8) of the advantages that count.
  m.def(
      "rollout_advantages(Tensor scores, Tensor log_probs, Tensor ref_log_probs, Tensor values, Tensor mask,"
      " Tensor? token_rewards, Tensor? bootstrap_values, Tensor options, int kl_estimator, int mask_mode)"
      " -> (Tensor advantages, Tensor returns, Tensor kl, Tensor advantage_stats)");

  // options: [6], clip_low, clip_high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef.
  m.def(
      "ppo_loss(Tensor log_probs, Tensor old_log_probs, Tensor advantages, Tensor mask, Tensor? weights,"
      " Tensor? advantage_stats, Tensor? entropy, Tensor? ref_log_probs, Tensor? denominator, Tensor options,"
      " int kl_estimator, bool sequence_ratio, int aggregation, bool needs_grad)"
      " -> (Tensor loss, Tensor stats, Tensor grad_log_probs, Tensor grad_entropy)");
  m.def(
      "value_loss(Tensor values, Tensor? old_values, Tensor returns, Tensor mask, Tensor? denominator, Tensor clip,"
      " int aggregation, bool needs_grad) -> (Tensor loss, Tensor stats, Tensor grad_values)");

  m.def("masked_mean(Tensor x, Tensor mask) -> (Tensor mean, Tensor count)");  // [R, C] -> [R], [R]
  m.def(
      "masked_whiten(Tensor x, Tensor mask, bool shift_mean, bool unbiased, Tensor eps)"
      " -> (Tensor whitened, Tensor stats)");  // stats: mean, rstd, count

  m.def(
      "pairwise_reward_loss(Tensor chosen, Tensor rejected, Tensor? margin, Tensor center_coef, bool needs_grad)"
      " -> (Tensor loss, Tensor stats, Tensor grad_chosen, Tensor grad_rejected)");
  // options: [2], beta, label_smoothing. The gradients are those of policy_chosen and policy_rejected.
  m.def(
      "dpo_loss(Tensor policy_chosen, Tensor policy_rejected, Tensor ref_chosen, Tensor ref_rejected, Tensor options,"
      " int variant, bool needs_grad)"
      " -> (Tensor loss, Tensor stats, Tensor grad_chosen, Tensor grad_rejected)");

  // Between the products of a decoder layer, each computed in fp32 and rounded once. y = weight x / sqrt(mean(x^2) + eps)
  // over the last dimension; rstd: one number a row, fp32. Gradients that are not needed are empty.
  m.def("rms_norm(Tensor x, Tensor weight, Tensor eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, bool needs_x, bool needs_weight)"
      " -> (Tensor grad_x, Tensor grad_weight)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");  // gate sigmoid(gate) up
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)");
  // x: [B, L, heads, d], cos and sin: [B, L, d] or [1, L, d], fp32. With r = d / 2, y_i = x_i cos_i - x_(i + r) sin_i and
  // y_(i + r) = x_(i + r) cos_(i + r) + x_i sin_(i + r). back: the transpose, which is the gradient. y is contiguous.
  m.def("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor");

  // logits: [B, V]; seed, sequence, position: [B], int64. numbers: [3], temperature (0: the most likely token), top_p, min_p.
  m.def(
      "sample_tokens(Tensor logits, Tensor seed, Tensor sequence, Tensor position, Tensor numbers, int top_k)"
      " -> (Tensor tokens, Tensor log_probs)");

  // Causal attention of rows qkv [N, (heads + 2 kv_heads) d] to a paged KV cache. First, q and k of each row are
  // RMS-normalised (if q_norm [d], k_norm [d]) and rotated (if cos and sin, [L, r], of elements i and i + r), and k and v
  // written to the row's place; then each row attends to its sequence's positions up to its own, or the last `window`
  // ones (0: all). So the rows of a prompt may come in one call, and those of different sequences too.
  // keys: [pages, kv_heads, d, 16], values: [pages, kv_heads, 16, d], in one dtype: a page holds 16 positions. pages:
  // [sequences, most pages of one], int32, in order. sequence, position: [N], int64: a row of `pages`, and the place in it.
  // numbers: [3], scale, softcap of the scores (infinity: none), eps of the norms. Returns [N, heads d], fp32. On CPU, qkv
  // is fp32. No two rows may have the same place.
  m.def(
      "paged_attention(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor pages, Tensor sequence, Tensor position,"
      " Tensor? cos, Tensor? sin, Tensor? q_norm, Tensor? k_norm, Tensor numbers, int window) -> Tensor");

  // Linear layers for few rows, CPU only. pack_weight_ lays rows of weight [rows, K] into panels of 64 rows, panel
  // first, first + step, ..., as packed_linear_ reads them. packed: [panels, 64 (K + K % 2)], in any of the float dtypes.
  m.def("pack_weight_(Tensor(a!) packed, Tensor weight, int first, int step) -> ()");
  // out (+)= activation(norm(x) W^T + bias). x: [N, K], out: [N, rows of W], fp32. norm: 0 none, 1 RMS, 2 layer norm.
  // activation: 0 none, 1 silu, 2 gelu, 3 gelu by tanh. gated: panels alternate between gate and up, bias holds first the
  // one, then the other, and out is activation(gate) up, as wide as one of them.
  m.def(
      "packed_linear_(Tensor(a!) out, Tensor x, Tensor packed, Tensor? bias, int norm, Tensor? norm_weight,"
      " Tensor? norm_bias, float eps, int activation, bool gated, bool adds) -> ()");
}
