#include "hyperfast/cross_entropy_distillation.h"

#include "common/cross_entropy_distillation.h"
#include "cpu/group.h"

namespace hyperfast {
namespace HYPERFAST_ISA {

namespace {

// How many rows have a label; -1 where one is none of the classes.
int64_t count_labels(const LogitParams& p) {
  int64_t count = 0;
  for (int64_t row = 0; p.labels && row < p.rows; ++row) {
    if (!has_label(p, row)) continue;
    if (p.labels[row] < 0 || p.labels[row] >= p.classes) return -1;
    ++count;
  }
  return count;
}

template <class T, class A>
bool forward(const LogitParams& p, int threads) {
  const int64_t count = count_labels(p);
  if (count < 0) return false;
  *reinterpret_cast<A*>(statistics_of<A>(p, p.rows)) = count ? 1 / A(count) : A(0);  // for gradients written at once
  Block<A> all;
  const bool keep = p.grad && p.classes <= kLogitChunk;
#pragma omp parallel num_threads(threads)
  {
    Block<A> block;
    Scratch<A> scratch(keep ? 3 * p.classes : 0);
    const Exponentials<A> kept{keep ? scratch.data() : nullptr, p.classes};
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      block.partition(row, row + 1, [&](int64_t at, auto& lanes) {
        const auto found = logit_row<T>(lanes, p, at, kept);
        if (p.grad) logit_gradient_row<T>(lanes, p, at, found, kept);  // the row is still in the cache
      });
    }
    if (p.stream) finish_streams();
  }
  logit_finish(all, p);
  return true;
}

template <class T, class A>
bool backward(const LogitParams& p, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Block<A> block;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      block.partition(row, row + 1,
                      [&](int64_t at, auto& lanes) { logit_gradient_row<T>(lanes, p, at, *statistics_of<A>(p, at)); });
    }
    if (p.stream) finish_streams();
  }
  return true;
}

template <bool kForward, class T, class A>
bool run(const LogitParams& p, int threads) {
  return kForward ? forward<T, A>(p, threads) : backward<T, A>(p, threads);
}

template <bool kForward>
bool by_dtype(const LogitParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return run<kForward, double, double>(p, threads);
    case DType::kBFloat16:
      return run<kForward, BFloat16, float>(p, threads);
    case DType::kFloat16:
      return run<kForward, Float16, float>(p, threads);
    default:
      return run<kForward, float, float>(p, threads);
  }
}

}  // namespace

bool cross_entropy_distillation_forward(const LogitParams& p, int threads) { return by_dtype<true>(p, threads); }
void cross_entropy_distillation_backward(const LogitParams& p, int threads) { by_dtype<false>(p, threads); }

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
