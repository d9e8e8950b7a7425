#pragma once
#include <cstdint>

#include "hyperfast/types.h"

namespace hyperfast {

// One parameter with its gradient and state, all dense and laid out alike, the rows of the first dimension outermost.
struct RangerTensor {
  void* parameter = nullptr;
  const void* gradient = nullptr;
  void* exp_avg = nullptr;
  void* exp_avg_sq = nullptr;
  void* slow = nullptr;
  float* step = nullptr;  // updates made so far
  int64_t size = 0;
  int64_t length = 0;  // of a row; where nothing is centralised, of a piece (the last may be shorter)
  int64_t first_item = 0;
  bool centralize = false;
};

constexpr int kMaxRangerTensors = 64;  // of one launch; the table travels by value in the kernel's arguments

// One step of Ranger over all tensors; see hyperfast/reference/ranger_update.py. State is float, double for double.
struct RangerParams {
  DType dtype = DType::kFloat32;  // of parameters and gradients
  double beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0, alpha = 0;
  int64_t k = 1;
  const double* lr = nullptr;  // where the kernel runs, or null: lr_value
  double lr_value = 0;
  int tensors = 0;
  int64_t items = 0;
  RangerTensor tensor[kMaxRangerTensors];
};

const char* ranger_update_cuda(const RangerParams& params, void* ticket, void* stream, int device);

}  // namespace hyperfast
