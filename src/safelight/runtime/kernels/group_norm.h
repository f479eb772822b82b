/* GroupNorm and the SiLU behind it, over channels-last cells: included once per element type.
 *
 * Before including: ELEM (stored type), LOAD(e) and STORE(f) (to and from float), NAME(n).
 *
 * Sums are taken per channel first and gathered into groups afterwards, so that every pass walks
 * memory in order. Few channels would make short inner loops: per-channel numbers are therefore
 * laid out several times over ("a period") and a loop body covers several cells.
 */

/* Per-channel sums of x and x*x over cells [from, to): sums[0..C), sums[C..2C). */
CLONES static void NAME(moments)(const ELEM *restrict x, long from, long to, long channels,
                                 long period, float *restrict work, float *restrict sums)
{
    float *restrict one = work, *restrict two = work + period;
    for (long i = 0; i < period; i++) one[i] = two[i] = 0.0f;
    const long end = to * channels;
    for (long at = from * channels; at < end; at += period) {
        const long count = end - at < period ? end - at : period;
        for (long i = 0; i < count; i++) {
            const float v = LOAD(x[at + i]);
            one[i] += v;
            two[i] += v * v;
        }
    }
    sl_fold(one, channels, period, sums);
    sl_fold(two, channels, period, sums + channels);
}

/* y = f(x * scale + shift) over cells [from, to); f is SiLU or nothing. */
CLONES static void NAME(affine)(const ELEM *restrict x, ELEM *restrict y, long from, long to,
                                long channels, long period, const float *restrict scale,
                                const float *restrict shift, int silu)
{
    const long end = to * channels;
    for (long at = from * channels; at < end; at += period) {
        const long count = end - at < period ? end - at : period;
        if (silu) {
            for (long i = 0; i < count; i++) {
                const float u = LOAD(x[at + i]) * scale[i] + shift[i];
                y[at + i] = STORE(u * sl_sigmoid(u));
            }
        } else {
            for (long i = 0; i < count; i++) {
                y[at + i] = STORE(LOAD(x[at + i]) * scale[i] + shift[i]);
            }
        }
    }
}

/* Per-channel sums of du and du*x, where du = dy * f'(x * scale + shift). */
CLONES static void NAME(slopes)(const ELEM *restrict x, const ELEM *restrict dy, long from, long to,
                                long channels, long period, const float *restrict scale,
                                const float *restrict shift, int silu, float *restrict work,
                                float *restrict sums)
{
    float *restrict one = work, *restrict two = work + period;
    for (long i = 0; i < period; i++) one[i] = two[i] = 0.0f;
    const long end = to * channels;
    for (long at = from * channels; at < end; at += period) {
        const long count = end - at < period ? end - at : period;
        if (silu) {
            for (long i = 0; i < count; i++) {
                const float v = LOAD(x[at + i]);
                const float du = LOAD(dy[at + i]) * sl_silu_slope(v * scale[i] + shift[i]);
                one[i] += du;
                two[i] += du * v;
            }
        } else {
            for (long i = 0; i < count; i++) {
                const float v = LOAD(x[at + i]), du = LOAD(dy[at + i]);
                one[i] += du;
                two[i] += du * v;
            }
        }
    }
    sl_fold(one, channels, period, sums);
    sl_fold(two, channels, period, sums + channels);
}

/* dx = du * scale + x * along + constant, all three per channel. */
CLONES static void NAME(descend)(const ELEM *restrict x, const ELEM *restrict dy,
                                 ELEM *restrict dx, long from, long to, long channels, long period,
                                 const float *restrict scale, const float *restrict shift,
                                 const float *restrict along, const float *restrict constant,
                                 int silu)
{
    const long end = to * channels;
    for (long at = from * channels; at < end; at += period) {
        const long count = end - at < period ? end - at : period;
        if (silu) {
            for (long i = 0; i < count; i++) {
                const float v = LOAD(x[at + i]);
                const float du = LOAD(dy[at + i]) * sl_silu_slope(v * scale[i] + shift[i]);
                dx[at + i] = STORE(du * scale[i] + v * along[i] + constant[i]);
            }
        } else {
            for (long i = 0; i < count; i++) {
                const float v = LOAD(x[at + i]), du = LOAD(dy[at + i]);
                dx[at + i] = STORE(du * scale[i] + v * along[i] + constant[i]);
            }
        }
    }
}

/* Mean and 1/deviation of every group, (rows, groups, 2). */
static void NAME(statistics)(const ELEM *x, float *statistics, float *work, long rows, long cells,
                             long channels, long groups, float eps, int threads)
{
    const long period = sl_period(channels), parts = sl_parts(cells, channels);
    const long share = channels / groups, stride = sl_stride(channels, period);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long job = 0; job < rows * parts; job++) {
        const long row = job / parts, part = job % parts;
        float *own = work + job * stride;
        NAME(moments)(x + row * cells * channels, part * cells / parts,
                      (part + 1) * cells / parts, channels, period, own + 2 * channels, own);
    }
    for (long row = 0; row < rows; row++) {
        for (long group = 0; group < groups; group++) {
            double one = 0.0, two = 0.0;
            for (long part = 0; part < parts; part++) {
                const float *own = work + (row * parts + part) * stride;
                for (long c = group * share; c < (group + 1) * share; c++) {
                    one += own[c];
                    two += own[channels + c];
                }
            }
            const double mean = one / (double)(share * cells);
            double variance = two / (double)(share * cells) - mean * mean;
            if (variance < 0.0) variance = 0.0;
            statistics[(row * groups + group) * 2] = (float)mean;
            statistics[(row * groups + group) * 2 + 1] = (float)(1.0 / sqrt(variance + eps));
        }
    }
}

