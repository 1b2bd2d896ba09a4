// Makes fork() work: libgomp's pool does not survive into a child, whose first parallel region would wait for
// it for ever. The pool of a thread that forks is given up before, and comes back with the next region, on
// both sides.
#include "core/threads.h"

#if defined(__unix__)
#include <pthread.h>

// Weak: OpenMP runtimes before 5.0 lack it, and keep the fault.
extern "C" int omp_pause_resource_all(omp_pause_resource_t) noexcept __attribute__((weak));

namespace llmkern::cpu {
namespace {

void before_fork() {
  if (omp_pause_resource_all != nullptr && !omp_in_parallel()) omp_pause_resource_all(omp_pause_soft);
}

[[maybe_unused]] const int registered = pthread_atfork(&before_fork, nullptr, nullptr);

}  // namespace
}  // namespace llmkern::cpu
#endif
