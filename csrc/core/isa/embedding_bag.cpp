#include "core/embedding_bag.h"

#include "core/isa/row_sums.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// The rows of bags, for RowSum.
template <class I>
struct BagRows {
  const I* indices;
  int64_t last, padding_idx;
  bool has(int64_t j) const { return indices[j] != padding_idx; }
  int64_t row(int64_t j) const { return indices[j]; }
  int64_t ahead(int64_t j) const { return indices[j < last ? j : last]; }
  static constexpr float scale(int64_t) { return 1; }
};

template <class T, class I>
struct WeightedBagRows : BagRows<I> {
  const T* samples;
  Accum<T> scale(int64_t j) const { return load_one(samples + j); }
};

// -1, or the first position whose index is outside [0, V).
template <class I>
int64_t find_bad(const I* indices, int64_t begin, int64_t end, int64_t V) {
  const auto is_row = [&](int64_t j) {
    return static_cast<uint64_t>(static_cast<int64_t>(indices[j])) < static_cast<uint64_t>(V);
  };
  bool good = true;
  for (int64_t j = begin; j < end; ++j) good &= is_row(j);
  if (good) return -1;
  while (is_row(begin)) ++begin;
  return begin;
}

// What a bag's sum is multiplied by.
template <class A, class I>
static inline A bag_scale(const Bags& bags, const I* indices, bool mean, int64_t begin, int64_t end) {
  int64_t count = end - begin;
  if (!mean) return 1;
  for (int64_t j = begin; j < end && bags.padding_idx >= 0; ++j) count -= indices[j] == bags.padding_idx;
  return count > 0 ? A{1} / static_cast<A>(count) : A{1};
}

template <class F>
auto visit_indices(Indices indices, F f) {
  return indices.is_int64 ? f(static_cast<const int64_t*>(indices.data)) : f(static_cast<const int32_t*>(indices.data));
}

template <class T, class I, class Rows>
void sum_bags(const BagTable& table, const Bags& bags, const I* indices, const Rows& rows, bool mean, int64_t begin,
              int64_t end, T* out) {
  const T* const weight = static_cast<const T*>(table.weight);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t from = bags.starts[b], to = bags.starts[b + 1];
    const auto scale = bag_scale<Accum<T>>(bags, indices, mean, from, to);
    RowSum<T, T, Rows>{weight, table.D, rows, from, to, scale, false, out + b * table.D}.run();
  }
}

int64_t sum(const BagTable& table, const Bags& bags, bool mean, int64_t begin, int64_t end, void* out) {
  return visit(table.dtype, [&](auto t) {
    using T = decltype(t);
    return visit_indices(bags.indices, [&](auto* indices) {
      using I = std::remove_cvref_t<decltype(*indices)>;
      const int64_t bad = find_bad(indices, bags.starts[begin], bags.starts[end], table.V);
      if (bad >= 0) return bad;
      const BagRows<I> rows{indices, bags.N - 1, bags.padding_idx};
      const auto run = [&](const auto& rows) {
        sum_bags(table, bags, indices, rows, mean, begin, end, static_cast<T*>(out));
      };
      table.samples ? run(WeightedBagRows<T, I>{rows, static_cast<const T*>(table.samples)}) : run(rows);
      return bad;
    });
  });
}

// K vectors of columns of one bag, the last of n elements.
template <int K, class T, class Rows>
void max_columns(const BagTable& table, const Rows& rows, int64_t begin, int64_t end, int64_t d, int n, T* out,
                 int32_t* largest) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  typedef decltype(Vec<A>{} < Vec<A>{}) Positions;
  using Lane = std::remove_cvref_t<decltype(Positions{}[0])>;
  const T* const columns = static_cast<const T*>(table.weight) + d;
  const int64_t step = rows_ahead<T>(table.D);
  while (begin < end && !rows.has(begin)) ++begin;
  Vec<A> best[K]{};
  Positions where[K];
  for (int k = 0; k < K; ++k) where[k] = Positions{} - 1;
  for (int64_t j = begin; j < end; ++j) {
    const T* const next = to_fetch(columns, rows.ahead(j + step), table.D);
    for (int k = 0; k < K; ++k) __builtin_prefetch(next + k * L);
    if (!rows.has(j)) continue;
    for (int k = 0; k < K; ++k) {
      const T* const p = columns + rows.row(j) * table.D + k * L;
      const Vec<A> x = load_n<A>(p, n);
      const Positions larger = j == begin ? Positions{} - 1 : x > best[k];
      best[k] = larger ? x : best[k];
      where[k] = larger ? Positions{} + static_cast<Lane>(j) : where[k];
    }
  }
  for (int k = 0; k < K; ++k) {
    store_n(out + d + k * L, best[k], n);
    for (int i = 0; i < n; ++i) largest[d + k * L + i] = static_cast<int32_t>(where[k][i]);
  }
}

