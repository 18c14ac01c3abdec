#include "gguf/gguf_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>

namespace fixmin::gguf {
namespace {

// ---- limits ---------------------------------------------------------------------------------------------------------

constexpr uint64_t kMaxKeyBytes = 65535;          // the format's own limit
constexpr uint64_t kMaxNameBytes = 64;            // the format's own limit
constexpr uint64_t kMaxStringBytes = 1ull << 30;  // ggml's limits: what it refuses is refused here
constexpr uint64_t kMaxArrayCount = 1ull << 30;
constexpr uint64_t kMinAlignment = 8;        // the format asks for a multiple of 8, ggml for a power of two
constexpr uint64_t kMaxAlignment = 1 << 21;  // a huge page: there is no reason to align to more
constexpr uint64_t kDefaultAlignment = 32;

// The fewest bytes that an entry can have, so that a count is checked against the bytes left before it is
// used.
constexpr uint64_t kMinKeyValueBytes = 8 + 1 + 4 + 1;    // key length, key, type, value
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 4 + 8;  // name length, name, n_dims, type, offset

constexpr uint32_t kMagic = 0x46554747;  // "GGUF" as a little-endian number

// Bytes per value or element, indexed by ValueType; 0 where the size varies.
constexpr uint64_t kValueBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
constexpr const char* kValueTypeNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                           "bool", "string", "array", "u64", "i64", "f64"};
static_assert(std::size(kValueBytes) == std::variant_size_v<Value>);
static_assert(std::size(kValueTypeNames) == std::variant_size_v<Value>);

// ---- error messages -------------------------------------------------------------------------------------------------

std::string type_description(const Value& value) {
    if (const auto* array = std::get_if<ArrayView>(&value)) {
        return std::string("array of ") + kValueTypeNames[static_cast<uint32_t>(array->type)];
    }
    return kValueTypeNames[value.index()];
}

[[noreturn]] void fail_value(const KeyValue& entry, const std::string& why) {
    throw GgufError("GGUF key " + quoted(entry.key) + " at byte " + std::to_string(entry.offset) + ": " + why);
}

[[noreturn]] void fail_type(const KeyValue& entry, const char* expected) {
    fail_value(entry, std::string("expected ") + expected + ", found " + type_description(entry.value));
}

// ---- reading --------------------------------------------------------------------------------------------------------

/// A position in the file that never leaves it, and the name of what is being read, for messages.
class Cursor {
  public:
    explicit Cursor(std::span<const std::byte> bytes) : bytes_(bytes) {}

    uint64_t position() const noexcept { return position_; }
    uint64_t left() const noexcept { return bytes_.size() - position_; }

    /// What has been read from position `begin` on.
    std::span<const std::byte> since(uint64_t begin) const { return bytes_.subspan(begin, position_ - begin); }

    /// What follows belongs to the entry `index` of the kind "header", "key" or "tensor" until `name_entry`.
    void begin_entry(const char* kind, uint64_t index) {
        kind_ = kind;
        index_ = index;
        name_ = {};
    }
    void name_entry(std::string_view name) { name_ = name; }

    [[noreturn]] void fail(uint64_t at, const std::string& why) const {
        std::string place = kind_;
        if (!name_.empty()) {
            place += " " + quoted(name_);
        } else if (kind_ != kHeader) {
            place += " number " + std::to_string(index_);
        }
        throw GgufError("GGUF " + place + " at byte " + std::to_string(at) + ": " + why);
    }

    /// The next `size` bytes; `field` says what they are.
    std::span<const std::byte> take(uint64_t size, const char* field) {
        if (size > left()) {
            fail(position_, std::string(field) + " needs " + std::to_string(size) + " bytes, " +
                                std::to_string(left()) + " are left in the file");
        }
        const auto taken = bytes_.subspan(position_, size);
        position_ += size;
        return taken;
    }

    template <class T>
    T number(const char* field) {
        T value;
        std::memcpy(&value, take(sizeof(T), field).data(), sizeof(T));
        return value;
    }

