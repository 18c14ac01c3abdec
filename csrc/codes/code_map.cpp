#include "codes/code_map.h"

#include <algorithm>
#include <string>
#include <utility>

#include "error.h"

namespace fixmin::codes {
namespace {

void check_width(uint32_t width) {
    if (width < 1 || width > max_width) {
        throw ArgumentError("code width must be 1.." + std::to_string(max_width) + ", got " + std::to_string(width));
    }
}

void check_vocab_size(uint32_t vocab_size) {
    if (vocab_size == 0) throw ArgumentError("vocab_size must be at least 1, got 0");
}

/// Rows of a [K*K] 0/1 matrix as words: bit j of rows[i] = matrix[i][j].
std::vector<uint32_t> matrix_rows(std::span<const uint8_t> matrix, uint32_t width) {
    check_width(width);
    if (matrix.size() != size_t{width} * width) {
        throw ArgumentError("code matrix must have width*width = " + std::to_string(size_t{width} * width) +
                            " entries for width " + std::to_string(width) + ", got " + std::to_string(matrix.size()));
    }
    std::vector<uint32_t> rows(width, 0);
    for (uint32_t i = 0; i < width; ++i) {
        for (uint32_t j = 0; j < width; ++j) {
            const uint8_t entry = matrix[size_t{i} * width + j];
            if (entry > 1) {
                throw ArgumentError("code matrix entries must be 0 or 1, got " + std::to_string(entry) + " at row " +
                                    std::to_string(i) + ", column " + std::to_string(j));
            }
            rows[i] |= uint32_t{entry} << j;
        }
    }
    return rows;
}

std::vector<uint32_t> transposed(const std::vector<uint32_t>& words) {
    const uint32_t width = static_cast<uint32_t>(words.size());
    std::vector<uint32_t> result(width, 0);
    for (uint32_t i = 0; i < width; ++i) {
        for (uint32_t j = 0; j < width; ++j) result[j] |= (words[i] >> j & 1u) << i;
    }
    return result;
}

/// Gauss-Jordan elimination over GF(2), a row being one word.
std::vector<uint32_t> inverse_rows(std::vector<uint32_t> rows) {
    const uint32_t width = static_cast<uint32_t>(rows.size());
    std::vector<uint32_t> inverse(width);
    for (uint32_t i = 0; i < width; ++i) inverse[i] = 1u << i;
    for (uint32_t column = 0; column < width; ++column) {
        uint32_t pivot = column;
        while (pivot < width && !(rows[pivot] >> column & 1u)) ++pivot;
        if (pivot == width) {
            throw ArgumentError("code matrix is singular over GF(2): column " + std::to_string(column) +
                                " is a sum of the columns before it");
        }
        std::swap(rows[pivot], rows[column]);
        std::swap(inverse[pivot], inverse[column]);
        for (uint32_t i = 0; i < width; ++i) {
            if (i != column && (rows[i] >> column & 1u)) {
                rows[i] ^= rows[column];
                inverse[i] ^= inverse[column];
            }
        }
    }
    return inverse;
}

/// A·x: XOR of the columns that x selects.  x must have no bit beyond the width.
uint32_t multiply(const std::vector<uint32_t>& columns, uint32_t x) {
    uint32_t product = 0;
    for (uint32_t j = 0; x != 0; ++j, x >>= 1) {
        if (x & 1u) product ^= columns[j];
    }
    return product;
}

[[noreturn]] void refuse_id(uint32_t id, uint32_t vocab_size, const std::string& where) {
    throw ArgumentError("token id " + std::to_string(id) + where + " is outside the vocabulary 0.." +
                        std::to_string(int64_t{vocab_size} - 1));
}

}  // namespace

uint32_t pack_bits(std::span<const uint8_t> bits) {
    if (bits.size() > max_width) {
        throw ArgumentError("a code has at most " + std::to_string(max_width) + " bits, got " +
                            std::to_string(bits.size()));
    }
    uint32_t code = 0;
    for (size_t i = 0; i < bits.size(); ++i) {
        if (bits[i] > 1) {
            throw ArgumentError("code bits must be 0 or 1, got " + std::to_string(bits[i]) + " at bit " +
                                std::to_string(i));
        }
        code |= uint32_t{bits[i]} << i;
    }
    return code;
}

void unpack_bits(uint32_t code, std::span<uint8_t> bits) {
    for (size_t i = 0; i < bits.size(); ++i) bits[i] = i < max_width ? code >> i & 1u : 0;
}

CodeMap CodeMap::affine(uint32_t vocab_size, uint32_t width, std::span<const uint8_t> matrix,
                        std::span<const uint8_t> shift) {
    const std::vector<uint32_t> rows = matrix_rows(matrix, width);
    check_vocab_size(vocab_size);
    if (shift.size() != width) {
        throw ArgumentError("code shift must have width = " + std::to_string(width) + " entries, got " +
                            std::to_string(shift.size()));
    }
    // An id needs all of its bits in the code, or two ids would share one.
    if (uint64_t{vocab_size} > uint64_t{1} << width) {
        throw ArgumentError("code width " + std::to_string(width) + " is too small for vocab_size " +
                            std::to_string(vocab_size) + ": 2^width must be at least vocab_size");
    }
    CodeMap map;
    map.vocab_size_ = vocab_size;
    map.width_ = width;
    map.columns_ = transposed(rows);
    map.inverse_columns_ = transposed(inverse_rows(rows));
    try {
        map.shift_ = pack_bits(shift);
    } catch (const ArgumentError& error) {
        throw ArgumentError(std::string("code shift: ") + error.what());
    }
    return map;
}

CodeMap CodeMap::table(uint32_t vocab_size, uint32_t width, std::span<const uint8_t> packed_rows) {
    check_width(width);
    check_vocab_size(vocab_size);
    const size_t row_bytes = packed_row_bytes(width);
    if (packed_rows.size() != row_bytes * vocab_size) {
        throw ArgumentError("code table must have " + std::to_string(vocab_size) + " rows of " +
                            std::to_string(row_bytes) + " bytes, got " + std::to_string(packed_rows.size()) + " bytes");
    }
    CodeMap map;
    map.vocab_size_ = vocab_size;
    map.width_ = width;
    map.table_.resize(vocab_size);
    for (uint32_t id = 0; id < vocab_size; ++id) {
        uint32_t code = 0;
        for (size_t byte = 0; byte < row_bytes; ++byte) {
            code |= uint32_t{packed_rows[id * row_bytes + byte]} << (8 * byte);
        }
        if (uint64_t{code} >> width != 0) {
            throw ArgumentError("code table row " + std::to_string(id) + " has bits beyond width " +
                                std::to_string(width));
        }
        map.table_[id] = code;
    }
    return map;
}

uint32_t CodeMap::unchecked_code(uint32_t id) const {
    // With A kept by columns a code is an XOR of at most K words.  By rows, every bit would need the parity
    // (a population count) of row & id.
    return table_.empty() ? shift_ ^ multiply(columns_, id) : table_[id];
}

uint32_t CodeMap::code(uint32_t id) const {
    if (id >= vocab_size_) refuse_id(id, vocab_size_, "");
    return unchecked_code(id);
}

std::vector<uint32_t> CodeMap::codes(std::span<const uint32_t> ids) const {
    std::vector<uint32_t> codes(ids.size());
    for (size_t t = 0; t < ids.size(); ++t) {
        if (ids[t] >= vocab_size_) refuse_id(ids[t], vocab_size_, " at position " + std::to_string(t));
        codes[t] = unchecked_code(ids[t]);
    }
    return codes;
}

std::optional<uint32_t> CodeMap::id_of(uint32_t code) const {
    if (vocab_size_ == 0 || uint64_t{code} >> width_ != 0) return std::nullopt;
    if (table_.empty()) {
        const uint32_t id = multiply(inverse_columns_, code ^ shift_);
        return id < vocab_size_ ? std::optional(id) : std::nullopt;
    }
    const auto found = std::find(table_.begin(), table_.end(), code);
    if (found == table_.end()) return std::nullopt;
    return static_cast<uint32_t>(found - table_.begin());
}

}  // namespace fixmin::codes
