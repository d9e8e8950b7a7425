#include "hyperfast/gated_experts.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/transpose.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

// One sample after the other: its mixed expert and its maps stay in the caches.
template <class T, class A>
class ExpertSample {
  using M = Exact<A>;
  static constexpr int64_t kWidth = kLanes<A>, kSteps = 512 / sizeof(A);

 public:
  explicit ExpertSample(const GatedExpertsParams& p)
      : p_(p), matrix_(p.outputs * p.rank), ld_(round_up(p.positions, kWidth)) {
    auto place = [&](int64_t size) { return std::exchange(size_, size_ + round_up(size, 64)); };
    mixed_ = place(matrix_);
    bias_ = place(p.outputs);
    means_ = place(p.gate_width);
    logits_ = place(p.heads);
    maps_ = place(p.rank * ld_);
    tile_ = place((p.outputs > p.rank ? p.outputs : p.rank) * ld_);
    if (!p.d_output) return;
    grad_ = place(p.outputs * ld_);
    across_ = place(p.positions * spread<A>(p.rank));
    wide_ = place(p.outputs * spread<A>(p.rank));
    d_mixed_ = place(matrix_);
    d_bias_ = place(p.outputs);
    sums_ = place(sums_size());
  }

  int64_t scratch_size() const { return size_; }
  // Sums over the samples of a thread: gradients by experts, bias, gate weight and gate bias.
  int64_t sums_size() const { return p_.heads * (matrix_ + p_.outputs + p_.gate_width + 1); }
  A* sums(A* scratch) const { return scratch + sums_; }

  void forward(int64_t sample, A* scratch) const {
    A* gates = gates_of(sample);
    const A* seen = gate_input(sample, scratch);
    A top = -std::numeric_limits<A>::infinity(), total = 0;
    for (int64_t h = 0; h < p_.heads; ++h) {
      const T* weight = of<T>(p_.gate_weight) + h * p_.gate_width;
      A logit = lanes_.sum(p_.gate_width, [&](auto i) { return lanes_.load(weight, i) * lanes_.load(seen, i); });
      if (p_.gate_bias) logit += A(of<T>(p_.gate_bias)[h]);
      gates[h] = logit;
      top = logit > top ? logit : top;
    }
    for (int64_t h = 0; h < p_.heads; ++h) total += gates[h] = std::exp(gates[h] - top);
    for (int64_t h = 0; h < p_.heads; ++h) gates[h] /= total;
    mix(gates, scratch);
    const Rows maps = rows_of(of<T>(p_.z) + sample * p_.rank * p_.positions, p_.rank, scratch + maps_);
    A* tile = scratch + tile_;
    multiply<M>(p_.outputs, p_.positions, p_.rank, scratch + mixed_, p_.rank, 1, {maps.data, maps.ld},
                [&](int64_t row, int64_t column, auto& sum) { M::store({tile, nullptr}, ld_, row, column, sum, false); });
    T* to = static_cast<T*>(p_.output) + sample * p_.outputs * p_.positions;
    for (int64_t o = 0; o < p_.outputs; ++o) store_row(to + o * p_.positions, tile + o * ld_, scratch[bias_ + o]);
  }

  void backward(int64_t sample, A* scratch) const {
    const A* gates = gates_of(sample);
    mix(gates, scratch);
    const T* z = of<T>(p_.z) + sample * p_.rank * p_.positions;
    const Rows grad = rows_of(of<T>(p_.d_output) + sample * p_.outputs * p_.positions, p_.outputs, scratch + grad_);
    expert_gradient(grad, z, scratch);
    A* d_logits = gate_gradient(sample, gates, scratch);
    add_to_sums(sample, gates, d_logits, scratch);
    A* d_seen = scratch + means_;
    for (int64_t k = 0; k < p_.gate_width; ++k) d_seen[k] = 0;
    for (int64_t h = 0; h < p_.heads; ++h) {
      const T* weight = of<T>(p_.gate_weight) + h * p_.gate_width;
      add(p_.gate_width, d_seen, d_logits[h], weight);
    }
    A* tile = scratch + tile_;
    multiply<M>(p_.rank, p_.positions, p_.outputs, scratch + mixed_, 1, p_.rank, {grad.data, grad.ld},
                [&](int64_t row, int64_t column, auto& sum) { M::store({tile, nullptr}, ld_, row, column, sum, false); });
    T* to = static_cast<T*>(p_.d_z) + sample * p_.rank * p_.positions;
    for (int64_t k = 0; k < p_.rank; ++k)
      store_row(to + k * p_.positions, tile + k * ld_, p_.gate_input ? A(0) : d_seen[k] / A(p_.positions));
    if (p_.gate_input) {
      T* d_input = static_cast<T*>(p_.d_gate_input) + sample * p_.gate_width;
      lanes_.for_each(p_.gate_width, [&](auto i) { lanes_.store(d_input, i, lanes_.load(d_seen, i)); });
    }
  }

