#pragma once
#include "hyperfast/gram.h"

namespace hyperfast {

// Distances and angles between samples; see hyperfast/reference/relational_distance_angle.py. Statistics are the Gram
// matrices of the centred samples.
struct RelationalParams : GramParams {
  double distance = 0, angle = 0;  // weights of the two terms
};

}  // namespace hyperfast
