// What the losses over pairs of maps share, written once over a Block (see cpu/group.h). A loss is a type with
//   Params                     a PairedParams
//   item<T>(block, p, i, s)    loss share and gradient of one work item; s: paired_scratch() accumulators
//   finish(block, p)           the taps' losses from their items' shares, in a fixed order
#pragma once
#include <cmath>

#include "common/portable.h"
#include "hyperfast/paired_taps.h"

namespace hyperfast {

constexpr int64_t kRun = 1024;             // elements that a group of lanes adds up at a time
constexpr int64_t kPairedPart = 8 * kRun;  // elements of a work item that is no row
constexpr int kMostSums = 2;               // that are taken at once

// Accumulators of scratch per block.
template <class Block>
HF_INLINE constexpr int64_t paired_scratch(int64_t lane_groups) {
  return kMostSums * lane_groups + 2 * Block::kKeptPositions;
}

HF_INLINE int64_t items_of_row(const PairedParams& p, const PairedTap& tap) {
  return p.part ? (tap.length - 1) / p.part + 1 : 1;
}

template <class Params>
HF_INLINE int tap_of(const Params& p, int64_t item) {
  int tap = 0;
  while (tap + 1 < p.taps && p.tap[tap + 1].first_item <= item) ++tap;
  return tap;
}

// Where a work item lies: `count` elements from element `first` of row `row` on.
struct PairedItem {
  int tap;
  int64_t row, first, count;
};

HF_INLINE PairedItem paired_item(const PairedParams& p, int64_t index) {
  const int at = tap_of(p, index);
  const PairedTap& tap = p.tap[at];
  const int64_t parts = items_of_row(p, tap), local = index - tap.first_item;
  const int64_t first = local % parts * p.part, rest = tap.length - first;
  return {at, local / parts, first, p.part && p.part < rest ? p.part : rest};
}

// What the gradient of tap `at` is multiplied by: the upstream gradient and the tap's own factor.
template <class A>
HF_INLINE A gradient_factor(const PairedParams& p, int at) {
  return p.grad ? static_cast<const A*>(p.grad)[at] * A(p.tap[at].factor) : A(0);
}

// Stores a vector of a gradient, past the caches where it would only push out what is still needed.
template <class T, class Lanes, class I, class V>
HF_BODY void store_gradient(const PairedParams& p, Lanes& lanes, T* gradient, I i, const V& value) {
  if (p.stream)
    lanes.stream(gradient, i, value);
  else
    lanes.store(gradient, i, value);
}

// Calls f(i, lanes) for vectors i that cover n, on all lane groups of the block.
template <class Block, class F>
HF_BODY void for_each_vector(Block& block, int64_t n, F f) {
  block.partition(0, (n - 1) / kRun + 1, [&](int64_t run, auto& lanes) {
    const int64_t first = run * kRun;
    lanes.for_each(n - first < kRun ? n - first : kRun, [&](auto i) {
      i.at += first;
      f(i, lanes);
    });
  });
}

// totals[r] = sum of what f(i, lanes, add) adds with add(r, vector) over vectors i that cover n, in a fixed order,
// known to all threads of the block.
template <int R, class Block, class F>
HF_BODY void block_sums(Block& block, int64_t n, typename Block::Acc* scratch, typename Block::Acc (&totals)[R], F f) {
  using A = typename Block::Acc;
  const int64_t groups = block.lane_groups();
  block.for_each(groups * R, [&](int64_t k) { scratch[k] = 0; });
  block.sync();
  block.partition(0, (n - 1) / kRun + 1, [&](int64_t run, auto& lanes) {
    const int64_t first = run * kRun;
    A sums[R];
    lanes.accumulate(n - first < kRun ? n - first : kRun, sums, [&](auto i, auto add) {
      i.at += first;
      f(i, lanes, add);
    });
    lanes.once([&] {
      HF_UNROLL
      for (int r = 0; r < R; ++r) scratch[lanes.index() * R + r] += sums[r];
    });
  });
  block.sync();
  HF_UNROLL
  for (int r = 0; r < R; ++r) {
    totals[r] = scratch[r];
    for (int64_t group = 1; group < groups; ++group) totals[r] += scratch[group * R + r];
  }
  block.sync();  // the scratch may be used again
}

// Sum of the shares[items of tap `at`], on one lane group.
template <class Lanes, class A>
HF_BODY A tap_sum(const PairedParams& p, Lanes& lanes, int64_t at, const A* shares) {
  const PairedTap& tap = p.tap[at];
  return lanes.sum(tap.rows * items_of_row(p, tap), [&](auto i) { return lanes.load(shares + tap.first_item, i); });
}

// losses[tap] = factor * sum of its shares.
template <class Block>
HF_BODY void paired_losses(Block& block, const PairedParams& p) {
  using A = typename Block::Acc;
  block.partition(0, p.taps, [&](int64_t at, auto& lanes) {
    const A sum = tap_sum(p, lanes, at, static_cast<const A*>(p.shares));
    lanes.once([&] { static_cast<A*>(p.losses)[at] = sum * A(p.tap[at].factor); });
  });
}

}  // namespace hyperfast
