// The GPU's launcher of the losses over pairs of maps (common/paired_taps.h): a block per work item, the last of which
// adds up.
#pragma once
#include "common/paired_taps.h"
#include "cuda/group.cuh"

namespace hyperfast {

template <class Loss, class T>
__global__ void __launch_bounds__(kThreads)
    paired_kernel(const __grid_constant__ typename Loss::Params p, unsigned* ticket) {
  using Lanes = Block<float, Loss::kLanes>;
  __shared__ float scratch[paired_scratch<Lanes>(kThreads / Loss::kLanes)];
  Lanes block;
  Loss::template item<T>(block, p, blockIdx.x, scratch);
  if (p.losses && is_last_block(ticket)) Loss::finish(block, p);
}

template <class Loss>
const char* launch_paired(const typename Loss::Params& p, void* ticket, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto count = static_cast<unsigned*>(ticket);
  if (p.losses)
    if (const cudaError_t error = cudaMemsetAsync(count, 0, sizeof(unsigned), on)) return cudaGetErrorString(error);
  switch (p.dtype) {
    case DType::kFloat16:
      return launch(paired_kernel<Loss, __half>, p.items, 0, on, p, count);
    case DType::kBFloat16:
      return launch(paired_kernel<Loss, __nv_bfloat16>, p.items, 0, on, p, count);
    default:
      return launch(paired_kernel<Loss, float>, p.items, 0, on, p, count);
  }
}

}  // namespace hyperfast
