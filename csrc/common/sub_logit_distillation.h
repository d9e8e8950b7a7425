// Complementary distillation of logits, written once over a Block (see cpu/group.h). One work item is one sample, with
// the sub-logits of all its stages; its gradients are written while it is in the cache.
#pragma once
#include <cmath>
#include <limits>

#include "common/portable.h"
#include "hyperfast/sub_logit_distillation.h"

namespace hyperfast {

// A sample's working memory.
template <class A>
struct SubLogitScratch {
  A* sums;             // [classes]: of the probabilities of all sub-logits
  A* fused = nullptr;  // [count, classes]: fused sub-logits of a stage; null: computed anew wherever they are needed
  A* hard = nullptr;   // [count, classes]: exp(f - max); null likewise
  A* soft = nullptr;   // [count, classes]: exp((f - max) / T)
};

// Of the two networks' logits. x, y: student's and teacher's z - max.
template <class A>
struct SubLogitNetworks {
  A student_max, teacher_max;
  A hard = 0, soft = 0, teacher = 0;  // sums of exp(x), exp(x / T), exp(y / T)
  A log_soft = 0;
};

// What a gradient is multiplied by.
template <class A>
struct SubLogitFactors {
  A cooled, everywhere, at_label;  // 1 / T; the smoothed label
  A inverse_rows, inverse_count, share;
  A gt, kd, sdd, ol;
};

template <class A>
HF_INLINE SubLogitFactors<A> sub_logit_factors(const SubLogitParams& p) {
  const A* weights = static_cast<const A*>(p.weights);
  const A inverse_rows = A(1 / double(p.rows)), share = p.mean ? A(1 / double(p.stages)) : A(1);
  return {A(1 / p.temperature),
          A(p.smoothing / double(p.classes)),
          A(1 - p.smoothing),
          inverse_rows,
          A(1 / double(p.count)),
          share,
          weights[0] * inverse_rows,
          weights[1] * A(p.temperature) * inverse_rows,
          weights[2] * A(p.temperature) * share * inverse_rows,
          weights[3] * share * inverse_rows};
}

// CE = log(sum exp(x)) - x_label, smoothed; x relative to its maximum, `level` the sum of x.
template <class A>
HF_INLINE A smoothed_cross_entropy(const SubLogitParams& p, A sum, A at_label, A level) {
  const A hard = std::log(sum) - at_label;
  return p.smoothing > 0 ? hard + A(p.smoothing) * (at_label - level / A(p.classes)) : hard;
}

// A stage of a sample: its fused sub-logits f, and g, what of them is to be orthogonal, exactly 0 at the label.
template <class T, class Lanes>
struct SubLogitStage {
  using A = typename Lanes::Acc;
  const Lanes& lanes;
  const SubLogitParams& p;
  const SubLogitNetworks<A>& of;
  const SubLogitFactors<A>& factors;
  const SubLogitScratch<A>& scratch;
  const T *student, *teacher, *sub_logits;
  T* gradient;
  int64_t n, label;
  bool same;                                                          // T is 1
  A max[kMostSubLogits], hard[kMostSubLogits], soft[kMostSubLogits];  // the inverse sums of exp(f - max), and at T
  A log_ratio[kMostSubLogits];                                        // log q - log p is (f - max - x) / T + this
  A divergence[kMostSubLogits], label_at[kMostSubLogits];             // KL(q, p); what g would be at the label
  A pull[kMostSubLogits][kMostSubLogits];                             // the gradient by g_j is sum_l pull[j][l] g_l

  template <class I>
  HF_BODY auto fuse(int64_t j, I i) const {
    return lanes.load_in_order(sub_logits + j * n, i) * A(p.lambda_s) + lanes.load(teacher, i) * A(p.lambda_t);
  }
  template <class I>
  HF_BODY auto fused(int64_t j, I i) const {
    return scratch.fused ? lanes.load(scratch.fused + j * n, i) : fuse(j, i);
  }
  template <class I>
  HF_BODY auto labelled(int64_t j, I i) const {
    return p.fused ? fused(j, i) : lanes.load(sub_logits + j * n, i);
  }
  template <class I>
  HF_BODY auto unlabelled(int64_t j, I i) const {
    return lanes.add_at(labelled(j, i), i, label, -label_at[j]);
  }

