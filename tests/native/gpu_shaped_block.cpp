// Runs the kernels' bodies on a Block shaped like a GPU's (several groups of lanes, vectors of four) and on the
// processor's own, and fails where they differ. What only a GPU has, concurrency, is not tested here.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "common/activation_boundary.h"
#include "common/attention_transfer.h"
#include "common/cross_entropy_distillation.h"
#include "common/channel_wise_distillation.h"
#include "common/fitnets.h"
#include "common/generate.h"
#include "common/rank_one_update.h"
#include "common/sub_logit_distillation.h"
#include "common/ranger_update.h"
#include "common/unit_distance.h"
#include "cpu/group.h"

using namespace hyperfast;
namespace native = hyperfast::HYPERFAST_ISA;

namespace {

constexpr int kGroups = 8, kWidth = 4;

struct GpuLanes : native::Lanes<float> {
  int64_t group = 0;
  int64_t index() const { return group; }

  // As in cuda/group.cuh: four at a time where the length allows it, else one.
  template <class F>
  void for_each(int64_t n, F f) const {
    if (n % kWidth == 0) {
      for (int64_t i = 0; i < n; i += kWidth) f(native::Positions<kWidth>{i});
    } else {
      for (int64_t i = 0; i < n; ++i) f(native::Positions<1>{i});
    }
  }
  template <int R, class F>
  void sums(int64_t n, float (&totals)[R], F f) const {
    for (int r = 0; r < R; ++r) totals[r] = 0;
    for_each(n, [&](auto i) {
      for (int r = 0; r < R; ++r) totals[r] += native::add_up<float, decltype(i)::width>(f(r, i));
    });
  }
  template <int R, class F>
  void accumulate(int64_t n, float (&totals)[R], F f) const {
    for (int r = 0; r < R; ++r) totals[r] = 0;
    for_each(n, [&](auto i) {
      f(i, [&](int r, auto v) { totals[r] += native::add_up<float, decltype(i)::width>(v); });
    });
  }
  template <class F>
  float sum(int64_t n, F f) const {
    float total[1];
    sums(n, total, [&](int, auto i) { return f(i); });
    return total[0];
  }
  template <class F>
  void for_each_padded(int64_t n, F f) const {
    for_each(n, f);
  }
  template <int R, class F>
  void add_padded(int64_t n, float (&totals)[R], F f) const {
    for (int r = 0; r < R; ++r) totals[r] = 0;
    for_each(n, [&](auto i) {
      constexpr int kAtOnce = decltype(i)::width;
      native::Vector<float, kAtOnce> part[R] = {};
      f(i, part);
      for (int r = 0; r < R; ++r) totals[r] += native::add_up<float, kAtOnce>(part[r]);
    });
  }
  template <class F>
  float maximum_padded(int64_t n, float most, F f) const {
    for (int64_t i = 0; i < n; ++i) most = std::max(most, f(native::Positions<1>{i}));
    return most;
  }
  template <class F>
  float largest(int64_t n, F f) const {
    float top = -INFINITY;
    for_each(n, [&](auto i) { top = std::max(top, native::largest_of<float, decltype(i)::width>(f(i))); });
    return top;
  }
};

struct GpuBlock {
  using Acc = float;
  static constexpr int kRowsAtOnce = 4, kChannelsAtOnce = 8, kShortRowsAtOnce = 1;
  static constexpr int64_t kKeptPositions = 0;
  template <class F>
  void for_each(int64_t n, F f) const {
    for (int64_t k = n - 1; k >= 0; --k) f(k);  // no body may rely on the order
  }
  template <class F>
  void partition(int64_t begin, int64_t end, F f) const {
    GpuLanes lanes;
    for (int64_t group = kGroups - 1; group >= 0; --group) {
      lanes.group = group;
      for (int64_t k = begin + group; k < end; k += kGroups) f(k, lanes);
    }
  }
  template <class F>
  float sum(int64_t n, F f) const {
    GpuLanes lanes;
    return lanes.sum(n, [&](auto i) { return f(i, lanes); });
  }
  template <class F>
  void once(F f) const { f(); }
  void sync() const {}
  int64_t lane_groups() const { return kGroups; }
};

std::mt19937 generator(0);

std::vector<float> draw(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count + 1);
  for (float& value : values) value = normal(generator);
  return values;
}

