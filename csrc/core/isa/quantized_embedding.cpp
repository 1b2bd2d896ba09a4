#include "core/quantized_embedding.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

constexpr int kLine = 64;

// --- quantise ---

// The smallest fp32 number that is not below x >= 0.
float rounded_up(double x) {
  const float near = static_cast<float>(x);
  return static_cast<double>(near) < x ? bits_as<float>(bits_as<uint32_t>(near) + 1) : near;
}

template <class A>
struct Extremes {
  A low, high;
  bool finite;
};

template <class T>
Extremes<Accum<T>> extremes(const T* x, int64_t D) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  if (D == 0) return {0, 0, true};
  const A first = load_one(x);
  // x - x is 0, or NaN for NaN and infinities.
  Vec<A> low = splat(first), high = low, poison{};
  const auto take = [&](Vec<A> v) {
    low = v < low ? v : low;
    high = v > high ? v : high;
    poison += v - v;
  };
  int64_t d = 0;
  for (; d + L <= D; d += L) take(load<A>(x + d));
  if (d < D) take(load<A>(x + d, static_cast<int>(D - d), first));
  return {reduce<A>(low, [](A a, A b) { return a < b ? a : b; }), reduce_max<A>(high), reduce_add<A>(poison) == 0};
}

template <class T>
void quantize(const T* x, int64_t D, int bits, uint8_t* data, float* scale, float* offset) {
  const double levels = bits == 8 ? 255 : 15;
  const auto [low, high, finite] = extremes(x, D);
  *offset = static_cast<float>(low);
  // A minimum of fp64 was rounded: what lies below it is as near to it as its rounding.
  const double first = *offset, range = high > first ? high - first : 0;
  *scale = rounded_up(range / levels);
  if (!finite || !(range <= 3.4028234663852886e38)) *scale = *offset = __builtin_nanf("");
  const double step = *scale;
  const auto level = [&](int64_t d) -> uint8_t {
    const double q = step > 0 ? (to_double(x[d]) - first) / step + 0.5 : 0;
    if (q < 0) return 0;
    return static_cast<uint8_t>(q < levels ? q : levels);
  };
  const int64_t half = (D + 1) / 2;
  if (bits == 8)
    for (int64_t d = 0; d < D; ++d) data[d] = level(d);
  else
    for (int64_t d = 0; d < half; ++d)
      data[d] = static_cast<uint8_t>(level(d) | (half + d < D ? level(half + d) << 4 : 0));
}

void quantize_any(const void* row, DType dtype, int64_t D, int bits, uint8_t* data, float* scale, float* offset) {
  visit(dtype, [&](auto t) { quantize(static_cast<const decltype(t)*>(row), D, bits, data, scale, offset); });
}

// --- dequantise ---

typedef int64_t vi64 __attribute__((vector_size(kVectorBytes)));

// kLanes<A> bytes as whole numbers of A's width. GCC converts vectors of bytes one by one.
template <class A>
inline auto widen(const uint8_t* p) {
  if constexpr (sizeof(A) == 8) {
    vi64 v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = p[i];
    return v;
  } else {
#if defined(__AVX512F__)
    return reinterpret_cast<vi32>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return reinterpret_cast<vi32>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    vi32 v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = p[i];
    return v;
#endif
  }
}

// The first n of them.
template <class A>
inline auto widen(const uint8_t* p, int n) {
  is_tail<A>(n);
  uint8_t bytes[kLanes<A>] = {};
  memcpy(bytes, p, n);
  return widen<A>(bytes);
}

template <class T>
void dequantize(const uint8_t* row, const uint8_t* ahead, int64_t D, int bits, float scale, float offset, bool stream,
                T* out) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  const int64_t bytes = bits == 8 ? D : (D + 1) / 2;
  const A s = scale, o = offset;
  const auto value = [&](auto q) { return __builtin_convertvector(q, Vec<A>) * s + o; };
  const auto put = [&](int64_t d, auto q) { stream ? store_streaming(out + d, value(q)) : store(out + d, value(q)); };
  const auto aligned = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; };
  stream = stream && aligned(out) && (bits == 8 || aligned(out + bytes));
  for (int64_t j = 0; j < bytes; j += kLine) __builtin_prefetch(ahead + j);
  int64_t j = 0;
  if (bits == 8) {
    for (; j + L <= D; j += L) put(j, widen<A>(row + j));
    if (const int n = static_cast<int>(D - j); n > 0) store(out + j, value(widen<A>(row + j, n)), n);
    return;
  }
  for (; j + L <= D - bytes; j += L) {
    const auto q = widen<A>(row + j);
    put(j, q & 15);
    put(bytes + j, q >> 4);
  }
  if (const int n = static_cast<int>(bytes - j); n > 0) {
    const auto q = widen<A>(row + j, n);
    store(out + j, value(q & 15), n);
    store(out + bytes + j, value(q >> 4), static_cast<int>(D - bytes - j));
  }
}

void dequantize_any(const uint8_t* row, const uint8_t* ahead, int64_t D, int bits, float scale, float offset,
                    bool stream, DType dtype, void* out) {
  visit(dtype, [&](auto t) { dequantize(row, ahead, D, bits, scale, offset, stream, static_cast<decltype(t)*>(out)); });
}

}  // namespace

extern const QuantizedEmbeddingKernels quantized_embedding{.quantize = &quantize_any, .dequantize = &dequantize_any};

}  // namespace llmkern::cpu::LLMKERN_ISA
