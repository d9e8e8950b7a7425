// Gram matrices of samples, G = X X^T, of all maps of a launch.
#pragma once
#include <cstring>

#include "cpu/transpose.h"
#include "hyperfast/gram.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

// Columns of X that are multiplied at once; transposed, they fill half of a first-level cache together with a block of
// G.
template <class A>
constexpr int64_t kGramColumns = 512 / sizeof(A);

// The rows `n` and, in the end, all elements of a symmetric product tile^T tile that lie above the diagonal.
template <class A, class F>
void multiply_upper(int64_t n, int64_t steps, const A* tile, int64_t ld, F finish) {
  using M = Exact<A>;
  constexpr int64_t kWidth = kLanes<A>;
  const int64_t vectors = (n + kWidth - 1) / kWidth;
  auto rows = [&](int64_t last) { return round_up(last * kWidth < n ? last * kWidth : n, kBlockRows); };
  const Right<A> right{tile, ld};
  int64_t first = 0;
  for (; first + kBlockVectors <= vectors; first += kBlockVectors)
    multiply_panel<M, kBlockVectors>(rows(first + kBlockVectors), first, steps, tile, 1, ld, right, finish);
  if (vectors - first == 2) multiply_panel<M, 2>(rows(vectors), first, steps, tile, 1, ld, right, finish);
  if (vectors - first == 1) multiply_panel<M, 1>(rows(vectors), first, steps, tile, 1, ld, right, finish);
}

// Each row of the transposed tile minus its mean: each column of X minus its mean over the batch.
template <class A>
void centre_rows(A* tile, int64_t ld, int64_t rows, int64_t batch) {
  const Lanes<A> lanes;
  for (int64_t k = 0; k < rows; ++k) {
    A* row = tile + k * ld;
    const A mean = lanes.sum(batch, [&](auto i) { return lanes.load(row, i); }) / A(batch);
    lanes.for_each(batch, [&](auto i) { lanes.store(row, i, lanes.load(row, i) - mean); });
  }
}

// to[row + i, column + v] += sums, in double.
template <class A>
struct AddWide {
  double* to;
  int64_t ld;

  template <class V, int R, int N>
  HF_INLINE void operator()(int64_t row, int64_t column, V (&sum)[R][N]) const {
    constexpr int kWidth = kLanes<A>;
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < N; ++v) {
        double* at = to + (row + i) * ld + column + v * kWidth;
        const auto wide = __builtin_convertvector(sum[i][v], Vector<double, kWidth>);
        store_as<double, kWidth>(at, load_as<double, kWidth>(at) + wide);
      }
  }
};

// The Gram matrices of all maps: a piece of every map's columns after the other, then their sums. How a map is cut
// depends on its size alone, so the result does not depend on the number of threads. G is what tiles are added in.
template <class A, class G = A>
class Grams {
 public:
  Grams(const GramParams& p, bool centred) : p_(p), centred_(centred), ld_(spread<A>(p.batch)) {
    sides_ = p.statistics || p.student_statistics ? 1 : 2;
  }

  // Elements of all matrices, of what is added up to them, and of a thread's own memory.
  int64_t size() const { return maps() * matrix_size(); }
  int64_t pieces_size() const { return first_piece(maps()) * piece_size(); }
  int64_t scratch_size() const { return kGramColumns<A> * ld_; }
  int64_t ld() const { return ld_; }

  A* student(A* grams, int64_t tap) const { return grams + tap * matrix_size(); }
  A* teacher(A* grams, int64_t tap) const { return grams + (p_.taps + tap) * matrix_size(); }

