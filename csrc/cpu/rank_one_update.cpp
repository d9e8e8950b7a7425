#include "hyperfast/rank_one_update.h"

#include "common/rank_one_update.h"
#include "cpu/group.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

template <UpdateRule kRule, class A>
void update(const RankOneParams& p, int threads) {
  const int64_t chunks = chunk_count(p);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Block<A> block;
    rank_one_chunk<kRule>(block, p, chunk);
  }
}

template <class A>
void by_rule(const RankOneParams& p, int threads) {
  switch (p.rule) {
    case UpdateRule::kSgd: return update<UpdateRule::kSgd, A>(p, threads);
    case UpdateRule::kMomentum: return update<UpdateRule::kMomentum, A>(p, threads);
    case UpdateRule::kNesterov: return update<UpdateRule::kNesterov, A>(p, threads);
    case UpdateRule::kAdam: return update<UpdateRule::kAdam, A>(p, threads);
    case UpdateRule::kAdamW: return update<UpdateRule::kAdamW, A>(p, threads);
  }
}

}  // namespace

void rank_one_update(const RankOneParams& p, int threads) {
  p.dtype == DType::kFloat64 ? by_rule<double>(p, threads) : by_rule<float>(p, threads);
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
