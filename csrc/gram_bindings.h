#pragma once
#include <pybind11/pybind11.h>

// The part of hyperfast._C that losses between Gram matrices need.
void bind_gram_losses(pybind11::module_& m);
