/* 3x3 convolutions of stride 1 in float32 with a quarter of the multiplications.
 *
 * Winograd's F(4x4, 3x3), after Lavin and Gray 2016 (arXiv:1509.09308). A tile of 4x4 outputs Y
 * needs 6x6 inputs d, and with a filter g (their equation 8)
 *
 *     Y = A' [ (G g G') . (B' d B) ] A
 *
 * where the product in the brackets is element by element: 36 multiplications for 144. Summed over
 * input channels (equations 9 to 12), each of the 36 places is a matrix product of its own,
 * (tiles x inputs) (inputs x outputs), and that is where the time goes.
 *
 * The transforms interpolate a polynomial at 0, a, -a, b, -b and infinity. Lavin and Gray take
 * a = 1, b = 2. Error grows with how unevenly the powers of the points are sized, so we take
 * 2/3 and 3/2: less than half of the error (on the choice of points see Barabasz et al. 2018,
 * arXiv:1803.10986).
 *
 *          [ aabb     0  -(aa+bb)      0  1  0 ]        [ 1   1     1    1     1   0 ]
 *          [   0   -abb     -bb        a  1  0 ]   A' = [ 0   a    -a    b    -b   0 ]
 *     B' = [   0    abb     -bb       -a  1  0 ]        [ 0  aa    aa   bb    bb   0 ]
 *          [   0   -aab     -aa        b  1  0 ]        [ 0  aaa -aaa  bbb  -bbb   1 ]
 *          [   0    aab     -aa       -b  1  0 ]
 *          [   0   aabb       0  -(aa+bb)  0  1 ]   G: row of point p is (1, p, pp) / N(p),
 *                                                  N(p) the product of p's distances to the others
 *
 * Nearest 2x in front of the convolution costs nothing: the input is read twice over. It doubles
 * every value, that is, it multiplies by 1 + x, which is zero at the point -1. With a = 1 there
 * (b = 5/8), one row and one column of every tile vanish: 25 products remain of the 36.
 *
 * What surrounds a convolution is done where its numbers are in registers anyway: the affine half
 * of a GroupNorm and SiLU where the input is read, bias, time embedding and residual where the
 * output is written.
 *
 * A tile's numbers are computed by the same operations in the same order whatever the batch, the
 * threads and the blocks: equal pictures are equal bits in any company. */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "simd.h"

enum {
    CHUNK = 16,        /* channels that a transform takes at a time */
    RUN = 16,          /* neighbouring tiles whose input is read together */
    SPAN = 4 * RUN + 2,
    ROWS = 14,         /* most tiles of one product */
    DEPTH = 320,       /* most input channels of one product; the next one's are added to it */
    WIDE = 96,         /* output channels of one job, about */
    SHARE = 1 << 18,   /* floats of one job's products, which stay in a core's own cache */
    BLOCK = 1 << 18,   /* floats of transformed input at a time and thread, */
    GROUPS = 8,        /* but at least so many groups of tiles: each reads all weights once */
    PIECE = 4,         /* chunks of input channels whose weights are transformed at a time, */
    SLIM = 64,         /* for so many output channels: in a core's own cache too */
};

enum { PACKED, PLAIN, HALF }; /* weights: transformed before; as they are; so, in float16 */

typedef struct {
    const float *x;
    const void *packed; /* the weights, of whatever kind */
    const float *affine, *bias, *other;
    float *y;
    long rows, height, width, inputs, outputs; /* of the result */
    long bias_step;                            /* 0: one bias for all rows */
    int silu, twice, kind;
} Conv;

/* Neighbouring tiles of one row of tiles. */
typedef struct {
    long row, top, left, tiles; /* picture, in tiles, in tiles, how many */
} Run;

typedef struct {
    long panel; /* output channels of one product */
    void (*read)(const Conv *conv, Run run, long chunk, float *strip);
    void (*filters)(const Conv *conv, long first, long from, float *to, long step);
    void (*spread)(const float *strip, long at, int twice, float *to, long step);
    void (*multiply)(long tiles, const float *a, const float *b, float *c, long depth, int more,
                     const float *ahead, long period);
    void (*write)(const Conv *conv, Run run, const float *products, long step, long from);
} Kernels;

