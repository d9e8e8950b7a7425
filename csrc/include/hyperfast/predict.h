#pragma once
#include <cstdint>

#include "hyperfast/types.h"

namespace hyperfast {

constexpr int kMaxTables = 8;
constexpr int kMaxPredictLayers = 16;

// Rows of a predictor, z_1 = b_1 + sum_j T_j[indices[:, j]], T_j = embedding_j W_1j^T, z_l = W_l sigma(z_{l-1}) + b_l;
// see hyperfast/reference/predict.py. All tensors are contiguous and of one dtype. sigma is max(x, slope x).
// One of `predictions`, `grad` and `targets` is set and says what is computed.
struct PredictParams {
  DType dtype = DType::kFloat32;
  bool round = false;        // operands of the hidden products to bfloat16
  bool concat = true;        // embeddings side by side, else added
  double slope = 0;          // of the activation below 0
  int tables = 0;            // J
  const void* embedding[kMaxTables] = {};
  int64_t table_rows[kMaxTables] = {}, table_width[kMaxTables] = {};
  int layers = 0;            // two or more
  const void* weight[kMaxPredictLayers] = {};
  const void* bias[kMaxPredictLayers] = {};
  int64_t hidden = 0, outputs = 0;
  const void* indices = nullptr;  // [N, J]
  bool long_indices = true;       // int64, else int32
  int64_t kernels = 0;            // N
  const int64_t* rows = nullptr;  // [R]; null: 0 .. R - 1
  int64_t count = 0;              // R

  void* predictions = nullptr;            // [R, K]: forward
  const void* grad = nullptr;             // [R, K]: backward
  const void* targets = nullptr;          // [N, K]: squared error
  const void* element_weights = nullptr;  // [N, K] or null
  void* loss = nullptr;                   // of the squared error
  void* gradient = nullptr;               // flat [W_1, b_1, W_2, b_2, ...]; null: not wanted
};

}  // namespace hyperfast
