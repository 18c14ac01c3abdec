// libFuzzer entry point for the GGUF reader:
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Icsrc tests/fuzz/gguf_fuzz.cpp
//   csrc/gguf/gguf_file.cpp
//   ./a.out tests/fuzz/seeds/gguf
// Without libFuzzer: gguf_fuzz_main.cpp.
//
// Whatever the bytes are, GgufFile::parse returns or throws GgufError; any other exception escapes and ends
// the run. What it returned must keep its promises, which are checked here with abort().
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "gguf/gguf_file.h"

namespace {

using namespace fixmin::gguf;

// A sum of all bytes that were looked at, so that no read is optimised away.
volatile uint64_t g_sum = 0;

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "broken promise: %s\n", what);
    std::abort();
}

template <class T>
void read_bytes(std::span<const T> range) {
    uint64_t sum = 0;
    for (const T& item : range) sum += static_cast<uint64_t>(item);
    g_sum = g_sum + sum;
}

bool inside(std::span<const std::byte> part, std::span<const std::byte> whole) {
    return part.data() >= whole.data() && part.data() + part.size() <= whole.data() + whole.size();
}

/// A typed getter may refuse the value, with GgufError only.
template <class Getter>
void try_get(Getter getter) {
    try {
        getter();
    } catch (const fixmin::GgufError& error) {
        require(*error.what() != '\0', "an error has a message");
    }
}

void check_values(const GgufFile& file) {
    for (const KeyValue& entry : file.key_values()) {
        require(!entry.key.empty(), "keys are not empty");
        if (const auto* text = std::get_if<std::string_view>(&entry.value)) {
            read_bytes(std::span(*text));
        } else if (const auto* array = std::get_if<ArrayView>(&entry.value)) {
            require(array->type != ValueType::array, "arrays are not nested");
            read_bytes(array->bytes);
            if (array->type == ValueType::string) {
                const auto strings = array->strings();
                require(strings.size() == array->count, "as many strings as the count says");
                for (const std::string_view text : strings) read_bytes(std::span(text));
            }
        }
        require(file.find(entry.key) == &entry, "every key is found");
        // One of them for each key: under the sanitizers an exception takes as long as the rest.
        switch ((entry.offset + file.key_values().size()) % 5) {
            case 0: try_get([&] { g_sum = g_sum + file.get_u32(entry.key); }); break;
            case 1: try_get([&] { require(std::isfinite(file.get_f32(entry.key)), "get_f32 is finite"); }); break;
            case 2: try_get([&] { read_bytes(std::span(file.get_string(entry.key))); }); break;
            case 3: try_get([&] { read_bytes(file.get_u8_array(entry.key)); }); break;
            default:
                try_get([&] {
                    for (const float x : file.get_f32_array(entry.key)) require(std::isfinite(x), "arrays are finite");
                });
        }
    }
}

void check_tensors(const GgufFile& file) {
    const std::byte* end_of_last = file.bytes().data();
    for (const TensorInfo& tensor : file.tensors()) {
        const TypeTraits* traits = type_traits(static_cast<uint32_t>(tensor.type));
        require(traits != nullptr, "tensor types are known");
        require(inside(tensor.data, file.bytes()), "data is inside the file");
        require(tensor.data.data() == file.bytes().data() + tensor.offset, "offset is that of the data");
        require(tensor.offset % file.alignment() == 0, "data is aligned");
        require(tensor.data.data() >= end_of_last, "tensors do not overlap");
        require(tensor.data.size() == tensor.n_elements() / traits->block_size * traits->block_bytes, "size in bytes");
        require(file.find_tensor(tensor.name) == &tensor, "every tensor is found");
        end_of_last = tensor.data.data() + tensor.data.size();
        read_bytes(tensor.data);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try {
        GgufFile parsed = GgufFile::parse(std::as_bytes(std::span(data, size)));
        const GgufFile file = std::move(parsed);  // views survive a move
        check_values(file);
        check_tensors(file);
        return 0;
    } catch (const fixmin::GgufError&) {
        return -1;  // refused; libFuzzer need not keep it in its corpus
    }
}
