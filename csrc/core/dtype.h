// Element types as they lie in memory. Arithmetic is done in Accum<T>: fp32, or fp64 for fp64.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace llmkern {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType : int { f32, bf16, f16, f64 };

static inline int64_t itemsize(DType dtype) {
  if (dtype == DType::f64) return 8;
  return dtype == DType::f32 ? 4 : 2;
}
// What arithmetic on elements of `dtype` is done in.
static inline DType accum_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

static inline double to_double(float x) { return x; }
static inline double to_double(double x) { return x; }
static inline double to_double(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
static inline double to_double(f16 x) { return static_cast<double>(std::bit_cast<_Float16>(x.bits)); }

template <class T>
using Accum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a value of the C++ type that dtype names: visit(dtype, [&](auto t) { using T = decltype(t); ... }).
template <class F>
static inline decltype(auto) visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    case DType::f64:
      return f(double{});
    default:
      return f(float{});
  }
}

}  // namespace llmkern
