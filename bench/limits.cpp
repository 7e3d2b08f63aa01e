// The physical limits that the benchmarks compare with: what plain loops need to move the bytes once.
//
// Compiled when a benchmark first needs it (limits.py), for the processor it runs on. OpenMP, because torch has loaded
// that library already: these loops run in the threads that torch's run in, and neither has to wait for the other's.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kBlock = 2048;  // floats that stay in the first-level cache

struct Range {
  int64_t begin, end;
};

Range share(int64_t n, int thread, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  return {std::min(n, blocks * thread / threads * kBlock), std::min(n, blocks * (thread + 1) / threads * kBlock)};
}

// Sixteen sums beside each other, so that no addition waits for the one before it.
float sum(const float* x, int64_t begin, int64_t end) {
  constexpr int kSums = 64;
  float sums[kSums] = {};
  int64_t i = begin;
  for (; i + kSums <= end; i += kSums)
    for (int j = 0; j < kSums; ++j) sums[j] += x[i + j];
  float total = 0;
  for (; i < end; ++i) total += x[i];
  for (int j = 0; j < kSums; ++j) total += sums[j];
  return total;
}

}  // namespace

extern "C" {

// n floats, read once. Other types are read as floats too: it is the bytes that count.
float read_once(const float* x, int64_t n, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int thread = 0; thread < threads; ++thread) {
    const Range range = share(n, thread, threads);
    total += sum(x, range.begin, range.end);
  }
  return total;
}

// n floats: read from one end to the other, then read again and written over.
float read_read_write(float* x, int64_t n, int threads) {
  const float total = read_once(x, n, threads);
  const float factor = total == 0.5f ? 0.5f : 1.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; ++thread) {
    const Range range = share(n, thread, threads);
    for (int64_t i = range.begin; i < range.end; ++i) x[i] *= factor;
  }
  return total;
}

// Streams of n elements: floats to read, bytes to read (a mask), floats to write, block by block.
float streams(const float* const* reads, int n_reads, const uint8_t* const* masks, int n_masks, float* const* writes,
              int n_writes, int64_t n, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int thread = 0; thread < threads; ++thread) {
    const Range range = share(n, thread, threads);
    float block[kBlock] = {};
    for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
      const int64_t size = std::min(kBlock, range.end - begin);
      for (int r = 0; r < n_reads; ++r) {
        const float* x = reads[r] + begin;
        for (int64_t i = 0; i < size; ++i) block[i] += x[i];
      }
      for (int r = 0; r < n_masks; ++r) {
        const uint8_t* x = masks[r] + begin;
        for (int64_t i = 0; i < size; ++i) block[i] += x[i];
      }
      for (int w = 0; w < n_writes; ++w) std::copy(block, block + size, writes[w] + begin);
    }
    total += sum(block, 0, kBlock);
  }
  return total;
}

}  // extern "C"
