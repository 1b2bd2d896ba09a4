// A stable radix sort of N keys of 64 bits: the row above, the position below. Its result is the only one there is, so
// it cannot depend on the number of threads.
//
// The batch is split into partitions. In each pass a partition counts its digits, the counts become places (by digit,
// then by partition), and the partition moves its keys to them. Digits are of equal width, at most 2^11 values, so that
// a count table lies in the L1 cache: 2 passes for up to 4M rows, 3 for all.
#include "core/row_order.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/threads.h"

namespace llmkern::cpu {
namespace {

constexpr int kDigitBits = 11;
// A region of threads costs what sorting some thousand keys does.
constexpr int64_t kPartition = 8 * 1024;

struct Partitions {
  int64_t N, count;
  explicit Partitions(int64_t N) : N(N), count(std::clamp<int64_t>(N / kPartition, 1, threads_of_region())) {}
  int64_t begin(int64_t partition) const { return N * partition / count; }
  // f(partition, begin, end)
  template <class F>
  void each(const F& f) const {
    parallel_for(count, 1, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) f(s, begin(s), begin(s + 1));
    });
  }
};

uint32_t row_of(uint64_t key) { return static_cast<uint32_t>(key >> 32); }

template <class I>
bool make_keys(const I* indices, int64_t begin, int64_t end, int64_t V, uint64_t* keys) {
  bool good = true;
  for (int64_t i = begin; i < end; ++i) {
    good &= static_cast<uint64_t>(static_cast<int64_t>(indices[i])) < static_cast<uint64_t>(V);
    keys[i] = static_cast<uint64_t>(indices[i]) << 32 | static_cast<uint64_t>(i);
  }
  return good;
}

}  // namespace

void throw_index_error() { throw std::out_of_range("index out of range in self"); }

RowOrder::RowOrder(Indices indices, int64_t N, int64_t V)
    : N_(N), order_(N), rows_(std::min(N, V)), starts_(std::min(N, V) + 1) {
  if (V > INT32_MAX || N > INT32_MAX)
    throw std::invalid_argument("at most 2^31 - 1 rows and indices are supported, but got " + std::to_string(V) +
                                " rows and " + std::to_string(N) + " indices");
  const Partitions partitions(N);
  Buffer<uint64_t> keys_buffer(N), moved_buffer(N);
  uint64_t *keys = keys_buffer.get(), *moved = moved_buffer.get();

  std::atomic<bool> bad{false};
  partitions.each([&](int64_t, int64_t begin, int64_t end) {
    const bool good = indices.is_int64 ? make_keys(static_cast<const int64_t*>(indices.data), begin, end, V, keys)
                                       : make_keys(static_cast<const int32_t*>(indices.data), begin, end, V, keys);
    if (!good) bad.store(true, std::memory_order_relaxed);
  });
  if (bad) throw_index_error();

  const int bits = V > 1 ? std::bit_width(static_cast<uint64_t>(V - 1)) : 0;
  const int passes = (bits + kDigitBits - 1) / kDigitBits, width = passes ? (bits + passes - 1) / passes : 0;
  const int64_t digits = int64_t{1} << width;
  std::vector<uint32_t> places(partitions.count * digits);
  for (int pass = 0; pass < passes; ++pass) {
    const auto digit = [&](uint64_t key) { return key >> (32 + pass * width) & (digits - 1); };
    partitions.each([&](int64_t s, int64_t begin, int64_t end) {
      uint32_t* const count = places.data() + s * digits;
      std::fill_n(count, digits, 0u);
      for (int64_t i = begin; i < end; ++i) ++count[digit(keys[i])];
    });
    uint32_t next = 0;
    for (int64_t d = 0; d < digits; ++d)
      for (int64_t s = 0; s < partitions.count; ++s) next += std::exchange(places[s * digits + d], next);
    partitions.each([&](int64_t s, int64_t begin, int64_t end) {
      uint32_t* const place = places.data() + s * digits;
      for (int64_t i = begin; i < end; ++i) moved[place[digit(keys[i])]++] = keys[i];
    });
    std::swap(keys, moved);
  }

  // Runs: each partition counts its own, and then knows where to write them.
  const auto begins_run = [&](int64_t i) { return i == 0 || row_of(keys[i]) != row_of(keys[i - 1]); };
  std::vector<int64_t> first(partitions.count + 1);
  partitions.each([&](int64_t s, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
      order_[i] = static_cast<uint32_t>(keys[i]);
      count += begins_run(i);
    }
    first[s + 1] = count;
  });
  for (int64_t s = 0; s < partitions.count; ++s) first[s + 1] += first[s];
  runs_ = first[partitions.count];
  partitions.each([&](int64_t s, int64_t begin, int64_t end) {
    int64_t r = first[s];
    for (int64_t i = begin; i < end; ++i)
      if (begins_run(i)) {
        rows_[r] = row_of(keys[i]);
        starts_[r] = static_cast<uint32_t>(i);
        ++r;
      }
  });
  starts_[runs_] = static_cast<uint32_t>(N);
}

}  // namespace llmkern::cpu
