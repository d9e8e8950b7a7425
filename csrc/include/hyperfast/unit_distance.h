#pragma once
#include "hyperfast/paired_taps.h"

namespace hyperfast {

// Distance between rows of unit norm, of all taps; see hyperfast/reference/unit_distance.py.
struct UnitDistanceParams : PairedParams {
  int power = 1;       // 1: absolute differences; 2: squares
  double eps = 1e-12;  // what the norm must exceed; or what is added to it
  bool added = false;
};

const char* unit_distance_cuda(const UnitDistanceParams& params, void* ticket, void* stream, int device);

}  // namespace hyperfast
