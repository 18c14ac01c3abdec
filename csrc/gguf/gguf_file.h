// A GGUF file, mapped and completely validated.  No knowledge of any model: keys and tensors as they are
// stored.
//
// After `open` or `parse` returns, every string, array and tensor that the file names lies inside its bytes.
// Format: ggml docs/gguf.md, versions 2 and 3, little-endian.
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "error.h"
#include "gguf/ggml_type.h"

namespace fixmin::gguf {

static_assert(std::endian::native == std::endian::little, "GGUF values are read in place");
static_assert(sizeof(size_t) == 8, "files larger than 4 GiB are mapped whole");

/// The type of a metadata value; the numbers are those of the file.
enum class ValueType : uint32_t {
    u8 = 0,
    i8 = 1,
    u16 = 2,
    i16 = 3,
    u32 = 4,
    i32 = 5,
    f32 = 6,
    boolean = 7,
    string = 8,
    array = 9,
    u64 = 10,
    i64 = 11,
    f64 = 12,
};

/// A metadata array, still in the file's encoding.
struct ArrayView {
    ValueType type;                    // of the elements; never ValueType::array
    uint64_t count;                    // elements
    std::span<const std::byte> bytes;  // the encoded elements, without type and count; any alignment

    /// Element `i` < count of an array of numbers or bools whose C++ type is T.
    template <class T>
    T number(uint64_t i) const noexcept {
        T value;
        std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
        return value;
    }

    /// All elements of an array of strings, [count]; views into the file.
    std::vector<std::string_view> strings() const;
};

/// A metadata value.  The alternative's index is its ValueType.
using Value = std::variant<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, float, bool, std::string_view,
                           ArrayView, uint64_t, int64_t, double>;

/// One metadata entry.  Views are into the file's bytes and live as long as the GgufFile.
struct KeyValue {
    std::string_view key;  // printable ASCII, 1 to 65535 bytes
    Value value;           // strings may hold any bytes: the format does not enforce UTF-8
    uint64_t offset;       // of the entry, from the start of the file

    ValueType type() const noexcept { return static_cast<ValueType>(value.index()); }
};

struct TensorInfo {
    std::string name;            // printable ASCII, 1 to 64 bytes
    uint32_t n_dims;             // 0 (a scalar) to 4
    std::array<uint64_t, 4> ne;  // elements per dimension, row length first; 1 beyond n_dims; never 0
    GgmlType type;
    uint64_t offset;                  // of the data, from the start of the file; a multiple of GgufFile::alignment
    std::span<const std::byte> data;  // all blocks, inside the file's bytes

    uint64_t n_elements() const noexcept { return ne[0] * ne[1] * ne[2] * ne[3]; }
};

/// The open file behind a GgufFile: the same bytes even when its path names another file by now.
class Source {
  public:
    /// Throws FileError if it cannot be opened or is not a regular file.
    explicit Source(const std::string& path);
    ~Source();
    Source(const Source&) = delete;

    const std::string& path() const noexcept { return path_; }
    int fd() const noexcept { return fd_; }
    /// When it was opened, bytes.
    uint64_t size() const noexcept { return size_; }
    /// Whether it has been written to, or cut, since it was opened.
    bool changed() const noexcept;
    /// Fills `out` from byte `offset` on. Throws GgufError if the file has become shorter, FileError. Unlike a
    /// mapping this never raises SIGBUS.
    void read(uint64_t offset, std::span<std::byte> out) const;

  private:
    std::string path_;
    int fd_;
    uint64_t size_ = 0;
    int64_t modified_ns_ = 0;
};

class GgufFile {
  public:
    /// Maps the file at `path` and validates it.
    /// Throws FileError if it cannot be opened or mapped or is not a regular file, GgufError, which names the
    /// path, if it is malformed.
    static GgufFile open(const std::string& path);

    /// Validates `bytes` in place; the caller keeps them alive and unchanged.  Throws GgufError.
    /// Tensor data is only as aligned as `bytes` is: read it with unaligned loads.
    static GgufFile parse(std::span<const std::byte> bytes);

    /// Null after `parse`.
    const std::shared_ptr<const Source>& source() const noexcept { return source_; }

    /// Copies bytes of `range`, a part of a tensor's data, to `out` of the same size; safe against a file that is cut
    /// meanwhile, which throws GgufError.
    void read(std::span<const std::byte> range, std::byte* out) const;

    uint32_t version() const noexcept { return version_; }
    /// Of tensor data in the file; bytes, a power of two.
    uint64_t alignment() const noexcept { return alignment_; }
    /// The whole file.
    std::span<const std::byte> bytes() const noexcept { return bytes_; }

    /// In file order.
    const std::vector<TensorInfo>& tensors() const noexcept { return tensors_; }
    /// nullptr if there is no such tensor.
    const TensorInfo* find_tensor(std::string_view name) const noexcept;

    /// In file order.
    const std::vector<KeyValue>& key_values() const noexcept { return key_values_; }
    /// nullptr if there is no such key.
    const KeyValue* find(std::string_view key) const noexcept;
    bool has(std::string_view key) const noexcept { return find(key) != nullptr; }

    // Typed access. GgufError if the key is absent, or, naming the expected and the actual type, if the value does not
    // fit.

    /// Any integer type, if the value fits.
    uint32_t get_u32(std::string_view key) const;
    /// f32, or f64 rounded to f32; finite.
    float get_f32(std::string_view key) const;
    /// A view into the file, not NUL-terminated.
    std::string_view get_string(std::string_view key) const;
    std::span<const uint8_t> get_u8_array(std::string_view key) const;
    /// f32, or f64 rounded to f32; every element finite.
    std::vector<float> get_f32_array(std::string_view key) const;

  private:
    struct Unmap {
        size_t bytes;
        void operator()(std::byte* p) const;
    };

    GgufFile() = default;
    void map();
    void parse_all();
    void keep_header();

    std::shared_ptr<const Source> source_;
    uint64_t header_end_ = 0;                    // of keys and tensor infos
    std::unique_ptr<std::byte, Unmap> mapping_;  // private and read-only; null after `parse`
    std::span<const std::byte> bytes_;
    uint32_t version_ = 0;
    uint64_t alignment_ = 0;
    std::vector<KeyValue> key_values_;
    std::vector<TensorInfo> tensors_;
    // Positions in key_values_ and tensors_, sorted by key and name: see build_index in the .cpp file.
    std::vector<uint32_t> key_index_;
    std::vector<uint32_t> tensor_index_;
};

}  // namespace fixmin::gguf
