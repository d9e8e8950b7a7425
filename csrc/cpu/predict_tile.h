// One tile of rows of a predictor: forward, error and backward while its activations are in the cache.
#pragma once
#include "cpu/matrix.h"
#include "hyperfast/predict.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

// Hands out pieces of one block of memory; without memory it measures how much they take.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// What all tiles read. Hidden layers are numbered from 1, as x_l and z_l are; `last` is the one behind them.
template <class M>
struct PredictPlan {
  using A = typename M::Acc;
  using Word = typename M::Word;

  // Products of bfloat16 take half as long, and as long as before to add what a tile gives to the sums of all.
  static constexpr int64_t kTileRows = M::kDepth == 1 ? 64 : 128;
  static constexpr int64_t kChunkRows = 512, kMostChunks = 32, kMostChunkBytes = 256 << 20;

  const PredictParams& p;
  const int last;                     // number of hidden layers
  int64_t ld, out_ld;                 // elements between rows
  int64_t widths[kMaxTables] = {};    // of the embeddings, padded
  bool factorised[kMaxTables] = {};   // else the rows of the embedding are multiplied tile by tile
  A* embedding[kMaxTables] = {};      // of factorised tables, rows padded
  A* first_weight[kMaxTables] = {};   // packed W_1j^T
  A* table[kMaxTables] = {};          // T_j
  A* bias[kMaxPredictLayers] = {};    // padded
  Word* forward[kMaxPredictLayers] = {};
  Word* backward[kMaxPredictLayers] = {};
  A* last_forward = nullptr;
  A* last_backward = nullptr;

  explicit PredictPlan(const PredictParams& params) : p(params), last(params.layers - 1) {
    ld = padded(p.hidden);
    out_ld = round_up(p.outputs, kLanes<A>);
    for (int j = 0; j < p.tables; ++j) {
      widths[j] = padded(p.table_width[j]);
      factorised[j] = 2 * p.table_rows[j] <= p.count;
    }
  }

  static int64_t padded(int64_t columns) {
    const int64_t unit = M::kDepth * kLanes<A>;
    const int64_t length = round_up(columns, unit);
    // Rows that are a multiple of 1 KiB apart share few sets of a cache.
    return length * int64_t(sizeof(A)) % 1024 ? length : length + unit;
  }

  bool differentiates() const { return p.gradient; }
  int64_t hidden_steps() const { return (p.hidden + M::kDepth - 1) / M::kDepth; }
  const A* weight(int layer) const { return static_cast<const A*>(p.weight[layer - 1]); }

  void take(Arena& arena) {
    for (int j = 0; j < p.tables; ++j) {
      const bool shared = !p.concat && j > 0;
      first_weight[j] = shared ? first_weight[0] : arena.take<A>(packed_size<Exact<A>>(p.table_width[j], p.hidden));
      if (!factorised[j]) continue;
      table[j] = arena.take<A>(p.table_rows[j] * ld);
      if (differentiates()) embedding[j] = arena.take<A>(p.table_rows[j] * widths[j]);
    }
    for (int layer = 1; layer <= last + 1; ++layer) bias[layer] = arena.take<A>(layer > last ? out_ld : ld);
    for (int layer = 2; layer <= last; ++layer) {
      forward[layer] = arena.take<Word>(packed_size<M>(p.hidden, p.hidden));
      if (differentiates()) backward[layer] = arena.take<Word>(packed_size<M>(p.hidden, p.hidden));
    }
    last_forward = arena.take<A>(packed_size<Exact<A>>(p.hidden, p.outputs));
    if (differentiates()) last_backward = arena.take<A>(packed_size<Exact<A>>(p.outputs, p.hidden));
  }
};

// Sums over rows of a chunk: those of every tile of it are added here.
template <class A>
struct PartialGradient {
  A* first[kMaxTables] = {};  // dT_j [n_j, ld], or dW_1j [H, widths_j]
  A* weight[kMaxPredictLayers] = {};
  A* bias[kMaxPredictLayers] = {};

