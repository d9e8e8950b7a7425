#include "hyperfast/activation_boundary.h"

#include "common/activation_boundary.h"
#include "cuda/paired_taps.cuh"

namespace hyperfast {

const char* activation_boundary_cuda(const ActivationBoundaryParams& p, void* ticket, void* stream, int device) {
  DeviceGuard guard(device);
  return launch_paired<ActivationBoundary>(p, ticket, stream);
}

}  // namespace hyperfast
