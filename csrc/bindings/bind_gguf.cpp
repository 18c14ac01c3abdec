// GgufFile for Python: metadata as a dict, tensors as read-only views of the file.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <variant>

#include "bindings/bindings.h"
#include "gguf/gguf_file.h"

namespace py = pybind11;

namespace fixmin::bindings {
namespace {

/// A validated file and what keeps its bytes alive.
struct PyGgufFile {
    py::object owner;  // the bytes object that `file` was parsed from; None if it owns a mapping
    gguf::GgufFile file;
};

PyGgufFile open_file(const py::object& path) {
    PyObject* encoded = nullptr;  // as the operating system wants it; also refuses embedded NULs
    if (PyUnicode_FSConverter(path.ptr(), &encoded) == 0) throw py::error_already_set();
    const auto name = py::reinterpret_steal<py::bytes>(encoded).cast<std::string>();
    return {py::none(), open_gguf(name)};
}

PyGgufFile parse_bytes(const py::bytes& data) {
    const std::string_view text = data;
    const auto parse = [&text] {
        const WithoutGil released;
        return gguf::GgufFile::parse(std::as_bytes(std::span(text)));
    };
    return {data, parse()};
}

/// GGUF does not enforce UTF-8 and published vocabularies hold broken strings, so what cannot be decoded
/// becomes U+FFFD.
py::str decode(std::string_view text) {
    PyObject* decoded = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
    if (decoded == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(decoded);
}

template <class T>
py::array copy_array(const gguf::ArrayView& view) {
    py::array_t<T> array(static_cast<py::ssize_t>(view.count));
    if (view.count != 0) std::memcpy(array.mutable_data(), view.bytes.data(), view.bytes.size());
    return array;
}

py::object to_python(const gguf::ArrayView& view) {
    using gguf::ValueType;
    switch (view.type) {
        case ValueType::u8: return copy_array<uint8_t>(view);
        case ValueType::i8: return copy_array<int8_t>(view);
        case ValueType::u16: return copy_array<uint16_t>(view);
        case ValueType::i16: return copy_array<int16_t>(view);
        case ValueType::u32: return copy_array<uint32_t>(view);
        case ValueType::i32: return copy_array<int32_t>(view);
        case ValueType::f32: return copy_array<float>(view);
        case ValueType::boolean: return copy_array<bool>(view);
        case ValueType::u64: return copy_array<uint64_t>(view);
        case ValueType::i64: return copy_array<int64_t>(view);
        case ValueType::f64: return copy_array<double>(view);
        case ValueType::string: {
            py::list list;
            for (const std::string_view text : view.strings()) list.append(decode(text));
            return list;
        }
        case ValueType::array: break;  // the reader refuses nested arrays
    }
    throw GgufError("GGUF array of unexpected element type");
}

py::object to_python(std::string_view text) { return decode(text); }

template <class Number>
py::object to_python(const Number& number) {
    return py::cast(number);
}

py::dict metadata_types(const PyGgufFile& self) {
    py::dict result;
    for (const gguf::KeyValue& entry : self.file.key_values()) {
        const auto* array = std::get_if<gguf::ArrayView>(&entry.value);
        const py::object element = array ? py::cast(static_cast<uint32_t>(array->type)) : py::none();
        result[decode(entry.key)] = py::make_tuple(static_cast<uint32_t>(entry.type()), element);
    }
    return result;
}

py::tuple shape(const gguf::TensorInfo& tensor) {
    py::tuple result(tensor.n_dims);
    for (uint32_t i = 0; i < tensor.n_dims; ++i) result[i] = tensor.ne[tensor.n_dims - 1 - i];
    return result;
}

/// The tensor's blocks as they are stored: [n_bytes] uint8; without a copy if the file was given as bytes, which live
/// as long as the array. A view of a mapped file would end the process if that was cut.
py::array tensor_data(const py::object& self, const std::string& name) {
    const auto& file = self.cast<const PyGgufFile&>().file;
    const gguf::TensorInfo* tensor = file.find_tensor(name);
    if (tensor == nullptr) throw py::key_error("no tensor " + name);
    const auto n = static_cast<py::ssize_t>(tensor->data.size());
    const void* data = tensor->data.data();
    py::object owner = self;
    if (file.source()) {
        owner = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, n));
        if (!owner) throw py::error_already_set();
        auto* const out = reinterpret_cast<std::byte*>(PyBytes_AS_STRING(owner.ptr()));
        {
            const WithoutGil released;
            file.read(tensor->data, out);
        }
        data = out;
    }
    py::array array(py::dtype::of<uint8_t>(), n, data, owner);
    array.attr("flags").attr("writeable") = false;  // NumPy refuses to set it back: the owner is not writable
    return array;
}

/// FileError as the OSError that Python's own open() would raise (FileNotFoundError, IsADirectoryError, ...).
void translate_file_error(std::exception_ptr raised) {
    try {
        if (raised) std::rethrow_exception(raised);
    } catch (const FileError& error) {
        const std::string_view path = error.path();
        const auto name =
            py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefaultAndSize(path.data(), py::ssize_t(path.size())));
        if (!name) return;  // the decoding error is set
        const auto args = py::make_tuple(error.code(), py::str(error.reason()), name);
        PyErr_SetObject(PyExc_OSError, args.ptr());
    }
}

}  // namespace

