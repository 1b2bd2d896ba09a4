#include "core/probe.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

constexpr int kChains = 12;

template <class S>
int64_t fma(int64_t rounds, S* sink) {
  const Vec<S> x = splat(S(0.999)), y = splat(sink[0]);
  Vec<S> sum[kChains];  // that start apart: equal chains would be computed once
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = y * S(i);
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * x + y;
  Vec<S> total{};
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) total += sum[i];
  sink[0] = total[0];
  return int64_t{2} * kChains * kLanes<S>;
}

#if defined(__AVX512F__)
__attribute__((target("avx512bf16"))) int64_t dot_bf16(int64_t rounds, float* sink) {
  const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f00));
  __m512bh y;
  const __m512i bits = _mm512_set1_epi32(bits_as<int32_t>(sink[0]));
  memcpy(&y, &bits, sizeof y);
  __m512 sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(sink[0] * static_cast<float>(i));
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], x, y);
  __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) total = _mm512_add_ps(total, sum[i]);
  sink[0] = _mm512_cvtss_f32(total);
  return int64_t{4} * kChains * kLanes<float>;
}
#else
constexpr int64_t (*dot_bf16)(int64_t, float*) = nullptr;
#endif

uint64_t read(const char* from, int64_t n) {
  vu32 sum[4] = {};
  constexpr int step = 4 * kVectorBytes;
  int64_t i = 0;
  for (; i + step <= n; i += step)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      vu32 v;
      memcpy(&v, from + i + j * kVectorBytes, sizeof v);
      sum[j] ^= v;
    }
  const vu32 total = (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]);
  return total[0];
}

void stream(char* to, int64_t n) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < n; i += kVectorBytes) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_setzero_si512());
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_setzero_si256());
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
#endif
  }
  _mm_sfence();
#else
  memset(to, 0, n);
#endif
}

}  // namespace

extern const ProbeKernels probe{
    .fma_f32 = &fma<float>, .fma_f64 = &fma<double>, .dot_bf16 = dot_bf16, .read = &read, .stream = &stream};

}  // namespace llmkern::cpu::LLMKERN_ISA
