// Many tensors as one row of chunks, dealt to the threads of one parallel region: small tensors cost no region each,
// large ones are split.
#pragma once
#include <algorithm>
#include <vector>

#include "core/threads.h"

namespace llmkern::cpu {

// Calls f(tensor, begin, end, chunk) for elements [begin, end) of each; `chunk` counts through all tensors. A tensor
// has a field n. How it is split depends on nothing else, so a sum by chunks has the same bits for any number of
// threads.
template <class Tensor>
class TensorChunks {
 public:
  explicit TensorChunks(const std::vector<Tensor>& tensors) : tensors_(tensors) {
    for (const Tensor& tensor : tensors) first_.push_back(first_.back() + ceil_div(tensor.n, kElements));
  }
  int64_t count() const { return first_.back(); }

  template <class F>
  void parallel(const F& f) const {
    parallel_for(count(), 1, [&](int64_t begin, int64_t end) {
      size_t t = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (chunk >= first_[t + 1]) ++t;
        const int64_t from = (chunk - first_[t]) * kElements;
        f(tensors_[t], from, std::min(from + kElements, tensors_[t].n), chunk);
      }
    });
  }

 private:
  static constexpr int64_t kElements = 32 * 1024;
  const std::vector<Tensor>& tensors_;
  // first_[i]: the number of chunks before tensor i.
  std::vector<int64_t> first_{0};
};

}  // namespace llmkern::cpu
