// Peaks by measurement. Compute: chains of FMAs in registers, as many as hide the latency. Memory: each
// thread passes over its own part of a buffer far larger than the last-level cache, on huge pages. The
// machine may be shared, so time is cut into slices and the best one counts.
#include "core/probe.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "core/memory.h"
#include "core/threads.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kBytes = int64_t{192} << 20;  // of each buffer
constexpr int64_t kRounds = 1 << 18;            // of FMAs in one slice: about a millisecond

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The shortest time of one slice, run by all threads at once, f(thread, threads), within about `seconds`.
template <class F>
double best_slice(double seconds, const F& f) {
  double best = 1e30;
  const double end = now() + seconds;
  do {
    const double start = now();
#pragma omp parallel num_threads(threads_of_region())
    f(omp_get_thread_num(), omp_get_num_threads());
    best = std::min(best, now() - start);
  } while (now() < end);
  return best;
}

std::atomic<uint64_t> unread;  // where results go that nobody wants

template <class S>
double fma_rate(int64_t (*fma)(int64_t, S*), double seconds) {
  std::atomic<int64_t> flops{0};
  const double time = best_slice(seconds, [&](int thread, int threads) {
    S sink = S(1e-3);
    const int64_t of_round = fma(kRounds, &sink);
    if (sink > 0) unread.fetch_add(1, std::memory_order_relaxed);
    if (thread == 0) flops = of_round * kRounds * threads;
  });
  return static_cast<double>(flops) / time * 1e-9;
}

}  // namespace

double peak_flops(DType dtype, double seconds) {
  const auto& kernels = LLMKERN_SELECT(probe);
  if (dtype == DType::f32) return fma_rate(kernels.fma_f32, seconds);
  if (dtype == DType::f64) return fma_rate(kernels.fma_f64, seconds);
  if (dtype != DType::bf16) throw std::invalid_argument("peak_flops: no CPU arithmetic in float16; it runs in float32");
#if defined(__x86_64__)
  const bool here = __builtin_cpu_supports("avx512bf16");
#else
  const bool here = false;
#endif
  if (!here || kernels.dot_bf16 == nullptr)
    throw std::invalid_argument("peak_flops: no bfloat16 dot product here (it needs AVX-512 BF16)");
  return fma_rate(kernels.dot_bf16, seconds);
}

double peak_bandwidth(Traffic traffic, double seconds) {
  const auto& kernels = LLMKERN_SELECT(probe);
  const Buffer<char> from(kBytes), to(traffic == Traffic::copy ? kBytes : 0);
  const auto part = [](int thread, int threads) { return kBytes / 64 * thread / threads * 64; };
#pragma omp parallel num_threads(threads_of_region())
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t begin = part(thread, threads), n = part(thread + 1, threads) - begin;
    std::memset(from.get() + begin, 1, n);
    if (traffic == Traffic::copy) std::memset(to.get() + begin, 1, n);
  }
  const double time = best_slice(seconds, [&](int thread, int threads) {
    const int64_t begin = part(thread, threads), n = part(thread + 1, threads) - begin;
    if (traffic == Traffic::read)
      unread.fetch_add(kernels.read(from.get() + begin, n), std::memory_order_relaxed);
    else if (traffic == Traffic::copy)
      std::memcpy(to.get() + begin, from.get() + begin, n);
    else
      kernels.stream(from.get() + begin, n);
  });
  return static_cast<double>(kBytes) * (traffic == Traffic::copy ? 2 : 1) / time * 1e-9;
}

}  // namespace llmkern::cpu
