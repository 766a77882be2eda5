// What a layer does to few tokens beside its products, on a processor: in float32, each in one go.
//
// Sums are taken in an order that depends on neither tokens nor threads.

#include <cmath>
#include <new>
#include <vector>

#include "threads.h"
#include "vectors.h"

using namespace host;

namespace {

inline Floats at(const float *from, int64_t i) { return load<Floats>(from + i); }

inline void put(float *to, int64_t i, Floats values) { std::memcpy(to + i, &values, sizeof values); }

// ------------------------------------------------------------------------------------- attention

struct Look { // as in tokens.py; strides in numbers
    const float *q;        // heads x tokens x width
    const uint8_t *memory; // places x 2 x groups x width: keys and values
    const int64_t *runs;   // (place, count) of the positions that are seen, in order
    float *mixed;          // tokens x heads x width
    int64_t q_head, q_token, heads, groups, width, tokens, positions, window, num_runs;
    int32_t kind; // of the memory's numbers: FLOAT32, FLOAT16, BFLOAT16
    float scale;
};

enum Kind : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

template <int KIND> inline Floats kept_at(const uint8_t *from, int64_t i) {
    if (KIND == FLOAT32)
        return load<Floats>(from + 4 * i);
    return KIND == FLOAT16 ? floats_of_halves_at(from + 2 * i) : brains_at(from + 2 * i);
}

constexpr int64_t CHUNK = 128; // positions that are looked at before what came of them is scaled
constexpr int MOST_WIDTH = 256;

// What has come of some positions for a query: the sum of e^(score - most) times values, and of
// these factors alone.
struct Part {
    float most, total;
};

struct Looking {
    const Look &look;
    int64_t chunks;
    float *sums; // chunks x heads x tokens x width
    Part *parts; // chunks x heads x tokens

    int64_t line(int64_t chunk, int64_t head, int64_t token) const {
        return (chunk * look.heads + head) * look.tokens + token;
    }
};

inline float largest(const float *scores, int64_t first, int64_t last) {
    float most = -INFINITY;
    for (int64_t i = first; i < last; ++i)
        most = scores[i] > most ? scores[i] : most;
    return most;
}

// Where each position of a chunk is: its keys of group 0.
template <int KIND>
void find_places(const Look &own, int64_t first, int64_t last, const uint8_t **places) {
    constexpr int64_t SIZE = KIND == FLOAT32 ? 4 : 2;
    int64_t position = 0, each = 2 * own.groups * own.width * SIZE;
    for (int64_t run = 0; run < own.num_runs && position < last; ++run) {
        int64_t place = own.runs[2 * run], count = own.runs[2 * run + 1];
        for (int64_t p = position < first ? first : position; p < position + count && p < last; ++p)
            places[p - first] = own.memory + (place + p - position) * each;
        position += count;
    }
}

template <int KIND> void look_at_chunk(const Looking &all, int64_t chunk, int64_t group) {
    constexpr int64_t SIZE = KIND == FLOAT32 ? 4 : 2;
    const Look &own = all.look;
    const int64_t width = own.width, first = chunk * CHUNK, share = own.heads / own.groups;
    const int64_t count = (own.positions < first + CHUNK ? own.positions : first + CHUNK) - first;
    const uint8_t *places[CHUNK];
    find_places<KIND>(own, first, first + count, places);
    const int64_t keys = group * width * SIZE, values = keys + own.groups * width * SIZE;
    alignas(64) float scores[CHUNK + LANES], wide[MOST_WIDTH];
    for (int64_t token = 0; token < own.tokens; ++token) {
        // It sees up to itself, and as far back as the window goes.
        int64_t end = own.positions - own.tokens + token + 1 - first;
        int64_t begin = own.window && end > own.window ? end - own.window : 0;
        end = end > count ? count : end;
        for (int64_t head = group * share; head < (group + 1) * share; ++head) {
            int64_t line = all.line(chunk, head, token);
            float *sums = all.sums + line * width;
            std::memset(sums, 0, width * sizeof(float));
            all.parts[line] = {-INFINITY, 0};
            if (begin >= end)
                continue;
            const float *q = own.q + head * own.q_head + token * own.q_token;
            for (int64_t i = begin; i < end; ++i) {
                Floats products = Floats{};
                for (int64_t j = 0; j < width; j += LANES)
                    products = fused(at(q, j), kept_at<KIND>(places[i] + keys, j), products);
                scores[i] = sum(products) * own.scale;
            }
            float most = largest(scores, begin, end), total = 0;
            for (int64_t i = begin; i < end; i += LANES)
                put(scores, i, exponential(at(scores, i) - most));
            for (int64_t i = begin; i < end; ++i)
                total += scores[i];
            std::memset(wide, 0, sizeof wide);
            for (int64_t i = begin; i < end; ++i)
                for (int64_t j = 0; j < width; j += LANES)
                    put(wide, j, fused(spread(scores[i]), kept_at<KIND>(places[i] + values, j),
                                       at(wide, j)));
            std::memcpy(sums, wide, width * sizeof(float));
            all.parts[line] = {most, total};
        }
    }
}

template <int KIND> void look_at_chunks(const void *given, int64_t start, int64_t end) {
    const Looking &all = *(const Looking *)given;
    for (int64_t i = start; i < end; ++i)
        look_at_chunk<KIND>(all, i / all.look.groups, i % all.look.groups);
}

// What has come of all chunks, as if the largest score had been known before.
void join(const Looking &all) {
    const Look &own = all.look;
    for (int64_t token = 0; token < own.tokens; ++token)
        for (int64_t head = 0; head < own.heads; ++head) {
            float most = -INFINITY, total = 0;
            for (int64_t chunk = 0; chunk < all.chunks; ++chunk) {
                float other = all.parts[all.line(chunk, head, token)].most;
                most = other > most ? other : most;
            }
            float *mixed = own.mixed + (token * own.heads + head) * own.width;
            std::memset(mixed, 0, own.width * sizeof(float));
            for (int64_t chunk = 0; chunk < all.chunks; ++chunk) {
                int64_t line = all.line(chunk, head, token);
                Part part = all.parts[line];
                float share = part.total == 0 ? 0 : std::exp(part.most - most);
                total += part.total * share;
                const float *sums = all.sums + line * own.width;
                for (int64_t j = 0; j < own.width; j += LANES)
                    put(mixed, j, fused(spread(share), at(sums, j), at(mixed, j)));
            }
            for (int64_t j = 0; j < own.width; j += LANES)
                put(mixed, j, at(mixed, j) / total);
        }
}

} // namespace

