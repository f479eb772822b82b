/* The inner loops of winograd.c, included once per instruction set.
 *
 * Before including: TARGET (the functions' attribute), WIDTH (floats of a vector), NAME(n). */

typedef float NAME(vector) __attribute__((vector_size(4 * WIDTH)));
#define VECTOR NAME(vector)
#define PANEL (2 * WIDTH)

INLINE TARGET VECTOR NAME(load)(const float *from)
{
    VECTOR v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE TARGET void NAME(store)(float *to, VECTOR v) { memcpy(to, &v, sizeof v); }

/* WIDTH numbers of a row of weights in float32 or float16. */
INLINE TARGET VECTOR NAME(fetch)(const char *from, int half)
{
    if (!half) return NAME(load)((const float *)from);
#if WIDTH == 16
    return (VECTOR)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif WIDTH == 8
    return (VECTOR)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    uint16_t bits[WIDTH];
    float wide[WIDTH];
    memcpy(bits, from, sizeof bits);
    for (int k = 0; k < WIDTH; k++) wide[k] = sl_from_half(bits[k]);
    return NAME(load)(wide);
#endif
}

/* WIDTH rows become columns. */
INLINE TARGET void NAME(turn)(VECTOR v[WIDTH])
{
#if defined(__GNUC__) && !defined(__clang__)
    typedef int32_t mask __attribute__((vector_size(4 * WIDTH)));
#pragma GCC unroll 4
    for (int step = 1; step < WIDTH; step *= 2) {
        mask low, high;
        for (int k = 0; k < WIDTH; k++) {
            low[k] = k & step ? k - step + WIDTH : k;
            high[k] = k & step ? k + WIDTH : k + step;
        }
#pragma GCC unroll 16
        for (int k = 0; k < WIDTH; k++) {
            if (k & step) continue;
            const VECTOR a = v[k], b = v[k + step];
            v[k] = __builtin_shuffle(a, b, low);
            v[k + step] = __builtin_shuffle(a, b, high);
        }
    }
#else
    float all[WIDTH][WIDTH], turned[WIDTH];
    for (int k = 0; k < WIDTH; k++) NAME(store)(all[k], v[k]);
    for (int k = 0; k < WIDTH; k++) {
        for (int j = 0; j < WIDTH; j++) turned[j] = all[j][k];
        v[k] = NAME(load)(turned);
    }
#endif
}

/* G g in one direction. */
INLINE TARGET void NAME(filter_of)(const VECTOR g[3], VECTOR v[6], int twice)
{
    const float a = twice ? 1.0f : 2.0f / 3.0f, b = twice ? 0.625f : 1.5f;
    const float na = 1.0f / (2 * a * a * (a * a - b * b)), nb = 1.0f / (2 * b * b * (b * b - a * a));
    const VECTOR even_a = na * g[0] + (na * a * a) * g[2], odd_a = (na * a) * g[1];
    const VECTOR even_b = nb * g[0] + (nb * b * b) * g[2], odd_b = (nb * b) * g[1];
    v[0] = (1.0f / (a * a * b * b)) * g[0];
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = g[2];
}

/* G g G' of 16 input channels and PANEL outputs, read from weights (outputs, inputs, 3, 3): to
 * (places, 16, PANEL), places `step` floats apart. */
INLINE TARGET void NAME(filters_as)(const Conv *conv, long first, long from, float *restrict to,
                                    long step, const int half, const int twice)
{
    const long size = half ? 2 : 4, row = conv->inputs * 9 * size;
    const long high = sl_least(PANEL, conv->outputs - first);
    const long wide = sl_chunk_fill(conv->inputs, from) * 9 * size;
    const char *weight = (const char *)conv->packed + first * row + from * 9 * size;
    char edge[WIDTH][CHUNK * 9 * 4];
    float turned[CHUNK * 9][PANEL] __attribute__((aligned(64)));
    for (long o = 0; o < PANEL; o += WIDTH) {
        const int whole = o + WIDTH <= high && wide == CHUNK * 9 * size;
        const char *source = whole ? weight + o * row : edge[0];
        const long away = whole ? row : (long)sizeof edge[0];
        if (!whole) {
            memset(edge, 0, sizeof edge);
            for (long k = 0; k < WIDTH && o + k < high; k++)
                memcpy(edge[k], weight + (o + k) * row, (size_t)wide);
        }
        for (long c = 0; c < CHUNK * 9; c += WIDTH) {
            VECTOR v[WIDTH];
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++) {
                v[k] = NAME(fetch)(source + k * away + c * size, half);
                if (whole) __builtin_prefetch(source + k * away + (c + CHUNK * 9) * size);
            }
            NAME(turn)(v);
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++) NAME(store)(turned[c + k] + o, v[k]);
        }
    }
    for (int j = 0; j < CHUNK; j++) {
        for (int part = 0; part < PANEL; part += WIDTH) {
            VECTOR mid[6][3];
#pragma GCC unroll 3
            for (int c = 0; c < 3; c++) {
                VECTOR g[3], v[6];
#pragma GCC unroll 3
                for (int r = 0; r < 3; r++) g[r] = NAME(load)(turned[9 * j + 3 * r + c] + part);
                NAME(filter_of)(g, v, twice);
#pragma GCC unroll 6
                for (int p = 0; p < 6; p++) mid[p][c] = v[p];
            }
            float *out = to + j * PANEL + part;
#pragma GCC unroll 6
            for (int p = 0; p < 6; p++) {
                if (twice && p == 2) continue;
                VECTOR v[6];
                NAME(filter_of)(mid[p], v, twice);
#pragma GCC unroll 6
                for (int q = 0; q < 6; q++) {
                    if (twice && q == 2) continue;
                    NAME(store)(out, v[q]);
                    out += step;
                }
            }
        }
    }
}

