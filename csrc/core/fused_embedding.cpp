// Token + position + token type, norm and dropout: out = dropout(norm(scale * weight[token] + position + type)).
//
// Traffic. Forward: each row that occurs is read once, out is written once; a composition of torch's functions writes
// and reads N*D again for every step. Nothing of that size is kept for the backward but the indices and two numbers a
// row: the normalised row is computed again from the tables, the mask from its seed.
//
// Backward: one pass writes the gradient at the sum, (N, D) of scratch, because a norm's gradient needs a whole row
// before its first element is known; then each table adds up its rows of it, by tokens, positions and types. Gradients
// of the norm's own weights are partial sums over fixed chunks of the tokens, added in order: the same bits for any
// number of threads.
#include "core/fused_embedding.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/memory.h"
#include "core/row_order.h"
#include "core/table_gradient.h"
#include "core/threads.h"
#include "core/util.h"

namespace llmkern::cpu {
namespace {

// Chunks of the tokens for the norm's gradients: as many as this, of at least so many tokens.
constexpr int64_t kChunks = 128, kChunkTokens = 32;

int64_t row_bytes(const FusedEmbedding& op) { return op.D * itemsize(op.dtype); }

int64_t grain_rows(const FusedEmbedding& op) { return rows_in(kGrainBytes, row_bytes(op)); }

void check(const FusedEmbedding& op) {
  static constexpr const char* kPrefix[] = {"", "positions: ", "token_types: "};
  for (int k = 0; k < 3; ++k) {
    const FusedTable& table = op.tables[k];
    for (int64_t i = 0; i < std::min(table.period, op.N); ++i)
      if (static_cast<uint64_t>(table.indices[i]) >= static_cast<uint64_t>(table.rows))
        throw std::out_of_range(std::string(kPrefix[k]) + "index out of range in self");
  }
}

FusedRows rows_of(const FusedEmbedding& op, int64_t n) {
  const auto row = [&](const FusedTable& table, int64_t n) -> const void* {
    if (table.period == 0 || !table.data) return nullptr;
    return at(table.data, table.row(n) * op.D, op.dtype);
  };
  return {.at = {row(op.tables[0], n), row(op.tables[1], n), row(op.tables[2], n)},
          .next = row(op.tables[0], std::min(n + 1, op.N - 1))};
}

// dtable[r] = scale * the sum of dsum[n] over the tokens n of row r.
void add_rows(const FusedEmbedding& op, const FusedTable& table, const void* dsum, double scale, int64_t padding_idx,
              bool by_freq, void* dtable) {
  const bool repeats = table.period < op.N;
  const Buffer<int64_t> every(repeats ? op.N : 0);
  for (int64_t n = 0; repeats && n < op.N; ++n) every[n] = table.row(n);
  const RowOrder order(repeats ? Indices{.data = every.get(), .is_int64 = true} : table.indices, op.N, table.rows);
  visit(op.dtype, [&](auto t) {
    using A = Accum<decltype(t)>;
    const Buffer<A> scales(scale == 1 ? 0 : op.N);
    if (scale != 1) std::fill_n(scales.get(), op.N, static_cast<A>(scale));
    const void* const factors = scale == 1 ? nullptr : scales.get();
    table_gradient({.rows = dsum, .dtype = op.dtype, .D = op.D, .N = op.N, .source = order.order(), .scale = factors},
                   order, table.rows, padding_idx, by_freq, dtable);
  });
}

// Writes the gradient at the sum to dsum, unless null, and those of the norm's weights.
void normalise_backward(const FusedEmbedding& op, const void* dout, const void* stats, char* dsum,
                        const FusedEmbeddingGradients& to) {
  const auto& kernels = LLMKERN_SELECT(fused_embedding);
  const int64_t accum = itemsize(accum_of(op.dtype));
  const bool learns = to.norm_weight || to.norm_bias;
  const int64_t tokens = std::max(kChunkTokens, ceil_div(op.N, kChunks)), chunks = ceil_div(op.N, tokens);
  const int64_t chunk_bytes = learns ? 2 * op.D * accum : 0;
  const Buffer<char> sums(chunks * chunk_bytes);
  parallel_for(chunks, std::max<int64_t>(1, grain_rows(op) / tokens), [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(op.norm == Norm::none ? 0 : 2 * op.D * accum);
    for (int64_t i = begin; i < end; ++i) {
      char* const chunk = sums.get() + i * chunk_bytes;
      std::memset(chunk, 0, chunk_bytes);
      for (int64_t n = i * tokens; n < std::min(op.N, (i + 1) * tokens); ++n)
        kernels.backward(op, n, rows_of(op, n), static_cast<const char*>(dout) + n * row_bytes(op),
                         static_cast<const char*>(stats) + n * 2 * accum, dsum ? dsum + n * row_bytes(op) : nullptr,
                         learns ? chunk : nullptr, scratch.get());
    }
  });
  char* const parts[] = {sums.get(), sums.get() + op.D * accum};
  void* const results[] = {to.norm_weight, to.norm_bias};
  for (int k = 0; k < 2; ++k)
    if (results[k]) kernels.add_up(parts[k], chunks, 2 * op.D, op.D, op.dtype, results[k]);
}

}  // namespace

void fused_embedding_forward(const FusedEmbedding& op, void* out, void* stats) {
  check(op);
  const auto& kernels = LLMKERN_SELECT(fused_embedding);
  const int64_t accum = itemsize(accum_of(op.dtype));
  parallel_for(op.N, grain_rows(op), [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(op.norm == Norm::none ? 0 : 2 * op.D * accum);
    for (int64_t n = begin; n < end; ++n)
      kernels.forward(op, n, rows_of(op, n), static_cast<char*>(out) + n * row_bytes(op),
                      static_cast<char*>(stats) + n * 2 * accum, scratch.get());
  });
}

void fused_embedding_backward(const FusedEmbedding& op, const void* dout, const void* stats,
                              const FusedEmbeddingGradients& to) {
  check(op);
  const bool any_table = to.tables[0] || to.tables[1] || to.tables[2];
  // Without a norm and dropout the gradient at the sum is dout itself.
  const bool itself = op.norm == Norm::none && op.p == 0;
  const Buffer<char> dsum(any_table && !itself ? op.N * row_bytes(op) : 0);
  if (!itself && (any_table || to.norm_weight || to.norm_bias))
    normalise_backward(op, dout, stats, any_table ? dsum.get() : nullptr, to);
  for (int k = 0; k < 3; ++k)
    if (to.tables[k])
      add_rows(op, op.tables[k], itself ? dout : dsum.get(), k == 0 ? op.scale : 1, k == 0 ? to.padding_idx : -1,
               k == 0 && to.scale_grad_by_freq, to.tables[k]);
}

}  // namespace llmkern::cpu
