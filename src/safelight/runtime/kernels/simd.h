/* What every kernel shares: run-time dispatch, and scalar functions that compilers vectorise.
 *
 * CLONES compiles a function for AVX-512, AVX2 and the baseline; the loader picks one at start.
 * Elsewhere (NEON, other compilers) the one version is vectorised for the build's baseline. */
#ifndef SAFELIGHT_SIMD_H
#define SAFELIGHT_SIMD_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define CLONES
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE float sl_as_float(uint32_t bits)
{
    union { uint32_t u; float f; } both = {.u = bits};
    return both.f;
}

INLINE uint32_t sl_as_bits(float value)
{
    union { uint32_t u; float f; } both = {.f = value};
    return both.u;
}

INLINE float sl_from_bf16(uint16_t e) { return sl_as_float((uint32_t)e << 16); }

/* float16: exponents shifted by a product, which makes its subnormal numbers right too. */
INLINE float sl_from_half(uint16_t e)
{
    const uint32_t sign = (uint32_t)(e & 0x8000u) << 16, rest = (uint32_t)(e & 0x7fffu) << 13;
    const float value = sl_as_float(rest) * 0x1p112f;
    const uint32_t infinite = (e & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return sl_as_float(sl_as_bits(value) | infinite | sign);
}

/* Round to nearest, ties to even. NaN stays NaN: the largest payloads would carry into the sign. */
INLINE uint16_t sl_to_bf16(float value)
{
    const uint32_t bits = sl_as_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(value == value ? rounded : 0x7fc0u);
}

/* e^x to 2 units in the last place: x = n ln2 + r, |r| <= ln2 / 2, a polynomial in r, and n added
 * to the exponent. For |x| <= 87, or NaN, which stays NaN through the polynomial. */
INLINE float sl_exp(float x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * sl_as_float((sl_as_bits(shifted) << 23) + 0x3f800000u);
}

/* 1 / (1 + e^-u), constant beyond +-60: further out a product with it would be subnormal, and one
 * subnormal in a vector costs as much as a hundred vectors. */
INLINE float sl_sigmoid(float u)
{
    float t = u < -60.0f ? -60.0f : u;
    t = t > 60.0f ? 60.0f : t;
    return 1.0f / (1.0f + sl_exp(-t));
}

/* d/du of u * sigmoid(u). */
INLINE float sl_silu_slope(float u)
{
    const float s = sl_sigmoid(u);
    return s * (1.0f + u * (1.0f - s));
}

#endif
