// Channel-wise distillation. A work item is one sample of both maps. A channel's positions are a row of memory, which a
// group of lanes shares; or, with the channels innermost, each lane has channels of its own.
#pragma once
#include "common/paired_taps.h"
#include "hyperfast/channel_wise_distillation.h"

namespace hyperfast {

constexpr double kLargestProduct = 1e15;  // of Z_s / Z_t of some channels, each at most their positions
constexpr int64_t kChannelBlock = 32;     // channels that a group of lanes takes at once, where they are innermost
constexpr int64_t kShortRow = 64;         // positions

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
      // Rows that are taken together keep their exponentials where one long row would.
      constexpr int kTogether = Block::kShortRowsAtOnce;
      static_assert(kTogether == 1 || kTogether * kShortRow <= Block::kKeptPositions);
      const bool together = n <= kShortRow;
      A* kept = n <= Block::kKeptPositions ? scratch + kMostSums * groups : nullptr;
      block.partition(0, (tap.channels - 1) / kTogether + 1, [&](int64_t part, auto& lanes) {
        const int64_t first = part * kTogether, rest = tap.channels - first;
        const Rows<T, A> of_part = {n, student, teacher, gradient, kept, sharpness, factor};
        A* mine = scratch + 2 * lanes.index();
        if (together && rest >= kTogether) {
          divergences<kTogether>(p, lanes, of_part, first, mine);
        } else {
          for (int64_t c = 0; c < kTogether && c < rest; ++c) divergences<1>(p, lanes, of_part, first + c, mine);
        }
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
  // Channels whose n positions are neighbours in memory. `kept`: room for the 2 n exponentials of those that are taken
  // at once, or null.
  template <class T, class A>
  struct Rows {
    int64_t n;
    const T *student, *teacher;
    T* gradient;
    A* kept;
    A sharpness, factor;
  };

  // Adds the divergences of R channels from `first` on to a sum, mine[0], and a product whose logarithm belongs to it.
  // Every step is taken for all of them before the next: the last additions of one channel's sum wait for each other,
  // and for a row of 4x4 they would take most of the time.
  template <int R, class T, class Lanes, class A>
  static HF_BODY void divergences(const Params& p, Lanes& lanes, const Rows<T, A>& rows, int64_t first, A* mine) {
    const int64_t n = rows.n;
    const A sharpness = rows.sharpness;
    A shift_s[R], shift_t[R], totals[R][3];
    HF_UNROLL
    for (int r = 0; r < R; ++r) {
      const T* student = rows.student + (first + r) * n;
      const T* teacher = rows.teacher + (first + r) * n;
      shift_s[r] = -lanes.largest(n, [&](auto i) { return lanes.load_in_order(student, i); }) * sharpness;
      shift_t[r] = -lanes.largest(n, [&](auto i) { return lanes.load_in_order(teacher, i); }) * sharpness;
    }
    HF_UNROLL
    for (int r = 0; r < R; ++r) {
      const T* student = rows.student + (first + r) * n;
      const T* teacher = rows.teacher + (first + r) * n;
      A* kept = rows.kept ? rows.kept + 2 * r * n : nullptr;
      HF_UNROLL
      for (int k = 0; k < 3; ++k) totals[r][k] = 0;
      for (int64_t begin = 0; begin < n; begin += kRun) {
        A sums[3];
        lanes.accumulate(n - begin < kRun ? n - begin : kRun, sums, [&](auto i, auto add) {
          i.at += begin;
          const auto a = lanes.load(student, i) * sharpness + shift_s[r];
          const auto b = lanes.load(teacher, i) * sharpness + shift_t[r];
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
        for (int k = 0; k < 3; ++k) totals[r][k] += sums[k];
      }
    }
    if (rows.gradient) {
      HF_UNROLL
      for (int r = 0; r < R; ++r) {
        const T* student = rows.student + (first + r) * n;
        const T* teacher = rows.teacher + (first + r) * n;
        T* gradient = rows.gradient + (first + r) * n;
        const A* kept = rows.kept ? rows.kept + 2 * r * n : nullptr;
        const A ratio = totals[r][1] / totals[r][0], scale = rows.factor / totals[r][1];
        lanes.for_each(n, [&](auto i) {
          if (kept) {
            store_gradient(p, lanes, gradient, i, (lanes.load(kept, i) * ratio - lanes.load(kept + n, i)) * scale);
          } else {
            const auto a = lanes.load(student, i) * sharpness + shift_s[r];
            const auto b = lanes.load(teacher, i) * sharpness + shift_t[r];
            store_gradient(p, lanes, gradient, i, (lanes.exp(a) * ratio - lanes.exp(b)) * scale);
          }
        });
      }
    }
    lanes.once([&] {
      HF_UNROLL
      for (int r = 0; r < R; ++r) {
        mine[0] += totals[r][2] / totals[r][1];
        mine[1] *= totals[r][0] / totals[r][1];
        // A logarithm per channel would take as long as all else of a row of 4x4.
        if (mine[1] > A(kLargestProduct) || mine[1] < A(1 / kLargestProduct)) {
          mine[0] += std::log(mine[1]);
          mine[1] = 1;
        }
      }
    });
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
