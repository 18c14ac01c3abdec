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

constexpr uint32_t tile_tokens = matmul_tile_tokens;

// What is taken off the unsigned bytes of a block to get the signed weights.
template <typename Block>
constexpr int8_t offset_of = int8_t(0x80);
template <>
constexpr int8_t offset_of<Q4Block> = 8;

// A panel as signed bytes in the order of the tiles, and its scales as floats.
template <typename Block>
void expand_panel(const uint8_t* panel, uint32_t n_blocks, int8_t* weights, float* scales) {
    const uint16_t* half = (const uint16_t*)(panel + size_t(n_blocks) * Block::bytes);
    const __m512i offset = _mm512_set1_epi8(offset_of<Block>);
    for (uint32_t b = 0; b < n_blocks; ++b) {
        const Block values(panel + b * Block::bytes);
        for (uint32_t j = 0; j < 8; ++j)
            _mm512_storeu_si512(weights + (size_t(b) * 8 + j) * 64, _mm512_sub_epi8(values.w[j].v, offset));
        store(scales + b * lanes, load_f16(half + b * lanes));
    }
}

// Activations of 16 tokens as tiles [n_blocks][16][32] and their scales [n_blocks][16].
void pack_activations(const ActivationBlock* rows, uint32_t n_blocks, int8_t* values, float* scales) {
    for (uint32_t c = 0; c < tile_tokens; ++c) {
        for (uint32_t b = 0; b < n_blocks; ++b) {
            const ActivationBlock& from = rows[size_t(c) * n_blocks + b];
            __builtin_memcpy(values + (size_t(b) * tile_tokens + c) * block, from.q, block);
            scales[b * tile_tokens + c] = from.scale;
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

// One panel times 16 tokens: acc[c] = fma(float(dot), w_scale * a_scale, acc[c]), block after block.
void tile_columns(const int8_t* weights, const float* scales, uint32_t n_blocks, const int8_t* activations,
                  const float* activation_scales, VecF* result) {
    alignas(64) int32_t dots[2][tile_tokens * lanes];
    VecF acc[tile_tokens];
#pragma GCC unroll 16
    for (uint32_t c = 0; c < tile_tokens; ++c) acc[c] = zero();
    tile_dot<0>(activations, weights, dots[0]);
    for (uint32_t b = 0; b < n_blocks; ++b) {
        if (b + 1 < n_blocks) {
            if (b % 2)
                tile_dot<0>(activations + (b + 1) * 512, weights + (b + 1) * 512, dots[0]);
            else
                tile_dot<1>(activations + (b + 1) * 512, weights + (b + 1) * 512, dots[1]);
        }
        const int32_t* dot = dots[b % 2];
        const VecF d = load(scales + b * lanes);
#pragma GCC unroll 16
        for (uint32_t c = 0; c < tile_tokens; ++c) {
            const VecI exact = {_mm512_load_si512(dot + c * lanes)};
            acc[c] = fma(to_float(exact), mul(d, set1(activation_scales[b * tile_tokens + c])), acc[c]);
        }
    }
#pragma GCC unroll 16
    for (uint32_t c = 0; c < tile_tokens; ++c) result[c] = acc[c];
}

// The first tokens of `args`, as many as fill tiles of 16; returns how many. Panels outside, tokens inside.
template <typename Block>
uint32_t tile_matmul(const MatmulArgs& args) {
    const uint32_t n_blocks = args.inner / block, n_tokens = args.n_tokens / tile_tokens * tile_tokens;
    if (n_tokens == 0) return 0;
    float* scales = (float*)args.scratch;  // [n_blocks][16], of the panel; then [n_tokens / 16][n_blocks][16]
    float* activation_scales = scales + size_t(n_blocks) * lanes;
    int8_t* weights = (int8_t*)(activation_scales + size_t(n_tokens) * n_blocks);  // [n_blocks][8][16][4]
    int8_t* activations = weights + size_t(n_blocks) * 8 * 64;                     // [n_tokens / 16][n_blocks][16][32]
    for (uint32_t t = 0; t < n_tokens && !args.same_tokens; t += tile_tokens) {
        const size_t at = size_t(t) * n_blocks;
        pack_activations(args.quantized + at, n_blocks, activations + at * block, activation_scales + at);
    }
    const TileConfig config;
    _tile_loadconfig(&config);
    const uint8_t* panel = (const uint8_t*)args.panels;
    for (uint32_t row = 0; row < args.n_rows; row += lanes, panel += args.panel_stride) {
        expand_panel<Block>(panel, n_blocks, weights, scales);
        for (uint32_t t = 0; t < n_tokens; t += tile_tokens) {
            const size_t at = size_t(t) * n_blocks;
            VecF result[tile_tokens];
            tile_columns(weights, scales, n_blocks, activations + at * block, activation_scales + at, result);
            for (uint32_t c = 0; c < tile_tokens; ++c) finish(args, t + c, row, result[c]);
        }
    }
    _tile_release();
    return n_tokens;
}
