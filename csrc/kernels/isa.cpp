#include "kernels/isa.h"

#include <cstdlib>
#include <cstring>

#include "error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fixmin::kernels {

// FIXMIN_ISAS, from CMakeLists.txt: for every instruction set of this build, slowest first, ISA(name), or
// TILES(name, base) if it only multiplies on tiles.
#define ISA(name) extern const Kernels kernels_##name;
#define TILES(name, base) extern const TileKernels tiles_##name;
FIXMIN_ISAS
#undef ISA
#undef TILES

namespace {

Kernels with_tiles(const char* name, Kernels kernels, const TileKernels& tiles) {
    kernels.name = name;
    kernels.matmul = tiles.matmul;
    kernels.attention = tiles.attention;
    kernels.ceilings.multiply_tiles = tiles.ceiling;
    kernels.ceilings.tile_operations = tiles.ceiling_operations;
    return kernels;
}

}  // namespace

#if defined(__x86_64__)
namespace {

struct CpuFeatures {
    bool scalar = true, avx2 = false, avxvnni = false, avx512 = false, avx512vnni = false, amx = false;
};

// Register state that the operating system saves on a context switch; an instruction set without it cannot be used.
uint64_t enabled_state() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t(high) << 32) | low;
}

// Linux gives a process the 8 KB of tile registers on request only; threads that start later inherit the permission.
bool tiles_permitted() {
#if defined(__linux__)
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

CpuFeatures detect() {
    CpuFeatures features;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
    const bool osxsave = c & bit_OSXSAVE, avx = c & bit_AVX, fma = c & bit_FMA, f16c = c & bit_F16C;
    if (!osxsave || !avx) return features;
    const uint64_t state = enabled_state();
    const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
    if (!ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
    features.avx2 = (b & bit_AVX2) && fma && f16c;
    const uint32_t avx512_all = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    features.avx512 = features.avx2 && zmm && (b & avx512_all) == avx512_all;
    features.avx512vnni = features.avx512 && (c & bit_AVX512VNNI);
    constexpr uint32_t amx_tile_bit = 1u << 24, amx_int8_bit = 1u << 25;
    constexpr uint64_t tile_state = 0x60000;
    features.amx = features.avx512vnni && (d & amx_tile_bit) && (d & amx_int8_bit) &&
                   (state & tile_state) == tile_state && tiles_permitted();
    uint32_t a1, b1, c1, d1;
    constexpr uint32_t avx_vnni_bit = 1u << 4;
    if (a >= 1 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1)) features.avxvnni = features.avx2 && (a1 & avx_vnni_bit);
    return features;
}

}  // namespace

std::string cpu_name() {
    uint32_t regs[12];
    if (__get_cpuid_max(0x80000000u, nullptr) < 0x80000004u) return "x86-64";
    for (uint32_t i = 0; i < 3; ++i) {
        __get_cpuid(0x80000002u + i, &regs[4 * i], &regs[4 * i + 1], &regs[4 * i + 2], &regs[4 * i + 3]);
    }
    char name[sizeof regs + 1] = {};
    std::memcpy(name, regs, sizeof regs);
    const std::string text = name;
    const size_t begin = text.find_first_not_of(' ');
    return begin == std::string::npos ? "x86-64" : text.substr(begin, text.find_last_not_of(' ') - begin + 1);
}

#elif defined(__aarch64__)
namespace {

bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
#else
    return false;
#endif
}

struct CpuFeatures {
    // NEON is part of the base that every function of an aarch64 program may use.
    bool scalar = true, neon = true, neon_dotprod = has_dotprod();
};

CpuFeatures detect() { return {}; }

}  // namespace

std::string cpu_name() {
#if defined(__APPLE__)
    char name[128] = {};
    size_t size = sizeof name - 1;
    if (sysctlbyname("machdep.cpu.brand_string", name, &size, nullptr, 0) == 0) return name;
#endif
    return "aarch64";
}

#else

namespace {

struct CpuFeatures {
    bool scalar = true;
};

CpuFeatures detect() { return {}; }

}  // namespace

std::string cpu_name() { return "unknown"; }

#endif

const std::vector<Isa>& isas() {
    static const std::vector<Isa> list = [] {
        CpuFeatures cpu = detect();
#ifdef FIXMIN_EMULATED_TILES
        cpu.amx = true;
#endif
#define ISA(name)
#define TILES(name, base) static const Kernels kernels_##name = with_tiles(#name, kernels_##base, tiles_##name);
        FIXMIN_ISAS
#undef ISA
#undef TILES
#define ISA(name) Isa{#name, cpu.name, &kernels_##name},
#define TILES(name, base) ISA(name)
        return std::vector<Isa>{FIXMIN_ISAS};
#undef ISA
#undef TILES
    }();
    return list;
}

const Kernels& select(std::string_view name) {
    const auto& list = isas();
    if (name.empty()) {
        const Isa* best = &list.front();
        for (const Isa& isa : list) {
            if (isa.supported) best = &isa;
        }
        return *best->kernels;
    }
    std::string known;
    for (const Isa& isa : list) {
        if (name == isa.name) {
            if (isa.supported) return *isa.kernels;
            throw UnsupportedError("this CPU (" + cpu_name() + ") or its operating system lacks the instruction set '" +
                                   std::string(name) + "'");
        }
        known += (known.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw ArgumentError("unknown instruction set '" + std::string(name) + "'; this build has " + known);
}

const Kernels& default_kernels() {
    static const Kernels& chosen = [&]() -> const Kernels& {
        const char* name = std::getenv("FIXMIN_ISA");
        try {
            return select(name ? name : "");
        } catch (const ArgumentError& error) {
            throw ArgumentError(std::string("FIXMIN_ISA: ") + error.what());
        } catch (const UnsupportedError& error) {
            throw UnsupportedError(std::string("FIXMIN_ISA: ") + error.what());
        }
    }();
    return chosen;
}

}  // namespace fixmin::kernels
