// AMX tiles on any CPU, for csrc/kernels/tiles.inl: what csrc/kernels/amx.h has, as Intel's manual describes it.
// Stricter where the processor would go on: a tile that is not configured, a shape that does not fit, bytes behind a
// row.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct EmulatedTile {
    uint8_t bytes[16][64];
};
thread_local TileConfig emulated_config{0};
thread_local EmulatedTile emulated_tiles[8];

void expect_tile(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "emulated tiles: %s\n", what);
    std::abort();
}

void tile_configure(const TileConfig& config) {
    expect_tile(config.palette == 1 && config.start_row == 0, "only palette 1 exists");
    for (const uint8_t byte : config.reserved) expect_tile(byte == 0, "reserved bytes must be zero");
    for (int i = 0; i < 16; ++i) {
        expect_tile(i < 8 ? config.rows[i] <= 16 && config.row_bytes[i] <= 64 : config.rows[i] == 0,
                    "a tile is too large");
        expect_tile((config.rows[i] == 0) == (config.row_bytes[i] == 0), "a tile has rows without bytes");
    }
    emulated_config = config;
    std::memset(emulated_tiles, 0, sizeof emulated_tiles);
}
void tile_release() {
    expect_tile(emulated_config.palette == 1, "released twice");
    emulated_config.palette = 0;
    std::memset(emulated_tiles, 0xee, sizeof emulated_tiles);
}

template <int Tile>
void expect_configured() {
    static_assert(Tile >= 0 && Tile < 8);
    expect_tile(emulated_config.palette == 1 && emulated_config.rows[Tile] > 0, "a tile is not configured");
}

template <int Tile>
void tile_zero() {
    expect_configured<Tile>();
    std::memset(&emulated_tiles[Tile], 0, sizeof(EmulatedTile));
}
// Bytes and rows outside of the configured shape become zeros.
template <int Tile>
void tile_load(const void* p, size_t stride) {
    tile_zero<Tile>();
    for (int r = 0; r < emulated_config.rows[Tile]; ++r) {
        std::memcpy(emulated_tiles[Tile].bytes[r], static_cast<const uint8_t*>(p) + r * stride,
                    emulated_config.row_bytes[Tile]);
    }
}
template <int Tile>
void tile_store(void* p, size_t stride) {
    expect_configured<Tile>();
    for (int r = 0; r < emulated_config.rows[Tile]; ++r) {
        std::memcpy(static_cast<uint8_t*>(p) + r * stride, emulated_tiles[Tile].bytes[r],
                    emulated_config.row_bytes[Tile]);
    }
}
template <int Sums, int A, int B, typename TypeOfB>
void tile_dot_of() {
    static_assert(Sums != A && Sums != B && A != B, "the processor refuses two equal tiles");
    expect_configured<Sums>();
    expect_configured<A>();
    expect_configured<B>();
    const TileConfig& c = emulated_config;
    expect_tile(c.rows[A] == c.rows[Sums] && c.row_bytes[B] == c.row_bytes[Sums] && c.row_bytes[A] == 4 * c.rows[B],
                "shapes do not fit");
    for (int m = 0; m < c.rows[A]; ++m) {
        for (int n = 0; n < c.row_bytes[B] / 4; ++n) {
            int32_t sum;
            std::memcpy(&sum, &emulated_tiles[Sums].bytes[m][4 * n], 4);
            uint32_t total = uint32_t(sum);
            for (int k = 0; k < c.row_bytes[A]; ++k) {
                const int a = int8_t(emulated_tiles[A].bytes[m][k]);
                total += uint32_t(a * TypeOfB(emulated_tiles[B].bytes[k / 4][4 * n + k % 4]));
            }
            std::memcpy(&emulated_tiles[Sums].bytes[m][4 * n], &total, 4);
        }
    }
}

template <int Sums, int A, int B>
void tile_dot() {
    tile_dot_of<Sums, A, B, int8_t>();
}
template <int Sums, int A, int B>
void tile_dot_unsigned() {
    tile_dot_of<Sums, A, B, uint8_t>();
}

}  // namespace
