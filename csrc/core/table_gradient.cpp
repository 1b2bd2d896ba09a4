// Traffic: each gradient row is read once, each row of the table's gradient written once. A large table is written past
// the caches: a plain store would first read what it overwrites, and most of the rows are zeros that nobody reads soon.
//
// Each row is the sum of its run, taken in fp32, in the order of the batch, by one thread: no atomics, and no memset
// before. Runs longer than kChunk are split into chunks of that length, which different threads add up; the sums of the
// chunks are then added in order. So one hot row does not hold one thread up, and since chunks depend on the run alone,
// the bits are the same for any number of threads. Blocks of rows are taken by threads as they come.
#include "core/table_gradient.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/row_order.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kChunk = 128;
constexpr int64_t kBlockBytes = 128 * 1024;

class RunSums {
 public:
  RunSums(const Terms& terms, const RowOrder& order, int64_t padding_idx, bool scale_grad_by_freq)
      : terms_(terms),
        order_(order),
        padding_idx_(padding_idx),
        by_freq_(scale_grad_by_freq),
        wide_(accum_of(terms.dtype)) {
    for (int64_t r = 0; r < order.runs(); ++r) {
      if (length(r) <= kChunk || is_padding(r)) continue;
      hot_.push_back({.run = r, .first_chunk = static_cast<int64_t>(chunks_.size())});
      const int64_t end = order.starts()[r + 1];
      for (int64_t begin = order.starts()[r]; begin < end; begin += kChunk)
        chunks_.push_back({.begin = begin, .end = std::min(begin + kChunk, end)});
    }
    hot_.push_back({.run = order.runs(), .first_chunk = static_cast<int64_t>(chunks_.size())});
    add_chunks();
  }

  // out = the sum of run r.
  void write(int64_t r, bool stream, void* out) const {
    const double scale = by_freq_ ? 1.0 / static_cast<double>(length(r)) : 1.0;
    if (length(r) <= kChunk)
      return kernels_.sum(terms_, order_.starts()[r], order_.starts()[r + 1], scale, stream, terms_.dtype, out);
    const auto hot =
        std::lower_bound(hot_.begin(), hot_.end(), r, [](const Hot& h, int64_t run) { return h.run < run; });
    const Terms sums{.rows = sums_.get(),
                     .dtype = wide_,
                     .D = terms_.D,
                     .N = static_cast<int64_t>(chunks_.size()),
                     .source = numbers_.data()};
    kernels_.sum(sums, hot[0].first_chunk, hot[1].first_chunk, scale, stream, terms_.dtype, out);
  }

  bool is_padding(int64_t r) const { return order_.rows()[r] == padding_idx_; }

 private:
  struct Hot {
    int64_t run, first_chunk;
  };
  struct Chunk {
    int64_t begin, end;
  };

  int64_t length(int64_t r) const { return order_.starts()[r + 1] - order_.starts()[r]; }

  void add_chunks() {
    const int64_t count = static_cast<int64_t>(chunks_.size());
    const int64_t row_bytes = terms_.D * itemsize(wide_);
    sums_ = Buffer<char>(count * row_bytes);
    numbers_.resize(count);
    std::iota(numbers_.begin(), numbers_.end(), 0u);
    parallel_blocks(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        kernels_.sum(terms_, chunks_[c].begin, chunks_[c].end, 1, false, wide_, sums_.get() + c * row_bytes);
    });
  }

  const Terms& terms_;
  const RowOrder& order_;
  const int64_t padding_idx_;
  const bool by_freq_;
  const DType wide_;
  const TableGradientKernels& kernels_ = LLMKERN_SELECT(table_gradient_kernels);
  // Runs longer than a chunk, and one past the last; their chunks, the sums of those, and 0, 1, 2, ...
  std::vector<Hot> hot_;
  std::vector<Chunk> chunks_;
  Buffer<char> sums_{0};
  std::vector<uint32_t> numbers_;
};

}  // namespace

void table_gradient(const Terms& terms, const RowOrder& order, int64_t V, int64_t padding_idx, bool scale_grad_by_freq,
                    void* dweight) {
  const int64_t row_bytes = terms.D * itemsize(terms.dtype);
  if (row_bytes == 0) return;
  const bool stream = V * row_bytes >= kStreamBytes;
  const uint32_t* const rows = order.rows();
  const auto& kernels = LLMKERN_SELECT(table_gradient_kernels);
  const RunSums sums(terms, order, padding_idx, scale_grad_by_freq);
  parallel_blocks(V, rows_in(kBlockBytes, row_bytes), [&](int64_t begin, int64_t end) {
    const auto row = [&](int64_t r) { return static_cast<char*>(dweight) + r * row_bytes; };
    const auto zero = [&](int64_t from, int64_t to) {
      const size_t bytes = (to - from) * row_bytes;
      stream ? kernels.zero(row(from), bytes) : void(std::memset(row(from), 0, bytes));
    };
    int64_t next = begin;
    for (int64_t r = std::lower_bound(rows, rows + order.runs(), begin) - rows; r < order.runs() && rows[r] < end;
         ++r) {
      if (sums.is_padding(r)) continue;
      zero(next, rows[r]);
      sums.write(r, stream, row(rows[r]));
      next = rows[r] + 1;
    }
    zero(next, end);
  });
}

int64_t table_gradient_rows(const RowOrder& order, int64_t padding_idx) {
  return order.runs() - std::binary_search(order.rows(), order.rows() + order.runs(), padding_idx);
}

void table_gradient_compact(const Terms& terms, const RowOrder& order, int64_t padding_idx, int64_t* rows,
                            void* values) {
  const int64_t row_bytes = terms.D * itemsize(terms.dtype);
  const int64_t count = table_gradient_rows(order, padding_idx);
  const int64_t before = std::lower_bound(order.rows(), order.rows() + order.runs(), padding_idx) - order.rows();
  const int64_t block = rows_in(kBlockBytes, row_bytes);
  const bool has_padding = count < order.runs();
  const RunSums sums(terms, order, padding_idx, false);
  parallel_blocks(count, block, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i + (has_padding && i >= before);
      rows[i] = order.rows()[r];
      if (row_bytes > 0) sums.write(r, false, static_cast<char*>(values) + i * row_bytes);
    }
  });
}

}  // namespace llmkern::cpu