static inline long sl_up(long n, long unit) { return (n + unit - 1) / unit; }
static inline long sl_least(long a, long b) { return a < b ? a : b; }

/* Channels of the chunk that begins at `from`. */
static inline long sl_chunk_fill(long channels, long from)
{
    return sl_least(CHUNK, channels - from);
}

#if defined(__x86_64__) && defined(__GNUC__)
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma")))
#define WIDTH 16
#define NAME(n) n##_avx512
#include "winograd.h"
#undef TARGET
#undef WIDTH
#undef NAME
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDTH 8
#define NAME(n) n##_avx2
#include "winograd.h"
#undef TARGET
#undef WIDTH
#undef NAME
#endif
#define TARGET
#define WIDTH 4
#define NAME(n) n##_portable
#include "winograd.h"

/* What this processor does best: 2 AVX-512, 1 AVX2, 0 neither. */
int sl_winograd_level(void)
{
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

static const Kernels *sl_kernels(int level)
{
#if defined(__x86_64__) && defined(__GNUC__)
    if (level == 2) return &kernels_avx512;
    if (level == 1) return &kernels_avx2;
#endif
    (void)level;
    return &kernels_portable;
}

/* -- weights ---------------------------------------------------------------------------------- */

/* Floats of a convolution's transformed weights. */
long sl_winograd_packed(long inputs, long outputs, int twice, int level)
{
    const long panel = sl_kernels(level)->panel;
    return (twice ? 25 : 36) * sl_up(inputs, CHUNK) * CHUNK * sl_up(outputs, panel) * panel;
}

/* The rows of G for the six points, the vanishing one left out where there is one. */
static int sl_filter_rows(int twice, double rows[6][3])
{
    const double a = twice ? 1.0 : 2.0 / 3.0, b = twice ? 0.625 : 1.5;
    const double points[5] = {0.0, a, -a, b, -b};
    int count = 0;
    for (int p = 0; p < 6; p++) {
        if (twice && p == 2) continue;
        double scale = 1.0;
        for (int q = 0; q < 5 && p < 5; q++) scale *= p == q ? 1.0 : points[p] - points[q];
        rows[count][0] = p == 5 ? 0.0 : 1.0 / scale;
        rows[count][1] = p == 5 ? 0.0 : points[p] / scale;
        rows[count][2] = p == 5 ? 1.0 : points[p] * points[p] / scale;
        count++;
    }
    return count;
}

enum { LANES = 32 }; /* of the widest panel */

/* G g G' for the filters of one input channel, `panel` of them, in float64. */
CLONES static void sl_filters(const double (*restrict g)[LANES], const double (*restrict rows)[3],
                              int side, long panel, float (*restrict out)[LANES])
{
    double half[6][3][LANES];
    for (int p = 0; p < side; p++)
        for (int c = 0; c < 3; c++)
            for (long j = 0; j < panel; j++)
                half[p][c][j] = rows[p][0] * g[c][j] + rows[p][1] * g[3 + c][j] +
                                rows[p][2] * g[6 + c][j];
    for (int p = 0; p < side; p++)
        for (int q = 0; q < side; q++)
            for (long j = 0; j < panel; j++)
                out[p * side + q][j] =
                    (float)(half[p][0][j] * rows[q][0] + half[p][1][j] * rows[q][1] +
                            half[p][2][j] * rows[q][2]);
}

/* weight (outputs, inputs, 3, 3) to packed (places, panels, inputs, panel), zeros where channels
 * fill neither a chunk nor a panel. */
void sl_winograd_pack(const float *weight, float *packed, long inputs, long outputs, int twice,
                      int level, int threads)
{
    const long panel = sl_kernels(level)->panel, deep = sl_up(inputs, CHUNK) * CHUNK;
    const long panels = sl_up(outputs, panel), place = panels * deep * panel;
    double rows[6][3];
    const int side = sl_filter_rows(twice, rows);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    /* Weights are walked from end to end: large pages, where they can be had. Advice, no more. */
    const uintptr_t from = ((uintptr_t)packed + 4095) & ~(uintptr_t)4095;
    const uintptr_t to = (uintptr_t)(packed + side * side * place) & ~(uintptr_t)4095;
    if (to > from + (4 << 20)) (void)madvise((void *)from, to - from, MADV_HUGEPAGE);
#endif
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long job = 0; job < panels * deep; job++) {
        const long first = job / deep * panel, i = job % deep;
        double g[9][LANES] = {{0.0}};
        float out[36][LANES];
        for (long j = 0; j < panel && first + j < outputs && i < inputs; j++)
            for (int c = 0; c < 9; c++) g[c][j] = weight[((first + j) * inputs + i) * 9 + c];
        sl_filters((const double (*)[LANES])g, (const double (*)[3])rows, side, panel, out);
        for (int p = 0; p < side * side; p++)
            memcpy(packed + p * place + job * panel, out[p], (size_t)panel * sizeof(float));
    }
}

