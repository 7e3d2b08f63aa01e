#include "capability.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastrlhf {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Capability best_of_this_processor() {
#if defined(FASTRLHF_HAVE_X86_BUILDS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Capability::avx512_bf16 : Capability::avx512;
  // f16c is not a name that every compiler's __builtin_cpu_supports knows; every processor with AVX2 has it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::avx2;
#endif
  return Capability::portable;
}

Capability decide() {
  const Capability best = best_of_this_processor();
  const char* asked = std::getenv("FASTRLHF_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') return best;
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(asked, kNames[i]) != 0) continue;
    if (i > static_cast<int>(best))
      throw std::invalid_argument(std::string("FASTRLHF_CPU_CAPABILITY: got '") + asked +
                                  "', but the best this processor and this build can run is '" +
                                  kNames[static_cast<int>(best)] + "'");
    return static_cast<Capability>(i);
  }
  throw std::invalid_argument(std::string("FASTRLHF_CPU_CAPABILITY: got '") + asked +
                              "', wanted one of 'avx512_bf16', 'avx512', 'avx2', 'portable'");
}

}  // namespace

Capability cpu_capability() {
  static const Capability chosen = decide();  // a throwing initialiser runs again at the next call
  return chosen;
}

const char* cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

bool reference_is_forced() {
  const char* backend = std::getenv("FASTRLHF_BACKEND");
  return backend != nullptr && std::strcmp(backend, "reference") == 0;
}

}  // namespace fastrlhf
