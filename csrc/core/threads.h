// One parallel region per call, on the process's OpenMP pool (torch's own).
//
// What is called in a region but through parallel_for may not throw, because nobody catches it there: every buffer is
// taken before.
//
// Work is split into contiguous ranges. Which thread takes which range never changes a result: every kernel owns its
// outputs by index, and sums are taken in an order that does not depend on the number of threads.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "core/util.h"

namespace llmkern::cpu {

// How many threads the calling thread may use. OpenMP's own number is a setting of each thread, so a new one would not
// obey torch.set_num_threads: the library around the core defines this.
int num_threads();

// Of the next region: one, if it lies in another.
inline int threads_of_region() { return omp_in_parallel() ? 1 : num_threads(); }

// Calls f(begin, end) on disjoint ranges that cover [0, n), each of at least `grain` items where n allows it.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t wanted = std::min<int64_t>(threads_of_region(), std::max<int64_t>(1, n / std::max<int64_t>(1, grain)));
  if (wanted <= 1) return f(int64_t{0}, n);
  std::exception_ptr error = nullptr;
#pragma omp parallel num_threads(static_cast<int>(wanted))
  {
    const int64_t threads = omp_get_num_threads(), t = omp_get_thread_num();
    const int64_t begin = n * t / threads, end = n * (t + 1) / threads;
    if (begin < end) {
      try {
        f(begin, end);
      } catch (...) {
#pragma omp critical(llmkern_parallel_for)
        error = std::current_exception();
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

// Calls f(begin, end) on blocks of `block` items that cover [0, n). Threads take them as they come: for work of which
// some items cost far more than others.
template <class F>
void parallel_blocks(int64_t n, int64_t block, const F& f) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(threads_of_region(), ceil_div(n, block)), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(block, std::memory_order_relaxed)) < n;)
      f(begin, std::min(begin + block, n));
  });
}

}  // namespace llmkern::cpu
