// The processor's launcher of the losses over pairs of maps (common/paired_taps.h): one work item after the other.
#pragma once
#include "common/paired_taps.h"
#include "cpu/group.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

template <class Loss, class T, class A>
void run_paired(const typename Loss::Params& p, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Block<A> block;
    Scratch<A> scratch(paired_scratch<Block<A>>(block.lane_groups()));
#pragma omp for schedule(dynamic, 8)
    for (int64_t item = 0; item < p.items; ++item) Loss::template item<T>(block, p, item, scratch.data());
    if (p.stream) finish_streams();
  }
  if (!p.losses) return;
  Block<A> block;
  Loss::finish(block, p);
}

template <class Loss>
void launch_paired(const typename Loss::Params& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return run_paired<Loss, double, double>(p, threads);
    case DType::kBFloat16:
      return run_paired<Loss, BFloat16, float>(p, threads);
    case DType::kFloat16:
      return run_paired<Loss, Float16, float>(p, threads);
    default:
      return run_paired<Loss, float, float>(p, threads);
  }
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