int failures = 0;

void compare(const char* what, const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 0;
  for (size_t k = 0; k < a.size(); ++k) {
    difference = std::max(difference, std::fabs(double(a[k]) - b[k]));
    size = std::max(size, std::fabs(double(b[k])));
    if (std::isnan(a[k]) != std::isnan(b[k])) difference = INFINITY;
  }
  const bool ok = difference <= 1e-4 * (size + 1e-6);
  if (!ok) ++failures;
  std::printf("%-40s %s (difference %g of %g)\n", what, ok ? "same" : "DIFFERENT", difference, size);
}

struct Generated {
  std::vector<float> theta, d_condition, d_trunk, d_head;
};

template <class Block>
Generated generate(GenerateParams p, int64_t trunk_size) {
  Block block;
  Generated out{std::vector<float>(p.batch * p.rows, NAN), std::vector<float>(p.batch * p.segments * p.condition_size, NAN),
                std::vector<float>(trunk_size + 1, 0.f), std::vector<float>(p.rows * p.hidden, NAN)};
  std::vector<float> workspace(generate_workspace_size(p), NAN);
  native::Scratch<float> scratch(p.batch * (trunk_floats(p) + block.lane_groups() * p.hidden));
  p.theta = out.theta.data();
  p.d_condition = out.d_condition.data();
  p.d_trunk = out.d_trunk.data();
  p.d_head = out.d_head.data();
  p.workspace = workspace.data();
  for (int64_t chunk = 0; chunk < chunk_count(p); ++chunk) generate_chunk<float>(block, p, chunk, scratch.data());
  for (int64_t chunk = 0; chunk < chunk_count(p); ++chunk) generate_backward_chunk<float>(block, p, chunk, scratch.data());
  generate_finish<float>(block, p);
  return out;
}

void test_generate(int64_t batch, std::vector<int64_t> offsets, std::vector<int64_t> widths, int64_t rows, int64_t chunk) {
  GenerateParams p;
  p.batch = batch;
  p.segments = offsets.empty() ? 1 : int64_t(offsets.size()) - 1;
  p.condition_size = 2;
  p.rows = rows;
  p.layers = int(widths.size());
  p.chunk = chunk;
  p.activation = Activation::kGelu;
  std::vector<std::vector<float>> parameters;
  int64_t in = 4, trunk_size = 0;
  for (int layer = 0; layer < p.layers; ++layer) {
    p.widths[layer] = widths[layer];
    parameters.push_back(draw(in * widths[layer]));
    parameters.push_back(draw(widths[layer]));
    trunk_size += (in + 1) * widths[layer];
    in = widths[layer];
  }
  for (int layer = 0; layer < p.layers; ++layer) {
    p.weight[layer] = parameters[2 * layer].data();
    p.bias[layer] = parameters[2 * layer + 1].data();
  }
  p.hidden = in;
  const auto condition = draw(batch * p.segments * 2), head = draw(rows * in), theta0 = draw(rows), grad = draw(batch * rows);
  p.condition = condition.data();
  p.head = head.data();
  p.theta0 = theta0.data();
  p.grad = grad.data();
  p.offsets = offsets.empty() ? nullptr : offsets.data();
  const Generated a = generate<GpuBlock>(p, trunk_size), b = generate<native::Block<float>>(p, trunk_size);
  compare("theta", a.theta, b.theta);
  compare("d_condition", a.d_condition, b.d_condition);
  compare("d_trunk", a.d_trunk, b.d_trunk);
  compare("d_head", a.d_head, b.d_head);
}

struct Attention {
  std::vector<float> losses, coefficients, gradient;
};

