#include "core/rnn.h"

#include "core/isa/rnn_cells.h"
#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// Rows of one product, and vectors of its panel that are multiplied at once: as many sums as the registers hold.
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// --- the recurrent product ---

// Each element is added up in the order of k, whatever R and V are. An element of a is one number or a pair of bf16.
template <class S, bool kPairs, int R, int V>
void product_of(int64_t K, const char* a, int64_t pitch, const S* panel, int64_t panel_size, bool accumulate, S* to,
                int64_t ld) {
  constexpr int L = kLanes<S>;
  Vec<S> sum[R][V] = {};
  if (accumulate)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = load<S>(to + r * ld + v * L);
  for (int64_t k = 0; k < K; ++k, panel += L, a += sizeof(S)) {
    Vec<S> w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = load<S>(panel + v * panel_size);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec<S> x;
#if defined(__AVX512F__)
      if constexpr (kPairs) {
        x = splat_bits(reinterpret_cast<const float*>(a + r * pitch));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = dot_pairs(sum[r][v], w[v], x);
        continue;
      }
#endif
      x = splat(*reinterpret_cast<const S*>(a + r * pitch));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += x * w[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(to + r * ld + v * L, sum[r][v]);
}

template <class S, bool kPairs, int R, int V>
void find_product(int rows, int vectors, int64_t K, const char* a, int64_t pitch, const S* panel, int64_t panel_size,
                  bool accumulate, S* to, int64_t ld) {
  if constexpr (R > 1)
    if (rows < R)
      return find_product<S, kPairs, R - 1, V>(rows, vectors, K, a, pitch, panel, panel_size, accumulate, to, ld);
  if constexpr (V > 1)
    if (vectors < V)
      return find_product<S, kPairs, R, V - 1>(rows, vectors, K, a, pitch, panel, panel_size, accumulate, to, ld);
  product_of<S, kPairs, R, V>(K, a, pitch, panel, panel_size, accumulate, to, ld);
}

template <class S>
void product(int rows, int vectors, int64_t K, const void* a, int64_t lda, const void* panel, bool pairs,
             bool accumulate, void* to) {
  constexpr int L = kLanes<S>;
  const int64_t size = K * L, ld = vectors * L;
  const char* const from = static_cast<const char*>(a);
  for (int v = 0; v < vectors; v += kVectors) {
    const int some = vectors - v < kVectors ? vectors - v : kVectors;
    const S* const w = static_cast<const S*>(panel) + v * size;
    S* const at = static_cast<S*>(to) + v * L;
    if constexpr (kVectorBytes == 64 && sizeof(S) == 4)
      if (pairs) {
        find_product<S, true, kRows, kVectors>(rows, some, K, from, lda * 2, w, size, accumulate, at, ld);
        continue;
      }
    find_product<S, false, kRows, kVectors>(rows, some, K, from, lda * sizeof(S), w, size, accumulate, at, ld);
  }
}

// --- the cells ---

template <class Cell, class T, class A, bool kWhole>
LLMKERN_INLINE void forward_vectors(const RnnForwardArgs& a, const RnnBlock& block, int64_t i, int tail,
                                    const Accum<T>* pre, int64_t per_row) {
  using S = Accum<T>;
  const Rnn& op = *a.op;
  const int64_t H = op.H, C = cells_of(op), G = Cell::kSaved * H, unit = block.u + i;
  auto at = at_of<Cell, S, kWhole>(op, block, 0, unit, tail);
  const S* gx = static_cast<const S*>(a.gx) + unit;
  A* next = static_cast<A*>(a.next) + block.b * a.next_ld + unit;
  pre += i;
  for (int row = 0; row < block.rows; ++row) {
    put_h<T>(a, at, Cell::template forward<T>(a, at, PlainSums<S, At<S, kWhole>>{at, pre, gx, H}), next);
    pre += per_row;
    gx += a.gx_ld;
    next += a.next_ld;
    at.state += H;
    at.c += C;
    ++at.b;
    at.token += block.stride * H;
    at.cells += block.stride * C;
    at.gates += block.stride * G;
  }
}

template <class Cell, class T, class A>
void forward_of(const RnnForwardArgs& a, const RnnBlock& block, const Accum<T>* pre) {
  constexpr int L = kLanes<Accum<T>>;
  // One gate fills a panel with four vectors of units, several fill it with one vector each.
  const int64_t per_row = Cell::kGates == 1 ? (block.units + L - 1) / L * L : Cell::kGates * L;
  int64_t i = 0;
  for (; i + L <= block.units; i += L) forward_vectors<Cell, T, A, true>(a, block, i, L, pre, per_row);
  if (i < block.units) forward_vectors<Cell, T, A, false>(a, block, i, static_cast<int>(block.units - i), pre, per_row);
}

// Row `row` of a block, from its i-th unit on: n vectors, or a tail.
template <class Cell, class T, class A, bool kWhole>
LLMKERN_INLINE void backward_vectors(const RnnBackwardArgs& a, const RnnBlock& block, int64_t row, int64_t i, int64_t n,
                                     int tail) {
  using S = Accum<T>;
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  const Rnn& op = *a.op;
  const int64_t unit = block.u + i;
  auto at = at_of<Cell, S, kWhole>(op, block, row, unit, tail);
  A* dgates = static_cast<A*>(a.dgates) + (block.token + row * block.stride) * dgates_of(op) + unit;
  Past past{.h = row * a.h_stride + unit, .c = row * a.c_stride + unit};
  for (int64_t v = 0; v < n; ++v) {
    V dbefore;
    const V dout = take_dh<T>(a, at, dbefore);
    dbefore += Cell::template backward<T>(a, at, past, dout, dgates, PlainOutput{});
    at.store(static_cast<S*>(a.dh) + at.state, dbefore);
    at.next_units(L);
    dgates += L;
    past.h += L;
    past.c += L;
  }
}

template <class Cell, class T, class A>
void backward_of(const RnnBackwardArgs& a, const RnnBlock& block) {
  constexpr int L = kLanes<Accum<T>>;
  const int64_t whole = block.units / L;
  const int tail = static_cast<int>(block.units % L);
  for (int64_t row = 0; row < block.rows; ++row) {
    backward_vectors<Cell, T, A, true>(a, block, row, 0, whole, L);
    if (tail > 0) backward_vectors<Cell, T, A, false>(a, block, row, whole * L, 1, tail);
  }
}

void forward(const RnnForwardArgs& args, const RnnBlock& block, const void* pre) {
  visit_mode(args.op->mode, [&](auto cell) {
    visit_types(args.op->dtype, args.operand, [&](auto t, auto a) {
      using T = decltype(t);
      forward_of<decltype(cell), T, decltype(a)>(args, block, static_cast<const Accum<T>*>(pre));
    });
  });
}

void backward(const RnnBackwardArgs& args, const RnnBlock& block) {
  visit_mode(args.op->mode, [&](auto cell) {
    visit_types(args.op->dtype, args.operand,
                [&](auto t, auto a) { backward_of<decltype(cell), decltype(t), decltype(a)>(args, block); });
  });
}

// --- rows ---

// Rows that are added up before their sum is added to the others': rounding grows with both numbers, not their product.
constexpr int64_t kSummed = 64;

template <class From, class To>
void copy_rows(int64_t rows, int64_t n, const From* from, int64_t from_ld, To* to, int64_t to_ld, bool accumulate) {
  using S = Accum<To>;
  if constexpr (sizeof(Accum<From>) == sizeof(S))
    for (int64_t r = 0; r < rows; ++r, from += from_ld, to += to_ld)
      for (int64_t i = 0; i < n; i += kLanes<S>) {
        const int w = n - i < kLanes<S> ? static_cast<int>(n - i) : kLanes<S>;
        const Vec<S> x = load_n<S>(from + i, w);
        store_n(to + i, accumulate ? load_n<S>(to + i, w) + x : x, w);
      }
}

void copy(int64_t rows, int64_t n, View from, MutableView to, bool accumulate) {
  visit(from.dtype, [&](auto f) {
    visit(to.dtype, [&](auto t) {
      copy_rows(rows, n, static_cast<const decltype(f)*>(from.data), from.ld, static_cast<decltype(t)*>(to.data), to.ld,
                accumulate);
    });
  });
}

template <class From, class To>
void sum_columns(const From* from, int64_t rows, int64_t ld, int64_t begin, int64_t end, To* to) {
  using S = Accum<To>;
  if constexpr (sizeof(Accum<From>) == sizeof(S))
    for (int64_t i = begin; i < end; i += 4 * kLanes<S>) {
      constexpr int L = kLanes<S>;
      // Four vectors at a time: a cache line of each row is read once.
      Vec<S> sum[4] = {};
      const int some = static_cast<int>((end - i + L - 1) / L < 4 ? (end - i + L - 1) / L : 4);
      const auto width = [&](int v) { return end - i - v * L < L ? static_cast<int>(end - i - v * L) : L; };
      for (int64_t r0 = 0; r0 < rows; r0 += kSummed) {
        Vec<S> part[4] = {};
        for (int64_t r = r0; r < rows && r < r0 + kSummed; ++r)
          for (int v = 0; v < some; ++v) part[v] += load_n<S>(from + r * ld + i + v * L, width(v));
        for (int v = 0; v < some; ++v) sum[v] += part[v];
      }
      for (int v = 0; v < some; ++v) store_n(to + i + v * L, sum[v], width(v));
    }
}

void sum_rows(View from, int64_t rows, int64_t begin, int64_t end, MutableView to) {
  visit(from.dtype, [&](auto f) {
    visit(to.dtype, [&](auto t) {
      sum_columns(static_cast<const decltype(f)*>(from.data), rows, from.ld, begin, end,
                  static_cast<decltype(t)*>(to.data));
    });
  });
}

}  // namespace

extern const RnnKernels rnn{.lanes_f32 = kLanes<float>,
                            .lanes_f64 = kLanes<double>,
                            .rows = kRows,
                            .product_f32 = &product<float>,
                            .product_f64 = &product<double>,
                            .forward = &forward,
                            .backward = &backward,
                            .copy = &copy,
                            .sum_rows = &sum_rows};

}  // namespace llmkern::cpu::LLMKERN_ISA