  // Called by all threads of a region.
  void compute(A* grams, G* memory, A* scratch) const {
    const int64_t all = first_piece(maps());
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < all; ++item) {
      int64_t map = 0, piece = item;
      for (; piece >= pieces(map); ++map) piece -= pieces(map);
      multiply_piece(memory + item * piece_size(), map, piece, scratch);
    }
#pragma omp for schedule(dynamic, 8)
    for (int64_t item = 0; item < maps() * p_.batch; ++item) {
      const int64_t map = item / p_.batch, row = item % p_.batch;
      G* sum = memory + first_piece(map) * piece_size() + row * ld_;
      for (int64_t piece = 1; piece < pieces(map); ++piece) {
        const G* other = sum + piece * piece_size();
        for (int64_t k = row; k < p_.batch; ++k) sum[k] += other[k];
      }
      A* to = grams + map * matrix_size();
      for (int64_t k = row; k < p_.batch; ++k) to[k * ld_ + row] = to[row * ld_ + k] = A(sum[k]);
      for (int64_t k = p_.batch; k < ld_; ++k) to[row * ld_ + k] = 0;
    }
  }

 private:
  static constexpr int64_t kWideSteps = 32;  // products that are added in A before they are in double
  static constexpr int64_t kPieceColumns = 32 * kGramColumns<A>, kMostBytes = 2 << 20;  // of one map's pieces

  int64_t maps() const { return sides_ * p_.taps; }
  const SampleMap& map_of(int64_t map) const {
    return map < p_.taps ? p_.tap[map].student : p_.tap[map - p_.taps].teacher;
  }
  int64_t matrix_size() const { return p_.batch * ld_; }
  int64_t piece_size() const { return round_up(p_.batch, kBlockRows) * ld_; }
  int64_t piece_columns(int64_t map) const {
    int64_t most = kMostBytes / (piece_size() * int64_t(sizeof(G)));
    if (most < 1) most = 1;
    const int64_t least = round_up((map_of(map).size + most - 1) / most, kGramColumns<A>);
    return least > kPieceColumns ? least : kPieceColumns;
  }
  int64_t pieces(int64_t map) const { return (map_of(map).size - 1) / piece_columns(map) + 1; }
  int64_t first_piece(int64_t map) const {
    int64_t first = 0;
    for (int64_t k = 0; k < map; ++k) first += pieces(k);
    return first;
  }

  void multiply_piece(G* to, int64_t map, int64_t piece, A* scratch) const {
    switch (map_of(map).dtype) {
      case DType::kFloat64:
        if constexpr (std::is_same_v<A, double>) multiply_piece_as<double>(to, map, piece, scratch);
        return;
      case DType::kFloat32:
        return multiply_piece_as<float>(to, map, piece, scratch);
      case DType::kBFloat16:
        if constexpr (std::is_same_v<A, float>) multiply_piece_as<BFloat16>(to, map, piece, scratch);
        return;
      case DType::kFloat16:
        if constexpr (std::is_same_v<A, float>) multiply_piece_as<Float16>(to, map, piece, scratch);
        return;
    }
  }

  template <class T>
  void multiply_piece_as(G* to, int64_t map, int64_t piece, A* tile) const {
    const SampleMap& samples = map_of(map);
    const T* data = static_cast<const T*>(samples.data);
    std::memset(to, 0, piece_size() * sizeof(G));
    const int64_t begin = piece * piece_columns(map), columns = piece_columns(map);
    const int64_t end = begin + columns < samples.size ? begin + columns : samples.size;
    for (int64_t first = begin; first < end; first += kGramColumns<A>) {
      const int64_t count = end - first < kGramColumns<A> ? end - first : kGramColumns<A>;
      transpose(tile, ld_, data + first, p_.batch, count, samples.size, kGramColumns<A>);
      if (centred_) centre_rows(tile, ld_, count, p_.batch);
      if constexpr (std::is_same_v<A, G>) {
        multiply_upper(p_.batch, count, tile, ld_, AddTo<A>{to, ld_});
      } else {
        for (int64_t k = 0; k < count; k += kWideSteps)
          multiply_upper(p_.batch, count - k < kWideSteps ? count - k : kWideSteps, tile + k * ld_, ld_,
                         AddWide<A>{to, ld_});
      }
    }
  }

  const GramParams& p_;
  bool centred_;
  int64_t ld_;
  int64_t sides_;
};

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
