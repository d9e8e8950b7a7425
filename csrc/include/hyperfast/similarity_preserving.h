#pragma once
#include "hyperfast/gram.h"

namespace hyperfast {

// Similarity preserving; see hyperfast/reference/similarity_preserving.py. Statistics are U.
using SimilarityParams = GramParams;

}  // namespace hyperfast
