#pragma once
#include <cstdint>

#include "hyperfast/types.h"

namespace hyperfast {

// One tap: [batch, channels, positions], contiguous. The networks may differ in positions.
struct FlowMap {
  const void* student = nullptr;
  const void* teacher = nullptr;
  void* d_student = nullptr;
  int64_t channels = 0, student_positions = 0, teacher_positions = 0;
};

struct FlowPair {
  int64_t first = 0, second = 0;     // indices of maps
  const void* statistics = nullptr;  // the teacher's matrices [batch, C1, C2], where its maps are not given
  void* differences = nullptr;       // [batch, C1, C2]
};

// Flow of the solution procedure, all pairs in one launch; see hyperfast/reference/flow_of_solution.py. Sums are float,
// double for double. What is given says what is wanted:
//   losses, scales, differences    forward
//   losses, scales, grad           forward, with the gradients for a grad that is known beforehand
//   scales, differences, grad      backward
//   differences                    the student's matrices instead
struct FlowParams {
  DType dtype = DType::kFloat32;
  bool sum = false;        // over the elements of a matrix; else their mean
  bool normalize = false;  // divide by the norm of the teacher's matrix
  int64_t batch = 0;
  int64_t maps = 0, pairs = 0;
  const FlowMap* map = nullptr;
  const FlowPair* pair = nullptr;
  void* losses = nullptr;      // [pairs]
  void* scales = nullptr;      // [pairs, batch]
  const void* grad = nullptr;  // [pairs]
};

}  // namespace hyperfast
