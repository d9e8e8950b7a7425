#include "hyperfast/generate.h"

#include "common/generate.h"
#include "cuda/group.cuh"

namespace hyperfast {

namespace {

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 2) generate_forward_kernel(const __grid_constant__ GenerateParams p) {
  extern __shared__ __align__(16) float scratch[];
  Block<float, kLanes> block;
  for (int64_t chunk = blockIdx.x; chunk < chunk_count(p); chunk += gridDim.x)
    generate_chunk<T>(block, p, chunk, scratch);
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 2)
    generate_backward_kernel(const __grid_constant__ GenerateParams p, unsigned* ticket) {
  extern __shared__ __align__(16) float scratch[];
  Block<float, kLanes> block;
  for (int64_t chunk = blockIdx.x; chunk < chunk_count(p); chunk += gridDim.x)
    generate_backward_chunk<T>(block, p, chunk, scratch);
  if (is_last_block(ticket)) generate_finish<T>(block, p);
}

template <class T, int kLanes>
const char* forward(const GenerateParams& p, cudaStream_t stream) {
  const int64_t shared = p.batch * trunk_floats(p) * sizeof(float);
  return launch(generate_forward_kernel<T, kLanes>, chunk_count(p), shared, stream, p);
}

template <class T, int kLanes>
const char* backward(const GenerateParams& p, unsigned* ticket, cudaStream_t stream) {
  const int64_t shared = p.batch * (trunk_floats(p) + kThreads / kLanes * p.hidden) * sizeof(float);
  return launch(generate_backward_kernel<T, kLanes>, chunk_count(p), shared, stream, p, ticket);
}

// A row of the head is shared out to as many lanes as it has 16-byte pieces, so that short rows leave no lane idle.
template <class T>
const char* forward_by_width(const GenerateParams& p, cudaStream_t stream) {
  return p.hidden <= 32 ? forward<T, 8>(p, stream) : forward<T, 32>(p, stream);
}

template <class T>
const char* backward_by_width(const GenerateParams& p, unsigned* ticket, cudaStream_t stream) {
  return p.hidden <= 32 ? backward<T, 8>(p, ticket, stream) : backward<T, 32>(p, ticket, stream);
}

}  // namespace

const char* generate_forward_cuda(const GenerateParams& p, void* stream, int device) {
  DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::kFloat16: return forward_by_width<__half>(p, on);
    case DType::kBFloat16: return forward_by_width<__nv_bfloat16>(p, on);
    default: return forward_by_width<float>(p, on);
  }
}

const char* generate_backward_cuda(const GenerateParams& p, void* ticket, void* stream, int device) {
  DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (const cudaError_t error = cudaMemsetAsync(ticket, 0, sizeof(unsigned), on)) return cudaGetErrorString(error);
  const auto counter = static_cast<unsigned*>(ticket);
  switch (p.dtype) {
    case DType::kFloat16: return backward_by_width<__half>(p, counter, on);
    case DType::kBFloat16: return backward_by_width<__nv_bfloat16>(p, counter, on);
    default: return backward_by_width<float>(p, counter, on);
  }
}

}  // namespace hyperfast
