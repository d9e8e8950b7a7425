#pragma once
#include <cstdint>

namespace hyperfast {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

}  // namespace hyperfast
