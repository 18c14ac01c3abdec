// The door for devices: what the engine asks of whatever runs a model.
#pragma once
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "model/input_squares.h"
#include "model/weights.h"
#include "numerics/extract.h"
#include "quant/kv_format.h"

namespace fixmin::model {

/// Asked now and then by what takes long: whether to give up.
using Stop = std::function<bool()>;

/// Thrown when a Stop ended a computation.
class Cancelled : public std::exception {
  public:
    const char* what() const noexcept override { return "cancelled"; }
};

struct BackendOptions {
    uint32_t n_ctx = 0;      // most positions of one sequence; 0: the model's context_length
    uint32_t n_batch = 512;  // most tokens of a batch
    quant::KvType kv_type = quant::KvType::f16;
    uint32_t n_kv = 0;               // positions of the cache, for all sequences; 0: as the next two say
    uint32_t kv_contexts = 16;       // so many whole contexts ...
    double kv_memory_share = 0.125;  // ... or fewer, down to one, if that were more than this share of the memory

    std::string device;  // cpu, cuda, cuda:N, auto; empty: FIXMIN_DEVICE, else cpu (engine/devices.h)

    // Of the CPU.
    uint32_t n_threads = 0;  // at most; 0: one for each core
    std::string isa;         // empty: FIXMIN_ISA, else the best there is
};

/// Blocks of a cache as the options want it (n_ctx is given) on a device with so much memory. Throws ArgumentError if
/// n_kv is less than one context, OutOfMemory if it takes more than all memory.
uint32_t n_kv_blocks(const BackendOptions& options, const Hyperparams& hp, double memory_bytes);

/// Keys and values of all layers for kv_block_tokens positions.
size_t kv_block_bytes(const Hyperparams& hp, quant::KvType type);

/// Consecutive tokens of one sequence: some rows of a batch.
struct Chunk {
    uint32_t first_row;
    uint32_t n_tokens;
    uint32_t position;          // of the first token in its sequence; earlier positions are in the cache
    const uint32_t* blocks;     // numbers of its sequence's blocks, the chunk's own included: [positions rounded up]
    uint32_t hidden_layer = 0;  // with hidden: 0 the lifted codes, l the output of block l
    float* hidden = nullptr;    // [n_tokens][D] on the host, or null
};

/// Tokens of any number of sequences that go through the layers together. No result depends on what else is in it.
struct Batch {
    std::span<const uint32_t> ids;      // [T], T <= n_batch, each < V
    std::span<const Chunk> chunks;      // of different sequences; their rows follow each other
    std::span<const uint32_t> rows;     // whose logits are wanted
    float* logits = nullptr;            // [rows][V] on the host, or null: they stay on a device that extracts
    const Stop* should_stop = nullptr;  // asked between layers by one thread at a time; must not throw
};

/// Rows of logits that stay on a device.
inline constexpr uint32_t most_kept_rows = 64;

/// What a device is, for those who ask which one it was.
struct Description {
    std::string device;   // as BackendOptions::device names it, without "auto": "cpu", "cuda", "cuda:1"
    std::string name;     // of the processor
    std::string isa;      // of the kernels
    uint32_t n_threads;   // of the host that a step may take
    size_t memory_bytes;  // that the device has
};

/// Bytes on the device.
struct MemoryUse {
    size_t weights;   // matrices
    size_t kv_cache;  // reserved
    size_t buffers;   // activations and tables
};

/// A loaded model and the memory of its keys and values on one device.
///
/// Every device gives the same bits (docs/numerics.md), and blocks of keys and values that one has written can be read
/// by another. Blocks have numbers from 0; who uses which is for the caller to know. Used by one thread at a time,
/// except for what is const.
class Backend {
  public:
    virtual ~Backend() = default;

    /// Runs the batch through all blocks, which leaves its keys and values in the cache, and computes the logits of
    /// `rows`. Returns false if should_stop said so; the cache then holds a part of the keys and values.
    virtual bool forward(const Batch& batch) = 0;

    /// Final norm and output projection of more rows of the last batch: logits [rows][V] on the host.
    virtual void project(std::span<const uint32_t> rows, float* logits) = 0;

    /// Whether the device can leave logits where they are, up to most_kept_rows of the last forward or project with
    /// logits = null, and answers what sampling asks about them. forward does not wait then for what it computes.
    virtual bool extracts() const { return false; }
    /// [queries], `largest` of which are valid until the next call. Only if extracts(), as the next one.
    virtual void extract(std::span<const numerics::ExtractQuery> queries, numerics::Extract* extracts);
    /// Of kept rows: logits [n][V] on the host.
    virtual void read_logits(uint32_t first, uint32_t n, float* logits);

    virtual void copy_block(uint32_t from, uint32_t to) = 0;
    /// out, in: [kv_block_bytes]
    virtual void read_block(uint32_t block, std::byte* out) const = 0;
    virtual void write_block(uint32_t block, const std::byte* in) = 0;

    /// body(begin, end) on parts of 0..n, on the threads of the host that the last step took.
    virtual void parallel_for(uint32_t n, const std::function<void(uint32_t, uint32_t)>& body) = 0;

    /// From now on forward and project add the inputs of their products to it; null: no longer.
    virtual void collect_squares(InputSquares* squares) = 0;

    /// Bytes per second that the device reads of n_bytes of its memory, in each of `passes` over it.
    virtual std::vector<double> read_ceiling(size_t n_bytes, uint32_t passes, const Stop& stop) = 0;

    /// 8-bit multiplications and additions per second of the device, in each of `passes` of about 50 ms.
    virtual std::vector<double> int8_ceiling(uint32_t passes, const Stop& stop) = 0;

    /// Likewise of tiles, where a CPU multiplies those beside its vectors; else empty.
    virtual std::vector<double> tile_ceiling(uint32_t, const Stop&) { return {}; }

    /// Seconds from one part of a step to the next if neither has any work, in each of `passes`: of threads that wait
    /// for each other, of kernels in a graph.
    virtual std::vector<double> launch_ceiling(uint32_t passes, const Stop& stop) = 0;

    /// Shapes, types and codes of what was loaded; the matrices are the device's own.
    virtual const Weights& weights() const = 0;
    virtual quant::KvType kv_type() const = 0;
    virtual uint32_t n_blocks() const = 0;
    virtual Description description() const = 0;
    virtual MemoryUse memory() const = 0;
};

}  // namespace fixmin::model
