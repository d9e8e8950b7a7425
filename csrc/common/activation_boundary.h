// Activation boundary: the squared hinge of every element, and how many are on the wrong side of zero.
#pragma once
#include "common/paired_taps.h"
#include "hyperfast/activation_boundary.h"

namespace hyperfast {

struct ActivationBoundary {
  using Params = ActivationBoundaryParams;
  static constexpr int kLanes = 32;

  template <class T, class Block>
  static HF_BODY void item(Block& block, const Params& p, int64_t index, typename Block::Acc* scratch) {
    using A = typename Block::Acc;
    const PairedItem item = paired_item(p, index);
    const PairedTap& tap = p.tap[item.tap];
    const int64_t at = item.row * tap.length + item.first;
    const T* student = static_cast<const T*>(tap.student) + at;
    const T* teacher = static_cast<const T*>(tap.teacher) + (p.packed ? 0 : at);
    const uint8_t* bits =
        static_cast<const uint8_t*>(tap.teacher) + (p.packed ? item.row * ((tap.length + 7) / 8) + item.first / 8 : 0);
    T* gradient = static_cast<T*>(tap.d_student) + at;
    const A margin = A(p.margin), scale = -2 * gradient_factor<A>(p, item.tap);
    A totals[2];
    block_sums(block, item.count, scratch, totals, [&](auto i, auto& lanes, auto add) {
      const auto x = lanes.load_in_order(student, i);
      const auto active = p.packed ? lanes.load_bits(bits, i) : lanes.step(lanes.load_in_order(teacher, i));
      const auto sign = active * A(2) + A(-1), differs = lanes.step(x) - active;
      const auto hinge = lanes.relu(sign * x * A(-1) + margin);
      if (p.grad) store_gradient(p, lanes, gradient, i, sign * hinge * scale);
      add(0, hinge * hinge);
      add(1, differs * differs);
    });
    block.once([&] {
      if (!p.losses) return;
      A* shares = static_cast<A*>(p.shares);
      shares[index] = totals[0];
      shares[p.items + index] = totals[1];
    });
  }

  template <class Block>
  static HF_BODY void finish(Block& block, const Params& p) {
    using A = typename Block::Acc;
    paired_losses(block, p);
    block.partition(0, p.taps, [&](int64_t at, auto& lanes) {
      const A sum = tap_sum(p, lanes, at, static_cast<const A*>(p.shares) + p.items);
      lanes.once([&] { static_cast<A*>(p.measures)[at] = sum / A(p.tap[at].rows * p.tap[at].length); });
    });
  }
};

}  // namespace hyperfast
