#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of hyperfast. Tensors come as addresses, streams as handles.";
  m.attr("with_cuda") = bool(HYPERFAST_WITH_CUDA);
  m.attr("cuda_archs") = HYPERFAST_WITH_CUDA ? HYPERFAST_CUDA_ARCHS : "";
}
