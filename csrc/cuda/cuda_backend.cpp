#include "cuda/cuda_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda/packing.h"
#include "error.h"
#include "model/rotations.h"
#include "quant/panels.h"

namespace fixmin::cuda {

using model::Activation;
using model::Batch;
using model::Chunk;
using model::InBytes;
using model::Layer;
using model::Linear;
using model::Norm;
using quant::block_size;
using quant::WeightType;

namespace {

constexpr uint32_t most_tokens = 65535;                     // of a batch: blocks of a grid along y
constexpr uint32_t rows_at_a_time = model::most_kept_rows;  // of logits
constexpr uint32_t most_repeated_tokens = rows_at_a_time;
constexpr uint32_t positions_at_a_time = 256;  // of rotations

uint32_t tiles(uint32_t n, uint32_t of) { return (n + of - 1) / of; }

Kernel few_kernel(WeightType type) {
    switch (type) {
        case WeightType::f32: return Kernel::floats_f32;
        case WeightType::f16: return Kernel::floats_f16;
        case WeightType::bf16: return Kernel::floats_bf16;
        case WeightType::q8_0: return Kernel::few_q8_0;
        case WeightType::q4_0: return Kernel::few_q4_0;
        case WeightType::q4_1: return Kernel::few_q4_1;
        case WeightType::q5_0: return Kernel::few_q5_0;
        case WeightType::q5_1: return Kernel::few_q5_1;
        case WeightType::q2_k: return Kernel::few_q2_k;
        case WeightType::q3_k: return Kernel::few_q3_k;
        case WeightType::q4_k: return Kernel::few_q4_k;
        case WeightType::q5_k: return Kernel::few_q5_k;
        case WeightType::q6_k: return Kernel::few_q6_k;
        case WeightType::iq4_nl: return Kernel::few_iq4_nl;
        case WeightType::iq4_xs: return Kernel::few_iq4_xs;
        case WeightType::w8a8: return Kernel::few_w8a8;
    }
    throw UnsupportedError("this weight type has no kernel for a GPU");
}

// kernel_list.h has them in the same order.
Kernel many_kernel(WeightType type) {
    return Kernel(uint8_t(few_kernel(type)) - uint8_t(Kernel::few_q8_0) + uint8_t(Kernel::many_q8_0));
}

Kernel attention_kernel(uint32_t shape, KvType type) {
    constexpr Kernel single[] = {Kernel::attention_one_f32, {}, Kernel::attention_many_f32};
    constexpr Kernel half[] = {Kernel::attention_one_f16, Kernel::attention_four_f16, Kernel::attention_many_f16};
    constexpr Kernel codes[] = {Kernel::attention_one_q8_0, Kernel::attention_four_q8_0, Kernel::attention_many_q8_0};
    return (type == KvType::f32 ? single : type == KvType::f16 ? half : codes)[shape];
}

uint32_t batch_tokens(const model::BackendOptions& options) {
    if (options.n_batch <= most_tokens) return options.n_batch;
    throw ArgumentError("n_batch is " + std::to_string(options.n_batch) + "; on a GPU it must be at most " +
                        std::to_string(most_tokens));
}

uint32_t cache_blocks(const model::BackendOptions& options, const model::Hyperparams& hp, const Device& device) {
    return model::n_kv_blocks(options, hp, double(device.info().memory_bytes));
}

}  // namespace

CudaBackend::CudaBackend(std::unique_ptr<Device> device, gguf::GgufFile file, const model::BackendOptions& options,
                         const std::function<void(double)>& progress)
    : pool_(options.n_threads ? options.n_threads : threads::default_threads()),
      device_(std::move(device)),
      weights_(model::load_weights(
          std::move(file), packing(), [this](uint32_t n, const auto& body) { pool_.parallel_for(n, body); }, progress)),
      hp_(weights_.hyperparams),
      kv_type_(options.kv_type),
      n_ctx_(options.n_ctx),
      n_batch_(batch_tokens(options)),
      n_blocks_(cache_blocks(options, hp_, *device_)),
      block_bytes_(model::kv_block_bytes(hp_, kv_type_)),
      arena_(*device_),
      extracts_(hp_.vocab_size),
      step_kind_(step_kind()),
      steps_(most_repeated_tokens + 1) {
    keep_constants();
    take_memory();
    upload_weights();
}

// ---- memory and weights ---------------------------------------------------------------------------------------------

void CudaBackend::take_memory() {
    const size_t t = tiles(n_batch_, tile_tokens) * tile_tokens, d = hp_.embedding_length, f = hp_.feed_forward_length;
    const size_t widest = std::max(d, f), turns = size_t(n_ctx_) * (hp_.rope_dim / 2);
    const auto add = [&](Part& part, size_t n) { arena_.add(part, n * sizeof(float)); };
    arena_.add(matrices_, weights_.panels.size());
    arena_.add(codes_, weights_.code_map.table().size_bytes());
    add(constants_, constants_to_upload_.size());
    arena_.add(cache_, n_blocks_ * block_bytes_);
    add(x_, t * d);
    add(normed_, t * d);
    add(qkv_, t * hp_.qkv_length());
    add(attended_, t * hp_.q_length());
    add(up_, t * f);
    add(gate_, hp_.activation == Activation::swiglu ? t * f : 0);
    const size_t widest_pairs = tiles(uint32_t(widest), 2 * block_size);
    arena_.add(row_codes_, t * widest_pairs * 2 * block_size);
    arena_.add(row_factors_, t * widest_pairs * 2 * factor_planes * sizeof(float));
    add(rows_, rows_at_a_time);
    add(logits_, size_t(rows_at_a_time) * hp_.vocab_size);
    extracts_.add_to(arena_);
    add(cos_, turns);
    add(sin_, turns);
    const size_t most_tiles = t * (hp_.head_count / hp_.head_count_kv / tile_shapes[0].queries + 1);
    add(words_, 3 * t + most_tiles * sizeof(Tile) / sizeof(uint32_t) + t * tiles(n_ctx_, quant::kv_block_tokens));
    const auto bytes = [](size_t n) { return std::to_string(n) + " bytes"; };
    arena_.allocate("a model: weights, " + bytes(matrices_.size()) + "; KV cache, " + bytes(cache_.size()) +
                    " (n_kv, n_ctx and kv_type make it smaller); and what a batch of " + std::to_string(n_batch_) +
                    " tokens takes (n_batch)");
}

void CudaBackend::keep_constants() {
    const auto keep_all = [&](const std::vector<float>& values) { keep(values.data(), values.size()); };
    for (const Layer& layer : weights_.layers) {
        for (const Linear* w : {&layer.q, &layer.k, &layer.v, &layer.attn_output, &layer.gate, &layer.up, &layer.down})
            keep_all(w->bias);
        for (const Norm* norm : {&layer.attn_norm, &layer.ffn_norm}) {
            keep_all(norm->weight);
            keep_all(norm->bias);
        }
    }
    keep_all(weights_.output.bias);
    keep_all(weights_.output_norm.weight);
    keep_all(weights_.output_norm.bias);
    if (!hp_.folds_layer_0()) return;
    const codes::FoldedProjection& fold = weights_.fold;
    keep(fold.columns(), fold.width() * fold.rows());
    keep(fold.sum(), fold.rows());
    keep(fold.constant(), fold.rows());
}

// The host's copy of the matrices is given back; what is small stays there too.
void CudaBackend::upload_weights() {
    const auto upload = [&](const Part& to, const void* from) { device_->upload(to.data(), from, to.size()); };
    upload(matrices_, weights_.panels.data());
    upload(codes_, weights_.code_map.table().data());
    upload(constants_, constants_to_upload_.data());
    const std::byte* host = weights_.panels.data();
    const auto place = [&](Linear& w) {
        if (w.rows) w.panels = matrices_.data() + (w.panels - host);
    };
    for (Layer& layer : weights_.layers) {
        for (Linear* w : {&layer.q, &layer.k, &layer.v, &layer.attn_output, &layer.gate, &layer.up, &layer.down})
            place(*w);
    }
    place(weights_.output);
    device_->wait();
    weights_.panels = {};
    constants_to_upload_ = {};
}

void CudaBackend::keep(const float* values, size_t n) {
    if (n == 0) return;
    constant_offsets_[values] = constants_to_upload_.size();
    constants_to_upload_.insert(constants_to_upload_.end(), values, values + n);
}

const float* CudaBackend::on_device(const std::vector<float>& values) const {
    return values.empty() ? nullptr : constants_.as<float>() + constant_offsets_.at(values.data());
}

// ---- the forward pass -----------------------------------------------------------------------------------------------

bool CudaBackend::forward(const Batch& batch) {
    const uint32_t n_tokens = uint32_t(batch.ids.size());
    place(batch);
    if (hp_.code_kind == model::CodeKind::learned) upload_embeddings(batch.ids);
    if (repeats(batch)) {
        if (batch.should_stop && (*batch.should_stop)()) return false;
        run_step(n_tokens);
        if (batch.logits) read_logits(0, n_tokens, batch.logits);
    } else {
        if (!run_layers(batch)) return false;
        if (batch.rows.empty())
            device_->wait();
        else
            project(batch.rows, batch.logits);
    }
    weights_.check_readable();
    return true;
}

bool CudaBackend::run_layers(const Batch& batch) {
    const uint32_t n_tokens = uint32_t(batch.ids.size());
    lift(n_tokens);
    capture_hidden(0, batch);
    for (uint32_t l = 0; l < hp_.block_count; ++l) {
        run_layer(l, n_tokens);
        capture_hidden(l + 1, batch);
        if (batch.should_stop && (*batch.should_stop)()) {
            device_->wait();
            return false;
        }
    }
    return true;
}

void CudaBackend::run_layer(uint32_t l, uint32_t n_tokens) {
    const Layer& layer = weights_.layers[l];
    project_qkv(l, n_tokens);                // h = norm1(x); q, k, v
    const Rows mixed = attend(l, n_tokens);  // softmax(q.k * scale) v
    if (squares_) add_squares(squares_->blocks[l].attn_output, mixed, n_tokens);
    multiply(layer.attn_output, mixed, n_tokens, x_.as<float>(), hp_.embedding_length, true);  // x += Wo (...)
    feed_forward(l, n_tokens);  // x += W2 act(W1 norm2(x))
}

void CudaBackend::project(std::span<const uint32_t> rows, float* logits) {
    for (size_t first = 0; first < rows.size(); first += rows_at_a_time) {
        const auto some = rows.subspan(first, std::min<size_t>(rows_at_a_time, rows.size() - first));
        device_->upload(rows_.data(), some.data(), some.size_bytes());
        project_on_device(rows_.as<uint32_t>(), uint32_t(some.size()));
        if (logits) read_logits(0, uint32_t(some.size()), logits + first * hp_.vocab_size);
    }
}

void CudaBackend::project_on_device(const uint32_t* rows, uint32_t n) {
    const Rows normed = normalized(weights_.output_norm, n, read_by(weights_.output), rows);
    if (squares_) add_squares(squares_->output, normed, n);
    multiply(weights_.output, normed, n, logits_.as<float>(), hp_.vocab_size);
}

void CudaBackend::read_logits(uint32_t first, uint32_t n, float* logits) {
    const size_t row = hp_.vocab_size * sizeof(float);
    device_->download(logits, logits_.data() + first * row, n * row);
}

// ---- steps that come again and again --------------------------------------------------------------------------------

// One token of each sequence, all of whose logits are wanted: then nothing but what the device's memory holds differs
// from the last such step. Up to so many tokens the host would take longer for the launches than the GPU for the work.
bool CudaBackend::repeats(const Batch& batch) const {
    const size_t n = batch.ids.size();
    if (squares_ || n > most_repeated_tokens || batch.chunks.size() != n || batch.rows.size() != n) return false;
    for (size_t i = 0; i < n; ++i) {
        if (batch.rows[i] != i) return false;
    }
    return std::ranges::none_of(batch.chunks, [](const Chunk& chunk) { return chunk.hidden != nullptr; });
}

void CudaBackend::run_step(uint32_t n_tokens) {
    const auto step = [&] {
        lift(n_tokens);
        for (uint32_t l = 0; l < hp_.block_count; ++l) run_layer(l, n_tokens);
        project_on_device(nullptr, n_tokens);
    };
    Step& known = steps_[n_tokens];
    if (!known.met) {
        known.met = true;  // to prepare it takes longer than to do it once
        return step();
    }
    if (!known.prepared) known.prepared = std::make_unique<RepeatedStep>(*device_, device_->record(step), step_kind_);
    known.prepared->run();
}

// ---- parts of a step ------------------------------------------------------------------------------------------------

// Which token stands where. Words: ids, positions, tables [T]; tiles of attention; numbers of blocks.
void CudaBackend::place(const Batch& batch) {
    const size_t n = batch.ids.size();
    make_tiles(batch);
    std::vector<uint32_t>& words = words_to_upload_;
    words.assign(batch.ids.begin(), batch.ids.end());
    const size_t first_tile = 3 * n, first_block = first_tile + tiles_.size() * sizeof(Tile) / sizeof(uint32_t);
    words.resize(first_block);
    std::vector<uint32_t> tables;  // of the chunks
    for (const Chunk& chunk : batch.chunks) {
        const uint32_t end = chunk.position + chunk.n_tokens, table = uint32_t(words.size() - first_block);
        for (uint32_t t = 0; t < chunk.n_tokens; ++t) {
            words[n + chunk.first_row + t] = chunk.position + t;
            words[2 * n + chunk.first_row + t] = table;
        }
        words.insert(words.end(), chunk.blocks, chunk.blocks + tiles(end, quant::kv_block_tokens));
        prepare_positions(end);
    }
    for (Tile& tile : tiles_) tile.table = words[2 * n + tile.row];
    std::memcpy(words.data() + first_tile, tiles_.data(), tiles_.size() * sizeof(Tile));
    device_->upload(words_.data(), words.data(), words.size() * sizeof(uint32_t));
    ids_ = words_.as<uint32_t>();
    positions_ = ids_ + n;
    tables_ = positions_ + n;
    tiles_on_device_ = reinterpret_cast<const Tile*>(tables_ + n);
    blocks_ = ids_ + first_block;
}

// A chunk with few queries is one tile, of a shape for so many. The others are cut; tiles that take longest come first.
void CudaBackend::make_tiles(const Batch& batch) {
    const uint32_t group = hp_.head_count / hp_.head_count_kv;
    tiles_.clear();
    for (uint32_t shape = 0; shape < std::size(tile_shapes); ++shape) {
        const size_t begin = tiles_.size();
        for (const Chunk& chunk : batch.chunks) {
            const uint32_t n = chunk.n_tokens * group;
            if (tile_shape(n) != shape) continue;
            for (uint32_t first = 0; first < n; first += tile_shapes[shape].queries) {
                const uint32_t queries = std::min(n - first, tile_shapes[shape].queries);
                tiles_.push_back({chunk.first_row, chunk.position, 0, first, queries});
            }
        }
        const auto last_key = [&](const Tile& tile) { return tile.position + (tile.first + tile.n - 1) / group; };
        std::ranges::stable_sort(tiles_.begin() + begin, tiles_.end(), std::ranges::greater{}, last_key);
        n_tiles_[shape] = uint32_t(tiles_.size() - begin);
    }
    tiles_are_chunks_ = tiles_.size() == batch.chunks.size();
}

// Some more than are asked for: a sequence that grows would else ask in every step.
void CudaBackend::prepare_positions(uint32_t end) {
    const uint32_t pairs = hp_.rope_dim / 2;
    if (end <= n_turns_ || pairs == 0) return;
    end = std::min(tiles(end, positions_at_a_time) * positions_at_a_time, n_ctx_);
    const model::Rotations turns(hp_, n_turns_, end);
    const size_t offset = size_t(n_turns_) * pairs * sizeof(float);
    device_->upload(cos_.data() + offset, turns.cos.data(), turns.cos.size() * sizeof(float));
    device_->upload(sin_.data() + offset, turns.sin.data(), turns.sin.size() * sizeof(float));
    n_turns_ = end;
}

void CudaBackend::upload_embeddings(std::span<const uint32_t> ids) {
    const size_t d = hp_.embedding_length;
    std::vector<float> rows(ids.size() * d);
    for (size_t t = 0; t < ids.size(); ++t) weights_.embed(ids[t], rows.data() + t * d);
    device_->upload(x_.data(), rows.data(), rows.size() * sizeof(float));
}

// x of layer 0.
void CudaBackend::lift(uint32_t n_tokens) {
    if (hp_.code_kind == model::CodeKind::learned) return;  // upload_embeddings() does it
    device_->launch(Kernel::lift, {n_tokens, 1, row_threads},
                    LiftArgs{code_map(), ids_, hp_.embedding_length, hp_.lift.kind == codes::LiftKind::interleave,
                             hp_.lift.v0, hp_.lift.v1, x_.as<float>()});
}

void CudaBackend::project_qkv(uint32_t l, uint32_t n_tokens) {
    const uint32_t stride = hp_.qkv_length();
    float* qkv = qkv_.as<float>();
    if (l == 0 && hp_.folds_layer_0()) {
        const codes::FoldedProjection& fold = weights_.fold;
        const auto constant = [&](const float* values) {
            return constants_.as<float>() + constant_offsets_.at(values);
        };
        device_->launch(
            Kernel::fold, {tiles(stride, row_threads), n_tokens, row_threads},
            FoldArgs{code_map(), ids_, hp_.embedding_length, hp_.lift.v0, hp_.lift.v1, hp_.norm_eps, hp_.rms_norm,
                     stride, constant(fold.columns()), constant(fold.sum()), constant(fold.constant()), qkv});
        return;
    }
    const Layer& layer = weights_.layers[l];
    const Rows rows = normalized(layer.attn_norm, n_tokens, read_by(layer.q));
    if (squares_) add_squares(squares_->blocks[l].qkv, rows, n_tokens);
    float *const k = qkv + hp_.q_length(), *const v = k + hp_.kv_length();
    multiply(std::array{Product{layer.q, qkv}, Product{layer.k, k}, Product{layer.v, v}}, rows, n_tokens, stride);
}

// Where every chunk is one tile, attention stores its keys and values too.
CudaBackend::Rows CudaBackend::attend(uint32_t l, uint32_t n_tokens) {
    const uint32_t heads = hp_.head_count, kv_heads = hp_.head_count_kv, d = hp_.head_dim;
    const KeyValueArgs kv{qkv_.as<float>(), heads,       kv_heads, d, hp_.rope_dim, hp_.rope_style, cos_.as<float>(),
                          sin_.as<float>(), cache_of(l), blocks_};
    if (!tiles_are_chunks_) {
        device_->launch(Kernel::store_kv, {tiles(2 * kv_heads, store_warps), n_tokens, 32 * store_warps},
                        StoreArgs{kv, positions_, tables_});
    }
    const InBytes in_bytes = read_by(weights_.layers[l].attn_output);
    const bool at_once = in_bytes == InBytes::blocks && d % block_size == 0 && !squares_;
    AttentionArgs args{kv, tiles_on_device_, hp_.attention_scale, tiles_are_chunks_, 0, nullptr, {}};
    if (at_once)
        args.quantized = quantized_rows(true);
    else
        args.out = attended_.as<float>();
    for (uint32_t shape = 0; shape < std::size(tile_shapes); args.tiles += n_tiles_[shape++]) {
        if (n_tiles_[shape] == 0) continue;
        const AttentionSpace space = attention_space(shape);
        args.kept_keys = space.kept_keys;
        device_->launch(attention_kernel(shape, kv_type_), {kv_heads, n_tiles_[shape], space.threads, space.bytes()},
                        args);
    }
    if (at_once) return {nullptr, args.quantized, in_bytes};
    return activated(ActivateArgs::Function::none, attended_.as<float>(), hp_.q_length(), n_tokens, in_bytes);
}

// The smallest that takes so many queries at once, or the largest that the device has shared memory for.
uint32_t CudaBackend::tile_shape(uint32_t n_queries) const {
    uint32_t found = 0;
    for (uint32_t shape = 1; shape < std::size(tile_shapes) && tile_shapes[found].queries < n_queries; ++shape) {
        const AttentionSpace space(tile_shapes[shape], kv_type_, hp_.head_dim, 0);
        if (has_tile_shape(shape, kv_type_) && space.bytes() <= device_->info().shared_bytes) found = shape;
    }
    return found;
}

// Scores of tiles that read keys for few queries are kept if there is room. Where there are many queries it is better
// to compute them again than to have few threads on a multiprocessor.
AttentionSpace CudaBackend::attention_space(uint32_t shape) const {
    const AttentionSpace least(tile_shapes[shape], kv_type_, hp_.head_dim, 0);
    if (!tiles_are_chunks_ && shape == std::size(tile_shapes) - 1) return least;
    const size_t keys = (device_->info().shared_bytes - least.bytes()) / sizeof(float) / tile_shapes[shape].queries;
    const size_t all = tiles(n_ctx_, least.threads) * least.threads;
    return {tile_shapes[shape], kv_type_, hp_.head_dim, uint32_t(std::min(keys, all))};
}

void CudaBackend::feed_forward(uint32_t l, uint32_t n_tokens) {
    const Layer& layer = weights_.layers[l];
    const uint32_t f = hp_.feed_forward_length;
    const bool swiglu = hp_.activation == Activation::swiglu;
    const Rows rows = normalized(layer.ffn_norm, n_tokens, read_by(swiglu ? layer.gate : layer.up));
    if (squares_) add_squares(squares_->blocks[l].gate_up, rows, n_tokens);
    const Product up{layer.up, up_.as<float>()};
    if (swiglu)
        multiply(std::array{Product{layer.gate, gate_.as<float>()}, up}, rows, n_tokens, f);
    else
        multiply(std::array{up}, rows, n_tokens, f);
    using Function = ActivateArgs::Function;
    const Function function = swiglu                               ? Function::swiglu
                              : hp_.activation == Activation::gelu ? Function::gelu
                                                                   : Function::gelu_tanh;
    const Rows hidden = activated(function, up_.as<float>(), f, n_tokens, read_by(layer.down));
    if (squares_) add_squares(squares_->blocks[l].down, hidden, n_tokens);
    multiply(layer.down, hidden, n_tokens, x_.as<float>(), hp_.embedding_length, true);
}

// Of the residual stream: its first rows, or those that are listed.
CudaBackend::Rows CudaBackend::normalized(const Norm& norm, uint32_t n_tokens, InBytes in_bytes, const uint32_t* rows) {
    const uint32_t d = hp_.embedding_length;
    const QuantizedRows quantized = quantized_rows(in_bytes != InBytes::none);
    device_->launch(Kernel::norm_rows, {n_tokens, 1, row_threads, (d + row_scale_floats) * sizeof(float)},
                    NormArgs{x_.as<float>(), rows, d, hp_.norm_eps, hp_.rms_norm, on_device(norm.weight),
                             on_device(norm.bias), normed_.as<float>(), quantized, in_bytes == InBytes::rows});
    return {normed_.as<float>(), quantized, in_bytes};
}

CudaBackend::Rows CudaBackend::with_row_scales(const float* values, uint32_t length, uint32_t n_tokens) {
    const QuantizedRows quantized = quantized_rows(true);
    device_->launch(Kernel::quantize_rows, {n_tokens, 1, row_threads, row_scale_floats * sizeof(float)},
                    RowsInBytesArgs{values, length, quantized});
    return {values, quantized, InBytes::rows};
}

// The same rows as w reads them, where the matrix before was of another type.
CudaBackend::Rows CudaBackend::for_product(const Rows& rows, const Linear& w, uint32_t n_tokens) {
    const InBytes wanted = read_by(w);
    if (wanted == InBytes::none || wanted == rows.in_bytes) return rows;
    return activated(ActivateArgs::Function::none, const_cast<float*>(rows.values), w.inner, n_tokens, wanted);
}

CudaBackend::Rows CudaBackend::activated(ActivateArgs::Function function, float* values, uint32_t length,
                                         uint32_t n_tokens, InBytes in_bytes) {
    const bool in_blocks = in_bytes == InBytes::blocks;
    const QuantizedRows quantized = quantized_rows(in_blocks);
    if (function != ActivateArgs::Function::none || in_blocks) {
        device_->launch(Kernel::activate, {tiles(length, 32), tiles(n_tokens, tile_tokens), 32 * tile_tokens},
                        ActivateArgs{function, gate_.as<float>(), values, length, n_tokens, quantized});
    }
    if (in_bytes == InBytes::rows) return with_row_scales(values, length, n_tokens);
    return {values, quantized, in_bytes};
}

// Neighbours of one type go together.
void CudaBackend::multiply(std::span<const Product> products, Rows rows, uint32_t n_tokens, uint32_t out_stride,
                           bool accumulate) {
    while (!products.empty()) {
        const Linear& first = products[0].w;
        rows = for_product(rows, first, n_tokens);
        ProductArgs args{};
        args.inner = first.inner, args.n_tokens = n_tokens, args.out_stride = out_stride;
        args.panel_stride = first.panel_stride;
        args.values = rows.values, args.quantized = rows.quantized;
        args.accumulate = accumulate;
        for (const Product& p : products.first(std::min<size_t>(products.size(), most_parts))) {
            if (p.w.type != first.type || p.w.inner != first.inner) break;
            args.parts[args.n_parts++] = {p.w.panels, on_device(p.w.bias), p.out, p.w.rows};
        }
        launch_product(first.type, args);
        products = products.subspan(args.n_parts);
    }
}

// All kernels give the same bits. Which one is the fastest is arithmetic so far, in cycles of a multiprocessor for 1024
// of the inner dimension; nothing of it was measured.
// - few tokens: 16 rows and 8 tokens take some 500 (32 blocks of some 40 instructions for the terms and 16 for the
//   chains, in 4 schedulers), however many blocks there are, since several share a multiprocessor.
// - many tokens: the 8 warps of a block of 64 x 64 take some 4,000, and 4 times as much of 128 x 128, less a tenth for
//   fewer loads. Multiprocessors without a block do nothing.
// For 1024 rows and 132 multiprocessors few tokens are up to 132, for 4096 up to 33, for 65,536 rows up to 16.
void CudaBackend::launch_product(WeightType type, ProductArgs args) {
    const auto blocks = [&](uint32_t rows, uint32_t tokens) {
        uint32_t along_rows = 0;
        for (uint32_t p = 0; p < args.n_parts; ++p) along_rows += tiles(args.parts[p].n_rows, rows);
        return std::pair{along_rows, tiles(args.n_tokens, tokens)};
    };
    const auto launch = [&](Kernel kernel, std::pair<uint32_t, uint32_t> grid, uint32_t threads, size_t shared_bytes) {
        device_->launch(kernel, {grid.first, grid.second, threads, shared_bytes}, args);
    };
    if (!is_quantized(type)) {
        return launch(few_kernel(type), blocks(quant::panel_rows, float_tokens), float_threads, float_bytes);
    }
    const uint64_t n = device_->info().multiprocessors;
    const auto rounds = [&](std::pair<uint32_t, uint32_t> grid) {
        return (uint64_t(grid.first) * grid.second + n - 1) / n;
    };
    const auto small = blocks(quant::panel_rows, tile_tokens), narrow = blocks(narrow_rows, narrow_tokens),
               wide = blocks(wide_rows, wide_tokens);
    if (uint64_t(small.first) * small.second <= 8 * n * rounds(narrow)) {
        const bool has_min = quant::block_format(type).has_min;
        return launch(few_kernel(type), blocks(quant::panel_rows, few_tokens(has_min)), few_threads,
                      quant::scales_rows(type) ? few_sums_bytes : few_bytes(has_min, args.n_tokens));
    }
    args.wide = has_wide_tiles(type) && rounds(wide) * 36 <= rounds(narrow) * 10;
    launch(many_kernel(type), args.wide ? wide : narrow, many_threads, many_bytes);
}

void CudaBackend::capture_hidden(uint32_t layer, const Batch& batch) {
    const size_t row = hp_.embedding_length * sizeof(float);
    for (const Chunk& chunk : batch.chunks) {
        if (!chunk.hidden || chunk.hidden_layer != layer) continue;
        device_->download(chunk.hidden, x_.data() + chunk.first_row * row, chunk.n_tokens * row);
    }
}

void CudaBackend::add_squares(std::vector<double>& sums, const Rows& rows, uint32_t n_tokens) {
    std::vector<float> values(n_tokens * sums.size());
    device_->download(values.data(), reinterpret_cast<const std::byte*>(rows.values), values.size() * sizeof(float));
    model::add_squares(sums, values.data(), n_tokens, 0, uint32_t(sums.size()));
}

QuantizedRows CudaBackend::quantized_rows(bool wanted) const {
    if (!wanted) return {};
    return {row_codes_.as<uint32_t>(), row_factors_.as<float>(), row_factors_.size() / factor_planes / sizeof(float)};
}

CodeMapArgs CudaBackend::code_map() const {
    CodeMapArgs map{};
    if (hp_.code_kind == model::CodeKind::table) map.table = codes_.as<uint32_t>();
    std::ranges::copy(weights_.code_map.columns(), map.columns);
    map.shift = weights_.code_map.shift();
    map.width = hp_.code_width;
    return map;
}

CacheArgs CudaBackend::cache_of(uint32_t layer) const {
    const size_t head = quant::kv_head_bytes(kv_type_, hp_.head_dim);
    return {kv_type_, cache_.data() + layer * hp_.head_count_kv * head, block_bytes_, head};
}

// ---- blocks of the cache --------------------------------------------------------------------------------------------

void CudaBackend::copy_block(uint32_t from, uint32_t to) { device_->copy(block(to), block(from), block_bytes_); }

void CudaBackend::read_block(uint32_t number, std::byte* out) const {
    device_->download(out, block(number), block_bytes_);
}

void CudaBackend::write_block(uint32_t number, const std::byte* in) {
    device_->upload(block(number), in, block_bytes_);
}

// ---- figures --------------------------------------------------------------------------------------------------------

model::Description CudaBackend::description() const {
    const DeviceInfo& info = device_->info();
    const std::string number = info.number ? ":" + std::to_string(info.number) : "";
    return {"cuda" + number, info.name, "sm_" + std::to_string(info.compute_major) + std::to_string(info.compute_minor),
            pool_.size(), info.memory_bytes};
}

model::MemoryUse CudaBackend::memory() const {
    return {matrices_.size(), cache_.size(), arena_.size() - matrices_.size() - cache_.size()};
}

}  // namespace fixmin::cuda
