#pragma once
#include "hyperfast/paired_taps.h"

namespace hyperfast {

// Squared difference of all taps; see hyperfast/reference/fitnets.py. The measure is 1 / variance of the teacher's
// map, 0 where that is constant, or 1 where nothing is normalised.
struct FitNetsParams : PairedParams {
  bool normalize = false;
};

const char* fitnets_cuda(const FitNetsParams& params, void* ticket, void* stream, int device);

}  // namespace hyperfast
