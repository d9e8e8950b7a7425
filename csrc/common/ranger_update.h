// A step of Ranger, written once over a Block (see cpu/group.h). One work item is a few rows of one tensor, so that a
// row's mean and its update are one visit: the gradient comes from the cache the second time.
#pragma once
#include <cmath>

#include "common/portable.h"
#include "hyperfast/ranger_update.h"

namespace hyperfast {

constexpr int64_t kRangerItem = 2048;  // elements of a work item
// A row up to this long is one lane group's, a longer one the whole block's.
constexpr int64_t kRangerShortRow = 256;

HF_INLINE int64_t ranger_rows_per_item(const RangerTensor& x) {
  return x.centralize && x.length <= kRangerShortRow ? kRangerItem / x.length : 1;
}

HF_INLINE int64_t ranger_items(const RangerTensor& x) {
  if (x.size == 0) return 0;
  const int64_t per_item = x.length * ranger_rows_per_item(x);
  return (x.size + per_item - 1) / per_item;
}

HF_INLINE int ranger_tensor_of(const RangerParams& p, int64_t item) {
  int index = 0;
  while (index + 1 < p.tensors && p.tensor[index + 1].first_item <= item) ++index;
  return index;
}

// What a tensor's number of steps decides.
template <class A>
struct RangerFactors {
  A keep, rate;
  bool rectified, meet;
};

template <class A>
HF_INLINE RangerFactors<A> ranger_factors(const RangerParams& p, const RangerTensor& x) {
  const double t = double(*x.step) + 1, lr = p.lr ? *p.lr : p.lr_value;
  const double power = std::pow(p.beta2, t);
  const double rho_inf = 2 / (1 - p.beta2) - 1, rho = rho_inf - 2 * t * power / (1 - power);
  RangerFactors<A> f;
  f.rectified = rho > 5;
  double rate = lr / (1 - std::pow(p.beta1, t));
  if (f.rectified)
    rate *= std::sqrt((1 - power) * (rho - 4) * (rho - 2) / rho * (rho_inf / ((rho_inf - 4) * (rho_inf - 2))));
  f.keep = A(1 - lr * p.weight_decay);
  f.rate = A(rate);
  f.meet = std::fmod(t, double(p.k)) == 0;
  return f;
}

// Updates `count` elements from `first` on, which share the gradient's mean.
template <class T, class Lanes>
HF_BODY void ranger_elements(const Lanes& lanes, const RangerParams& p, const RangerTensor& x,
                             const RangerFactors<typename Lanes::Acc>& factors, int64_t first, int64_t count,
                             typename Lanes::Acc mean) {
  using A = typename Lanes::Acc;
  const RangerFactors<A> f = factors;
  const A beta1 = A(p.beta1), beta2 = A(p.beta2), rest1 = A(1 - p.beta1), rest2 = A(1 - p.beta2);
  const A eps = A(p.eps), alpha = A(p.alpha);
  T* parameter = static_cast<T*>(x.parameter) + first;
  const T* gradient = static_cast<const T*>(x.gradient) + first;
  A* exp_avg = static_cast<A*>(x.exp_avg) + first;
  A* exp_avg_sq = static_cast<A*>(x.exp_avg_sq) + first;
  A* slow = static_cast<A*>(x.slow) + first;
  lanes.for_each(count, [&](auto i) {
    const auto g = lanes.load(gradient, i) + -mean;
    const auto m = lanes.load(exp_avg, i) * beta1 + g * rest1;
    const auto v = lanes.load(exp_avg_sq, i) * beta2 + g * g * rest2;
    lanes.store(exp_avg, i, m);
    lanes.store(exp_avg_sq, i, v);
    const auto direction = f.rectified ? m / (lanes.sqrt(v) + eps) : m;
    auto fast = lanes.load(parameter, i) * f.keep - direction * f.rate;
    if (f.meet) {
      const auto s = lanes.load(slow, i);
      fast = s + (fast - s) * alpha;
      lanes.store(slow, i, fast);
    }
    lanes.store(parameter, i, fast);
  });
}

template <class T, class Block>
HF_BODY void ranger_item(Block& block, const RangerParams& p, const RangerTensor& x,
                         const RangerFactors<typename Block::Acc>& factors, int64_t item) {
  using A = typename Block::Acc;
  const T* gradient = static_cast<const T*>(x.gradient);
  const int64_t n = x.length, rows_per_item = ranger_rows_per_item(x);
  if (rows_per_item > 1) {
    const int64_t rows = x.size / n, begin = item * rows_per_item;
    const int64_t end = rows - begin < rows_per_item ? rows : begin + rows_per_item;
    block.partition(begin, end, [&](int64_t row, auto& lanes) {
      const A sum = lanes.sum(n, [&](auto i) { return lanes.load(gradient + row * n, i); });
      ranger_elements<T>(lanes, p, x, factors, row * n, n, sum / A(n));
    });
    return;
  }
  const int64_t first = item * n, count = x.size - first < n ? x.size - first : n;
  const A mean =
      x.centralize ? block.sum(n, [&](auto i, auto& lanes) { return lanes.load(gradient + first, i); }) / A(n) : A(0);
  const int64_t groups = block.lane_groups(), share = (count + 16 * groups - 1) / (16 * groups) * 16;
  block.partition(0, groups, [&](int64_t group, auto& lanes) {
    const int64_t from = group * share, left = count - from;
    if (left > 0) ranger_elements<T>(lanes, p, x, factors, first + from, left < share ? left : share, mean);
  });
}

}  // namespace hyperfast