  // Softmaxes of sub-logit j, its cross-entropy, its divergence from the student.
  HF_BODY void softmax(int64_t j, A (&shares)[kSubLogitComponents]) {
    const A most = lanes.maximum_padded(n, std::numeric_limits<A>::lowest(), [&](auto i) {
      const auto f = fuse(j, i);
      if (scratch.fused) lanes.store(scratch.fused + j * n, i, f);
      return f;
    });
    A part[3];
    lanes.add_padded(n, part, [&](auto i, auto& total) {
      const auto f = fused(j, i) + -most, x = lanes.load(student, i) + -of.student_max;
      const auto e = lanes.exp(f * factors.cooled);
      if (scratch.fused) lanes.store(scratch.soft + j * n, i, e);
      if (!same) {
        const auto h = lanes.exp(f);
        if (scratch.fused) lanes.store(scratch.hard + j * n, i, h);
        total[0] += h;
      }
      total[1] += e;
      total[2] += lanes.weighted(e, f - x);
    });
    if (same) part[0] = part[1];
    max[j] = most;
    hard[j] = 1 / part[0];
    soft[j] = 1 / part[1];
    log_ratio[j] = of.log_soft - std::log(part[1]);
    divergence[j] = part[2] * soft[j] * factors.cooled + log_ratio[j];
    A f = std::numeric_limits<A>::quiet_NaN(), sub = f;
    if (label >= 0 && label < n) {
      sub = A(sub_logits[j * n + label]);
      f = scratch.fused ? scratch.fused[j * n + label] : sub * A(p.lambda_s) + A(teacher[label]) * A(p.lambda_t);
    }
    const A level = p.smoothing > 0 ? lanes.sum(n, [&](auto i) { return fused(j, i) + -most; }) : A(0);
    const A share = factors.inverse_count * factors.share;
    shares[0] += smoothed_cross_entropy(p, part[0], f - most, level) * share;
    shares[2] += divergence[j] * share;
    label_at[j] = p.fused ? f : sub;
  }

  // Cosines between the sub-logits, and what their gradient is made of.
  HF_BODY void similarity(A (&shares)[kSubLogitComponents]) {
    const A pairs = p.count > 1 ? 1 / A(p.count * (p.count - 1)) : A(0);
    A inverse_norm[kMostSubLogits];
    for (int64_t j = 0; j < p.count; ++j) {
      const A square = lanes.sum(n, [&](auto i) {
        const auto g = unlabelled(j, i);
        return g * g;
      });
      inverse_norm[j] = square <= A(kLeastSubLogitSquare) ? A(0) : 1 / std::sqrt(square);
      pull[j][j] = 0;
      for (int64_t l = 0; l < j; ++l) {
        const A product = lanes.sum(n, [&](auto i) { return unlabelled(j, i) * labelled(l, i); });
        const A between = inverse_norm[j] * inverse_norm[l], cosine = product * between;
        const A over = cosine - A(p.theta), hinge = over < 0 ? A(0) : over, scale = 4 * pairs * factors.ol * hinge;
        shares[3] += 2 * hinge * hinge * pairs * factors.share;
        shares[4] += 2 * cosine * pairs / A(p.stages);
        pull[j][l] = pull[l][j] = scale * between;
        pull[j][j] -= scale * cosine * inverse_norm[j] * inverse_norm[j];
        pull[l][l] -= scale * cosine * inverse_norm[l] * inverse_norm[l];
      }
    }
  }

