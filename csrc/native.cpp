// `_native`: what the build and the machine are, and the core's kernels on NumPy arrays.
#include <omp.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/embedding.h"
#include "core/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "llmkern's native core: instruction set, build facts, threads, probes, NumPy entry points.";
  m.def("isa", [] { return llmkern::cpu::isa_name(llmkern::cpu::selected_isa()); },
        "The instruction set that was selected for this process.");
}
