// Products of few tokens with packed matrices, on a processor, straight from the packed bytes.
//
// Compiled on the machine that it runs on, for that machine (see build.py). Every weight is, bit for
// bit, the float32 that plain unpacking makes of it: so nothing here may be contracted to fused
// operations but the sums (-ffp-contract=off). What differs is the order of sums, which is the same
// for any number of tokens. A matrix is gone through in pieces of 32 weights; several rows and
// tokens at once, so that each weight is taken apart once and each input is loaded for all rows.

#include <new>
#include <vector>

#include "threads.h"
#include "vectors.h"

using namespace host;

namespace {

// --------------------------------------------------------------------------- what a call is given

enum Scale : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

struct Matrix { // as in library.py
    int32_t format, scale_type;
    int64_t rows, width, group, first_row;
    const uint8_t *codes;
    int64_t codes_stride; // bytes from row to row
    const uint8_t *scale;
    int64_t scale_row, scale_column; // numbers from row to row, from group to group
    const uint8_t *zero;
    int64_t zero_row, zero_column;
};

inline float scale_at(const Matrix &m, int64_t row, int64_t group) {
    int64_t place = row * m.scale_row + group * m.scale_column;
    if (m.scale_type == FLOAT16)
        return half_at(m.scale + 2 * place);
    if (m.scale_type == BFLOAT16) {
        uint16_t bits;
        std::memcpy(&bits, m.scale + 2 * place, sizeof bits);
        return float_of((uint32_t)bits << 16);
    }
    float found;
    std::memcpy(&found, m.scale + 4 * place, sizeof found);
    return found;
}

// ------------------------------------------------------------------------------------ the formats
//
// Each has WEIGHTS in a block, and for one row at a time: `block` comes to a block, `piece` to 32 of
// its weights, `at` gives LANES of them, float32. PAIRED: the even ones of a piece come first.

constexpr int PIECE = 32;

// Codes of a piece, taken apart as bytes; vectors of any width are loaded from there.
typedef uint8_t Codes __attribute__((vector_size(PIECE)));

// Bytes shifted to the right: what comes in from the next byte is for the caller to mask away.
inline Codes shifted(Codes codes, int count) {
    typedef uint16_t Shifted __attribute__((vector_size(PIECE)));
    return (Codes)((Shifted)codes >> count);
}

struct Numbers {
    alignas(PIECE) uint8_t codes[PIECE];
    void set(Codes found) { std::memcpy(codes, &found, sizeof codes); }
    Floats at(int j) const { return floats(signed_at(codes + j * LANES)); }
};

// Sixteen codes: (code - zero) * scale, plus a minimum if there are some.
template <bool MINIMA> struct Sixteen {
#if defined(WIDE_TABLES)
    Floats table;
    void set(float zero, float scale, float minimum) {
        table = (floats(counted()) - zero) * scale;
        if (MINIMA)
            table += minimum;
    }
    Floats at(Ints codes) const { // which go by their low four bits
        return (Floats)_mm512_permutexvar_ps((__m512i)codes, (__m512)table);
    }
#else
    float zero, scale, minimum;
    void set(float z, float s, float m) { zero = z, scale = s, minimum = m; }
    Floats at(Ints codes) const {
        Floats found = (floats(codes & 15) - zero) * scale;
        return MINIMA ? found + minimum : found;
    }
#endif
};

// The nibbles of 16 bytes: the low ones, then the high ones.
inline Ints nibbles_at(const uint8_t *from, int j) {
    int first = j * LANES;
    Ints bytes = bytes_at(from + first % 16);
    return first < 16 ? bytes : bytes >> 4;
}

template <int BYTES, bool MINIMA> struct Blocks4 { // Q4_0, Q4_1
    static constexpr int WEIGHTS = 32, NBYTES = BYTES;
    static constexpr bool PAIRED = false;
    const uint8_t *codes;
    Sixteen<MINIMA> levels;
    void block(const Matrix &m, int64_t row, int64_t block) {
        const uint8_t *raw = m.codes + row * m.codes_stride + block * NBYTES;
        codes = raw + NBYTES - 16;
        Pair own = MINIMA ? two_halves_at(raw) : Pair{half_at(raw), 0};
        levels.set(MINIMA ? 0 : 8, own.first, own.second);
    }
    void piece(const Matrix &, int64_t, int64_t, int) {}
    Floats at(int, int j) const { return levels.at(nibbles_at(codes, j)); }
};
using Q4_0 = Blocks4<18, false>;
using Q4_1 = Blocks4<20, true>;

// Thirty-two codes: bit i of `fifth` is of the weight in lane i.
template <bool MINIMA> struct ThirtyTwo {
    float zero, scale, minimum;
    void set(float z, float s, float m) { zero = z, scale = s, minimum = m; }
    Floats at(Ints codes, uint32_t fifth) const {
#if defined(WIDE_TABLES)
        __m512 lower = (__m512)(floats(counted()) - zero);
        __m512 number = _mm512_permutexvar_ps((__m512i)codes, lower);
        number = _mm512_mask_add_ps(number, (__mmask16)fifth, number, _mm512_set1_ps(16));
        Floats found = (Floats)number * scale;
#else
        Ints bits = ((int32_t)fifth - Ints{}) >> counted() & 1;
        Floats found = (floats((codes & 15) | bits << 4) - zero) * scale;
#endif
        return MINIMA ? found + minimum : found;
    }
};

template <int BYTES, bool MINIMA> struct Blocks5 { // Q5_0, Q5_1
    static constexpr int WEIGHTS = 32, NBYTES = BYTES;
    static constexpr bool PAIRED = false;
    const uint8_t *codes;
    uint32_t fifth;
    ThirtyTwo<MINIMA> levels;
    void block(const Matrix &m, int64_t row, int64_t block) {
        const uint8_t *raw = m.codes + row * m.codes_stride + block * NBYTES;
        codes = raw + NBYTES - 16;
        std::memcpy(&fifth, codes - 4, sizeof fifth);
        Pair own = MINIMA ? two_halves_at(raw) : Pair{half_at(raw), 0};
        levels.set(MINIMA ? 0 : 16, own.first, own.second);
    }
    void piece(const Matrix &, int64_t, int64_t, int) {}
    Floats at(int, int j) const { return levels.at(nibbles_at(codes, j), fifth >> (j * LANES)); }
};
using Q5_0 = Blocks5<22, false>;
using Q5_1 = Blocks5<24, true>;

struct Q8_0 {
    static constexpr int WEIGHTS = 32, NBYTES = 34;
    static constexpr bool PAIRED = false;
    const uint8_t *codes;
    float scale;
    void block(const Matrix &m, int64_t row, int64_t block) {
        codes = m.codes + row * m.codes_stride + block * NBYTES + 2;
        scale = half_at(codes - 2);
    }
    void piece(const Matrix &, int64_t, int64_t, int) {}
    Floats at(int, int j) const { return floats(signed_at(codes + j * LANES)) * scale; }
};

// Eight scales and eight minima of six bits, times the float16 numbers before them; minima negated.
inline void six_bit_scales(const uint8_t *raw, float *found) {
    uint32_t words[3], codes[4];
    std::memcpy(words, raw + 4, sizeof words);
    codes[0] = words[0] & 0x3f3f3f3f;
    codes[1] = (words[2] & 0x0f0f0f0f) | ((words[0] >> 2) & 0x30303030);
    codes[2] = words[1] & 0x3f3f3f3f;
    codes[3] = ((words[2] >> 4) & 0x0f0f0f0f) | ((words[1] >> 2) & 0x30303030);
    float scale = half_at(raw), minimum = -half_at(raw + 2);
    for (int i = 0; i < 16; i += LANES) {
        Floats numbers = floats(bytes_at((const uint8_t *)codes + i));
        numbers *= counted() + i < 8 ? scale - Floats{} : minimum - Floats{};
        std::memcpy(found + i, &numbers, sizeof numbers);
    }
}

struct Q4_K {
    static constexpr int WEIGHTS = 256, NBYTES = 144;
    static constexpr bool PAIRED = false;
    const uint8_t *codes;
    float factors[16];
    Sixteen<true> levels;
    void block(const Matrix &m, int64_t row, int64_t block) {
        const uint8_t *raw = m.codes + row * m.codes_stride + block * NBYTES;
        codes = raw + 16;
        six_bit_scales(raw, factors);
    }
    void piece(const Matrix &, int64_t, int64_t, int p) {
        levels.set(0, factors[p], factors[8 + p]);
    }
    Floats at(int p, int j) const {
        Ints bytes = bytes_at(codes + p / 2 * 32 + j * LANES);
        return levels.at(p % 2 ? bytes >> 4 : bytes);
    }
};

struct Q5_K {
    static constexpr int WEIGHTS = 256, NBYTES = 176;
    static constexpr bool PAIRED = false;
    const uint8_t *raw;
    float factors[16];
    Numbers numbers;
    void block(const Matrix &m, int64_t row, int64_t block) {
        raw = m.codes + row * m.codes_stride + block * NBYTES;
        six_bit_scales(raw, factors);
    }
    void piece(const Matrix &, int64_t, int64_t, int p) {
        Codes low = load<Codes>(raw + 48 + p / 2 * 32);
        Codes fifth = shifted(load<Codes>(raw + 16), p) & 1;
        numbers.set(((p % 2 ? shifted(low, 4) : low) & 15) | fifth << 4);
    }
    Floats at(int p, int j) const { return numbers.at(j) * factors[p] + factors[8 + p]; }
};

struct Q6_K {
    static constexpr int WEIGHTS = 256, NBYTES = 210;
    static constexpr bool PAIRED = false;
    const uint8_t *codes;
    float factors[16];
    Numbers numbers;
    void block(const Matrix &m, int64_t row, int64_t block) {
        codes = m.codes + row * m.codes_stride + block * NBYTES;
        float scale = half_at(codes + 208);
        for (int i = 0; i < 16; i += LANES) {
            Floats numbers = floats(signed_at(codes + 192 + i)) * scale;
            std::memcpy(factors + i, &numbers, sizeof numbers);
        }
    }
    void piece(const Matrix &, int64_t, int64_t, int p) {
        int half = p / 4, quarter = p % 4;
        Codes low = load<Codes>(codes + 64 * half + quarter % 2 * 32);
        Codes upper = shifted(load<Codes>(codes + 128 + 32 * half), 2 * quarter) & 3;
        numbers.set((((quarter > 1 ? shifted(low, 4) : low) & 15) | upper << 4) - (uint8_t)32);
    }
    Floats at(int p, int j) const { return numbers.at(j) * factors[2 * p + j * LANES / 16]; }
};

// Groups of whole pieces; a scale may be of any float dtype, and lie at any stride.
struct Grouped {
    static constexpr int WEIGHTS = 32;
    int64_t left = 0, group = 0; // pieces to the end of the group; the next one's number
    // True: a group begins, with these numbers; `bits` has a code.
    bool begins(const Matrix &m, int64_t row, int bits, float &scale, float &zero) {
        if (left--)
            return false;
        left = m.group / PIECE - 1;
        scale = scale_at(m, row, group);
        zero = (float)(1 << (bits - 1));
        if (m.zero) {
            int64_t number = m.first_row + row, pack = 32 / bits;
            uint32_t word;
            std::memcpy(&word, m.zero + 4 * (number / pack * m.zero_row + group * m.zero_column), 4);
            zero = (float)((word >> (number % pack * bits)) & ((1u << bits) - 1));
        }
        ++group;
        return true;
    }
};

struct CT4 : Grouped {
    static constexpr int NBYTES = 16;
    static constexpr bool PAIRED = true; // of each byte, the low nibble is the weight before
    const uint8_t *codes;
    Sixteen<false> levels;
    void block(const Matrix &m, int64_t row, int64_t block) {
        float scale, zero;
        codes = m.codes + row * m.codes_stride + block * NBYTES;
        if (begins(m, row, 4, scale, zero))
            levels.set(zero, scale, 0);
    }
    void piece(const Matrix &, int64_t, int64_t, int) {}
    Floats at(int, int j) const { return levels.at(nibbles_at(codes, j)); }
};

struct CT8 : Grouped {
    static constexpr int NBYTES = 32;
    static constexpr bool PAIRED = false;
    const uint8_t *codes;
    float scale, zero;
    void block(const Matrix &m, int64_t row, int64_t block) {
        codes = m.codes + row * m.codes_stride + block * NBYTES;
        begins(m, row, 8, scale, zero);
    }
    void piece(const Matrix &, int64_t, int64_t, int) {}
    Floats at(int, int j) const { return (floats(bytes_at(codes + j * LANES)) - zero) * scale; }
};

struct BF16 {
    static constexpr int WEIGHTS = 32, NBYTES = 64;
    static constexpr bool PAIRED = false;
    const uint8_t *codes;
    void block(const Matrix &m, int64_t row, int64_t block) {
        codes = m.codes + row * m.codes_stride + block * NBYTES;
    }
    void piece(const Matrix &, int64_t, int64_t, int) {}
    Floats at(int, int j) const { return brains_at(codes + 2 * j * LANES); }
};

struct F16 {
    static constexpr int WEIGHTS = 32, NBYTES = 64;
    static constexpr bool PAIRED = false;
    const uint8_t *codes;
    void block(const Matrix &m, int64_t row, int64_t block) {
        codes = m.codes + row * m.codes_stride + block * NBYTES;
    }
    void piece(const Matrix &, int64_t, int64_t, int) {}
    Floats at(int, int j) const { return floats_of_halves_at(codes + 2 * j * LANES); }
};

// ------------------------------------------------------------------------------------- a product

struct Product {
    const Matrix &matrix;
    const float *x; // tokens x width, of paired formats in their order
    float *y;       // tokens x y_stride
    int64_t y_stride, tokens;
};

constexpr int TOGETHER = 8; // tokens for which a weight is taken apart once
constexpr int LINE = 64; // bytes of a cache's line
constexpr int AHEAD = 4096; // bytes, at least
constexpr int FEW_ROWS = 64; // that are in the cache for the next tokens
constexpr int MOST_SUMS = LANES == 16 ? 16 : 8; // that registers hold, of rows times tokens

// Roundings of equal terms add up: so 32 terms are summed up, 32 of these sums, and then the rest.
constexpr int TERMS = 32;
constexpr int STRETCH = LANES * TERMS; // weights of the shortest sums

template <int TOKENS> constexpr int rows_at_once() {
    return MOST_SUMS / TOKENS > 4 ? 4 : MOST_SUMS / TOKENS;
}

// Sums join larger ones, and begin again.
template <int TOKENS, int ROWS>
inline void flush(Floats (&own)[ROWS][TOKENS], Floats (&sums)[ROWS][TOKENS]) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
            sums[r][t] += own[r][t], own[r][t] = Floats{};
}

