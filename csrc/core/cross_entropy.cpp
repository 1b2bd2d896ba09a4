// Cross-entropy from logits, by rows.
//
// Traffic: the forward reads the N*V logits once from memory; with the gradient it also writes N*V once. A row (V =
// 32,000 in fp32: 128 KB) stays in the L2 cache while three sweeps pass over it: maximum, exponentials (kept in a
// scratch row) and their sum, gradient. One exp per element. torch makes 8-9 passes over memory for the same.
//
// The gradient in the forward is a bet on the gradient that will come back: functional knows the reduction, and so the
// factor of each row. ops/cross_entropy.py takes the result if the bet was right and calls the backward kernel, which
// recomputes from the logits, if not.
#include "core/cross_entropy.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/memory.h"
#include "core/threads.h"

namespace llmkern::cpu {
namespace {

// A gradient larger than this does not stay in cache until the next op reads it.
constexpr size_t kStreamBytes = size_t{16} << 20;

double weight_sum(const CrossEntropy& op) {
  if (!op.weight) return static_cast<double>(op.V);
  double sum = 0;
  visit(op.dtype, [&](auto t) {
    using T = decltype(t);
    const T* w = static_cast<const T*>(op.weight);
    for (int64_t v = 0; v < op.V; ++v) sum += to_double(w[v]);
  });
  return sum;
}

template <class F>
void for_rows(const CrossEntropy& op, const int64_t* target, const F& f) {
  constexpr int64_t kGrainElements = 16 * 1024;
  std::atomic<int64_t> bad{op.ignore_index};
  parallel_for(op.N, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, op.V)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t y = target[i];
                   if (y != op.ignore_index && static_cast<uint64_t>(y) >= static_cast<uint64_t>(op.V)) {
                     bad.store(y, std::memory_order_relaxed);
                     return;
                   }
                 }
                 f(begin, end);
               });
  if (bad != op.ignore_index) throw std::out_of_range("Target " + std::to_string(bad) + " is out of bounds.");
}

}  // namespace

void cross_entropy_forward(const CrossEntropy& op, const void* logits, const int64_t* target, const void* scale,
                           void* loss, void* stats, void* dlogits) {
  const size_t item = itemsize(op.dtype), accum = op.dtype == DType::f64 ? 8 : 4, row = op.V * item;
  const bool stream = op.N * row > kStreamBytes;
  const double weights = weight_sum(op);
  const auto& kernels = LLMKERN_SELECT(cross_entropy);
  for_rows(op, target, [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(scale ? op.V * accum : 0);
    for (int64_t i = begin; i < end; ++i) {
      char* const dx = scale ? static_cast<char*>(dlogits) + i * row : nullptr;
      char *const loss_i = static_cast<char*>(loss) + i * accum, *const stats_i =
                                                                     static_cast<char*>(stats) + 2 * i * accum;
      if (target[i] == op.ignore_index) {
        std::memset(loss_i, 0, accum);
        const double ignored[2] = {0, 1};
        const float ignored_f[2] = {0, 1};
        std::memcpy(stats_i, accum == 8 ? static_cast<const void*>(ignored) : ignored_f, 2 * accum);
        if (dx) std::memset(dx, 0, row);
        continue;
      }
      kernels.forward(op, static_cast<const char*>(logits) + i * row, target[i], weights,
                      scale ? static_cast<const char*>(scale) + i * accum : nullptr, loss_i, stats_i, dx, scratch.get(),
                      stream);
    }
  });
}

void cross_entropy_backward(const CrossEntropy& op, const void* dloss, const void* logits, const int64_t* target,
                            const void* stats, void* dlogits) {
  const size_t item = itemsize(op.dtype), accum = op.dtype == DType::f64 ? 8 : 4, row = op.V * item;
  const bool stream = op.N * row > kStreamBytes;
  const double weights = weight_sum(op);
  const auto& kernels = LLMKERN_SELECT(cross_entropy);
  for_rows(op, target, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* const dx = static_cast<char*>(dlogits) + i * row;
      if (target[i] == op.ignore_index)
        std::memset(dx, 0, row);
      else
        kernels.backward(op, static_cast<const char*>(logits) + i * row, target[i], weights,
                         static_cast<const char*>(dloss) + i * accum, static_cast<const char*>(stats) + 2 * i * accum,
                         dx, stream);
    }
  });
}

}  // namespace llmkern::cpu
