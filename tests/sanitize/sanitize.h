// What the checks of `make sanitize` share; see main.cpp.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace llmkern::sanitize {

using Doubles = std::vector<double>;

// Every check, by its name; each has been entered when main begins.
std::map<std::string, void (*)()>& checks();

// LLMKERN_CHECK(gemm) { ... } is the check of that name.
#define LLMKERN_CHECK(name)                                                \
  static void check_##name();                                              \
  static const bool name##_is_checked = (checks()[#name] = &check_##name); \
  static void check_##name()

inline constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

inline const char* name_of(DType t) {
  static constexpr const char* kNames[] = {"f32", "bf16", "f16", "f64"};  // in the order of DType
  return kNames[static_cast<int>(t)];
}

inline void put(float* p, double x) { *p = static_cast<float>(x); }
inline void put(double* p, double x) { *p = x; }
inline void put(f16* p, double x) { p->bits = std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline void put(bf16* p, double x) {
  const uint32_t u = std::bit_cast<uint32_t>(static_cast<float>(x));
  p->bits = static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// n elements that begin `skip` elements into a block of the heap and end where it ends; NaN at first.
class Array {
 public:
  Array(DType dtype, int64_t n, int64_t skip = 0)
      : dtype(dtype),
        n(n),
        bytes_(new char[(n + skip) * itemsize(dtype)]),
        data_(bytes_.get() + skip * itemsize(dtype)) {
    std::memset(data_, 0xff, n * itemsize(dtype));
  }
  void* data() const { return data_; }
  double operator[](int64_t i) const {
    return visit(dtype, [&](auto t) { return to_double(static_cast<const decltype(t)*>(data())[i]); });
  }
  void set(int64_t i, double x) const {
    visit(dtype, [&](auto t) { put(static_cast<decltype(t)*>(data()) + i, x); });
  }
  Doubles doubles() const {
    Doubles x(n);
    for (int64_t i = 0; i < n; ++i) x[i] = (*this)[i];
    return x;
  }

  const DType dtype;
  const int64_t n;

 private:
  std::unique_ptr<char[]> bytes_;
  char* data_;
};

// Of the random numbers; every check begins with the same.
inline uint64_t seed = 1;

inline double uniform() {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(seed >> 11) * 0x1p-52 - 1;
}

inline Array random(DType dtype, int64_t n, int64_t skip = 0) {
  Array x(dtype, n, skip);
  for (int64_t i = 0; i < n; ++i) x.set(i, uniform());
  return x;
}

inline std::string where;  // the case at hand, for messages

inline std::string text(double x) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.17g", x);
  return digits;
}

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "sanitize: %s: %s\n", where.c_str(), what.c_str());
  std::exit(1);
}

inline double epsilon(DType t) {
  static constexpr double kEpsilons[] = {0x1p-23, 0x1p-7, 0x1p-10, 0x1p-52};  // in the order of DType
  return kEpsilons[static_cast<int>(t)];
}

// `scale`: of the terms of a sum, whose rounding may be larger than the result.
inline void near(const char* what, double got, double want, DType dtype, double scale = 1) {
  // Narrow types are rounded once or twice; in wide ones it is the sums' rounding that counts.
  const double bound = (itemsize(dtype) == 2 ? 3 : 64) * epsilon(dtype);
  if (std::abs(got - want) <= bound * std::max({scale, std::abs(want), 1e-3})) return;
  fail(std::string(what) + ": got " + text(got) + ", expected " + text(want));
}

inline void near(const char* what, const Array& got, const Doubles& want, double scale = 1) {
  if (got.n != static_cast<int64_t>(want.size())) fail(std::string(what) + ": sizes differ");
  for (int64_t i = 0; i < got.n; ++i) near(what, got[i], want[i], got.dtype, scale);
}

// Bit for bit.
inline void same(const char* what, const Array& got, const Array& want) {
  if (got.n != want.n || std::memcmp(got.data(), want.data(), want.n * itemsize(want.dtype)) != 0)
    fail(std::string(what) + ": not the same bits");
}

inline void untouched(const char* what, const Array& x) {
  for (int64_t i = 0; i < x.n; ++i)
    if (!std::isnan(x[i])) fail(std::string(what) + ": written");
}

template <class E>
void throws(const char* what, const std::function<void()>& f) {
  try {
    f();
  } catch (const E&) {
    return;
  }
  fail(std::string(what) + ": no exception");
}

}  // namespace llmkern::sanitize
