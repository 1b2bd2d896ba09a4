// The instruction sets that vector code is compiled for, the best first: a name, and what a CPU must have for it.
// CMakeLists.txt reads these lines too, and compiles for what they name: a set is added here and nowhere else.
#pragma once

#if defined(__x86_64__)
// clang-format off
#define LLMKERN_ISAS(F, ...) \
  F(avx512, has("avx512f") && has("avx512bw") && has("avx512dq") && has("avx512vl") && has("fma") && has("f16c") __VA_OPT__(,) __VA_ARGS__) \
  F(avx2, has("avx2") && has("fma") && has("f16c") __VA_OPT__(,) __VA_ARGS__) \
  F(baseline, true __VA_OPT__(,) __VA_ARGS__)
// clang-format on
#else
#define LLMKERN_ISAS(F, ...) F(baseline, true __VA_OPT__(, ) __VA_ARGS__)
#endif