  template <class M>
  void take(Arena& arena, const PredictPlan<M>& plan) {
    const PredictParams& p = plan.p;
    for (int j = 0; j < p.tables; ++j)
      first[j] = arena.take<A>(plan.factorised[j] ? p.table_rows[j] * plan.ld : p.hidden * plan.widths[j]);
    // With words of two numbers products have whole blocks of rows.
    const int64_t rows = M::kTwoOrders ? round_up(p.hidden, kBlockRows) : p.hidden;
    for (int layer = 2; layer <= plan.last; ++layer) weight[layer] = arena.take<A>(rows * plan.ld);
    weight[plan.last + 1] = arena.take<A>(p.outputs * plan.ld);
    for (int layer = 1; layer <= plan.last; ++layer) bias[layer] = arena.take<A>(plan.ld);
    bias[plan.last + 1] = arena.take<A>(plan.out_ld);
  }
};

template <class M>
class PredictTile {
  using A = typename M::Acc;
  using Word = typename M::Word;
  using V = typename M::V;
  using Plan = PredictPlan<M>;
  static constexpr int64_t kWidth = kLanes<A>, kRows = Plan::kTileRows;

 public:
  explicit PredictTile(const Plan& plan) : plan_(plan), p_(plan.p) {}

  // A thread's working memory.
  void take(Arena& arena) {
    wide_ = arena.take<A>(kRows * plan_.ld);
    out_ = arena.take<A>(kRows * plan_.out_ld);
    index_ = arena.take<int64_t>(kRows * p_.tables);
    source_ = arena.take<int64_t>(kRows);
    const int buffers = plan_.last == 1 ? 0 : plan_.differentiates() ? plan_.last : 2;
    for (int b = 0; b < buffers; ++b) {
      narrow_[b].along = arena.take<Word>(kRows * plan_.ld / M::kDepth);
      narrow_[b].across = M::kTwoOrders && plan_.differentiates()
                              ? arena.take<Word>(kRows * plan_.ld / M::kDepth)
                              : narrow_[b].along;
    }
    for (int j = 0; j < p_.tables; ++j)
      if (!plan_.factorised[j]) gathered_[j] = arena.take<A>(kRows * plan_.widths[j]);
  }

  // Rows `first` to `first + count`; false where an index is outside its table.
  bool run(int64_t first, int64_t count, PartialGradient<A>* partial, double* loss) {
    count_ = count;
    rows_ = round_up(count, kBlockRows);
    const bool valid = find(first);
    run_forward();
    if (p_.predictions) {
      write(static_cast<A*>(p_.predictions) + first * p_.outputs);
      return valid;
    }
    find_gradient(first, loss);
    if (partial) run_backward(*partial);
    return valid;
  }

 private:
  Operand<Word> narrow(int layer) const { return narrow_[plan_.differentiates() ? layer - 1 : layer & 1]; }

  bool find(int64_t first) {
    bool valid = true;
    for (int64_t r = 0; r < rows_; ++r) {
      // Rows that only fill the last block repeat one that is there; their gradient is zero.
      const int64_t at = first + (r < count_ ? r : 0);
      int64_t row = p_.rows ? p_.rows[at] : at;
      if (uint64_t(row) >= uint64_t(p_.kernels)) valid = false, row = 0;
      source_[r] = row;
      for (int j = 0; j < p_.tables; ++j) {
        const int64_t place = row * p_.tables + j;
        int64_t index = p_.long_indices ? static_cast<const int64_t*>(p_.indices)[place]
                                        : static_cast<const int32_t*>(p_.indices)[place];
        if (uint64_t(index) >= uint64_t(p_.table_rows[j])) valid = false, index = 0;
        index_[r * p_.tables + j] = index;
      }
    }
    return valid;
  }

  HF_INLINE V activate(V z) const {
    const V low = p_.slope != 0 ? z * A(p_.slope) : V{};
    return z < A(0) ? low : z;
  }

  // The slope is known from the activation: both have the sign of the pre-activation.
  HF_INLINE V through_activation(V gradient, V x) const {
    const V low = p_.slope != 0 ? gradient * A(p_.slope) : V{};
    return x > A(0) ? gradient : low;
  }

  HF_INLINE V load(const A* x) const { return load_as<A, kWidth>(x); }

