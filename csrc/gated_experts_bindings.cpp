// The mixture of experts: its table, its launch.
#include "bindings.h"
#include "instruction_set.h"

namespace py = pybind11;

namespace hyperfast {

void bind_gated_experts(py::module_& m) {
  py::class_<GatedExpertsParams>(m, "GatedExpertsParams")
      .def(py::init([](int dtype, int64_t batch, int64_t heads, int64_t outputs, int64_t rank, int64_t positions,
                       int64_t gate_width, Address z, Address experts, Address bias, Address gate_weight,
                       Address gate_bias, Address gate_input, Address output, Address gates) {
             GatedExpertsParams p;
             p.dtype = DType(dtype);
             p.batch = batch;
             p.heads = heads;
             p.outputs = outputs;
             p.rank = rank;
             p.positions = positions;
             p.gate_width = gate_width;
             p.z = pointer(z);
             p.experts = pointer(experts);
             p.bias = pointer(bias);
             p.gate_weight = pointer(gate_weight);
             p.gate_bias = pointer(gate_bias);
             p.gate_input = pointer(gate_input);
             p.output = pointer(output);
             p.gates = pointer(gates);
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("batch"), py::arg("heads"), py::arg("outputs"), py::arg("rank"),
           py::arg("positions"), py::arg("gate_width"), py::arg("z"), py::arg("experts"), py::arg("bias"),
           py::arg("gate_weight"), py::arg("gate_bias"), py::arg("gate_input"), py::arg("output"), py::arg("gates"))
      .def(
          "set_backward",
          [](GatedExpertsParams& p, Address d_output, Address d_gates, Address d_z, Address d_experts, Address d_bias,
             Address d_gate_weight, Address d_gate_bias, Address d_gate_input) {
            p.d_output = pointer(d_output);
            p.d_gates = pointer(d_gates);
            p.d_z = pointer(d_z);
            p.d_experts = pointer(d_experts);
            p.d_bias = pointer(d_bias);
            p.d_gate_weight = pointer(d_gate_weight);
            p.d_gate_bias = pointer(d_gate_bias);
            p.d_gate_input = pointer(d_gate_input);
          },
          py::kw_only(), py::arg("d_output"), py::arg("d_gates"), py::arg("d_z"), py::arg("d_experts"),
          py::arg("d_bias"), py::arg("d_gate_weight"), py::arg("d_gate_bias"), py::arg("d_gate_input"));
  m.def(
      "gated_experts_cpu",
      [](const GatedExpertsParams& p, int threads) { cpu_kernels().gated_experts(p, threads); }, py::arg("params"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace hyperfast