TARGET static void NAME(filters)(const Conv *conv, long first, long from, float *to, long step)
{
    if (conv->kind == HALF && conv->twice)
        NAME(filters_as)(conv, first, from, to, step, 1, 1);
    else if (conv->kind == HALF)
        NAME(filters_as)(conv, first, from, to, step, 1, 0);
    else if (conv->twice)
        NAME(filters_as)(conv, first, from, to, step, 0, 1);
    else
        NAME(filters_as)(conv, first, from, to, step, 0, 0);
}

/* The input of a run of tiles, 16 channels, into `strip` (6, SPAN, 16): normalised and through
 * SiLU where asked, and zero beyond the borders and the last channel. */
TARGET static void NAME(read)(const Conv *conv, Run run, long chunk, float *restrict strip)
{
    const long channels = conv->inputs, from = chunk * CHUNK, shift = conv->twice;
    const long high = conv->height >> shift, wide = conv->width >> shift;
    const long count = sl_chunk_fill(channels, from), span = 4 * run.tiles + 2;
    float scale[CHUNK] = {0.0f}, offset[CHUNK] = {0.0f};
    if (conv->affine) {
        const float *own = conv->affine + run.row * 2 * channels + from;
        memcpy(scale, own, (size_t)count * sizeof *scale);
        memcpy(offset, own + channels, (size_t)count * sizeof *offset);
    }
    for (long i = 0; i < 6; i++) {
        const long row = (4 * run.top - 1 + i) >> shift;
        float *to = strip + i * SPAN * CHUNK;
        if (row < 0 || row >= high) {
            memset(to, 0, (size_t)(span * CHUNK) * sizeof *to);
            continue;
        }
        const float *x = conv->x + (run.row * high + row) * wide * channels + from;
        for (long j = 0; j < span; j++, to += CHUNK) {
            const long column = (4 * run.left - 1 + j) >> shift;
            if (column < 0 || column >= wide) {
                memset(to, 0, CHUNK * sizeof *to);
            } else if (count == CHUNK) {
                __builtin_prefetch(x + column * channels + CHUNK); /* the next chunk's */
                memcpy(to, x + column * channels, CHUNK * sizeof *to);
            } else {
                memset(to, 0, CHUNK * sizeof *to);
                memcpy(to, x + column * channels, (size_t)count * sizeof *to);
            }
            if (!conv->affine || column < 0 || column >= wide) continue;
            if (conv->silu) {
                for (int c = 0; c < CHUNK; c++) {
                    const float u = to[c] * scale[c] + offset[c];
                    to[c] = u * sl_sigmoid(u);
                }
            } else {
                for (int c = 0; c < CHUNK; c++) to[c] = to[c] * scale[c] + offset[c];
            }
        }
    }
}

/* B' d in one direction: d and out have steps of their own. Every other row is the same sum with
 * the odd terms' sign turned. */
