/* GroupNorm (Wu and He 2018, arXiv:1803.08494) fused with SiLU, forward and backward, for
 * channels-last activations in float32 and bfloat16. The arithmetic is float32, sums over a
 * group float64. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "simd.h"

/* Elements a loop body covers: a multiple of the channels, at least 256. */
static inline long sl_period(long channels) { return channels * ((255 + channels) / channels); }

/* Pieces a row is cut into, so that few rows still keep every thread busy. They hang on the row's
 * size alone: sums are then the same whatever the number of rows or threads. */
static inline long sl_parts(long cells, long channels)
{
    const long parts = cells * channels / 16384;
    return parts < 1 ? 1 : parts > 16 ? 16 : parts;
}

static inline long sl_stride(long channels, long period) { return 2 * channels + 4 * period; }

/* Floats of scratch memory that forward and backward need. */
long sl_norm_work(long rows, long cells, long channels)
{
    return rows * sl_parts(cells, channels) * sl_stride(channels, sl_period(channels));
}

static void sl_fold(const float *work, long channels, long period, float *sums)
{
    for (long c = 0; c < channels; c++) sums[c] = 0.0f;
    for (long i = 0; i < period; i += channels)
        for (long c = 0; c < channels; c++) sums[c] += work[i + c];
}

static void sl_affine(const float *statistics, const float *weight, const float *bias,
                      long channels, long groups, long period, float *scale, float *shift)
{
    const long share = channels / groups;
    for (long c = 0; c < channels; c++) {
        const float mean = statistics[c / share * 2], rstd = statistics[c / share * 2 + 1];
        scale[c] = rstd * weight[c];
        shift[c] = bias[c] - mean * scale[c];
    }
    for (long i = channels; i < period; i++) {
        scale[i] = scale[i - channels];
        shift[i] = shift[i - channels];
    }
}

#define ELEM float
#define LOAD(e) (e)
#define STORE(f) (f)
#define NAME(n) sl_f32_##n
#include "group_norm.h"
#undef ELEM
#undef LOAD
#undef STORE
#undef NAME

#define ELEM uint16_t
#define LOAD(e) sl_from_bf16(e)
#define STORE(f) sl_to_bf16(f)
#define NAME(n) sl_bf16_##n
#include "group_norm.h"
