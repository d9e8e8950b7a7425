#include "hyperfast/unit_distance.h"

#include "common/unit_distance.h"
#include "cpu/paired_taps.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

void unit_distance(const UnitDistanceParams& p, int threads) {
  p.power == 1 ? launch_paired<UnitDistance<1>>(p, threads) : launch_paired<UnitDistance<2>>(p, threads);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