INLINE TARGET void NAME(into)(const VECTOR d[6], VECTOR v[6], int twice)
{
    const float a = twice ? 1.0f : 2.0f / 3.0f, b = twice ? 0.625f : 1.5f;
    const VECTOR even_a = d[4] - b * b * d[2], odd_a = d[3] - b * b * d[1];
    const VECTOR even_b = d[4] - a * a * d[2], odd_b = d[3] - a * a * d[1];
    v[0] = a * a * b * b * d[0] - (a * a + b * b) * d[2] + d[4];
    v[1] = even_a + a * odd_a;
    v[2] = even_a - a * odd_a;
    v[3] = even_b + b * odd_b;
    v[4] = even_b - b * odd_b;
    v[5] = a * a * b * b * d[1] - (a * a + b * b) * d[3] + d[5];
}

INLINE TARGET void NAME(spread_as)(const float *restrict strip, float *restrict to, long step,
                                   const int twice)
{
    for (int part = 0; part < CHUNK; part += WIDTH) {
        VECTOR half[6][6];
#pragma GCC unroll 6
        for (int j = 0; j < 6; j++) {
            VECTOR d[6], v[6];
#pragma GCC unroll 6
            for (int i = 0; i < 6; i++) d[i] = NAME(load)(strip + (i * SPAN + j) * CHUNK + part);
            NAME(into)(d, v, twice);
#pragma GCC unroll 6
            for (int i = 0; i < 6; i++) half[i][j] = v[i];
        }
        float *out = to + part;
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) {
            if (twice && i == 2) continue;
            VECTOR v[6];
            NAME(into)(half[i], v, twice);
#pragma GCC unroll 6
            for (int j = 0; j < 6; j++) {
                if (twice && j == 2) continue;
                NAME(store)(out, v[j]);
                out += step;
            }
        }
    }
}

/* B' d B of the run's tile `at`: place after place at `to`, `step` floats apart. */
TARGET static void NAME(spread)(const float *restrict strip, long at, int twice,
                                float *restrict to, long step)
{
    strip += 4 * at * CHUNK;
    if (twice)
        NAME(spread_as)(strip, to, step, 1);
    else
        NAME(spread_as)(strip, to, step, 0);
}

/* c = a b, or c += a b: a (depth / 16, tiles, 16), b (depth, PANEL), c (tiles, PANEL). All sums
 * are in registers; each is added up in the order of the channels, whatever `tiles` is.
 *
 * Memory is slower than this loop, so it asks early: for `a` two chunks ahead, and at `ahead`, one
 * line of weights every `period` steps, for what the products after this one will read. */
INLINE TARGET void NAME(multiply_as)(const int tiles, const float *restrict a,
                                     const float *restrict b, float *restrict c, long depth,
                                     int more, const float *ahead, long period)
{
    long wait = period;
    VECTOR sum[ROWS][2];
#pragma GCC unroll 14
    for (int t = 0; t < tiles; t++) sum[t][0] = sum[t][1] = (VECTOR){0.0f};
    for (long i = 0; i < depth; i += CHUNK, a += CHUNK * tiles) {
        for (int j = 0; j < CHUNK; j++, b += PANEL) {
            if (j < tiles) __builtin_prefetch(a + CHUNK * (2 * tiles + j));
            if (--wait == 0) {
                for (int w = 0; w < PANEL; w += CHUNK) __builtin_prefetch(ahead + w, 0, 2);
                ahead += PANEL;
                wait = period;
            }
            const VECTOR left = NAME(load)(b), right = NAME(load)(b + WIDTH);
#pragma GCC unroll 14
            for (int t = 0; t < tiles; t++) {
                const float each = a[t * CHUNK + j];
                sum[t][0] += each * left;
                sum[t][1] += each * right;
            }
        }
    }
#pragma GCC unroll 14
    for (int t = 0; t < tiles; t++, c += PANEL) {
        NAME(store)(c, more ? NAME(load)(c) + sum[t][0] : sum[t][0]);
        NAME(store)(c + WIDTH, more ? NAME(load)(c + WIDTH) + sum[t][1] : sum[t][1]);
    }
}

TARGET static void NAME(multiply)(long tiles, const float *a, const float *b, float *c, long depth,
                                  int more, const float *ahead, long period)
{
    switch (tiles) {
#define CASE(n) case n: NAME(multiply_as)(n, a, b, c, depth, more, ahead, period); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#undef CASE
    }
}

