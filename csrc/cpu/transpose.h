// Tiles of a matrix with its rows and columns exchanged, by registers.
#pragma once
#include <utility>

#include "cpu/matrix.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

// Elements between rows of a tile: an odd number of cache lines, so that a column of it uses all sets of a cache.
template <class A>
HF_INLINE int64_t spread(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(A);
  return (round_up(columns, kLine) / kLine | 1) * kLine;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HYPERFAST_SHUFFLES 1
#endif
#endif

#if defined(HYPERFAST_SHUFFLES)
// a and b, one element of each in turn: their lower halves, or their upper ones.
template <bool kUpper, class V, size_t... K>
HF_INLINE V interleave(V a, V b, std::index_sequence<K...>) {
  constexpr int kWidth = sizeof...(K);
  return __builtin_shufflevector(a, b, (int(K % 2) * kWidth + int(K / 2) + (kUpper ? kWidth / 2 : 0))...);
}
#endif

// to[k ld + r] = from[r stride + k], one register wide and high.
template <class A, class T>
HF_INLINE void transpose_block(A* to, int64_t ld, const T* from, int64_t stride) {
  constexpr int kWidth = kLanes<A>;
#if defined(HYPERFAST_SHUFFLES)
  using V = Vector<A, kWidth>;
  V rows[kWidth], next[kWidth];
  for (int r = 0; r < kWidth; ++r) rows[r] = load_as<A, kWidth>(from + r * stride);
  // Every round rotates the bits of an element's place, (row, column), by one.
  for (int round = 1; round < kWidth; round *= 2) {
    HF_UNROLL
    for (int i = 0; i < kWidth / 2; ++i) {
      const V a = rows[i], b = rows[i + kWidth / 2];
      next[2 * i] = interleave<false>(a, b, std::make_index_sequence<kWidth>());
      next[2 * i + 1] = interleave<true>(a, b, std::make_index_sequence<kWidth>());
    }
    for (int r = 0; r < kWidth; ++r) rows[r] = next[r];
  }
  for (int k = 0; k < kWidth; ++k) store_as<A, kWidth>(to + k * ld, rows[k]);
#else
  for (int k = 0; k < kWidth; ++k)
    for (int r = 0; r < kWidth; ++r) to[k * ld + r] = A(from[r * stride + k]);
#endif
}

// to[k ld + r] = from[r stride + k] for k < columns and r < rows, and 0 up to a whole cache line. The columns that are
// `ahead` of these are asked for.
template <class A, class T>
void transpose(A* to, int64_t ld, const T* from, int64_t rows, int64_t columns, int64_t stride, int64_t ahead) {
  constexpr int64_t kWidth = kLanes<A>;
  int64_t row = 0;
  for (; row + kWidth <= rows; row += kWidth) {
    const T* source = from + row * stride;
    int64_t k = 0;
    for (; k + kWidth <= columns; k += kWidth) {
      for (int64_t r = 0; r < kWidth; ++r) __builtin_prefetch(source + r * stride + k + ahead);
      transpose_block(to + k * ld + row, ld, source + k, stride);
    }
    for (; k < columns; ++k)
      for (int64_t r = 0; r < kWidth; ++r) to[k * ld + row + r] = A(source[r * stride + k]);
  }
  const int64_t padded = round_up(rows, 64 / int64_t(sizeof(A)));
  for (int64_t k = 0; k < columns; ++k)
    for (int64_t r = row; r < padded; ++r) to[k * ld + r] = r < rows ? A(from[r * stride + k]) : A(0);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