/* -- blocks ----------------------------------------------------------------------------------- */

/* How a convolution is cut. Transformed input is laid out (group, place, chunk, tile, channel):
 * one group's part of one place is what one product reads, in order. */
typedef struct {
    long across, down, tiles; /* tiles: of all pictures */
    long size;                /* tiles of a group */
    long block, share;        /* groups of transformed input at a time; groups of a job */
    long panels, wide;        /* panels in all, and of a job */
    long chunks, places;
    long group, step;         /* floats of a group's input; of one place of a job's products */
} Cut;

static Cut sl_cut(const Conv *conv, const Kernels *kernels, int threads)
{
    Cut cut = {.across = sl_up(conv->width, 4), .down = sl_up(conv->height, 4)};
    cut.tiles = conv->rows * cut.across * cut.down;
    cut.chunks = sl_up(conv->inputs, CHUNK);
    cut.places = conv->twice ? 25 : 36;
    cut.panels = sl_up(conv->outputs, kernels->panel);
    /* A product over `size` tiles costs about size + 1. */
    double least = 1e300;
    for (long size = sl_least(ROWS, cut.tiles); size > 0; size--) {
        const double cost = (double)sl_up(cut.tiles, size) * ((double)size + 1.0);
        if (cost < least) {
            least = cost;
            cut.size = size;
        }
    }
    cut.group = cut.places * cut.chunks * cut.size * CHUNK;
    const long groups = sl_up(cut.tiles, cut.size);
    cut.block = BLOCK * threads / cut.group < GROUPS ? GROUPS : BLOCK * threads / cut.group;
    cut.block = sl_up(groups, sl_up(groups, sl_least(cut.block, groups)));
    /* About as many tiles as outputs: the fewest reads of both. Then enough jobs for all. */
    cut.wide = sl_least(cut.panels, sl_up(conv->kind ? SLIM : WIDE, kernels->panel));
    cut.share = SHARE / (cut.places * cut.size * cut.wide * kernels->panel);
    cut.share = cut.share < 1 ? 1 : sl_least(cut.share, cut.block);
    while (sl_up(cut.block, cut.share) * sl_up(cut.panels, cut.wide) < 2 * threads) {
        if (cut.wide > 1)
            cut.wide = sl_up(cut.wide, 2);
        else if (cut.share > 1)
            cut.share = sl_up(cut.share, 2);
        else
            break;
    }
    cut.wide = sl_up(cut.panels, sl_up(cut.panels, cut.wide));
    cut.share = sl_up(cut.block, sl_up(cut.block, cut.share));
    cut.step = cut.share * cut.size * kernels->panel + CHUNK; /* not a power of two */
    return cut;
}

static Run sl_run(const Cut *cut, long tile, long end)
{
    const long left = tile % cut->across, above = tile / cut->across;
    const long tiles = sl_least(sl_least(cut->across - left, RUN), end - tile);
    return (Run){above / cut->down, above % cut->down, left, tiles};
}

