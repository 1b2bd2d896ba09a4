// Every public function of the core on odd sizes, under the address and the undefined-behaviour sanitizer: `make
// sanitize`.
//
// Operands lie in heap blocks of exactly their size, so that a read or a write past an end stops the program; results
// are NaN before a kernel writes them, and are compared with plain loops in double. Loosely: what an error may be, the
// Python tests measure. An op is one `LLMKERN_CHECK(<op>)`, in the file of its stem; `sanitize gemm` runs one.
//
// Each check is then run again with a request for memory that fails, the first, the second and so on: the caller gets
// std::bad_alloc, from whichever thread asked.
#include <atomic>
#include <new>

#include "core/isa.h"
#include "core/memory.h"
#include "core/threads.h"
#include "sanitize.h"

namespace llmkern::sanitize {

std::map<std::string, void (*)()>& checks() {
  static std::map<std::string, void (*)()> all;
  return all;
}

namespace {

// Requests for memory so far, and the one that fails.
std::atomic<int64_t> requests{0};
int64_t failing = -1;

int64_t requests_of(void (*check)(), int64_t fails) {
  seed = 1;
  requests = 0;
  failing = fails;
  check();
  return requests;
}

// Of the first twentieth of the requests, which costs little: each of the very first ones, then ever fewer.
void check_failures(void (*check)(), int64_t total) {
  for (int64_t n = 0; n < total && n <= std::max<int64_t>(total / 20, 16); n += 1 + n / 8) try {
      requests_of(check, n);
      fail("request " + std::to_string(n) + " for memory failed, and nobody was told");
    } catch (const std::bad_alloc&) {
    }
}

int run(const char* wanted) {
  try {
    std::printf("sanitize: %s\n", cpu::isa_name(cpu::selected_isa()));
  } catch (const std::invalid_argument& error) {
    const bool lacking = std::strstr(error.what(), "does not have it") != nullptr;
    std::printf("sanitize: %s%s\n", lacking ? "skipped: " : "", error.what());
    return lacking ? 0 : 2;
  }
  bool known = false;
  for (const auto& [name, check] : checks()) {
    if (wanted && name != wanted) continue;
    known = true;
    check_failures(check, requests_of(check, -1));
    std::printf("sanitize: %s passed\n", name.c_str());
    std::fflush(stdout);
  }
  if (!known) std::printf("sanitize: no check is named %s\n", wanted);
  return known ? 0 : 2;
}

}  // namespace
}  // namespace llmkern::sanitize

namespace llmkern::cpu {

// More than one, so that work is shared out, and no power of two.
int num_threads() { return 3; }

void before_acquire() {
  if (sanitize::requests.fetch_add(1) == sanitize::failing) throw std::bad_alloc();
}

}  // namespace llmkern::cpu

int main(int argc, char** argv) { return llmkern::sanitize::run(argc > 1 ? argv[1] : nullptr); }
