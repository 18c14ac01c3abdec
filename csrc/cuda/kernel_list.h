// The kernels by name, with what each is given.
#pragma once

#define FIXMIN_KERNELS_OF_TYPE(X, name) X(few_##name, ProductArgs) X(many_##name, ProductArgs)

#define FIXMIN_KERNELS(X)             \
    X(lift, LiftArgs)                 \
    X(fold, FoldArgs)                 \
    X(norm, NormArgs)                 \
    X(activate, ActivateArgs)         \
    X(rotate_and_store, RotateArgs)   \
    X(attention, AttentionArgs)       \
    X(read_all, ReadArgs)             \
    X(multiply_all, MultiplyArgs)     \
    X(floats_f32, ProductArgs)        \
    X(floats_f16, ProductArgs)        \
    X(floats_bf16, ProductArgs)       \
    FIXMIN_KERNELS_OF_TYPE(X, q8_0)   \
    FIXMIN_KERNELS_OF_TYPE(X, q4_0)   \
    FIXMIN_KERNELS_OF_TYPE(X, q4_1)   \
    FIXMIN_KERNELS_OF_TYPE(X, q5_0)   \
    FIXMIN_KERNELS_OF_TYPE(X, q5_1)   \
    FIXMIN_KERNELS_OF_TYPE(X, q2_k)   \
    FIXMIN_KERNELS_OF_TYPE(X, q3_k)   \
    FIXMIN_KERNELS_OF_TYPE(X, q4_k)   \
    FIXMIN_KERNELS_OF_TYPE(X, q5_k)   \
    FIXMIN_KERNELS_OF_TYPE(X, q6_k)   \
    FIXMIN_KERNELS_OF_TYPE(X, iq4_nl) \
    FIXMIN_KERNELS_OF_TYPE(X, iq4_xs)
