// `_native`: what the build and the machine are, and the core's kernels on NumPy arrays.
//
// Arrays come from llmkern/numpy.py, which checks shapes and dtypes and speaks to the user; what memory
// safety depends on is checked again here.
#include <omp.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <map>
#include <string>
#include <vector>

#include "core/elementwise.h"
#include "core/embedding.h"
#include "core/gemm.h"
#include "core/isa.h"
#include "core/probe.h"
#include "core/rnn.h"
#include "core/row_optim.h"
#include "core/threads.h"

namespace py = pybind11;

namespace llmkern {
namespace {

// What set_num_threads was given last; 0: nothing yet.
std::atomic<int> chosen_threads{0};

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// NumPy has no bfloat16: uint16 carries its bits.
DType dtype_of(const py::array& x) {
  const char kind = x.dtype().kind();
  const auto size = x.itemsize();
  require((kind == 'f' && (size == 2 || size == 4 || size == 8)) || (kind == 'u' && size == 2),
          "expected float32, float64, float16, or uint16 with the bits of bfloat16");
  if (kind == 'u') return DType::bf16;
  if (size == 2) return DType::f16;
  return size == 4 ? DType::f32 : DType::f64;
}

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float64") return DType::f64;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  throw std::invalid_argument("unknown dtype '" + name + "'; expected float32, float64, float16 or bfloat16");
}

void require_contiguous(const py::array& x, int ndim) {
  require(x.ndim() == ndim, "wrong number of dimensions");
  require((x.flags() & py::array::c_style) != 0, "expected a C-contiguous array");
}

// --- products ---

cpu::Matrix matrix_of(const py::array& x) {
  require(x.ndim() == 2, "expected a matrix");
  const auto size = x.itemsize();
  const bool by_rows = x.strides(1) == size || x.shape(1) <= 1;
  const bool by_columns = x.strides(0) == size || x.shape(0) <= 1;
  require(by_rows || by_columns, "expected contiguous rows or contiguous columns");
  const auto stride = x.strides(by_rows ? 0 : 1);
  require(stride >= 0 && stride % size == 0, "expected a stride of whole elements, not negative");
  return {.data = x.data(), .dtype = dtype_of(x), .ld = stride / size, .transposed = !by_rows};
}

void gemm(const py::array& a, const py::array& b, py::array out, bool accumulate) {
  const cpu::Matrix A = matrix_of(a), B = matrix_of(b);
  require_contiguous(out, 2);
  const int64_t M = a.shape(0), N = b.shape(1), K = a.shape(1);
  require(b.shape(0) == K && out.shape(0) == M && out.shape(1) == N, "expected a (M, K), b (K, N) and out (M, N)");
  const DType dtype = dtype_of(out);
  void* const data = out.mutable_data();
  const py::gil_scoped_release release;
  cpu::gemm(M, N, K, A, B, {.data = data, .dtype = dtype, .ld = N}, accumulate);
}

// --- embedding ---

cpu::Indices indices_of(const py::array& x) {
  require_contiguous(x, 1);
  require(x.dtype().kind() == 'i' && (x.itemsize() == 4 || x.itemsize() == 8), "indices: expected int32 or int64");
  return {.data = x.data(), .is_int64 = x.itemsize() == 8};
}

py::array embedding_forward(const py::array& weight, const py::array& indices) {
  require_contiguous(weight, 2);
  const cpu::Indices at = indices_of(indices);
  const DType dtype = dtype_of(weight);
  const int64_t V = weight.shape(0), D = weight.shape(1), N = indices.shape(0);
  py::array out(weight.dtype(), std::vector<py::ssize_t>{N, D});
  const void* const from = weight.data();
  void* const to = out.mutable_data();
  {
    const py::gil_scoped_release release;
    cpu::embedding_forward(from, dtype, V, D, at, N, to);
  }
  return out;
}

py::array embedding_backward(const py::array& dout, const py::array& indices, int64_t num_weights, int64_t padding_idx,
                             bool scale_grad_by_freq) {
  require_contiguous(dout, 2);
  const cpu::Indices at = indices_of(indices);
  const DType dtype = dtype_of(dout);
  const int64_t N = dout.shape(0), D = dout.shape(1);
  require(indices.shape(0) == N, "expected dout (N, D) and indices (N)");
  require(num_weights >= 0, "num_weights: expected 0 or more");
  py::array dweight(dout.dtype(), std::vector<py::ssize_t>{num_weights, D});
  const void* const from = dout.data();
  void* const to = dweight.mutable_data();
  {
    const py::gil_scoped_release release;
    cpu::embedding_backward(from, dtype, num_weights, D, at, N, padding_idx, scale_grad_by_freq, to);
  }
  return dweight;
}

// --- for the tests ---

py::array elementwise(const std::string& name, const py::array& x) {
  require_contiguous(x, 1);
  static const std::map<std::string, cpu::Unary> functions{{"exp", cpu::Unary::exp},
                                                           {"exp_negative", cpu::Unary::exp_negative},
                                                           {"sigmoid", cpu::Unary::sigmoid},
                                                           {"tanh", cpu::Unary::tanh},
                                                           {"copy", cpu::Unary::copy}};
  const auto f = functions.find(name);
  require(f != functions.end(), "unknown function");
  py::array y(x.dtype(), std::vector<py::ssize_t>{x.shape(0)});
  LLMKERN_SELECT(elementwise).apply(f->second, x.data(), x.shape(0), dtype_of(x), y.mutable_data());
  return y;
}

// --- the machine ---

py::dict build_info() {
#define LLMKERN_NAME(isa, condition) #isa,
  const std::vector<std::string> isas{LLMKERN_ISAS(LLMKERN_NAME)};
#undef LLMKERN_NAME
  py::dict info;
  info["version"] = LLMKERN_VERSION;
  info["compiler"] = LLMKERN_COMPILER;
  info["isas"] = isas;
  info["isa"] = cpu::isa_name(cpu::selected_isa());
  return info;
}

// What llmkern/_facts.py says too.
py::dict facts() {
  using cpu::RnnMode;
  const std::map<std::string, RnnMode> modes = {{"lstm", RnnMode::lstm},
                                                {"gru", RnnMode::gru},
                                                {"rnn_tanh", RnnMode::rnn_tanh},
                                                {"rnn_relu", RnnMode::rnn_relu},
                                                {"slstm", RnnMode::slstm}};
  py::dict order, gates, cells, saved;
  for (const auto& [name, mode] : modes) {
    cpu::Rnn op{};
    op.mode = mode;
    op.H = 1;
    order[name.c_str()] = static_cast<int>(mode);
    gates[name.c_str()] = cpu::gates_of(mode);
    cells[name.c_str()] = cpu::cells_of(op);
    saved[name.c_str()] = cpu::saved_of(op);
  }
  py::dict result;
  result["order"] = order;
  result["gates"] = gates;
  result["cells"] = cells;
  result["saved_gates"] = saved;
  result["row_record"] = cpu::kRowRecordSize;
  return result;
}

double peak_bandwidth(const std::string& traffic, double seconds) {
  const bool read = traffic == "read", copy = traffic == "copy";
  if (!read && !copy && traffic != "stream")
    throw std::invalid_argument("unknown traffic '" + traffic + "'; expected read, copy or stream");
  const py::gil_scoped_release release;
  if (read) return cpu::peak_bandwidth(cpu::Traffic::read, seconds);
  return cpu::peak_bandwidth(copy ? cpu::Traffic::copy : cpu::Traffic::stream, seconds);
}

double peak_flops(const std::string& dtype, double seconds) {
  const DType type = dtype_named(dtype);
  const py::gil_scoped_release release;
  return cpu::peak_flops(type, seconds);
}

void set_num_threads(int n) {
  if (n < 1) throw std::invalid_argument("set_num_threads: got " + std::to_string(n) + ", expected 1 or more");
  chosen_threads = n;
  omp_set_num_threads(n);
}

}  // namespace

