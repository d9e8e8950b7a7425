#pragma once
#include <cstdint>

#include "hyperfast/paired_taps.h"

namespace hyperfast {

enum class AttentionMode : int { kCode = 0, kPaper = 1, kZoo = 2 };

// One map: [B, C, N] dense, with the channels innermost where channels_last is set.
struct FeatureMap {
  const void* data = nullptr;
  int64_t channels = 0;
  bool channels_last = false;
};

struct AttentionTap {
  FeatureMap student, teacher;
  void* d_student = nullptr;  // laid out as the student's map
  int64_t batch = 0, positions = 0;
  int64_t first_item = 0;         // running count of samples before this tap
  int64_t first_coefficient = 0;  // running count of batch * positions before this tap
};

// Attention transfer of all taps; see hyperfast/reference/attention_transfer.py. Sums are float, double for double.
struct AttentionParams {
  DType dtype = DType::kFloat32;
  AttentionMode mode = AttentionMode::kCode;
  int power = 2;
  double eps = 1e-12;
  int taps = 0;
  int64_t items = 0;          // samples of all taps together
  int64_t max_positions = 0;  // of any tap
  AttentionTap tap[kMaxTaps];
  void* losses = nullptr;         // [taps]
  void* sample_losses = nullptr;  // [items], scratch of the forward pass
  void* coefficients = nullptr;   // [sum(batch * positions)]
  const void* grad = nullptr;     // [taps], backward; in the forward pass on the CPU: gradients are wanted at once
  bool stream = false;            // the gradients are larger than the caches
};

const char* attention_transfer_forward_cuda(const AttentionParams& params, void* ticket, void* stream, int device);
const char* attention_transfer_backward_cuda(const AttentionParams& params, void* stream, int device);

}  // namespace hyperfast
