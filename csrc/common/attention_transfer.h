// Attention transfer, written once over a Block (see cpu/group.h). One work item is one sample of one tap: both maps
// are read once, and what is kept for the backward pass is one coefficient per position.
#pragma once
#include <cmath>

#include "common/paired_taps.h"
#include "common/portable.h"
#include "hyperfast/attention_transfer.h"

namespace hyperfast {

// |x|^P for a vector x.
template <int P, class Lanes, class V>
HF_BODY V absolute_power(const Lanes& lanes, V x) {
  if constexpr (P == 1) return lanes.abs(x);
  else if constexpr (P == 2) return x * x;
  else return lanes.abs(x) * x * x;
}

// d|x|^P / dx / P = |x|^(P-1) sign(x).
template <int P, class Lanes, class V>
HF_BODY V power_slope(const Lanes& lanes, V x) {
  if constexpr (P == 1) return lanes.sign(x);
  else if constexpr (P == 2) return x;
  else return lanes.abs(x) * x;
}

// energy[n] = sum over the channels of |F[c, n]|^P. `energy`: lane_groups * positions accumulators, the first group's
// part holds the result.
template <int P, class T, class Block>
HF_BODY void channel_energy(Block& block, const T* map, int64_t channels, int64_t positions, bool channels_last,
                              typename Block::Acc* energy) {
  using A = typename Block::Acc;
  if (channels_last) {
    block.partition(0, positions, [&](int64_t n, auto& lanes) {
      const A sum =
          lanes.sum(channels, [&](auto i) { return absolute_power<P>(lanes, lanes.load_in_order(map + n * channels, i)); });
      lanes.once([&] { energy[n] = sum; });
    });
    block.sync();
    return;
  }
  constexpr int kChannelsAtOnce = Block::kChannelsAtOnce;
  const int64_t groups = block.lane_groups();
  block.for_each(groups * positions, [&](int64_t k) { energy[k] = 0; });
  block.sync();
  block.partition(0, (channels + kChannelsAtOnce - 1) / kChannelsAtOnce, [&](int64_t part, auto& lanes) {
    A* mine = energy + lanes.index() * positions;
    const int64_t first = part * kChannelsAtOnce;
    const T* map_part = map + first * positions;
    const int64_t count = channels - first < kChannelsAtOnce ? channels - first : kChannelsAtOnce;
    lanes.for_each(positions, [&](auto i) {
      auto sum = lanes.zero(i);
      if (count == kChannelsAtOnce) {
        HF_UNROLL
        for (int c = 0; c < kChannelsAtOnce; ++c) sum += absolute_power<P>(lanes, lanes.load_in_order(map_part + c * positions, i));
      } else {
        for (int64_t c = 0; c < count; ++c) sum += absolute_power<P>(lanes, lanes.load_in_order(map_part + c * positions, i));
      }
      lanes.store(mine, i, lanes.load(mine, i) + sum);
    });
  });
  block.sync();
  if (groups > 1) {
    block.for_each(positions, [&](int64_t n) {
      A sum = energy[n];
      for (int64_t group = 1; group < groups; ++group) sum += energy[group * positions + n];
      energy[n] = sum;
    });
    block.sync();
  }
}

// Accumulators of scratch per block: the energies of both maps.
HF_INLINE int64_t attention_scratch(const AttentionParams& p, int64_t lane_groups) {
  return (lane_groups + 1) * p.max_positions;
}

// Loss share and coefficients of one sample of one tap.
template <int P, class T, class Block>
HF_BODY void attention_item(Block& block, const AttentionParams& p, int64_t item, typename Block::Acc* scratch) {
  using A = typename Block::Acc;
  const AttentionTap& tap = p.tap[tap_of(p, item)];
  const int64_t sample = item - tap.first_item, n = tap.positions;
  const FeatureMap &s = tap.student, &t = tap.teacher;
  A* teacher = scratch;
  A* student = scratch + p.max_positions;  // and before that the lane groups' shares of the teacher's
  channel_energy<P>(block, static_cast<const T*>(t.data) + sample * t.channels * n, t.channels, n, t.channels_last,
                    student);
  block.for_each(n, [&](int64_t k) { teacher[k] = student[k]; });
  block.sync();
  // The student's map last: what follows it may read it again while it is in the cache.
  channel_energy<P>(block, static_cast<const T*>(s.data) + sample * s.channels * n, s.channels, n, s.channels_last,
                    student);

  const bool mean = p.mode == AttentionMode::kCode, zoo = p.mode == AttentionMode::kZoo;
  const A eps = A(p.eps), scale_s = mean ? A(1) / A(s.channels) : A(1), scale_t = mean ? A(1) / A(t.channels) : A(1);
  const A norm_s = scale_s * std::sqrt(block.sum(n, [&](auto i, auto& lanes) {
    const auto q = lanes.load(student, i);
    return q * q;
  }));
  const A norm_t = scale_t * std::sqrt(block.sum(n, [&](auto i, auto& lanes) {
    const auto q = lanes.load(teacher, i);
    return q * q;
  }));
  const A divisor_s = zoo ? norm_s + eps : (norm_s > eps ? norm_s : eps);
  const A divisor_t = zoo ? norm_t + eps : (norm_t > eps ? norm_t : eps);
  // Both maps are normalised before they are compared: a fused multiply-subtract of two equal ones is not zero.
  const A to_u = scale_s / divisor_s, to_v = scale_t / divisor_t;
  block.for_each(n, [&](int64_t k) {
    student[k] *= to_u;
    teacher[k] *= to_v;
  });
  block.sync();
  const A squared = block.sum(n, [&](auto i, auto& lanes) {
    const auto difference = lanes.load(student, i) - lanes.load(teacher, i);
    return difference * difference;
  });
  const A cross = block.sum(n, [&](auto i, auto& lanes) {
    const auto u = lanes.load(student, i);
    return u * (u - lanes.load(teacher, i));
  });

  const A distance = std::sqrt(squared);
  const bool paper = p.mode == AttentionMode::kPaper;
  const A share = paper ? distance / A(tap.batch) : squared / A(tap.batch * n);
  block.once([&] { static_cast<A*>(p.sample_losses)[item] = share; });

  // dL/dQ = (w - u along) / divisor, w = dL/du = to_w (u - v).
  const A to_w = paper ? (distance > 0 ? 1 / (distance * A(tap.batch)) : A(0)) : 2 / A(tap.batch * n);
  const A along = to_w * cross * (zoo && norm_s > 0 ? divisor_s / norm_s : A(1));
  const bool alive = zoo ? norm_s > 0 : norm_s > eps;
  const A factor = alive ? A(P) * scale_s / divisor_s : A(0);
  A* coefficients = static_cast<A*>(p.coefficients) + tap.first_coefficient + sample * n;
  block.for_each(n, [&](int64_t k) {
    coefficients[k] = factor * (to_w * (student[k] - teacher[k]) - student[k] * along);
  });
  block.sync();
}

// Losses of the taps from their samples' shares, in a fixed order.
template <class Block>
HF_BODY void attention_finish(Block& block, const AttentionParams& p) {
  using A = typename Block::Acc;
  const A* shares = static_cast<const A*>(p.sample_losses);
  block.partition(0, p.taps, [&](int64_t tap, auto& lanes) {
    const A sum = lanes.sum(p.tap[tap].batch, [&](auto i) { return lanes.load(shares + p.tap[tap].first_item, i); });
    lanes.once([&] { static_cast<A*>(p.losses)[tap] = sum; });
  });
}

// dL/dF of one sample of one tap, from its coefficients.
template <int P, class T, class Block>
HF_BODY void attention_backward_item(Block& block, const AttentionParams& p, int64_t item) {
  using A = typename Block::Acc;
  const int index = tap_of(p, item);
  const AttentionTap& tap = p.tap[index];
  const int64_t sample = item - tap.first_item, n = tap.positions, channels = tap.student.channels;
  const T* map = static_cast<const T*>(tap.student.data) + sample * channels * n;
  T* gradient = static_cast<T*>(tap.d_student) + sample * channels * n;
  const A* coefficients = static_cast<const A*>(p.coefficients) + tap.first_coefficient + sample * n;
  const A scale = static_cast<const A*>(p.grad)[index];
  const bool channels_last = tap.student.channels_last;
  const int64_t rows = channels_last ? n : channels, length = channels_last ? channels : n;
  // In the forward pass the next sample's teacher is on its way while this one's gradient is written.
  const T* next = static_cast<const T*>(tap.teacher.data);
  if (next) next += (sample + 1) * tap.teacher.channels * n;
  block.partition(0, rows, [&](int64_t row, auto& lanes) {
    const T* x = map + row * length;
    T* out = gradient + row * length;
    const A uniform = channels_last ? scale * coefficients[row] : scale;
    lanes.for_each(length, [&](auto i) {
      if (next) lanes.prefetch(next + row * length, i);
      auto value = power_slope<P>(lanes, lanes.load_in_order(x, i)) * uniform;
      if (!channels_last) value = value * lanes.load(coefficients, i);
      if (p.stream) lanes.stream(out, i, value); else lanes.store(out, i, value);
    });
  });
}

}  // namespace hyperfast