template <class Format, int TOKENS, int ROWS>
inline void add_blocks(const Product &p, Format (&formats)[ROWS], const int64_t (&rows)[ROWS],
                       int64_t first, int64_t last, Floats (&sums)[ROWS][TOKENS]) {
    Floats own[ROWS][TOKENS] = {};
    int64_t ahead = ROWS * p.matrix.codes_stride; // bytes to the rows that are fetched meanwhile
    if (ahead > 0 && ahead < AHEAD)
        ahead *= (AHEAD + ahead - 1) / ahead;
    const float *x[TOKENS]; // the first one's again, where there are fewer
    for (int t = 0; t < TOKENS; ++t)
        x[t] = p.x + (t < p.tokens ? t : 0) * p.matrix.width;
    for (int64_t block = first; block < last; ++block) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            formats[r].block(p.matrix, rows[r], block);
            const uint8_t *next = p.matrix.codes + rows[r] * p.matrix.codes_stride + ahead;
#pragma GCC unroll 4
            for (int i = 0; i < Format::NBYTES; i += LINE)
                __builtin_prefetch(next + block * Format::NBYTES + i, 0, 2);
        }
#pragma GCC unroll 8
        for (int piece = 0; piece < Format::WEIGHTS / PIECE; ++piece) {
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r)
                formats[r].piece(p.matrix, rows[r], block, piece);
