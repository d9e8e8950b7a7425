#pragma once
#include "hyperfast/paired_taps.h"

namespace hyperfast {

// Activation boundary of all taps; see hyperfast/reference/activation_boundary.py. The measure is the share of
// elements on the other side of zero.
struct ActivationBoundaryParams : PairedParams {
  double margin = 1;
  bool packed = false;  // a row of the teacher's is one bit per element, padded to whole bytes
};

const char* activation_boundary_cuda(const ActivationBoundaryParams& params, void* ticket, void* stream, int device);

}  // namespace hyperfast
