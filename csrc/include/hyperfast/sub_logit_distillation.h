#pragma once
#include <cstdint>

#include "hyperfast/types.h"

namespace hyperfast {

constexpr int kMostSubLogits = 8, kSubLogitComponents = 5;
constexpr double kLeastSubLogitSquare = 1e-24;  // a sub-logit of no greater square is similar to none

// Complementary distillation of logits; see hyperfast/reference/sub_logit_distillation.py. Sums are float, double for
// double.
struct SubLogitParams {
  DType dtype = DType::kFloat32;
  bool detach = false, fused = true, mean = false;
  double temperature = 1, smoothing = 0, lambda_s = 1, lambda_t = 1, theta = 0.5;
  int64_t rows = 0, stages = 0, count = 0, classes = 0;
  const void* student = nullptr;     // [rows, classes]
  const void* teacher = nullptr;     // the same
  const void* sub_logits = nullptr;  // [rows, stages, count, classes]
  const int64_t* labels = nullptr;   // [rows]
  const void* weights = nullptr;     // [4]
  void* total = nullptr;             // [1]
  void* components = nullptr;        // [5]
  void* shares = nullptr;            // [5, rows], scratch
  void* sums = nullptr;              // [rows, classes], scratch of the CUDA launch
  void* d_student = nullptr;         // [rows, classes]
  void* d_sub_logits = nullptr;      // [rows, stages, count, classes]
  bool stream = false;               // the gradient is larger than the caches
};

const char* sub_logit_distillation_cuda(const SubLogitParams& params, void* ticket, void* stream, int device);

}  // namespace hyperfast
