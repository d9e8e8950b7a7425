// Optimiser step on a matrix whose gradient is an outer product, written once over a Block (see cpu/group.h): the
// matrix and its state are read and written once, the gradient exists a vector at a time.
#pragma once
#include "common/portable.h"
#include "common/segments.h"
#include "hyperfast/rank_one_update.h"

namespace hyperfast {

// The rows of one chunk.
template <UpdateRule kRule, class Block>
HF_BODY void rank_one_chunk(Block& block, const RankOneParams& p, int64_t chunk) {
  using A = typename Block::Acc;
  constexpr bool kAdam = kRule == UpdateRule::kAdam || kRule == UpdateRule::kAdamW;
  A *weights = static_cast<A*>(p.weight), *firsts = static_cast<A*>(p.first), *seconds = static_cast<A*>(p.second);
  const A* left = static_cast<const A*>(p.left);
  const A step_size = A(p.step_size);
  [[maybe_unused]] const A decay = A(p.weight_decay), shrink = A(p.shrink), eps = A(p.eps);
  [[maybe_unused]] const A keep_first = A(p.keep_first), add_first = A(p.add_first);
  [[maybe_unused]] const A keep_second = A(p.keep_second), add_second = A(p.add_second), second_scale = A(p.second_scale);
  const int64_t hidden = p.hidden;
  for_each_run(p, chunk, [&](int64_t segment, int64_t begin, int64_t end) {
    const A* right = static_cast<const A*>(p.right) + segment * hidden;
    block.partition(begin, end, [&](int64_t row, auto& lanes) {
      const A g = left[row];
      A* weight = weights + row * hidden;
      [[maybe_unused]] A *first = firsts + row * hidden, *second = seconds + row * hidden;
      lanes.for_each(hidden, [&](auto i) {
        auto w = lanes.load_in_order(weight, i);
        auto d = lanes.load(right, i) * g;
        if constexpr (kRule == UpdateRule::kAdamW) w = w * shrink; else d = d + w * decay;
        if constexpr (kRule != UpdateRule::kSgd) {
          auto m = lanes.load_in_order(first, i);
          m = m * keep_first + d * add_first;
          lanes.store(first, i, m);
          if constexpr (kAdam) {
            auto v = lanes.load_in_order(second, i);
            v = v * keep_second + d * d * add_second;
            lanes.store(second, i, v);
            d = m / (lanes.sqrt(v) * second_scale + eps);
          } else if constexpr (kRule == UpdateRule::kNesterov) {
            d = d + m * keep_first;
          } else {
            d = m;
          }
        }
        lanes.store(weight, i, w - d * step_size);
      });
    });
  });
}

}  // namespace hyperfast
