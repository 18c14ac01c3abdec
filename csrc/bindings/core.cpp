// The Python module `_core`: registers exceptions, then each room's bindings.
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "error.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
    m.doc() = "Native core of fixmin_cpp. Use fixmin_cpp.Model; this module's interface may change.";
    m.attr("__version__") = FIXMIN_VERSION;
    fixmin::bindings::prepare_thread_states();

    auto base = py::register_exception<fixmin::Error>(m, "FixminError", PyExc_RuntimeError);
    const py::tuple value_error_bases = py::make_tuple(base, py::handle(PyExc_ValueError));
    py::register_exception<fixmin::GgufError>(m, "GGUFError", value_error_bases);
    py::register_exception<fixmin::UnsupportedError>(m, "UnsupportedError", value_error_bases);
    py::register_exception<fixmin::DeviceError>(m, "DeviceError", base);
    py::register_exception<fixmin::ContextLengthError>(m, "ContextLengthError", value_error_bases);
    // ArgumentError is a plain ValueError for Python callers.
    py::register_exception<fixmin::ArgumentError>(m, "ArgumentError", value_error_bases);

    fixmin::bindings::bind_gguf(m);
    fixmin::bindings::bind_codes(m);
    fixmin::bindings::bind_sampler(m);
    fixmin::bindings::bind_engine(m);
    fixmin::bindings::bind_kernels(m);
    fixmin::bindings::bind_park(m);
}
