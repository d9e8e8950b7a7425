// The processor's Block: one thread, whose lanes are one SIMD register. Compiled once per instruction set.
//
// The interface that the algorithms in common/ are written over:
//   Block  for_each(n, f)            f(k) for every k < n, in any order
//          partition(begin, end, f)  f(k, lanes) for every k, each on one group of lanes
//          sum(n, f)                 sum of f(i, lanes) over vectors i that cover n, in a fixed order, known to all
//          once(f)                   f() by one of the threads
//          sync()                    what was written before is seen after
//          lane_groups()             how many groups partition() uses at once
//   Lanes  for_each(n, f)            f(i) for vectors i of positions that cover n
//          sum(n, f)                 sum of f(i) over them
//          sums(n, totals, f)        several sums at once, totals[r] of f(r, i)
//          for_each_padded(n, f)     for_each() of whole vectors: beyond n, load() is -infinity, store() does nothing
//          add_padded(n, totals, f)  totals[r] of what f(i, total) adds to total[r]
//          maximum_padded(n, a, f)   the largest of a and f(i)
//          accumulate(n, totals, f)  the same where f(i, add) finds them together, and calls add(r, vector) for each
//          largest(n, f)             the largest number of f(i)
//          load / store              one vector, converted to the accumulator type
//          load_in_order             load() from memory that is read from end to end
//          prefetch                  asks for a vector that will be read later
//          stream                    store() of what will not be read soon
//          weighted(w, x)            w x, and 0 where w is 0, whatever x is
//          add_at(v, i, k, a)        v with a added to the element at position k, if it is one of i
//          load_bits                 one bit per position, as 0 or 1; a vector begins at a multiple of its width
//          abs / sign / sqrt / exp   of one vector
//          log                       of one vector of positive normal numbers
//          relu / step               the positive part, and 1 where there is one, else 0
//          max                       of two vectors, element by element
//          once(f)                   f() by one of the lanes
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/portable.h"
#include "cpu/vector_math.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    // Round to nearest even; a NaN keeps a mantissa bit.
    bits = x != x ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
};

// IEEE half precision by integer arithmetic where the processor has no instruction for it.
struct Float16 {
  uint16_t bits;
  Float16() = default;
#if defined(__F16C__)
  explicit Float16(float x) : bits(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)) {}
  explicit operator float() const { return _cvtsh_ss(bits); }
#else
  explicit Float16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint32_t sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      bits = uint16_t(sign | 0x7e00);
    } else if (magnitude >= 0x477ff000) {  // rounds to infinity
      bits = uint16_t(sign | 0x7c00);
    } else if (magnitude >= 0x38800000) {  // normal: round to nearest even
      bits = uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
    } else {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
      float small;
      std::memcpy(&small, &magnitude, 4);
      small += 0.5f;
      std::memcpy(&u, &small, 4);
      bits = uint16_t(sign | (u - 0x3f000000));
    }
  }
  explicit operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    float x;
    if (rest >= 0x7c00) {
      const uint32_t u = sign | 0x7f800000 | (rest & 0x3ff) << 13;
      std::memcpy(&x, &u, 4);
    } else if (rest >= 0x400) {
      const uint32_t u = sign | ((rest << 13) + 0x38000000);
      std::memcpy(&x, &u, 4);
    } else {
      x = float(rest) * 5.9604644775390625e-8f;
      if (sign) x = -x;
    }
    return x;
  }
#endif
};

// `width` consecutive positions from `at` on.
template <int N>
struct Positions {
  static constexpr int width = N;
  int64_t at;
};

// A vector at the end of a row: there are only the first `count` of its positions.
template <int N>
struct LastPositions {
  static constexpr int width = N;
  int64_t at;
  int count;
};

template <class A, int N>
struct Halves {
  Vector<A, N / 2> low, high;
};

// The whole vector is copied: one whose parts are read by address stays in memory all its life, accumulators too.
template <class A, int N>
HF_INLINE Halves<A, N> halves(Vector<A, N> v) {
  return same_bits<Halves<A, N>>(v);
}

template <class A, int N>
HF_INLINE A add_up(Vector<A, N> v) {
  if constexpr (N == 1) {
    return v;
  } else {
    const auto half = halves<A, N>(v);
    return add_up<A, N / 2>(half.low + half.high);
  }
}

