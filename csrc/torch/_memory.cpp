#include <cstdint>
#include <functional>
#include <numeric>

#include "core/memory.h"
#include "torch/tensor.h"

// From torch 2.11 on; weak, so that the library loads into 2.10, where large results lie in torch's own memory.
extern "C" AOTITorchError torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                          int64_t storage_offset, int32_t dtype, int32_t device_type,
                                          int32_t device_index, AtenTensorHandle* ret, int32_t layout,
                                          const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
                                          void (*deleter)(void* data, void* ctx), void* deleter_ctx)
    __attribute__((weak));

namespace llmkern {
namespace {

void empty_cache() { cpu::empty_cache(); }

}  // namespace

Tensor empty(const Tensor& self, const std::vector<int64_t>& sizes, std::optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(self.scalar_type());
  const size_t item = type == ScalarType::Long ? sizeof(int64_t) : itemsize(dtype_of(type));
  const size_t bytes = std::accumulate(sizes.begin(), sizes.end(), item, std::multiplies<>());
  if (bytes < cpu::kLargeBytes || !torch_from_blob) return torch::stable::new_empty(self, sizes, dtype);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * sizes[d];
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  void* const data = cpu::acquire(bytes);
  AtenTensorHandle handle = nullptr;
  const auto error = torch_from_blob(
      data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, code, aoti_torch_device_type_cpu(), -1,
      &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* p, void* size) { cpu::release(p, reinterpret_cast<size_t>(size)); }, reinterpret_cast<void*>(bytes));
  if (error != AOTI_TORCH_SUCCESS) {
    cpu::release(data, bytes);
    throw std::runtime_error("torch_from_blob failed");
  }
  return Tensor(handle);
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern_cpu, m) { m.def("empty_cache() -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CompositeExplicitAutograd, m) { m.impl("empty_cache", TORCH_BOX(&empty_cache)); }

}  // namespace llmkern