/* A' m in one direction. */
INLINE TARGET void NAME(out_of)(const VECTOR m[6], VECTOR y[4], int twice)
{
    const float a = twice ? 1.0f : 2.0f / 3.0f, b = twice ? 0.625f : 1.5f;
    const VECTOR even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const VECTOR even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = a * odd_a + b * odd_b;
    y[2] = a * a * even_a + b * b * even_b;
    y[3] = a * a * a * odd_a + b * b * b * odd_b + m[5];
}

INLINE TARGET void NAME(gather)(const float *restrict from, long step, VECTOR y[4][4],
                                const int twice)
{
    VECTOR half[4][6];
    long place = 0;
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
        VECTOR m[6], part[4];
#pragma GCC unroll 6
        for (int j = 0; j < 6; j++) {
            const int none = twice && (i == 2 || j == 2);
            m[j] = none ? (VECTOR){0.0f} : NAME(load)(from + step * place);
            place += !none;
        }
        NAME(out_of)(m, part, twice);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) half[j][i] = part[j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        VECTOR part[4];
        NAME(out_of)(half[j], part, twice);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) y[i][j] = part[i];
    }
}

/* The lines that a tile's outputs go to, and those of what is added to them. */
INLINE TARGET void NAME(announce)(const Conv *conv, Run run, long k, long from)
{
    const long left = 4 * (run.left + k), top = 4 * run.top, channels = conv->outputs;
    if (top + 4 > conv->height || left + 4 > conv->width || from + PANEL > channels) return;
    const long at = ((run.row * conv->height + top) * conv->width + left) * channels + from;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const long place = at + (i * conv->width + j) * channels;
#pragma GCC unroll 4
            for (int w = 0; w < PANEL; w += CHUNK) {
                __builtin_prefetch(conv->y + place + w, 1);
                if (conv->other) __builtin_prefetch(conv->other + place + w);
            }
        }
    }
}

/* A tile's outputs where they are, a vector of channels from `channel` on, borders kept. */
INLINE TARGET void NAME(put)(const Conv *conv, Run run, long k, long channel, VECTOR y[4][4],
                             VECTOR bias)
{
    const long top = 4 * run.top, left = 4 * (run.left + k), rest = conv->outputs - channel;
    const long down = conv->width * conv->outputs, right = conv->outputs;
    const long at = (run.row * conv->height + top) * down + left * right + channel;
    const long high = sl_least(4, conv->height - top), wide = sl_least(4, conv->width - left);
    float *to = conv->y + at;
    const float *other = conv->other ? conv->other + at : 0;
    if (high == 4 && wide == 4 && rest >= WIDTH) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const long away = i / 4 * down + i % 4 * right;
            const VECTOR v = y[i / 4][i % 4] + bias;
            NAME(store)(to + away, other ? v + NAME(load)(other + away) : v);
        }
        return;
    }
    float cells[16][WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) NAME(store)(cells[i], y[i / 4][i % 4] + bias);
    for (long i = 0; i < high; i++) {
        for (long j = 0; j < wide; j++) {
            const long away = i * down + j * right;
            for (long c = 0; c < WIDTH && c < rest; c++)
                to[away + c] = cells[4 * i + j][c] + (other ? other[away + c] : 0.0f);
        }
    }
}

/* Outputs of a run of tiles for one panel of channels from `from` on. */
TARGET static void NAME(write)(const Conv *conv, Run run, const float *restrict products,
                               long step, long from)
{
    float bias[PANEL] = {0.0f};
    const long rest = sl_least(PANEL, conv->outputs - from);
    if (conv->bias)
        memcpy(bias, conv->bias + run.row * conv->bias_step + from, (size_t)rest * sizeof *bias);
    for (long k = 0; k < run.tiles; k++, products += PANEL) {
        if (k + 1 < run.tiles) NAME(announce)(conv, run, k + 1, from);
        for (long part = 0; part < rest; part += WIDTH) {
            VECTOR y[4][4];
            if (conv->twice)
                NAME(gather)(products + part, step, y, 1);
            else
                NAME(gather)(products + part, step, y, 0);
            NAME(put)(conv, run, k, from + part, y, NAME(load)(bias + part));
        }
    }
}

static const Kernels NAME(kernels) = {PANEL, NAME(read), NAME(filters), NAME(spread), NAME(multiply),
                                      NAME(write)};

#undef VECTOR
#undef PANEL
