#include "hyperfast/flow_of_solution.h"

#include <utility>

#include "cpu/transpose.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

constexpr double kEps = 1e-12;  // a teacher's matrix of a smaller norm cannot be divided by it

// One sample's map: rows of channels, `ld` apart.
template <class A>
struct Rows {
  const A* data;
  int64_t ld;
};

// All pairs of one sample, by one thread.
template <class T, class A>
class FlowSample {
  using M = Exact<A>;
  static constexpr int64_t kWidth = kLanes<A>, kSteps = 512 / sizeof(A);

 public:
  explicit FlowSample(const FlowParams& p) : p_(p) {
    int64_t matrix = 0, across = 0, rows = 0, gradients = 0;
    auto grow = [](int64_t& most, int64_t size) { most = size > most ? size : most; };
    for (int64_t index = 0; index < p.pairs; ++index) {
      const FlowMap &first = p.map[p.pair[index].first], &second = p.map[p.pair[index].second];
      grow(matrix, first.channels * spread<A>(second.channels));
      const int64_t positions = longest(first);
      grow(across, positions * spread<A>(second.channels));
      grow(rows, first.channels * round_up(positions, kWidth));
      grow(rows, second.channels * round_up(positions, kWidth));
    }
    if (p.grad)
      for (int64_t index = 0; index < p.maps; ++index) gradients += gradient_size(p.map[index]);
    // Each begins with a cache line.
    auto place = [&](int64_t size) { return std::exchange(size_, size_ + round_up(size, 64)); };
    matrix_ = place(matrix);
    other_ = place(matrix);
    across_ = place(across);
    first_rows_ = place(rows);
    second_rows_ = place(rows);
    gradients_ = place(gradients);
  }

  int64_t scratch_size() const { return size_; }

  // Losses of the sample, one per pair.
  void run(int64_t sample, A* scratch, A* losses) const {
    if (p_.grad) std::memset(scratch + gradients_, 0, (size_ - gradients_) * sizeof(A));
    for (int64_t index = 0; index < p_.pairs; ++index) {
      const FlowPair& pair = p_.pair[index];
      const FlowMap &first = p_.map[pair.first], &second = p_.map[pair.second];
      A* matrix = scratch + matrix_;
      if (p_.losses || !p_.grad) {
        const int64_t positions = first.student_positions;
        multiply_maps(sample_of(first.student, first.channels, positions, sample),
                      sample_of(second.student, second.channels, positions, sample), first.channels, second.channels,
                      positions, matrix, scratch);
        if (p_.losses) losses[index] = compare(pair, index, sample, scratch);
        if (pair.differences)
          copy(matrix, spread<A>(second.channels), first.channels, second.channels, difference(pair, sample),
               second.channels);
      } else {
        copy(difference(pair, sample), second.channels, first.channels, second.channels, matrix,
             spread<A>(second.channels));
      }
      if (p_.grad) {
        const A outer = A(2) * static_cast<const A*>(p_.grad)[index] * scale(index, sample);
        add_gradients(pair, sample, outer / A(first.student_positions), scratch);
      }
    }
    if (!p_.grad) return;
    const A* from = scratch + gradients_;
    for (int64_t index = 0; index < p_.maps; from += gradient_size(p_.map[index]), ++index)
      store_gradient(p_.map[index], sample, from);
  }

 private:
  static int64_t longest(const FlowMap& map) {
    return map.student_positions > map.teacher_positions ? map.student_positions : map.teacher_positions;
  }
  static int64_t gradient_size(const FlowMap& map) { return map.channels * round_up(map.student_positions, kWidth); }
  A* difference(const FlowPair& pair, int64_t sample) const {
    const int64_t size = p_.map[pair.first].channels * p_.map[pair.second].channels;
    return static_cast<A*>(pair.differences) + sample * size;
  }
  static const T* sample_of(const void* maps, int64_t channels, int64_t positions, int64_t sample) {
    return static_cast<const T*>(maps) + sample * channels * positions;
  }

  // Rows of whole vectors where `padded`, else as they are; converted and copied to `to` only where that is necessary.
  static Rows<A> rows_of(const T* from, int64_t channels, int64_t positions, bool padded, A* to) {
    if constexpr (std::is_same_v<T, A>)
      if (!padded || positions % kWidth == 0) return {from, positions};
    const int64_t ld = round_up(positions, kWidth);
    const Lanes<A> lanes;
    for (int64_t c = 0; c < channels; ++c) {
      lanes.for_each(positions, [&](auto i) { lanes.store(to + c * ld, i, lanes.load(from + c * positions, i)); });
      for (int64_t k = positions; k < ld; ++k) to[c * ld + k] = 0;
    }
    return {to, ld};
  }

  // F1 F2^T / N.
  void multiply_maps(const T* first, const T* second, int64_t rows, int64_t columns, int64_t positions, A* to,
                     A* scratch) const {
    const int64_t ld = spread<A>(columns);
    const Rows<A> left = rows_of(first, rows, positions, false, scratch + first_rows_);
    A* right = scratch + across_;
    transpose(right, ld, second, columns, positions, positions, 0);
    for (int64_t k = 0; k < positions; k += kSteps) {
      const int64_t steps = positions - k < kSteps ? positions - k : kSteps;
      // Divided here and not where matrices are compared: there the product and the difference would become one
      // operation with one rounding, and equal maps would differ.
      multiply<M>(rows, columns, steps, left.data + k, left.ld, 1, {right + k * ld, ld},
                  [&](int64_t row, int64_t column, auto& sum) {
                    for (auto& of_row : sum)
                      for (auto& x : of_row) x *= A(1) / A(positions);
                    if (k == 0) {
                      M::store({to, nullptr}, ld, row, column, sum, false);
                    } else {
                      AddTo<A>{to, ld}(row, column, sum);
                    }
                  });
    }
  }

