// Complementary distillation of logits: its table, its launches.
#include "bindings.h"
#include "instruction_set.h"

namespace py = pybind11;

namespace hyperfast {

void bind_sub_logits(py::module_& m) {
  py::class_<SubLogitParams>(m, "SubLogitParams")
      .def(py::init([](int dtype, bool detach, bool fused, bool mean, double temperature, double smoothing,
                       double lambda_s, double lambda_t, double theta, int64_t rows, int64_t stages, int64_t count,
                       int64_t classes, Address student, Address teacher, Address sub_logits, Address labels,
                       Address weights) {
             SubLogitParams p;
             p.dtype = DType(dtype);
             p.detach = detach;
             p.fused = fused;
             p.mean = mean;
             p.temperature = temperature;
             p.smoothing = smoothing;
             p.lambda_s = lambda_s;
             p.lambda_t = lambda_t;
             p.theta = theta;
             p.rows = rows;
             p.stages = stages;
             p.count = count;
             p.classes = classes;
             p.student = pointer(student);
             p.teacher = pointer(teacher);
             p.sub_logits = pointer(sub_logits);
             p.labels = static_cast<const int64_t*>(pointer(labels));
             p.weights = pointer(weights);
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("detach"), py::arg("fused"), py::arg("mean"),
           py::arg("temperature"), py::arg("smoothing"), py::arg("lambda_s"), py::arg("lambda_t"), py::arg("theta"),
           py::arg("rows"), py::arg("stages"), py::arg("count"), py::arg("classes"), py::arg("student"),
           py::arg("teacher"), py::arg("sub_logits"), py::arg("labels"), py::arg("weights"))
      .def(
          "set_results",
          [](SubLogitParams& p, Address total, Address components, Address shares, Address sums, Address d_student,
             Address d_sub_logits, bool stream) {
            p.total = pointer(total);
            p.components = pointer(components);
            p.shares = pointer(shares);
            p.sums = pointer(sums);
            p.d_student = pointer(d_student);
            p.d_sub_logits = pointer(d_sub_logits);
            p.stream = stream;
          },
          py::kw_only(), py::arg("total"), py::arg("components"), py::arg("shares"), py::arg("sums"),
          py::arg("d_student"), py::arg("d_sub_logits"), py::arg("stream"));
  m.def(
      "sub_logit_distillation_cpu",
      [](const SubLogitParams& p, int threads) {
        if (!cpu_kernels().sub_logit_distillation(p, threads))
          throw std::out_of_range("a label of sub_logit_distillation is none of the classes");
      },
      py::arg("params"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
#if HYPERFAST_WITH_CUDA
  m.def(
      "sub_logit_distillation_cuda",
      [](const SubLogitParams& p, Address ticket, Address stream, int device) {
        check(sub_logit_distillation_cuda(p, pointer(ticket), pointer(stream), device));
      },
      py::arg("params"), py::arg("ticket"), py::arg("stream"), py::arg("device"));
#endif
  m.attr("most_sub_logits") = kMostSubLogits;
}

}  // namespace hyperfast