template <class Block>
Attention attend(AttentionParams p, int64_t positions, int64_t elements) {
  Block block;
  Attention out{std::vector<float>(p.taps, NAN), std::vector<float>(positions, NAN), std::vector<float>(elements, NAN)};
  std::vector<float> shares(p.items, NAN), grad(p.taps, 2.f);
  native::Scratch<float> scratch(attention_scratch(p, block.lane_groups()));
  p.losses = out.losses.data();
  p.sample_losses = shares.data();
  p.coefficients = out.coefficients.data();
  p.grad = grad.data();
  int64_t first = 0;
  for (int tap = 0; tap < p.taps; ++tap) {
    p.tap[tap].d_student = out.gradient.data() + first;
    first += p.tap[tap].batch * p.tap[tap].student.channels * p.tap[tap].positions;
  }
  for (int64_t item = 0; item < p.items; ++item) attention_item<2, float>(block, p, item, scratch.data());
  attention_finish(block, p);
  for (int64_t item = 0; item < p.items; ++item) attention_backward_item<2, float>(block, p, item);
  return out;
}

void test_attention(AttentionMode mode, bool channels_last) {
  const int64_t shapes[][4] = {{3, 5, 7, 42}, {3, 16, 16, 64}, {3, 33, 8, 17}};  // batch, channels (student, teacher), positions
  AttentionParams p;
  p.mode = mode;
  std::vector<std::vector<float>> maps;
  int64_t positions = 0, elements = 0;
  for (const auto& [batch, student, teacher, count] : shapes) {
    maps.push_back(draw(batch * student * count));
    maps.push_back(draw(batch * teacher * count));
    AttentionTap& tap = p.tap[p.taps++];
    tap.student = {nullptr, student, channels_last};
    tap.teacher = {nullptr, teacher, channels_last};
    tap.batch = batch;
    tap.positions = count;
    tap.first_item = p.items;
    tap.first_coefficient = positions;
    p.items += batch;
    positions += batch * count;
    elements += batch * student * count;
    p.max_positions = std::max(p.max_positions, count);
  }
  for (int tap = 0; tap < p.taps; ++tap) {
    p.tap[tap].student.data = maps[2 * tap].data();
    p.tap[tap].teacher.data = maps[2 * tap + 1].data();
  }
  const Attention a = attend<GpuBlock>(p, positions, elements), b = attend<native::Block<float>>(p, positions, elements);
  compare("losses", a.losses, b.losses);
  compare("coefficients", a.coefficients, b.coefficients);
  compare("gradient", a.gradient, b.gradient);
}

struct Logits {
  std::vector<float> losses, statistics, gradient;
};

template <class Block>
Logits compare_logits(LogitParams p) {
  Block block;
  Logits out{std::vector<float>(2, NAN), std::vector<float>(6 * p.rows + 1, NAN),
             std::vector<float>(p.rows * p.classes, NAN)};
  std::vector<float> shares(3 * p.rows, NAN), grad{0.3f, 0.7f};
  p.losses = out.losses.data();
  p.shares = shares.data();
  p.statistics = out.statistics.data();
  p.grad = grad.data();
  p.d_student = out.gradient.data();
  block.partition(0, p.rows, [&](int64_t row, auto& lanes) { logit_row<float>(lanes, p, row); });
  logit_finish(block, p);
  block.partition(0, p.rows, [&](int64_t row, auto& lanes) {
    logit_gradient_row<float>(lanes, p, row, *statistics_of<float>(p, row));
  });
  return out;
}

void test_logits(Divergence divergence, int64_t classes, double temperature, double smoothing) {
  LogitParams p;
  p.divergence = divergence;
  p.temperature = temperature;
  p.smoothing = smoothing;
  p.rows = 13;
  p.classes = classes;
  const auto student = draw(p.rows * classes), teacher = draw(p.rows * classes);
  std::vector<int64_t> labels(p.rows);
  for (int64_t row = 0; row < p.rows; ++row) labels[row] = row == 4 ? p.ignored : row * (classes - 1) / 12;
  p.student = student.data();
  p.teacher = teacher.data();
  p.labels = labels.data();
  const Logits a = compare_logits<GpuBlock>(p), b = compare_logits<native::Block<float>>(p);
  compare("logit losses", a.losses, b.losses);
  compare("logit statistics", a.statistics, b.statistics);
  compare("logit gradient", a.gradient, b.gradient);
}

