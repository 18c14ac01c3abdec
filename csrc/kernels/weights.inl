// What every product of weights in few bits needs: how codes and scales are read from panels, the stream of panels from
// memory, and where results go. Included by the units of kernels, whose rules hold here too (kernels.inl).

using namespace fixmin::kernels;
using fixmin::quant::WeightType;

constexpr uint32_t block = fixmin::quant::block_size;

// Bytes that a single token's weights are prefetched ahead (docs/kernels.md).
constexpr size_t stream_far = 16384, stream_near = 4096;

template <uint32_t>
struct Count {};
template <int... J>
struct Indices {};
using EachVector = Indices<0, 1, 2, 3, 4, 5, 6, 7>;

// Indices<0 .. N - 1>
template <int N, int... J>
struct Counted : Counted<N - 1, N - 1, J...> {};
template <int... J>
struct Counted<0, J...> {
    using Type = Indices<J...>;
};
template <int N>
using UpTo = typename Counted<N>::Type;

// Readers give vector J, k = 4J..4J+3 of 16 rows, of a block of 32 codes that is stored in the planes of
// quant/panels.h.

// 2 to 6 bits: unsigned bytes.
template <uint32_t Bits>
struct CodeReader {
    // Whether the vectors 4..7 may stay in the high nibbles, as 16 times their codes.
    static constexpr bool high_nibbles = Bits == 4 && dot_q4_takes_any_byte;
    // Vectors whose products fit 16 bits together: 8 * 2 * 15 * 127, 4 * 2 * 31 * 127, 2 * 2 * 63 * 127 < 2^15.
    static constexpr uint32_t pair_depth = Bits <= 4 ? 8 : Bits == 5 ? 4 : 2;

    static VecI start(int32_t zero, int32_t activation_sum) { return set1_int(-zero * activation_sum); }
    static VecI dot(VecI acc, Bytes w, int32_t a) { return dot_q4(acc, w, a); }

    template <int J>
    static Bytes read(const uint8_t* p) {
        static_assert(Bits >= 2 && Bits <= 6);
        constexpr int pair = 2 * (J / 2);  // place of vector J in a plane of 2 bits
        if constexpr (Bits <= 3) {
            const Bytes low = bits<pair, 3>(load_bytes(p + 64 * (J % 2)));
            if constexpr (Bits == 2) return low;
            return or_bits<J - 2, 4>(low, load_bytes(p + 128));
        } else {
            const Bytes low = bits<J / 4 * 4, 15>(load_bytes(p + 64 * (J % 4)));
            if constexpr (Bits == 4) return low;
            if constexpr (Bits == 5) return or_bits<J - 4, 16>(low, load_bytes(p + 256));
            return or_bits<pair - 4, 48>(low, load_bytes(p + 256 + 64 * (J % 2)));
        }
    }

    // Only of 4 bits: 16 times vector J, which saves a shift.
    template <int J>
    static Bytes read_high(const uint8_t* p) {
        static_assert(high_nibbles && J >= 4);
        return bits<0, 0xf0>(load_bytes(p + 64 * (J - 4)));
    }
};

// Signed bytes: too large for dot_q4.
template <>
struct CodeReader<8> {
    static constexpr bool high_nibbles = false;
    static constexpr uint32_t pair_depth = 1;

    static VecI start(int32_t, int32_t activation_sum) { return q8_start(activation_sum); }
    static VecI dot(VecI acc, Q8Bytes w, int32_t a) { return dot_q8(acc, w, a); }

    template <int J>
    static Q8Bytes read(const uint8_t* p) {
        return prepare_q8(flip_signs(load_bytes(p + 64 * J)));
    }
};

