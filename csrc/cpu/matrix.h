// Matrix products of small matrices that stay in the caches, by blocks of registers.
//
// A multiplier says what the operands are made of. Its Word is what one lane multiplies in one step: a number, or with
// bfloat16 two of them that are adjacent in the summed direction (kDepth). A block is kBlockRows x kBlockVectors
// accumulators; per step it broadcasts a word of each row of A and reads the vectors of one row of B.
#pragma once
#include <type_traits>

#include "cpu/group.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

// As many accumulators as leave registers for the operands.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64, kBlockRows = 8;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32, kBlockRows = 4;
#else
constexpr int kRegisterBytes = 16, kBlockRows = 4;
#endif
constexpr int kBlockVectors = 3;

template <class A>
constexpr int kLanes = kRegisterBytes / sizeof(A);

HF_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A tile of activations or of their gradients, in the order of both kinds of products that read it. `along` has a row
// per row, for sums over columns; `across` has words that run over rows, for sums over rows.
template <class Word>
struct Operand {
  Word* along;
  Word* across;
};

template <class A>
struct Exact {
  using Acc = A;
  using Word = A;
  using V = Vector<A, kLanes<A>>;
  using Words = V;
  static constexpr int kDepth = 1;
  static constexpr bool kTwoOrders = false;

  HF_INLINE static Word word(const A (&x)[1]) { return x[0]; }
  HF_INLINE static V multiply_add(V sum, Word a, const Words& b) { return sum + a * b; }
  HF_INLINE static V load(Operand<Word> x, int64_t ld, int64_t row, int64_t column) {
    return load_as<A, kLanes<A>>(x.along + row * ld + column);
  }
  template <int R, int N>
  HF_INLINE static void store(Operand<Word> to, int64_t ld, int64_t row, int64_t column, const V (&x)[R][N], bool) {
    HF_UNROLL
    for (int i = 0; i < R; ++i) {
      HF_UNROLL
      for (int v = 0; v < N; ++v) store_as<A, kLanes<A>>(to.along + (row + i) * ld + column + v * kLanes<A>, x[i][v]);
    }
  }
};

// float32 products of operands that were rounded to bfloat16, for processors without such products.
struct Rounded : Exact<float> {
  HF_INLINE static float round(float x) { return float(BFloat16(x)); }
  HF_INLINE static V round(V x) {
    Vector<uint32_t, kLanes<float>> bits;
    std::memcpy(&bits, &x, sizeof(bits));
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    V rounded;
    std::memcpy(&rounded, &bits, sizeof(bits));
    return x == x ? rounded : x;
  }
  HF_INLINE static Word word(const float (&x)[1]) { return round(x[0]); }
  template <int R, int N>
  HF_INLINE static void store(Operand<Word> to, int64_t ld, int64_t row, int64_t column, const V (&x)[R][N], bool) {
    V rounded[R][N];
    HF_UNROLL
    for (int i = 0; i < R; ++i) {
      HF_UNROLL
      for (int v = 0; v < N; ++v) rounded[i][v] = round(x[i][v]);
    }
    Exact<float>::store(to, ld, row, column, rounded, false);
  }
};

#if defined(__AVX512BF16__)
// bfloat16 products, two per lane and step, summed in float32.
struct Pairs {
  using Acc = float;
  using Word = uint32_t;
  using V = Vector<float, 16>;
  using Words = Vector<uint32_t, 16>;
  static constexpr int kDepth = 2;
  static constexpr bool kTwoOrders = true;

  HF_INLINE static Word word(const float (&x)[2]) {
    return uint32_t(BFloat16(x[0]).bits) | uint32_t(BFloat16(x[1]).bits) << 16;
  }
  HF_INLINE static V multiply_add(V sum, Word a, const Words& b) {
    return V(_mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_epi32(int(a))), __m512bh(b)));
  }
  HF_INLINE static V load(Operand<Word> x, int64_t ld, int64_t row, int64_t column) {
    return load_as<float, 16>(reinterpret_cast<const BFloat16*>(x.along) + row * ld + column);
  }
  template <int R, int N>
  HF_INLINE static void store(Operand<Word> to, int64_t ld, int64_t row, int64_t column, const V (&x)[R][N],
                              bool across) {
    static_assert(R % 2 == 0, "words run over pairs of rows");
    HF_UNROLL
    for (int i = 0; i < R; i += 2) {
      HF_UNROLL
      for (int v = 0; v < N; ++v) {
        const int64_t at = column + v * 16;
        const __m256i even = __m256i(_mm512_cvtneps_pbh(__m512(x[i][v])));
        const __m256i odd = __m256i(_mm512_cvtneps_pbh(__m512(x[i + 1][v])));
        uint16_t* along = reinterpret_cast<uint16_t*>(to.along) + (row + i) * ld + at;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(along), even);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(along + ld), odd);
        if (across) {
          const __m512i both =
              _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
          _mm512_storeu_si512(to.across + (row + i) / 2 * ld + at, both);
        }
      }
    }
  }
};
#endif

// B, `steps` words deep: either packed by pack(), or rows of words `stride` apart.
template <class Word>
struct Right {
  const Word* data;
  int64_t stride = 0;  // 0: packed
};

// Words of a matrix product's B in the order in which blocks read them: panels of up to kBlockVectors vectors, each
// with all steps. value(k, n) is B[k, n]; outside `depth` x `columns` it is taken as 0.
template <class M, class F>
void pack_panel(typename M::Word* to, int64_t panel, int64_t depth, int64_t columns, F value) {
  using A = typename M::Acc;
  constexpr int64_t kWidth = kLanes<A>;
  const int64_t steps = (depth + M::kDepth - 1) / M::kDepth, vectors = (columns + kWidth - 1) / kWidth;
  const int64_t first = panel * kBlockVectors;
  const int64_t width = (vectors - first < kBlockVectors ? vectors - first : kBlockVectors) * kWidth;
  to += first * kWidth * steps;
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t n = first * kWidth + lane;
      A x[M::kDepth];
      for (int d = 0; d < M::kDepth; ++d) {
        const int64_t k = step * M::kDepth + d;
        x[d] = k < depth && n < columns ? value(k, n) : A(0);
      }
      to[step * width + lane] = M::word(x);
    }
}

