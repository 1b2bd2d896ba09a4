// Sums, means and maxes of bags of looked-up rows. See embedding_bag.cpp.
#pragma once
#include "core/dtype.h"
#include "core/indices.h"
#include "core/isa.h"

namespace llmkern::cpu {

// B bags of a batch of N indices.
struct Bags {
  Indices indices;
  int64_t N, B;
  const int64_t* starts;  // (B + 1): bag b holds positions starts[b] .. starts[b + 1] - 1
  int64_t padding_idx;    // counts as absent; negative: none
};

// Bags::starts, from offsets (B), the last bag ending with N, or with include_last (B + 1); without data bags are of
// equal length. Throws std::runtime_error unless they begin with 0 and end within N, std::invalid_argument if they
// decrease.
void bag_starts(Indices offsets, int64_t N, int64_t B, bool include_last, int64_t* starts);

// What a lookup reads: weight (V, D), samples (N), or null for ones.
struct BagTable {
  const void *weight, *samples;
  DType dtype;
  int64_t V, D;
};

// out (B, D): for each bag the sum of samples[i] * weight[indices[i]], for a mean divided by the number of its rows;
// zeros if it has none. These functions throw std::out_of_range if an index is outside [0, V).
void embedding_bag_forward(const BagTable& table, const Bags& bags, bool mean, void* out);

// out (B, D): for each bag and column the first of the largest elements, and its position, or 0 and -1 if it has no
// rows. As in torch a NaN wins only from the first row of a bag.
void embedding_bag_max_forward(const BagTable& table, const Bags& bags, void* out, int32_t* largest);

// dsamples[i] = dot(dout[its bag], weight[indices[i]]), for a mean divided; 0 for what is in no bag, and for padding.
void embedding_bag_samples_backward(const BagTable& table, const Bags& bags, bool mean, const void* dout,
                                    void* dsamples);

struct EmbeddingBagKernels {
  // Bags [begin, end). -1, or the position of an index outside [0, V).
  int64_t (*sum)(const BagTable& table, const Bags& bags, bool mean, int64_t begin, int64_t end, void* out);
  int64_t (*max)(const BagTable& table, const Bags& bags, int64_t begin, int64_t end, void* out, int32_t* largest);
  int64_t (*dot)(const BagTable& table, const Bags& bags, bool mean, int64_t begin, int64_t end, const void* dout,
                 void* dsamples);
  // bag[i], and in Accum scale[i] = samples[i] / number of rows if mean, for i in the bags [begin, end).
  void (*factors)(const BagTable& table, const Bags& bags, bool mean, int64_t begin, int64_t end, uint32_t* bag,
                  void* scale);
};

}  // namespace llmkern::cpu

LLMKERN_DECLARE_TABLE(EmbeddingBagKernels, embedding_bag)
