#include "hyperfast/cross_entropy_distillation.h"

#include "common/cross_entropy_distillation.h"
#include "cuda/group.cuh"

namespace hyperfast {

namespace {

// A warp takes a row, or for many classes a whole block does.
constexpr int64_t kMostClassesOfAWarp = 1024;

template <int kLanes, class F>
__device__ void for_each_row(const LogitParams& p, F f) {
  constexpr int64_t kRows = kThreads / kLanes;
  const int64_t begin = int64_t(blockIdx.x) * kRows, end = begin + kRows;
  Block<float, kLanes> block;
  block.partition(begin, end < p.rows ? end : p.rows, f);
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 3)
    logit_forward_kernel(const __grid_constant__ LogitParams p, unsigned* ticket) {
  for_each_row<kLanes>(p, [&](int64_t row, auto& lanes) { logit_row<T>(lanes, p, row); });
  Block<float, kLanes> block;
  if (is_last_block(ticket)) logit_finish(block, p);
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4) logit_backward_kernel(const __grid_constant__ LogitParams p) {
  for_each_row<kLanes>(
      p, [&](int64_t row, auto& lanes) { logit_gradient_row<T>(lanes, p, row, *statistics_of<float>(p, row)); });
}

struct Forward {
  unsigned* ticket;
  cudaStream_t stream;
  template <class T, int kLanes>
  const char* run(const LogitParams& p, int64_t blocks) const {
    return launch(logit_forward_kernel<T, kLanes>, blocks, 0, stream, p, ticket);
  }
};

struct Backward {
  cudaStream_t stream;
  template <class T, int kLanes>
  const char* run(const LogitParams& p, int64_t blocks) const {
    return launch(logit_backward_kernel<T, kLanes>, blocks, 0, stream, p);
  }
};

template <class T, class Pass>
const char* by_classes(const LogitParams& p, const Pass& pass) {
  constexpr int64_t kWarps = kThreads / 32;
  if (p.classes > kMostClassesOfAWarp) return pass.template run<T, kThreads>(p, p.rows);
  return pass.template run<T, 32>(p, (p.rows + kWarps - 1) / kWarps);
}

template <class Pass>
const char* by_dtype(const LogitParams& p, const Pass& pass) {
  switch (p.dtype) {
    case DType::kFloat16:
      return by_classes<__half>(p, pass);
    case DType::kBFloat16:
      return by_classes<__nv_bfloat16>(p, pass);
    default:
      return by_classes<float>(p, pass);
  }
}

}  // namespace

const char* cross_entropy_distillation_forward_cuda(const LogitParams& p, void* ticket, void* stream, int device) {
  DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (const cudaError_t error = cudaMemsetAsync(ticket, 0, sizeof(unsigned), on)) return cudaGetErrorString(error);
  return by_dtype(p, Forward{static_cast<unsigned*>(ticket), on});
}

const char* cross_entropy_distillation_backward_cuda(const LogitParams& p, void* stream, int device) {
  DeviceGuard guard(device);
  return by_dtype(p, Backward{static_cast<cudaStream_t>(stream)});
}

}  // namespace hyperfast
