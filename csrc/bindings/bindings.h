// One registration function per room; see the file of the same name.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/gil.h"
#include "gguf/gguf_file.h"
#include "quant/kv_format.h"

namespace fixmin::bindings {

/// [n], a copy.
template <typename T>
pybind11::array_t<T> array(const std::vector<T>& values) {
    return pybind11::array_t<T>(pybind11::ssize_t(values.size()), values.data());
}

// Objects of Python, made without what pybind11 does when there is no memory to enter one in its tables: it destroys
// what it was given twice, or never, or ends the process (tests/faults).

/// An empty T, to be filled afterwards: nothing is lost with it.
template <typename T>
pybind11::object registered() {
    return pybind11::cast(new T(), pybind11::return_value_policy::take_ownership);
}

/// In a constructor: makes `value` the object's own. Holder: of the class, std::unique_ptr<T> or std::shared_ptr<T>.
template <typename Holder>
typename Holder::element_type& construct(pybind11::detail::value_and_holder& object, Holder value) {
    constexpr bool shared = std::is_copy_constructible_v<Holder>;
    typename Holder::element_type* const raw = value.get();
    object.value_ptr() = raw;
    try {
        object.type->init_instance(object.inst, shared ? &value : nullptr);
    } catch (...) {
        object.value_ptr() = nullptr;  // it is still `value`'s
        throw;
    }
    if constexpr (!shared) value.release();
    return *raw;
}

/// In place of def(py::init(make)) where the class has no other holder: `make`, which captures nothing, returns a T.
template <typename Class, typename Make, typename... Extra>
Class& def_init(Class& of, Make make, const Extra&... extra) {
    using T = typename Class::type;
    const auto define = [&]<typename R, typename... Args>(R (*function)(Args...)) {
        of.def(
            "__init__",
            [function](pybind11::detail::value_and_holder& object, Args... args) {
                construct(object, std::unique_ptr<T>(new T(function(std::forward<Args>(args)...))));
            },
            pybind11::detail::is_new_style_constructor(), extra...);
    };
    define(+make);
    return of;
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
