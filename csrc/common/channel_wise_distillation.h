// Channel-wise distillation. A work item is one sample of both maps. A channel's positions are a row of memory, which a
// group of lanes shares; or, with the channels innermost, each lane has channels of its own.
#pragma once
#include "common/paired_taps.h"
#include "hyperfast/channel_wise_distillation.h"

namespace hyperfast {

constexpr double kLargestProduct = 1e15;  // of Z_s / Z_t of some channels, each at most their positions
constexpr int64_t kChannelBlock = 32;     // channels that a group of lanes takes at once, where they are innermost

// With a = (s - max s) / T, Z_s = sum exp(a), and b, Z_t the same of the teacher's:
//   KL = sum exp(b) (b - a) / Z_t + log(Z_s / Z_t),    T dKL/ds = (exp(a) Z_t / Z_s - exp(b)) / Z_t.
// Both vanish to the last bit where the channels are equal, also in a fused multiply-subtract.
struct ChannelWiseDistillation {
  using Params = ChannelWiseDistillationParams;
  static constexpr int kLanes = 8;

  template <class T, class Block>
  static HF_BODY void item(Block& block, const Params& p, int64_t index, typename Block::Acc* scratch) {
    using A = typename Block::Acc;
    const PairedItem item = paired_item(p, index);
    const PairedTap& tap = p.tap[item.tap];
    const int64_t at = item.row * tap.length, groups = block.lane_groups();
    const T* student = static_cast<const T*>(tap.student) + at;
    const T* teacher = static_cast<const T*>(tap.teacher) + at;
    T* gradient = p.grad ? static_cast<T*>(tap.d_student) + at : nullptr;
    const A sharpness = A(1 / p.temperature), factor = gradient_factor<A>(p, item.tap) * sharpness;
    // Per group of lanes: a sum, and a product whose logarithm belongs to it.
    block.for_each(groups, [&](int64_t k) {
      scratch[2 * k] = 0;
      scratch[2 * k + 1] = 1;
    });
    block.sync();
    if (tap.channels_last) {
      block.partition(0, (tap.channels - 1) / kChannelBlock + 1, [&](int64_t part, auto& lanes) {
        const int64_t first = part * kChannelBlock, rest = tap.channels - first;
        const A sum = lanes.sum(rest < kChannelBlock ? rest : kChannelBlock, [&](auto i) {
          i.at += first;
          return channels(p, tap, lanes, i, student, teacher, gradient, sharpness, factor);
        });
        lanes.once([&] { scratch[2 * lanes.index()] += sum; });
      });
    } else {
      const int64_t n = tap.length / tap.channels;
      A* kept = n <= Block::kKeptPositions ? scratch + kMostSums * groups : nullptr;
      block.partition(0, tap.channels, [&](int64_t c, auto& lanes) {
        A quotient;
        const A linear = row(p, lanes, n, student + c * n, teacher + c * n, gradient ? gradient + c * n : nullptr, kept,
                             sharpness, factor, quotient);
        lanes.once([&] {
          A* mine = scratch + 2 * lanes.index();
          mine[0] += linear;
          mine[1] *= quotient;
          // A logarithm per channel would take as long as all else of a row of 4x4.
          if (mine[1] > A(kLargestProduct) || mine[1] < A(1 / kLargestProduct)) {
            mine[0] += std::log(mine[1]);
            mine[1] = 1;
          }
        });
      });
    }
    block.sync();
    block.once([&] {
      A sum = 0;
      for (int64_t group = 0; group < groups; ++group) sum += scratch[2 * group] + std::log(scratch[2 * group + 1]);
      if (p.losses) static_cast<A*>(p.shares)[index] = sum;
    });
    block.sync();
  }

  template <class Block>
  static HF_BODY void finish(Block& block, const Params& p) {
    paired_losses(block, p);
  }

 private:
  // The divergence of one channel, whose n positions are neighbours in memory, but for the logarithm of `quotient`.
  // `kept`: room for the 2 n exponentials, or null.
  template <class T, class Lanes, class A>
  static HF_BODY A row(const Params& p, Lanes& lanes, int64_t n, const T* student, const T* teacher, T* gradient,
                       A* kept, A sharpness, A factor, A& quotient) {
    const A top_s = lanes.largest(n, [&](auto i) { return lanes.load_in_order(student, i); });
    const A top_t = lanes.largest(n, [&](auto i) { return lanes.load_in_order(teacher, i); });
    const A shift_s = -top_s * sharpness, shift_t = -top_t * sharpness;
    A totals[3] = {0, 0, 0};
    for (int64_t first = 0; first < n; first += kRun) {
      A sums[3];
      lanes.accumulate(n - first < kRun ? n - first : kRun, sums, [&](auto i, auto add) {
        i.at += first;
        const auto a = lanes.load(student, i) * sharpness + shift_s;
        const auto b = lanes.load(teacher, i) * sharpness + shift_t;
        const auto x = lanes.exp(a), y = lanes.exp(b);
        if (kept) {
          lanes.store(kept, i, x);
          lanes.store(kept + n, i, y);
        }
        add(0, x);
        add(1, y);
        add(2, y * (b - a));
      });
      HF_UNROLL
      for (int r = 0; r < 3; ++r) totals[r] += sums[r];
    }
    if (gradient) {
      const A ratio = totals[1] / totals[0], scale = factor / totals[1];
      lanes.for_each(n, [&](auto i) {
        if (kept) {
          store_gradient(p, lanes, gradient, i, (lanes.load(kept, i) * ratio - lanes.load(kept + n, i)) * scale);
        } else {
          const auto a = lanes.load(student, i) * sharpness + shift_s;
          const auto b = lanes.load(teacher, i) * sharpness + shift_t;
          store_gradient(p, lanes, gradient, i, (lanes.exp(a) * ratio - lanes.exp(b)) * scale);
        }
      });
    }
    quotient = totals[0] / totals[1];
    return totals[2] / totals[1];
  }

  // Divergences of the channels i, with the channels innermost.
  template <class T, class Lanes, class I, class A>
  static HF_BODY auto channels(const Params& p, const PairedTap& tap, Lanes& lanes, I i, const T* student,
                               const T* teacher, T* gradient, A sharpness, A factor) {
    auto top_s = lanes.load(student, i), top_t = lanes.load(teacher, i);
    for (int64_t at = tap.channels; at < tap.length; at += tap.channels) {
      top_s = lanes.max(top_s, lanes.load(student + at, i));
      top_t = lanes.max(top_t, lanes.load(teacher + at, i));
    }
    auto sum_s = lanes.zero(i), sum_t = lanes.zero(i), difference = lanes.zero(i);
    for (int64_t at = 0; at < tap.length; at += tap.channels) {
      const auto a = (lanes.load(student + at, i) - top_s) * sharpness;
      const auto b = (lanes.load(teacher + at, i) - top_t) * sharpness;
      const auto weight = lanes.exp(b);
      sum_s += lanes.exp(a);
      sum_t += weight;
      difference += weight * (b - a);
    }
    if (gradient) {
      const auto ratio = sum_t / sum_s, scale = (lanes.zero(i) + factor) / sum_t;
      for (int64_t at = 0; at < tap.length; at += tap.channels) {
        const auto a = (lanes.load(student + at, i) - top_s) * sharpness;
        const auto b = (lanes.load(teacher + at, i) - top_t) * sharpness;
        store_gradient(p, lanes, gradient + at, i, (lanes.exp(a) * ratio - lanes.exp(b)) * scale);
      }
    }
    return difference / sum_t + lanes.log(sum_s / sum_t);
  }
};

}  // namespace hyperfast
