// GgufFile's typed getters and moves, which Python does not see.  Usage: typed_access FILE, where
// FILE was written by test_gguf_native.py.  Prints each broken expectation; exit status 0 if there is none.
#include <cerrno>
#include <cstdio>
#include <iostream>
#include <string>

#include "error.h"
#include "gguf/gguf_file.h"

namespace {

using namespace fixmin::gguf;

int g_failures = 0;

void expect(bool condition, const std::string& what) {
    if (condition) return;
    std::cout << "failed: " << what << "\n";
    ++g_failures;
}

/// `call` throws GgufError with a message that contains every one of `parts`.
template <class Call>
void expect_error(Call call, std::initializer_list<const char*> parts) {
    try {
        call();
    } catch (const fixmin::GgufError& error) {
        const std::string message = error.what();
        for (const char* part : parts) {
            expect(message.find(part) != std::string::npos, "'" + message + "' contains '" + part + "'");
        }
        return;
    }
    expect(false, std::string("an error that contains ") + *parts.begin());
}

void check_integers(const GgufFile& file) {
    for (const char* key : {"u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"}) {
        expect(file.get_u32(key) == 7, std::string("get_u32 of ") + key);
    }
    expect(file.get_u32("u64.fits") == UINT32_MAX, "largest u32 stored as u64");
    expect_error([&] { file.get_u32("u64.max"); }, {"'u64.max'", "18446744073709551615 does not fit u32"});
    expect_error([&] { file.get_u32("u64.over"); }, {"'u64.over'", "4294967296 does not fit u32"});
    expect_error([&] { file.get_u32("i8.negative"); }, {"'i8.negative'", "-1 does not fit u32"});
    expect_error([&] { file.get_u32("bool.true"); }, {"'bool.true'", "expected u32, found bool"});
    expect_error([&] { file.get_u32("f32"); }, {"'f32'", "expected u32, found f32"});
    expect_error([&] { file.get_u32("u8s"); }, {"'u8s'", "expected u32, found array of u8"});
}

void check_floats(const GgufFile& file) {
    expect(file.get_f32("f32") == 0.5f, "f32");
    expect(file.get_f32("f64") == 0.1f, "f64 is rounded once");
    for (const char* key : {"f32.nan", "f32.inf", "f64.nan", "f64.inf", "f64.huge"}) {
        expect_error([&] { file.get_f32(key); }, {key, "is not a finite f32"});
    }
    expect_error([&] { file.get_f32("u32"); }, {"'u32'", "expected f32, found u32"});
    expect(file.get_f32_array("f32s") == std::vector<float>{0.0f, 1.0f, -2.5f}, "f32 array");
    expect(file.get_f32_array("f64s") == std::vector<float>{0.1f, 2.0f}, "f64 array");
    expect(file.get_f32_array("f32s.empty").empty(), "empty f32 array");
    expect_error([&] { file.get_f32_array("f32s.nan"); }, {"'f32s.nan'", "is not a finite f32"});
    expect_error([&] { file.get_f32_array("u8s"); }, {"'u8s'", "expected array of f32, found array of u8"});
    expect_error([&] { file.get_f32_array("f32"); }, {"'f32'", "expected array of f32, found f32"});
}

void check_others(const GgufFile& file) {
    expect(file.get_string("text") == std::string_view("a\0b", 3), "string with NUL");
    expect_error([&] { file.get_string("strings"); }, {"'strings'", "expected string, found array of string"});

    const auto bytes = file.get_u8_array("u8s");
    expect(bytes.size() == 3 && bytes[0] == 0 && bytes[1] == 255 && bytes[2] == 7, "u8 array");
    expect_error([&] { file.get_u8_array("i8s"); }, {"'i8s'", "expected array of u8, found array of i8"});
    expect_error([&] { file.get_u8_array("text"); }, {"'text'", "expected array of u8, found string"});
}

void check_absent(const GgufFile& file) {
    expect(!file.has("absent") && file.has("u8") && file.find("absent") == nullptr, "has");
    expect_error([&] { file.get_u32("absent"); }, {"'absent' is missing (expected u32)"});
    expect_error([&] { file.get_f32_array("absent"); }, {"'absent' is missing (expected array of f32)"});
    expect_error([&] { file.get_string("\xff"); }, {"'\\xff' is missing"});
}

void check_move(const std::string& path) {
    GgufFile first = GgufFile::open(path);
    const TensorInfo* tensor = first.find_tensor("big");
    expect(tensor != nullptr, "tensor is found");
    const std::byte* data = tensor->data.data();
    GgufFile second = std::move(first);
    expect(second.find_tensor("big")->data.data() == data, "a move keeps the mapping");
    first = GgufFile::open(path);
    second = std::move(first);
    expect(second.find_tensor("big")->data[4096] == std::byte{4096 % 251}, "move assignment");
    expect(second.get_string("text").size() == 3, "views after move assignment");
}

void check_open_errors() {
    try {
        GgufFile::open("/nonexistent/file.gguf");
        expect(false, "opening an absent file throws");
    } catch (const fixmin::FileError& error) {
        expect(error.code() == ENOENT, "the error code tells why");
        expect(error.path() == "/nonexistent/file.gguf", "the path is named");
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return 2;
    const GgufFile file = GgufFile::open(argv[1]);
    check_integers(file);
    check_floats(file);
    check_others(file);
    check_absent(file);
    check_move(argv[1]);
    check_open_errors();
    return g_failures == 0 ? 0 : 1;
}