    /// A count of things that take at least `min_bytes` each, so no more than the bytes left can hold.
    uint64_t count(const char* field, uint64_t min_bytes, uint64_t max_count) {
        const uint64_t at = position_;
        const auto count = number<uint64_t>(field);
        if (count > left() / min_bytes) {
            fail(at, std::string(field) + " is " + std::to_string(count) + ", but the " + std::to_string(left()) +
                         " bytes left in the file cannot hold so many");
        }
        if (count > max_count) {
            fail(at, std::string(field) + " is " + std::to_string(count) + ", more than " + std::to_string(max_count));
        }
        return count;
    }

    std::string_view string(const char* field, uint64_t max_bytes) {
        const uint64_t size = count(field, 1, max_bytes);
        const auto text = take(size, field);
        return {reinterpret_cast<const char*>(text.data()), text.size()};
    }

    /// A key or tensor name.  Printable ASCII (a key must be ASCII by the format), because names become the
    /// keys of dicts and parts of messages: two that differ only in unprintable bytes would look the same.
    std::string_view name(const char* field, uint64_t max_bytes) {
        const uint64_t at = position_;
        const std::string_view name = string(field, max_bytes);
        if (name.empty()) fail(at, std::string(field) + " is 0: the name is empty");
        for (const char c : name) {
            if (c < 0x20 || c > 0x7e) fail(at, "name " + quoted(name) + " is not printable ASCII");
        }
        return name;
    }

    bool boolean() {
        const uint64_t at = position_;
        const auto byte = number<uint8_t>("bool");
        if (byte > 1) fail(at, "bool is " + std::to_string(byte) + ", neither 0 nor 1");
        return byte == 1;
    }

    ValueType value_type(const char* field) {
        const uint64_t at = position_;
        const auto raw = number<uint32_t>(field);
        if (raw >= std::size(kValueBytes)) fail(at, std::string(field) + " " + std::to_string(raw) + " does not exist");
        return static_cast<ValueType>(raw);
    }

    static constexpr const char* kHeader = "header";

