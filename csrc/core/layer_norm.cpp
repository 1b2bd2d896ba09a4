// Layer normalisation: y = (x - mean) / sqrt(variance + eps) * weight + bias, row by row; with rms the mean counts for
// 0.
//
// Traffic. Forward: reads x once, writes y. Backward: reads x and dy once, writes dx. A row is looked at several times
// (mean, squares, result), all but the first in the L1 cache, so that the variance is that of the differences and
// cancels nothing. Kept for the backward: two numbers a row.
//
// The gradients of weight and bias are sums over all rows: each chunk of rows has sums of its own, which are added in
// order. Chunks depend on N alone, so the bits do not depend on the number of threads.
#include "core/layer_norm.h"

#include <algorithm>
#include <cstring>

#include "core/memory.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

constexpr int64_t kRowGrainBytes = 64 * 1024;
// Chunks of rows: as many as this, of at least so many rows.
constexpr int64_t kChunks = 128, kChunkRows = 32;
// Columns of a sum that one thread adds up.
constexpr int64_t kColumns = 1024;

int64_t accum_size(const LayerNorm& op) { return itemsize(accum_of(op.dtype)); }

int64_t row_bytes(const LayerNorm& op) { return op.D * itemsize(op.dtype); }

int64_t grain_rows(const LayerNorm& op) { return rows_in(kRowGrainBytes, row_bytes(op)); }

bool streams(const LayerNorm& op) { return op.N * row_bytes(op) >= kStreamBytes; }

// weight and bias in the accumulation dtype.
class Wide {
 public:
  explicit Wide(const LayerNorm& op)
      : op_(op),
        widens_(itemsize(op.affine) < accum_size(op)),
        row_(accum_size(op) * op.D),
        memory_(widens_ ? 2 * row_ : 0) {
    op_.weight = row(op.weight, memory_.get());
    op_.bias = row(op.bias, memory_.get() + (widens_ ? row_ : 0));
  }
  const LayerNorm& op() const { return op_; }

 private:
  const void* row(const void* v, char* to) const {
    if (!v || !widens_) return v;
    LLMKERN_SELECT(layer_norm).widen(v, op_.affine, op_.D, to);
    return to;
  }

  LayerNorm op_;
  const bool widens_;
  const int64_t row_;
  const Buffer<char> memory_;
};

}  // namespace

void layer_norm_forward(const LayerNorm& op, void* y, void* stats) {
  const auto& kernels = LLMKERN_SELECT(layer_norm);
  const Wide wide(op);
  parallel_for(op.N, grain_rows(op),
               [&](int64_t begin, int64_t end) { kernels.forward(wide.op(), begin, end, y, stats, streams(op)); });
}

void layer_norm_backward(const LayerNorm& op, const void* dy, const void* stats, const LayerNormGradients& to) {
  const auto& kernels = LLMKERN_SELECT(layer_norm);
  const Wide wide(op);
  const bool learns = to.weight || to.bias;
  const int64_t rows = std::max(kChunkRows, ceil_div(op.N, kChunks)), chunks = ceil_div(op.N, rows);
  const int64_t row = op.D * accum_size(op), part = learns ? 2 * row : 0;
  const Buffer<char> sums(chunks * part);
  parallel_for(chunks, std::max<int64_t>(1, grain_rows(op) / rows), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      char* const mine = sums.get() + c * part;
      std::memset(mine, 0, part);
      const LayerNormGradients chunk{
          .x = to.x, .weight = to.weight ? mine : nullptr, .bias = to.bias ? mine + row : nullptr};
      kernels.backward(wide.op(), c * rows, std::min(op.N, (c + 1) * rows), dy, stats, chunk, streams(op));
    }
  });
  void* const results[] = {to.weight, to.bias};
  for (int k = 0; k < 2; ++k) {
    if (!results[k]) continue;
    parallel_for(ceil_div(op.D, kColumns), std::max<int64_t>(1, 32 / (chunks + 1)), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kColumns, n = std::min(op.D, end * kColumns) - first;
      kernels.add_up(sums.get() + k * row + first * accum_size(op), chunks, 2 * op.D, n, op.affine,
                     at(results[k], first, op.affine));
    });
  }
}

}  // namespace llmkern::cpu