template <class A, int N>
HF_INLINE A largest_of(Vector<A, N> v) {
  if constexpr (N == 1) {
    return v;
  } else {
    const auto half = halves<A, N>(v);
    return largest_of<A, N / 2>(larger_of<A, N / 2>(half.low, half.high));
  }
}

template <class A, int N, class T>
HF_INLINE Vector<A, N> load_as(const T* p) {
  Vector<A, N> v;
  if constexpr (std::is_same_v<T, A>) {
    // Not memcpy: as far as the compiler knows that could change anything, and it would reload every captured pointer.
    v = *reinterpret_cast<const Vector<A, N>*>(p);
  } else if constexpr (N == 1) {
    v = A(*p);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    Vector<uint16_t, N> half;
    std::memcpy(&half, p, sizeof(half));
    const Vector<uint32_t, N> bits = __builtin_convertvector(half, Vector<uint32_t, N>) << 16;
    std::memcpy(&v, &bits, sizeof(v));
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<T, Float16> && N % 8 == 0) {
    for (int k = 0; k < N; k += 8) {
      const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k)));
      std::memcpy(reinterpret_cast<char*>(&v) + 4 * k, &part, 32);
    }
#endif
  } else {
    A values[N];
    for (int k = 0; k < N; ++k) values[k] = A(p[k]);
    std::memcpy(&v, values, sizeof(v));
  }
  return v;
}

template <class A, int N, class T>
HF_INLINE void store_as(T* p, Vector<A, N> v) {
  if constexpr (std::is_same_v<T, A>) {
    *reinterpret_cast<Vector<A, N>*>(p) = v;
  } else if constexpr (N == 1) {
    *p = T(v);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    // As BFloat16 rounds.
    Vector<uint32_t, N> bits;
    std::memcpy(&bits, &v, sizeof(bits));
    const Vector<uint32_t, N> high = bits >> 16, rounded = (bits + 0x7fff + (high & 1)) >> 16;
    const Vector<uint16_t, N> half = __builtin_convertvector(v != v ? high | 0x40 : rounded, Vector<uint16_t, N>);
    std::memcpy(p, &half, sizeof(half));
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<T, Float16> && N % 8 == 0) {
    for (int k = 0; k < N; k += 8) {
      __m256 part;
      std::memcpy(&part, reinterpret_cast<const char*>(&v) + 4 * k, 32);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + k), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
  } else {
    for (int k = 0; k < N; ++k) p[k] = T(v[k]);
  }
}

// Past the caches: a gradient as large as the head would only push out what is still needed, and an ordinary store
// reads the line first.
template <class A, int N, class T>
HF_INLINE void stream_as(T* p, Vector<A, N> v) {
#if defined(__SSE2__)
  if constexpr (std::is_same_v<T, A> && N * sizeof(A) == 64) {
    if (reinterpret_cast<uintptr_t>(p) % 64 == 0) {
      const char* from = reinterpret_cast<const char*>(&v);
      char* to = reinterpret_cast<char*>(p);
#if defined(__AVX512F__)
      __m512i part;
      std::memcpy(&part, from, 64);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), part);
#elif defined(__AVX__)
      for (int k = 0; k < 64; k += 32) {
        __m256i part;
        std::memcpy(&part, from + k, 32);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + k), part);
      }
#else
      for (int k = 0; k < 64; k += 16) {
        __m128i part;
        std::memcpy(&part, from + k, 16);
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), part);
      }
#endif
      return;
    }
  }
#endif
  store_as<A, N>(p, v);
}

// Streamed stores are weakly ordered; one fence before the work is handed over.
HF_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// A thread's working memory. Not std::vector: the standard library's inline functions would be compiled here for one
// instruction set and might be linked for all.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<A*>(std::aligned_alloc(64, (size * sizeof(A) / 64 + 1) * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* data() const { return data_; }

 private:
  A* data_;
};

template <class A>
struct Lanes {
  using Acc = A;
  static constexpr int kWidth = 64 / sizeof(A), kPrefetchBytes = 512;

