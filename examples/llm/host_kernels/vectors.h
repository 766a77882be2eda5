// Vectors of the machine's width, and the numbers that are taken apart into them.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace host {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16;
#define WIDE_TABLES 1
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int8_t Signed __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class Vector> inline Vector load(const void *from) {
    Vector found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(WIDE_TABLES)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline Ints bytes_at(const uint8_t *from) {
#if defined(WIDE_TABLES)
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return __builtin_convertvector(load<Bytes>(from), Ints);
#endif
}

inline Ints signed_at(const uint8_t *from) {
#if defined(WIDE_TABLES)
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return __builtin_convertvector(load<Signed>(from), Ints);
#endif
}

inline Ints halves_at(const uint8_t *from) {
    return __builtin_convertvector(load<Halves>(from), Ints);
}

inline Floats floats(Ints codes) { return __builtin_convertvector(codes, Floats); }

inline Ints counted() {
    Ints found;
    for (int lane = 0; lane < LANES; ++lane)
        found[lane] = lane;
    return found;
}

inline float sum(Floats values) {
#if defined(WIDE_TABLES)
    return _mm512_reduce_add_ps((__m512)values);
#else
    float parts[LANES];
    std::memcpy(parts, &values, sizeof parts);
    for (int step = LANES / 2; step; step /= 2)
        for (int lane = 0; lane < step; ++lane)
            parts[lane] += parts[lane + step];
    return parts[0];
#endif
}

inline float float_of(uint32_t bits) {
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

inline float half_at(const uint8_t *from) {
    uint16_t half;
    std::memcpy(&half, from, sizeof half);
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    uint32_t rest = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    if (rest >= 0x7c00u << 13) // infinite, or not a number
        return float_of(rest | 0x7f800000u | sign);
    float found = float_of(rest) * 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &found, sizeof bits);
    return float_of(bits | sign);
#endif
}

struct Pair {
    float first, second;
};

inline Pair two_halves_at(const uint8_t *from) {
#if defined(__F16C__)
    int32_t both;
    std::memcpy(&both, from, sizeof both);
    __m128 found = _mm_cvtph_ps(_mm_cvtsi32_si128(both));
    return {found[0], found[1]};
#else
    return {half_at(from), half_at(from + 2)};
#endif
}

// LANES numbers of sixteen bits, of either kind.
inline Floats brains_at(const uint8_t *from) { return (Floats)(halves_at(from) << 16); }

inline Floats floats_of_halves_at(const uint8_t *from) {
#if defined(WIDE_TABLES)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    Floats found;
    for (int lane = 0; lane < LANES; ++lane)
        found[lane] = half_at(from + 2 * lane);
    return found;
#endif
}

inline Floats spread(float number) { return number - Floats{}; }

// `yes` where all bits of `mask` are set, `no` where none is.
inline Floats either(Ints mask, Floats yes, Floats no) {
    return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask));
}

// e to the power of x, within two units in the last place: 0 below -104, infinite above 89.
// x = n ln 2 + r, whose exponential is a polynomial of degree six (its Taylor series).
inline Floats exponential(Floats x) {
    constexpr float ROUND = 12582912; // 1.5 * 2^23: the fraction of what it is added to goes
    Floats inside = either(x < spread(-120), spread(-120), x);
    inside = either(inside > spread(100), spread(100), inside);
    Floats shifted = inside * spread(1.44269504f) + spread(ROUND), n = shifted - spread(ROUND);
    Floats r = fused(n, spread(-0.693359375f), inside); // ln 2 in two parts: the first is exact
    r = fused(n, spread(2.12194440e-4f), r);
    Floats found = spread(1.0f / 720);
    const float factors[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (float factor : factors)
        found = fused(found, r, spread(factor));
    Ints power = (Ints)shifted - (Ints)spread(ROUND), half = power >> 1;
    found *= (Floats)((half + 127) << 23); // in two steps: one would go beyond the range
    found *= (Floats)((power - half + 127) << 23);
    return either(x == x, found, x); // what is no number stays none
}

} // namespace host
