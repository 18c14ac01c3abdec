// The memory of all keys and values on the host.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"
#include "model/backend.h"
#include "model/pages.h"

namespace fixmin::cpu {

/// [block][layer][key/value head], a head as kernels::KvHead says. Reserved; it becomes resident as blocks are written.
class KvMemory {
  public:
    /// Throws OutOfMemory.
    KvMemory(const model::Hyperparams& hp, quant::KvType type, uint32_t n_blocks)
        : type(type),
          n_blocks(n_blocks),
          block_bytes(model::kv_block_bytes(hp, type)),
          head_dim_(hp.head_dim),
          head_bytes_(quant::kv_head_bytes(type, hp.head_dim)),
          layer_bytes_(hp.head_count_kv * head_bytes_),
          pages_(n_blocks * block_bytes, "the KV cache (n_kv, n_ctx and kv_type make it smaller)") {}

    const quant::KvType type;
    const uint32_t n_blocks;
    const size_t block_bytes;

    size_t bytes() const { return pages_.size(); }
    std::byte* block(uint32_t number) const { return pages_.data() + number * block_bytes; }
    kernels::KvHead head(uint32_t layer, uint32_t kv_head, const uint32_t* blocks) const {
        return {type, head_dim_, pages_.data() + layer * layer_bytes_ + kv_head * head_bytes_, block_bytes, blocks};
    }

  private:
    const uint32_t head_dim_;
    const size_t head_bytes_, layer_bytes_;
    const model::Pages pages_;
};

}  // namespace fixmin::cpu
