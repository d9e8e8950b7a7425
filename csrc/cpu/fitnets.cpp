#include "hyperfast/fitnets.h"

#include "common/fitnets.h"
#include "cpu/paired_taps.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

void fitnets(const FitNetsParams& p, int threads) {
  if (normalizes(p)) launch_paired<TeacherVariance>(p, threads);
  launch_paired<FitNets>(p, threads);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