#pragma GCC unroll 8
            for (int j = 0; j < PIECE / LANES; ++j) {
                int64_t column = block * Format::WEIGHTS + piece * PIECE + j * LANES;
                Floats weights[ROWS];
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r)
                    weights[r] = formats[r].at(piece, j);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; ++t) {
                    Floats inputs = load<Floats>(x[t] + column);
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; ++r)
                        own[r][t] = fused(weights[r], inputs, own[r][t]);
                }
            }
            if (Format::WEIGHTS > STRETCH && (piece + 1) * PIECE % STRETCH == 0)
                flush(own, sums);
        }
    }
    flush(own, sums);
}

template <class Format, int TOKENS>
void multiply_rows(const Product &p, int64_t start, int64_t end) {
    constexpr int ROWS = rows_at_once<TOKENS>();
    int64_t blocks = p.matrix.width / Format::WEIGHTS;
    int64_t step = STRETCH > Format::WEIGHTS ? STRETCH / Format::WEIGHTS : 1;
    for (int64_t row = start; row < end; row += ROWS) {
        int64_t rows[ROWS];
        for (int r = 0; r < ROWS; ++r)
            rows[r] = row + r < end ? row + r : end - 1; // the last one again, where there are fewer
        Format formats[ROWS];
        Floats sums[ROWS][TOKENS] = {}, all[ROWS][TOKENS] = {};
        for (int64_t first = 0, next = TERMS * step; first < blocks; first += step) {
            if (first == next)
                flush(sums, all), next += TERMS * step;
            int64_t last = first + step < blocks ? first + step : blocks;
            add_blocks(p, formats, rows, first, last, sums);
        }
        flush(sums, all);
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < TOKENS && t < p.tokens; ++t)
                p.y[t * p.y_stride + rows[r]] = sum(all[r][t]);
    }
}

