#include "hyperfast/ranger_update.h"

#include "common/ranger_update.h"
#include "cpu/group.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

template <class T, class A>
void update(const RangerParams& p, int threads) {
  RangerFactors<A> factors[kMaxRangerTensors];
  for (int index = 0; index < p.tensors; ++index) factors[index] = ranger_factors<A>(p, p.tensor[index]);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < p.items; ++item) {
    const int index = ranger_tensor_of(p, item);
    const RangerTensor& x = p.tensor[index];
    Block<A> block;
    ranger_item<T>(block, p, x, factors[index], item - x.first_item);
  }
  for (int index = 0; index < p.tensors; ++index) *p.tensor[index].step += 1;
}

}  // namespace

void ranger_update(const RangerParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64: return update<double, double>(p, threads);
    case DType::kBFloat16: return update<BFloat16, float>(p, threads);
    case DType::kFloat16: return update<Float16, float>(p, threads);
    default: return update<float, float>(p, threads);
  }
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