// OpenMP's number. A thread that comes here for the first time takes over what was set before, as torch's threads do.
int cpu::num_threads() {
  thread_local bool asked = false;
  if (const int chosen = chosen_threads; !std::exchange(asked, true) && chosen > 0) omp_set_num_threads(chosen);
  return omp_get_max_threads();
}

}  // namespace llmkern

PYBIND11_MODULE(_native, m) {
  using namespace llmkern;
  m.doc() = "llmkern's native core: instruction set, build facts, threads, probes, NumPy entry points.";
  m.def("isa", [] { return cpu::isa_name(cpu::selected_isa()); }, "The instruction set selected for this process.");
  m.def("build_info", &build_info, "Version, compiler, the instruction sets built and the one selected.");
  m.def("_facts", &facts, "What llmkern/_facts.py has to agree with.");
  m.def("num_threads", &cpu::num_threads, "Threads of the next parallel region of the calling thread.");
  m.def("set_num_threads", &set_num_threads, py::arg("n"), "The same as torch.set_num_threads, without torch.");
  m.def("peak_flops", &peak_flops, py::arg("dtype"), py::arg("seconds") = 0.2,
        "Measured GF/s of FMAs (bfloat16: dot products) on all threads. ValueError, with the reason, if the "
        "CPU has none.");
  m.def("peak_bandwidth", &peak_bandwidth, py::arg("traffic"), py::arg("seconds") = 0.2,
        "Measured GB/s on all threads: 'read', 'copy' (read and written bytes), or 'stream' (stores past the "
        "caches).");
  m.def("gemm", &gemm, py::arg("a"), py::arg("b"), py::arg("out"), py::arg("accumulate"));
  m.def("embedding_forward", &embedding_forward, py::arg("weight"), py::arg("indices"));
  m.def("embedding_backward", &embedding_backward, py::arg("dout"), py::arg("indices"), py::arg("num_weights"),
        py::arg("padding_idx"), py::arg("scale_grad_by_freq"));
  m.def("_elementwise", &elementwise, py::arg("name"), py::arg("x"));
}