struct SubLogits {
  std::vector<float> losses, d_student, d_sub_logits;
};

// `keep`: as the processor does it, with a stage's sub-logits and exponentials in memory.
template <class Block>
SubLogits compare_sub_logits(SubLogitParams p, bool keep) {
  Block block;
  const int64_t size = p.count * p.classes;
  SubLogits out{std::vector<float>(kSubLogitComponents + 1, NAN), std::vector<float>(p.rows * p.classes, NAN),
                std::vector<float>(p.rows * p.stages * size, NAN)};
  std::vector<float> shares(kSubLogitComponents * p.rows, NAN), sums(p.rows * p.classes, NAN), kept(3 * size, NAN);
  p.total = out.losses.data() + kSubLogitComponents;
  p.components = out.losses.data();
  p.shares = shares.data();
  p.d_student = out.d_student.data();
  p.d_sub_logits = out.d_sub_logits.data();
  block.partition(0, p.rows, [&](int64_t row, auto& lanes) {
    SubLogitScratch<float> scratch{sums.data() + row * p.classes};
    if (keep) scratch = {scratch.sums, kept.data(), kept.data() + size, kept.data() + 2 * size};
    sub_logit_row<float>(lanes, p, row, scratch);
  });
  sub_logit_finish(block, p);
  return out;
}

void test_sub_logits(int64_t classes, int64_t count, double temperature, bool fused) {
  SubLogitParams p;
  p.temperature = temperature;
  p.smoothing = 0.1;
  p.fused = fused;
  p.theta = -0.1;
  p.rows = 13;
  p.stages = 3;
  p.count = count;
  p.classes = classes;
  const auto student = draw(p.rows * classes), teacher = draw(p.rows * classes);
  const auto sub_logits = draw(p.rows * p.stages * count * classes);
  const std::vector<float> weights{1, 2, 6, 3};
  std::vector<int64_t> labels(p.rows);
  for (int64_t row = 0; row < p.rows; ++row) labels[row] = row * (classes - 1) / 12;
  p.student = student.data();
  p.teacher = teacher.data();
  p.sub_logits = sub_logits.data();
  p.labels = labels.data();
  p.weights = weights.data();
  const SubLogits a = compare_sub_logits<GpuBlock>(p, false), b = compare_sub_logits<native::Block<float>>(p, true);
  compare("sub-logit losses", a.losses, b.losses);
  compare("sub-logit gradient by the student", a.d_student, b.d_student);
  compare("sub-logit gradient by sub-logits", a.d_sub_logits, b.d_sub_logits);
}

struct Paired {
  std::vector<float> losses, measures, gradient;
};

// Every pass of a loss; its taps have their maps already.
template <class Block, class... Passes, class Params>
Paired pair_up(Params p, int64_t elements) {
  Block block;
  Paired out{std::vector<float>(p.taps, NAN), std::vector<float>(p.taps, 0.f), std::vector<float>(elements, NAN)};
  std::vector<float> shares(2 * p.items, NAN), grad(p.taps, 2.f);
  native::Scratch<float> scratch(paired_scratch<Block>(block.lane_groups()));
  p.losses = out.losses.data();
  p.measures = out.measures.data();
  p.shares = shares.data();
  p.grad = grad.data();
  int64_t first = 0;
  for (int tap = 0; tap < p.taps; ++tap) {
    p.tap[tap].d_student = out.gradient.data() + first;
    first += p.tap[tap].rows * p.tap[tap].length;
  }
  const auto pass = [&](auto body) {
    for (int64_t item = 0; item < p.items; ++item) body.template item<float>(block, p, item, scratch.data());
    body.finish(block, p);
  };
  (pass(Passes{}), ...);
  return out;
}

