// hyperfast._C: addresses as integers, launches without the GIL. Checks are Python's (hyperfast/ops/_native.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "bindings.h"
#include "common/generate.h"
#include "common/ranger_update.h"
#include "gram_bindings.h"
#include "host_memory.h"
#include "instruction_set.h"

namespace py = pybind11;
using namespace hyperfast;

namespace {

// Memory that a tensor holds on to; it goes back to the pool when the tensor's storage is freed.
class HostBuffer {
 public:
  explicit HostBuffer(size_t bytes) : block_(take_host_block(bytes)), bytes_(bytes) {}
  ~HostBuffer() { return_host_block(block_); }
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  py::buffer_info info() {
    return {block_.data, 1, py::format_descriptor<uint8_t>::format(), 1, {py::ssize_t(bytes_)}, {py::ssize_t(1)}};
  }

 private:
  HostBlock block_;
  size_t bytes_;
};

GenerateParams generate_params(int dtype, int encoding, int activation, double negative_slope, int64_t batch,
                               int64_t segments, int64_t condition_size, int64_t rows, int64_t hidden,
                               const std::vector<int64_t>& widths, const std::vector<Address>& weights,
                               const std::vector<Address>& biases, Address condition, Address head, Address offsets,
                               int64_t chunk) {
  if (widths.size() > size_t(kMaxLayers)) throw std::invalid_argument("too many trunk layers");
  GenerateParams p;
  p.dtype = DType(dtype);
  p.encoding = Encoding(encoding);
  p.activation = Activation(activation);
  p.negative_slope = negative_slope;
  p.batch = batch;
  p.segments = segments;
  p.condition_size = condition_size;
  p.rows = rows;
  p.hidden = hidden;
  p.layers = int(widths.size());
  for (int layer = 0; layer < p.layers; ++layer) {
    p.widths[layer] = widths[layer];
    p.weight[layer] = pointer(weights[layer]);
    p.bias[layer] = pointer(biases[layer]);
  }
  p.condition = pointer(condition);
  p.head = pointer(head);
  p.offsets = static_cast<const int64_t*>(pointer(offsets));
  p.chunk = chunk;
  return p;
}

struct GreedyChainLaunch {
  Similarity similarity = Similarity::kProduct;
  std::vector<GreedyChains> jobs;
};

PredictParams predict_params(int dtype, bool round, bool concat, double slope, const std::vector<Address>& embeddings,
                             const std::vector<int64_t>& table_rows, const std::vector<int64_t>& table_widths,
                             const std::vector<Address>& weights, const std::vector<Address>& biases, int64_t hidden,
                             int64_t outputs, Address indices, bool long_indices, int64_t kernels, Address rows,
                             int64_t count) {
  if (embeddings.size() > size_t(kMaxTables)) throw std::invalid_argument("too many embeddings");
  if (weights.size() > size_t(kMaxPredictLayers)) throw std::invalid_argument("too many layers");
  PredictParams p;
  p.dtype = DType(dtype);
  p.round = round;
  p.concat = concat;
  p.slope = slope;
  p.tables = int(embeddings.size());
  for (int j = 0; j < p.tables; ++j) {
    p.embedding[j] = pointer(embeddings[j]);
    p.table_rows[j] = table_rows[j];
    p.table_width[j] = table_widths[j];
  }
  p.layers = int(weights.size());
  for (int layer = 0; layer < p.layers; ++layer) {
    p.weight[layer] = pointer(weights[layer]);
    p.bias[layer] = pointer(biases[layer]);
  }
  p.hidden = hidden;
  p.outputs = outputs;
  p.indices = pointer(indices);
  p.long_indices = long_indices;
  p.kernels = kernels;
  p.rows = static_cast<const int64_t*>(pointer(rows));
  p.count = count;
  return p;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of hyperfast. Tensors come as addresses, streams as handles.";
  m.attr("with_cuda") = bool(HYPERFAST_WITH_CUDA);
  m.attr("cuda_archs") = HYPERFAST_WITH_CUDA ? HYPERFAST_CUDA_ARCHS : "";
  m.attr("max_layers") = kMaxLayers;
  m.attr("max_taps") = kMaxTaps;
  m.attr("max_tables") = kMaxTables;
  m.attr("max_predict_layers") = kMaxPredictLayers;
  m.attr("max_ranger_tensors") = kMaxRangerTensors;
  m.def("instruction_set", [] { return cpu_kernels().instruction_set; });

  py::class_<HostBuffer>(m, "HostBuffer", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer(&HostBuffer::info);
  m.def("idle_host_bytes", &idle_host_bytes);
  m.def("release_idle_host_blocks", &release_idle_host_blocks);

  py::class_<GenerateParams>(m, "GenerateParams")
      .def(py::init(&generate_params), py::kw_only(), py::arg("dtype"), py::arg("encoding"), py::arg("activation"),
           py::arg("negative_slope"), py::arg("batch"), py::arg("segments"), py::arg("condition_size"),
           py::arg("rows"), py::arg("hidden"), py::arg("widths"), py::arg("weights"), py::arg("biases"),
           py::arg("condition"), py::arg("head"), py::arg("offsets"), py::arg("chunk"))
      .def("set_forward",
           [](GenerateParams& p, Address theta0, Address theta) {
             p.theta0 = pointer(theta0);
             p.theta = pointer(theta);
           },
           py::arg("theta0"), py::arg("theta"))
      .def("set_backward",
           [](GenerateParams& p, Address grad, Address d_condition, Address d_trunk, Address d_head,
              Address workspace) {
             p.grad = pointer(grad);
             p.d_condition = pointer(d_condition);
             p.d_trunk = pointer(d_trunk);
             p.d_head = pointer(d_head);
             p.workspace = pointer(workspace);
           },
           py::arg("grad"), py::arg("d_condition"), py::arg("d_trunk"), py::arg("d_head"), py::arg("workspace"))
      .def_property_readonly("workspace_size", &generate_workspace_size);

  py::class_<AttentionParams>(m, "AttentionParams")
      .def(py::init([](int dtype, int mode, int power, double eps) {
             AttentionParams p;
             p.dtype = DType(dtype);
             p.mode = AttentionMode(mode);
             p.power = power;
             p.eps = eps;
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("mode"), py::arg("power"), py::arg("eps"))
      .def("add_tap",
           [](AttentionParams& p, int64_t batch, int64_t positions, Address student, int64_t student_channels,
              bool student_last, Address teacher, int64_t teacher_channels, bool teacher_last, Address d_student) {
             if (p.taps == kMaxTaps) throw std::invalid_argument("too many taps");
             AttentionTap& tap = p.tap[p.taps];
             tap.student = {pointer(student), student_channels, student_last};
             tap.teacher = {pointer(teacher), teacher_channels, teacher_last};
             tap.d_student = pointer(d_student);
             tap.batch = batch;
             tap.positions = positions;
             if (p.taps > 0) {
               const AttentionTap& last = p.tap[p.taps - 1];
               tap.first_item = last.first_item + last.batch;
               tap.first_coefficient = last.first_coefficient + last.batch * last.positions;
             }
             p.items += batch;
             p.max_positions = std::max(p.max_positions, positions);
             ++p.taps;
           },
           py::kw_only(), py::arg("batch"), py::arg("positions"), py::arg("student"), py::arg("student_channels"),
           py::arg("student_last"), py::arg("teacher") = 0, py::arg("teacher_channels") = 0,
           py::arg("teacher_last") = false, py::arg("d_student") = 0)
      .def("set_forward",
           [](AttentionParams& p, Address losses, Address sample_losses, Address coefficients) {
             p.losses = pointer(losses);
             p.sample_losses = pointer(sample_losses);
             p.coefficients = pointer(coefficients);
           },
           py::arg("losses"), py::arg("sample_losses"), py::arg("coefficients"))
      .def("set_backward",
           [](AttentionParams& p, Address grad, Address coefficients, bool stream) {
             p.grad = pointer(grad);
             p.coefficients = pointer(coefficients);
             p.stream = stream;
           },
           py::arg("grad"), py::arg("coefficients"), py::arg("stream"));

  py::class_<LogitParams>(m, "LogitParams")
      .def(py::init([](int dtype, int divergence, double temperature, double smoothing, int64_t rows, int64_t classes,
                       Address student, Address teacher, Address labels, int64_t ignored, Address statistics) {
             LogitParams p;
             p.dtype = DType(dtype);
             p.divergence = Divergence(divergence);
             p.temperature = temperature;
             p.smoothing = smoothing;
             p.rows = rows;
             p.classes = classes;
             p.student = pointer(student);
             p.teacher = pointer(teacher);
             p.labels = static_cast<const int64_t*>(pointer(labels));
             p.ignored = ignored;
             p.statistics = pointer(statistics);
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("divergence"), py::arg("temperature"), py::arg("smoothing"),
           py::arg("rows"), py::arg("classes"), py::arg("student"), py::arg("teacher"), py::arg("labels"),
           py::arg("ignored"), py::arg("statistics"))
      .def("set_forward",
           [](LogitParams& p, Address losses, Address shares) {
             p.losses = pointer(losses);
             p.shares = pointer(shares);
           },
           py::arg("losses"), py::arg("shares"))
      .def("set_backward",
           [](LogitParams& p, Address grad, Address d_student, bool stream) {
             p.grad = pointer(grad);
             p.d_student = pointer(d_student);
             p.stream = stream;
           },
           py::arg("grad"), py::arg("d_student"), py::arg("stream"));
  bind_paired_taps(m);
  bind_gated_experts(m);
  bind_sub_logits(m);

  py::class_<RankOneParams>(m, "RankOneParams")
      .def(py::init([](int dtype, int rule, double weight_decay, double step_size, double shrink, double keep_first,
                       double add_first, double keep_second, double add_second, double second_scale, double eps,
                       int64_t rows, int64_t hidden, int64_t segments, int64_t chunk, Address offsets, Address weight,
                       Address first, Address second, Address left, Address right) {
             RankOneParams p;
             p.dtype = DType(dtype);
             p.rule = UpdateRule(rule);
             p.weight_decay = weight_decay;
             p.step_size = step_size;
             p.shrink = shrink;
             p.keep_first = keep_first;
             p.add_first = add_first;
             p.keep_second = keep_second;
             p.add_second = add_second;
             p.second_scale = second_scale;
             p.eps = eps;
             p.rows = rows;
             p.hidden = hidden;
             p.segments = segments;
             p.chunk = chunk;
             p.offsets = static_cast<const int64_t*>(pointer(offsets));
             p.weight = pointer(weight);
             p.first = pointer(first);
             p.second = pointer(second);
             p.left = pointer(left);
             p.right = pointer(right);
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("rule"), py::arg("weight_decay"), py::arg("step_size"),
           py::arg("shrink") = 1.0, py::arg("keep_first") = 0.0, py::arg("add_first") = 0.0,
           py::arg("keep_second") = 0.0, py::arg("add_second") = 0.0, py::arg("second_scale") = 1.0,
           py::arg("eps") = 0.0, py::arg("rows"), py::arg("hidden"), py::arg("segments"), py::arg("chunk"),
           py::arg("offsets"), py::arg("weight"), py::arg("first") = 0, py::arg("second") = 0, py::arg("left"),
           py::arg("right"));
  py::class_<RangerParams>(m, "RangerParams")
      .def(py::init([](int dtype, double beta1, double beta2, double eps, double weight_decay, int64_t k, double alpha,
                       Address lr, bool lr_on_host) {
             RangerParams p;
             p.dtype = DType(dtype);
             p.beta1 = beta1;
             p.beta2 = beta2;
             p.eps = eps;
             p.weight_decay = weight_decay;
             p.k = k;
             p.alpha = alpha;
             const auto rate = static_cast<const double*>(pointer(lr));
             if (lr_on_host) p.lr_value = *rate; else p.lr = rate;
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("weight_decay"), py::arg("k"), py::arg("alpha"), py::arg("lr"), py::arg("lr_on_host"))
      .def("add_tensor",
           [](RangerParams& p, Address parameter, Address gradient, Address exp_avg, Address exp_avg_sq, Address slow,
              Address step, int64_t size, int64_t centralized_row) {
             if (p.tensors == kMaxRangerTensors) throw std::invalid_argument("too many tensors");
             RangerTensor& x = p.tensor[p.tensors++];
             x.parameter = pointer(parameter);
             x.gradient = pointer(gradient);
             x.exp_avg = pointer(exp_avg);
             x.exp_avg_sq = pointer(exp_avg_sq);
             x.slow = pointer(slow);
             x.step = static_cast<float*>(pointer(step));
             x.size = size;
             x.centralize = centralized_row > 0;
             x.length = x.centralize ? centralized_row : std::min(size, kRangerItem);
             x.first_item = p.items;
             p.items += ranger_items(x);
           },
           py::arg("parameter"), py::arg("gradient"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("slow"),
           py::arg("step"), py::arg("size"), py::arg("centralized_row"));

  py::class_<GreedyChainLaunch>(m, "GreedyChainParams")
      .def(py::init([](int similarity) {
             GreedyChainLaunch launch;
             launch.similarity = Similarity(similarity);
             return launch;
           }),
           py::kw_only(), py::arg("similarity"))
      .def("add",
           [](GreedyChainLaunch& launch, int64_t batch, int64_t count, int64_t dimension, Address vectors,
              Address order) {
             launch.jobs.push_back({static_cast<const float*>(pointer(vectors)),
                                    static_cast<int64_t*>(pointer(order)), batch, count, dimension});
           },
           py::kw_only(), py::arg("batch"), py::arg("count"), py::arg("dimension"), py::arg("vectors"),
           py::arg("order"));

  bind_gram_losses(m);

  py::class_<PredictParams>(m, "PredictParams")
      .def(py::init(&predict_params), py::kw_only(), py::arg("dtype"), py::arg("round"), py::arg("concat"),
           py::arg("slope"), py::arg("embeddings"), py::arg("table_rows"), py::arg("table_widths"), py::arg("weights"),
           py::arg("biases"), py::arg("hidden"), py::arg("outputs"), py::arg("indices"), py::arg("long_indices"),
           py::arg("kernels"), py::arg("rows"), py::arg("count"))
      .def("set_forward", [](PredictParams& p, Address predictions) { p.predictions = pointer(predictions); },
           py::arg("predictions"))
      .def("set_backward",
           [](PredictParams& p, Address grad, Address gradient) {
             p.grad = pointer(grad);
             p.gradient = pointer(gradient);
           },
           py::arg("grad"), py::arg("gradient"))
      .def("set_squared_error",
           [](PredictParams& p, Address targets, Address element_weights, Address loss, Address gradient) {
             p.targets = pointer(targets);
             p.element_weights = pointer(element_weights);
             p.loss = pointer(loss);
             p.gradient = pointer(gradient);
           },
           py::arg("targets"), py::arg("element_weights"), py::arg("loss"), py::arg("gradient"));

  const auto release_gil = py::call_guard<py::gil_scoped_release>();
  m.def("generate_forward_cpu", [](const GenerateParams& p, int threads) { cpu_kernels().generate_forward(p, threads); },
        py::arg("params"), py::arg("threads"), release_gil);
  m.def("generate_backward_cpu",
        [](const GenerateParams& p, int threads) { cpu_kernels().generate_backward(p, threads); }, py::arg("params"),
        py::arg("threads"), release_gil);
  m.def("attention_transfer_forward_cpu",
        [](const AttentionParams& p, int threads) { cpu_kernels().attention_transfer_forward(p, threads); },
        py::arg("params"), py::arg("threads"), release_gil);
  m.def("attention_transfer_backward_cpu",
        [](const AttentionParams& p, int threads) { cpu_kernels().attention_transfer_backward(p, threads); },
        py::arg("params"), py::arg("threads"), release_gil);
  m.def("cross_entropy_distillation_forward_cpu",
        [](const LogitParams& p, int threads) {
          if (!cpu_kernels().cross_entropy_distillation_forward(p, threads))
            throw std::out_of_range("a label of cross_entropy_distillation is none of the classes, nor ignore_index");
        },
        py::arg("params"), py::arg("threads"), release_gil);
  m.def("cross_entropy_distillation_backward_cpu",
        [](const LogitParams& p, int threads) { cpu_kernels().cross_entropy_distillation_backward(p, threads); },
        py::arg("params"), py::arg("threads"), release_gil);
  m.def("ranger_update_cpu", [](const RangerParams& p, int threads) { cpu_kernels().ranger_update(p, threads); },
        py::arg("params"), py::arg("threads"), release_gil);
  m.def("rank_one_update_cpu", [](const RankOneParams& p, int threads) { cpu_kernels().rank_one_update(p, threads); },
        py::arg("params"), py::arg("threads"), release_gil);
  m.def("greedy_chain_cpu",
        [](const GreedyChainLaunch& launch, int threads) {
          cpu_kernels().greedy_chain({launch.similarity, launch.jobs.data(), int64_t(launch.jobs.size())}, threads);
        },
        py::arg("params"), py::arg("threads"), release_gil);
  m.def("predict_cpu",
        [](const PredictParams& p, int threads) {
          if (!cpu_kernels().predict(p, threads))
            throw std::out_of_range("an index of predict is outside its embedding table, or a row outside indices");
        },
        py::arg("params"), py::arg("threads"), release_gil);

#if HYPERFAST_WITH_CUDA
  m.def("rank_one_update_cuda",
        [](const RankOneParams& p, Address stream, int device) {
          check(rank_one_update_cuda(p, pointer(stream), device));
        },
        py::arg("params"), py::arg("stream"), py::arg("device"));
  m.def("generate_forward_cuda",
        [](const GenerateParams& p, Address stream, int device) {
          check(generate_forward_cuda(p, pointer(stream), device));
        },
        py::arg("params"), py::arg("stream"), py::arg("device"));
  m.def("generate_backward_cuda",
        [](const GenerateParams& p, Address ticket, Address stream, int device) {
          check(generate_backward_cuda(p, pointer(ticket), pointer(stream), device));
        },
        py::arg("params"), py::arg("ticket"), py::arg("stream"), py::arg("device"));
  m.def("attention_transfer_forward_cuda",
        [](const AttentionParams& p, Address ticket, Address stream, int device) {
          check(attention_transfer_forward_cuda(p, pointer(ticket), pointer(stream), device));
        },
        py::arg("params"), py::arg("ticket"), py::arg("stream"), py::arg("device"));
  m.def("attention_transfer_backward_cuda",
        [](const AttentionParams& p, Address stream, int device) {
          check(attention_transfer_backward_cuda(p, pointer(stream), device));
        },
        py::arg("params"), py::arg("stream"), py::arg("device"));
  m.def("cross_entropy_distillation_forward_cuda",
        [](const LogitParams& p, Address ticket, Address stream, int device) {
          check(cross_entropy_distillation_forward_cuda(p, pointer(ticket), pointer(stream), device));
        },
        py::arg("params"), py::arg("ticket"), py::arg("stream"), py::arg("device"));
  m.def("cross_entropy_distillation_backward_cuda",
        [](const LogitParams& p, Address stream, int device) {
          check(cross_entropy_distillation_backward_cuda(p, pointer(stream), device));
        },
        py::arg("params"), py::arg("stream"), py::arg("device"));
  m.def("ranger_update_cuda",
        [](const RangerParams& p, Address ticket, Address stream, int device) {
          check(ranger_update_cuda(p, pointer(ticket), pointer(stream), device));
        },
        py::arg("params"), py::arg("ticket"), py::arg("stream"), py::arg("device"));
#endif
}
