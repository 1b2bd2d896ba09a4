// A batch of row numbers, and its positions sorted by row: what every gradient of a table begins with. See
// row_order.cpp.
#pragma once
#include <cstdint>

#include "core/indices.h"
#include "core/memory.h"

namespace llmkern::cpu {

// std::out_of_range, with torch's text.
[[noreturn]] void throw_index_error();

// Positions 0..N-1 ordered by (row, position), in runs of equal rows: run r holds the positions
// order[starts[r]] .. order[starts[r + 1] - 1], all of row rows[r]; rows ascend.
class RowOrder {
 public:
  // Throws, before anything is written, std::out_of_range if an index is outside [0, V).
  RowOrder(Indices indices, int64_t N, int64_t V);

  int64_t runs() const { return runs_; }
  int64_t positions() const { return N_; }
  const uint32_t* order() const { return order_.get(); }    // (N)
  const uint32_t* rows() const { return rows_.get(); }      // (R)
  const uint32_t* starts() const { return starts_.get(); }  // (R + 1)

 private:
  int64_t N_, runs_ = 0;
  Buffer<uint32_t> order_, rows_, starts_;
};

}  // namespace llmkern::cpu