  private:
    std::span<const std::byte> bytes_;
    uint64_t position_ = 0;
    const char* kind_ = kHeader;
    uint64_t index_ = 0;
    std::string_view name_;
};

ArrayView read_array(Cursor& in) {
    const uint64_t at = in.position();
    const ValueType type = in.value_type("array element type");
    // As in ggml: nothing uses nested arrays, and their depth would be the file's to choose.
    if (type == ValueType::array) in.fail(at, "arrays of arrays are not supported");

    const uint64_t element_bytes = kValueBytes[static_cast<uint32_t>(type)];
    const bool is_string = type == ValueType::string;
    const uint64_t count = in.count("array length", is_string ? 8 : element_bytes, kMaxArrayCount);
    const uint64_t begin = in.position();
    if (is_string) {
        for (uint64_t i = 0; i < count; ++i) in.string("string length", kMaxStringBytes);
    } else if (type == ValueType::boolean) {
        for (uint64_t i = 0; i < count; ++i) in.boolean();
    } else {
        in.take(count * element_bytes, "array");
    }
    return {type, count, in.since(begin)};
}

Value read_value(Cursor& in, ValueType type) {
    switch (type) {
        case ValueType::u8: return in.number<uint8_t>("u8");
        case ValueType::i8: return in.number<int8_t>("i8");
        case ValueType::u16: return in.number<uint16_t>("u16");
        case ValueType::i16: return in.number<int16_t>("i16");
        case ValueType::u32: return in.number<uint32_t>("u32");
        case ValueType::i32: return in.number<int32_t>("i32");
        case ValueType::f32: return in.number<float>("f32");
        case ValueType::boolean: return in.boolean();
        case ValueType::string: return in.string("string length", kMaxStringBytes);
        case ValueType::array: return read_array(in);
        case ValueType::u64: return in.number<uint64_t>("u64");
        case ValueType::i64: return in.number<int64_t>("i64");
        case ValueType::f64: return in.number<double>("f64");
    }
    in.fail(in.position(), "unreachable value type");  // value_type() has checked it
}

KeyValue read_key_value(Cursor& in) {
    const uint64_t offset = in.position();
    const std::string_view key = in.name("key length", kMaxKeyBytes);
    in.name_entry(key);
    const ValueType type = in.value_type("value type");
    return {key, read_value(in, type), offset};
}

/// Everything about a tensor except where its data lies: `offset` is still relative and `data` empty.
TensorInfo read_tensor_info(Cursor& in) {
    TensorInfo tensor{};
    const std::string_view name = in.name("tensor name length", kMaxNameBytes);
    in.name_entry(name);
    tensor.name = name;

    uint64_t at = in.position();
    tensor.n_dims = in.number<uint32_t>("n_dims");
    if (tensor.n_dims > tensor.ne.size()) {
        in.fail(at, "n_dims is " + std::to_string(tensor.n_dims) + ", more than " + std::to_string(tensor.ne.size()));
    }
    tensor.ne.fill(1);
    uint64_t n_elements = 1;
    for (uint32_t i = 0; i < tensor.n_dims; ++i) {
        at = in.position();
        tensor.ne[i] = in.number<uint64_t>("dimension");
        if (tensor.ne[i] == 0) in.fail(at, "dimension " + std::to_string(i) + " is 0");
        // ggml counts elements in int64.
        if (__builtin_mul_overflow(n_elements, tensor.ne[i], &n_elements) || n_elements > INT64_MAX) {
            in.fail(at, "the number of elements overflows at dimension " + std::to_string(i) + " of " +
                            std::to_string(tensor.ne[i]));
        }
    }

    at = in.position();
    const auto raw_type = in.number<uint32_t>("tensor type");
    const TypeTraits* traits = type_traits(raw_type);
    if (traits == nullptr) in.fail(at, "tensor type " + std::to_string(raw_type) + " does not exist");
    if (tensor.ne[0] % traits->block_size != 0) {
        in.fail(at, "row length " + std::to_string(tensor.ne[0]) + " is not a multiple of the block size " +
                        std::to_string(traits->block_size) + " of " + traits->name);
    }
    tensor.type = static_cast<GgmlType>(raw_type);
    tensor.offset = in.number<uint64_t>("tensor offset");
    return tensor;
}

constexpr uint64_t align_up(uint64_t value, uint64_t alignment) { return (value + alignment - 1) & ~(alignment - 1); }

/// Sets `offset` and `data` of every tensor.  Like ggml this accepts one layout only: tensors in the order of
/// their entries, each starting at the first aligned byte after the one before.  So they cannot overlap.
void place_tensors(std::span<const std::byte> file, uint64_t infos_end, uint64_t alignment,
                   std::vector<TensorInfo>& tensors) {
    const uint64_t data_begin = align_up(infos_end, alignment);  // no overflow: infos_end is inside the file
    uint64_t expected = 0;                                       // relative to data_begin
    for (TensorInfo& tensor : tensors) {
        const auto fail = [&](const std::string& why) {
            throw GgufError("GGUF tensor " + quoted(tensor.name) + " with data at byte " + std::to_string(data_begin) +
                            " + " + std::to_string(tensor.offset) + ": " + why);
        };
        if (tensor.offset % alignment != 0) fail("not a multiple of the alignment " + std::to_string(alignment));
        if (tensor.offset < expected) fail("overlaps another tensor: expected + " + std::to_string(expected));
        if (tensor.offset > expected) fail("leaves a gap: expected + " + std::to_string(expected));

        const TypeTraits& traits = type_traits(tensor.type);
        uint64_t n_bytes = 0;
        if (__builtin_mul_overflow(tensor.n_elements() / traits.block_size, uint64_t{traits.block_bytes}, &n_bytes)) {
            fail("the size in bytes overflows");
        }
        const uint64_t section = file.size() < data_begin ? 0 : file.size() - data_begin;
        if (tensor.offset > section || n_bytes > section - tensor.offset) {
            fail("its " + std::to_string(n_bytes) + " bytes end beyond the file's " + std::to_string(file.size()) +
                 " bytes");
        }
        tensor.data = file.subspan(data_begin + tensor.offset, n_bytes);
        tensor.offset += data_begin;
        expected += align_up(n_bytes, alignment);  // no overflow: both are at most about the size of the file
    }
}

/// The positions of all entries, sorted by name; throws if two have the same name.  Sorted positions and not
/// a hash table: a lookup costs about nine comparisons for a real model, memory is four bytes per entry, and
/// a hostile file cannot choose names that collide and make reading take quadratic time.
template <class Entry, class NameOf>
std::vector<uint32_t> build_index(const std::vector<Entry>& entries, NameOf name_of, const char* kind) {
    std::vector<uint32_t> index(entries.size());
    std::iota(index.begin(), index.end(), 0);
    std::sort(index.begin(), index.end(), [&](uint32_t a, uint32_t b) {
        const int order = name_of(entries[a]).compare(name_of(entries[b]));
        return order != 0 ? order < 0 : a < b;
    });
    const auto same = std::adjacent_find(
        index.begin(), index.end(), [&](uint32_t a, uint32_t b) { return name_of(entries[a]) == name_of(entries[b]); });
    if (same != index.end()) {
        throw GgufError(std::string("GGUF ") + kind + " " + quoted(name_of(entries[same[0]])) +
                        " appears twice: at byte " + std::to_string(entries[same[0]].offset) + " and at byte " +
                        std::to_string(entries[same[1]].offset));
    }
    return index;
}

template <class Entry, class NameOf>
const Entry* find_entry(const std::vector<Entry>& entries, const std::vector<uint32_t>& index, NameOf name_of,
                        std::string_view name) noexcept {
    const auto at = std::lower_bound(index.begin(), index.end(), name,
                                     [&](uint32_t i, std::string_view wanted) { return name_of(entries[i]) < wanted; });
    return at != index.end() && name_of(entries[*at]) == name ? &entries[*at] : nullptr;
}

constexpr auto key_of = [](const KeyValue& entry) -> std::string_view { return entry.key; };
constexpr auto name_of = [](const TensorInfo& tensor) -> std::string_view { return tensor.name; };

// ---- typed access ---------------------------------------------------------------------------------------------------

float to_finite_f32(const KeyValue& entry, double value) {
    // NaN fails the comparison too.
    if (!(std::abs(value) <= std::numeric_limits<float>::max()))
        fail_value(entry, std::to_string(value) + " is not a finite f32");
    return static_cast<float>(value);
}

/// The value if it is of the alternative T.
template <class T>
const T& as(const KeyValue& entry, const char* expected) {
    const T* value = std::get_if<T>(&entry.value);
    if (value == nullptr) fail_type(entry, expected);
    return *value;
}

const KeyValue& required(const GgufFile& file, std::string_view key, const char* expected) {
    if (const KeyValue* entry = file.find(key)) return *entry;
    throw GgufError("GGUF key " + quoted(key) + " is missing (expected " + expected + ")");
}

}  // namespace

