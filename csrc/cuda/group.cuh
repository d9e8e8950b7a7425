// A GPU's Block: one thread block, whose lanes are kLanes neighbouring threads of a warp with 16 bytes each.
// The interface is the one that cpu/group.h describes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/portable.h"

namespace hyperfast {

constexpr int kThreads = 256;

template <class A, int N>
struct Vector {
  A value[N];

  __device__ Vector& operator+=(const Vector& other) {
    HF_UNROLL
    for (int k = 0; k < N; ++k) value[k] += other.value[k];
    return *this;
  }
  friend __device__ Vector operator+(Vector a, const Vector& b) { return a += b; }
  friend __device__ Vector operator-(Vector a, const Vector& b) {
    HF_UNROLL
    for (int k = 0; k < N; ++k) a.value[k] -= b.value[k];
    return a;
  }
  friend __device__ Vector operator*(Vector a, const Vector& b) {
    HF_UNROLL
    for (int k = 0; k < N; ++k) a.value[k] *= b.value[k];
    return a;
  }
  friend __device__ Vector operator/(Vector a, const Vector& b) {
    HF_UNROLL
    for (int k = 0; k < N; ++k) a.value[k] /= b.value[k];
    return a;
  }
  friend __device__ Vector operator+(Vector a, A b) {
    HF_UNROLL
    for (int k = 0; k < N; ++k) a.value[k] += b;
    return a;
  }
  friend __device__ Vector operator*(Vector a, A b) {
    HF_UNROLL
    for (int k = 0; k < N; ++k) a.value[k] *= b;
    return a;
  }
};

template <int N>
struct Positions {
  static constexpr int width = N;
  int64_t at;
};

// N elements of T as one access.
template <class T, int N>
struct alignas(N * sizeof(T)) Packed {
  T value[N];
};

template <class T, int N>
__device__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (N * sizeof(T)) == 0;
}

template <class A, int kLanes>
struct Lanes {
  using Acc = A;
  static constexpr int kWidth = 16 / sizeof(A);

  __device__ int lane() const { return threadIdx.x % kLanes; }
  __device__ int64_t index() const { return threadIdx.x / kLanes; }
  __device__ unsigned mask() const {
    return kLanes >= 32 ? ~0u : ((1u << (kLanes % 32)) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
  }

  // x of all lanes taken together by `join`, in a fixed order; known to all of them.
  template <class Join>
  __device__ A reduce(A x, Join join) const {
    constexpr int kNeighbours = kLanes < 32 ? kLanes : 32;
    HF_UNROLL
    for (int offset = kNeighbours / 2; offset > 0; offset /= 2)
      x = join(x, __shfl_xor_sync(mask(), x, offset, kNeighbours));
    if constexpr (kLanes > 32) {
      static_assert(kLanes == kThreads);
      __shared__ A shares[kThreads / 32];
      __syncthreads();  // the last result may still be read
      if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = x;
      __syncthreads();
      x = shares[0];
      for (int warp = 1; warp < kThreads / 32; ++warp) x = join(x, shares[warp]);
    }
    return x;
  }

  template <class F>
  __device__ void for_each(int64_t n, F f) const {
    if (n % kWidth == 0) {
      for (int64_t i = lane() * kWidth; i < n; i += kLanes * kWidth) f(Positions<kWidth>{i});
    } else {
      for (int64_t i = lane(); i < n; i += kLanes) f(Positions<1>{i});
    }
  }

  template <int R, class F>
  __device__ void sums(int64_t n, A (&totals)[R], F f) const {
    HF_UNROLL
    for (int r = 0; r < R; ++r) totals[r] = 0;
    for_each(n, [&](auto i) {
      HF_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto part = f(r, i);
        HF_UNROLL
        for (int k = 0; k < i.width; ++k) totals[r] += part.value[k];
      }
    });
    HF_UNROLL
    for (int r = 0; r < R; ++r) totals[r] = reduce(totals[r], [](A a, A b) { return a + b; });
  }

  template <int R, class F>
  __device__ void accumulate(int64_t n, A (&totals)[R], F f) const {
    HF_UNROLL
    for (int r = 0; r < R; ++r) totals[r] = 0;
    for_each(n, [&](auto i) {
      f(i, [&](int r, const auto& part) {
        HF_UNROLL
        for (int k = 0; k < i.width; ++k) totals[r] += part.value[k];
      });
    });
    HF_UNROLL
    for (int r = 0; r < R; ++r) {
      HF_UNROLL
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        totals[r] += __shfl_xor_sync(mask(), totals[r], offset, kLanes);
    }
  }

