#include "gram_bindings.h"

#include <cstdint>
#include <vector>

#include "instruction_set.h"

namespace py = pybind11;
using namespace hyperfast;

namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// The tables of taps that a launch points to.
template <class Params, class Tap>
struct GramLaunch {
  Params params;
  std::vector<Tap> taps;

  const Params& ready() {
    params.taps = int64_t(taps.size());
    params.tap = taps.data();
    return params;
  }
};

template <class Params>
py::class_<GramLaunch<Params, GramTap>> bind_gram(py::module_& m, const char* name) {
  using Launch = GramLaunch<Params, GramTap>;
  return py::class_<Launch>(m, name)
      .def(py::init([](bool wide, int64_t batch, Address statistics, Address losses, Address coefficients,
                       Address student_statistics) {
             Launch launch;
             launch.params.wide = wide;
             launch.params.batch = batch;
             launch.params.statistics = pointer(statistics);
             launch.params.losses = pointer(losses);
             launch.params.coefficients = pointer(coefficients);
             launch.params.student_statistics = pointer(student_statistics);
             return launch;
           }),
           py::kw_only(), py::arg("wide"), py::arg("batch"), py::arg("statistics") = 0, py::arg("losses") = 0,
           py::arg("coefficients") = 0, py::arg("student_statistics") = 0)
      .def(
          "add_tap",
          [](Launch& launch, Address student, int64_t student_size, int student_dtype, Address teacher,
             int64_t teacher_size, int teacher_dtype) {
            launch.taps.push_back({{pointer(student), student_size, DType(student_dtype)},
                                   {pointer(teacher), teacher_size, DType(teacher_dtype)}});
          },
          py::kw_only(), py::arg("student"), py::arg("student_size"), py::arg("student_dtype"), py::arg("teacher") = 0,
          py::arg("teacher_size") = 0, py::arg("teacher_dtype") = 0);
}

struct FlowLaunch {
  FlowParams params;
  std::vector<FlowMap> maps;
  std::vector<FlowPair> pairs;

  const FlowParams& ready() {
    params.maps = int64_t(maps.size());
    params.map = maps.data();
    params.pairs = int64_t(pairs.size());
    params.pair = pairs.data();
    return params;
  }
};

}  // namespace

void bind_gram_losses(py::module_& m) {
  bind_gram<SimilarityParams>(m, "SimilarityParams");
  bind_gram<RelationalParams>(m, "RelationalParams")
      .def(
          "set_weights",
          [](GramLaunch<RelationalParams, GramTap>& launch, double distance, double angle) {
            launch.params.distance = distance;
            launch.params.angle = angle;
          },
          py::arg("distance"), py::arg("angle"));

  using GradientLaunch = GramLaunch<GramGradientParams, GramGradientTap>;
  py::class_<GradientLaunch>(m, "GramGradientParams")
      .def(py::init([](bool wide, bool centred, bool stream, int64_t batch, Address coefficients, Address grad) {
             GradientLaunch launch;
             launch.params.wide = wide;
             launch.params.centred = centred;
             launch.params.stream = stream;
             launch.params.batch = batch;
             launch.params.coefficients = pointer(coefficients);
             launch.params.grad = pointer(grad);
             return launch;
           }),
           py::kw_only(), py::arg("wide"), py::arg("centred"), py::arg("stream"), py::arg("batch"),
           py::arg("coefficients"), py::arg("grad"))
      .def(
          "add_tap",
          [](GradientLaunch& launch, Address student, int64_t student_size, int student_dtype, Address gradient) {
            launch.taps.push_back({{pointer(student), student_size, DType(student_dtype)}, pointer(gradient)});
          },
          py::kw_only(), py::arg("student"), py::arg("student_size"), py::arg("student_dtype"), py::arg("gradient"));

  py::class_<FlowLaunch>(m, "FlowParams")
      .def(py::init([](int dtype, int64_t batch) {
             FlowLaunch launch;
             launch.params.dtype = DType(dtype);
             launch.params.batch = batch;
             return launch;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("batch"))
      .def(
          "add_map",
          [](FlowLaunch& launch, int64_t channels, Address student, int64_t student_positions, Address teacher,
             int64_t teacher_positions, Address d_student) {
            launch.maps.push_back({pointer(student), pointer(teacher), pointer(d_student), channels, student_positions,
                                   teacher_positions});
          },
          py::kw_only(), py::arg("channels"), py::arg("student"), py::arg("student_positions"), py::arg("teacher") = 0,
          py::arg("teacher_positions") = 0, py::arg("d_student") = 0)
      .def(
          "add_pair",
          [](FlowLaunch& launch, int64_t first, int64_t second, Address statistics, Address differences) {
            launch.pairs.push_back({first, second, pointer(statistics), pointer(differences)});
          },
          py::kw_only(), py::arg("first"), py::arg("second"), py::arg("statistics") = 0, py::arg("differences") = 0)
      .def(
          "set_forward",
          [](FlowLaunch& launch, bool sum, bool normalize, Address losses, Address scales) {
            launch.params.sum = sum;
            launch.params.normalize = normalize;
            launch.params.losses = pointer(losses);
            launch.params.scales = pointer(scales);
          },
          py::arg("sum"), py::arg("normalize"), py::arg("losses"), py::arg("scales"))
      .def(
          "set_backward",
          [](FlowLaunch& launch, Address grad, Address scales) {
            launch.params.grad = pointer(grad);
            launch.params.scales = pointer(scales);
          },
          py::arg("grad"), py::arg("scales"));

  const auto release_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "gram_backward_cpu",
      [](GradientLaunch& launch, int threads) { cpu_kernels().gram_backward(launch.ready(), threads); },
      py::arg("params"), py::arg("threads"), release_gil);
  m.def(
      "similarity_preserving_cpu",
      [](GramLaunch<SimilarityParams, GramTap>& launch, int threads) {
        cpu_kernels().similarity_preserving(launch.ready(), threads);
      },
      py::arg("params"), py::arg("threads"), release_gil);
  m.def(
      "relational_distance_angle_cpu",
      [](GramLaunch<RelationalParams, GramTap>& launch, int threads) {
        cpu_kernels().relational_distance_angle(launch.ready(), threads);
      },
      py::arg("params"), py::arg("threads"), release_gil);
  m.def(
      "flow_of_solution_cpu",
      [](FlowLaunch& launch, int threads) { cpu_kernels().flow_of_solution(launch.ready(), threads); },
      py::arg("params"), py::arg("threads"), release_gil);
}
