#pragma once
#include <cstdint>

#include "hyperfast/types.h"

namespace hyperfast {

enum class Encoding : int { kCosSin = 0, kComplement = 1, kNone = 2 };
enum class Activation : int { kLeakyRelu = 0, kRelu = 1, kGelu = 2, kTanh = 3 };

constexpr int kMaxLayers = 8;

// theta[b, p] = theta0[p] + head[p] . h[b, s(p)], h = trunk(encode(condition)); see hyperfast/reference/generate.py.
// All tensors are contiguous and of one dtype. R = batch * segments condition rows.
struct GenerateParams {
  DType dtype = DType::kFloat32;
  Encoding encoding = Encoding::kCosSin;
  Activation activation = Activation::kLeakyRelu;
  double negative_slope = 0.01;
  int64_t batch = 1, segments = 1, condition_size = 1;
  int64_t rows = 0, hidden = 0;        // P and H of the head
  int layers = 0;                      // of the trunk
  int64_t widths[kMaxLayers] = {};     // their output widths
  const void* weight[kMaxLayers] = {};
  const void* bias[kMaxLayers] = {};
  const void* condition = nullptr;     // [R, D]
  const void* head = nullptr;          // [P, H]
  const void* theta0 = nullptr;        // [P]
  const int64_t* offsets = nullptr;    // [segments + 1]; null: one segment
  void* theta = nullptr;               // [B, P], forward
  const void* grad = nullptr;          // [B, P], backward
  void* d_condition = nullptr;         // [R, D]
  void* d_trunk = nullptr;             // [W_1, b_1, W_2, b_2, ...]
  void* d_head = nullptr;              // [P, H], or null where it is not wanted
  int64_t chunk = 0;                   // head rows of one work item
  void* workspace = nullptr;           // generate_workspace_size() accumulators, backward only
};

// Launches on `stream` of `device`. Null, or the CUDA error. `ticket`: 4 bytes that the launch itself clears.
const char* generate_forward_cuda(const GenerateParams& params, void* stream, int device);
const char* generate_backward_cuda(const GenerateParams& params, void* ticket, void* stream, int device);

}  // namespace hyperfast
