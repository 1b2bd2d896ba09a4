// Vectors of the instruction set that this unit is compiled for, as GCC/Clang vector extensions: one source serves
// SSE2, AVX2, AVX-512 and NEON. Included by core/isa/*.cpp only; everything lives in the unit's own namespace.
//
//   Vec<A>                 A = float, double; kLanes<A> elements
//   load<A>(p[, n, fill])  from float, double, bf16, f16; n < kLanes loads a tail and fills the rest
//   store(p, v[, n])       rounds to nearest even
#pragma once
#include <math.h>
#include <string.h>

#include "core/dtype.h"
#if defined(__x86_64__)
// GCC's header passes operands that it leaves undefined on purpose, and warns of each (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace llmkern::cpu::LLMKERN_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

typedef float vf32 __attribute__((vector_size(kVectorBytes)));
typedef double vf64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t vi32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vu32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vu16 __attribute__((vector_size(kVectorBytes / 2)));

template <bool B>
struct Bool {
  static constexpr bool value = B;
};

template <class A>
using Vec = std::conditional_t<sizeof(A) == 8, vf64, vf32>;

template <class A>
static inline Vec<A> splat(A x) {
  return x - Vec<A>{};
}

template <class To, class From>
static inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// --- load and store -----------------------------------------------------------------------------------------

template <class A>
static inline Vec<A> load(const A* p) {
  Vec<A> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
static inline vf32 load(const bf16* p) {
  vu16 h;
  memcpy(&h, p, sizeof h);
  return bits_as<vf32>(__builtin_convertvector(h, vu32) << 16);
}

template <class A>
static inline vf32 load(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf32>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<vf32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vf32 v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(bits_as<_Float16>(p[i].bits));
  return v;
#endif
}

template <class T>
static inline void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}

static inline void store(bf16* p, vf32 v) {
  const vu32 u = bits_as<vu32>(v);
  const vu32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu32 nan = (u >> 16) | 0x40u;
  const vu16 h = __builtin_convertvector(v == v ? rounded : nan, vu16);
  memcpy(p, &h, sizeof h);
}

static inline void store(f16* p, vf32 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = bits_as<uint16_t>(static_cast<_Float16>(v[i]));
#endif
}

// The address sanitizer does not see what masked and streaming instructions touch: it is shown both ends. A macro, so
// that other builds have no call to weigh when they inline.
#if defined(LLMKERN_SANITIZE)
static inline void show(const void* p, size_t bytes) {
  const volatile char* const seen = static_cast<const char*>(p);
  if (bytes > 0) seen[0], seen[bytes - 1];
}
#define LLMKERN_SHOW(p, bytes) show(p, bytes)
#else
#define LLMKERN_SHOW(p, bytes) static_cast<void>(0)
#endif

// Past the caches: for a large output that nothing reads soon. p must be aligned to a vector.
template <class T>
static inline void store_streaming(T* p, Vec<Accum<T>> v) {
  LLMKERN_SHOW(p, sizeof(T) * kLanes<Accum<T>>);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) >= 4) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits_as<__m512i>(v));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) >= 4) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_as<__m256i>(v));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) >= 4) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits_as<__m128i>(v));
#endif
  store(p, v);
}

// Tells the compiler what a tail may be: it would warn of copies past the buffer. Under the sanitizers, a check.
template <class A>
static inline void is_tail(int n) {
  if (n < 0 || n > kLanes<A>) __builtin_unreachable();
}

// Tails: the first n elements only; memory past them is neither read nor written.
template <class A, class T>
static inline Vec<A> load(const T* p, int n, A fill) {
  is_tail<A>(n);
  LLMKERN_SHOW(p, sizeof(T) * n);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) {
    return reinterpret_cast<Vec<A>>(_mm512_mask_loadu_pd(_mm512_set1_pd(fill), (1u << n) - 1, p));
  } else if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<A>>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (1u << n) - 1, p));
  } else {
    T buffer[kLanes<A>];
    const __mmask16 mask = (1u << n) - 1;
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, p);
    memcpy(buffer, &bits, sizeof bits);
    const __m512 v = reinterpret_cast<__m512>(load<A>(buffer));
    return reinterpret_cast<Vec<A>>(_mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, v));
  }
