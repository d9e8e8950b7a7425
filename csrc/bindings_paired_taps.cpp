// The losses over pairs of maps: their tables, their launches.
#include "bindings.h"
#include "common/paired_taps.h"
#include "instruction_set.h"

namespace py = pybind11;

namespace hyperfast {

namespace {

void add_tap(PairedParams& p, Address student, Address teacher, Address d_student, int64_t rows, int64_t length,
             int64_t channels, bool channels_last, double factor) {
  if (p.taps == kMaxTaps) throw std::invalid_argument("too many taps");
  PairedTap& tap = p.tap[p.taps++];
  tap.student = pointer(student);
  tap.teacher = pointer(teacher);
  tap.d_student = pointer(d_student);
  tap.rows = rows;
  tap.length = length;
  tap.channels = channels;
  tap.channels_last = channels_last;
  tap.factor = factor;
  tap.first_item = p.items;
  p.items += rows * items_of_row(p, tap);
}

template <class Params>
void bind_cpu(py::module_& m, const char* name, void (*CpuKernels::*kernel)(const Params&, int)) {
  m.def(
      name, [kernel](const Params& p, int threads) { (cpu_kernels().*kernel)(p, threads); }, py::arg("params"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

#if HYPERFAST_WITH_CUDA
template <class Params>
void bind_cuda(py::module_& m, const char* name, const char* (*kernel)(const Params&, void*, void*, int)) {
  m.def(
      name,
      [kernel](const Params& p, Address ticket, Address stream, int device) {
        check(kernel(p, pointer(ticket), pointer(stream), device));
      },
      py::arg("params"), py::arg("ticket"), py::arg("stream"), py::arg("device"));
}
#endif

}  // namespace

void bind_paired_taps(py::module_& m) {
  py::class_<PairedParams>(m, "PairedParams")
      .def("add_tap", &add_tap, py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("d_student"),
           py::arg("rows"), py::arg("length"), py::arg("channels"), py::arg("channels_last"), py::arg("factor"))
      .def(
          "set_losses",
          [](PairedParams& p, Address losses, Address measures, Address shares) {
            p.losses = pointer(losses);
            p.measures = pointer(measures);
            p.shares = pointer(shares);
          },
          py::arg("losses"), py::arg("measures"), py::arg("shares"))
      .def(
          "set_gradients",
          [](PairedParams& p, Address grad, bool stream) {
            p.grad = pointer(grad);
            p.stream = stream;
          },
          py::arg("grad"), py::arg("stream"))
      .def_readonly("items", &PairedParams::items);

  py::class_<ActivationBoundaryParams, PairedParams>(m, "ActivationBoundaryParams")
      .def(py::init([](int dtype, double margin, bool packed) {
             ActivationBoundaryParams p;
             p.dtype = DType(dtype);
             p.part = kPairedPart;
             p.margin = margin;
             p.packed = packed;
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("margin"), py::arg("packed"));
  py::class_<FitNetsParams, PairedParams>(m, "FitNetsParams")
      .def(py::init([](int dtype, bool normalize) {
             FitNetsParams p;
             p.dtype = DType(dtype);
             p.part = kPairedPart;
             p.normalize = normalize;
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("normalize"));
  py::class_<UnitDistanceParams, PairedParams>(m, "UnitDistanceParams")
      .def(py::init([](int dtype, int power, double eps, bool added) {
             UnitDistanceParams p;
             p.dtype = DType(dtype);
             p.power = power;
             p.eps = eps;
             p.added = added;
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("power"), py::arg("eps"), py::arg("added"));

  py::class_<ChannelWiseDistillationParams, PairedParams>(m, "ChannelWiseDistillationParams")
      .def(py::init([](int dtype, double temperature) {
             ChannelWiseDistillationParams p;
             p.dtype = DType(dtype);
             p.temperature = temperature;
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("temperature"));

  bind_cpu(m, "activation_boundary_cpu", &CpuKernels::activation_boundary);
  bind_cpu(m, "channel_wise_distillation_cpu", &CpuKernels::channel_wise_distillation);
  bind_cpu(m, "fitnets_cpu", &CpuKernels::fitnets);
  bind_cpu(m, "unit_distance_cpu", &CpuKernels::unit_distance);
#if HYPERFAST_WITH_CUDA
  bind_cuda(m, "activation_boundary_cuda", &activation_boundary_cuda);
  bind_cuda(m, "channel_wise_distillation_cuda", &channel_wise_distillation_cuda);
  bind_cuda(m, "fitnets_cuda", &fitnets_cuda);
  bind_cuda(m, "unit_distance_cuda", &unit_distance_cuda);
#endif
}

}  // namespace hyperfast
