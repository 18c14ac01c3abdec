// One registration function per room; see the file of the same name.
#pragma once
#include <pybind11/pybind11.h>

namespace fixmin::bindings {

void bind_gguf(pybind11::module_& m);
void bind_codes(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);

}  // namespace fixmin::bindings