 private:
  struct Rows {
    const A* data;
    int64_t ld;
  };

  template <class X>
  static const X* of(const void* tensor) {
    return static_cast<const X*>(tensor);
  }
  A* gates_of(int64_t sample) const { return static_cast<A*>(p_.gates) + sample * p_.heads; }

  // Rows of whole vectors; copied only where they are not such already.
  Rows rows_of(const T* from, int64_t rows, A* to) const {
    if constexpr (std::is_same_v<T, A>)
      if (p_.positions == ld_) return {from, ld_};
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = from + r * p_.positions;
      lanes_.for_each(p_.positions, [&](auto i) { lanes_.store(to + r * ld_, i, lanes_.load(row, i)); });
      for (int64_t k = p_.positions; k < ld_; ++k) to[r * ld_ + k] = 0;
    }
    return {to, ld_};
  }

  void store_row(T* to, const A* from, A added) const {
    lanes_.for_each(p_.positions, [&](auto i) { lanes_.store(to, i, lanes_.load(from, i) + added); });
  }

  // to += factor * from
  template <class X>
  void add(int64_t n, A* to, A factor, const X* from) const {
    lanes_.for_each(n, [&](auto i) { lanes_.store(to, i, lanes_.load(to, i) + lanes_.load(from, i) * factor); });
  }

  const A* gate_input(int64_t sample, A* scratch) const {
    A* means = scratch + means_;
    if (p_.gate_input) {
      const T* input = of<T>(p_.gate_input) + sample * p_.gate_width;
      lanes_.for_each(p_.gate_width, [&](auto i) { lanes_.store(means, i, lanes_.load(input, i)); });
      return means;
    }
    const T* z = of<T>(p_.z) + sample * p_.rank * p_.positions;
    for (int64_t k = 0; k < p_.rank; ++k) {
      const T* row = z + k * p_.positions;
      means[k] = lanes_.sum(p_.positions, [&](auto i) { return lanes_.load(row, i); }) / A(p_.positions);
    }
    return means;
  }

  // The expert and the bias that the gates make.
  void mix(const A* gates, A* scratch) const {
    std::memset(scratch + mixed_, 0, matrix_ * sizeof(A));
    std::memset(scratch + bias_, 0, p_.outputs * sizeof(A));
    for (int64_t h = 0; h < p_.heads; ++h) {
      add(matrix_, scratch + mixed_, gates[h], of<T>(p_.experts) + h * matrix_);
      if (p_.bias) add(p_.outputs, scratch + bias_, gates[h], of<T>(p_.bias) + h * p_.outputs);
    }
  }

  // By the mixed expert, G z^T, and by the mixed bias.
  void expert_gradient(Rows grad, const T* z, A* scratch) const {
    const int64_t ld = spread<A>(p_.rank);
    A *right = scratch + across_, *wide = scratch + wide_;
    transpose(right, ld, z, p_.rank, p_.positions, p_.positions, 0);
    for (int64_t k = 0; k < p_.positions; k += kSteps) {
      const int64_t steps = p_.positions - k < kSteps ? p_.positions - k : kSteps;
      multiply<M>(p_.outputs, p_.rank, steps, grad.data + k, grad.ld, 1, {right + k * ld, ld},
                  [&](int64_t row, int64_t column, auto& sum) {
                    if (k == 0) {
                      M::store({wide, nullptr}, ld, row, column, sum, false);
                    } else {
                      AddTo<A>{wide, ld}(row, column, sum);
                    }
                  });
    }
    for (int64_t o = 0; o < p_.outputs; ++o) {
      std::memcpy(scratch + d_mixed_ + o * p_.rank, wide + o * ld, p_.rank * sizeof(A));
      const A* row = grad.data + o * grad.ld;
      if (p_.bias) scratch[d_bias_ + o] = lanes_.sum(p_.positions, [&](auto i) { return lanes_.load(row, i); });
    }
  }

  A* gate_gradient(int64_t sample, const A* gates, A* scratch) const {
    A *found = scratch + logits_, along = 0;
    const A *d_mixed = scratch + d_mixed_, *d_bias = scratch + d_bias_;
    for (int64_t h = 0; h < p_.heads; ++h) {
      const T* expert = of<T>(p_.experts) + h * matrix_;
      A d_gate = of<A>(p_.d_gates)[sample * p_.heads + h];
      d_gate += lanes_.sum(matrix_, [&](auto i) { return lanes_.load(d_mixed, i) * lanes_.load(expert, i); });
      if (p_.bias) {
        const T* bias = of<T>(p_.bias) + h * p_.outputs;
        d_gate += lanes_.sum(p_.outputs, [&](auto i) { return lanes_.load(d_bias, i) * lanes_.load(bias, i); });
      }
      found[h] = d_gate;
      along += gates[h] * d_gate;
    }
    for (int64_t h = 0; h < p_.heads; ++h) found[h] = gates[h] * (found[h] - along);
    return found;
  }

  void add_to_sums(int64_t sample, const A* gates, const A* d_logits, A* scratch) const {
    const A* seen = gate_input(sample, scratch);
    A* to = sums(scratch);
    for (int64_t h = 0; h < p_.heads; ++h, to += matrix_) add(matrix_, to, gates[h], scratch + d_mixed_);
    for (int64_t h = 0; h < p_.heads; ++h, to += p_.outputs)
      if (p_.bias) add(p_.outputs, to, gates[h], scratch + d_bias_);
    for (int64_t h = 0; h < p_.heads; ++h, to += p_.gate_width) add(p_.gate_width, to, d_logits[h], seen);
    for (int64_t h = 0; h < p_.heads; ++h) to[h] += d_logits[h];
  }

  const Lanes<A> lanes_{};
  const GatedExpertsParams& p_;
  const int64_t matrix_, ld_;
  int64_t mixed_, bias_, means_, logits_, maps_, tile_, grad_ = 0, across_ = 0, wide_ = 0, d_mixed_ = 0, d_bias_ = 0,
                                                         sums_ = 0, size_ = 0;
};

