// Cross-entropy and logit distillation, written once over a Block (see cpu/group.h). One work item is one row: each
// network's is read from memory once, in chunks that stay in the cache between its maximum and its exponentials.
#pragma once
#include <cmath>
#include <limits>

#include "common/portable.h"
#include "hyperfast/cross_entropy_distillation.h"

namespace hyperfast {

constexpr int64_t kLogitChunk = 4096;    // elements
constexpr double kDivergenceEps = 1e-4;  // of the stable divergences

template <class T>
HF_INLINE const T* row_of(const void* logits, const LogitParams& p, int64_t row) {
  return logits ? static_cast<const T*>(logits) + row * p.classes : nullptr;
}

HF_INLINE bool has_label(const LogitParams& p, int64_t row) { return p.labels && p.labels[row] != p.ignored; }

template <class A>
HF_INLINE RowStatistics<A>* statistics_of(const LogitParams& p, int64_t row) {
  return static_cast<RowStatistics<A>*>(p.statistics) + row;
}

// Exponentials of a row, which its gradient needs again: of x, x / T and y / T as below, each in a third of `data`.
template <class A>
struct Exponentials {
  A* data = nullptr;  // null: nothing is kept
  int64_t stride = 0;
};

// Sums over a row of exponentials, all relative to the maxima so far.
template <class A>
struct RowSums {
  A student_max, teacher_max;
  A hard = 0, soft = 0, teacher = 0;  // of exp(x), exp(x / T), exp(y / T); x, y: student's and teacher's z - max
  A cross = 0;                        // of exp(y / T) (y - x)
  A level = 0;                        // of x
};

template <class T, class Lanes>
HF_BODY RowSums<typename Lanes::Acc> row_sums(const Lanes& lanes, const LogitParams& p, int64_t row, bool hard,
                                              bool soft, const Exponentials<typename Lanes::Acc>& kept) {
  using A = typename Lanes::Acc;
  const T *student = row_of<T>(p.student, p, row), *teacher = row_of<T>(p.teacher, p, row);
  const A cooled = A(1 / p.temperature);
  RowSums<A> sums{std::numeric_limits<A>::lowest(), std::numeric_limits<A>::lowest()};
  for (int64_t begin = 0; begin < p.classes; begin += kLogitChunk) {
    const int64_t n = p.classes - begin < kLogitChunk ? p.classes - begin : kLogitChunk;
    const T *s = student + begin, *t = teacher ? teacher + begin : nullptr;
    const A student_max = lanes.maximum_padded(n, sums.student_max, [&](auto i) { return lanes.load_in_order(s, i); });
    const A teacher_max =
        t ? lanes.maximum_padded(n, sums.teacher_max, [&](auto i) { return lanes.load_in_order(t, i); })
          : sums.teacher_max;
    if (begin > 0) {  // what was summed so far, relative to the new maxima
      const A up = student_max - sums.student_max, teacher_up = teacher_max - sums.teacher_max;
      sums.hard *= std::exp(-up);
      sums.soft *= std::exp(-up * cooled);
      sums.cross = (sums.cross - sums.teacher * (teacher_up - up)) * std::exp(-teacher_up * cooled);
      sums.teacher *= std::exp(-teacher_up * cooled);
      sums.level -= A(begin) * up;
    }
    sums.student_max = student_max;
    sums.teacher_max = teacher_max;
    A part[4];
    lanes.add_padded(n, part, [&](auto i, auto& total) {
      const auto x = lanes.load(s, i) + -student_max;
      lanes.prefetch(s + n, i);  // the next chunk, or the next row
      if (hard) {
        const auto e = lanes.exp(x);
        total[0] += e;
        if (kept.data) lanes.store(kept.data, i, e);
      }
      if (soft) {
        const auto e = lanes.exp(x * cooled);
        total[1] += e;
        if (kept.data) lanes.store(kept.data + kept.stride, i, e);
      }
      if (t) {
        const auto y = lanes.load(t, i) + -teacher_max, e = lanes.exp(y * cooled);
        lanes.prefetch(t + n, i);
        total[2] += e;
        total[3] += lanes.weighted(e, y - x);
        if (kept.data) lanes.store(kept.data + 2 * kept.stride, i, e);
      }
    });
    sums.hard += part[0];
    sums.soft += part[1];
    sums.teacher += part[2];
    sums.cross += part[3];
    if (hard && p.smoothing > 0) sums.level += lanes.sum(n, [&](auto i) { return lanes.load(s, i) + -student_max; });
  }
  return sums;
}

// Row `row` of the two losses, not yet divided, and what its gradient needs. Exponentials can be kept of rows of no
// more than kLogitChunk classes: others are relative to maxima that change.
template <class T, class Lanes>
HF_BODY RowStatistics<typename Lanes::Acc> logit_row(const Lanes& lanes, const LogitParams& p, int64_t row,
                                                     const Exponentials<typename Lanes::Acc>& kept = {}) {
  using A = typename Lanes::Acc;
  const bool hard = has_label(p, row), same = hard && p.temperature == 1;
  const T *student = row_of<T>(p.student, p, row), *teacher = row_of<T>(p.teacher, p, row);
  RowSums<A> sums = row_sums<T>(lanes, p, row, hard, p.teacher && !same, kept);
  if (same) sums.soft = sums.hard;
  const A cooled = A(1 / p.temperature), eps = A(kDivergenceEps);
  RowStatistics<A> found{sums.student_max, 1 / sums.hard, 1 / sums.soft, sums.teacher_max, 1 / sums.teacher, A(0)};

  A cross_entropy = 0, divergence = 0;
  if (hard) {
    const int64_t label = p.labels[row];
    const bool inside = label >= 0 && label < p.classes;  // the CPU refuses others; a GPU shows them
    const A x = inside ? A(student[label]) - sums.student_max : std::numeric_limits<A>::quiet_NaN();
    cross_entropy = std::log(sums.hard) - x;
    if (p.smoothing > 0) cross_entropy += A(p.smoothing) * (x - sums.level / A(p.classes));
  }
  if (teacher && p.divergence == Divergence::kKl) {
    divergence = sums.cross * found.teacher_inverse * cooled + std::log(sums.soft * found.teacher_inverse);
  } else if (teacher) {
    const A raised = p.divergence == Divergence::kMultiStable ? eps : A(0);
    A totals[2];
    lanes.add_padded(p.classes, totals, [&](auto i, auto& total) {
      const auto x = lanes.load(student, i) + -sums.student_max, y = lanes.load(teacher, i) + -sums.teacher_max;
      const auto q = lanes.exp(x * cooled) * found.soft_inverse;
      const auto weight = lanes.exp(y * cooled) * found.teacher_inverse + raised, ratio = weight / (q + eps);
      total[0] += lanes.weighted(weight, lanes.log(ratio));
      total[1] += q * ratio;
    });
    divergence = totals[0];
    found.slope = totals[1];
  }
  lanes.once([&] {
    A* shares = static_cast<A*>(p.shares);
    shares[row] = cross_entropy;
    shares[p.rows + row] = divergence;
    shares[2 * p.rows + row] = A(hard);
    *statistics_of<A>(p, row) = found;
  });
  return found;
}

// Both losses from their rows' shares, in a fixed order.
template <class Block>
HF_BODY void logit_finish(Block& block, const LogitParams& p) {
  using A = typename Block::Acc;
  const A* shares = static_cast<const A*>(p.shares);
  const auto total = [&](int64_t first) {
    return block.sum(p.rows, [&](auto i, auto& lanes) { return lanes.load(shares + first, i); });
  };
  const A cross_entropy = total(0), divergence = total(p.rows), count = total(2 * p.rows);
  const A inverse = count > 0 ? 1 / count : A(0);
  block.once([&] {
    A* losses = static_cast<A*>(p.losses);
    losses[0] = cross_entropy * inverse;
    losses[1] = divergence * A(p.temperature * p.temperature / double(p.rows));
    *reinterpret_cast<A*>(statistics_of<A>(p, p.rows)) = inverse;
  });
}

// Row `row` of the gradient of grad[0] CE + grad[1] KD. With q and p the softmax at T of student and teacher,
// w = p (+ eps): dKD/dz = T / rows * (q - p), or q (sum_k q_k w_k / (q_k + eps) - w / (q + eps)) for a stable
// divergence.
template <class T, class Lanes>
HF_BODY void logit_gradient_row(const Lanes& lanes, const LogitParams& p, int64_t row,
                                const RowStatistics<typename Lanes::Acc>& found,
                                const Exponentials<typename Lanes::Acc>& kept = {}) {
  using A = typename Lanes::Acc;
  const T *student = row_of<T>(p.student, p, row), *teacher = row_of<T>(p.teacher, p, row);
  T* gradient = static_cast<T*>(p.d_student) + row * p.classes;
  const A* grad = static_cast<const A*>(p.grad);
  const bool hard = has_label(p, row), same = hard && p.temperature == 1, kl = p.divergence == Divergence::kKl;
  const int64_t label = hard ? p.labels[row] : -1;
  const A to_hard = hard ? grad[0] * *reinterpret_cast<const A*>(statistics_of<A>(p, p.rows)) : A(0);
  const A to_soft = grad[1] * A(p.temperature / double(p.rows));
  const A everywhere = to_hard * A(p.smoothing / double(p.classes)), at_label = to_hard * A(1 - p.smoothing);
  const A cooled = A(1 / p.temperature), eps = A(kDivergenceEps);
  const A raised = p.divergence == Divergence::kMultiStable ? eps : A(0);
  // exp((z - max) scale), or what was kept of it.
  const auto exponential = [&](int which, const T* logits, A max, A scale, auto i) {
    if (kept.data) return lanes.load(kept.data + which * kept.stride, i);
    return lanes.exp((lanes.load_in_order(logits, i) + -max) * scale);
  };
  lanes.for_each_padded(p.classes, [&](auto i) {
    auto d = lanes.zero(i), q = d;
    if (hard) {
      q = exponential(0, student, found.student_max, A(1), i) * found.hard_inverse;
      d = lanes.add_at(q * to_hard + -everywhere, i, label, -at_label);
    }
    if (teacher) {
      if (!same) q = exponential(1, student, found.student_max, cooled, i) * found.soft_inverse;
      const auto weight = exponential(2, teacher, found.teacher_max, cooled, i) * found.teacher_inverse + raised;
      if (kl)
        d += (q - weight) * to_soft;
      else
        d += q * (weight / (q + eps) * A(-1) + found.slope) * to_soft;
    }
    if (p.stream)
      lanes.stream(gradient, i, d);
    else
      lanes.store(gradient, i, d);
  });
}

}  // namespace hyperfast