template <class M>
HF_INLINE int64_t panel_count(int64_t columns) {
  constexpr int64_t kWidth = kBlockVectors * kLanes<typename M::Acc>;
  return (columns + kWidth - 1) / kWidth;
}

// Words of a packed B.
template <class M>
HF_INLINE int64_t packed_size(int64_t depth, int64_t columns) {
  return (depth + M::kDepth - 1) / M::kDepth * round_up(columns, kLanes<typename M::Acc>);
}

// sum[i][v] += the products of row i of A and vector v of B.
template <class M, int R, int N>
HF_INLINE void multiply_steps(int64_t steps, const typename M::Word* a, int64_t a_row, int64_t a_step,
                              const typename M::Word* b, int64_t b_step, typename M::V (&sum)[R][N]) {
#pragma GCC unroll 2
  for (int64_t step = 0; step < steps; ++step) {
    typename M::Words right[N];
    HF_UNROLL
    for (int v = 0; v < N; ++v)
      right[v] = *reinterpret_cast<const typename M::Words*>(b + v * kLanes<typename M::Acc>);
    HF_UNROLL
    for (int i = 0; i < R; ++i) {
      const typename M::Word left = a[i * a_row];
      HF_UNROLL
      for (int v = 0; v < N; ++v) sum[i][v] = M::multiply_add(sum[i][v], left, right[v]);
    }
    a += a_step;
    b += b_step;
  }
}

// The same behind a call: with its surroundings in scope, 16 registers are too few for the sums.
template <class M, int R, int N>
__attribute__((noinline)) void multiply_apart(int64_t steps, const typename M::Word* a, int64_t a_row, int64_t a_step,
                                              const typename M::Word* b, int64_t b_step, typename M::V (&found)[R][N]) {
  typename M::V sum[R][N] = {};
  multiply_steps<M>(steps, a, a_row, a_step, b, b_step, sum);
  HF_UNROLL
  for (int i = 0; i < R; ++i) {
    HF_UNROLL
    for (int v = 0; v < N; ++v) found[i][v] = sum[i][v];
  }
}

template <class M, int R, int N, class F>
HF_INLINE void multiply_block(int64_t steps, const typename M::Word* a, int64_t a_row, int64_t a_step,
                              const typename M::Word* b, int64_t b_step, F finish) {
  typename M::V sum[R][N] = {};
#if defined(__AVX512F__)
  multiply_steps<M>(steps, a, a_row, a_step, b, b_step, sum);
#else
  multiply_apart<M>(steps, a, a_row, a_step, b, b_step, sum);
#endif
  finish(sum);
}

template <class M, int N, class F>
HF_INLINE void multiply_panel(int64_t rows, int64_t first, int64_t steps, const typename M::Word* a, int64_t a_row,
                              int64_t a_step, Right<typename M::Word> b, F& finish) {
  constexpr int kWidth = kLanes<typename M::Acc>;
  const typename M::Word* panel = b.data + first * kWidth * (b.stride ? 1 : steps);
  const int64_t b_step = b.stride ? b.stride : N * kWidth;
  int64_t row = 0;
  for (; row + kBlockRows <= rows; row += kBlockRows)
    multiply_block<M, kBlockRows, N>(steps, a + row * a_row, a_row, a_step, panel, b_step,
                                     [&](auto& sum) { finish(row, first * kWidth, sum); });
  if constexpr (M::kDepth == 1)
    for (; row < rows; ++row)
      multiply_block<M, 1, N>(steps, a + row * a_row, a_row, a_step, panel, b_step,
                              [&](auto& sum) { finish(row, first * kWidth, sum); });
}

// finish(row, column, sums) for every block of A B, with A[r, k] = a[r a_row + k a_step]. With words of more than one
// number `rows` are whole blocks.
template <class M, class F>
HF_INLINE void multiply(int64_t rows, int64_t columns, int64_t steps, const typename M::Word* a, int64_t a_row,
                        int64_t a_step, Right<typename M::Word> b, F finish) {
  constexpr int kWidth = kLanes<typename M::Acc>;
  const int64_t vectors = (columns + kWidth - 1) / kWidth;
  int64_t first = 0;
  for (; first + kBlockVectors <= vectors; first += kBlockVectors)
    multiply_panel<M, kBlockVectors>(rows, first, steps, a, a_row, a_step, b, finish);
  if (vectors - first == 2) multiply_panel<M, 2>(rows, first, steps, a, a_row, a_step, b, finish);
  if (vectors - first == 1) multiply_panel<M, 1>(rows, first, steps, a, a_row, a_step, b, finish);
}

// to[row + i, column + v] += sums, rows `ld` apart.
template <class A>
struct AddTo {
  A* to;
  int64_t ld;

  template <class V, int R, int N>
  HF_INLINE void operator()(int64_t row, int64_t column, V (&sum)[R][N]) const {
    HF_UNROLL
    for (int i = 0; i < R; ++i) {
      HF_UNROLL
      for (int v = 0; v < N; ++v) {
        A* at = to + (row + i) * ld + column + v * kLanes<A>;
        store_as<A, kLanes<A>>(at, load_as<A, kLanes<A>>(at) + sum[i][v]);
      }
    }
  }
};

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
