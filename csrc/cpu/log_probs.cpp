// token_log_probs, with and without entropy, on CPU: torch-facing side. The arithmetic is in kernels/log_probs.cpp.

#include "rows.h"

namespace fastrlhf {
namespace {

void check_logits(const Tensor& logits, const Tensor& tokens) {
  check_rows("logits", logits);
  bool matches = tokens.is_cpu() && tokens.scalar_type() == ScalarType::Long && tokens.dim() == logits.dim() - 1;
  for (int64_t d = 0; matches && d < tokens.dim(); ++d) matches = tokens.size(d) == logits.size(d);
  require(matches, "tokens", "int64 on CPU, in the shape of logits without the vocabulary");
}

const int64_t* read_tokens(const Tensor& tokens) { return static_cast<const int64_t*>(tokens.const_data_ptr()); }

void forward(const Tensor& logits, const Tensor& tokens, const Tensor& temperature, const Tensor& log_probs, float* entropy,
             const Tensor& normaliser) {
  check_logits(logits, tokens);
  const int64_t vocabulary = logits.size(-1);
  const Tensor flat_tokens = checked_tokens(tokens, vocabulary);
  const auto offsets = row_offsets(logits);
  const LogProbArgs args = {logits.const_data_ptr(),  offsets.data(),   read_tokens(flat_tokens),
                            vocabulary,               dtype_of(logits), read_temperature(temperature),
                            write(log_probs),         entropy,          write(normaliser)};
  run(kernels().log_probs, args, tokens.numel(), rows_worth_a_thread(vocabulary));
}

void backward(const Tensor& grad_log_probs, const OptionalTensor& grad_entropy, const Tensor& logits,
              const Tensor& tokens, const Tensor& normaliser, const OptionalTensor& entropy, const Tensor& temperature,
              const Tensor& grad_logits) {
  check_logits(logits, tokens);
  const int64_t vocabulary = logits.size(-1);
  const Tensor flat_tokens = checked_tokens(tokens, vocabulary);
  const Tensor g = floats("grad_log_probs", grad_log_probs, tokens), norm = checked_normaliser(normaliser, tokens);
  const OptionalTensor h = floats("grad_entropy", grad_entropy, tokens), ent = floats("entropy", entropy, tokens);
  const auto offsets = row_offsets(logits), grad_offsets = row_offsets(grad_logits);
  const LogProbGradArgs args = {logits.const_data_ptr(),
                                offsets.data(),
                                grad_logits.mutable_data_ptr(),
                                grad_offsets.data(),
                                read_tokens(flat_tokens),
                                vocabulary,
                                dtype_of(logits),
                                read_temperature(temperature),
                                read(g),
                                read(h),
                                read(norm),
                                read(ent)};
  run(kernels().log_probs_backward, args, tokens.numel(), rows_worth_a_thread(vocabulary));
}

std::tuple<Tensor, Tensor> token_log_probs(const Tensor& logits, const Tensor& tokens, const Tensor& temperature) {
  Tensor log_probs = new_floats_like(tokens), normaliser = new_normaliser(tokens);
  forward(logits, tokens, temperature, log_probs, nullptr, normaliser);
  return {log_probs, normaliser};
}

std::tuple<Tensor, Tensor, Tensor> token_log_probs_and_entropy(const Tensor& logits, const Tensor& tokens,
                                                               const Tensor& temperature) {
  Tensor log_probs = new_floats_like(tokens), entropy = new_floats_like(tokens), normaliser = new_normaliser(tokens);
  forward(logits, tokens, temperature, log_probs, write(entropy), normaliser);
  return {log_probs, entropy, normaliser};
}

Tensor token_log_probs_backward(const Tensor& grad_log_probs, const Tensor& logits, const Tensor& tokens,
                                const Tensor& normaliser, const Tensor& temperature) {
  Tensor grad_logits = new_like(logits);
  backward(grad_log_probs, std::nullopt, logits, tokens, normaliser, std::nullopt, temperature, grad_logits);
  return grad_logits;
}

Tensor token_log_probs_and_entropy_backward(const Tensor& grad_log_probs, const Tensor& grad_entropy,
                                            const Tensor& logits, const Tensor& tokens, const Tensor& normaliser,
                                            const Tensor& entropy, const Tensor& temperature) {
  Tensor grad_logits = new_like(logits);
  backward(grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature, grad_logits);
  return grad_logits;
}

void token_log_probs_backward_(const Tensor& grad_log_probs, const Tensor& logits, const Tensor& tokens,
                               const Tensor& normaliser, const Tensor& temperature) {
  backward(grad_log_probs, std::nullopt, logits, tokens, normaliser, std::nullopt, temperature, logits);
}

void token_log_probs_and_entropy_backward_(const Tensor& grad_log_probs, const Tensor& grad_entropy,
                                           const Tensor& logits, const Tensor& tokens, const Tensor& normaliser,
                                           const Tensor& entropy, const Tensor& temperature) {
  backward(grad_log_probs, grad_entropy, logits, tokens, normaliser, entropy, temperature, logits);
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("token_log_probs", TORCH_BOX(&fastrlhf::token_log_probs));
  m.impl("token_log_probs_and_entropy", TORCH_BOX(&fastrlhf::token_log_probs_and_entropy));
  m.impl("token_log_probs_backward", TORCH_BOX(&fastrlhf::token_log_probs_backward));
  m.impl("token_log_probs_and_entropy_backward", TORCH_BOX(&fastrlhf::token_log_probs_and_entropy_backward));
  m.impl("token_log_probs_backward_", TORCH_BOX(&fastrlhf::token_log_probs_backward_));
  m.impl("token_log_probs_and_entropy_backward_", TORCH_BOX(&fastrlhf::token_log_probs_and_entropy_backward_));
}