  // The gradient by sub-logit j; its probabilities are added to the sums.
  HF_BODY void differentiate(int64_t j) const {
    const A to_hard = factors.gt * factors.share * factors.inverse_count * A(p.lambda_s);
    const A to_soft = p.detach ? A(0) : factors.sdd * factors.inverse_count * A(p.lambda_s);
    const A to_pull = p.fused ? A(p.lambda_s) : A(1);
    bool pulled = false;
    for (int64_t l = 0; l < p.count; ++l) pulled |= pull[j][l] != 0;
    lanes.for_each_padded(n, [&](auto i) {
      const auto f = fused(j, i) + -max[j], x = lanes.load(student, i) + -of.student_max;
      const auto e = scratch.fused ? lanes.load(scratch.soft + j * n, i) : lanes.exp(f * factors.cooled);
      const auto q = e * soft[j];
      lanes.store(scratch.sums, i, lanes.load(scratch.sums, i) + q);
      const auto h = same ? e : scratch.fused ? lanes.load(scratch.hard + j * n, i) : lanes.exp(f);
      auto d = lanes.add_at(h * hard[j] + -factors.everywhere, i, label, -factors.at_label) * to_hard;
      d += lanes.weighted(q, (f - x) * factors.cooled + (log_ratio[j] - divergence[j])) * to_soft;
      if (pulled) {
        for (int64_t l = 0; l < p.count; ++l) d += unlabelled(l, i) * (pull[j][l] * to_pull);
      }
      if (p.stream)
        lanes.stream(gradient + j * n, i, d);
      else
        lanes.store(gradient + j * n, i, d);
    });
  }
};

// One sample: its shares of the components, not yet divided by the number of samples, and its gradients.
template <class T, class Lanes>
HF_BODY void sub_logit_row(const Lanes& lanes, const SubLogitParams& p, int64_t row,
                           const SubLogitScratch<typename Lanes::Acc>& scratch) {
  using A = typename Lanes::Acc;
  const int64_t n = p.classes, label = p.labels[row];
  const bool inside = label >= 0 && label < n;  // the CPU refuses others; a GPU shows them
  const T *student = static_cast<const T*>(p.student) + row * n, *teacher = static_cast<const T*>(p.teacher) + row * n;
  const auto factors = sub_logit_factors<A>(p);
  const A lowest = std::numeric_limits<A>::lowest(), square = A(p.temperature * p.temperature);
  SubLogitNetworks<A> of;
  of.student_max = lanes.maximum_padded(n, lowest, [&](auto i) { return lanes.load_in_order(student, i); });
  of.teacher_max = lanes.maximum_padded(n, lowest, [&](auto i) { return lanes.load_in_order(teacher, i); });
  A part[4];
  lanes.add_padded(n, part, [&](auto i, auto& total) {
    const auto x = lanes.load(student, i) + -of.student_max, y = lanes.load(teacher, i) + -of.teacher_max;
    const auto t = lanes.exp(y * factors.cooled);
    total[0] += lanes.exp(x);
    total[1] += lanes.exp(x * factors.cooled);
    total[2] += t;
    total[3] += lanes.weighted(t, y - x);
    lanes.store(scratch.sums, i, lanes.zero(i));
  });
  of.hard = 1 / part[0];
  of.soft = 1 / part[1];
  of.teacher = 1 / part[2];
  of.log_soft = std::log(part[1]);
  const A at_label = inside ? A(student[label]) - of.student_max : std::numeric_limits<A>::quiet_NaN();
  const A level =
      p.smoothing > 0 ? lanes.sum(n, [&](auto i) { return lanes.load(student, i) + -of.student_max; }) : A(0);
  A shares[kSubLogitComponents] = {smoothed_cross_entropy(p, part[0], at_label, level),
                                   part[3] * of.teacher * factors.cooled + of.log_soft - std::log(part[2])};
  const T* sub_logits = static_cast<const T*>(p.sub_logits);
  for (int64_t k = 0; k < p.stages; ++k) {
    const int64_t first = (row * p.stages + k) * p.count * n;
    T* to = static_cast<T*>(p.d_sub_logits) + first;
    SubLogitStage<T, Lanes> stage{lanes, p, of,    factors,           scratch, student, teacher, sub_logits + first,
                                  to,    n, label, p.temperature == 1};
    for (int64_t j = 0; j < p.count; ++j) stage.softmax(j, shares);
    stage.similarity(shares);
    for (int64_t j = 0; j < p.count; ++j) stage.differentiate(j);
  }

  T* gradient = static_cast<T*>(p.d_student) + row * n;
  const A to_soft = factors.kd + factors.sdd * A(p.stages), to_sums = factors.sdd * factors.inverse_count;
  lanes.for_each_padded(n, [&](auto i) {
    const auto x = lanes.load(student, i) + -of.student_max, y = lanes.load(teacher, i) + -of.teacher_max;
    const auto hard = lanes.exp(x) * of.hard + -factors.everywhere;
    auto d = lanes.add_at(hard, i, label, -factors.at_label) * factors.gt;
    d += lanes.exp(x * factors.cooled) * (of.soft * to_soft);
    d += lanes.exp(y * factors.cooled) * (of.teacher * -factors.kd);
    d += lanes.load(scratch.sums, i) * -to_sums;
    lanes.store(gradient, i, d);
  });
  lanes.once([&] {
    A* to = static_cast<A*>(p.shares);
    shares[1] *= square;
    shares[2] *= square;
    for (int k = 0; k < kSubLogitComponents; ++k) to[k * p.rows + row] = shares[k];
  });
}

// Components and total from their samples' shares, in a fixed order.
template <class Block>
HF_BODY void sub_logit_finish(Block& block, const SubLogitParams& p) {
  using A = typename Block::Acc;
  A total = 0;
  for (int k = 0; k < kSubLogitComponents; ++k) {
    const A* shares = static_cast<const A*>(p.shares) + k * p.rows;
    const A component =
        block.sum(p.rows, [&](auto i, auto& lanes) { return lanes.load(shares, i); }) * A(1 / double(p.rows));
    if (k < 4) total += component * static_cast<const A*>(p.weights)[k];
    block.once([&] { static_cast<A*>(p.components)[k] = component; });
  }
  block.once([&] { *static_cast<A*>(p.total) = total; });
}

}  // namespace hyperfast
