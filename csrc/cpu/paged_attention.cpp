// paged_attention on CPU: torch-facing side. The arithmetic is in kernels/paged_attention.cpp.

#include "rows.h"

namespace fastrlhf {
namespace {

constexpr int64_t kScoresWorthAThread = 512;  // positions times rows and heads

Tensor integers(const char* name, const Tensor& x, int64_t rows) {
  require(x.is_cpu() && x.scalar_type() == ScalarType::Long && x.dim() == 1 && x.size(0) == rows, name,
          "int64 on CPU, one for each row of qkv");
  return whole(x);
}

const float* vector(const char* name, const OptionalTensor& x, int64_t size) {
  if (!x.has_value()) return nullptr;
  require(x->is_cpu() && x->scalar_type() == ScalarType::Float && x->numel() == size && x->is_contiguous(), name,
          "fp32 on CPU, one number for each element of a head");
  return read(*x);
}

// Every row's place must lie in its table and in the rotation's; every page it reaches must be there.
int64_t checked_places(const AttentionArgs& a, int64_t rows, int64_t sequences, int64_t pages, int64_t angles) {
  int64_t longest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t sequence = a.sequence[row], position = a.position[row];
    if (sequence < 0 || sequence >= sequences)
      throw std::out_of_range("sequence: got " + std::to_string(sequence) + ", wanted a row of pages, of which there are " +
                              std::to_string(sequences));
    if (position < 0 || position >= a.pages_stride * kPage || (a.cos != nullptr && position >= angles))
      throw std::out_of_range("position: got " + std::to_string(position) + ", wanted one within pages and cos");
    const int32_t* table = a.pages + sequence * a.pages_stride;
    const int64_t first = a.window > 0 && position >= a.window ? (position - a.window + 1) / kPage : 0;
    for (int64_t i = first; i <= position / kPage; ++i)
      if (table[i] < 0 || table[i] >= pages)
        throw std::out_of_range("pages: got " + std::to_string(table[i]) + ", wanted a page of keys and values, of which " +
                                "there are " + std::to_string(pages));
    longest = std::max(longest, position + 1);
  }
  return longest;
}

Tensor paged_attention(const Tensor& qkv, const Tensor& keys, const Tensor& values, const Tensor& pages,
                       const Tensor& sequence, const Tensor& position, const OptionalTensor& cos,
                       const OptionalTensor& sin, const OptionalTensor& q_norm, const OptionalTensor& k_norm,
                       const Tensor& options, int64_t window) {
  require(qkv.is_cpu() && qkv.dim() == 2 && qkv.scalar_type() == ScalarType::Float &&
              (qkv.size(1) == 1 || qkv.stride(1) == 1),
          "qkv", "[N, (heads + 2 kv_heads) d] on CPU in fp32, with a contiguous last dimension");
  require(keys.is_cpu() && keys.dim() == 4 && keys.size(3) == kPage && keys.is_contiguous() && keys.numel() >= 1, "keys",
          "[pages, kv_heads, d, 16] on CPU, contiguous");
  const int64_t rows = qkv.size(0), kv_heads = keys.size(1), d = keys.size(2);
  require(values.is_cpu() && values.dim() == 4 && values.size(0) == keys.size(0) && values.size(1) == kv_heads &&
              values.size(2) == kPage && values.size(3) == d && values.is_contiguous() &&
              values.scalar_type() == keys.scalar_type(),
          "values", "[pages, kv_heads, 16, d] on CPU, contiguous, in the dtype of keys");
  const int64_t heads = qkv.size(1) / d - 2 * kv_heads;
  require(qkv.size(1) % d == 0 && heads >= 1 && heads % kv_heads == 0, "qkv",
          "(heads + 2 kv_heads) d columns, heads a multiple of kv_heads");
  require(pages.is_cpu() && pages.dim() == 2 && pages.scalar_type() == ScalarType::Int && pages.is_contiguous(), "pages",
          "[sequences, pages of one], int32 on CPU, contiguous");
  require(window >= 0, "window", "at least 0");
  require(cos.has_value() == sin.has_value(), "sin", "to come with cos");
  AttentionArgs args = {};
  int64_t angles = 0;
  if (cos.has_value()) {
    require(cos->is_cpu() && cos->dim() == 2 && cos->scalar_type() == ScalarType::Float && cos->is_contiguous() &&
                cos->size(1) >= 1 && 2 * cos->size(1) <= d,
            "cos", "[positions, r] on CPU in fp32, contiguous, r at most d / 2");
    args.sin = read(floats("sin", *sin, *cos));
    require(sin->is_contiguous(), "sin", "a contiguous tensor");
    args.cos = read(*cos);
    args.rotary = cos->size(1);
    angles = cos->size(0);
  }
  const Tensor sequences = integers("sequence", sequence, rows), positions = integers("position", position, rows);
  const float* number = numbers("numbers", options, 3);
  args.qkv = read(qkv);
  args.qkv_stride = qkv.stride(0);
  args.keys = keys.mutable_data_ptr();
  args.values = values.mutable_data_ptr();
  args.dtype = dtype_of(keys, "keys");
  args.pages = static_cast<const int32_t*>(pages.const_data_ptr());
  args.pages_stride = pages.size(1);
  args.sequence = static_cast<const int64_t*>(sequences.const_data_ptr());
  args.position = static_cast<const int64_t*>(positions.const_data_ptr());
  args.q_norm = vector("q_norm", q_norm, d);
  args.k_norm = vector("k_norm", k_norm, d);
  args.scale = number[0];
  args.softcap = number[1];
  args.eps = number[2];
  args.window = window;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.head_dim = d;
  Tensor out = new_floats({rows, heads * d});
  args.out = write(out);
  const int64_t longest = checked_places(args, rows, pages.size(0), keys.size(0), angles);
  if (rows == 0) return out;
  run(kernels().cache_rows, args, rows, grain_of(kv_heads * d));
  run(kernels().attention, args, rows * kv_heads, 1 + kScoresWorthAThread / longest);
  return out;
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  if (fastrlhf::reference_is_forced()) return;
  m.impl("paged_attention", TORCH_BOX(&fastrlhf::paged_attention));
}
