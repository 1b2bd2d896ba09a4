// Row numbers as torch gives them.
#pragma once
#include <cstdint>

namespace llmkern::cpu {

struct Indices {
  const void* data;
  bool is_int64;  // else int32
  int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace llmkern::cpu
