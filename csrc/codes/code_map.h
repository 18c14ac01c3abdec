// Token id -> K-bit code, the part of the model that replaces the input embedding table (docs/design.md).
//
// A code is held in the low K bits of a uint32: bit i is c̃[i], the bit with lift index i.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace fixmin::codes {

/// Largest code width K: a code is one 32-bit word, and ids are 32-bit too.
inline constexpr uint32_t max_width = 32;

/// Bytes of one packed table row, ceil(K/8): bit i of a code is bit i%8 of byte i/8.
constexpr uint32_t packed_row_bytes(uint32_t width) { return (width + 7) / 8; }

/// [K] of 0/1 -> word with bit i = bits[i].  K <= 32; throws ArgumentError for an entry other than 0 or 1.
uint32_t pack_bits(std::span<const uint8_t> bits);

/// Inverse of pack_bits: writes bits.size() entries of 0/1.
void unpack_bits(uint32_t code, std::span<uint8_t> bits);

/// The map id -> code for all ids 0..V-1.  Immutable once made, so it may be read from any thread.
class CodeMap {
  public:
    /// The empty map: V = 0, every id is refused.
    CodeMap() = default;

    /// c̃ = A·bin(id) ⊕ b over GF(2), bin(id)[j] = (id >> j) & 1.
    /// @param matrix  A, [K*K] row-major, entries 0/1, invertible over GF(2)
    /// @param shift   b, [K], entries 0/1
    /// Needs 1 <= V <= 2^K.  Throws ArgumentError naming what is wrong and at which row and column.
    static CodeMap affine(uint32_t vocab_size, uint32_t width, std::span<const uint8_t> matrix,
                          std::span<const uint8_t> shift);

    /// Arbitrary fixed codes, which need not be distinct.
    /// @param packed_rows  [V][packed_row_bytes(K)]; bits beyond K must be 0
    /// Throws ArgumentError for a wrong length or a row with bits beyond K.
    static CodeMap table(uint32_t vocab_size, uint32_t width, std::span<const uint8_t> packed_rows);

    uint32_t vocab_size() const { return vocab_size_; }
    uint32_t width() const { return width_; }
    /// In memory, of what the object points to.
    size_t bytes() const { return (columns_.size() + inverse_columns_.size() + table_.size()) * sizeof(uint32_t); }

    // What makes the codes, for devices that compute them: affine: b as a word and [K] words, bit i of the j-th
    // A[i][j]; else no columns and [V] codes.
    uint32_t shift() const { return shift_; }
    std::span<const uint32_t> columns() const { return columns_; }
    std::span<const uint32_t> table() const { return table_; }

    /// Code of one id.  Throws ArgumentError for id >= V.
    uint32_t code(uint32_t id) const;

    /// Codes of many ids.  Throws ArgumentError naming the first id >= V.
    std::vector<uint32_t> codes(std::span<const uint32_t> ids) const;

    /// The id whose code this is (of a table: the lowest one), or nothing if no id < V has it.
    /// For inspection: affine codes use A's inverse, tables are searched.
    std::optional<uint32_t> id_of(uint32_t code) const;

  private:
    uint32_t unchecked_code(uint32_t id) const;

    uint32_t vocab_size_ = 0;
    uint32_t width_ = 0;
    uint32_t shift_ = 0;                     // affine: b
    std::vector<uint32_t> columns_;          // affine: [K], bit i of columns_[j] = A[i][j]
    std::vector<uint32_t> inverse_columns_;  // affine: [K], the same of A's inverse
    std::vector<uint32_t> table_;            // table: [V]; empty for affine
};

}  // namespace fixmin::codes