/* The input of tiles [from, to), transformed, one chunk of channels; `first` is the block's. */
static void sl_transform(const Conv *conv, const Kernels *kernels, const Cut *cut, long first,
                         long from, long to, long chunk, float *into)
{
    float strip[6 * SPAN * CHUNK] __attribute__((aligned(64)));
    for (long tile = from; tile < to;) {
        const Run run = sl_run(cut, tile, to);
        kernels->read(conv, run, chunk, strip);
        for (long k = 0; k < run.tiles; k++, tile++) {
            const long group = (tile - first) / cut->size, place = (tile - first) % cut->size;
            kernels->spread(strip, k, conv->twice,
                            into + group * cut->group + (chunk * cut->size + place) * CHUNK,
                            cut->chunks * cut->size * CHUNK);
        }
    }
}

/* Floats between the places of weights that are transformed where they are used. */
static long sl_weights_step(const Cut *cut, long panel)
{
    return cut->wide * PIECE * CHUNK * panel + CHUNK; /* not a power of two */
}

/* Products of groups [low, high) with panels [left, right). */
static void sl_products(const Conv *conv, const Kernels *kernels, const Cut *cut, long low,
                        long high, long left, long right, const float *input, float *products)
{
    const long panel = kernels->panel, deep = cut->chunks * CHUNK;
    const float *packed = conv->packed;
    const long groups = high - low, pieces = sl_up(deep, DEPTH);
    const long piece = sl_up(cut->chunks, pieces) * CHUNK; /* no shorter last one */
    for (long place = 0; place < cut->places; place++) {
        for (long from = 0; from < deep; from += piece) {
            const long depth = sl_least(piece, deep - from);
            /* The weights that come next are fetched meanwhile, each group a part of them. */
            const long next = from + depth < deep ? depth : cut->panels * deep - from;
            for (long group = 0; group < groups; group++) {
                const float *a = input + (low + group) * cut->group +
                                 (place * deep + from) * cut->size;
                for (long p = left; p < right; p++) {
                    const float *b = packed + ((place * cut->panels + p) * deep + from) * panel;
                    float *c = products + ((p - left) * cut->places + place) * cut->step +
                               group * cut->size * panel;
                    kernels->multiply(cut->size, a, b, c, depth, from > 0,
                                      b + (next + group * depth / groups) * panel, groups);
                }
            }
        }
    }
}

/* The same with weights that are transformed here, for these products alone: reading and
 * transforming them is less than reading them transformed, which is four times as much. */
static void sl_products_of_plain(const Conv *conv, const Kernels *kernels, const Cut *cut, long low,
                                 long high, long left, long right, const float *input,
                                 float *products, float *weights)
{
    const long panel = kernels->panel, deep = cut->chunks * CHUNK, step = sl_weights_step(cut, panel);
    const long pieces = sl_up(cut->chunks, PIECE), piece = sl_up(cut->chunks, pieces);
    for (long from = 0; from < cut->chunks; from += piece) {
        const long depth = sl_least(piece, cut->chunks - from);
        for (long p = left; p < right; p++)
            for (long k = 0; k < depth; k++)
                kernels->filters(conv, p * panel, (from + k) * CHUNK,
                                 weights + ((p - left) * piece + k) * CHUNK * panel, step);
        for (long place = 0; place < cut->places; place++) {
            for (long group = 0; group < high - low; group++) {
                const float *a = input + (low + group) * cut->group +
                                 (place * deep + from * CHUNK) * cut->size;
                for (long p = left; p < right; p++) {
                    const float *b = weights + place * step + (p - left) * piece * CHUNK * panel;
                    float *c = products + ((p - left) * cut->places + place) * cut->step +
                               group * cut->size * panel;
                    kernels->multiply(cut->size, a, b, c, depth * CHUNK, from > 0, b, 1L << 30);
                }
            }
        }
    }
}

