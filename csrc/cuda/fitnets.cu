#include "hyperfast/fitnets.h"

#include "common/fitnets.h"
#include "cuda/paired_taps.cuh"

namespace hyperfast {

const char* fitnets_cuda(const FitNetsParams& p, void* ticket, void* stream, int device) {
  DeviceGuard guard(device);
  if (normalizes(p))
    if (const char* error = launch_paired<TeacherVariance>(p, ticket, stream)) return error;
  return launch_paired<FitNets>(p, ticket, stream);
}

}  // namespace hyperfast