template <class T, class A>
void store_sums(const GatedExpertsParams& p, const A* sums, int64_t count, int64_t stride, int threads) {
  void* to[] = {p.d_experts, p.d_bias, p.d_gate_weight, p.d_gate_bias};
  const int64_t sizes[] = {p.heads * p.outputs * p.rank, p.heads * p.outputs, p.heads * p.gate_width, p.heads};
  int64_t first = 0;
  for (int part = 0; part < 4; first += sizes[part++]) {
    if (!to[part]) continue;
    T* out = static_cast<T*>(to[part]);
    const A* from = sums + first;
#pragma omp parallel for num_threads(threads) if (sizes[part] > (1 << 14))
    for (int64_t i = 0; i < sizes[part]; ++i) {
      A total = 0;
      for (int64_t share = 0; share < count; ++share) total += from[share * stride + i];
      out[i] = T(total);
    }
  }
}

template <class T, class A>
void run(const GatedExpertsParams& p, int threads) {
  const ExpertSample<T, A> work(p);
  if (!p.d_output) {
#pragma omp parallel num_threads(threads)
    {
      Scratch<A> scratch(work.scratch_size());
#pragma omp for schedule(static)
      for (int64_t sample = 0; sample < p.batch; ++sample) work.forward(sample, scratch.data());
    }
    return;
  }
  // As many shares as there are threads, each of samples that follow each other: two runs add up in one order.
  const int64_t size = work.sums_size(), shares = threads;
  Scratch<A> sums(shares * size);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t share = 0; share < shares; ++share) {
    Scratch<A> scratch(work.scratch_size());
    std::memset(work.sums(scratch.data()), 0, size * sizeof(A));
    for (int64_t sample = p.batch * share / shares; sample < p.batch * (share + 1) / shares; ++sample)
      work.backward(sample, scratch.data());
    std::memcpy(sums.data() + share * size, work.sums(scratch.data()), size * sizeof(A));
  }
  store_sums<T, A>(p, sums.data(), shares, size, threads);
}

}  // namespace

void gated_experts(const GatedExpertsParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return run<double, double>(p, threads);
    case DType::kBFloat16:
      return run<BFloat16, float>(p, threads);
    case DType::kFloat16:
      return run<Float16, float>(p, threads);
    default:
      return run<float, float>(p, threads);
  }
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
