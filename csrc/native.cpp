// `_native`: what the build and the machine are, and the core's kernels on NumPy arrays.
#include <omp.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/embedding.h"
#include "core/gemm.h"
#include "core/isa.h"

namespace py = pybind11;
using namespace llmkern;

namespace {

// NumPy has no bfloat16: uint16 arrays carry its bits.
DType dtype_of(const py::array& x) {
  const char kind = x.dtype().kind();
  const auto size = x.itemsize();
  if (kind == 'u' && size == 2) return DType::bf16;
  if (kind == 'f' && size == 2) return DType::f16;
  if (kind == 'f' && size == 8) return DType::f64;
  if (kind == 'f' && size == 4) return DType::f32;
  throw std::invalid_argument("expected float32, float64, float16, or uint16 with the bits of bfloat16");
}

cpu::Matrix matrix_of(const py::array& x) {
  const auto size = x.itemsize();
  const bool rows = x.strides(1) == size || x.shape(1) <= 1;
  if (!rows && x.strides(0) != size && x.shape(0) > 1) throw std::invalid_argument("expected a contiguous row or column");
  return {x.data(), dtype_of(x), x.strides(rows ? 0 : 1) / size, !rows};
}

void gemm(const py::array& a, const py::array& b, py::array c, bool accumulate) {
  const cpu::Matrix A = matrix_of(a), B = matrix_of(b);
  const int64_t M = a.shape(0), N = b.shape(1), K = a.shape(1), ldc = c.strides(0) / c.itemsize();
  void* out = c.mutable_data();
  const DType dtype = dtype_of(c);
  const py::gil_scoped_release release;
  cpu::gemm(M, N, K, A, B, out, dtype, ldc, accumulate);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "llmkern's native core: instruction set, build facts, threads, probes, NumPy entry points.";
  m.def("isa", [] { return llmkern::cpu::isa_name(llmkern::cpu::selected_isa()); },
        "The instruction set that was selected for this process.");
  m.def("gemm", &gemm);
}
