#include "hyperfast/unit_distance.h"

#include "common/unit_distance.h"
#include "cuda/paired_taps.cuh"

namespace hyperfast {

const char* unit_distance_cuda(const UnitDistanceParams& p, void* ticket, void* stream, int device) {
  DeviceGuard guard(device);
  return p.power == 1 ? launch_paired<UnitDistance<1>>(p, ticket, stream)
                      : launch_paired<UnitDistance<2>>(p, ticket, stream);
}

}  // namespace hyperfast
