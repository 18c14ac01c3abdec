// The kernels by name, with what each is given.
#pragma once
#include <cstdint>

/// What a step of few tokens may launch besides few_q8_0 and few_q4_0, where one kernel makes all its launches
/// (persistent.cuh).
#define FIXMIN_STEP_KERNELS(X)          \
    X(lift, LiftArgs)                   \
    X(fold, FoldArgs)                   \
    X(norm_rows, NormArgs)              \
    X(activate, ActivateArgs)           \
    X(attention_one_f16, AttentionArgs) \
    X(attention_one_q8_0, AttentionArgs)

#define FIXMIN_KERNELS(X)                 \
    FIXMIN_STEP_KERNELS(X)                \
    X(attention_one_f32, AttentionArgs)   \
    X(attention_four_f16, AttentionArgs)  \
    X(attention_four_q8_0, AttentionArgs) \
    X(floats_f32, ProductArgs)            \
    X(floats_f16, ProductArgs)            \
    X(floats_bf16, ProductArgs)           \
    X(few_q8_0, ProductArgs)              \
    X(few_q4_0, ProductArgs)              \
    X(few_q4_1, ProductArgs)              \
    X(few_q5_0, ProductArgs)              \
    X(few_q5_1, ProductArgs)              \
    X(few_q2_k, ProductArgs)              \
    X(few_q3_k, ProductArgs)              \
    X(few_q4_k, ProductArgs)              \
    X(few_q5_k, ProductArgs)              \
    X(few_q6_k, ProductArgs)              \
    X(few_iq4_nl, ProductArgs)            \
    X(few_iq4_xs, ProductArgs)            \
    X(few_w8a8, ProductArgs)              \
    X(quantize_rows, RowsInBytesArgs)     \
    X(store_kv, StoreArgs)                \
    X(attention_many_f32, AttentionArgs)  \
    X(attention_many_f16, AttentionArgs)  \
    X(attention_many_q8_0, AttentionArgs) \
    X(many_q8_0, ProductArgs)             \
    X(many_q4_0, ProductArgs)             \
    X(many_q4_1, ProductArgs)             \
    X(many_q5_0, ProductArgs)             \
    X(many_q5_1, ProductArgs)             \
    X(many_q2_k, ProductArgs)             \
    X(many_q3_k, ProductArgs)             \
    X(many_q4_k, ProductArgs)             \
    X(many_q5_k, ProductArgs)             \
    X(many_q6_k, ProductArgs)             \
    X(many_iq4_nl, ProductArgs)           \
    X(many_iq4_xs, ProductArgs)           \
    X(many_w8a8, ProductArgs)             \
    X(run_step, StepArgs)                 \
    X(survey_logits, ExtractArgs)         \
    X(weigh_logits, ExtractArgs)          \
    X(extract_logits, ExtractArgs)        \
    X(read_all, ReadArgs)                 \
    X(multiply_all, MultiplyArgs)

namespace fixmin::cuda {

enum class Kernel : uint8_t {
#define FIXMIN_NAME(name, Args) name,
    FIXMIN_KERNELS(FIXMIN_NAME)
#undef FIXMIN_NAME
};

}  // namespace fixmin::cuda
