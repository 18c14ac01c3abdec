// Code maps, lifts and the fold of layer 0, beside what docs/design.md says in plain sums.
#include <algorithm>
#include <cmath>
#include <optional>

#include "codes/code_map.h"
#include "codes/fold.h"
#include "codes/lift.h"
#include "error.h"
#include "input.h"

namespace {

using namespace fixmin;
using namespace fixmin::codes;
using fuzz::Input;
using fuzz::require;

uint32_t rank(std::vector<std::vector<uint8_t>> rows) {
    uint32_t found = 0;
    for (size_t column = 0; column < rows.size(); ++column) {
        for (size_t r = found; r < rows.size(); ++r) {
            if (!rows[r][column]) continue;
            std::swap(rows[r], rows[found]);
            for (size_t other = 0; other < rows.size(); ++other) {
                if (other == found || !rows[other][column]) continue;
                for (size_t c = 0; c < rows.size(); ++c) rows[other][c] ^= rows[found][c];
            }
            ++found;
            break;
        }
    }
    return found;
}

// What a map does for ids that an input names, and for the first and last.
template <class Code>
void check_map(const CodeMap& map, uint32_t vocab_size, uint32_t width, Input& input, const Code& code) {
    require(map.vocab_size() == vocab_size && map.width() == width, "sizes are those asked for");
    std::vector<uint32_t> ids{0, vocab_size - 1};
    while (ids.size() < 12) ids.push_back(input.number<uint32_t>() % vocab_size);
    const std::vector<uint32_t> codes = map.codes(ids);
    for (size_t i = 0; i < ids.size(); ++i) {
        require(codes[i] == code(ids[i]), "the code is A bin(t) + b, or the row of the table");
        require(map.code(ids[i]) == codes[i], "one id at a time gives the same");
        const std::optional<uint32_t> id = map.id_of(codes[i]);
        require(id && *id <= ids[i] && code(*id) == codes[i], "the lowest id of a code is found");
    }
    const uint32_t any = input.number<uint32_t>();
    if (const auto id = map.id_of(any))
        require(*id < vocab_size && code(*id) == any, "an id that is found has the code");
    const uint32_t outside = vocab_size + input.byte();
    try {
        map.code(outside);
        require(outside < vocab_size, "an id outside is refused");  // after a wrap
    } catch (const ArgumentError&) {
    }
}

void affine(Input& input) {
    const uint32_t width = input.below(36), vocab_size = input.number<uint32_t>() >> input.below(32);
    const size_t cut = input.below(8) == 7 ? input.below(4) : 0;  // lengths that do not fit
    const bool repaired = input.below(4) != 3;                    // else any matrix: most are singular
    std::vector<uint8_t> matrix = input.bytes((width * width + 7) / 8), shift = input.bytes(width);
    std::vector<uint8_t> entries(size_t(width) * width);
    for (size_t i = 0; i < entries.size(); ++i) entries[i] = matrix[i / 8] >> i % 8 & 1;
    for (uint8_t& b : shift) b &= 1;
    if (repaired) {  // upper triangle with a diagonal of ones, rows in an order of the input's
        std::vector<uint8_t> order(width);
        for (uint32_t i = 0; i < width; ++i) order[i] = uint8_t(i);
        for (uint32_t i = 0; i + 1 < width; ++i) std::swap(order[i], order[i + input.below(width - i)]);
        std::vector<uint8_t> moved(entries.size());
        for (uint32_t i = 0; i < width; ++i) {
            for (uint32_t j = 0; j < width; ++j)
                moved[order[i] * width + j] = j < i ? 0 : j == i ? 1 : entries[i * width + j];
        }
        entries = moved;
    }
    bool valid = width >= 1 && width <= max_width && vocab_size >= 1 && (width >= 32 || vocab_size <= 1u << width);
    if (input.below(16) == 15 && !entries.empty()) {  // an entry that is no bit
        entries[input.number<uint16_t>() % entries.size()] = 2 + input.below(250);
        valid = false;
    }
    if (cut && cut <= entries.size()) {
        entries.resize(entries.size() - cut);
        valid = false;
    }
    if (valid) {
        std::vector<std::vector<uint8_t>> rows;
        for (uint32_t i = 0; i < width; ++i) rows.emplace_back(&entries[i * width], &entries[i * width] + width);
        valid = rank(rows) == width;
    }
    try {
        const CodeMap map = CodeMap::affine(vocab_size, width, entries, shift);
        require(valid, "what is no bijection is refused");
        check_map(map, vocab_size, width, input, [&](uint32_t id) {
            uint32_t code = 0;
            for (uint32_t i = 0; i < width; ++i) {
                uint32_t bit = shift[i];
                for (uint32_t j = 0; j < width; ++j) bit ^= entries[i * width + j] & (id >> j);
                code |= (bit & 1) << i;
            }
            return code;
        });
    } catch (const ArgumentError& error) {
        require(!valid, error.what());
    }
}

void table(Input& input) {
    const uint32_t width = input.below(36), vocab_size = input.byte(), row = packed_row_bytes(width);
    std::vector<uint8_t> rows = input.bytes(size_t(vocab_size) * row);
    bool valid = width >= 1 && width <= max_width && vocab_size >= 1;
    const bool masked = input.flag();
    for (size_t i = 0; i < rows.size() && width % 8; ++i) {
        if (i % row != row - 1) continue;
        if (masked) rows[i] &= uint8_t((1u << width % 8) - 1);
        valid = valid && rows[i] >> width % 8 == 0;
    }
    if (input.below(16) == 15) {
        rows.push_back(0);
        valid = false;
    }
    try {
        const CodeMap map = CodeMap::table(vocab_size, width, rows);
        require(valid, "rows that do not fit are refused");
        check_map(map, vocab_size, width, input, [&](uint32_t id) {
            uint32_t code = 0;
            for (uint32_t b = 0; b < row; ++b) code |= uint32_t(rows[id * row + b]) << 8 * b;
            return code;
        });
    } catch (const ArgumentError& error) {
        require(!valid, error.what());
    }
}

// A sum of products within what rounding each operation to float32 explains.
void fold(Input& input) {
    const uint32_t width = input.below(34), d = input.below(80), n_rows = input.below(6);
    const LiftKind kind = input.flag() ? LiftKind::interleave : LiftKind::tile;
    const float v0 = input.real(), v1 = input.real(), eps = input.real();
    const bool rms = input.flag(), with_beta = input.flag(), with_bias = input.flag();
    const auto floats = [&](size_t n) {
        std::vector<float> out(n);
        for (float& x : out) x = float(int8_t(input.byte())) / 32;
        return out;
    };
    const std::vector<float> gamma = floats(d), beta = floats(with_beta ? d : 0), bias = floats(n_rows),
                             weights = floats(size_t(n_rows) * d);
    std::optional<Lift> lift;
    try {
        lift = Lift::make(kind, width, d, v0, v1);
        require(width >= 1 && width <= max_width && width <= d && std::isfinite(v0) && std::isfinite(v1) &&
                    (kind == LiftKind::tile || d % width == 0),
                "lifts that make no sense are refused");
        std::optional<FoldBuilder> builder;
        builder.emplace(n_rows, FoldNorm{gamma, beta, eps, rms}, *lift);
        require(n_rows && std::isfinite(eps) && eps >= 0 && !(rms && with_beta),
                "norms that make no sense are refused");
        std::vector<uint8_t> added(n_rows);
        for (int part = 0; part < 8; ++part) {
            const uint32_t begin = input.below(8), n = input.below(8);
            const bool fits = begin + n <= n_rows &&
                              std::none_of(added.begin() + begin, added.begin() + begin + n, [](auto a) { return a; });
            // What is refused is not read, so that any pointer will do.
            const size_t from = fits ? begin : 0;
            try {
                builder->add_rows(begin, n, weights.data() + from * d, with_bias ? bias.data() + from : nullptr);
                require(fits, "rows outside and rows added twice are refused");
                std::fill_n(added.begin() + begin, n, uint8_t(1));
            } catch (const ArgumentError& error) {
                require(!fits, error.what());
            }
        }
        if (input.below(8) != 7) {
            for (uint32_t r = 0; r < n_rows; ++r) {
                if (added[r]) continue;
                builder->add_rows(r, 1, weights.data() + size_t(r) * d, with_bias ? &bias[r] : nullptr);
                added[r] = 1;
            }
        }
        const bool complete = std::ranges::count(added, 1) == n_rows;
        std::optional<FoldedProjection> folded;
        try {
            folded = builder->finish();
            require(complete, "rows that are missing are named");
        } catch (const ArgumentError& error) {
            require(!complete, error.what());
            return;
        }
        const double large = 1e15;
        if (std::abs(v0) > large || std::abs(v1) > large) return;  // float32 overflows: not a question of the fold
        const uint32_t code = input.number<uint32_t>() & (width == 32 ? ~0u : (1u << width) - 1);
        std::vector<float> x(d), y(n_rows);
        lift->apply(code, x.data());
        for (uint32_t n = 0; n < d; ++n) {
            const uint32_t bit = kind == LiftKind::tile ? n % width : n / (d / width);
            require(lift->index(n) == bit && x[n] == (code >> bit & 1 ? v1 : v0),
                    "the lift shows the bits of the code");
        }
        folded->apply(code, y.data());
        double mean = 0, square = 0;
        for (const float e : x) mean += double(e) / d;
        if (rms) mean = 0;
        for (const float e : x) square += (double(e) - mean) * (double(e) - mean) / d;
        const bool constant = std::ranges::all_of(x, [&](float e) { return rms ? e == 0 : e == x[0]; });
        const double rstd = constant ? 0 : 1 / std::sqrt(square + eps);
        if (rstd > 1e30) return;  // epsilon 0 and a variance that float32 has not
        for (uint32_t r = 0; r < n_rows; ++r) {
            double want = with_bias ? bias[r] : 0, size = std::abs(want);
            for (uint32_t n = 0; n < d; ++n) {
                const double w = weights[size_t(r) * d + n];
                if (with_beta) want += w * beta[n], size += std::abs(w * beta[n]);
                want += w * gamma[n] * (x[n] - mean) * rstd;
                size += std::abs(w * gamma[n]) * (std::abs(double(v0) - mean) + std::abs(double(v1) - v0)) * rstd;
            }
            require(!std::isfinite(size) || std::abs(y[r] - want) <= 1e-5 * size + 1e-30 + 1e-43 * rstd,
                    "the fold is norm and product");
        }
    } catch (const ArgumentError& error) {
        if (lift) {
            require(!n_rows || !std::isfinite(eps) || eps < 0 || (rms && with_beta), error.what());
        } else {
            require(width < 1 || width > max_width || width > d || !std::isfinite(v0) || !std::isfinite(v1) ||
                        (kind == LiftKind::interleave && d % width),
                    error.what());
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input input(data, size);
    switch (input.below(3)) {
        case 0: affine(input); break;
        case 1: table(input); break;
        default: fold(input);
    }
    return 0;
}