  void run_forward() {
    first_layer();
    for (int layer = 2; layer <= plan_.last; ++layer) {
      const A* bias = plan_.bias[layer];
      multiply<M>(rows_, p_.hidden, plan_.hidden_steps(), narrow(layer - 1).along, plan_.ld / M::kDepth, 1,
                  {plan_.forward[layer]}, [&](int64_t row, int64_t column, auto& sum) {
                    each(sum, [&](int, int v, V& x) { x = activate(x + load(bias + column + v * kWidth)); });
                    store(layer, row, column, sum, layer == plan_.last);
                  });
    }
    const A* bias = plan_.bias[plan_.last + 1];
    multiply<Exact<A>>(rows_, p_.outputs, p_.hidden, wide_, plan_.ld, 1, {plan_.last_forward},
                       [&](int64_t row, int64_t column, auto& sum) {
                         each(sum, [&](int, int v, V& x) { x += load(bias + column + v * kWidth); });
                         Exact<A>::store({out_, nullptr}, plan_.out_ld, row, column, sum, false);
                       });
  }

  void first_layer() {
    for (int64_t r = 0; r < rows_; ++r) {
      const A* parts[kMaxTables];
      int count = 0;
      for (int j = 0; j < p_.tables; ++j)
        if (plan_.factorised[j]) parts[count++] = plan_.table[j] + index_[r * p_.tables + j] * plan_.ld;
      for (int64_t column = 0; column < p_.hidden; column += kWidth) {
        V z = load(plan_.bias[1] + column);
        for (int j = 0; j < count; ++j) z += load(parts[j] + column);
        store_as<A, kWidth>(wide_ + r * plan_.ld + column, z);
      }
    }
    for (int j = 0; j < p_.tables; ++j) {
      if (plan_.factorised[j]) continue;
      const int64_t width = p_.table_width[j];
      const A* embedding = static_cast<const A*>(p_.embedding[j]);
      for (int64_t r = 0; r < rows_; ++r) {
        A* to = gathered_[j] + r * plan_.widths[j];
        std::memcpy(to, embedding + index_[r * p_.tables + j] * width, width * sizeof(A));
        for (int64_t column = width; column < plan_.widths[j]; ++column) to[column] = 0;
      }
      multiply<Exact<A>>(rows_, p_.hidden, width, gathered_[j], plan_.widths[j], 1, {plan_.first_weight[j]},
                         AddTo<A>{wide_, plan_.ld});
    }
    for (int64_t r = 0; r < rows_; r += 2)
      for (int64_t column = 0; column < p_.hidden; column += kWidth) {
        V x[2][1];
        for (int i = 0; i < 2; ++i) x[i][0] = activate(load(wide_ + (r + i) * plan_.ld + column));
        store(1, r, column, x, plan_.last == 1);
      }
  }

  template <int R, int N>
  HF_INLINE void store(int layer, int64_t row, int64_t column, V (&x)[R][N], bool wide) {
    if (wide) Exact<A>::store({wide_, nullptr}, plan_.ld, row, column, x, false);
    else if constexpr (R % M::kDepth == 0)
      M::store(narrow(layer), plan_.ld, row, column, x, plan_.differentiates());
  }

  template <int R, int N, class F>
  HF_INLINE static void each(V (&x)[R][N], F f) {
    HF_UNROLL
    for (int i = 0; i < R; ++i) {
      HF_UNROLL
      for (int v = 0; v < N; ++v) f(i, v, x[i][v]);
    }
  }

  void write(A* predictions) const {
    for (int64_t r = 0; r < count_; ++r)
      for (int64_t k = 0; k < p_.outputs; ++k) predictions[r * p_.outputs + k] = out_[r * plan_.out_ld + k];
  }

