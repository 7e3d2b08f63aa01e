// Packed linear layers on CPU: torch-facing side. The arithmetic is in kernels/packed_linear.cpp.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rows.h"

namespace fastrlhf {
namespace {

constexpr int64_t kElementsWorthAThread = 1 << 16;  // of a weight
constexpr int64_t kNumbersWorthAThread = 1 << 16;   // of the rows
constexpr uintptr_t kHugePage = 2 << 20;

int64_t panel_size_of(int64_t columns) { return kPackedRows * (columns + columns % 2); }

int64_t grain_of_panels(int64_t rows, int64_t columns) {
  return std::max<int64_t>(1, kElementsWorthAThread / (kPackedRows * columns * std::max<int64_t>(1, rows / 16)));
}

// A weight of hundreds of megabytes is read once a step: without large pages, a good part of that is page table walks,
// and the prefetcher stops at the end of each.
void ask_for_huge_pages(const Tensor& packed, int64_t bytes) {
#if defined(__linux__)
  const auto start = reinterpret_cast<uintptr_t>(packed.const_data_ptr());
  const uintptr_t begin = (start + kHugePage - 1) / kHugePage * kHugePage, end = (start + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void pack_weight_(const Tensor& packed, const Tensor& weight, int64_t first, int64_t step) {
  require(weight.is_cpu() && weight.dim() == 2 && weight.numel() >= 1, "weight", "[rows, K] on CPU, neither of them 0");
  check_rows("weight", weight);
  const int64_t rows = weight.size(0), columns = weight.size(1), panels = (rows + kPackedRows - 1) / kPackedRows;
  require(packed.is_cpu() && packed.dim() == 2 && packed.is_contiguous() && packed.size(1) == panel_size_of(columns),
          "packed", "[panels, 64 (K + K % 2)] on CPU, contiguous");
  require(first >= 0 && step >= 1 && first + (panels - 1) * step < packed.size(0), "packed",
          "as many panels as first and step reach");
  const PackArgs args = {weight.const_data_ptr(), weight.stride(0),          rows,  columns, dtype_of(weight, "weight"),
                         dtype_of(packed, "packed"), packed.mutable_data_ptr(), packed.size(1), first, step};
  if (first == 0) ask_for_huge_pages(packed, packed.numel() * (args.packed_dtype == kFloat32 ? 4 : 2));
  run(kernels().pack_weight, args, panels, grain_of_panels(16, columns));
}

const float* vector(const char* name, const OptionalTensor& x, int64_t size) {
  if (!x.has_value()) return nullptr;
  require(x->is_cpu() && x->scalar_type() == ScalarType::Float && x->numel() == size && x->is_contiguous(), name,
          "fp32 on CPU, one number for each column");
  return read(*x);
}

void packed_linear_(const Tensor& out, const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t norm,
                    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps, int64_t activation,
                    bool gated, bool adds) {
  require(x.is_cpu() && x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.size(1) >= 1 &&
              (x.size(1) == 1 || x.stride(1) == 1),
          "x", "[N, K] on CPU in fp32, with a contiguous last dimension");
  const int64_t rows = x.size(0), columns = x.size(1);
  require(out.is_cpu() && out.dim() == 2 && out.scalar_type() == ScalarType::Float && out.size(0) == rows &&
              out.size(1) >= 1 && (out.size(1) == 1 || out.stride(1) == 1),
          "out", "[N, rows of the weight] on CPU in fp32, with a contiguous last dimension");
  const int64_t width = out.size(1), panels = (width + kPackedRows - 1) / kPackedRows;
  require(packed.is_cpu() && packed.dim() == 2 && packed.is_contiguous() && packed.size(1) == panel_size_of(columns) &&
              packed.size(0) == (gated ? 2 * panels : panels),
          "packed", "the panels of a weight with K columns and as many rows as out has columns, or twice as many if gated");
  require(norm >= kNoNorm && norm <= kLayerNorm && activation >= kIdentity && activation <= kGeluByTanh, "norm, activation",
          "one of those in csrc/ops.cpp");
  if (rows == 0) return;
  PackedLinearArgs args = {};
  args.x = read(x);
  args.x_stride = x.stride(0);
  args.rows = rows;
  args.columns = columns;
  args.packed = packed.const_data_ptr();
  args.panel_size = packed.size(1);
  args.dtype = dtype_of(packed, "packed");
  args.bias = vector("bias", bias, gated ? 2 * width : width);
  args.norm = static_cast<int>(norm);
  args.norm_weight = vector("norm_weight", norm_weight, columns);
  args.norm_bias = vector("norm_bias", norm_bias, columns);
  args.eps = static_cast<float>(eps);
  args.activation = static_cast<int>(activation);
  args.gated = gated;
  args.adds = adds;
  args.out = write(out);
  args.out_stride = out.stride(0);
  args.width = width;
  const Tensor left = new_floats({rows * (columns + 16) + 16});
  args.left = left.mutable_data_ptr();
  run(kernels().packed_rows, args, rows, std::max<int64_t>(1, kNumbersWorthAThread / columns));
  run(kernels().packed_linear, args, panels, grain_of_panels(rows, columns));
}

}  // namespace
}  // namespace fastrlhf

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  m.impl("pack_weight_", TORCH_BOX(&fastrlhf::pack_weight_));
  m.impl("packed_linear_", TORCH_BOX(&fastrlhf::packed_linear_));
}
