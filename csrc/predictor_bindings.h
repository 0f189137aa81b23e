// Python bindings of the predictors' arithmetic.
#pragma once

#include <pybind11/pybind11.h>

namespace moe_offload {

void bind_predictors(pybind11::module_& m);

}  // namespace moe_offload