template <class... Passes, class Params>
void test_paired(const char* what, Params p, bool channels_last) {
  // Samples, channels, positions; the third is several runs and several work items long.
  const int64_t shapes[][3] = {{3, 5, 42}, {2, 33, 16}, {2, 70, 150}, {3, 4, 1100}};
  std::vector<std::vector<float>> maps;
  int64_t elements = 0;
  for (const auto& [rows, channels, positions] : shapes) {
    const int64_t length = channels * positions;
    maps.push_back(draw(rows * length));
    maps.push_back(draw(rows * length));
    PairedTap& tap = p.tap[p.taps++];
    tap.rows = rows;
    tap.length = length;
    tap.channels = channels;
    tap.channels_last = channels_last;
    tap.factor = 1.0 / double(rows * length);
    tap.first_item = p.items;
    p.items += rows * items_of_row(p, tap);
    elements += rows * length;
  }
  for (int tap = 0; tap < p.taps; ++tap) {
    p.tap[tap].student = maps[2 * tap].data();
    p.tap[tap].teacher = maps[2 * tap + 1].data();
  }
  const Paired a = pair_up<GpuBlock, Passes...>(p, elements);
  const Paired b = pair_up<native::Block<float>, Passes...>(p, elements);
  compare(what, a.losses, b.losses);
  compare(what, a.measures, b.measures);
  compare(what, a.gradient, b.gradient);
}

void test_paired_losses() {
  ActivationBoundaryParams boundary;
  boundary.part = kPairedPart;
  test_paired<ActivationBoundary>("activation boundary", boundary, false);
  boundary.packed = true;  // random bits
  test_paired<ActivationBoundary>("activation boundary, packed", boundary, false);
  FitNetsParams fitnets;
  fitnets.part = kPairedPart;
  test_paired<FitNets>("fitnets", fitnets, false);
  fitnets.normalize = true;
  test_paired<TeacherVariance, FitNets>("fitnets, normalised", fitnets, false);
  test_paired<UnitDistance<1>>("unit distance, p = 1", UnitDistanceParams(), false);
  test_paired<UnitDistance<2>>("unit distance, p = 2", UnitDistanceParams(), false);
  for (bool channels_last : {false, true})
    test_paired<ChannelWiseDistillation>("channel-wise distillation", ChannelWiseDistillationParams(), channels_last);
}

template <UpdateRule kRule, class AnyBlock>
std::vector<std::vector<float>> rank_one(RankOneParams p, std::vector<std::vector<float>> tensors) {
  AnyBlock block;
  p.weight = tensors[0].data();
  p.first = tensors[1].data();
  p.second = tensors[2].data();
  for (int64_t chunk = 0; chunk < chunk_count(p); ++chunk) rank_one_chunk<kRule>(block, p, chunk);
  return tensors;
}

template <UpdateRule kRule>
void test_rank_one(int64_t rows, int64_t hidden, const std::vector<int64_t>& offsets) {
  RankOneParams p;
  p.weight_decay = 0.1;
  p.step_size = 0.01;
  p.shrink = 0.99;
  p.keep_first = 0.9;
  p.add_first = 0.1;
  p.keep_second = 0.99;
  p.add_second = 0.01;
  p.second_scale = 2;
  p.eps = 1e-3;
  p.rows = rows;
  p.hidden = hidden;
  p.segments = std::max<int64_t>(1, int64_t(offsets.size()) - 1);
  p.chunk = 7;
  p.offsets = offsets.empty() ? nullptr : offsets.data();
  const auto left = draw(rows), right = draw(p.segments * hidden);
  p.left = left.data();
  p.right = right.data();
  std::vector<std::vector<float>> before{draw(rows * hidden), draw(rows * hidden), draw(rows * hidden)};
  for (float& x : before[2]) x = std::abs(x);
  const auto a = rank_one<kRule, GpuBlock>(p, before), b = rank_one<kRule, native::Block<float>>(p, before);
  for (int k = 0; k < 3; ++k) compare("rank one", a[k], b[k]);
}