std::vector<std::string_view> ArrayView::strings() const {
    std::vector<std::string_view> result;
    result.reserve(count);
    Cursor in(bytes);
    for (uint64_t i = 0; i < count; ++i) result.push_back(in.string("string length", kMaxStringBytes));
    return result;
}

// ---- opening --------------------------------------------------------------------------------------------------------

// The mapping shares its pages with the file. If another process truncates the file while it is mapped, touching a page
// beyond the new end raises SIGBUS. So tensors are read, not touched (GgufFile::read), and keys and tensor infos are
// copied once they have been parsed. Every extent is checked against the size that was mapped, `open` refuses a file
// that changes while it is being validated, and a file replaced by rename (as the converter does) leaves the mapped one
// intact.
void GgufFile::map() {
    const size_t size = source_->size();
    void* base = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, source_->fd(), 0);
    if (base == MAP_FAILED) {
        if (errno == ENOMEM) throw OutOfMemory("the system gives no " + std::to_string(size) + " bytes for the file");
        throw FileError(errno, source_->path());
    }
    mapping_ = {static_cast<std::byte*>(base), Unmap{size}};
    bytes_ = {mapping_.get(), size};
}

void GgufFile::Unmap::operator()(std::byte* p) const { munmap(p, bytes); }

namespace {

int64_t nanoseconds(const struct stat& status) {
#if defined(__APPLE__)
    const timespec& t = status.st_mtimespec;
#else
    const timespec& t = status.st_mtim;
#endif
    return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

}  // namespace

// Without O_NONBLOCK the opening of a named pipe would wait for a writer.
Source::Source(const std::string& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (fd_ < 0) throw FileError(errno, path);
    struct stat status{};
    int error = fstat(fd_, &status) != 0 ? errno : 0;
    std::string_view note;
    if (!error && !S_ISREG(status.st_mode)) {
        error = S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
        note = " (not a regular file)";
    }
    if (error) {
        close(fd_);
        throw FileError(error, path, note);
    }
    size_ = uint64_t(status.st_size);
    modified_ns_ = nanoseconds(status);
}

Source::~Source() { close(fd_); }

bool Source::changed() const noexcept {
    struct stat status{};
    return fstat(fd_, &status) != 0 || uint64_t(status.st_size) != size_ || nanoseconds(status) != modified_ns_;
}

void Source::read(uint64_t offset, std::span<std::byte> out) const {
    for (size_t done = 0; done < out.size();) {
        const ssize_t n = pread(fd_, out.data() + done, out.size() - done, off_t(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw FileError(errno, path_);
        if (n == 0) {
            throw GgufError(path_ + ": the file was cut while it was in use: it had " + std::to_string(size_) +
                            " bytes and ends at byte " + std::to_string(offset + done));
        }
        done += size_t(n);
    }
}

void GgufFile::read(std::span<const std::byte> range, std::byte* out) const {
    if (source_)
        source_->read(uint64_t(range.data() - bytes_.data()), {out, range.size()});
    else
        std::memcpy(out, range.data(), range.size());
}

GgufFile GgufFile::open(const std::string& path) {
    GgufFile result;
    result.source_ = std::make_shared<const Source>(path);
    const Source& source = *result.source_;
    try {
        if (source.size() == 0) throw GgufError("GGUF header at byte 0: the file is empty");
        result.map();
        result.parse_all();
    } catch (const GgufError& error) {
        throw GgufError(path + ": " + error.what());
    }
    result.keep_header();
    if (source.changed()) throw GgufError(path + ": the file was changed while it was being read");
    return result;
}

// Puts memory of the process, with the same bytes, where the mapping has the pages of the header.
void GgufFile::keep_header() {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t n = std::min<size_t>(align_up(header_end_, page), bytes_.size());
    std::vector<std::byte> copy(n);
    source_->read(0, copy);
    std::byte* const base = mapping_.get();
    if (mmap(base, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
        throw OutOfMemory("the system gives no " + std::to_string(n) + " bytes for the header");
    std::memcpy(base, copy.data(), n);
    mprotect(base, n, PROT_READ);
}

GgufFile GgufFile::parse(std::span<const std::byte> bytes) {
    GgufFile result;
    result.bytes_ = bytes;
    result.parse_all();
    return result;
}

void GgufFile::parse_all() {
    Cursor in(bytes_);
    if (const auto magic = in.number<uint32_t>("magic"); magic != kMagic) {
        in.fail(0, "not a GGUF file: it does not begin with 'GGUF'");
    }
    version_ = in.number<uint32_t>("version");
    if (version_ != 0 && (version_ & 0xffff) == 0) {
        in.fail(4, "version " + std::to_string(version_) + ": the file is big-endian, which is not supported");
    }
    if (version_ != 2 && version_ != 3) {
        in.fail(4, "version " + std::to_string(version_) + " is not supported; 2 and 3 are");
    }
    const uint64_t n_tensors = in.count("tensor count", kMinTensorBytes, std::numeric_limits<uint32_t>::max());
    const uint64_t n_key_values = in.count("key count", kMinKeyValueBytes, std::numeric_limits<uint32_t>::max());

    // Both vectors grow with what has been read, not with what the header promises.
    for (uint64_t i = 0; i < n_key_values; ++i) {
        in.begin_entry("key", i);
        key_values_.push_back(read_key_value(in));
    }
    key_index_ = build_index(key_values_, key_of, "key");

    alignment_ = kDefaultAlignment;
    if (const KeyValue* entry = find("general.alignment")) {
        alignment_ = as<uint32_t>(*entry, "u32");
        if (!std::has_single_bit(alignment_) || alignment_ < kMinAlignment || alignment_ > kMaxAlignment) {
            fail_value(*entry, std::to_string(alignment_) + " is not a power of two from " +
                                   std::to_string(kMinAlignment) + " to " + std::to_string(kMaxAlignment));
        }
    }

    for (uint64_t i = 0; i < n_tensors; ++i) {
        in.begin_entry("tensor", i);
        tensors_.push_back(read_tensor_info(in));
    }
    header_end_ = in.position();
    place_tensors(bytes_, header_end_, alignment_, tensors_);
    tensor_index_ = build_index(tensors_, name_of, "tensor");
}

// ---- access ---------------------------------------------------------------------------------------------------------

const TensorInfo* GgufFile::find_tensor(std::string_view name) const noexcept {
    return find_entry(tensors_, tensor_index_, name_of, name);
}

const KeyValue* GgufFile::find(std::string_view key) const noexcept {
    return find_entry(key_values_, key_index_, key_of, key);
}

uint32_t GgufFile::get_u32(std::string_view key) const {
    const KeyValue& entry = required(*this, key, "u32");
    return std::visit(
        [&](const auto& value) -> uint32_t {
            using Stored = std::decay_t<decltype(value)>;
            if constexpr (std::is_integral_v<Stored> && !std::is_same_v<Stored, bool>) {
                if (!std::in_range<uint32_t>(value)) fail_value(entry, std::to_string(value) + " does not fit u32");
                return static_cast<uint32_t>(value);
            } else {
                fail_type(entry, "u32");
            }
        },
        entry.value);
}

float GgufFile::get_f32(std::string_view key) const {
    const KeyValue& entry = required(*this, key, "f32");
    if (const auto* value = std::get_if<float>(&entry.value)) return to_finite_f32(entry, *value);
    return to_finite_f32(entry, as<double>(entry, "f32"));
}

std::string_view GgufFile::get_string(std::string_view key) const {
    return as<std::string_view>(required(*this, key, "string"), "string");
}

std::span<const uint8_t> GgufFile::get_u8_array(std::string_view key) const {
    const KeyValue& entry = required(*this, key, "array of u8");
    const auto& array = as<ArrayView>(entry, "array of u8");
    if (array.type != ValueType::u8) fail_type(entry, "array of u8");
    return {reinterpret_cast<const uint8_t*>(array.bytes.data()), array.bytes.size()};
}

std::vector<float> GgufFile::get_f32_array(std::string_view key) const {
    const KeyValue& entry = required(*this, key, "array of f32");
    const auto& array = as<ArrayView>(entry, "array of f32");
    if (array.type != ValueType::f32 && array.type != ValueType::f64) fail_type(entry, "array of f32");
    std::vector<float> values(array.count);
    for (uint64_t i = 0; i < array.count; ++i) {
        values[i] =
            to_finite_f32(entry, array.type == ValueType::f32 ? array.number<float>(i) : array.number<double>(i));
    }
    return values;
}

}  // namespace fixmin::gguf
