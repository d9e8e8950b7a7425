#include "hyperfast/attention_transfer.h"

#include "common/attention_transfer.h"
#include "cuda/group.cuh"

namespace hyperfast {

namespace {

constexpr int kLanes = 32;

template <int P, class T>
__global__ void __launch_bounds__(kThreads, 4)
    attention_forward_kernel(const __grid_constant__ AttentionParams p, unsigned* ticket) {
  extern __shared__ __align__(16) float scratch[];
  Block<float, kLanes> block;
  attention_item<P, T>(block, p, blockIdx.x, scratch);
  if (is_last_block(ticket)) attention_finish(block, p);
}

template <int P, class T>
__global__ void __launch_bounds__(kThreads, 4) attention_backward_kernel(const __grid_constant__ AttentionParams p) {
  Block<float, kLanes> block;
  attention_backward_item<P, T>(block, p, blockIdx.x);
}

struct Forward {
  unsigned* ticket;
  cudaStream_t stream;
  template <int P, class T>
  const char* run(const AttentionParams& p) const {
    const int64_t shared = attention_scratch(p, kThreads / kLanes) * sizeof(float);
    return launch(attention_forward_kernel<P, T>, p.items, shared, stream, p, ticket);
  }
};

struct Backward {
  cudaStream_t stream;
  template <int P, class T>
  const char* run(const AttentionParams& p) const {
    return launch(attention_backward_kernel<P, T>, p.items, 0, stream, p);
  }
};

template <class T, class Pass>
const char* by_power(const AttentionParams& p, const Pass& pass) {
  switch (p.power) {
    case 1: return pass.template run<1, T>(p);
    case 2: return pass.template run<2, T>(p);
    default: return pass.template run<3, T>(p);
  }
}

template <class Pass>
const char* by_dtype(const AttentionParams& p, const Pass& pass) {
  switch (p.dtype) {
    case DType::kFloat16: return by_power<__half>(p, pass);
    case DType::kBFloat16: return by_power<__nv_bfloat16>(p, pass);
    default: return by_power<float>(p, pass);
  }
}

}  // namespace

const char* attention_transfer_forward_cuda(const AttentionParams& p, void* ticket, void* stream, int device) {
  DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (const cudaError_t error = cudaMemsetAsync(ticket, 0, sizeof(unsigned), on)) return cudaGetErrorString(error);
  return by_dtype(p, Forward{static_cast<unsigned*>(ticket), on});
}

const char* attention_transfer_backward_cuda(const AttentionParams& p, void* stream, int device) {
  DeviceGuard guard(device);
  return by_dtype(p, Backward{static_cast<cudaStream_t>(stream)});
}

}  // namespace hyperfast
