#include "core/rnn.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

// Rows that one pass over a panel serves: 4 accumulators each, as many as the registers hold beside 4 weights.
#if defined(__AVX512F__)
constexpr int kRows = 6;
#else
constexpr int kRows = 2;
#endif

// acc[r][j] += sum_k a[r * lda + k] * panel[k][j]. Each element is added up in the order of k whatever R is.
template <class S, int R>
inline void multiply(int64_t K, const S* a, int64_t lda, const S* panel, Vec<S> (&acc)[R][4]) {
  constexpr int L = kLanes<S>;
  for (int64_t k = 0; k < K; ++k, panel += 4 * L) {
    const Vec<S> w0 = load<S>(panel), w1 = load<S>(panel + L), w2 = load<S>(panel + 2 * L), w3 = load<S>(panel + 3 * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<S> x = splat(a[r * lda + k]);
      acc[r][0] += x * w0, acc[r][1] += x * w1, acc[r][2] += x * w2, acc[r][3] += x * w3;
    }
  }
}

// Calls f.template operator()<R>(row) over rows [0, n) in blocks of kRows, then in ever smaller ones.
template <int R, class F>
inline void blocks(int64_t row, int64_t n, const F& f) {
  for (; row + R <= n; row += R) f.template operator()<R>(row);
  if constexpr (R > 1)
    if (row < n) blocks<R - 1>(row, n, f);
}

template <class S, class T>
inline Vec<S> load_n(const T* p, int n) {
  return n == kLanes<S> ? load<S>(p) : load<S>(p, n, S{0});
}
template <class S, class T>
inline void store_n(T* p, Vec<S> v, int n) {
  n == kLanes<S> ? store(p, v) : store(p, v, n);
}

template <class T>
void lstm_forward_rows(const LstmForwardRows& rows) {
  using S = Accum<T>;
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  const Lstm& op = *rows.op;
  const int64_t H = op.H, B = op.B, n = rows.end - rows.begin, b0 = rows.begin;
  S *h = static_cast<S*>(rows.state), *next = h + n * H, *c = next + n * H;
  const T *bias_ih = static_cast<const T*>(op.bias_ih), *bias_hh = static_cast<const T*>(op.bias_hh);
  for (int64_t i = 0; i < n * H; ++i) {
    h[i] = load_one(static_cast<const T*>(op.hx) + b0 * H + i);
    c[i] = load_one(static_cast<const T*>(op.cx) + b0 * H + i);
  }
  for (int64_t step = 0; step < op.T; ++step) {
    const int64_t t = op.reverse ? op.T - 1 - step : step;
    const S* const gx = static_cast<const S*>(rows.gx) + (t * B + b0) * 4 * H;
    T* const y = static_cast<T*>(rows.y) + (t * B + b0) * H;
    T* const gates = rows.gates ? static_cast<T*>(rows.gates) + (t * B + b0) * 4 * H : nullptr;
    S* const cells = rows.cells ? static_cast<S*>(rows.cells) + (t * B + b0) * H : nullptr;
    for (int64_t u = 0; u < H; u += L) {
      const int w = H - u < L ? static_cast<int>(H - u) : L;
      const S* const panel = static_cast<const S*>(rows.packed) + u / L * H * 4 * L;
      V bias[4];
      for (int j = 0; j < 4; ++j) {
        bias[j] = bias_ih ? load_n<S>(bias_ih + j * H + u, w) : V{};
        if (bias_hh) bias[j] += load_n<S>(bias_hh + j * H + u, w);
      }
      blocks<kRows>(0, n, [&]<int R>(int64_t row) {
        V acc[R][4];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          for (int j = 0; j < 4; ++j) acc[r][j] = load_n<S>(gx + ((row + r) * 4 + j) * H + u, w) + bias[j];
        multiply<S, R>(H, h + row * H, H, panel, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int64_t at = (row + r) * H + u;
          const V i = sigmoid(acc[r][0]), f = sigmoid(acc[r][1]), g = tanh(acc[r][2]), o = sigmoid(acc[r][3]);
          const V cell = f * load_n<S>(c + at, w) + i * g;
          const V out = o * tanh(cell);
          store_n<S>(c + at, cell, w), store_n<S>(next + at, out, w), store_n<S>(y + at, out, w);
          if (!gates) continue;
          T* const saved = gates + (row + r) * 4 * H + u;
          store_n<S>(saved, i, w), store_n<S>(saved + H, f, w);
          store_n<S>(saved + 2 * H, g, w), store_n<S>(saved + 3 * H, o, w);
          store_n<S>(cells + at, cell, w);
        }
      });
    }
    S* const swap = h;
    h = next, next = swap;
  }
  for (int64_t i = 0; i < n * H; ++i) {
    store_one(static_cast<T*>(rows.hy) + b0 * H + i, h[i]);
    store_one(static_cast<T*>(rows.cy) + b0 * H + i, c[i]);
  }
}

