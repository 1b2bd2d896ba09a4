// Large blocks that were given back are kept, oldest first, up to a limit; a request takes the smallest that holds it
// and wastes no more than a quarter.
//
// LLMKERN_CACHE_MB sets the limit (0 keeps nothing). With LLMKERN_POISON=1 every block is filled with NaN, so that the
// tests see an element that a kernel forgot to write.
#include "core/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__unix__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(LLMKERN_SANITIZE)
#include <sanitizer/asan_interface.h>
#endif

namespace llmkern::cpu {

#if defined(LLMKERN_SANITIZE)
// May throw: the checks define it, and let any request for memory fail.
void before_acquire();
#endif

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Of a block as it lies in memory: a request and its release agree on it.
size_t whole(size_t bytes) {
  return bytes < kLargeBytes ? round_up(bytes ? bytes : 1, 64) : round_up(bytes, kHugePage);
}

// The whole number, at most `most`, that environment variable `name` holds; -1 if it is unset or empty.
int64_t setting(const char* name, int64_t most, const char* expected) {
  const char* const value = std::getenv(name);
  if (!value || !*value) return -1;
  int64_t number = 0;
  for (const char* digit = value; *digit && number >= 0; ++digit)
    number = *digit >= '0' && *digit <= '9' && number <= most ? number * 10 + (*digit - '0') : -1;
  if (number < 0 || number > most)
    throw std::invalid_argument(std::string(name) + "=" + value + "; expected " + expected);
  return number;
}

size_t limit() {
  constexpr int64_t kMostMegabytes = int64_t{1} << 40;
  if (const int64_t megabytes = setting("LLMKERN_CACHE_MB", kMostMegabytes, "a whole number of MiB, such as 512, or 0");
      megabytes >= 0)
    return static_cast<size_t>(megabytes) << 20;
  constexpr size_t kMost = size_t{2} << 30;
#if defined(_SC_PHYS_PAGES)
  const size_t machine = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return std::min(kMost, machine / 16);
#else
  return kMost;
#endif
}

bool poisons() { return setting("LLMKERN_POISON", 1, "0 or 1") == 1; }

void* allocate(size_t bytes) {
  void* const p = std::aligned_alloc(bytes < kLargeBytes ? 64 : kHugePage, bytes);
  if (!p) throw std::bad_alloc();
#if defined(__linux__)
  // A hint: nothing is promised, nothing can fail.
  if (bytes >= kLargeBytes) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return p;
}

// Says how much of a block is in use. Blocks are longer than what was asked for, and kept ones are ours still: the
// address sanitizer would see nothing wrong in either.
void mark([[maybe_unused]] void* p, [[maybe_unused]] size_t used, [[maybe_unused]] size_t size) {
#if defined(LLMKERN_SANITIZE)
  ASAN_UNPOISON_MEMORY_REGION(p, used);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(p) + used, size - used);
#endif
}

struct Block {
  void* p;
  size_t bytes;
};

class Cache {
 public:
  // Never destroyed: tensors may outlive static objects.
  static Cache& instance() {
    static Cache* const cache = new Cache;
    return *cache;
  }

  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    size_t best = kept_.size();
    for (size_t i = 0; i < kept_.size(); ++i)
      if (kept_[i].bytes >= bytes && kept_[i].bytes <= bytes + bytes / 4 &&
          (best == kept_.size() || kept_[i].bytes < kept_[best].bytes))
        best = i;
    if (best == kept_.size()) return nullptr;
    void* const p = kept_[best].p;
    total_ -= kept_[best].bytes;
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(best));
    return p;
  }

  void keep(Block block) noexcept {
    const std::lock_guard lock(mutex_);
    try {
      kept_.push_back(block);
    } catch (...) {
      return std::free(block.p);
    }
    total_ += block.bytes;
    shrink(limit_);
  }

  void empty() noexcept {
    const std::lock_guard lock(mutex_);
    shrink(0);
  }

 private:
  Cache() {
#if defined(__unix__)
    // A child must not inherit a lock that another thread holds.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
#endif
  }

  void shrink(size_t to) noexcept {
    size_t gone = 0;
    for (; total_ > to; ++gone) {
      std::free(kept_[gone].p);
      total_ -= kept_[gone].bytes;
    }
    kept_.erase(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(gone));
  }

  std::mutex mutex_;
  std::vector<Block> kept_;
  size_t total_ = 0;
  const size_t limit_ = limit();
};

}  // namespace

void* acquire(size_t bytes) {
  static const bool poison = poisons();
#if defined(LLMKERN_SANITIZE)
  before_acquire();
#endif
  // So much that rounding it up would give little.
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  const size_t size = whole(bytes);
  void* p = size < kLargeBytes ? nullptr : Cache::instance().take(size);
  if (!p) p = allocate(size);
  mark(p, size, size);
  // All bits set are NaN in every format.
  if (poison) std::memset(p, 0xff, size);
  mark(p, bytes, size);
  return p;
}

void release(void* p, size_t bytes) noexcept {
  const size_t size = whole(bytes);
  mark(p, 0, size);
  size < kLargeBytes ? std::free(p) : Cache::instance().keep({.p = p, .bytes = size});
}

void check_memory_settings() {
  limit();
  poisons();
}

void empty_cache() noexcept { Cache::instance().empty(); }

}  // namespace llmkern::cpu
