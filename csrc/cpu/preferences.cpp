// pairwise_reward_loss and dpo_loss on CPU. A pair is a few numbers, and there are never enough of them to need more
// than these loops, in double.

#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace fastrlhf {
namespace {

struct Sigmoid {
  double value, minus_log;
};

Sigmoid sigmoid(double x) {
  const double tail = std::exp(-std::abs(x));  // never overflows this way round
  const double minus_log = (x < 0.0 ? -x : 0.0) + std::log1p(tail);
  return {(x < 0.0 ? tail : 1.0) / (1.0 + tail), minus_log};
}

double half_for_a_tie(double difference) { return difference > 0.0 ? 1.0 : difference == 0.0 ? 0.5 : 0.0; }

double share_of(int64_t n) { return n == 0 ? 0.0 : 1.0 / static_cast<double>(n); }

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_reward_loss(const Tensor& chosen, const Tensor& rejected,
                                                                const OptionalTensor& margin, const Tensor& center_coef,
                                                                bool needs_grad) {
  const Tensor c = floats("chosen", chosen, chosen), r = floats("rejected", rejected, chosen);
  const OptionalTensor m = floats("margin", margin, chosen);
  Tensor grad_chosen = grad_like(c, needs_grad), grad_rejected = grad_like(c, needs_grad);
  const double coef = *numbers("center_coef", center_coef, 1), share = share_of(c.numel());
  const float *better = read(c), *worse = read(r), *margins = read(m);
  float *to_better = write(grad_chosen), *to_worse = write(grad_rejected);
  double loss = 0.0, won = 0.0, difference = 0.0, sum_chosen = 0.0, sum_rejected = 0.0;
  for (int64_t i = 0, n = c.numel(); i < n; ++i) {
    const double a = better[i], b = worse[i], d = a - b, both = a + b;
    const double x = margins == nullptr ? d : d - margins[i];
    loss += sigmoid(x).minus_log + coef * both * both;
    won += half_for_a_tie(d);
    difference += d;
    sum_chosen += a;
    sum_rejected += b;
    if (!needs_grad) continue;
    const double slope = sigmoid(-x).value, center = 2.0 * coef * both;
    to_better[i] = static_cast<float>(share * (center - slope));
    to_worse[i] = static_cast<float>(share * (center + slope));
  }
  const Tensor stats = scalars({won * share, difference * share, sum_chosen * share, sum_rejected * share});
  return {scalar(loss * share), stats, grad_chosen, grad_rejected};
}

struct DpoTerm {
  double loss, slope;  // slope: d loss / d h
};

// h: the log-ratio of the chosen response to the reference, less that of the rejected one.
DpoTerm dpo_term(double h, double beta, double e, int64_t variant) {
  const double x = beta * h;
  switch (variant) {
    case kDpoSigmoid: {
      const Sigmoid right = sigmoid(x), wrong = sigmoid(-x);
      return {(1.0 - e) * right.minus_log + e * wrong.minus_log, beta * (e * right.value - (1.0 - e) * wrong.value)};
    }
    case kDpoRobust: {
      const Sigmoid right = sigmoid(x), wrong = sigmoid(-x);
      const double unbiased = 1.0 / (1.0 - 2.0 * e);
      return {((1.0 - e) * right.minus_log - e * wrong.minus_log) * unbiased,
              -beta * ((1.0 - e) * wrong.value + e * right.value) * unbiased};
    }
    case kDpoHinge:
      if (x >= 1.0) return {0.0, 0.0};
      return {1.0 - x, std::isnan(x) ? x : -beta};
    default: {  // ipo
      const double distance = h - 0.5 / beta;
      return {distance * distance, 2.0 * distance};
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dpo_loss(const Tensor& policy_chosen, const Tensor& policy_rejected,
                                                    const Tensor& ref_chosen, const Tensor& ref_rejected,
                                                    const Tensor& options, int64_t variant, bool needs_grad) {
  const Tensor pc = floats("policy_chosen", policy_chosen, policy_chosen),
               pr = floats("policy_rejected", policy_rejected, policy_chosen),
               rc = floats("ref_chosen", ref_chosen, policy_chosen),
               rr = floats("ref_rejected", ref_rejected, policy_chosen);
  require(variant >= kDpoSigmoid && variant <= kDpoIpo, "variant", "0 to 3: sigmoid, robust, hinge, ipo");
  const float* option = numbers("options", options, 2);
  const double beta = option[0], smoothing = option[1], share = share_of(pc.numel());
  Tensor grad_chosen = grad_like(pc, needs_grad), grad_rejected = grad_like(pc, needs_grad);
  const float *better = read(pc), *worse = read(pr), *ref_better = read(rc), *ref_worse = read(rr);
  float *to_better = write(grad_chosen), *to_worse = write(grad_rejected);
  double loss = 0.0, won = 0.0, sum_chosen = 0.0, sum_rejected = 0.0;
  for (int64_t i = 0, n = pc.numel(); i < n; ++i) {
    const double a = static_cast<double>(better[i]) - ref_better[i], b = static_cast<double>(worse[i]) - ref_worse[i];
    const DpoTerm term = dpo_term(a - b, beta, smoothing, variant);
    loss += term.loss;
    won += half_for_a_tie(a - b);
    sum_chosen += a;
    sum_rejected += b;
    if (!needs_grad) continue;
    to_better[i] = static_cast<float>(term.slope * share);
    to_worse[i] = -to_better[i];
  }
  const double scale = beta * share;
  const Tensor stats =
      scalars({won * share, (sum_chosen - sum_rejected) * scale, sum_chosen * scale, sum_rejected * scale});
  return {scalar(loss * share), stats, grad_chosen, grad_rejected};
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("pairwise_reward_loss", TORCH_BOX(&fastrlhf::pairwise_reward_loss));
  m.impl("dpo_loss", TORCH_BOX(&fastrlhf::dpo_loss));
}
