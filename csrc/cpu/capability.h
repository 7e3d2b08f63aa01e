// Which of the builds of the hot files this processor (or FASTRLHF_CPU_CAPABILITY) asks for.
#pragma once

namespace fastrlhf {

enum class Capability { portable, avx2, avx512, avx512_bf16 };

// Decided once. Throws std::invalid_argument when the environment variable names something unknown or unsupported.
Capability cpu_capability();
const char* cpu_capability_name();

// FASTRLHF_BACKEND=reference: register no kernel, so that fallback.py (and with it reference.py) serves every call.
bool reference_is_forced();

}  // namespace fastrlhf
