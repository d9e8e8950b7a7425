#include "hyperfast/channel_wise_distillation.h"

#include "common/channel_wise_distillation.h"
#include "cpu/paired_taps.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

void channel_wise_distillation(const ChannelWiseDistillationParams& p, int threads) {
  launch_paired<ChannelWiseDistillation>(p, threads);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