  static void copy(const A* from, int64_t from_ld, int64_t rows, int64_t columns, A* to, int64_t to_ld) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * to_ld, from + r * from_ld, columns * sizeof(A));
  }

  // What the squares of a matrix's differences are multiplied by in the loss.
  A& scale(int64_t pair, int64_t sample) const { return static_cast<A*>(p_.scales)[pair * p_.batch + sample]; }

  // Takes the teacher's matrix from the student's. Returns the loss.
  A compare(const FlowPair& pair, int64_t index, int64_t sample, A* scratch) const {
    const FlowMap &first = p_.map[pair.first], &second = p_.map[pair.second];
    const int64_t rows = first.channels, columns = second.channels, ld = spread<A>(columns);
    const int64_t positions = first.teacher_positions;
    A *own = scratch + matrix_, *other = scratch + other_;
    if (pair.statistics) {
      copy(static_cast<const A*>(pair.statistics) + sample * rows * columns, columns, rows, columns, other, ld);
    } else {
      multiply_maps(sample_of(first.teacher, rows, positions, sample),
                    sample_of(second.teacher, columns, positions, sample), rows, columns, positions, other, scratch);
    }
    const Lanes<A> lanes;
    double squares = 0, teacher_squares = 0;
    for (int64_t r = 0; r < rows; ++r) {
      A sums[2];
      lanes.sums(columns, sums, [&](int which, auto i) {
        const auto t = lanes.load(other + r * ld, i), d = lanes.load(own + r * ld, i) - t;
        return which ? t * t : d * d;
      });
      lanes.for_each(columns, [&](auto i) {
        lanes.store(own + r * ld, i, lanes.load(own + r * ld, i) - lanes.load(other + r * ld, i));
      });
      squares += sums[0];
      teacher_squares += sums[1];
    }
    double factor = 1 / double(p_.batch);
    if (!p_.sum) factor /= double(rows) * double(columns);
    if (p_.normalize) factor = teacher_squares <= kEps * kEps ? 0 : factor / teacher_squares;
    scale(index, sample) = A(factor);
    return A(factor * squares);
  }

  // dF1 += R F2, dF2 += R^T F1 with R = outer * difference.
  void add_gradients(const FlowPair& pair, int64_t sample, A outer, A* scratch) const {
    const FlowMap &first = p_.map[pair.first], &second = p_.map[pair.second];
    const int64_t rows = first.channels, columns = second.channels, ld = spread<A>(columns);
    const int64_t positions = first.student_positions, padded = round_up(positions, kWidth);
    A* matrix = scratch + matrix_;
    const Lanes<A> lanes;
    for (int64_t r = 0; r < rows; ++r)
      lanes.for_each(columns, [&](auto i) { lanes.store(matrix + r * ld, i, lanes.load(matrix + r * ld, i) * outer); });
    const Rows<A> left =
        rows_of(sample_of(first.student, rows, positions, sample), rows, positions, true, scratch + first_rows_);
    const Rows<A> right = rows_of(sample_of(second.student, columns, positions, sample), columns, positions, true,
                                  scratch + second_rows_);
    multiply<M>(rows, positions, columns, matrix, ld, 1, {right.data, right.ld},
                AddTo<A>{gradient(pair.first, scratch), padded});
    multiply<M>(columns, positions, rows, matrix, 1, ld, {left.data, left.ld},
                AddTo<A>{gradient(pair.second, scratch), padded});
  }

  A* gradient(int64_t map, A* scratch) const {
    int64_t place = gradients_;
    for (int64_t k = 0; k < map; ++k) place += gradient_size(p_.map[k]);
    return scratch + place;
  }

  void store_gradient(const FlowMap& map, int64_t sample, const A* from) const {
    const Lanes<A> lanes;
    const int64_t positions = map.student_positions, ld = round_up(positions, kWidth);
    T* to = static_cast<T*>(map.d_student) + sample * map.channels * positions;
    for (int64_t c = 0; c < map.channels; ++c)
      lanes.for_each(positions, [&](auto i) { lanes.store(to + c * positions, i, lanes.load(from + c * ld, i)); });
  }

  const FlowParams& p_;
  int64_t matrix_, other_, across_, first_rows_, second_rows_, gradients_, size_ = 0;
};

template <class T, class A>
void run(const FlowParams& p, int threads) {
  const FlowSample<T, A> work(p);
  Scratch<A> losses(p.batch * p.pairs);
#pragma omp parallel num_threads(threads)
  {
    Scratch<A> scratch(work.scratch_size());
#pragma omp for schedule(dynamic, 1)
    for (int64_t sample = 0; sample < p.batch; ++sample)
      work.run(sample, scratch.data(), losses.data() + sample * p.pairs);
  }
  if (!p.losses) return;
  for (int64_t pair = 0; pair < p.pairs; ++pair) {
    double total = 0;
    for (int64_t sample = 0; sample < p.batch; ++sample) total += losses.data()[sample * p.pairs + pair];
    static_cast<A*>(p.losses)[pair] = A(total);
  }
}

}  // namespace

void flow_of_solution(const FlowParams& p, int threads) {
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
