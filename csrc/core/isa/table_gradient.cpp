#include "core/table_gradient.h"

#include "core/isa/row_sums.h"

namespace llmkern::cpu::LLMKERN_ISA {
namespace {

struct PlainTerms {
  const uint32_t* source;
  int64_t last;
  static constexpr bool has(int64_t) { return true; }
  int64_t row(int64_t j) const { return source[j]; }
  int64_t ahead(int64_t j) const { return source[j < last ? j : last]; }
  static constexpr float scale(int64_t) { return 1; }
};

template <class A>
struct ScaledTerms : PlainTerms {
  const A* factor;
  A scale(int64_t j) const { return factor[j]; }
};

// Lanes where largest[i] == position.
static inline auto chosen(const int32_t* largest, int32_t position, vf32) {
  vi32 at;
  memcpy(&at, largest, sizeof at);
  return at == position + vi32{};
}
static inline auto chosen(const int32_t* largest, int32_t position, vf64) {
  typedef int32_t half __attribute__((vector_size(kVectorBytes / 2)));
  half at;
  memcpy(&at, largest, sizeof at);
  return __builtin_convertvector(at, decltype(vf64{} < vf64{})) == position + decltype(vf64{} < vf64{}){};
}

template <class T, class U>
void sum_largest(const Terms& t, int64_t begin, int64_t end, Accum<T> scale, U* out) {
  using A = Accum<T>;
  constexpr int L = kLanes<A>;
  const T* const rows = static_cast<const T*>(t.rows);
  int64_t d = 0;
  for (; d + L <= t.D; d += L) {
    Vec<A> s{};
    for (int64_t j = begin; j < end; ++j) {
      const int64_t at = t.source[j] * t.D + d;
      s += chosen(t.largest + at, static_cast<int32_t>(t.position[j]), s) ? load<A>(rows + at) : Vec<A>{};
    }
    store(out + d, s * scale);
  }
  for (; d < t.D; ++d) {
    A s{};
    for (int64_t j = begin; j < end; ++j) {
      const int64_t at = t.source[j] * t.D + d;
      if (t.largest[at] == static_cast<int32_t>(t.position[j])) s += load_one(rows + at);
    }
    store_one(out + d, s * scale);
  }
}

template <class T, class U>
void sum_as(const Terms& t, int64_t begin, int64_t end, Accum<T> scale, bool stream, U* out) {
  using A = Accum<T>;
  if (t.largest) return sum_largest<T>(t, begin, end, scale, out);
  const auto run = [&](const auto& rows) {
    RowSum<T, U, std::remove_cvref_t<decltype(rows)>>{
        static_cast<const T*>(t.rows), t.D, rows, begin, end, scale, stream, out}
        .run();
  };
  const PlainTerms plain{.source = t.source, .last = t.N - 1};
  t.scale ? run(ScaledTerms<A>{plain, static_cast<const A*>(t.scale)}) : run(plain);
}

void sum(const Terms& t, int64_t begin, int64_t end, double scale, bool stream, DType out_dtype, void* out) {
  stream = stream && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  visit(t.dtype, [&](auto from) {
    using T = decltype(from);
    using A = Accum<T>;
    visit(out_dtype, [&](auto to) {
      using U = decltype(to);
      constexpr bool known = std::is_same_v<T, U> || std::is_same_v<T, A> || std::is_same_v<U, A>;
      if constexpr (known && std::is_same_v<A, Accum<U>>)
        sum_as<T>(t, begin, end, static_cast<A>(scale), stream, static_cast<U*>(out));
    });
  });
}

void zero(void* p, size_t bytes) {
  char* to = static_cast<char*>(p);
  const size_t head = -reinterpret_cast<uintptr_t>(to) % kVectorBytes;
  if (bytes < head + kVectorBytes) return void(memset(to, 0, bytes));
  memset(to, 0, head);
  char* const end = to + bytes;
  for (to += head; to + kVectorBytes <= end; to += kVectorBytes) store_streaming(reinterpret_cast<float*>(to), vf32{});
  memset(to, 0, end - to);
}

}  // namespace

extern const TableGradientKernels table_gradient_kernels{.sum = &sum, .zero = &zero};

}  // namespace llmkern::cpu::LLMKERN_ISA
