#include "hyperfast/activation_boundary.h"

#include "common/activation_boundary.h"
#include "cpu/paired_taps.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

void activation_boundary(const ActivationBoundaryParams& p, int threads) {
  launch_paired<ActivationBoundary>(p, threads);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