/* What the norm multiplies by and adds, for whoever reads x next: affine (rows, 2, channels). */
void NAME(norm_affine)(const ELEM *x, const float *weight, const float *bias, float *statistics,
                       float *affine, float *work, long rows, long cells, long channels,
                       long groups, float eps, int threads)
{
    NAME(statistics)(x, statistics, work, rows, cells, channels, groups, eps, threads);
    for (long row = 0; row < rows; row++) {
        float *scale = affine + row * 2 * channels;
        sl_affine(statistics + row * groups * 2, weight, bias, channels, groups, channels, scale,
                  scale + channels);
    }
}

/* x, y: (rows, cells, channels). statistics: (rows, groups, 2), mean and 1/deviation, written.
 * work: sl_norm_work() floats. Returns nothing; cannot fail. */
void NAME(norm_forward)(const ELEM *x, ELEM *y, const float *weight, const float *bias,
                        float *statistics, float *work, long rows, long cells, long channels,
                        long groups, float eps, int silu, int threads)
{
    const long period = sl_period(channels), parts = sl_parts(cells, channels);
    const long stride = sl_stride(channels, period);
    NAME(statistics)(x, statistics, work, rows, cells, channels, groups, eps, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long job = 0; job < rows * parts; job++) {
        const long row = job / parts, part = job % parts;
        float *scale = work + job * stride, *shift = scale + period;
        sl_affine(statistics + row * groups * 2, weight, bias, channels, groups, period, scale,
                  shift);
        NAME(affine)(x + row * cells * channels, y + row * cells * channels, part * cells / parts,
                     (part + 1) * cells / parts, channels, period, scale, shift, silu);
    }
}

/* The gradient: dx like x; dweight and dbias (channels), overwritten. */
void NAME(norm_backward)(const ELEM *x, const ELEM *dy, ELEM *dx, const float *weight,
                         const float *bias, const float *statistics, float *dweight, float *dbias,
                         float *work, long rows, long cells, long channels, long groups, int silu,
                         int threads)
{
    const long period = sl_period(channels), parts = sl_parts(cells, channels);
    const long share = channels / groups, stride = sl_stride(channels, period);
    const double count = (double)(share * cells);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long job = 0; job < rows * parts; job++) {
        const long row = job / parts, part = job % parts;
        float *own = work + job * stride, *rest = own + 2 * channels;
        float *scale = rest + 2 * period, *shift = scale + period;
        sl_affine(statistics + row * groups * 2, weight, bias, channels, groups, period, scale,
                  shift);
        NAME(slopes)(x + row * cells * channels, dy + row * cells * channels, part * cells / parts,
                     (part + 1) * cells / parts, channels, period, scale, shift, silu, rest, own);
    }
    for (long c = 0; c < channels; c++) dweight[c] = dbias[c] = 0.0f;
    for (long row = 0; row < rows; row++) {
        for (long part = 1; part < parts; part++) {
            const float *own = work + (row * parts + part) * stride;
            float *first = work + row * parts * stride;
            for (long c = 0; c < 2 * channels; c++) first[c] += own[c];
        }
        /* Overwrites the sums of du and du*x by what pass two needs: along, constant. */
        float *sums = work + row * parts * stride;
        for (long group = 0; group < groups; group++) {
            const float mean = statistics[(row * groups + group) * 2];
            const float rstd = statistics[(row * groups + group) * 2 + 1];
            double plain = 0.0, hat = 0.0;
            for (long c = group * share; c < (group + 1) * share; c++) {
                const float centred = rstd * (sums[channels + c] - mean * sums[c]);
                dbias[c] += sums[c];
                dweight[c] += centred;
                plain += weight[c] * sums[c];
                hat += weight[c] * centred;
            }
            const float along = (float)(-rstd * rstd * hat / count);
            const float constant = (float)(-along * mean - rstd * plain / count);
            for (long c = group * share; c < (group + 1) * share; c++) {
                sums[c] = along;
                sums[channels + c] = constant;
            }
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long job = 0; job < rows * parts; job++) {
        const long row = job / parts, part = job % parts;
        float *rest = work + job * stride + 2 * channels;
        float *scale = rest + 2 * period, *shift = scale + period;
        const float *sums = work + row * parts * stride;
        for (long i = 0; i < period; i++) {
            rest[i] = sums[i % channels];
            rest[period + i] = sums[channels + i % channels];
        }
        NAME(descend)(x + row * cells * channels, dy + row * cells * channels,
                      dx + row * cells * channels, part * cells / parts,
                      (part + 1) * cells / parts, channels, period, scale, shift, rest,
                      rest + period, silu);
    }
}
