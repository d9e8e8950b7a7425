#include "cpu/gram.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

// One tile of columns of (M + M^T) X.
template <class T, class A>
struct Mixer {
  using M = Exact<A>;
  static constexpr int64_t kWidth = kLanes<A>, kColumns = 4 * kBlockVectors * kWidth;

  const GramGradientParams& p;
  const A* matrix;  // symmetric, rows `ld` apart
  int64_t ld;

  static int64_t scratch_size(int64_t batch) { return (batch + 1) * spread<A>(kColumns); }

  void run(const GramGradientTap& tap, int64_t first, A* tile) const {
    const int64_t size = tap.student.size, count = size - first < kColumns ? size - first : kColumns;
    const int64_t tile_ld = spread<A>(kColumns);
    const T* from = static_cast<const T*>(tap.student.data) + first;
    T* to = static_cast<T*>(tap.gradient) + first;
    const Lanes<A> lanes;
    for (int64_t b = 0; b < p.batch; ++b) {
      A* row = tile + b * tile_ld;
      lanes.for_each(count, [&](auto i) {
        lanes.prefetch(from + b * size + kColumns, i);
        lanes.store(row, i, lanes.load(from + b * size, i));
      });
      for (int64_t k = count; k < round_up(count, kWidth); ++k) row[k] = 0;
    }
    if (p.centred) centre(tile, tile_ld, count);
    multiply<M>(round_up(p.batch, kBlockRows), count, p.batch, matrix, 1, ld, {tile, tile_ld},
                [&](int64_t row, int64_t column, auto& sum) {
                  for (auto& of_row : sum) {
                    if (row < p.batch) store_row(to + row * size, column, count, of_row);
                    ++row;
                  }
                });
  }

 private:
  void centre(A* tile, int64_t tile_ld, int64_t count) const {
    const Lanes<A> lanes;
    A* mean = tile + p.batch * tile_ld;
    lanes.for_each(count, [&](auto i) {
      auto sum = lanes.load(tile, i);
      for (int64_t b = 1; b < p.batch; ++b) sum += lanes.load(tile + b * tile_ld, i);
      lanes.store(mean, i, sum / A(p.batch));
    });
    for (int64_t b = 0; b < p.batch; ++b) {
      A* row = tile + b * tile_ld;
      lanes.for_each(count, [&](auto i) { lanes.store(row, i, lanes.load(row, i) - lanes.load(mean, i)); });
    }
  }

  template <class V, int N>
  HF_INLINE void store_row(T* to, int64_t column, int64_t count, const V (&sums)[N]) const {
    HF_UNROLL
    for (int v = 0; v < N; ++v, column += kWidth) {
      if (column + kWidth <= count) {
        if (p.stream) {
          stream_as<A, kWidth>(to + column, sums[v]);
        } else {
          store_as<A, kWidth>(to + column, sums[v]);
        }
      } else {
        for (int64_t lane = 0; column + lane < count; ++lane) to[column + lane] = T(sums[v][lane]);
      }
    }
  }
};

template <class T, class A>
int64_t tiles(const GramGradientTap& tap) {
  return (tap.student.size + Mixer<T, A>::kColumns - 1) / Mixer<T, A>::kColumns;
}

template <class T, class A>
void run(const GramGradientParams& p, int threads) {
  const int64_t ld = spread<A>(p.batch), matrix_size = p.batch * ld;
  Scratch<A> matrices(p.taps * matrix_size);
  int64_t all = 0;
  for (int64_t tap = 0; tap < p.taps; ++tap) all += tiles<T, A>(p.tap[tap]);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < p.taps * p.batch; ++item) {
      const int64_t tap = item / p.batch, row = item % p.batch;
      const A* m = static_cast<const A*>(p.coefficients) + tap * p.batch * p.batch;
      const A grad = static_cast<const A*>(p.grad)[tap];
      A* to = matrices.data() + item * ld;
      for (int64_t k = 0; k < p.batch; ++k) to[k] = grad * (m[row * p.batch + k] + m[k * p.batch + row]);
      for (int64_t k = p.batch; k < ld; ++k) to[k] = 0;
    }
    Scratch<A> tile(Mixer<T, A>::scratch_size(p.batch));
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < all; ++item) {
      int64_t tap = 0, place = item;
      for (; place >= tiles<T, A>(p.tap[tap]); ++tap) place -= tiles<T, A>(p.tap[tap]);
      const Mixer<T, A> mixer{p, matrices.data() + tap * matrix_size, ld};
      mixer.run(p.tap[tap], place * Mixer<T, A>::kColumns, tile.data());
    }
    if (p.stream) finish_streams();
  }
}

}  // namespace

void gram_backward(const GramGradientParams& p, int threads) {
  if (p.wide) return run<double, double>(p, threads);
  switch (p.tap[0].student.dtype) {
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