template <class T>
void lstm_backward_rows(const LstmBackwardRows& rows) {
  using S = Accum<T>;
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  const Lstm& op = *rows.op;
  const int64_t H = op.H, B = op.B, n = rows.end - rows.begin, b0 = rows.begin;
  S *const dh = static_cast<S*>(rows.state), *const dc = dh + n * H;
  for (int64_t i = 0; i < n * H; ++i) {
    dh[i] = load_one(static_cast<const T*>(rows.dhy) + b0 * H + i);
    dc[i] = load_one(static_cast<const T*>(rows.dcy) + b0 * H + i);
  }
  for (int64_t step = op.T - 1; step >= 0; --step) {
    const int64_t t = op.reverse ? op.T - 1 - step : step;
    const T* const dy = static_cast<const T*>(rows.dy) + (t * B + b0) * H;
    const T* const gates = static_cast<const T*>(rows.gates) + (t * B + b0) * 4 * H;
    const S* const cells = static_cast<const S*>(rows.cells) + (t * B + b0) * H;
    const S* const before =
        step ? static_cast<const S*>(rows.cells) + ((op.reverse ? t + 1 : t - 1) * B + b0) * H : nullptr;
    const T* const first = static_cast<const T*>(op.cx) + b0 * H;
    S* const dgates = static_cast<S*>(rows.dgates) + (t * B + b0) * 4 * H;
    for (int64_t row = 0; row < n; ++row)
      for (int64_t u = 0; u < H; u += L) {
        const int w = H - u < L ? static_cast<int>(H - u) : L;
        const int64_t at = row * H + u;
        const T* const saved = gates + row * 4 * H + u;
        const V i = load_n<S>(saved, w), f = load_n<S>(saved + H, w), g = load_n<S>(saved + 2 * H, w),
                o = load_n<S>(saved + 3 * H, w), squashed = tanh(load_n<S>(cells + at, w));
        const V c_before = before ? load_n<S>(before + at, w) : load_n<S>(first + at, w);
        const V dout = load_n<S>(dh + at, w) + load_n<S>(dy + at, w);
        const V dcell = load_n<S>(dc + at, w) + dout * o * (1 - squashed * squashed);
        S* const to = dgates + row * 4 * H + u;
        store_n<S>(to, dcell * g * i * (1 - i), w);
        store_n<S>(to + H, dcell * c_before * f * (1 - f), w);
        store_n<S>(to + 2 * H, dcell * i * (1 - g * g), w);
        store_n<S>(to + 3 * H, dout * squashed * o * (1 - o), w);
        store_n<S>(dc + at, dcell * f, w);
      }
    // dh of the step before: dgates W_hh, four vectors of units at a time.
    for (int64_t u = 0; u < H; u += 4 * L) {
      const S* const panel = static_cast<const S*>(rows.packed) + u * 4 * H;
      blocks<kRows>(0, n, [&]<int R>(int64_t row) {
        V acc[R][4] = {};
        multiply<S, R>(4 * H, dgates + row * 4 * H, 4 * H, panel, acc);
        for (int r = 0; r < R; ++r)
          for (int j = 0; j < 4; ++j) {
            const int64_t left = H - u - j * L;
            if (left > 0) store_n<S>(dh + (row + r) * H + u + j * L, acc[r][j], left < L ? static_cast<int>(left) : L);
          }
      });
    }
  }
  for (int64_t i = 0; i < n * H; ++i) {
    store_one(static_cast<T*>(rows.dhx) + b0 * H + i, dh[i]);
    store_one(static_cast<T*>(rows.dcx) + b0 * H + i, dc[i]);
  }
}

template <class T>
void pack(const T* w, int64_t K, int64_t stride_k, int64_t stride_n, const int64_t (&start)[4],
          const int64_t (&valid)[4], Accum<T>* to) {
  for (int64_t k = 0; k < K; ++k)
    for (int j = 0; j < 4; ++j)
      for (int64_t l = 0; l < kLanes<Accum<T>>; ++l)
        *to++ = l < valid[j] ? load_one(w + k * stride_k + (start[j] + l) * stride_n) : Accum<T>{0};
}

template <class S, class T>
void sum_rows(const S* from, int64_t rows, int64_t n, int64_t begin, int64_t end, T* to) {
  for (int64_t i = begin; i < end; i += kLanes<S>) {
    const int w = end - i < kLanes<S> ? static_cast<int>(end - i) : kLanes<S>;
    Vec<S> sum{};
    for (int64_t r = 0; r < rows; ++r) sum += load_n<S>(from + r * n + i, w);
    store_n<S>(to + i, sum, w);
  }
}

void pack_any(const void* w, DType dtype, int64_t K, int64_t stride_k, int64_t stride_n, const int64_t (&start)[4],
              const int64_t (&valid)[4], void* to) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    pack(static_cast<const T*>(w), K, stride_k, stride_n, start, valid, static_cast<Accum<T>*>(to));
  });
}
void forward_any(const LstmForwardRows& rows) {
  visit(rows.op->dtype, [&](auto t) { lstm_forward_rows<decltype(t)>(rows); });
}
void backward_any(const LstmBackwardRows& rows) {
  visit(rows.op->dtype, [&](auto t) { lstm_backward_rows<decltype(t)>(rows); });
}
void sum_rows_any(const void* from, DType dtype, int64_t rows, int64_t n, int64_t begin, int64_t end, void* to) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    sum_rows(static_cast<const Accum<T>*>(from), rows, n, begin, end, static_cast<T*>(to));
  });
}

}  // namespace

extern const RnnKernels rnn{kLanes<float>, kLanes<double>, &pack_any, &forward_any, &backward_any, &sum_rows_any};

}  // namespace llmkern::cpu::LLMKERN_ISA