  template <class F>
  __device__ A sum(int64_t n, F f) const {
    A total[1];
    sums(n, total, [&](int, auto i) { return f(i); });
    return total[0];
  }

  // A vector never reaches beyond n: nothing has to be filled up.
  template <class F>
  __device__ void for_each_padded(int64_t n, F f) const {
    for_each(n, f);
  }

  template <int R, class F>
  __device__ void add_padded(int64_t n, A (&totals)[R], F f) const {
    HF_UNROLL
    for (int r = 0; r < R; ++r) totals[r] = 0;
    for_each(n, [&](auto i) {
      Vector<A, decltype(i)::width> part[R] = {};
      f(i, part);
      HF_UNROLL
      for (int r = 0; r < R; ++r) {
        HF_UNROLL
        for (int k = 0; k < i.width; ++k) totals[r] += part[r].value[k];
      }
    });
    HF_UNROLL
    for (int r = 0; r < R; ++r) totals[r] = reduce(totals[r], [](A a, A b) { return a + b; });
  }

  template <class F>
  __device__ A maximum_padded(int64_t n, A most, F f) const {
    for_each(n, [&](auto i) {
      const auto x = f(i);
      HF_UNROLL
      for (int k = 0; k < i.width; ++k) most = x.value[k] > most ? x.value[k] : most;
    });
    return reduce(most, [](A a, A b) { return a > b ? a : b; });
  }

  template <class F>
  __device__ A largest(int64_t n, F f) const {
    A top = -INFINITY;
    for_each(n, [&](auto i) {
      const auto part = f(i);
      HF_UNROLL
      for (int k = 0; k < i.width; ++k) top = part.value[k] > top ? part.value[k] : top;
    });
    HF_UNROLL
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      const A other = __shfl_xor_sync(mask(), top, offset, kLanes);
      top = other > top ? other : top;
    }
    return top;
  }

  template <class F>
  __device__ void once(F f) const {
    if (lane() == 0) f();
  }

  template <class T, int N>
  __device__ Vector<A, N> load(const T* p, Positions<N> i) const {
    Vector<A, N> v;
    if (is_aligned<T, N>(p + i.at)) {
      const auto packed = *reinterpret_cast<const Packed<T, N>*>(p + i.at);
      HF_UNROLL
      for (int k = 0; k < N; ++k) v.value[k] = A(packed.value[k]);
    } else {
      HF_UNROLL
      for (int k = 0; k < N; ++k) v.value[k] = A(p[i.at + k]);
    }
    return v;
  }
  template <class T, int N>
  __device__ Vector<A, N> load_in_order(const T* p, Positions<N> i) const {
    return load(p, i);
  }
  template <class T, int N>
  __device__ void prefetch(const T*, Positions<N>) const {}  // other warps are reading meanwhile
  template <class T, int N>
  __device__ void store(T* p, Positions<N> i, const Vector<A, N>& v) const {
    Packed<T, N> packed;
    HF_UNROLL
    for (int k = 0; k < N; ++k) packed.value[k] = T(v.value[k]);
    if (is_aligned<T, N>(p + i.at)) {
      *reinterpret_cast<Packed<T, N>*>(p + i.at) = packed;
    } else {
      HF_UNROLL
      for (int k = 0; k < N; ++k) p[i.at + k] = packed.value[k];
    }
  }
  template <class T, int N>
  __device__ void stream(T* p, Positions<N> i, const Vector<A, N>& v) const { store(p, i, v); }
  template <int N>
  __device__ Vector<A, N> zero(Positions<N>) const { return Vector<A, N>{}; }

  template <int N>
  __device__ Vector<A, N> sqrt(Vector<A, N> x) const {
    HF_UNROLL
    for (int k = 0; k < N; ++k) x.value[k] = ::sqrt(x.value[k]);
    return x;
  }
  template <int N>
  __device__ Vector<A, N> exp(Vector<A, N> x) const {
    HF_UNROLL
    for (int k = 0; k < N; ++k) x.value[k] = ::exp(x.value[k]);
    return x;
  }
  template <int N>
  __device__ Vector<A, N> log(Vector<A, N> x) const {
    HF_UNROLL
    for (int k = 0; k < N; ++k) x.value[k] = ::log(x.value[k]);
    return x;
  }
  template <int N>
  __device__ Vector<A, N> abs(Vector<A, N> x) const {
    HF_UNROLL
    for (int k = 0; k < N; ++k) x.value[k] = x.value[k] < 0 ? -x.value[k] : x.value[k];
    return x;
  }
  template <int N>
  __device__ Vector<A, N> sign(Vector<A, N> x) const {
    HF_UNROLL
    for (int k = 0; k < N; ++k) x.value[k] = A((x.value[k] > 0) - (x.value[k] < 0));
    return x;
  }
  template <int N>
  __device__ Vector<A, N> weighted(const Vector<A, N>& weight, Vector<A, N> x) const {
    HF_UNROLL
    for (int k = 0; k < N; ++k) x.value[k] = weight.value[k] == 0 ? A(0) : weight.value[k] * x.value[k];
    return x;
  }
  template <int N>
  __device__ Vector<A, N> add_at(Vector<A, N> v, Positions<N> i, int64_t position, A amount) const {
    HF_UNROLL
    for (int k = 0; k < N; ++k) v.value[k] += i.at + k == position ? amount : A(0);
    return v;
  }
  template <int N>
  __device__ Vector<A, N> max(Vector<A, N> x, const Vector<A, N>& y) const {
    HF_UNROLL
    for (int k = 0; k < N; ++k) x.value[k] = x.value[k] > y.value[k] ? x.value[k] : y.value[k];
    return x;
  }
  template <int N>
  __device__ Vector<A, N> relu(Vector<A, N> x) const {
    HF_UNROLL
    for (int k = 0; k < N; ++k) x.value[k] = x.value[k] < 0 ? A(0) : x.value[k];  // a NaN stays one
    return x;
  }
  template <int N>
  __device__ Vector<A, N> step(Vector<A, N> x) const {
    HF_UNROLL
    for (int k = 0; k < N; ++k) x.value[k] = A(x.value[k] > 0);
    return x;
  }
  template <int N>
  __device__ Vector<A, N> load_bits(const uint8_t* p, Positions<N> i) const {
    static_assert(N <= 8);
    const unsigned bits = p[i.at / 8] >> i.at % 8;
    Vector<A, N> v;
    HF_UNROLL
    for (int k = 0; k < N; ++k) v.value[k] = A(bits >> k & 1);
    return v;
  }
};

