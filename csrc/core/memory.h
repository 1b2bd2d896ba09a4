// Memory for scratch and results. Fresh pages are dear on CPUs: a first touch of 4 KiB pages runs at about 1 GB/s, of
// 2 MiB pages at memory speed. So large blocks lie on huge pages, and are kept when they are given back: the next step
// of a training loop asks for the same sizes again. See memory.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace llmkern::cpu {

// From this size on blocks are kept, and lie on huge pages.
inline constexpr size_t kLargeBytes = size_t{1} << 20;

// At least `bytes`, aligned to a cache line, uninitialised. Throws std::bad_alloc.
void* acquire(size_t bytes);
// What acquire(bytes) gave.
void release(void* p, size_t bytes) noexcept;
// Throws std::invalid_argument if an environment variable does not say what this file may take it to say.
void check_memory_settings();
// Gives all kept memory back to the system.
void empty_cache() noexcept;

// Scratch of n elements of a trivial type.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n)
      : bytes_(n > SIZE_MAX / sizeof(T) ? SIZE_MAX : n * sizeof(T)), data_(static_cast<T*>(acquire(bytes_))) {}
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (data_) release(data_, bytes_);
  }
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  size_t bytes_;
  T* data_;
};

}  // namespace llmkern::cpu
