// What the ops stand on: memory, threads, the functions of simd.h, the probes.
#include <atomic>

#include "core/elementwise.h"
#include "core/memory.h"
#include "core/probe.h"
#include "core/row_order.h"
#include "core/threads.h"
#include "sanitize.h"

namespace llmkern::sanitize {
namespace {

void check_memory() {
  where = "memory";
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{63}, size_t{4097}, cpu::kLargeBytes, 3 * cpu::kLargeBytes + 1})
    for (int round = 0; round < 2; ++round) {
      char* const p = static_cast<char*>(cpu::acquire(bytes));
      if (reinterpret_cast<uintptr_t>(p) % 64) fail("not aligned to a cache line");
      std::memset(p, 1, bytes);
      cpu::release(p, bytes);
    }
  cpu::Buffer<double> a(7), b(cpu::kLargeBytes);
  a[6] = 1;
  b[cpu::kLargeBytes - 1] = 2;
  b = std::move(a);
  const cpu::Buffer<double> c(std::move(b));
  if (c[6] != 1) fail("a moved buffer lost its elements");
  cpu::empty_cache();
}

void check_threads() {
  where = "threads";
  for (int64_t n : {0, 1, 2, 1001}) {
    std::atomic<int64_t> sum{0};
    cpu::parallel_for(n, 10, [&](int64_t begin, int64_t end) { sum += (end - begin) * (begin + end - 1) / 2; });
    if (sum != n * (n - 1) / 2) fail("ranges do not cover all items once");
  }
  throws<std::out_of_range>("parallel_for",
                            [] { cpu::parallel_for(99, 1, [](int64_t, int64_t) { throw std::out_of_range(""); }); });
}

void check_row_order() {
  // V: no digit, one, two, three; N: none, one share, several.
  for (int64_t V : {int64_t{1}, int64_t{5}, int64_t{3000}, int64_t{40'000'000}})
    for (int64_t N : {int64_t{0}, int64_t{1}, int64_t{1001}, int64_t{30'000}}) {
      where = "row_order " + std::to_string(V) + " " + std::to_string(N);
      std::vector<int32_t> rows(N);
      for (int64_t i = 0; i < N; ++i) rows[i] = static_cast<int32_t>(i * i * 977 % V);
      const cpu::RowOrder sorted({rows.data(), false}, N, V);
      int64_t i = 0;
      for (int64_t r = 0; r < sorted.runs(); ++r) {
        if (r > 0 && sorted.rows()[r] <= sorted.rows()[r - 1]) fail("rows do not ascend");
        if (sorted.starts()[r] != i || sorted.starts()[r + 1] <= i) fail("runs do not follow each other");
        for (; i < sorted.starts()[r + 1]; ++i) {
          if (rows[sorted.order()[i]] != static_cast<int32_t>(sorted.rows()[r])) fail("a position of another row");
          if (i > sorted.starts()[r] && sorted.order()[i] <= sorted.order()[i - 1]) fail("not in order of positions");
        }
      }
      if (i != N) fail("positions are missing");
    }
}

void check_elementwise() {
  const std::pair<cpu::Unary, double (*)(double)> functions[] = {
      {cpu::Unary::exp, [](double x) { return std::exp(x); }},
      {cpu::Unary::sigmoid, [](double x) { return 1 / (1 + std::exp(-x)); }},
      {cpu::Unary::tanh, [](double x) { return std::tanh(x); }},
      {cpu::Unary::copy, [](double x) { return x; }}};
  for (DType t : kDTypes)
    for (const auto& [name, function] : functions)
      for (int64_t n = 0; n < 70; ++n) {
        where = std::string("elementwise ") + name_of(t) + " " + std::to_string(n);
        const Array x = random(t, n), y(t, n);
        LLMKERN_SELECT(elementwise).apply(name, x.data(), n, t, y.data());
        for (int64_t i = 0; i < n; ++i) near("y", y[i], function(x[i]), t);
      }
}

void check_probe() {
  where = "probe";
  for (DType t : kDTypes) {
    try {
      if (!(cpu::peak_flops(t, 1e-3) > 0)) fail("no rate");
    } catch (const std::invalid_argument&) {
      // Not every CPU multiplies every type.
      if (t == DType::f32 || t == DType::f64) throw;
    }
  }
  for (auto traffic : {cpu::Traffic::read, cpu::Traffic::copy, cpu::Traffic::stream})
    if (!(cpu::peak_bandwidth(traffic, 1e-3) > 0)) fail("no rate");
}

}  // namespace

LLMKERN_CHECK(runtime) {
  check_memory();
  check_threads();
  check_row_order();
  check_elementwise();
  check_probe();
}

}  // namespace llmkern::sanitize
