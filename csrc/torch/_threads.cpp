#include <torch/csrc/stable/ops.h>

#include "core/threads.h"

// torch's number. Asking for it also makes it the OpenMP setting of a thread that has not asked before.
int llmkern::cpu::num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }
