// FitNets: the squared difference, in units of the variance of the teacher's map if that is wanted.
#pragma once
#include "common/paired_taps.h"
#include "hyperfast/fitnets.h"

namespace hyperfast {

// In a backward pass the factors are in the upstream gradient already.
HF_INLINE bool normalizes(const FitNetsParams& p) { return p.normalize && p.losses; }

// The first of two passes where the maps are normalised: measures[tap] = 1 / variance of the teacher's map.
struct TeacherVariance {
  using Params = FitNetsParams;
  static constexpr int kLanes = 32;

  // Mean and sum of squared deviations of one item.
  template <class T, class Block>
  static HF_BODY void item(Block& block, const Params& p, int64_t index, typename Block::Acc* scratch) {
    using A = typename Block::Acc;
    const PairedItem item = paired_item(p, index);
    const PairedTap& tap = p.tap[item.tap];
    const T* teacher = static_cast<const T*>(tap.teacher) + item.row * tap.length + item.first;
    const A shift = A(teacher[0]);  // exactly the mean of a constant map
    A total[1], deviations[1];
    block_sums(block, item.count, scratch, total,
               [&](auto i, auto& lanes, auto add) { add(0, lanes.load_in_order(teacher, i) + -shift); });
    const A mean = shift + total[0] / A(item.count);
    block_sums(block, item.count, scratch, deviations, [&](auto i, auto& lanes, auto add) {
      const auto x = lanes.load(teacher, i) + -mean;
      add(0, x * x);
    });
    block.once([&] {
      A* shares = static_cast<A*>(p.shares);
      shares[index] = mean;
      shares[p.items + index] = deviations[0];
    });
  }

  // All items of a tap but the last have p.part elements. Means are compared with that of the first item, so that
  // those of a constant map cancel.
  template <class Block>
  static HF_BODY void finish(Block& block, const Params& p) {
    using A = typename Block::Acc;
    block.partition(0, p.taps, [&](int64_t at, auto& lanes) {
      const PairedTap& tap = p.tap[at];
      const int64_t last = items_of_row(p, tap) - 1, rest = tap.length - last * p.part;
      const A* means = static_cast<const A*>(p.shares) + tap.first_item;
      const A shift = means[0], count = A(tap.length);
      const A whole = lanes.sum(last, [&](auto i) { return lanes.load(means, i) + -shift; });
      const A offset = (whole * A(p.part) + (means[last] - shift) * A(rest)) / count;
      const A between = lanes.sum(last, [&](auto i) {
        const auto x = lanes.load(means, i) + -(shift + offset);
        return x * x;
      });
      const A x = means[last] - (shift + offset);
      const A within = tap_sum(p, lanes, at, static_cast<const A*>(p.shares) + p.items);
      const A variance = (within + between * A(p.part) + x * x * A(rest)) / count;
      lanes.once([&] { static_cast<A*>(p.measures)[at] = variance == 0 ? A(0) : 1 / variance; });
    });
  }
};

struct FitNets {
  using Params = FitNetsParams;
  static constexpr int kLanes = 32;

  template <class T, class Block>
  static HF_BODY void item(Block& block, const Params& p, int64_t index, typename Block::Acc* scratch) {
    using A = typename Block::Acc;
    const PairedItem item = paired_item(p, index);
    const PairedTap& tap = p.tap[item.tap];
    const int64_t at = item.row * tap.length + item.first;
    const T* student = static_cast<const T*>(tap.student) + at;
    const T* teacher = static_cast<const T*>(tap.teacher) + at;
    T* gradient = static_cast<T*>(tap.d_student) + at;
    const A scale =
        2 * gradient_factor<A>(p, item.tap) * (normalizes(p) ? static_cast<const A*>(p.measures)[item.tap] : A(1));
    A total[1];
    block_sums(block, item.count, scratch, total, [&](auto i, auto& lanes, auto add) {
      const auto difference = lanes.load_in_order(student, i) - lanes.load_in_order(teacher, i);
      if (p.grad) store_gradient(p, lanes, gradient, i, difference * scale);
      add(0, difference * difference);
    });
    block.once([&] {
      if (p.losses) static_cast<A*>(p.shares)[index] = total[0];
    });
  }

  template <class Block>
  static HF_BODY void finish(Block& block, const Params& p) {
    using A = typename Block::Acc;
    block.partition(0, p.taps, [&](int64_t at, auto& lanes) {
      const A sum = tap_sum(p, lanes, at, static_cast<const A*>(p.shares));
      lanes.once([&] {
        A* measures = static_cast<A*>(p.measures);
        if (!normalizes(p)) measures[at] = 1;
        static_cast<A*>(p.losses)[at] = sum * A(p.tap[at].factor) * measures[at];
      });
    });
  }
};

}  // namespace hyperfast
