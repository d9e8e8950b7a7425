#include "hyperfast/rank_one_update.h"

#include "common/rank_one_update.h"
#include "cuda/group.cuh"

namespace hyperfast {

namespace {

template <UpdateRule kRule, int kLanes>
__global__ void __launch_bounds__(kThreads) rank_one_kernel(const __grid_constant__ RankOneParams p) {
  Block<float, kLanes> block;
  rank_one_chunk<kRule>(block, p, blockIdx.x);
}

template <UpdateRule kRule>
const char* update(const RankOneParams& p, cudaStream_t stream) {
  return p.hidden <= 32 ? launch(rank_one_kernel<kRule, 8>, chunk_count(p), 0, stream, p)
                        : launch(rank_one_kernel<kRule, 32>, chunk_count(p), 0, stream, p);
}

}  // namespace

const char* rank_one_update_cuda(const RankOneParams& p, void* stream, int device) {
  DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.rule) {
    case UpdateRule::kSgd: return update<UpdateRule::kSgd>(p, on);
    case UpdateRule::kMomentum: return update<UpdateRule::kMomentum>(p, on);
    case UpdateRule::kNesterov: return update<UpdateRule::kNesterov>(p, on);
    case UpdateRule::kAdam: return update<UpdateRule::kAdam>(p, on);
    default: return update<UpdateRule::kAdamW>(p, on);
  }
}

}  // namespace hyperfast