/* What becomes of products: outputs, with what comes around them. */
static void sl_results(const Conv *conv, const Kernels *kernels, const Cut *cut, long first,
                       long low, long high, long left, long right, const float *products)
{
    const long panel = kernels->panel, start = first + low * cut->size;
    const long end = sl_least(first + high * cut->size, cut->tiles);
    for (long p = left; p < right; p++) {
        for (long tile = start; tile < end;) {
            const Run run = sl_run(cut, tile, end);
            kernels->write(conv, run,
                           products + (p - left) * cut->places * cut->step + (tile - start) * panel,
                           cut->step, p * panel);
            tile += run.tiles;
        }
    }
}

/* Floats of one thread's products. */
static long sl_products_size(const Cut *cut) { return cut->wide * cut->places * cut->step; }

/* Floats of one thread's weights, where they are transformed here. */
static long sl_weights_size(const Conv *conv, const Cut *cut, long panel)
{
    return conv->kind ? cut->places * sl_weights_step(cut, panel) : 0;
}

/* Floats of scratch memory. */
long sl_winograd_work(long rows, long height, long width, long inputs, long outputs, int twice,
                      int kind, int level, int threads)
{
    const Conv conv = {.rows = rows, .height = height, .width = width, .inputs = inputs,
                       .outputs = outputs, .twice = twice, .kind = kind};
    const Kernels *kernels = sl_kernels(level);
    const Cut cut = sl_cut(&conv, kernels, threads);
    const long own = sl_products_size(&cut) + sl_weights_size(&conv, &cut, kernels->panel);
    return cut.block * cut.group + threads * own + CHUNK;
}

/* weights: packed by sl_winograd_pack(), or (outputs, inputs, 3, 3) in float32 or float16, as `kind`
 * says. x: (rows, height, width, inputs), half as high and wide where `twice`. y: (rows, height, width,
 * outputs). affine: (rows, 2, inputs), scale and shift of the input, or NULL; then SiLU where
 * `silu`. bias: (outputs), or (rows, outputs) where bias_step is outputs, or NULL. other: like y,
 * added, or NULL; may be y. work: sl_winograd_work() floats. */
void sl_winograd(const float *x, const void *weights, const float *affine, const float *bias,
                 const float *other, float *y, float *work, long rows, long height, long width,
                 long inputs, long outputs, long bias_step, int silu, int twice, int kind,
                 int level, int threads)
{
    const Conv conv = {x, weights, affine, bias, other, y, rows, height, width, inputs, outputs,
                       bias_step, silu, twice, kind};
    const Kernels *kernels = sl_kernels(level);
    const Cut cut = sl_cut(&conv, kernels, threads);
    float *input = (float *)(((uintptr_t)work + 63) & ~(uintptr_t)63);
    float *products = input + cut.block * cut.group;
    const long block = cut.block * cut.size, size = sl_products_size(&cut);
    const long both = size + sl_weights_size(&conv, &cut, kernels->panel);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        float *own = products + omp_get_thread_num() * both;
#else
        float *own = products;
#endif
        for (long first = 0; first < cut.tiles; first += block) {
            const long tiles = sl_least(block, cut.tiles - first);
            const long groups = sl_up(tiles, cut.size), parts = sl_up(tiles, RUN);
            const long shares = sl_up(groups, cut.share), sides = sl_up(cut.panels, cut.wide);
#pragma omp for schedule(static)
            for (long job = 0; job < parts * cut.chunks; job++) {
                const long part = job / cut.chunks, from = first + part * RUN;
                sl_transform(&conv, kernels, &cut, first, from,
                             sl_least(from + RUN, first + tiles), job % cut.chunks, input);
            }
#pragma omp for schedule(static)
            for (long job = 0; job < shares * sides; job++) {
                const long low = job / sides * cut.share, left = job % sides * cut.wide;
                const long high = sl_least(low + cut.share, groups);
                const long right = sl_least(left + cut.wide, cut.panels);
                if (kind == PACKED)
                    sl_products(&conv, kernels, &cut, low, high, left, right, input, own);
                else
                    sl_products_of_plain(&conv, kernels, &cut, low, high, left, right, input, own,
                                         own + size);
                sl_results(&conv, kernels, &cut, first, low, high, left, right, own);
            }
        }
    }
}
