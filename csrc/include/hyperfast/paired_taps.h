#pragma once
#include <cstdint>

#include "hyperfast/types.h"

namespace hyperfast {

constexpr int kMaxTaps = 64;  // of one launch; the table travels by value in the kernel's arguments

// Two maps of one shape, dense and laid out alike: [rows, length]. A row is a sample, or the whole map.
struct PairedTap {
  const void* student = nullptr;
  const void* teacher = nullptr;
  void* d_student = nullptr;
  int64_t rows = 0, length = 0;
  int64_t channels = 1;        // of a row, where that matters
  bool channels_last = false;  // a row is [positions, channels], not [channels, positions]
  double factor = 1;           // what the sum over the tap is multiplied by
  int64_t first_item = 0;      // running count of work items before this tap
};

// What every loss over pairs of maps has. A work item is a row, or a part of it. Sums are float, double for double.
struct PairedParams {
  DType dtype = DType::kFloat32;
  int taps = 0;
  int64_t part = 0;   // elements of a work item; 0: a row
  int64_t items = 0;  // of all taps together
  PairedTap tap[kMaxTaps];
  void* losses = nullptr;      // [taps]; null: only the gradients are wanted
  void* measures = nullptr;    // [taps], of the losses that have a second result
  void* shares = nullptr;      // [2, items], scratch
  const void* grad = nullptr;  // [taps]; null: no gradients are wanted
  bool stream = false;         // the gradients are larger than the caches
};

}  // namespace hyperfast
