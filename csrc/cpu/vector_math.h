// SIMD vectors, and exp and log of them, which the C library has for single numbers only. Compiled once per
// instruction set.
//
// Polynomials are minimax in relative error (Remez), for (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2 and for
// (2 atanh(s) / s - 2) / s^2 over s^2, |s| <= (sqrt(2) - 1) / (sqrt(2) + 1).
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/portable.h"

#ifndef HYPERFAST_ISA
#define HYPERFAST_ISA baseline
#endif

namespace hyperfast {
namespace HYPERFAST_ISA {

template <class A, int N>
struct VectorOf {
  typedef A type __attribute__((vector_size(N * sizeof(A)), aligned(sizeof(A))));
};
template <class A>
struct VectorOf<A, 1> {
  typedef A type;
};
template <class A, int N>
using Vector = typename VectorOf<A, N>::type;

template <class A>
struct MathConstants;

// `shift` is large enough that adding it rounds to an integer, which then stands in the lowest bits of the sum.
// ln2_high times an exponent is exact; ln2_high + ln2_low is ln(2).
template <>
struct MathConstants<float> {
  using Bits = int32_t;
  using Word = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr Bits kHalfRoot = 0x3f3504f3;                                  // sqrt(1/2)
  static constexpr float kShift = 0x1.8p23f, kLowest = -104.f, kHighest = 89.f;  // of exp: 0 below, infinity above
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kExp[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239d4p-7f, 0x1.6a244cp-10f};
  static constexpr float kLog[] = {0x1.55557ap-1f, 0x1.995ebap-2f, 0x1.31e2f2p-2f};
};

template <>
struct MathConstants<double> {
  using Bits = int64_t;
  using Word = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr Bits kHalfRoot = 0x3fe6a09e667f3bcd;
  static constexpr double kShift = 0x1.8p52, kLowest = -746, kHighest = 710;
  static constexpr double kLn2High = 0x1.62e42fefa3p-1, kLn2Low = 0x1.3de6af278ece6p-42;
  static constexpr double kExp[] = {0x1.000000000000ap-1,  0x1.55555555554fap-3,  0x1.555555555088cp-5,
                                    0x1.1111111127b9bp-7,  0x1.6c16c184266bep-10, 0x1.a01a012a69d02p-13,
                                    0x1.a0199a16e5228p-16, 0x1.71df253a04c44p-19, 0x1.28ad689fad7fap-22,
                                    0x1.ad7f7b175464dp-26};
  static constexpr double kLog[] = {0x1.5555555555592p-1, 0x1.999999997fdb7p-2, 0x1.24924941f1295p-2,
                                    0x1.c71c52095abb5p-3, 0x1.74663ee8bc916p-3, 0x1.39a1bab2e7e3cp-3,
                                    0x1.2f056395f5a67p-3};
};

template <class To, class From>
HF_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// c[0] + c[1] x + c[2] x^2 ...
template <class A, int K, class V>
HF_INLINE V polynomial(const A (&c)[K], V x) {
  V sum = V{} + c[K - 1];
  HF_UNROLL
  for (int k = K - 2; k >= 0; --k) sum = sum * x + c[k];
  return sum;
}

// x 2^n for an integral |n| < 2 kBias; `shifted` is n + kShift. Rounds once, below the smallest normal number too.
template <class A, int N>
HF_INLINE Vector<A, N> scaled(Vector<A, N> x, Vector<A, N> n, Vector<A, N> shifted) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64) {
    Vector<A, N> result;
    if constexpr (std::is_same_v<A, float>) {
      const __m512 r = _mm512_maskz_scalef_ps(0xffff, same_bits<__m512>(x), same_bits<__m512>(n));
      std::memcpy(&result, &r, 64);
    } else {
      const __m512d r = _mm512_maskz_scalef_pd(0xff, same_bits<__m512d>(x), same_bits<__m512d>(n));
      std::memcpy(&result, &r, 64);
    }
    return result;
  }
#endif
  using C = MathConstants<A>;
  using Bits = Vector<typename C::Bits, N>;
  using Words = Vector<typename C::Word, N>;
  const A shift = C::kShift;
  const Words exponent = same_bits<Words>(shifted) - same_bits<typename C::Word>(shift);
  const Words half = same_bits<Words>(same_bits<Bits>(exponent) >> 1);
  return x * same_bits<Vector<A, N>>((half + C::kBias) << C::kMantissa) *
         same_bits<Vector<A, N>>((exponent - half + C::kBias) << C::kMantissa);
}

