#pragma once
#include <cstdint>

#include "hyperfast/types.h"

namespace hyperfast {

enum class UpdateRule : int { kSgd = 0, kMomentum = 1, kNesterov = 2, kAdam = 3, kAdamW = 4 };

// One optimiser step on weight [rows, hidden], whose gradient is left[p] * right[s(p), :]; see
// hyperfast/reference/rank_one_update.py. All tensors are of one dtype, float32 or float64.
struct RankOneParams {
  DType dtype = DType::kFloat32;
  UpdateRule rule = UpdateRule::kSgd;
  double weight_decay = 0;
  double step_size = 0;   // lr; Adam: lr / (1 - beta1^t)
  double shrink = 1;      // AdamW: 1 - lr * weight_decay
  double keep_first = 0;  // momentum, beta1
  double add_first = 0;   // 1 - dampening, 1 - beta1
  double keep_second = 0, add_second = 0;  // beta2, 1 - beta2
  double second_scale = 1;                 // 1 / sqrt(1 - beta2^t)
  double eps = 0;
  int64_t rows = 0, hidden = 0, segments = 1, chunk = 0;
  const int64_t* offsets = nullptr;  // [segments + 1] or null for one segment
  void* weight = nullptr;            // [rows, hidden]
  void* first = nullptr;             // momentum buffer, exp_avg
  void* second = nullptr;            // exp_avg_sq
  const void* left = nullptr;        // [rows]
  const void* right = nullptr;       // [segments, hidden]
};

const char* rank_one_update_cuda(const RankOneParams& params, void* stream, int device);

}  // namespace hyperfast