extern "C" {

int64_t host_look_nbytes() { return sizeof(Look); }

// 0: done; 1: no memory.
int host_look(const Look *look, int threads) try {
    const Look &own = *look;
    int64_t chunks = (own.positions + CHUNK - 1) / CHUNK, lines = chunks * own.heads * own.tokens;
    std::vector<float> sums(lines * own.width);
    std::vector<Part> parts(lines);
    Looking all = {own, chunks, sums.data(), parts.data()};
    int64_t nbytes = own.positions * own.heads * own.tokens * own.width * 8;
    int64_t most = nbytes / WORTH_A_THREAD, items = chunks * own.groups;
    most = most > items ? items : most;
    auto piece = own.kind == FLOAT32   ? look_at_chunks<FLOAT32>
                 : own.kind == FLOAT16 ? look_at_chunks<FLOAT16>
                                       : look_at_chunks<BFLOAT16>;
    Task task = {piece, &all, items, 1};
    share_out(task, (int)(most < threads ? most : threads) - 1);
    join(all);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

// Each of the rows, plus that of `added` if there is one (their sum goes to `total`), times the
// root of what makes the mean of its squares 1, times the weight: rows x width, a multiple of 16.
void host_norm(const float *x, const float *added, const float *weight, float *total, float *out,
               int64_t rows, int64_t width, float eps) {
    for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
        const float *from = x;
        if (added) {
            for (int64_t j = 0; j < width; j += LANES)
                put(total, j, at(x, j) + at(added, j));
            from = total, total += width, added += width;
        }
        Floats squares = Floats{};
        for (int64_t j = 0; j < width; j += LANES)
            squares = fused(at(from, j), at(from, j), squares);
        float scale = 1 / std::sqrt(sum(squares) / (float)width + eps);
        for (int64_t j = 0; j < width; j += LANES)
            put(out, j, at(from, j) * scale * at(weight, j));
    }
}

// The heads of tokens, turned by their angles: x heads x tokens x 2 half, at any strides but the
// last; cosines and sines tokens x half; out heads x tokens x 2 half. A pair is (i, i + half), or
// (2 i, 2 i + 1), and is given back as the former.
void host_rotate(const float *x, const float *cos, const float *sin, float *out, int64_t x_head,
                 int64_t x_token, int64_t heads, int64_t tokens, int64_t half, int interleaved) {
    int64_t next = interleaved ? 2 : 1, second = interleaved ? 1 : half;
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t token = 0; token < tokens; ++token, out += 2 * half) {
            const float *from = x + head * x_head + token * x_token;
            const float *c = cos + token * half, *s = sin + token * half;
            for (int64_t i = 0; i < half; ++i) {
                float a = from[next * i], b = from[next * i + second];
                out[i] = a * c[i] - b * s[i];
                out[half + i] = b * c[i] + a * s[i];
            }
        }
}

// gate = gate / (1 + e^-gate) * up; a multiple of 16 numbers.
void host_gate(float *gate, const float *up, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        Floats own = at(gate, i);
        put(gate, i, own / (1 + exponential(-own)) * at(up, i));
    }
}
}