typedef void (*Rows)(const Product &, int64_t, int64_t);

template <class Format> Rows rows_of(int64_t tokens) {
    if (tokens == 1)
        return multiply_rows<Format, 1>;
    if (tokens == 2)
        return multiply_rows<Format, 2>;
    return tokens <= 4 ? multiply_rows<Format, 4> : multiply_rows<Format, 8>;
}

struct Entry { // in the order of library.py
    Rows (*rows)(int64_t);
    bool paired;
};

template <class Format> constexpr Entry entry() { return {rows_of<Format>, Format::PAIRED}; }

const Entry FORMATS[] = {
    entry<Q4_0>(), entry<Q4_1>(), entry<Q5_0>(), entry<Q5_1>(), entry<Q8_0>(), entry<Q4_K>(),
    entry<Q5_K>(), entry<Q6_K>(), entry<CT4>(), entry<CT8>(), entry<BF16>(), entry<F16>(),
};

// A product whose rows are dealt out.
struct Dealt {
    const Product &all;
    Rows (*const rows_of)(int64_t);
    static void piece(const void *given, int64_t start, int64_t end) {
        const Dealt &own = *(const Dealt *)given;
        const Product &all = own.all;
        for (int64_t token = 0; token < all.tokens; token += TOGETHER) {
            int64_t left = all.tokens - token, count = left < TOGETHER ? left : TOGETHER;
            Product few = {all.matrix, all.x + token * all.matrix.width,
                           all.y + token * all.y_stride, all.y_stride, count};
            own.rows_of(count)(few, start, end);
        }
    }
};

