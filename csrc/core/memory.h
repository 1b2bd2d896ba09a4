// Fresh pages are dear on CPUs: a first touch of 4 KiB pages runs at about 1 GB/s, of 2 MiB pages at memory speed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmkern::cpu {

// Asks the kernel to back [p, p + bytes) with huge pages. A hint: nothing is promised, nothing can fail.
inline void advise_huge_pages(void* p, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

// Scratch of n elements of a trivial type, aligned to a cache line, uninitialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n) {
    const size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
    if (!data_) throw std::bad_alloc();
    advise_huge_pages(data_.get(), bytes);
  }
  T* get() const { return data_.get(); }
  T& operator[](size_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace llmkern::cpu
