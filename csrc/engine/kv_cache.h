// The keys and values of one sequence.
#pragma once
#include <vector>

#include "model/decoder.h"

namespace fixmin::engine {

class KvCache {
  public:
    /// Room for n_ctx tokens. The memory is zeroed and becomes resident as tokens are stored.
    KvCache(const model::Hyperparams& hp, kernels::KvType type, uint32_t n_ctx);

    model::KvView view() const { return {type_, layers_.data()}; }
    size_t reserved_bytes() const { return pages_.size(); }

    /// Bytes of all layers that a later token reads of one cached token.
    size_t bytes_per_position() const { return bytes_per_position_; }

  private:
    kernels::KvType type_;
    size_t bytes_per_position_;
    model::Pages pages_;
    std::vector<std::byte*> blocks_;         // [layer][block]
    std::vector<std::byte* const*> layers_;  // [layer] -> its blocks
};

}  // namespace fixmin::engine