  // Predictions become their gradient.
  void find_gradient(int64_t first, double* loss) {
    const int64_t outputs = p_.outputs;
    double total = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      A* out = out_ + r * plan_.out_ld;
      if (r >= count_) {
        for (int64_t k = 0; k < outputs; ++k) out[k] = 0;
      } else if (p_.grad) {
        const A* grad = static_cast<const A*>(p_.grad) + (first + r) * outputs;
        for (int64_t k = 0; k < outputs; ++k) out[k] = grad[k];
      } else {
        const A* target = static_cast<const A*>(p_.targets) + source_[r] * outputs;
        const A* weight = static_cast<const A*>(p_.element_weights);
        if (weight) weight += source_[r] * outputs;
        for (int64_t k = 0; k < outputs; ++k) {
          const A difference = out[k] - target[k], weighted = weight ? weight[k] * difference : difference;
          total += double(weighted) * double(difference);
          out[k] = 2 * weighted;
        }
      }
    }
    *loss += total;
  }

  void run_backward(PartialGradient<A>& partial) {
    const int last = plan_.last;
    for (int64_t column = 0; column < p_.outputs; column += kWidth) {
      V total = {};  // of the tile: one running sum over all rows would lose digits
      for (int64_t r = 0; r < rows_; ++r) total += load(out_ + r * plan_.out_ld + column);
      A* to = partial.bias[last + 1] + column;
      store_as<A, kWidth>(to, load(to) + total);
    }
    multiply<Exact<A>>(p_.outputs, p_.hidden, rows_, out_, 1, plan_.out_ld, {wide_, plan_.ld},
                       AddTo<A>{partial.weight[last + 1], plan_.ld});
    multiply<Exact<A>>(rows_, p_.hidden, p_.outputs, out_, plan_.out_ld, 1, {plan_.last_backward},
                       [&](int64_t row, int64_t column, auto& sum) {
                         each(sum, [&](int i, int v, V& g) {
                           g = through_activation(g, load(wide_ + (row + i) * plan_.ld + column + v * kWidth));
                         });
                         add_rows(partial.bias[last] + column, sum);
                         store(last, row, column, sum, last == 1);
                       });
    for (int layer = last; layer >= 2; --layer) {
      const Operand<Word> dz = narrow(layer), x = narrow(layer - 1);
      const int64_t outputs = M::kTwoOrders ? round_up(p_.hidden, kBlockRows) : p_.hidden;
      multiply<M>(outputs, p_.hidden, rows_ / M::kDepth, dz.across, 1, plan_.ld, {x.across, plan_.ld},
                  AddTo<A>{partial.weight[layer], plan_.ld});
      multiply<M>(rows_, p_.hidden, plan_.hidden_steps(), dz.along, plan_.ld / M::kDepth, 1, {plan_.backward[layer]},
                  [&](int64_t row, int64_t column, auto& sum) {
                    each(sum, [&](int i, int v, V& g) {
                      g = through_activation(g, M::load(x, plan_.ld, row + i, column + v * kWidth));
                    });
                    add_rows(partial.bias[layer - 1] + column, sum);
                    store(layer - 1, row, column, sum, layer == 2);
                  });
    }
    first_layer_backward(partial);
  }

  template <int R, int N>
  HF_INLINE static void add_rows(A* to, const V (&x)[R][N]) {
    HF_UNROLL
    for (int v = 0; v < N; ++v) {
      V total = x[0][v];
      HF_UNROLL
      for (int i = 1; i < R; ++i) total += x[i][v];
      store_as<A, kWidth>(to + v * kWidth, load_as<A, kWidth>(to + v * kWidth) + total);
    }
  }

  void first_layer_backward(PartialGradient<A>& partial) {
    for (int j = 0; j < p_.tables; ++j) {
      if (!plan_.factorised[j]) {
        multiply<Exact<A>>(p_.hidden, p_.table_width[j], rows_, wide_, 1, plan_.ld, {gathered_[j], plan_.widths[j]},
                           AddTo<A>{partial.first[j], plan_.widths[j]});
        continue;
      }
      for (int64_t r = 0; r < count_; ++r) {
        A* to = partial.first[j] + index_[r * p_.tables + j] * plan_.ld;
        const A* from = wide_ + r * plan_.ld;
        for (int64_t column = 0; column < p_.hidden; column += kWidth)
          store_as<A, kWidth>(to + column, load(to + column) + load(from + column));
      }
    }
  }

  const Plan& plan_;
  const PredictParams& p_;
  int64_t count_ = 0, rows_ = 0;
  A* wide_ = nullptr;                          // the layer that is not rounded: the last, and dz_1
  A* out_ = nullptr;                           // predictions, then their gradient
  A* gathered_[kMaxTables] = {};               // rows of embeddings that are not factorised
  int64_t *index_ = nullptr, *source_ = nullptr;
  Operand<Word> narrow_[kMaxPredictLayers] = {};  // x_l, and in the backward pass dz_l in its place
};

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
