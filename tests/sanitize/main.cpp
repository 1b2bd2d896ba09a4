// Every public function of the core on odd sizes, under the address and the undefined-behaviour sanitizer: `make
// sanitize`.
//
// Operands lie in heap blocks of exactly their size, so that a read or a write past an end stops the program; results
// are NaN before a kernel writes them, and are compared with plain loops in double. Loosely: what an error may be, the
// Python tests measure. An op is one function `check_<op>`, in the file of its stem, and one line here; `sanitize gemm`
// runs one.
#include "core/isa.h"
#include "core/threads.h"
#include "sanitize.h"

namespace llmkern::sanitize {

void check_cross_entropy();
void check_dropout();
void check_embedding();
void check_embedding_bag();
void check_fused_embedding();
void check_gemm();
void check_grad_norm();
void check_linear();
void check_linear_cross_entropy();
void check_mse_loss();
void check_optim();
void check_quantized_embedding();
void check_rnn();
void check_row_optim();
void check_runtime();
void check_sparse_optim();

namespace {

constexpr struct {
  const char* name;
  void (*check)();
} kChecks[] = {
    {"cross_entropy", &check_cross_entropy},
    {"dropout", &check_dropout},
    {"embedding", &check_embedding},
    {"embedding_bag", &check_embedding_bag},
    {"fused_embedding", &check_fused_embedding},
    {"gemm", &check_gemm},
    {"grad_norm", &check_grad_norm},
    {"linear", &check_linear},
    {"linear_cross_entropy", &check_linear_cross_entropy},
    {"mse_loss", &check_mse_loss},
    {"optim", &check_optim},
    {"quantized_embedding", &check_quantized_embedding},
    {"rnn", &check_rnn},
    {"row_optim", &check_row_optim},
    {"runtime", &check_runtime},
    {"sparse_optim", &check_sparse_optim},
};

int run(const char* wanted) {
  try {
    std::printf("sanitize: %s\n", cpu::isa_name(cpu::selected_isa()));
  } catch (const std::invalid_argument& error) {
    const bool lacking = std::strstr(error.what(), "does not have it") != nullptr;
    std::printf("sanitize: %s%s\n", lacking ? "skipped: " : "", error.what());
    return lacking ? 0 : 2;
  }
  bool known = false;
  for (const auto& [name, check] : kChecks) {
    if (wanted && std::strcmp(wanted, name) != 0) continue;
    known = true;
    seed = 1;
    check();
    std::printf("sanitize: %s passed\n", name);
    std::fflush(stdout);
  }
  if (!known) std::printf("sanitize: no check is named %s\n", wanted);
  return known ? 0 : 2;
}

}  // namespace
}  // namespace llmkern::sanitize

// More than one, so that work is shared out, and no power of two.
int llmkern::cpu::num_threads() { return 3; }

int main(int argc, char** argv) { return llmkern::sanitize::run(argc > 1 ? argv[1] : nullptr); }
