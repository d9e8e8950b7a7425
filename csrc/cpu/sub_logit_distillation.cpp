#include "hyperfast/sub_logit_distillation.h"

#include "common/sub_logit_distillation.h"
#include "cpu/group.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

template <class T, class A>
bool run(const SubLogitParams& p, int threads) {
  for (int64_t row = 0; row < p.rows; ++row)
    if (p.labels[row] < 0 || p.labels[row] >= p.classes) return false;
  Block<A> all;
#pragma omp parallel num_threads(threads)
  {
    const int64_t size = p.count * p.classes;
    Scratch<A> memory(p.classes + 3 * size);
    A* kept = memory.data() + p.classes;
    const SubLogitScratch<A> scratch{memory.data(), kept, kept + size, kept + 2 * size};
    Block<A> block;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row)
      block.partition(row, row + 1, [&](int64_t at, auto& lanes) { sub_logit_row<T>(lanes, p, at, scratch); });
    if (p.stream) finish_streams();
  }
  sub_logit_finish(all, p);
  return true;
}

}  // namespace

bool sub_logit_distillation(const SubLogitParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return run<double, double>(p, threads);
    case DType::kBFloat16:
      return run<BFloat16, float>(p, threads);
    case DType::kFloat16:
      return run<Float16, float>(p, threads);
    default:
      return run<float, float>(p, threads);
  }
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
