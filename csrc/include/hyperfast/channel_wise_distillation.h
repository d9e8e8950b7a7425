#pragma once
#include "hyperfast/paired_taps.h"

namespace hyperfast {

// Divergence between the channels' distributions over their positions, of all taps; see
// hyperfast/reference/channel_wise_distillation.py.
struct ChannelWiseDistillationParams : PairedParams {
  double temperature = 1;
};

const char* channel_wise_distillation_cuda(const ChannelWiseDistillationParams& params, void* ticket, void* stream,
                                           int device);

}  // namespace hyperfast