struct Ranger {
  std::vector<float> parameter, exp_avg, exp_avg_sq, slow;
};

// A tensor of `size` elements in rows of `length`; no rows: nothing is centralised.
template <class Block>
Ranger update(RangerParams p, const Ranger& before, const std::vector<float>& gradient, int64_t size, int64_t length,
              float step) {
  Block block;
  Ranger after = before;
  RangerTensor& x = p.tensor[0];
  p.tensors = 1;
  x.parameter = after.parameter.data();
  x.gradient = gradient.data();
  x.exp_avg = after.exp_avg.data();
  x.exp_avg_sq = after.exp_avg_sq.data();
  x.slow = after.slow.data();
  x.step = &step;
  x.size = size;
  x.centralize = length > 0;
  x.length = length > 0 ? length : std::min(size, kRangerItem);
  const auto factors = ranger_factors<float>(p, x);
  for (int64_t item = 0; item < ranger_items(x); ++item) ranger_item<float>(block, p, x, factors, item);
  return after;
}

void test_ranger(int64_t size, int64_t length, float step) {
  RangerParams p;
  p.beta1 = 0.5;
  p.beta2 = 0.999;
  p.eps = 1e-5;
  p.weight_decay = 1e-3;
  p.alpha = 0.5;
  p.k = 6;
  p.lr_value = 5e-3;
  const auto gradient = draw(size);
  Ranger before{draw(size), draw(size), draw(size), draw(size)};
  for (float& v : before.exp_avg_sq) v = std::fabs(v);
  const Ranger a = update<GpuBlock>(p, before, gradient, size, length, step);
  const Ranger b = update<native::Block<float>>(p, before, gradient, size, length, step);
  compare("parameter", a.parameter, b.parameter);
  compare("exp_avg", a.exp_avg, b.exp_avg);
  compare("exp_avg_sq", a.exp_avg_sq, b.exp_avg_sq);
  compare("slow", a.slow, b.slow);
}

}  // namespace

int main() {
  test_generate(1, {}, {16, 64}, 1003, 100);
  test_generate(3, {}, {5, 7}, 77, 16);
  test_generate(1, {0, 1, 17, 256, 300}, {16, 32}, 300, 64);
  test_generate(2, {0, 0, 150, 300}, {}, 300, 32);
  for (AttentionMode mode : {AttentionMode::kCode, AttentionMode::kPaper, AttentionMode::kZoo})
    for (bool channels_last : {false, true}) test_attention(mode, channels_last);
  for (Divergence divergence : {Divergence::kKl, Divergence::kStable, Divergence::kMultiStable})
    for (int64_t classes : {10, 64, 5003}) test_logits(divergence, classes, 4, 0.1);
  test_logits(Divergence::kKl, 1000, 1, 0);
  test_sub_logits(64, 4, 1, true);
  test_sub_logits(101, 3, 3, false);
  test_sub_logits(10, 8, 3, true);
  test_paired_losses();
  test_rank_one<UpdateRule::kSgd>(30, 16, {});
  test_rank_one<UpdateRule::kMomentum>(30, 45, {});
  test_rank_one<UpdateRule::kNesterov>(30, 16, {0, 0, 9, 30});
  test_rank_one<UpdateRule::kAdam>(30, 3, {0, 0, 9, 30});
  test_rank_one<UpdateRule::kAdamW>(30, 64, {});
  for (float step : {0.f, 5.f, 8.f}) {  // at first not rectified; with the sixth step the slow copy moves
    test_ranger(7, 0, step);
    test_ranger(5001, 0, step);
    test_ranger(99 * 7, 7, step);
    test_ranger(40 * 256, 256, step);
    test_ranger(3 * 301, 301, step);
    test_ranger(2 * 5000, 5000, step);
  }
  return failures ? 1 : 0;
}
