#include "core/bag_gradient.h"
#include "torch/table_gradient.h"

namespace llmkern {
namespace {

// The bags of a arguments, and their starts.
struct BagArguments {
  cpu::Buffer<int64_t> starts;
  cpu::Bags bags;

  BagArguments(const Tensor& indices, const std::optional<Tensor>& offsets, int64_t num_bags, bool include_last_offset,
               int64_t padding_idx)
      : starts(checked(num_bags) + 1) {
    require(indices.dim() == 1, "embedding_bag: expected indices (N)");
    const int64_t N = indices.numel();
    if (offsets)
      require(offsets->dim() == 1 && offsets->numel() == num_bags + include_last_offset,
              "embedding_bag: expected offsets (B), or with include_last_offset (B + 1)");
    else
      require(num_bags > 0 ? N % num_bags == 0 : N == 0, "embedding_bag: expected bags of equal length");
    cpu::bag_starts(offsets ? indices_of(*offsets, "offsets") : cpu::Indices{.data = nullptr, .is_int64 = true}, N,
                    num_bags, offsets && include_last_offset, starts.get());
    bags = {.indices = indices_of(indices, "indices"),
            .N = N,
            .B = num_bags,
            .starts = starts.get(),
            .padding_idx = padding_idx};
  }
  static int64_t checked(int64_t num_bags) {
    require(num_bags >= 0 && num_bags < INT32_MAX, "embedding_bag: expected between 0 and 2^31 - 2 bags");
    return num_bags;
  }
};

const void* samples_of(const std::optional<Tensor>& samples, const Tensor& indices, const Tensor& like) {
  if (!samples) return nullptr;
  require_contiguous(*samples, "per_sample_weights");
  require(samples->dim() == 1 && samples->numel() == indices.numel() && samples->scalar_type() == like.scalar_type(),
          "embedding_bag: expected per_sample_weights (N) of the dtype of weight");
  return samples->const_data_ptr();
}

void check_rows(const Tensor& x, const char* name) {
  require_contiguous(x, name);
  require(x.dim() == 2, std::string("embedding_bag: expected ") + name + " of two dimensions");
}

cpu::BagTable table_of(const Tensor& weight, const void* samples) {
  check_rows(weight, "weight");
  return {.weight = weight.const_data_ptr(),
          .samples = samples,
          .dtype = dtype_of(weight),
          .V = weight.size(0),
          .D = weight.size(1)};
}

Tensor embedding_bag_forward(const Tensor& weight, std::optional<Tensor> samples, const Tensor& indices,
                             std::optional<Tensor> offsets, int64_t num_bags, bool mean, bool include_last_offset,
                             int64_t padding_idx) {
  const cpu::BagTable table = table_of(weight, samples_of(samples, indices, weight));
  const BagArguments arguments(indices, offsets, num_bags, include_last_offset, padding_idx);
  Tensor out = empty(weight, {num_bags, table.D});
  cpu::embedding_bag_forward(table, arguments.bags, mean, out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor> embedding_bag_max_forward(const Tensor& weight, const Tensor& indices,
                                                     std::optional<Tensor> offsets, int64_t num_bags,
                                                     bool include_last_offset, int64_t padding_idx) {
  const cpu::BagTable table = table_of(weight, nullptr);
  const BagArguments arguments(indices, offsets, num_bags, include_last_offset, padding_idx);
  Tensor out = empty(weight, {num_bags, table.D});
  Tensor largest = torch::stable::new_empty(weight, {num_bags, table.D}, ScalarType::Int);
  cpu::embedding_bag_max_forward(table, arguments.bags, out.mutable_data_ptr(),
                                 static_cast<int32_t*>(largest.mutable_data_ptr()));
  return {out, largest};
}

cpu::BagGradient gradient_of(const Tensor& dout, const std::optional<Tensor>& samples, const cpu::Bags& bags,
                             const Tensor& indices, const std::optional<Tensor>& largest, int64_t num_weights,
                             bool mean) {
  require(num_weights >= 0, "embedding_bag: expected num_weights that is not negative");
  const void* const factors = samples_of(samples, indices, dout);
  const cpu::BagTable table{
      .weight = nullptr, .samples = factors, .dtype = dtype_of(dout), .V = num_weights, .D = dout.size(1)};
  const int32_t* at = nullptr;
  if (largest) {
    check_rows(*largest, "largest");
    require(largest->scalar_type() == ScalarType::Int && largest->numel() == dout.numel(),
            "embedding_bag: expected largest (B, D), int32");
    at = static_cast<const int32_t*>(largest->const_data_ptr());
  }
  return cpu::BagGradient(table, bags, mean, dout.const_data_ptr(), at);
}

Tensor embedding_bag_backward(const Tensor& dout, std::optional<Tensor> samples, const Tensor& indices,
                              std::optional<Tensor> offsets, std::optional<Tensor> largest, int64_t num_weights,
                              bool mean, bool include_last_offset, int64_t padding_idx, bool scale_grad_by_freq) {
  check_rows(dout, "dout");
  const BagArguments arguments(indices, offsets, dout.size(0), include_last_offset, padding_idx);
  const cpu::BagGradient gradient = gradient_of(dout, samples, arguments.bags, indices, largest, num_weights, mean);
  return dense_gradient(dout, gradient.terms(), gradient.order(), num_weights, padding_idx, scale_grad_by_freq);
}

std::tuple<Tensor, Tensor> embedding_bag_sparse_backward(const Tensor& dout, std::optional<Tensor> samples,
                                                         const Tensor& indices, std::optional<Tensor> offsets,
                                                         int64_t num_weights, bool mean, bool include_last_offset,
                                                         int64_t padding_idx) {
  check_rows(dout, "dout");
  const BagArguments arguments(indices, offsets, dout.size(0), include_last_offset, padding_idx);
  const cpu::BagGradient gradient =
      gradient_of(dout, samples, arguments.bags, indices, std::nullopt, num_weights, mean);
  return row_gradient(dout, gradient.terms(), gradient.order(), padding_idx);
}

Tensor embedding_bag_samples_backward(const Tensor& dout, const Tensor& weight, const Tensor& indices,
                                      std::optional<Tensor> offsets, bool mean, bool include_last_offset,
                                      int64_t padding_idx) {
  check_rows(dout, "dout");
  const cpu::BagTable table = table_of(weight, nullptr);
  require(dout.scalar_type() == weight.scalar_type() && dout.size(1) == table.D,
          "embedding_bag: expected dout (B, D) like weight (V, D)");
  const BagArguments arguments(indices, offsets, dout.size(0), include_last_offset, padding_idx);
  Tensor dsamples = empty(dout, {indices.numel()});
  cpu::embedding_bag_samples_backward(table, arguments.bags, mean, dout.const_data_ptr(), dsamples.mutable_data_ptr());
  return dsamples;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern_cpu, m) {
  m.def(
      "embedding_bag_sparse_backward(Tensor dout, Tensor? samples, Tensor indices, Tensor? offsets, int num_weights,"
      " bool mean, bool include_last_offset, int padding_idx) -> (Tensor rows, Tensor values)");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern_cpu, CPU, m) {
  m.impl("embedding_bag_forward", TORCH_BOX(&embedding_bag_forward));
  m.impl("embedding_bag_max_forward", TORCH_BOX(&embedding_bag_max_forward));
  m.impl("embedding_bag_backward", TORCH_BOX(&embedding_bag_backward));
  m.impl("embedding_bag_sparse_backward", TORCH_BOX(&embedding_bag_sparse_backward));
  m.impl("embedding_bag_samples_backward", TORCH_BOX(&embedding_bag_samples_backward));
}

}  // namespace llmkern
