// The elementary functions of the numerics contract (docs/numerics.md), written once for every device.
//
// Included by a translation unit that has defined VecF, VecI and their operations: 16 lanes of a CPU (kernels.inl), one
// lane of a GPU or of a test. Nothing here moves values between lanes. FIXMIN_ELEMENTARY stands before every function:
// what the compiler of a device wants there, such as __device__.
//
// The order of every floating-point operation is part of the contract; change it here only.
#ifndef FIXMIN_ELEMENTARY
#define FIXMIN_ELEMENTARY
#endif

// Coefficients and errors: bench/fit_polynomials.py.

// Relative error below 1e-7. Results under 2^-126 are 0; above exp(88.3) the result stays at exp(88.3).
FIXMIN_ELEMENTARY VecF exp(VecF x) {
    const VecF low = set1(-87.3f), high = set1(88.3f);
    const VecF clamped = min(high, max(low, x));  // in this order a NaN stays one
    const VecI n = round_to_int(mul(clamped, set1(1.44269504f)));
    const VecF nf = to_float(n);
    VecF r = fma(nf, set1(-0.693359375f), clamped);
    r = fma(nf, set1(2.12194440e-4f), r);
    VecF p = set1(1.990978344e-04f);
    p = fma(p, r, set1(1.394656138e-03f));
    p = fma(p, r, set1(8.333280683e-03f));
    p = fma(p, r, set1(4.166626185e-02f));
    p = fma(p, r, set1(1.666666716e-01f));
    p = fma(p, r, set1(5.000000000e-01f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return select_less(x, low, zero(), mul(p, pow2(n)));
}

// Absolute error below 1.4e-7: x P(x^2) under 1, 1 - exp(Q(|x|)) above.
FIXMIN_ELEMENTARY VecF erf(VecF x) {
    const VecF t = min(set1(4.0f), abs(x));
    const VecF s = mul(t, t);
    VecF p = set1(7.933485904e-05f);
    p = fma(p, s, set1(-8.034844068e-04f));
    p = fma(p, s, set1(5.191218108e-03f));
    p = fma(p, s, set1(-2.685539983e-02f));
    p = fma(p, s, set1(1.128362566e-01f));
    p = fma(p, s, set1(-3.761262894e-01f));
    p = fma(p, s, set1(1.128379226e+00f));
    VecF q = set1(6.428265351e-07f);
    q = fma(q, t, set1(-3.071786705e-05f));
    q = fma(q, t, set1(4.957722849e-04f));
    q = fma(q, t, set1(-4.388493951e-03f));
    q = fma(q, t, set1(2.558944188e-02f));
    q = fma(q, t, set1(-1.089149565e-01f));
    q = fma(q, t, set1(-6.328230500e-01f));
    q = fma(q, t, set1(-1.129756570e+00f));
    q = fma(q, t, set1(2.224631608e-04f));
    const VecF magnitude = select_less(t, set1(1.0f), mul(t, p), sub(set1(1.0f), exp(q)));
    return with_sign_of(magnitude, x);
}

// x * sigmoid(y)
FIXMIN_ELEMENTARY VecF times_sigmoid(VecF x, VecF y) { return div(x, add(set1(1.0f), exp(sub(zero(), y)))); }

FIXMIN_ELEMENTARY VecF silu(VecF x) { return times_sigmoid(x, x); }

FIXMIN_ELEMENTARY VecF gelu(VecF x) {
    return mul(mul(set1(0.5f), x), add(set1(1.0f), erf(mul(x, set1(0.707106781f)))));
}

// 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
FIXMIN_ELEMENTARY VecF gelu_by_tanh(VecF x) {
    const VecF cubic = mul(mul(x, x), x);
    return times_sigmoid(x, mul(set1(1.59576912f), fma(set1(0.044715f), cubic, x)));
}

// Norms: what is added to a partial sum, the factor that the whole sum gives, and the result.
FIXMIN_ELEMENTARY VecF add_square(VecF sum, VecF x) { return fma(x, x, sum); }

FIXMIN_ELEMENTARY VecF add_square_from(VecF sum, VecF x, VecF mean) { return add_square(sum, sub(x, mean)); }

FIXMIN_ELEMENTARY float reciprocal_deviation(float sum_of_squares, uint32_t n, float eps) {
    return 1.0f / sqrt1(sum_of_squares / float(n) + eps);
}

FIXMIN_ELEMENTARY VecF normalized(VecF x, VecF mean, VecF rstd, VecF weight) {
    return mul(mul(sub(x, mean), rstd), weight);
}

FIXMIN_ELEMENTARY VecF normalized(VecF x, VecF mean, VecF rstd, VecF weight, VecF bias) {
    return fma(mul(sub(x, mean), rstd), weight, bias);
}

// Rotary positions.
struct Pair {
    VecF first, second;
};

FIXMIN_ELEMENTARY Pair rotated(Pair x, VecF cos, VecF sin) {
    return {fma(x.first, cos, sub(zero(), mul(x.second, sin))), fma(x.second, cos, mul(x.first, sin))};
}
