// Sums of scattered rows: what lookups in bags and the gradients of tables have in common.
//
// A block of columns stays in registers while the rows pass by: one store per element, however many rows. Rows lie
// anywhere in memory, so each is fetched some rows before it is added; how many depends on their length.
#pragma once
#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {

// How many rows ahead of its turn a row is fetched.
template <class T>
static inline int64_t rows_ahead(int64_t D) {
  constexpr uint32_t kBytes = 8 * 1024;
  const int64_t bytes = 1 + D * static_cast<int64_t>(sizeof(T));
  // Of 32 bits: it is done for every sum.
  return bytes > kBytes ? 1 : 1 + kBytes / static_cast<uint32_t>(bytes);
}

// Row `row` of a table at p; it need not be one.
template <class T>
static inline const T* to_fetch(const T* p, int64_t row, int64_t D) {
  const uintptr_t bytes = static_cast<uintptr_t>(row) * static_cast<uintptr_t>(D) * sizeof(T);
  return reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(p) + bytes);
}

// `Rows` says which: if has(j), row(j) times scale(j); ahead(j), a row to fetch, of any later sum, need not be one.
// out (D) = scale * sum over j in [begin, end).
template <class T, class U, class Rows>
struct RowSum {
  using A = Accum<T>;
  static constexpr int L = kLanes<A>;
  const T* table;
  int64_t D;
  const Rows& rows;
  int64_t begin, end;
  A scale;
  bool stream;
  U* out;

  template <int K>
  void columns(int64_t d) const {
    const int64_t step = rows_ahead<T>(D);
    Vec<A> s[K]{};
    for (int64_t j = begin; j < end; ++j) {
      const T* const next = to_fetch(table + d, rows.ahead(j + step), D);
      for (int k = 0; k < K; ++k) __builtin_prefetch(next + k * L);
      if (!rows.has(j)) continue;
      const T* const x = table + rows.row(j) * D + d;
      const A factor = rows.scale(j);
      for (int k = 0; k < K; ++k) s[k] += load<A>(x + k * L) * factor;
    }
    for (int k = 0; k < K; ++k)
      if (stream)
        store_streaming(out + d + k * L, s[k] * scale);
      else
        store(out + d + k * L, s[k] * scale);
  }

  void tail(int64_t d) const {
    const int n = static_cast<int>(D - d);
    Vec<A> s{};
    for (int64_t j = begin; j < end; ++j) {
      const A factor = rows.scale(j);
      if (rows.has(j)) s += load<A>(table + rows.row(j) * D + d, n, A{}) * factor;
    }
    store(out + d, s * scale, n);
  }

  void run() const {
    int64_t d = 0;
    for (; d + 8 * L <= D; d += 8 * L) columns<8>(d);
    for (; d + 2 * L <= D; d += 2 * L) columns<2>(d);
    for (; d + L <= D; d += L) columns<1>(d);
    if (d < D) tail(d);
  }
};

}  // namespace llmkern::cpu::LLMKERN_ISA
