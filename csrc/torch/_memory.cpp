#include <cstdint>

#include "core/isa.h"
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

void check_settings() {
  cpu::selected_isa();
  cpu::check_memory_settings();
}

std::string listed(const torch::headeronly::IntHeaderOnlyArrayRef& numbers) {
  std::string text;
  for (int64_t n : numbers) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

}  // namespace

void throw_storage_error(const Tensor& t, int64_t storage_bytes) {
  if (storage_bytes == 0)
    throw std::runtime_error(
        "The tensor has a non-zero number of elements, but its data is not allocated yet.\n"
        "If you're using torch.compile/export/fx, it is likely that we are erroneously tracing into a custom kernel. "
        "To "
        "fix this, please wrap the custom kernel into an opaque custom op. Please see the following for details: "
        "https://pytorch.org/tutorials/advanced/custom_ops_landing_page.html\n"
        "If you're using Caffe2, Caffe2 uses a lazy allocation, so you will need to call mutable_data() or "
        "raw_mutable_data() to actually allocate memory.");
  const auto text = [](auto n) { return std::to_string(n); };
  throw std::runtime_error("setStorage: sizes " + listed(t.sizes()) + ", strides " + listed(t.strides()) +
                           ", storage offset " + text(t.storage_offset()) + ", and itemsize " + text(t.element_size()) +
                           " requiring a storage size of " +
                           text((t.storage_offset() + t.numel()) * static_cast<int64_t>(t.element_size())) +
                           " are out of bounds for storage of size " + text(storage_bytes));
}

Tensor empty(const Tensor& self, const std::vector<int64_t>& sizes, std::optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(self.scalar_type());
  const size_t item = type == ScalarType::Long ? sizeof(int64_t) : itemsize(dtype_of(type));
  size_t bytes = item;
  for (int64_t n : sizes)
    require(n >= 0 && !__builtin_mul_overflow(bytes, static_cast<size_t>(n), &bytes),
            "expected sizes that are not negative, and whose product is a number of bytes");
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

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern_cpu, m) {
  m.def("empty_cache() -> ()");
  m.def("check_settings() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
  m.impl("check_settings", TORCH_BOX(&check_settings));
}

}  // namespace llmkern