template <class A, int kLanes>
struct Block {
  using Acc = A;
  static constexpr int kRowsAtOnce = 4, kChannelsAtOnce = 8, kShortRowsAtOnce = 1;
  static constexpr int64_t kKeptPositions = 0;  // an exponential costs less than the memory to keep it in

  template <class F>
  __device__ void for_each(int64_t n, F f) const {
    for (int64_t k = threadIdx.x; k < n; k += kThreads) f(k);
  }

  template <class F>
  __device__ void partition(int64_t begin, int64_t end, F f) const {
    Lanes<A, kLanes> lanes;
    for (int64_t k = begin + lanes.index(); k < end; k += kThreads / kLanes) f(k, lanes);
  }

  template <class F>
  __device__ A sum(int64_t n, F f) const {
    __shared__ A shares[kThreads / 32];
    Lanes<A, 32> lanes;
    A total = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) total += f(Positions<1>{i}, lanes).value[0];
    HF_UNROLL
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    __syncthreads();  // the last sum may still be read
    if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = total;
    __syncthreads();
    total = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) total += shares[warp];
    return total;
  }

  template <class F>
  __device__ void once(F f) const {
    if (threadIdx.x == 0) f();
  }

  __device__ void sync() const { __syncthreads(); }
  __device__ int64_t lane_groups() const { return kThreads / kLanes; }
};

// True in all threads of the block that comes here last; what the others wrote before is visible to it.
__device__ inline bool is_last_block(unsigned* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// Makes `device` current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&previous_);
    if (previous_ != device) cudaSetDevice(device);
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Launches with as much dynamic shared memory as the kernel asks for. Null, or the error.
template <class Kernel, class... Args>
const char* launch(Kernel kernel, int64_t blocks, int64_t shared_bytes, cudaStream_t stream, const Args&... args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<unsigned(blocks), kThreads, size_t(shared_bytes), stream>>>(args...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hyperfast
