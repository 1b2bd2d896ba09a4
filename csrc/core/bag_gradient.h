// The gradient of a bag's table, as terms for table_gradient.h.
#pragma once
#include "core/embedding_bag.h"
#include "core/memory.h"
#include "core/row_order.h"
#include "core/table_gradient.h"

namespace llmkern::cpu {

class BagGradient {
 public:
  // dout (B, D); `largest` (B, D) of a max, else null. table.weight is not read, and may be null.
  BagGradient(const BagTable& table, const Bags& bags, bool mean, const void* dout, const int32_t* largest);
  const RowOrder& order() const { return order_; }
  Terms terms() const;

 private:
  const void* dout_;
  const int32_t* largest_;
  DType dtype_;
  int64_t D_;
  bool scaled_;
  RowOrder order_;
  Buffer<uint32_t> source_;
  Buffer<char> scale_;
};

}  // namespace llmkern::cpu
