// The physical limits that the benchmarks compare with: what plain loops need to move the bytes once.
//
// Compiled when a benchmark first needs it (limits.py), for the processor it runs on. OpenMP, because torch has loaded
// that library already: these loops run in the threads that torch's run in, and neither has to wait for the other's.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kBlock = 2048;  // what threads divide is a multiple of this
constexpr int kStep = 64;         // floats of each stream in turn: four cache lines

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

// Streams of n elements, side by side: floats to read, bytes to read (a mask), floats to write.
float streams(const float* const* reads, int n_reads, const uint8_t* const* masks, int n_masks, float* const* writes,
              int n_writes, int64_t n, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int thread = 0; thread < threads; ++thread) {
    const Range range = share(n, thread, threads);
    float sums[kStep] = {};
    const auto step = [&](int64_t i, int size) __attribute__((always_inline)) {
      for (int r = 0; r < n_reads; ++r)
        for (int k = 0; k < size; ++k) sums[k] += reads[r][i + k];
      for (int r = 0; r < n_masks; ++r)
        for (int k = 0; k < size; ++k) sums[k] += masks[r][i + k];
      for (int w = 0; w < n_writes; ++w)
        for (int k = 0; k < size; ++k) writes[w][i + k] = sums[k];
    };
    int64_t i = range.begin;
    for (; i + kStep <= range.end; i += kStep) step(i, kStep);
    step(i, static_cast<int>(range.end - i));
    for (int k = 0; k < kStep; ++k) total += sums[k];
  }
  return total;
}

}  // extern "C"
