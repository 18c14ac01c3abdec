// The forward pass, top to bottom in the order of docs/design.md. Every function is called by all threads of a team,
// each of which does its share; a barrier stands where a step needs what another thread has made.
#include "cpu/decoder.h"

#include <algorithm>
#include <cstring>

#include "model/rotations.h"

namespace fixmin::cpu {

using kernels::ActivationBlock;
using model::Activation;
using model::Layer;
using quant::block_size;

namespace {

// Tokens per pass over the panels of a matrix, in whole tiles of every ISA. The activations of a pass come from a
// shared cache once for all panels that stay in the cache, and each thread's tiles of them have to fit somewhere
// (docs/kernels.md).
uint32_t tokens_per_pass(size_t row_bytes) {
    constexpr size_t cache_bytes = size_t(4) << 20, whole = 48;
    if (row_bytes == 0) return whole;  // of a row shorter than a block
    return uint32_t(std::max(cache_bytes / row_bytes / whole * whole, whole));
}

// Of a row in 8 bits.
size_t row_bytes(InBytes in_bytes, size_t length) {
    if (in_bytes == InBytes::rows) return kernels::scaled_row_bytes(length);
    return length / block_size * sizeof(ActivationBlock);
}
size_t most_row_bytes(size_t length) {
    return std::max(row_bytes(InBytes::blocks, length), row_bytes(InBytes::rows, length));
}

size_t matmul_scratch(size_t inner, size_t max_tokens) {
    const uint32_t pass =
        std::max(tokens_per_pass(row_bytes(InBytes::blocks, inner)), tokens_per_pass(row_bytes(InBytes::rows, inner)));
    return kernels::matmul_scratch_bytes(inner, std::min<size_t>(max_tokens, pass));
}

}  // namespace

Decoder::Decoder(const model::Weights& weights, const kernels::Kernels& kernels, const KvMemory& kv,
                 uint32_t max_tokens, uint32_t n_ctx, uint32_t n_threads)
    : weights_(weights), hp_(weights.hyperparams), kernels_(kernels), kv_(kv) {
    const size_t t = max_tokens, d = hp_.embedding_length, f = hp_.feed_forward_length;
    const size_t widest = std::max(d, f);
    x_.resize(t * d);
    normed_.resize(t * d);
    quantized_.resize(t * most_row_bytes(widest));
    qkv_.resize(t * hp_.qkv_length());
    attended_.resize(t * hp_.q_length());
    up_.resize(t * f);
    if (hp_.activation == Activation::swiglu) gate_.resize(t * f);
    private_.resize(n_threads);
    const Linear* last = &weights.output;
    const auto read = [&](const Linear& w) {
        if (w.rows == 0) return;
        following_[last] = &w;
        last = &w;
    };
    for (const Layer& layer : weights.layers) {
        for (const Linear* w : layer.products()) read(*w);
    }
    read(weights.output);
    for (Private& p : private_) {
        p.row.resize(widest);
        p.quantized.resize(most_row_bytes(widest));
        p.scratch.resize(std::max(kernels::attention_scratch_floats(n_ctx, hp_.head_dim) * sizeof(float),
                                  std::max(matmul_scratch(d, t), matmul_scratch(f, t))));
    }
}

size_t Decoder::bytes_per_token(const model::Hyperparams& hp) {
    const size_t d = hp.embedding_length, f = hp.feed_forward_length;
    const size_t floats = 2 * d + hp.qkv_length() + hp.q_length() + f * (hp.activation == Activation::swiglu ? 2 : 1);
    return floats * sizeof(float) + most_row_bytes(std::max(d, f));
}

size_t Decoder::buffer_bytes() const {
    const auto bytes = [](const auto&... v) { return (... + (v.size() * sizeof(v[0]))); };
    size_t total = bytes(x_, normed_, quantized_, qkv_, attended_, gate_, up_, cos_, sin_);
    for (const Private& own : private_) total += bytes(own.row, own.quantized, own.scratch);
    return total;
}

namespace {

// This thread's share of the channels.
void add_squares(std::vector<double>& sums, const float* rows, uint32_t n_tokens, const Team& team) {
    const auto [begin, end] = team.share(uint32_t(sums.size()));
    model::add_squares(sums, rows, n_tokens, begin, end);
}

}  // namespace

void Decoder::prepare_positions(uint32_t end) {
    const uint32_t pairs = hp_.rope_dim / 2;
    if (pairs == 0) return;
    const model::Rotations more(hp_, uint32_t(cos_.size() / pairs), end);
    cos_.insert(cos_.end(), more.cos.begin(), more.cos.end());
    sin_.insert(sin_.end(), more.sin.begin(), more.sin.end());
}

bool Decoder::forward(const Batch& batch, Team& team, InputSquares* all_squares) {
    const uint32_t n_tokens = uint32_t(batch.ids.size());
    if (team.index == 0) stopped_ = false;
    lift(batch, team);
    team.barrier();
    capture_hidden(0, batch, team);
    for (uint32_t l = 0; l < hp_.block_count; ++l) {
        const Layer& layer = weights_.layers[l];
        InputSquares::Block* squares = all_squares ? &all_squares->blocks[l] : nullptr;
        project_qkv(l, batch, squares, team);  // h = norm1(x); q, k, v
        if (n_tokens == 1) prefetch_kv(l, batch, team);
        team.barrier();
        attend(l, batch, team);  // softmax(q.k * scale) v
        team.barrier();
        const Rows rows = as_rows(attended_.data(), hp_.q_length(), n_tokens, read_by(layer.attn_output), team);
        if (squares) add_squares(squares->attn_output, rows.values, n_tokens, team);
        multiply(layer.attn_output, rows, n_tokens, x_.data(), hp_.embedding_length, true, team);  // x += Wo (...)
        team.barrier();
        feed_forward(layer, n_tokens, squares, team);  // x += W2 act(W1 norm2(x))
        if (team.index == 0 && batch.should_stop && (*batch.should_stop)()) stopped_ = true;
        team.barrier();
        if (stopped_) return false;
        capture_hidden(l + 1, batch, team);
    }
    return true;
}

void Decoder::project(std::span<const uint32_t> rows, float* logits, Team& team, InputSquares* squares) {
    const uint32_t n = uint32_t(rows.size());
    const Rows normed =
        normalized(weights_.output_norm, n, read_by(weights_.output), squares != nullptr, team, rows.data());
    if (squares) add_squares(squares->output, normed.values, n, team);
    multiply(weights_.output, normed, n, logits, hp_.vocab_size, false, team);
}

// x of layer 0: the lifted codes.
void Decoder::lift(const Batch& batch, Team& team) {
    const auto [begin, end] = team.share(uint32_t(batch.ids.size()));
    for (uint32_t t = begin; t < end; ++t) weights_.embed(batch.ids[t], x_.data() + size_t(t) * hp_.embedding_length);
}

void Decoder::project_qkv(uint32_t l, const Batch& batch, InputSquares::Block* squares, Team& team) {
    const uint32_t n_tokens = uint32_t(batch.ids.size());
    const size_t stride = hp_.qkv_length();
    if (l == 0 && hp_.folds_layer_0()) {
        const auto [begin, end] = team.share(n_tokens);
        for (uint32_t t = begin; t < end; ++t) {
            weights_.fold.apply(weights_.code_map.code(batch.ids[t]), qkv_.data() + t * stride);
        }
        return;
    }
    const Layer& layer = weights_.layers[l];
    const bool apart = read_by(layer.k) != read_by(layer.q) || read_by(layer.v) != read_by(layer.q);
    Rows rows = normalized(layer.attn_norm, n_tokens, read_by(layer.q), apart || squares, team);
    if (squares) add_squares(squares->qkv, rows.values, n_tokens, team);
    float* out = qkv_.data();
    for (const Linear* w : {&layer.q, &layer.k, &layer.v}) {
        rows = for_product(rows, *w, n_tokens, team);
        multiply(*w, rows, n_tokens, out, stride, false, team);
        out += w->rows;
    }
}

// Rotates and stores keys, then attends; a thread takes whole key/value heads of a chunk, so nothing waits in between.
// All heads of a piece are stored before any is read: a load that overlaps younger, narrower stores would wait for
// them.
void Decoder::attend(uint32_t l, const Batch& batch, Team& team) {
    const uint32_t n_heads = hp_.head_count_kv, heads_per_kv_head = hp_.head_count / n_heads;
    team.for_pieces(uint32_t(batch.chunks.size()) * n_heads, [&](uint32_t begin, uint32_t end) {
        for (uint32_t i = begin; i < end; ++i) store_kv(l, batch.chunks[i / n_heads], i % n_heads);
        for (uint32_t i = begin; i < end; ++i) {
            if (i + 1 < end) {  // a single token is the first to read its cache since the step before
                const Chunk& next = batch.chunks[(i + 1) / n_heads];
                if (next.n_tokens == 1)
                    kernels_.kv_prefetch(kv_.head(l, (i + 1) % n_heads, next.blocks), next.position);
            }
            for (uint32_t head = i % n_heads * heads_per_kv_head; head < (i % n_heads + 1) * heads_per_kv_head; ++head)
                attend_head(l, batch.chunks[i / n_heads], head, team);
        }
    });
}

void Decoder::store_kv(uint32_t l, const Chunk& chunk, uint32_t kv_head) {
    const uint32_t d = hp_.head_dim, n_tokens = chunk.n_tokens;
    const size_t stride = hp_.qkv_length();
    float* keys = qkv_.data() + chunk.first_row * stride + hp_.q_length() + kv_head * d;
    const float* values = keys + hp_.kv_length();
    for (uint32_t t = 0; t < n_tokens; ++t) {
        // Rows lie in different pages, where no processor looks ahead by itself.
        if (const uint32_t ahead = t + 4; ahead < n_tokens) {
            for (uint32_t i = 0; i < d; i += 16) {
                __builtin_prefetch(keys + ahead * stride + i, 1);
                __builtin_prefetch(values + ahead * stride + i);
            }
        }
        rotate(keys + t * stride, chunk.position + t);
        kernels_.kv_store(kv_.head(l, kv_head, chunk.blocks), chunk.position + t, keys + t * stride,
                          values + t * stride);
    }
}

void Decoder::attend_head(uint32_t l, const Chunk& chunk, uint32_t head, const Team& team) {
    const uint32_t d = hp_.head_dim, heads_per_kv_head = hp_.head_count / hp_.head_count_kv;
    const size_t stride = hp_.qkv_length();
    float* queries = qkv_.data() + chunk.first_row * stride + head * d;
    for (uint32_t t = 0; t < chunk.n_tokens; ++t) {
        rotate(queries + t * stride, chunk.position + t);
        kernels_.scale(queries + t * stride, d, hp_.attention_scale);
    }
    kernels_.attention({kv_.head(l, head / heads_per_kv_head, chunk.blocks), queries, stride, chunk.n_tokens,
                        chunk.position, attended_.data() + size_t(chunk.first_row) * hp_.q_length() + head * d,
                        hp_.q_length(), reinterpret_cast<float*>(private_[team.index].scratch.data())});
}

void Decoder::rotate(float* head, uint32_t position) const {
    const uint32_t pairs = hp_.rope_dim / 2;
    const size_t row = size_t(position) * pairs;
    if (pairs) kernels_.rope(head, hp_.rope_dim, hp_.rope_style, cos_.data() + row, sin_.data() + row);
}

// Of the heads that this thread will probably attend to, before it waits for the others.
void Decoder::prefetch_kv(uint32_t l, const Batch& batch, const Team& team) const {
    const Chunk& chunk = batch.chunks.front();
    const auto [begin, end] = team.share(hp_.head_count_kv);
    for (uint32_t kv_head = begin; kv_head < end; ++kv_head)
        kernels_.kv_prefetch(kv_.head(l, kv_head, chunk.blocks), chunk.position);
}

void Decoder::feed_forward(const Layer& layer, uint32_t n_tokens, InputSquares::Block* squares, Team& team) {
    const bool swiglu = hp_.activation == Activation::swiglu;
    const uint32_t f = hp_.feed_forward_length;
    // Of one kind of rows both products of a part are made together.
    const bool apart = swiglu && read_by(layer.gate) != read_by(layer.up);
    Rows rows = normalized(layer.ffn_norm, n_tokens, read_by(swiglu ? layer.gate : layer.up), apart || squares, team);
    if (squares) add_squares(squares->gate_up, rows.values, n_tokens, team);
    if (apart) {
        multiply(layer.gate, rows, n_tokens, gate_.data(), f, false, team);
        team.barrier();
        rows = for_product(rows, layer.up, n_tokens, team);
    }
    for_parts(layer.up, n_tokens, team, [&](Part part) {
        if (swiglu && !apart) {
            const bool alike = layer.gate.type == layer.up.type;  // else each lays out tokens anew
            part.same_tokens &= alike;
            multiply_part(layer.gate, rows, part, gate_.data(), f, false, team);
            part.same_tokens = alike;
        }
        multiply_part(layer.up, rows, part, up_.data(), f, false, team);
        activate(part.first_token, part.n_tokens, part.first_row, part.end_row);
    });
    team.barrier();
    const Rows hidden = as_rows(up_.data(), f, n_tokens, read_by(layer.down), team);
    if (squares) add_squares(squares->down, hidden.values, n_tokens, team);
    multiply(layer.down, hidden, n_tokens, x_.data(), hp_.embedding_length, true, team);
}

// On a part of W1's results.
void Decoder::activate(uint32_t first_token, uint32_t n_tokens, uint32_t first_row, uint32_t end_row) {
    const uint32_t f = hp_.feed_forward_length, n = end_row - first_row;
    for (uint32_t t = first_token; t < first_token + n_tokens; ++t) {
        float* up = up_.data() + size_t(t) * f + first_row;
        switch (hp_.activation) {
            case Activation::gelu: kernels_.gelu_erf(up, n); break;
            case Activation::gelu_tanh: kernels_.gelu_tanh(up, n); break;
            case Activation::swiglu: kernels_.silu_mul(gate_.data() + size_t(t) * f + first_row, up, n); break;
        }
    }
}

void Decoder::normalize_row(const Norm& norm, const float* x, float* y) const {
    const auto kernel = hp_.rms_norm ? kernels_.rms_norm : kernels_.layer_norm;
    kernel(x, hp_.embedding_length, hp_.norm_eps, norm.weight.data(), norm.bias_or_null(), y);
}

// Row t of `rows`.
void Decoder::quantize(const float* x, uint32_t length, InBytes in_bytes, std::byte* rows, uint32_t t) const {
    std::byte* const row = rows + t * row_bytes(in_bytes, length);
    if (in_bytes == InBytes::blocks) kernels_.quantize_activations(x, length, reinterpret_cast<ActivationBlock*>(row));
    if (in_bytes == InBytes::rows) kernels_.quantize_row(x, length, row);
}

// Of the residual stream: its first rows, or those that are listed. A single one is prepared by every thread for
// itself: cheaper than a barrier. Where rows are wanted in bytes only, floats do not leave the first-level cache.
Decoder::Rows Decoder::normalized(const Norm& norm, uint32_t n_tokens, InBytes in_bytes, bool floats_too, Team& team,
                                  const uint32_t* rows) {
    const uint32_t d = hp_.embedding_length;
    const auto x = [&](uint32_t t) { return x_.data() + size_t(rows ? rows[t] : t) * d; };
    if (n_tokens == 1) {
        Private& own = private_[team.index];
        normalize_row(norm, x(0), own.row.data());
        quantize(own.row.data(), d, in_bytes, own.quantized.data(), 0);
        return {own.row.data(), own.quantized.data(), d, in_bytes};
    }
    const bool in_floats = floats_too || in_bytes == InBytes::none;
    const auto [begin, end] = team.share(n_tokens);
    for (uint32_t t = begin; t < end; ++t) {
        float* y = in_floats ? normed_.data() + size_t(t) * d : private_[team.index].row.data();
        normalize_row(norm, x(t), y);
        quantize(y, d, in_bytes, quantized_.data(), t);
    }
    team.barrier();
    return {in_floats ? normed_.data() : nullptr, quantized_.data(), d, in_bytes};
}

Decoder::Rows Decoder::as_rows(const float* values, uint32_t length, uint32_t n_tokens, InBytes in_bytes, Team& team) {
    if (in_bytes == InBytes::none) return {values, nullptr, length, in_bytes};
    if (n_tokens == 1) {
        Private& own = private_[team.index];
        quantize(values, length, in_bytes, own.quantized.data(), 0);
        return {values, own.quantized.data(), length, in_bytes};
    }
    const auto [begin, end] = team.share(n_tokens);
    for (uint32_t t = begin; t < end; ++t)
        quantize(values + size_t(t) * length, length, in_bytes, quantized_.data(), t);
    team.barrier();
    return {values, quantized_.data(), length, in_bytes};
}

// The same rows as w reads them, where the matrix before was of another type.
Decoder::Rows Decoder::for_product(const Rows& rows, const Linear& w, uint32_t n_tokens, Team& team) {
    const InBytes wanted = read_by(w);
    if (wanted == InBytes::none || wanted == rows.in_bytes) return rows;
    if (n_tokens > 1) team.barrier();  // others still multiply
    return as_rows(rows.values, rows.length, n_tokens, wanted, team);
}

// Tokens in passes, panels inside; a piece of that is one or more parts. Several tokens take panels in pairs, as the
// widest tiles do. The same matrix, number of tokens and team must be given by all threads.
template <typename Body>
void Decoder::for_parts(const Linear& w, uint32_t n_tokens, Team& team, Body body) {
    const InBytes in_bytes = read_by(w);
    const uint32_t tile =
        tokens_per_pass(in_bytes == InBytes::none ? w.inner * sizeof(float) : row_bytes(in_bytes, w.inner));
    const uint32_t n_passes = (n_tokens + tile - 1) / tile;
    const uint32_t entry_rows = (n_tokens == 1 ? 1 : 2) * quant::panel_rows;
    const uint32_t n_entries = (w.rows + entry_rows - 1) / entry_rows;
    uint32_t last_pass = n_passes;
    team.for_pieces(n_passes * n_entries, [&](uint32_t begin, uint32_t end) {
        while (begin < end) {
            const uint32_t pass = begin / n_entries, entry = begin % n_entries;
            const uint32_t end_entry = std::min(n_entries, entry + (end - begin));
            body(Part{entry * entry_rows, std::min(end_entry * entry_rows, w.rows), pass * tile,
                      std::min(tile, n_tokens - pass * tile), pass == last_pass});
            last_pass = pass;
            begin += end_entry - entry;
        }
    });
}

void Decoder::multiply(const Linear& w, const Rows& rows, uint32_t n_tokens, float* out, size_t out_stride,
                       bool accumulate, Team& team) {
    for_parts(w, n_tokens, team,
              [&](const Part& part) { multiply_part(w, rows, part, out, out_stride, accumulate, team); });
}

void Decoder::multiply_part(const Linear& w, const Rows& rows, const Part& part, float* out, size_t out_stride,
                            bool accumulate, Team& team) {
    const size_t t = part.first_token;
    const std::byte* const quantized =  // of either kind
        rows.quantized ? rows.quantized + t * row_bytes(rows.in_bytes, rows.length) : nullptr;
    kernels_.matmul({w.type, w.panels + part.first_row / quant::panel_rows * w.panel_stride, w.panel_stride,
                     part.end_row - part.first_row, w.inner, rows.values ? rows.values + t * rows.length : nullptr,
                     rows.length, reinterpret_cast<const ActivationBlock*>(quantized), quantized, part.n_tokens,
                     w.bias.empty() ? nullptr : w.bias.data() + part.first_row, out + t * out_stride + part.first_row,
                     out_stride, accumulate, private_[team.index].scratch.data(), part.same_tokens,
                     next_read(w, part, team)});
}

// Where this thread reads on after its share of w; null inside of it.
const std::byte* Decoder::next_read(const Linear& w, const Part& part, const Team& team) const {
    if (part.end_row < std::min(team.share(w.n_panels).end * quant::panel_rows, w.rows)) return nullptr;
    const Linear& next = *following_.at(&w);
    return next.panels + team.share(next.n_panels).begin * next.panel_stride;
}

void Decoder::capture_hidden(uint32_t layer, const Batch& batch, Team& team) const {
    const size_t d = hp_.embedding_length;
    for (const Chunk& chunk : batch.chunks) {
        if (!chunk.hidden || chunk.hidden_layer != layer) continue;
        const auto [begin, end] = team.share(chunk.n_tokens);
        std::memcpy(chunk.hidden + begin * d, x_.data() + (chunk.first_row + begin) * d,
                    (end - begin) * d * sizeof(float));
    }
}

}  // namespace fixmin::cpu
