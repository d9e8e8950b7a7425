#include "hyperfast/channel_wise_distillation.h"

#include "common/channel_wise_distillation.h"
#include "cuda/paired_taps.cuh"

namespace hyperfast {

const char* channel_wise_distillation_cuda(const ChannelWiseDistillationParams& p, void* ticket, void* stream,
                                           int device) {
  DeviceGuard guard(device);
  return launch_paired<ChannelWiseDistillation>(p, ticket, stream);
}

}  // namespace hyperfast
