#include "core/embedding.h"

#include "core/isa/simd.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

constexpr int64_t kAheadBytes = 16 * 1024;
constexpr int kLine = 64;

// Copies a row, and fetches the same bytes of a later one.
template <bool Stream>
void copy_row(const char* from, const char* ahead, int64_t bytes, char* to) {
  constexpr int B = kVectorBytes, kStep = kLine < B ? B : kLine;
  const auto move = [&](int64_t i) {
    const vf32 v = load<float>(reinterpret_cast<const float*>(from + i));
    Stream ? store_streaming(reinterpret_cast<float*>(to + i), v) : store(reinterpret_cast<float*>(to + i), v);
  };
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    __builtin_prefetch(ahead + i);
    for (int k = 0; k < kStep; k += B) move(i + k);
  }
  memcpy(to + i, from + i, bytes - i);
}

template <class I>
bool copy_rows(const char* weight, int64_t V, int64_t row_bytes, const I* indices, int64_t begin, int64_t end,
               int64_t N, bool stream, char* out) {
  const int64_t step = 1 + kAheadBytes / (row_bytes + 1);
  const auto number = [&](int64_t i) { return static_cast<uint64_t>(static_cast<int64_t>(indices[i])); };
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t row = number(i), next = number(i + step < N ? i + step : N - 1);
    if (row >= static_cast<uint64_t>(V)) return false;
    const char* const from = weight + row * row_bytes;
    const char* const ahead = next < static_cast<uint64_t>(V) ? weight + next * row_bytes : from;
    char* const to = out + i * row_bytes;
    stream&& reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0 ? copy_row<true>(from, ahead, row_bytes, to)
                                                                 : copy_row<false>(from, ahead, row_bytes, to);
  }
  return true;
}

bool copy_rows_any(const void* weight, int64_t V, int64_t row_bytes, Indices indices, int64_t begin, int64_t end,
                   int64_t N, bool stream, void* out) {
  const auto copy = [&](auto* at) {
    return copy_rows(static_cast<const char*>(weight), V, row_bytes, at, begin, end, N, stream,
                     static_cast<char*>(out));
  };
  return indices.is_int64 ? copy(static_cast<const int64_t*>(indices.data))
                          : copy(static_cast<const int32_t*>(indices.data));
}

double norm(const void* x, DType dtype, int64_t D, double p) {
  return visit(dtype, [&](auto t) -> double {
    using T = decltype(t);
    using A = Accum<T>;
    constexpr int L = kLanes<A>;
    const T* const row = static_cast<const T*>(x);
    // The usual norms in vectors; max and min let NaN through, as torch's do.
    if (p == 2 || p == 1) {
      Vec<A> s[4]{};
      const auto add = [&](Vec<A>& sum, Vec<A> v) {
        const Vec<A> size = v < 0 ? -v : v;
        sum += p == 2 ? v * v : size;
      };
      int64_t d = 0;
      for (; d + 4 * L <= D; d += 4 * L)
        for (int k = 0; k < 4; ++k) add(s[k], load<A>(row + d + k * L));
      for (; d < D; d += L) add(s[0], load<A>(row + d, D - d < L ? static_cast<int>(D - d) : L, A{}));
      const A sum = reduce_add<A>((s[0] + s[1]) + (s[2] + s[3]));
      return p == 2 ? ::sqrt(static_cast<double>(sum)) : static_cast<double>(sum);
    }
    double sum = p == -HUGE_VAL ? HUGE_VAL : 0;
    for (int64_t d = 0; d < D; ++d) {
      const double v = ::fabs(static_cast<double>(load_one(row + d)));
      if (p == HUGE_VAL)
        sum = v > sum || v != v ? v : sum;
      else if (p == -HUGE_VAL)
        sum = v < sum || v != v ? v : sum;
      else
        sum += p == 0 ? (v != 0) : ::pow(v, p);
    }
    return p == 0 || ::isinf(p) ? sum : ::pow(sum, 1 / p);
  });
}

void scale(void* x, DType dtype, int64_t D, double factor) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accum<T>;
    T* const row = static_cast<T*>(x);
    const A a = static_cast<A>(factor);
    for_vectors<A>(D, [&](int64_t d, int n) { store_n(row + d, load_n<A>(row + d, n) * a, n); });
  });
}

}  // namespace

extern const EmbeddingKernels embedding{.copy_rows = &copy_rows_any, .norm = &norm, .scale = &scale};

}  // namespace llmkern::cpu::LLMKERN_ISA
