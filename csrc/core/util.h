// Small things that most kernels need. No function here may be shared between instruction sets by the linker, so all
// are static.
#pragma once
#include "core/dtype.h"

namespace llmkern::cpu {

static inline constexpr int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

// How many rows of `size` bytes (or elements) make up `budget`; one at least.
static inline constexpr int64_t rows_in(int64_t budget, int64_t size) {
  const int64_t rows = budget / (size > 0 ? size : 1);
  return rows > 0 ? rows : 1;
}

// A matrix in memory, row by row; rows are `ld` elements apart.
struct View {
  const void* data;
  DType dtype;
  int64_t ld = 0;
};
struct MutableView {
  void* data;
  DType dtype;
  int64_t ld = 0;
};

// The i-th element of an array; null stays null.
static inline const char* at(const void* p, int64_t i, DType dtype) {
  return p ? static_cast<const char*>(p) + i * itemsize(dtype) : nullptr;
}
static inline char* at(void* p, int64_t i, DType dtype) {
  return p ? static_cast<char*>(p) + i * itemsize(dtype) : nullptr;
}

// An output of this size would not stay in the caches until it is read, and is written past them.
inline constexpr int64_t kStreamBytes = int64_t{16} << 20;
// The result of a lookup is read at once, by the next layer: the caches keep what they can of it for longer.
inline constexpr int64_t kLookupStreamBytes = int64_t{32} << 20;
// Bytes of rows that are worth a thread.
inline constexpr int64_t kGrainBytes = 32 * 1024;

}  // namespace llmkern::cpu
