#include "hyperfast/similarity_preserving.h"

#include <cmath>

#include "cpu/gram.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

constexpr double kEps = 1e-12;  // rows of a smaller norm count as zero

// U: the row of a Gram matrix divided by its norm, in place. Returns the norm, 0 for a row that counts as zero.
template <class A>
A normalise(A* row, int64_t batch) {
  const Lanes<A> lanes;
  const A norm = std::sqrt(lanes.sum(batch, [&](auto i) {
    const auto x = lanes.load(row, i);
    return x * x;
  }));
  const bool dead = norm <= A(kEps);  // a NaN is not
  lanes.for_each(batch, [&](auto i) { lanes.store(row, i, dead ? lanes.zero(i) : lanes.load(row, i) / norm); });
  return dead ? A(0) : norm;
}

// Loss of one row of U, and its row of M.
template <class A>
A row_loss(const SimilarityParams& p, const A* u, const A* v, A norm, A* m) {
  const Lanes<A> lanes;
  const int64_t batch = p.batch;
  const A scale = A(2) / A(batch) / A(batch);
  A sums[2];
  lanes.sums(batch, sums, [&](int which, auto i) {
    const auto difference = lanes.load(u, i) - lanes.load(v, i);
    return which ? difference * lanes.load(u, i) : difference * difference;
  });
  const A outer = norm > A(0) ? scale / norm : (norm == A(0) ? A(0) : norm);
  lanes.for_each(batch, [&](auto i) {
    const auto x = lanes.load(u, i);
    lanes.store(m, i, (x - lanes.load(v, i) - x * sums[1]) * outer);
  });
  return sums[0];
}

template <class A>
void run(const SimilarityParams& p, int threads) {
  const Grams<A> grams(p, false);
  const int64_t batch = p.batch, matrix = batch * batch, ld = grams.ld();
  Scratch<A> memory(grams.size()), pieces(grams.pieces_size()), row_losses(p.taps * batch);
#pragma omp parallel num_threads(threads)
  {
    Scratch<A> scratch(grams.scratch_size());
    grams.compute(memory.data(), pieces.data(), scratch.data());
#pragma omp for schedule(static)
    for (int64_t item = 0; item < p.taps * batch; ++item) {
      const int64_t tap = item / batch, row = item % batch, place = tap * matrix + row * batch;
      A* u = grams.student(memory.data(), tap) + row * ld;
      const A norm = normalise(u, batch);
      if (p.student_statistics) {
        std::memcpy(static_cast<A*>(p.student_statistics) + place, u, batch * sizeof(A));
        continue;
      }
      const A* v = static_cast<const A*>(p.statistics) + place;
      if (!p.statistics) {
        A* other = grams.teacher(memory.data(), tap) + row * ld;
        normalise(other, batch);
        v = other;
      }
      row_losses.data()[item] = row_loss(p, u, v, norm, static_cast<A*>(p.coefficients) + place);
    }
  }
  if (p.student_statistics) return;
  for (int64_t tap = 0; tap < p.taps; ++tap) {
    double total = 0;
    for (int64_t row = 0; row < batch; ++row) total += row_losses.data()[tap * batch + row];
    static_cast<A*>(p.losses)[tap] = A(total / double(batch) / double(batch));
  }
}

}  // namespace

void similarity_preserving(const SimilarityParams& p, int threads) {
  p.wide ? run<double>(p, threads) : run<float>(p, threads);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