gguf::GgufFile open_gguf(const std::string& path) {
    const WithoutGil released;
    return gguf::GgufFile::open(path);
}

py::dict metadata(const gguf::GgufFile& file) {
    py::dict result;
    for (const gguf::KeyValue& entry : file.key_values()) {
        result[decode(entry.key)] = std::visit([](const auto& value) { return to_python(value); }, entry.value);
    }
    return result;
}

void bind_gguf(py::module_& m) {
    py::register_local_exception_translator(&translate_file_error);

    py::class_<gguf::TensorInfo>(m, "GgufTensor", "One tensor's entry in a GgufFile.")
        .def_readonly("name", &gguf::TensorInfo::name)
        .def_property_readonly("shape", &shape, "NumPy order: slowest dimension first, row length last.")
        .def_property_readonly(
            "type", [](const gguf::TensorInfo& tensor) { return gguf::type_traits(tensor.type).name; },
            "The ggml type: 'F32', 'Q8_0', ...")
        .def_readonly("offset", &gguf::TensorInfo::offset, "Of the data, in bytes from the start of the file.")
        .def_property_readonly("n_bytes", [](const gguf::TensorInfo& tensor) { return tensor.data.size(); });

    py::class_<PyGgufFile> file(m, "GgufFile",
                                "A validated GGUF file. Raises GGUFError for anything malformed, OSError if the "
                                "path cannot be opened.\n\n"
                                "Tensors are read when they are asked for; GGUFError if the file was cut meanwhile.");
    def_init(file, &open_file, py::arg("path"))
        .def_static("from_bytes", &parse_bytes, py::arg("data"), "Parses the content of a file; keeps `data` alive.")
        .def_property_readonly("version", [](const PyGgufFile& self) { return self.file.version(); })
        .def_property_readonly("alignment", [](const PyGgufFile& self) { return self.file.alignment(); })
        .def_property_readonly(
            "metadata", [](const PyGgufFile& self) { return metadata(self.file); },
            "A new dict in file order. Arrays of numbers are ndarrays of the stored type, arrays of "
            "strings lists; bytes that are not UTF-8 become U+FFFD.")
        .def_property_readonly("metadata_types", &metadata_types,
                               "Key -> (type, element type of an array or None), as the file numbers them.")
        .def_property_readonly(
            "tensors", [](const PyGgufFile& self) { return self.file.tensors(); }, py::return_value_policy::copy)
        .def("tensor_data", &tensor_data, py::arg("name"),
             "The stored bytes of a tensor, uint8 [n_bytes], read-only. "
             "KeyError if there is no such tensor.");
}

}  // namespace fixmin::bindings
