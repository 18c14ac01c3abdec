// Products of many tokens with quantised weights on AMX tiles. Included by kernels.inl; needs AVX-512 and AMX-INT8.
//
// One tile instruction gives the exact dot products of 16 tokens and 16 rows over a block of 32: the same integers as
// 16 times eight vpdpbusd, so the floats that follow are the same too. A vector loop then scales and adds them, block
// after block, in the order of every other ISA.

// Tiles: results 0 and 1 (16 tokens x 16 rows of int32), activations 2 and 3 (16 tokens x 32 bytes), weights 4 and 5
// (8 groups of 4 consecutive k x 16 rows).
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 32, 32, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 8, 8};
};
static_assert(sizeof(TileConfig) == 64);
// In static memory: GCC 12 believes that _tile_loadconfig reads 8 bytes and drops stores to the others.
constexpr TileConfig tile_config;

constexpr uint32_t tile_tokens = matmul_tile_tokens;

template <WeightType Type, int... J>
void store_codes(const WeightBlock<Type>& from, __m512i taken_off, int8_t* to, Indices<J...>) {
    (_mm512_storeu_si512(to + 64 * J, _mm512_sub_epi8(from.template codes<J>().v, taken_off)), ...);
}

// A panel as signed bytes in the order of the tiles; its scales and, with mins, its offsets as floats.
template <WeightType Type>
void expand_panel(const uint8_t* panel, uint32_t n_blocks, int8_t* weights, float* scales, float* offsets) {
    constexpr auto format = fixmin::quant::block_format(Type);
    constexpr int zero = format.bits == 8 || format.table ? 128 : format.zero;
    const __m512i taken_off = _mm512_set1_epi8(char(zero));
    WeightBlock<Type> from;
    for (uint32_t b = 0; b < n_blocks; ++b, weights += 512) {
        from.load_from(panel, b);
        store_codes<Type>(from, taken_off, weights, EachVector{});
        store(scales + b * lanes, from.scale);
        if constexpr (format.has_min) store(offsets + b * lanes, from.offset);
    }
}

// Activations of 16 tokens as tiles [n_blocks][16][32], their scales and scaled sums [n_blocks][16].
void pack_activations(const ActivationBlock* rows, uint32_t n_blocks, int8_t* values, float* scales, float* sums) {
    for (uint32_t c = 0; c < tile_tokens; ++c) {
        for (uint32_t b = 0; b < n_blocks; ++b) {
            const ActivationBlock& from = rows[size_t(c) * n_blocks + b];
            __builtin_memcpy(values + (size_t(b) * tile_tokens + c) * block, from.q, block);
            scales[b * tile_tokens + c] = from.scale;
            sums[b * tile_tokens + c] = from.scaled_sum;
        }
    }
}

// Dot products of a block into `dots` [16 tokens][16 rows]. Two sets of tiles, so that one block is multiplied while
// the one before is scaled.
template <int set>
void tile_dot(const int8_t* activations, const int8_t* weights, int32_t* dots) {
    if constexpr (set == 0) {  // the intrinsics take nothing but literals
        _tile_zero(0);
        _tile_loadd(2, activations, block);
        _tile_loadd(4, weights, 64);
        _tile_dpbssd(0, 2, 4);
        _tile_stored(0, dots, 64);
    } else {
        _tile_zero(1);
        _tile_loadd(3, activations, block);
        _tile_loadd(5, weights, 64);
        _tile_dpbssd(1, 3, 5);
        _tile_stored(1, dots, 64);
    }
}

// A panel or 16 tokens, laid out for tiles.
struct TileSide {
    int8_t* values;  // panel [n_blocks][8][16][4], tokens [n_blocks][16][32]
    float* scales;   // [n_blocks][16]
    float* offsets;  // [n_blocks][16]: offsets of a panel, scaled sums of tokens
};