int64_t row_nbytes(const Matrix &m) { return m.codes_stride > 0 ? m.codes_stride : m.width; }

} // namespace

extern "C" {

int64_t host_matrix_nbytes() { return sizeof(Matrix); }

int host_lanes() { return LANES; }

// y = x times the transposed matrix: y (tokens, y_stride), x (tokens, width), float32, at least one
// token. 0: done; 1: no memory.
int host_multiply(const Matrix *matrix, const float *x, float *y, int64_t y_stride, int64_t tokens,
                  int threads) try {
    const Entry &entry = FORMATS[matrix->format];
    std::vector<float> ordered;
    if (entry.paired) {
        ordered.resize(tokens * matrix->width);
        for (int64_t at = 0; at < tokens * matrix->width; at += PIECE)
            for (int i = 0; i < PIECE; ++i)
                ordered[at + i % 2 * (PIECE / 2) + i / 2] = x[at + i];
        x = ordered.data();
    }
    Product product = {*matrix, x, y, y_stride, tokens};
    int64_t times = (tokens + TOGETHER - 1) / TOGETHER;
    int64_t most = matrix->rows * row_nbytes(*matrix) * times / WORTH_A_THREAD;
    int helpers = (int)(most < threads ? most : threads) - 1;
    int64_t step = FEW_ROWS;
    while (helpers > 0 && step > 4 && matrix->rows < 4 * step * (helpers + 1))
        step /= 2;
    Dealt dealt = {product, entry.rows};
    Task task = {Dealt::piece, &dealt, matrix->rows, step};
    share_out(task, helpers);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}
