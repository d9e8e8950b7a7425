#include "hyperfast/ranger_update.h"

#include "common/ranger_update.h"
#include "cuda/group.cuh"

namespace hyperfast {

namespace {

constexpr int kLanes = 32;

template <class T, class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 8 ? 2 : 3)
    ranger_update_kernel(const __grid_constant__ RangerParams p, unsigned* ticket) {
  __shared__ RangerFactors<A> factors;
  Block<A, kLanes> block;
  if (blockIdx.x < p.items) {
    const RangerTensor& x = p.tensor[ranger_tensor_of(p, blockIdx.x)];
    block.once([&] { factors = ranger_factors<A>(p, x); });
    block.sync();
    ranger_item<T>(block, p, x, factors, blockIdx.x - x.first_item);
  }
  // Every block has read the steps before the last one counts this one.
  if (is_last_block(ticket)) block.for_each(p.tensors, [&](int64_t index) { *p.tensor[index].step += 1; });
}

template <class T, class A>
const char* update(const RangerParams& p, unsigned* ticket, cudaStream_t stream) {
  // One block even where all tensors are empty: their steps count.
  return launch(ranger_update_kernel<T, A>, p.items > 0 ? p.items : 1, 0, stream, p, ticket);
}

}  // namespace

const char* ranger_update_cuda(const RangerParams& p, void* ticket, void* stream, int device) {
  DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const auto tickets = static_cast<unsigned*>(ticket);
  if (const cudaError_t error = cudaMemsetAsync(ticket, 0, sizeof(unsigned), on)) return cudaGetErrorString(error);
  switch (p.dtype) {
    case DType::kFloat64: return update<double, double>(p, tickets, on);
    case DType::kBFloat16: return update<__nv_bfloat16, float>(p, tickets, on);
    case DType::kFloat16: return update<__half, float>(p, tickets, on);
    default: return update<float, float>(p, tickets, on);
  }
}

}  // namespace hyperfast