#else
  T buffer[kLanes<A>] = {};
  memcpy(buffer, p, n * sizeof(T));
  Vec<A> v = load<A>(buffer);
  for (int i = n; i < kLanes<A>; ++i) v[i] = fill;
  return v;
#endif
}

template <class T>
static inline void store(T* p, Vec<Accum<T>> v, int n) {
  is_tail<Accum<T>>(n);
  LLMKERN_SHOW(p, sizeof(T) * n);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, (1u << n) - 1, reinterpret_cast<__m512d>(v));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, (1u << n) - 1, reinterpret_cast<__m512>(v));
  } else {
    T buffer[kLanes<Accum<T>>];
    store(buffer, v);
    __m256i bits;
    memcpy(&bits, buffer, sizeof bits);
    _mm256_mask_storeu_epi16(p, (1u << n) - 1, bits);
  }
#else
  T buffer[kLanes<Accum<T>>];
  store(buffer, v);
  memcpy(p, buffer, n * sizeof(T));
#endif
}

// Whole vectors and tails alike: n <= kLanes.
template <class A, class T>
static inline Vec<A> load_n(const T* p, int n, A fill = {}) {
  return n == kLanes<A> ? load<A>(p) : load<A>(p, n, fill);
}
template <class T>
static inline void store_n(T* p, Vec<Accum<T>> v, int n) {
  if (n == kLanes<Accum<T>>)
    store(p, v);
  else
    store(p, v, n);
}

// Calls f(i, n) for every vector of [0, size); n lanes are in use, which are all but in the last.
template <class A, class F>
static inline __attribute__((always_inline)) void for_vectors(int64_t size, const F& f) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= size; i += L) f(i, L);
  if (i < size) f(i, static_cast<int>(size - i));
}

// v, but `fill` from lane n on.
template <class A>
static inline Vec<A> filled(Vec<A> v, int n, A fill = {}) {
  for (int i = n; i < kLanes<A>; ++i) v[i] = fill;
  return v;
}

// Scalars, by the same rounding.
template <class T>
static inline Accum<T> load_one(const T* p) {
  return load<Accum<T>>(p, 1, Accum<T>{})[0];
}
template <class T>
static inline void store_one(T* p, Accum<T> x) {
  store(p, splat<Accum<T>>(x), 1);
}

// --- arithmetic ---------------------------------------------------------------------------------------------

// a > b ? a : b, lane by lane: b where either is NaN. Compilers do not find the instruction in the expression.
static inline vf32 max(vf32 a, vf32 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf32>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf32>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
static inline vf64 max(vf64 a, vf64 b) { return a > b ? a : b; }

// a * b + c, rounded once where the instruction set can.
static inline vf32 fma(vf32 a, vf32 b, vf32 c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf32>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<vf32>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}
static inline vf64 fma(vf64 a, vf64 b, vf64 c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf64>(
      _mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<vf64>(
      _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#else
  return a * b + c;
#endif
}

static inline vf32 sqrt(vf32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf32>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf32>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = ::sqrtf(x[i]);
  return x;
#endif
}
static inline vf64 sqrt(vf64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::sqrt(x[i]);
  return x;
}

#if defined(__AVX512F__)
// All lanes are the 32 bits at p, whatever they mean.
static inline vf32 splat_bits(const float* p) {
  int32_t bits;
  memcpy(&bits, p, sizeof bits);
  return bits_as<vf32>(bits + vi32{});
}

// sum + a.low * b.low + a.high * b.high, lane by lane, for lanes of two bf16: AVX-512 BF16, for CPUs that have it.
// In assembly, because this unit is compiled for those that do not, too. Denormal operands count as zero.
static inline vf32 dot_pairs(vf32 sum, vf32 a, vf32 b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#endif

// Fixed trees: the order of a reduction depends on the lane count only.
template <class A, class V, class F>
static inline A reduce(V v, F f) {
  A lane[kLanes<A>];
  memcpy(lane, &v, sizeof v);
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = f(lane[i], lane[i + width]);
  return lane[0];
}
template <class A>
static inline A reduce_add(Vec<A> v) {
  return reduce<A>(v, [](A a, A b) { return a + b; });
}
template <class A>
static inline A reduce_max(Vec<A> v) {
  return reduce<A>(v, [](A a, A b) { return a > b ? a : b; });
}

}  // namespace llmkern::cpu::LLMKERN_ISA
