// One registration function per room; see the file of the same name.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "gguf/gguf_file.h"
#include "quant/kv_format.h"

namespace fixmin::bindings {

/// [n], a copy.
template <typename T>
pybind11::array_t<T> array(const std::vector<T>& values) {
    return pybind11::array_t<T>(pybind11::ssize_t(values.size()), values.data());
}

/// "f32", "f16", "q8_0"; anything else throws ArgumentError.
quant::KvType parse_kv_type(const std::string& name);

/// With the GIL held, which is let go of meanwhile.
gguf::GgufFile open_gguf(const std::string& path);

/// All keys in file order; bytes that are not UTF-8 become U+FFFD.
pybind11::dict metadata(const gguf::GgufFile& file);

void bind_gguf(pybind11::module_& m);
void bind_codes(pybind11::module_& m);
void bind_sampler(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);
void bind_park(pybind11::module_& m);

}  // namespace fixmin::bindings