  template <class F>
  HF_INLINE void for_each(int64_t n, F f) const {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) f(Positions<kWidth>{i});
    for (; i < n; ++i) f(Positions<1>{i});
  }

  template <int R, class F>
  HF_INLINE void sums(int64_t n, A (&totals)[R], F f) const {
    Vector<A, kWidth> vectors[R] = {};
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth)
      for (int r = 0; r < R; ++r) vectors[r] += f(r, Positions<kWidth>{i});
    for (int r = 0; r < R; ++r) totals[r] = add_up<A, kWidth>(vectors[r]);
    for (; i < n; ++i)
      for (int r = 0; r < R; ++r) totals[r] += f(r, Positions<1>{i});
  }

  template <int R, class F>
  HF_INLINE void accumulate(int64_t n, A (&totals)[R], F f) const {
    Vector<A, kWidth> vectors[R] = {};
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth)
      f(Positions<kWidth>{i}, [&](int r, const Vector<A, kWidth>& v) { vectors[r] += v; });
    for (int r = 0; r < R; ++r) totals[r] = add_up<A, kWidth>(vectors[r]);
    for (; i < n; ++i) f(Positions<1>{i}, [&](int r, A v) { totals[r] += v; });
  }

  template <class F>
  HF_INLINE A sum(int64_t n, F f) const {
    A total[1];
    sums(n, total, [&](int, auto i) { return f(i); });
    return total[0];
  }

  template <class F>
  HF_INLINE void for_each_padded(int64_t n, F f) const {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) f(Positions<kWidth>{i});
    if (i < n) f(LastPositions<kWidth>{i, int(n - i)});
  }

  template <int R, class F>
  HF_INLINE void add_padded(int64_t n, A (&totals)[R], F f) const {
    Vector<A, kWidth> vectors[R] = {};
    for_each_padded(n, [&](auto i) { f(i, vectors); });
    for (int r = 0; r < R; ++r) totals[r] = add_up<A, kWidth>(vectors[r]);
  }

  template <class F>
  HF_INLINE A maximum_padded(int64_t n, A most, F f) const {
    Vector<A, kWidth> vector = Vector<A, kWidth>{} + most;
    for_each_padded(n, [&](auto i) {
      const auto x = f(i);
      vector = x > vector ? x : vector;
    });
    for (int k = 0; k < kWidth; ++k) most = vector[k] > most ? vector[k] : most;
    return most;
  }

  template <class F>
  HF_INLINE A largest(int64_t n, F f) const {
    A top = -std::numeric_limits<A>::infinity();
    int64_t i = 0;
    if (n >= kWidth) {
      auto vector = f(Positions<kWidth>{0});
      for (i = kWidth; i + kWidth <= n; i += kWidth) vector = max(vector, f(Positions<kWidth>{i}));
      top = largest_of<A, kWidth>(vector);
    }
    for (; i < n; ++i) top = max(top, f(Positions<1>{i}));
    return top;
  }

  template <class F>
  HF_INLINE void once(F f) const { f(); }

  HF_INLINE int64_t index() const { return 0; }

  template <class T, int N>
  HF_INLINE Vector<A, N> load(const T* p, Positions<N> i) const { return load_as<A, N>(p + i.at); }
  // Measured: asking for what comes some lines later doubles the bandwidth of a walk over rows of 4 KiB, where the
  // processor's own prefetching stops at the end of every page.
  template <class T, int N>
  HF_INLINE Vector<A, N> load_in_order(const T* p, Positions<N> i) const {
    if constexpr (N > 1) __builtin_prefetch(reinterpret_cast<const char*>(p + i.at) + kPrefetchBytes);
    return load(p, i);
  }
  template <class T, int N>
  HF_INLINE void prefetch(const T* p, Positions<N> i) const {
    if constexpr (N > 1) __builtin_prefetch(p + i.at, 0, 2);
  }
  template <class T, int N>
  HF_INLINE void store(T* p, Positions<N> i, Vector<A, N> v) const { store_as<A, N>(p + i.at, v); }
  template <class T, int N>
  HF_INLINE void stream(T* p, Positions<N> i, Vector<A, N> v) const { stream_as<A, N>(p + i.at, v); }
  template <class V>
  HF_INLINE V sqrt(V x) const {
    if constexpr (std::is_same_v<V, A>) {
      return std::sqrt(x);
    } else {
      for (size_t k = 0; k < sizeof(V) / sizeof(A); ++k) x[k] = std::sqrt(x[k]);  // one instruction: no errno is set
      return x;
    }
  }
  template <class V>
  HF_INLINE V exp(V x) const { return exp_of<A, sizeof(V) / sizeof(A)>(x); }
  template <class V>
  HF_INLINE V log(V x) const { return log_of<A, sizeof(V) / sizeof(A)>(x); }
  template <class V>
  HF_INLINE V abs(V x) const { return x < A(0) ? -x : x; }
  template <class V>
  HF_INLINE V sign(V x) const {
    const V one = V{} + A(1), none = V{};
    return x > A(0) ? one : (x < A(0) ? -one : none);
  }
  template <class V>
  HF_INLINE V max(V x, V y) const { return larger_of<A, sizeof(V) / sizeof(A)>(x, y); }
  template <class V>
  HF_INLINE V relu(V x) const { return x < A(0) ? V{} : x; }  // a NaN stays one
  template <class V>
  HF_INLINE V step(V x) const { return x > A(0) ? V{} + A(1) : V{}; }
  template <int N>
  HF_INLINE Vector<A, N> load_bits(const uint8_t* p, Positions<N> i) const {
    p += i.at / 8;
    if constexpr (N == 1) {
      return A(*p >> i.at % 8 & 1);
    } else {
      using Word = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
      uint16_t bits = *p;
      if constexpr (N > 8) std::memcpy(&bits, p, 2);
      Vector<Word, N> selected;
      for (int k = 0; k < N; ++k) selected[k] = Word(1) << k;
      selected &= Word(bits >> i.at % 8);
      return selected != 0 ? Vector<A, N>{} + A(1) : Vector<A, N>{};
    }
  }
  template <int N>
  HF_INLINE Vector<A, N> zero(Positions<N>) const { return Vector<A, N>{}; }

  template <class T, int N>
  HF_INLINE Vector<A, N> load(const T* p, LastPositions<N> i) const {
    Vector<A, N> v = Vector<A, N>{} - std::numeric_limits<A>::infinity();
    for (int k = 0; k < i.count; ++k) v[k] = A(p[i.at + k]);
    return v;
  }
  template <class T, int N>
  HF_INLINE Vector<A, N> load_in_order(const T* p, LastPositions<N> i) const { return load(p, i); }
  template <class T, int N>
  HF_INLINE void store(T* p, LastPositions<N> i, Vector<A, N> v) const {
    for (int k = 0; k < i.count; ++k) p[i.at + k] = T(v[k]);
  }
  template <class T, int N>
  HF_INLINE void stream(T* p, LastPositions<N> i, Vector<A, N> v) const { store(p, i, v); }
  template <class T, int N>
  HF_INLINE void prefetch(const T* p, LastPositions<N> i) const { __builtin_prefetch(p + i.at, 0, 2); }
  template <int N>
  HF_INLINE Vector<A, N> zero(LastPositions<N>) const { return Vector<A, N>{}; }

  template <class V>
  HF_INLINE V weighted(V weight, V x) const { return weight == A(0) ? V{} : weight * x; }
  template <class V, class I>
  HF_INLINE V add_at(V v, I i, int64_t position, A amount) const {
    if (position >= i.at && position < i.at + I::width) {
      if constexpr (I::width == 1) v += amount; else v[position - i.at] += amount;
    }
    return v;
  }
};

template <class A>
struct Block {
  using Acc = A;
  // One after the other is the order of memory.
  static constexpr int kRowsAtOnce = 1, kChannelsAtOnce = 1;
  static constexpr int kShortRowsAtOnce = 4;               // that fit into the first cache together
  static constexpr int64_t kKeptPositions = 1024;  // of a row, whose exponentials stay in the first cache

  template <class F>
  HF_INLINE void for_each(int64_t n, F f) const {
    for (int64_t k = 0; k < n; ++k) f(k);
  }

  template <class F>
  HF_INLINE void partition(int64_t begin, int64_t end, F f) const {
    Lanes<A> lanes;
    for (int64_t k = begin; k < end; ++k) f(k, lanes);
  }

  template <class F>
  HF_INLINE A sum(int64_t n, F f) const {
    Lanes<A> lanes;
    return lanes.sum(n, [&](auto i) { return f(i, lanes); });
  }

  template <class F>
  HF_INLINE void once(F f) const { f(); }

  HF_INLINE void sync() const {}
  HF_INLINE int64_t lane_groups() const { return 1; }
};

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
