#include "hyperfast/sub_logit_distillation.h"

#include "common/sub_logit_distillation.h"
#include "cuda/group.cuh"

namespace hyperfast {

namespace {

// A warp takes a sample, or for many classes a whole block does.
constexpr int64_t kMostClassesOfAWarp = 256;

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 1)
    sub_logit_kernel(const __grid_constant__ SubLogitParams p, unsigned* ticket) {
  constexpr int64_t kRows = kThreads / kLanes;
  const int64_t begin = int64_t(blockIdx.x) * kRows, end = begin + kRows;
  Block<float, kLanes> block;
  block.partition(begin, end < p.rows ? end : p.rows, [&](int64_t row, auto& lanes) {
    const SubLogitScratch<float> scratch{static_cast<float*>(p.sums) + row * p.classes};
    sub_logit_row<T>(lanes, p, row, scratch);
  });
  if (is_last_block(ticket)) sub_logit_finish(block, p);
}

struct Launch {
  unsigned* ticket;
  cudaStream_t stream;

  template <class T>
  const char* run(const SubLogitParams& p) const {
    constexpr int64_t kWarps = kThreads / 32;
    if (p.classes > kMostClassesOfAWarp) return launch(sub_logit_kernel<T, kThreads>, p.rows, 0, stream, p, ticket);
    return launch(sub_logit_kernel<T, 32>, (p.rows + kWarps - 1) / kWarps, 0, stream, p, ticket);
  }
};

}  // namespace

const char* sub_logit_distillation_cuda(const SubLogitParams& p, void* ticket, void* stream, int device) {
  DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (const cudaError_t error = cudaMemsetAsync(ticket, 0, sizeof(unsigned), on)) return cudaGetErrorString(error);
  const Launch on_device{static_cast<unsigned*>(ticket), on};
  switch (p.dtype) {
    case DType::kFloat16:
      return on_device.run<__half>(p);
    case DType::kBFloat16:
      return on_device.run<__nv_bfloat16>(p);
    default:
      return on_device.run<float>(p);
  }
}

}  // namespace hyperfast
