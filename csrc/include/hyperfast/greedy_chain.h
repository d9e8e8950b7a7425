#pragma once
#include <cstdint>

namespace hyperfast {

enum class Similarity : int { kProduct = 0, kDistance = 1 };

// `batch` independent chains over `count` vectors each. The entries are integers small enough that every scalar
// product, and every partial sum of one, is exact in double: the order does not depend on the order of summation.
struct GreedyChains {
  const float* vectors = nullptr;  // [batch, count, dimension]
  int64_t* order = nullptr;        // [batch, count]
  int64_t batch = 0, count = 0, dimension = 0;
};

// See hyperfast/reference/greedy_chain.py.
struct GreedyChainParams {
  Similarity similarity = Similarity::kProduct;
  const GreedyChains* jobs = nullptr;
  int64_t job_count = 0;
};

}  // namespace hyperfast