// quant::iq4_values + 128
constexpr uint8_t iq4_offset_values[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

struct TableReader : CodeReader<8> {
    template <int J>
    static Q8Bytes read(const uint8_t* p) {
        return prepare_q8(lookup(iq4_offset_values, CodeReader<4>::read<J>(p)));
    }
};

template <uint32_t Bits, bool Table>
struct ReaderOf {
    using Type = CodeReader<Bits>;
};
template <uint32_t Bits>
struct ReaderOf<Bits, true> {
    using Type = TableReader;
};

// The codes and scales of 32 weights of 16 rows. Codes are unpacked where they are used.
template <WeightType Type>
struct WeightBlock {
    static constexpr auto format = fixmin::quant::block_format(Type);
    static constexpr auto layout = fixmin::quant::panel_layout(Type);
    static constexpr uint32_t per_record = layout.record_blocks;
    static constexpr uint32_t scales_per_record = format.values / format.scale_values;
    static constexpr bool halves = format.scale_values == 16;
    // What a block takes with its part of the scales.
    static constexpr size_t bytes = layout.parcel_bytes / layout.parcel_blocks;
    using Reader = typename ReaderOf<format.bits, format.table>::Type;

    const uint8_t* planes;
    VecF d, m;           // of the record
    VecF scale;          // d, or d * s where 32 weights share s
    VecF offset;         // m, or m * n likewise
    VecF half_scale[2];  // s where 16 weights share it
    VecF half_min[2];    // n

    // Blocks are loaded in their order: d and m come with the first of a record.
    void load_from(const uint8_t* panel, uint32_t b) {
        planes = panel + fixmin::quant::codes_at(layout, b);
        const uint8_t* p = panel + fixmin::quant::scales_at(layout, b);
        if (b % per_record == 0) d = load_f16((const uint16_t*)p);
        if (format.has_min && b % per_record == 0) m = load_f16((const uint16_t*)p + lanes);
        p += (format.has_min ? 4 : 2) * lanes;
        scale = d;
        if constexpr (format.has_min) offset = m;
        if constexpr (Type == WeightType::q2_k) {
            for (uint32_t h = 0; h < 2; ++h) {
                const uint8_t* both = p + (b % per_record * 2 + h) * lanes;
                half_scale[h] = load_uint8<0, 15>(both);
                half_min[h] = load_uint8<4, 15>(both);
            }
        } else if constexpr (halves) {
            for (uint32_t h = 0; h < 2; ++h)
                half_scale[h] = load_int8((const int8_t*)p + (b % per_record * 2 + h) * lanes);
        } else if constexpr (per_record > 1) {
            const int8_t* s = (const int8_t*)p + b % per_record * lanes;
            scale = mul(scale, load_int8(s));  // exact
            if constexpr (format.has_min) offset = mul(offset, load_int8(s + scales_per_record * lanes));
        }
    }

    template <int J>
    auto codes() const {
        return Reader::template read<J>(planes);
    }
    template <int J>
    auto high_codes() const {
        return Reader::template read_high<J>(planes);
    }

    // What scales and mins meet of a block of activations.
    struct Factors {
        float scale;
        float sums[2];  // of the halves, or scaled_sum
    };
    static Factors factors_of(const ActivationBlock& a) {
        if constexpr (halves) return {a.scale, {float(a.half_sum), float(a.sum - a.half_sum)}};
        return {a.scale, {a.scaled_sum, 0}};
    }

    // acc + weights . activations, given the dot products of the block, or of its halves. Every value but a_scale *
    // scale and the results of the last fma of a term is exact.
    [[gnu::always_inline]] VecF add_dots(VecF acc, const VecI* dots, const Factors& a) const {
        if constexpr (!halves) {
            acc = fma(to_float(dots[0]), mul(scale, set1(a.scale)), acc);
            if constexpr (format.has_min) acc = fma(offset, set1(a.sums[0]), acc);
        } else {
            // |s * dot| <= 128 * 32 * 127 * 16 = 2^23 - 2^16, so that even the sum of two is exact in float32.
            const VecF total = fma(half_scale[1], to_float(dots[1]), mul(half_scale[0], to_float(dots[0])));
            acc = fma(total, mul(scale, set1(a.scale)), acc);
            if constexpr (format.has_min) {
                const VecF low = mul(half_min[0], set1(a.sums[0]));
                const VecF both = fma(half_min[1], set1(a.sums[1]), low);
                acc = fma(both, mul(offset, set1(a.scale)), acc);
            }
        }
        return acc;
    }
};

// Panels as they come from memory: once, one after the other, and then what the thread reads next, so that memory is
// never idle between two products.
class Stream {
  public:
    explicit Stream(const MatmulArgs& args) {
        const uint32_t n_panels = (args.n_rows + lanes - 1) / lanes;
        end_ = (const uint8_t*)args.panels + n_panels * args.panel_stride;
        next_ = args.next ? (const uint8_t*)args.next : end_;
    }

    // What stands at p, a place in the panels or behind them.
    const uint8_t* after(const uint8_t* p) const { return p < end_ ? p : next_ + (p - end_); }

  private:
    const uint8_t *end_, *next_;
};

// Part J of 8 of the lines of `bytes` bytes at `to`. Prefetches wait for one another when there are more of them than a
// core can have under way, and everything behind them with them: so they are strewn among the products. Inlined,
// because GCC takes a call that does nothing but prefetch for one that does nothing.
template <int J, size_t bytes, bool near = false>
[[gnu::always_inline]] inline void prefetch_part(const uint8_t* to) {
    constexpr size_t n_lines = (bytes + 63) / 64;
#pragma GCC unroll 8
    for (size_t i = n_lines * J / 8; i < n_lines * (J + 1) / 8; ++i) {
        if constexpr (near)
            prefetch(to + 64 * i);
        else
            prefetch_far(to + 64 * i);
    }
}

// Residual, store.
[[gnu::always_inline]] inline void store_result(const MatmulArgs& args, uint32_t token, uint32_t row, VecF value) {
    const uint32_t valid = args.n_rows - row < lanes ? args.n_rows - row : lanes;
    float* out = args.out + token * args.out_stride + row;
    if (args.accumulate) value = add(load_first(out, valid), value);
    if (valid == lanes)
        store(out, value);
    else
        store_first(out, value, valid);
}

// Bias, residual, store. By reference: GCC copies arguments in halves, and a load of both waits for them.
void finish(const MatmulArgs& args, uint32_t token, uint32_t row, const VecF& result) {
    store_result(args, token, row, args.bias ? add(result, load(args.bias + row)) : result);
}

// Of W8A8: what the sums of 16 rows meet.
struct RowScales {
    VecF scale, bias;

    RowScales(const MatmulArgs& args, const uint8_t* panel, uint32_t row)
        : scale(load((const float*)(panel + size_t(args.inner) * lanes))),
          bias(args.bias ? load(args.bias + row) : zero()) {}

    VecF result(VecI sums, float activation_scale) const {
        return fma(to_float(sums), mul(scale, set1(activation_scale)), bias);
    }
};

// A sum of products of weights as they are stored, as one of weights.
inline VecI without_offset(VecI sums, int32_t activation_sum) {
    return add_int(sums, set1_int(int32_t(-uint32_t(fixmin::quant::scaled_row_offset) * uint32_t(activation_sum))));
}

// Rows of activations of W8A8.
struct ScaledRows {
    const uint8_t* first;
    size_t stride;

    explicit ScaledRows(const MatmulArgs& args)
        : first((const uint8_t*)args.scaled_rows), stride(scaled_row_bytes(args.inner)) {}

    const int8_t* codes(uint32_t token) const { return (const int8_t*)first + token * stride; }
    RowScale scale(uint32_t token) const {
        RowScale scale;
        __builtin_memcpy(&scale, first + (token + 1) * stride - 64, sizeof scale);
        return scale;
    }
};

// Starts reading where `finish` will write the results of a tile: neighbouring tokens' lie in different pages, where no
// processor looks ahead by itself.
[[gnu::always_inline]] inline void prefetch_results(const MatmulArgs& args, uint32_t token, uint32_t n_tokens,
                                                    uint32_t panel, uint32_t n_panels) {
    for (uint32_t t = token; t < token + n_tokens; ++t) {
        for (uint32_t p = panel; p < panel + n_panels; ++p) prefetch(args.out + t * args.out_stride + p * lanes);
    }
}
