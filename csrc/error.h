// The closed list of errors that the native code throws. Nothing here aborts the process.
#pragma once
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

namespace fixmin {

/// Base of everything thrown on purpose.  Python: FixminError.
class Error : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// A GGUF file is malformed, truncated, or lacks a key or tensor that the model needs.  Python: GGUFError.
class GgufError : public Error {
    using Error::Error;
};

/// A well-formed request for something this build does not do (tensor type, ISA).  Python: UnsupportedError.
class UnsupportedError : public Error {
    using Error::Error;
};

/// A sequence does not fit the context.  Python: ContextLengthError.
class ContextLengthError : public Error {
    using Error::Error;
};

/// An argument outside its range.  Python: ValueError.
class ArgumentError : public Error {
    using Error::Error;
};

/// A GPU has failed; what runs on it ends.  Python: DeviceError.
class DeviceError : public Error {
    using Error::Error;
};

/// The system refuses something of a file.  Python: OSError with errno, strerror and filename.
class FileError : public std::runtime_error {
  public:
    FileError(int code, const std::string& path, std::string_view note = {})
        : FileError(code, path, std::generic_category().message(code).append(note)) {}
    int code() const { return code_; }
    std::string_view path() const { return std::string_view(what()).substr(0, path_size_); }
    std::string_view reason() const { return std::string_view(what()).substr(path_size_ + 2); }

  private:
    FileError(int code, const std::string& path, const std::string& reason)
        : std::runtime_error(path + ": " + reason), code_(code), path_size_(path.size()) {}
    int code_;
    size_t path_size_;
};

/// Memory that the system does not give, with what it was for.  Python: MemoryError.
class OutOfMemory : public std::bad_alloc {
  public:
    explicit OutOfMemory(const std::string& what) : what_(what) {}
    const char* what() const noexcept override { return what_.what(); }

  private:
    std::runtime_error what_;  // its copies, unlike a string's, cannot fail
};

/// Text from a file, made fit for a message: quoted, printable ASCII, shortened.
inline std::string quoted(std::string_view text) {
    constexpr size_t kMaxShown = 80;
    constexpr char kHex[] = "0123456789abcdef";
    std::string out = "'";
    for (const char c : text.substr(0, kMaxShown)) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte >= 0x20 && byte < 0x7f) {
            out += c;
        } else {
            out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
        }
    }
    return out + (text.size() > kMaxShown ? "...'" : "'");
}

}  // namespace fixmin
