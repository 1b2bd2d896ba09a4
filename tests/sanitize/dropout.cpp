#include "core/dropout.h"

#include "sanitize.h"

namespace llmkern::sanitize {

LLMKERN_CHECK(dropout) {
  for (DType t : kDTypes)
    for (int64_t n : {int64_t{1}, int64_t{15}, int64_t{33}, int64_t{70001}})
      for (double p : {0.0, 0.25, 1.0}) {
        where = std::string("dropout ") + name_of(t) + " " + std::to_string(n) + " " + text(p);
        const Array x = random(t, n, 1), y(t, n, 1), again(t, n);
        cpu::dropout(x.data(), t, n, p, 7, y.data());
        cpu::dropout(x.data(), t, n, p, 7, again.data());
        same("twice", y, again);
        int64_t dropped = 0;
        for (int64_t i = 0; i < n; ++i) {
          if (y[i] == 0)
            ++dropped;
          else
            near("kept", y[i], x[i] / (1 - p), t);
        }
        const double share = static_cast<double>(dropped) / static_cast<double>(n);
        if (n > 1000 && std::abs(share - p) > 0.02) fail("a share of " + text(share) + " was dropped");
      }
}

}  // namespace llmkern::sanitize
