#pragma once
#include <cstdint>

#include "hyperfast/types.h"

namespace hyperfast {

enum class Divergence : int { kKl = 0, kStable = 1, kMultiStable = 2 };

// What the backward pass needs to know of a row. A softmax is exp((z - max) / T) times the inverse sum.
template <class A>
struct RowStatistics {
  A student_max, hard_inverse, soft_inverse;  // at temperature 1, at T
  A teacher_max, teacher_inverse;
  A slope;  // sum_k q_k w_k / (q_k + eps) of the stable divergences, see common/cross_entropy_distillation.h
};

// Cross-entropy and logit distillation; see hyperfast/reference/cross_entropy_distillation.py. Sums are float, double
// for double.
struct LogitParams {
  DType dtype = DType::kFloat32;
  Divergence divergence = Divergence::kKl;
  double temperature = 1, smoothing = 0;
  int64_t rows = 0, classes = 0;
  const void* student = nullptr;    // [rows, classes]
  const void* teacher = nullptr;    // the same, or null
  const int64_t* labels = nullptr;  // [rows], or null
  int64_t ignored = -100;           // the label of rows without one
  void* losses = nullptr;           // [2]: cross-entropy, distillation
  void* shares = nullptr;           // [3, rows], scratch of the forward pass: both losses, and whether there is a label
  void* statistics = nullptr;       // [rows] RowStatistics, then 1 / rows that have a label
  const void* grad = nullptr;       // [2], backward; in the forward pass on the CPU: the gradient is wanted at once
  void* d_student = nullptr;        // [rows, classes]
  bool stream = false;              // the gradient is larger than the caches
};

const char* cross_entropy_distillation_forward_cuda(const LogitParams& params, void* ticket, void* stream, int device);
const char* cross_entropy_distillation_backward_cuda(const LogitParams& params, void* stream, int device);

}  // namespace hyperfast
