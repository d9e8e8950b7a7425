#include "hyperfast/relational_distance_angle.h"

#include <cmath>
#include <limits>

#include "cpu/gram.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

// As in the reference: squared distances that are smaller are those of equal samples, for distances and for angles.
constexpr double kNearest = 1e-12, kNearestOfAngles = 1e-24, kNoise = 8;

// One network at one tap: the Gram matrix of its centred samples, and what is asked of it again and again.
template <class A>
struct Samples {
  const A* gram;
  A* distance;  // 0 on the diagonal
  A* inverse;   // 1 / distance as angles see it, 0 for equal samples and where a row is padding
  int64_t ld;
  A mean = 0;  // distance

  HF_INLINE A at(int64_t i, int64_t k) const { return gram[i * ld + k]; }
  HF_INLINE bool distinct(int64_t i, int64_t k) const { return !(distance[i * ld + k] <= std::sqrt(A(kNearest))); }

  // Distances from sample i; returns their sum.
  double measure(int64_t i, int64_t batch) const {
    double total = 0;
    for (int64_t k = 0; k < ld; ++k) {
      A d = 0, inverted = 0;
      if (k < batch && k != i) {
        const A sum = at(i, i) + at(k, k), squared = sum - A(2) * at(i, k);
        const A noise = A(kNoise) * std::numeric_limits<A>::epsilon() * sum;
        const bool near = squared <= A(kNearest) || squared <= noise;  // a NaN is not
        d = std::sqrt(near ? A(kNearest) : squared);
        inverted = squared <= A(kNearestOfAngles) || squared <= noise ? A(0) : A(1) / std::sqrt(squared);
      }
      distance[i * ld + k] = d;
      inverse[i * ld + k] = inverted;
      total += d;
    }
    return total;
  }
};

// What is summed over the pairs and triples that a row belongs to.
struct RowSums {
  double student, teacher;  // distances
  double distance, angle;   // Huber losses
  double weighted;          // delta d, the derivative by the logarithm of the mean distance
};

template <class A, class V>
HF_INLINE V clamp(V x) {
  const V one = V{} + A(1);
  x = x > one ? one : x;
  return x < -one ? -one : x;
}

