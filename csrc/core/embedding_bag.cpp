// Bags of looked-up rows, reduced while they are read.
//
// Traffic: forward, each row once, at random: latency, unless rows are fetched ahead of their turn; the caches hold a
// bag. Each output is one thread's, and its sum is taken in the order of the bag. Backward: a position's gradient is
// that of its bag, times a factor: the sums of table_gradient.cpp, whose rows are the bags'.
#include "core/embedding_bag.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "core/bag_gradient.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kBlockBytes = 1024 * 1024;

// f(begin, end) on blocks of bags; it gives -1 or the position of a bad index.
template <class F>
void over_bags(const BagTable& table, const Bags& bags, const F& f) {
  const int64_t bag_bytes = (1 + bags.N / std::max<int64_t>(1, bags.B)) * (1 + table.D) * itemsize(table.dtype);
  std::atomic<int64_t> bad{bags.N};
  parallel_blocks(bags.B, 1 + kBlockBytes / bag_bytes, [&](int64_t begin, int64_t end) {
    const int64_t position = f(begin, end);
    for (int64_t first = bad; position >= 0 && position < first && !bad.compare_exchange_weak(first, position);) {
    }
  });
  if (bad < bags.N)
    throw std::out_of_range("Index " + std::to_string(bad) + " of input takes value " +
                            std::to_string(bags.indices[bad]) + " which is not in the valid range [0, " +
                            std::to_string(table.V) + ")");
}

}  // namespace

void bag_starts(Indices offsets, int64_t N, int64_t B, bool include_last, int64_t* starts) {
  const auto text = [](int64_t x) { return std::to_string(x); };
  for (int64_t b = 0; b < B; ++b) starts[b] = offsets.data ? offsets[b] : b * (N / B);
  // Without a bag no index lies in one.
  const int64_t covered = B > 0 ? N : 0;
  starts[B] = include_last ? offsets[B] : covered;
  if (starts[0] != 0)
    throw std::runtime_error(
        "offsets[0] has to be 0, i.e., the first sequence in the mini-batch has to start from position 0. However, "
        "got " +
        text(starts[0]));
  if (const int64_t last = starts[include_last ? B : std::max<int64_t>(0, B - 1)]; B > 0 && last > N)
    throw std::runtime_error("offsets[-1] can not be greater than input's length " + text(N) +
                             " but got offsets[-1] of " + text(last));
  for (int64_t b = 0; b < B; ++b)
    if (starts[b] > starts[b + 1])
      throw std::invalid_argument("embedding_bag: offsets must not decrease, but offsets[" + text(b + 1) +
                                  "] = " + text(starts[b + 1]) + " follows " + text(starts[b]) +
                                  "; each says where a bag begins");
}

void embedding_bag_forward(const BagTable& table, const Bags& bags, bool mean, void* out) {
  over_bags(table, bags, [&](int64_t begin, int64_t end) {
    return LLMKERN_SELECT(embedding_bag).sum(table, bags, mean, begin, end, out);
  });
}

void embedding_bag_max_forward(const BagTable& table, const Bags& bags, void* out, int32_t* largest) {
  if (bags.N > INT32_MAX) throw std::invalid_argument("embedding_bag: a max is taken of at most 2^31 - 1 indices");
  over_bags(table, bags, [&](int64_t begin, int64_t end) {
    return LLMKERN_SELECT(embedding_bag).max(table, bags, begin, end, out, largest);
  });
}

void embedding_bag_samples_backward(const BagTable& table, const Bags& bags, bool mean, const void* dout,
                                    void* dsamples) {
  const int64_t size = itemsize(table.dtype);
  if (const int64_t used = bags.starts[bags.B]; used < bags.N)
    std::fill(static_cast<char*>(dsamples) + used * size, static_cast<char*>(dsamples) + bags.N * size, char{0});
  over_bags(table, bags, [&](int64_t begin, int64_t end) {
    return LLMKERN_SELECT(embedding_bag).dot(table, bags, mean, begin, end, dout, dsamples);
  });
}

BagGradient::BagGradient(const BagTable& table, const Bags& bags, bool mean, const void* dout, const int32_t* largest)
    : dout_(dout),
      largest_(largest),
      dtype_(table.dtype),
      D_(table.D),
      scaled_(mean || table.samples),
      order_(bags.indices, bags.starts[bags.B], table.V),
      source_(order_.positions()),
      scale_(scaled_ ? order_.positions() * sizeof(double) : 0) {
  const int64_t N = order_.positions(), wide = itemsize(accum_of(dtype_));
  Buffer<uint32_t> bag(N);
  Buffer<char> factor(scaled_ ? N * wide : 0);
  parallel_for(bags.B, 512, [&](int64_t begin, int64_t end) {
    LLMKERN_SELECT(embedding_bag).factors(table, bags, mean, begin, end, bag.get(), scaled_ ? factor.get() : nullptr);
  });
  const auto gather = [&](auto* to, const auto* from) {
    parallel_for(N, 8 * 1024, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) to[j] = from[order_.order()[j]];
    });
  };
  gather(source_.get(), bag.get());
  if (!scaled_) return;
  if (dtype_ == DType::f64)
    gather(reinterpret_cast<double*>(scale_.get()), reinterpret_cast<const double*>(factor.get()));
  else
    gather(reinterpret_cast<float*>(scale_.get()), reinterpret_cast<const float*>(factor.get()));
}

Terms BagGradient::terms() const {
  return {.rows = dout_,
          .dtype = dtype_,
          .D = D_,
          .N = order_.positions(),
          .source = source_.get(),
          .scale = scaled_ ? scale_.get() : nullptr,
          .largest = largest_,
          .position = order_.order()};
}

}  // namespace llmkern::cpu
