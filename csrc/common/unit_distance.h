// Distance between rows of unit norm. A work item is one row of both maps: their norms, then the distance, then the
// gradient, each a pass over what the first one left in the cache.
#pragma once
#include "common/paired_taps.h"
#include "hyperfast/unit_distance.h"

namespace hyperfast {

// With n the norms and u = s / n_s, v = t / n_t, everything is expressed by s - t n_s / n_t: that is exactly zero where
// the rows are equal, also in a fused multiply-subtract, and so is its sign.
template <int P>
struct UnitDistance {
  using Params = UnitDistanceParams;
  static constexpr int kLanes = 32;

  template <class T, class Block>
  static HF_BODY void item(Block& block, const Params& p, int64_t index, typename Block::Acc* scratch) {
    using A = typename Block::Acc;
    const PairedItem item = paired_item(p, index);
    const PairedTap& tap = p.tap[item.tap];
    const int64_t at = item.row * tap.length, n = tap.length;
    const T* student = static_cast<const T*>(tap.student) + at;
    const T* teacher = static_cast<const T*>(tap.teacher) + at;
    A squares[2];
    block_sums(block, n, scratch, squares, [&](auto i, auto& lanes, auto add) {
      const auto x = lanes.load_in_order(student, i), y = lanes.load_in_order(teacher, i);
      add(0, x * x);
      add(1, y * y);
    });
    const A eps = A(p.eps), norm_s = std::sqrt(squares[0]), norm_t = std::sqrt(squares[1]);
    // A row without a direction is compared with nothing; where eps is added, it is the origin.
    const bool dead = !p.added && (norm_s <= eps || norm_t <= eps);
    const A inverse = dead ? A(0) : 1 / (p.added ? norm_s + eps : norm_s);
    const A ratio = dead ? A(0) : (p.added ? norm_s + eps : norm_s) / (p.added ? norm_t + eps : norm_t);

    A sums[2];  // of |s - t ratio|^P, and of s times its slope
    block_sums(block, n, scratch, sums, [&](auto i, auto& lanes, auto add) {
      const auto x = lanes.load(student, i), difference = x - lanes.load(teacher, i) * ratio;
      if constexpr (P == 1) {
        add(0, lanes.abs(difference));
        add(1, x * lanes.sign(difference));
      } else {
        add(0, difference * difference);
        add(1, x * difference);
      }
    });
    block.once([&] {
      if (p.losses) static_cast<A*>(p.shares)[index] = P == 1 ? sums[0] * inverse : sums[0] * inverse * inverse;
    });
    if (!p.grad) return;

    // d/ds of |u - v|^P is along * slope - across * s.
    const A stretch = p.added && norm_s > 0 ? (norm_s + eps) / norm_s : A(1);
    const A along = gradient_factor<A>(p, item.tap) * (P == 1 ? inverse : 2 * inverse * inverse);
    const A across = along * (inverse * inverse * sums[1] * stretch);
    T* gradient = static_cast<T*>(tap.d_student) + at;
    const bool more = item.row + 1 < tap.rows;
    for_each_vector(block, n, [&](auto i, auto& lanes) {
      if (more) {  // the next row comes from memory while this one is worked on
        lanes.prefetch(student + n, i);
        lanes.prefetch(teacher + n, i);
      }
      const auto x = lanes.load(student, i), difference = x - lanes.load(teacher, i) * ratio;
      if constexpr (P == 1)
        store_gradient(p, lanes, gradient, i, lanes.sign(difference) * along - x * across);
      else
        store_gradient(p, lanes, gradient, i, difference * along - x * across);
    });
  }

  template <class Block>
  static HF_BODY void finish(Block& block, const Params& p) {
    paired_losses(block, p);
  }
};

}  // namespace hyperfast
