#include "hyperfast/attention_transfer.h"

#include "common/attention_transfer.h"
#include "cpu/group.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

template <int P, class T, class A>
void forward(const AttentionParams& p, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Block<A> block;
    Scratch<A> scratch(attention_scratch(p, block.lane_groups()));
#pragma omp for schedule(dynamic, 8)
    for (int64_t item = 0; item < p.items; ++item) {
      attention_item<P, T>(block, p, item, scratch.data());
      if (p.grad) attention_backward_item<P, T>(block, p, item);  // the sample is still in the cache
    }
    if (p.stream) finish_streams();
  }
  Block<A> block;
  attention_finish(block, p);
}

template <int P, class T, class A>
void backward(const AttentionParams& p, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Block<A> block;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < p.items; ++item) attention_backward_item<P, T>(block, p, item);
    if (p.stream) finish_streams();
  }
}

template <bool kForward, class T, class A>
void by_power(const AttentionParams& p, int threads) {
  auto run = kForward ? forward<2, T, A> : backward<2, T, A>;
  if (p.power == 1) run = kForward ? forward<1, T, A> : backward<1, T, A>;
  if (p.power == 3) run = kForward ? forward<3, T, A> : backward<3, T, A>;
  run(p, threads);
}

template <bool kForward>
void by_dtype(const AttentionParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64: return by_power<kForward, double, double>(p, threads);
    case DType::kBFloat16: return by_power<kForward, BFloat16, float>(p, threads);
    case DType::kFloat16: return by_power<kForward, Float16, float>(p, threads);
    default: return by_power<kForward, float, float>(p, threads);
  }
}

}  // namespace

void attention_transfer_forward(const AttentionParams& p, int threads) { by_dtype<true>(p, threads); }
void attention_transfer_backward(const AttentionParams& p, int threads) { by_dtype<false>(p, threads); }

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