// x > y ? x : y and x < y ? x : y: one instruction, which the compiler does not find. (GCC 12 warns of the forms
// without a mask.)
template <class A, int N>
HF_INLINE Vector<A, N> larger_of(Vector<A, N> x, Vector<A, N> y) {
#if defined(__AVX512F__)
  if constexpr (N == 16 && std::is_same_v<A, float>)
    return same_bits<Vector<A, N>>(_mm512_maskz_max_ps(0xffff, same_bits<__m512>(x), same_bits<__m512>(y)));
  else if constexpr (N == 8 && std::is_same_v<A, double>)
    return same_bits<Vector<A, N>>(_mm512_maskz_max_pd(0xff, same_bits<__m512d>(x), same_bits<__m512d>(y)));
  else
#endif
    return x > y ? x : y;
}
template <class A, int N>
HF_INLINE Vector<A, N> smaller_of(Vector<A, N> x, Vector<A, N> y) {
#if defined(__AVX512F__)
  if constexpr (N == 16 && std::is_same_v<A, float>)
    return same_bits<Vector<A, N>>(_mm512_maskz_min_ps(0xffff, same_bits<__m512>(x), same_bits<__m512>(y)));
  else if constexpr (N == 8 && std::is_same_v<A, double>)
    return same_bits<Vector<A, N>>(_mm512_maskz_min_pd(0xff, same_bits<__m512d>(x), same_bits<__m512d>(y)));
  else
#endif
    return x < y ? x : y;
}

template <class A, int N>
HF_INLINE Vector<A, N> exp_of(Vector<A, N> x) {
  using C = MathConstants<A>;
  using V = Vector<A, N>;
  x = smaller_of<A, N>(V{} + C::kHighest, larger_of<A, N>(V{} + C::kLowest, x));  // a NaN stays
  const V shifted = x * A(1.4426950408889634) + C::kShift, n = shifted - C::kShift;
  const V r = (x - n * C::kLn2High) - n * C::kLn2Low;
  const V y = r * r * polynomial(C::kExp, r) + r + A(1);
  return scaled<A, N>(y, n, shifted);
}

// Of a positive normal number; infinity and NaN stay what they are.
template <class A, int N>
HF_INLINE Vector<A, N> log_of(Vector<A, N> x) {
  using C = MathConstants<A>;
  using V = Vector<A, N>;
  using Bits = Vector<typename C::Bits, N>;
  using Words = Vector<typename C::Word, N>;
  const A shift = C::kShift, infinity = std::numeric_limits<A>::infinity();
  // x = 2^n (1 + f), 1 + f between sqrt(1/2) and sqrt(2); log(1 + f) = 2 atanh(f / (2 + f)).
  const Words exponent = same_bits<Words>((same_bits<Bits>(x) - C::kHalfRoot) >> C::kMantissa);
  const V f = same_bits<V>(same_bits<Words>(x) - (exponent << C::kMantissa)) - A(1);
  const V n = same_bits<V>(exponent + same_bits<typename C::Word>(shift)) - shift;
  const V s = f / (f + A(2)), w = s * s, half = f * f * A(0.5);
  const V tail = s * (half + w * polynomial(C::kLog, w)) + n * C::kLn2Low;
  const V y = n * C::kLn2High - ((half - tail) - f);
  return x < infinity ? y : x;
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
