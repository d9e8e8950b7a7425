#pragma once
#include <cstdint>

#include "hyperfast/types.h"

namespace hyperfast {

// One network's samples at one tap: [batch, size], samples one after the other.
struct SampleMap {
  const void* data = nullptr;
  int64_t size = 0;
  DType dtype = DType::kFloat32;
};

struct GramTap {
  SampleMap student, teacher;
};

// Losses between Gram matrices of samples, all taps in one launch. Sums are float, double for double.
struct GramParams {
  bool wide = false;  // double
  int64_t batch = 0;
  int64_t taps = 0;
  const GramTap* tap = nullptr;
  const void* statistics = nullptr;    // [taps, batch, batch], where the teacher's maps are not given
  void* losses = nullptr;              // [taps]
  void* coefficients = nullptr;        // [taps, batch, batch]: M
  void* student_statistics = nullptr;  // [taps, batch, batch]: nothing else is wanted
};

// dX = grad (M + M^T) X of every tap; see hyperfast/reference/gram.py.
struct GramGradientTap {
  SampleMap student;
  void* gradient = nullptr;
};

struct GramGradientParams {
  bool wide = false;
  bool centred = false;  // the mean of the batch is subtracted from X
  bool stream = false;   // the gradients are larger than the caches
  int64_t batch = 0;
  int64_t taps = 0;
  const GramGradientTap* tap = nullptr;
  const void* coefficients = nullptr;  // [taps, batch, batch]
  const void* grad = nullptr;          // [taps]
};

}  // namespace hyperfast
