// What the files of the module hyperfast._C share.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace hyperfast {

using Address = uintptr_t;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

[[maybe_unused]] inline void check(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

// The losses over pairs of maps.
void bind_paired_taps(pybind11::module_& m);
void bind_gated_experts(pybind11::module_& m);
void bind_sub_logits(pybind11::module_& m);

}  // namespace hyperfast