// One panel times 16 tokens, block after block: WeightBlock::add_to for every token.
template <bool has_min>
void tile_columns(const TileSide& panel, const TileSide& tokens, uint32_t n_blocks, VecF* result) {
    alignas(64) int32_t dots[2][tile_tokens * lanes];
    VecF acc[tile_tokens];
#pragma GCC unroll 16
    for (uint32_t c = 0; c < tile_tokens; ++c) acc[c] = zero();
    tile_dot<0>(tokens.values, panel.values, dots[0]);
    for (uint32_t b = 0; b < n_blocks; ++b) {
        if (b + 1 < n_blocks) {
            if (b % 2)
                tile_dot<0>(tokens.values + (b + 1) * 512, panel.values + (b + 1) * 512, dots[0]);
            else
                tile_dot<1>(tokens.values + (b + 1) * 512, panel.values + (b + 1) * 512, dots[1]);
        }
        const int32_t* dot = dots[b % 2];
        const VecF scale = load(panel.scales + b * lanes);
        VecF offset;
        if constexpr (has_min) offset = load(panel.offsets + b * lanes);
#pragma GCC unroll 16
        for (uint32_t c = 0; c < tile_tokens; ++c) {
            const VecI exact = {_mm512_load_si512(dot + c * lanes)};
            acc[c] = fma(to_float(exact), mul(scale, set1(tokens.scales[b * tile_tokens + c])), acc[c]);
            if constexpr (has_min) acc[c] = fma(offset, set1(tokens.offsets[b * tile_tokens + c]), acc[c]);
        }
    }
#pragma GCC unroll 16
    for (uint32_t c = 0; c < tile_tokens; ++c) result[c] = acc[c];
}

// The first tokens of `args`, as many as fill tiles of 16; returns how many. Panels are expanded in groups that stay in
// the second-level cache; inside, tokens outside, so that results are written to neighbouring places.
template <WeightType Type>
uint32_t tile_matmul(const MatmulArgs& args) {
    constexpr auto format = fixmin::quant::block_format(Type);
    if constexpr (format.scale_values == 16) return 0;  // two results for a block, half a tile deep: not done yet
    const uint32_t n_blocks = args.inner / block, n_tokens = args.n_tokens / tile_tokens * tile_tokens;
    if (n_tokens == 0) return 0;
    // Scratch: for each side, which is a panel or 16 tokens, its values, scales and offsets.
    const size_t floats = size_t(n_blocks) * lanes;
    const auto side_at = [&](size_t i) {
        int8_t* values = (int8_t*)args.scratch + i * (floats * block + 2 * floats * sizeof(float));
        float* scales = (float*)(values + floats * block);
        return TileSide{values, scales, scales + floats};
    };
    const auto tokens_at = [&](uint32_t t) { return side_at(matmul_tile_panels + t / tile_tokens); };
    for (uint32_t t = 0; t < n_tokens && !args.same_tokens; t += tile_tokens) {
        const TileSide to = tokens_at(t);
        pack_activations(args.quantized + size_t(t) * n_blocks, n_blocks, to.values, to.scales, to.offsets);
    }
    _tile_loadconfig(&tile_config);
    const uint32_t n_panels = (args.n_rows + lanes - 1) / lanes;
    for (uint32_t first = 0; first < n_panels; first += matmul_tile_panels) {
        const uint32_t n = n_panels - first < matmul_tile_panels ? n_panels - first : matmul_tile_panels;
        for (uint32_t p = 0; p < n; ++p) {
            const TileSide to = side_at(p);
            expand_panel<Type>((const uint8_t*)args.panels + (first + p) * args.panel_stride, n_blocks, to.values,
                               to.scales, to.offsets);
        }
        for (uint32_t t = 0; t < n_tokens; t += tile_tokens) {
            for (uint32_t p = 0; p < n; ++p) {
                prefetch_results(args, t, tile_tokens, first + p, 1);
                VecF result[tile_tokens];
                tile_columns<format.has_min>(side_at(p), tokens_at(t), n_blocks, result);
                for (uint32_t c = 0; c < tile_tokens; ++c) finish(args, t + c, (first + p) * lanes, result[c]);
            }
        }
    }
    _tile_release();
    return n_tokens;
}
