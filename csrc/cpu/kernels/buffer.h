// Memory of a thread, in hot files, which use nothing of the standard library's.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "../simd.h"

namespace fastrlhf {
namespace FASTRLHF_CAPABILITY {
namespace {

template <class E>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<E*>(aligned_alloc(64, (n * sizeof(E) + 64) / 64 * 64))) {
    if (data_ == nullptr) abort();  // no exception leaves a parallel region
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  E* data() { return data_; }

 private:
  E* data_;
};

}  // namespace
}  // namespace FASTRLHF_CAPABILITY
}  // namespace fastrlhf
