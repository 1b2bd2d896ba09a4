#include "core/grad_norm.h"

#include "sanitize.h"

namespace llmkern::sanitize {

LLMKERN_CHECK(grad_norm) {
  where = "grad_norm";
  std::vector<Array> arrays;
  std::vector<cpu::Span> tensors;
  double want = 0;
  // Tails of a vector and of four, a chunk and its neighbours.
  for (DType t : kDTypes)
    for (int64_t n : {0, 1, 7, 33, 131, 32 * 1024, 32 * 1024 + 5}) {
      arrays.push_back(random(t, n));
      tensors.push_back({arrays.back().data(), n, t});
      for (double x : arrays.back().doubles()) want += x * x;
    }
  // The plain loop's own rounding grows with the number of terms.
  near("sum of squares", cpu::sum_of_squares(tensors), want, DType::f64, 100 * want);
  std::vector<Doubles> before;
  for (const Array& x : arrays) before.push_back(x.doubles());
  cpu::scale(tensors, 0.3);
  for (size_t i = 0; i < arrays.size(); ++i) {
    for (double& x : before[i]) x *= 0.3;
    near("scaled", arrays[i], before[i]);
  }
  near("of nothing", cpu::sum_of_squares({}), 0, DType::f64);
  cpu::scale({}, 0.3);
}

}  // namespace llmkern::sanitize