int64_t max(const BagTable& table, const Bags& bags, int64_t begin, int64_t end, void* out, int32_t* largest) {
  return visit(table.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int L = kLanes<Accum<T>>;
    return visit_indices(bags.indices, [&](auto* indices) -> int64_t {
      using I = std::remove_cvref_t<decltype(*indices)>;
      const int64_t bad = find_bad(indices, bags.starts[begin], bags.starts[end], table.V);
      if (bad >= 0) return bad;
      const BagRows<I> rows{indices, bags.N - 1, bags.padding_idx};
      for (int64_t b = begin; b < end; ++b) {
        const int64_t from = bags.starts[b], to = bags.starts[b + 1];
        T* const row = static_cast<T*>(out) + b * table.D;
        int64_t d = 0;
        for (; d + 4 * L <= table.D; d += 4 * L)
          max_columns<4>(table, rows, from, to, d, L, row, largest + b * table.D);
        for (; d < table.D; d += L)
          max_columns<1>(table, rows, from, to, d, table.D - d < L ? static_cast<int>(table.D - d) : L, row,
                         largest + b * table.D);
      }
      return -1;
    });
  });
}

template <class T>
static inline Accum<T> dot_rows(const T* a, const T* b, int64_t D) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  Vec<A> s[4]{};
  int64_t d = 0;
  for (; d + 4 * L <= D; d += 4 * L)
    for (int k = 0; k < 4; ++k) s[k] += load<A>(a + d + k * L) * load<A>(b + d + k * L);
  for (; d < D; d += L) {
    const int n = D - d < L ? static_cast<int>(D - d) : L;
    s[0] += load<A>(a + d, n, A{}) * load<A>(b + d, n, A{});
  }
  return reduce_add<A>((s[0] + s[1]) + (s[2] + s[3]));
}

int64_t dot(const BagTable& table, const Bags& bags, bool mean, int64_t begin, int64_t end, const void* dout,
            void* dsamples) {
  return visit(table.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    return visit_indices(bags.indices, [&](auto* indices) -> int64_t {
      using I = std::remove_cvref_t<decltype(*indices)>;
      const int64_t D = table.D, step = rows_ahead<T>(D);
      const int64_t bad = find_bad(indices, bags.starts[begin], bags.starts[end], table.V);
      if (bad >= 0) return bad;
      const BagRows<I> rows{indices, bags.N - 1, bags.padding_idx};
      const T* const weight = static_cast<const T*>(table.weight);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t from = bags.starts[b], to = bags.starts[b + 1];
        const A factor = bag_scale<A>(bags, indices, mean, from, to);
        for (int64_t j = from; j < to; ++j) {
          const T* const next = to_fetch(weight, rows.ahead(j + step), D);
          for (int64_t d = 0; d < D; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(next + d);
          A sum{};
          if (rows.has(j)) sum = dot_rows(static_cast<const T*>(dout) + b * D, weight + rows.row(j) * D, D);
          store_one(static_cast<T*>(dsamples) + j, sum * factor);
        }
      }
      return -1;
    });
  });
}

void factors(const BagTable& table, const Bags& bags, bool mean, int64_t begin, int64_t end, uint32_t* bag,
             void* scale) {
  visit(table.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    visit_indices(bags.indices, [&](auto* indices) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t from = bags.starts[b], to = bags.starts[b + 1];
        for (int64_t j = from; j < to; ++j) bag[j] = static_cast<uint32_t>(b);
        if (!scale) continue;
        const A each = bag_scale<A>(bags, indices, mean, from, to);
        const T* const samples = static_cast<const T*>(table.samples);
        for (int64_t j = from; j < to; ++j) static_cast<A*>(scale)[j] = samples ? load_one(samples + j) * each : each;
      }
    });
  });
}

}  // namespace

extern const EmbeddingBagKernels embedding_bag{.sum = &sum, .max = &max, .dot = &dot, .factors = &factors};

}  // namespace llmkern::cpu::LLMKERN_ISA