// A product that is rounded: fused with the difference that it is an operand of, equal angles would differ.
template <class V>
HF_INLINE V rounded(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE2__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// Sums over the angles between the arms i and k of every vertex j, for one i.
template <class A>
struct AngleRows {
  A* pairs;     // [ld] sum over j of delta / (d_ij d_kj), by k
  A* arms;      // [ld] sum over k of the same, by j
  A* lengths;   // [ld] sum over k of delta psi, by j
  double loss;  // sum over j and k of the Huber losses
};

template <class A>
void sum_angles(const Samples<A>& s, const Samples<A>& t, int64_t i, int64_t batch, AngleRows<A>& rows) {
  constexpr int kWidth = kLanes<A>;
  using V = Vector<A, kWidth>;
  const int64_t ld = s.ld, padded = round_up(batch, kWidth);
  std::memset(rows.pairs, 0, ld * sizeof(A));
  rows.loss = 0;
  for (int64_t j = 0; j < batch; ++j) {
    const A *row_s = s.gram + i * ld, *vertex_s = s.gram + j * ld, *inverse_s = s.inverse + j * ld;
    const A *row_t = t.gram + i * ld, *vertex_t = t.gram + j * ld, *inverse_t = t.inverse + j * ld;
    const A corner_s = s.at(j, j) - s.at(i, j), corner_t = t.at(j, j) - t.at(i, j);
    const A arm_s = inverse_s[i], arm_t = inverse_t[i];
    V loss{}, arms{}, lengths{};
    for (int64_t k = 0; k < padded; k += kWidth) {
      const V both_s = load_as<A, kWidth>(inverse_s + k) * arm_s;
      const V both_t = load_as<A, kWidth>(inverse_t + k) * arm_t;
      const V dot_s = load_as<A, kWidth>(row_s + k) - load_as<A, kWidth>(vertex_s + k) + corner_s;
      const V dot_t = load_as<A, kWidth>(row_t + k) - load_as<A, kWidth>(vertex_t + k) + corner_t;
      const V psi = rounded(dot_s * both_s), difference = psi - rounded(dot_t * both_t);
      const V delta = clamp<A>(difference);
      loss += delta * (difference - A(0.5) * delta);
      const V weight = delta * both_s;
      store_as<A, kWidth>(rows.pairs + k, load_as<A, kWidth>(rows.pairs + k) + weight);
      arms += weight;
      lengths += delta * psi;
    }
    rows.loss += add_up<A, kWidth>(loss);
    rows.arms[j] = add_up<A, kWidth>(arms);
    rows.lengths[j] = add_up<A, kWidth>(lengths);
  }
}

// Added in double: relations are differences of the matrices' elements.
template <class A>
using RelationalGrams = Grams<A, double>;

template <class A>
class Relations {
 public:
  Relations(const RelationalParams& p, const RelationalGrams<A>& grams)
      : p_(p), grams_(grams), batch_(p.batch), ld_(grams.ld()), matrix_(p.batch * grams.ld()) {}

  // Of one tap: the Gram matrix and the distances of two networks, and the sums over angles.
  int64_t size() const { return p_.taps * kMatrices * matrix_; }
  int64_t rows() const { return p_.taps * batch_; }

  // Called by all threads of a region.
  void compute(A* grams, A* memory, RowSums* sums) const {
    const int64_t items = rows();
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t tap = item / batch_, row = item % batch_;
      sums[item].student = student(grams, memory, tap).measure(row, batch_);
      if (p_.statistics) {
        const A* from = static_cast<const A*>(p_.statistics) + item * batch_;
        std::memcpy(teacher_gram(grams, memory, tap) + row * ld_, from, batch_ * sizeof(A));
        for (int64_t k = batch_; k < ld_; ++k) teacher_gram(grams, memory, tap)[row * ld_ + k] = 0;
      }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; ++item)
      sums[item].teacher = teacher(grams, memory, item / batch_).measure(item % batch_, batch_);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t tap = item / batch_, row = item % batch_;
      Samples<A> s = student(grams, memory, tap), t = teacher(grams, memory, tap);
      average(s, t, sums + tap * batch_);
      compare_distances(s, t, row, sums[item]);
      sums[item].angle = 0;
      if (p_.angle != 0) {
        AngleRows<A> of_angles = angle_rows(memory, tap, row);
        sum_angles(s, t, row, batch_, of_angles);
        sums[item].angle = of_angles.loss;
      }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t tap = item / batch_;
      Samples<A> s = student(grams, memory, tap), t = teacher(grams, memory, tap);
      average(s, t, sums + tap * batch_);
      write_coefficients(s, t, tap, item % batch_, memory, sums + tap * batch_);
    }
  }

  void write_losses(const RowSums* sums) const {
    const double pairs = double(batch_) * double(batch_);
    for (int64_t tap = 0; tap < p_.taps; ++tap, sums += batch_) {
      double distance = 0, angle = 0;
      for (int64_t row = 0; row < batch_; ++row) {
        distance += sums[row].distance;
        angle += sums[row].angle;
      }
      static_cast<A*>(p_.losses)[tap] = A((p_.distance * distance + p_.angle * angle / double(batch_)) / pairs);
    }
  }

 private:
  static constexpr int64_t kMatrices = 8;

  A* matrix(A* memory, int64_t tap, int64_t which) const { return memory + (tap * kMatrices + which) * matrix_; }
  A* teacher_gram(A* grams, A* memory, int64_t tap) const {
    return p_.statistics ? matrix(memory, tap, 7) : grams_.teacher(grams, tap);
  }
  Samples<A> student(A* grams, A* memory, int64_t tap) const {
    return {grams_.student(grams, tap), matrix(memory, tap, 0), matrix(memory, tap, 1), ld_};
  }
  Samples<A> teacher(A* grams, A* memory, int64_t tap) const {
    return {teacher_gram(grams, memory, tap), matrix(memory, tap, 2), matrix(memory, tap, 3), ld_};
  }
  AngleRows<A> angle_rows(A* memory, int64_t tap, int64_t row) const {
    return {matrix(memory, tap, 4) + row * ld_, matrix(memory, tap, 5) + row * ld_, matrix(memory, tap, 6) + row * ld_,
            0};
  }

  void average(Samples<A>& s, Samples<A>& t, const RowSums* sums) const {
    double of_s = 0, of_t = 0;
    for (int64_t row = 0; row < batch_; ++row) {
      of_s += sums[row].student;
      of_t += sums[row].teacher;
    }
    s.mean = A(of_s / ordered_pairs());
    t.mean = A(of_t / ordered_pairs());
  }

  double ordered_pairs() const { return double(batch_) * double(batch_ - 1); }

  void compare_distances(const Samples<A>& s, const Samples<A>& t, int64_t row, RowSums& sum) const {
    const Lanes<A> lanes;
    const A *of_s = s.distance + row * ld_, *of_t = t.distance + row * ld_;
    A found[2];
    lanes.sums(batch_, found, [&](int which, auto k) {
      const auto d = lanes.load(of_s, k);
      const auto difference = d / s.mean - lanes.load(of_t, k) / t.mean, delta = clamp<A>(difference);
      return which ? delta * d : delta * (difference - A(0.5) * delta);
    });
    sum.distance = found[0];
    sum.weighted = found[1];
  }

  void write_coefficients(const Samples<A>& s, const Samples<A>& t, int64_t tap, int64_t row, A* memory,
                          const RowSums* sums) const {
    double weighted = 0;
    for (int64_t k = 0; k < batch_; ++k) weighted += sums[k].weighted;
    const A through_mean = A(weighted / double(s.mean) / ordered_pairs());
    const A of_distance = A(p_.distance / double(batch_) / double(batch_)) / s.mean;
    const A of_angle = A(p_.angle / double(batch_) / double(batch_) / double(batch_));
    const A *arms = matrix(memory, tap, 5), *lengths = matrix(memory, tap, 6);
    const AngleRows<A> rows = angle_rows(memory, tap, row);
    A* m = static_cast<A*>(p_.coefficients) + (tap * batch_ + row) * batch_;
    double total = 0;
    for (int64_t k = 0; k < batch_; ++k) {
      A value = 0;
      if (k != row) {
        const A d = s.distance[row * ld_ + k];
        const A delta = clamp<A>(d / s.mean - t.distance[row * ld_ + k] / t.mean);
        if (s.distinct(row, k)) value = -of_distance * (delta - through_mean) / d;
        if (p_.angle != 0) {
          const A inverse = s.inverse[row * ld_ + k];
          value += of_angle * (rows.pairs[k] - rows.arms[k] - arms[k * ld_ + row] +
                               (rows.lengths[k] + lengths[k * ld_ + row]) * inverse * inverse);
        }
      }
      m[k] = value;
      total += value;
    }
    m[row] = A(-total);  // all distances and angles stay when the batch is moved
  }

  const RelationalParams& p_;
  const RelationalGrams<A>& grams_;
  int64_t batch_, ld_, matrix_;
};

template <class A>
void run(const RelationalParams& p, int threads) {
  const RelationalGrams<A> grams(p, true);
  const bool wanted = !p.student_statistics;
  const Relations<A> relations(p, grams);
  Scratch<A> products(grams.size()), memory(wanted ? relations.size() : 0);
  Scratch<double> pieces(grams.pieces_size());
  Scratch<RowSums> sums(wanted ? relations.rows() : 0);
#pragma omp parallel num_threads(threads)
  {
    Scratch<A> scratch(grams.scratch_size());
    grams.compute(products.data(), pieces.data(), scratch.data());
    if (wanted) {
      relations.compute(products.data(), memory.data(), sums.data());
    } else {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < p.taps * p.batch; ++item)
        std::memcpy(static_cast<A*>(p.student_statistics) + item * p.batch,
                    grams.student(products.data(), item / p.batch) + item % p.batch * grams.ld(), p.batch * sizeof(A));
    }
  }
  if (wanted) relations.write_losses(sums.data());
}

}  // namespace

void relational_distance_angle(const RelationalParams& p, int threads) {
  p.wide ? run<double>(p, threads) : run<float>(p, threads);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
