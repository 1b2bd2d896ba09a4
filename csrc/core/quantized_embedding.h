// Tables of 8 or 4 bits an element, one scale and offset a row, for inference. See quantized_embedding.cpp.
#pragma once
#include "core/dtype.h"
#include "core/indices.h"
#include "core/isa.h"

namespace llmkern::cpu {

// Element d of row r stands for q * scale[r] + offset[r]. With 8 bits q is byte d of the row. With 4 a row has
// ceil(D / 2) bytes, and byte j holds element j in its low and element j + ceil(D / 2) in its high half, so that a row
// is unpacked into two straight runs; the last high half of an odd D is 0.
struct QuantizedTable {
  const uint8_t* data;
  const float *scale, *offset;  // (V)
  int64_t V, D;
  int bits;

  int64_t row_bytes() const { return bits == 8 ? D : (D + 1) / 2; }
};

// Quantises weight (V, D): offset is the row's minimum, scale (max - min) / (2^bits - 1), rounded up, so that no
// element is further from what stands for it than scale / 2. A row whose range is no finite fp32 number, as that of one
// with NaN or infinities, has scale NaN.
void quantize_rows(const void* weight, DType dtype, int64_t V, int64_t D, int bits, uint8_t* data, float* scale,
                   float* offset);

// out[i] = row indices[i], in Accum<T> and rounded once. Throws std::out_of_range, with torch's text, if an index is
// outside [0, V).
void quantized_embedding_forward(const QuantizedTable& table, Indices indices, int64_t N, DType dtype, void* out);

struct QuantizedEmbeddingKernels {
  void (*quantize)(const void* row, DType dtype, int64_t D, int bits, uint8_t* data, float* scale, float* offset);
  // `ahead`: a row to fetch for later. `stream`: out goes past the caches.
  void (*dequantize)(const uint8_t* row, const uint8_t* ahead, int64_t D, int bits, float scale, float offset,
                     bool stream, DType dtype, void* out);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(QuantizedEmbeddingKernels, quantized_embedding)
