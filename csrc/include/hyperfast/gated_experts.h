#pragma once
#include <cstdint>

#include "hyperfast/types.h"

namespace hyperfast {

// Gated experts behind a shared projection; see hyperfast/reference/gated_experts.py. All tensors are contiguous, of
// `dtype`, but for the gates and their gradient, which are float, double for double. With d_output it is the backward
// pass, which needs the gates of the forward pass.
struct GatedExpertsParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, outputs = 0, rank = 0, positions = 0, gate_width = 0;
  const void* z = nullptr;            // [batch, rank, positions]
  const void* experts = nullptr;      // [heads, outputs, rank]
  const void* bias = nullptr;         // [heads, outputs], or none
  const void* gate_weight = nullptr;  // [heads, gate_width]
  const void* gate_bias = nullptr;    // [heads], or none
  const void* gate_input = nullptr;   // [batch, gate_width], or none: the means of z
  void* output = nullptr;             // [batch, outputs, positions]
  void* gates = nullptr;              // [batch, heads]

  const void* d_output = nullptr;
  const void* d_gates = nullptr;
  void* d_z = nullptr;
  void* d_experts = nullptr;
  void* d_bias = nullptr;
  void* d_gate_weight = nullptr;
  void* d_gate_bias = nullptr;
  void* d_gate_input = nullptr;
};

}  // namespace hyperfast
