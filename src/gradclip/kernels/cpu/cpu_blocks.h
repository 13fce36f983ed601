/* The loops over one block of contiguous elements. targets.c includes this file once for each set
 * of instructions. Some are plain loops, which the compiler turns into vectors; sums are of vectors
 * already, so that many are on their way at a time, and memory is asked for ahead of them: one long
 * chain of arithmetic fills the processor's window, and its own reading ahead falls behind. */

/* As many numbers as fill a vector once they are float64. */
typedef double NAME(f64s) __attribute__((vector_size(VECTOR)));
typedef uint64_t NAME(u64s) __attribute__((vector_size(VECTOR)));
typedef float NAME(f32s) __attribute__((vector_size(VECTOR / 2)));
/* The 32-bit halves of a whole vector, and the pairs of 16-bit numbers in half a one. */
typedef uint32_t NAME(u32s) __attribute__((vector_size(VECTOR)));
typedef uint32_t NAME(pairs) __attribute__((vector_size(VECTOR / 2)));
enum { NAME(WIDTH) = VECTOR / sizeof(double) };

INLINE NAME(f64s) NAME(f64s_at)(const double *x) {
    NAME(f64s) v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE NAME(f64s) NAME(f32s_at)(const float *x) {
    NAME(f32s) v;
    memcpy(&v, x, sizeof v);
    return WIDEN(v);
}

INLINE NAME(u32s) NAME(u32s_at)(const void *x) {
    NAME(u32s) v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE NAME(f64s) NAME(every_f64)(double x) { return x - (NAME(f64s)){0}; }

INLINE NAME(u32s) NAME(every_u32)(uint32_t x) { return x - (NAME(u32s)){0}; }

/* ---- conversion ---- */

static void NAME(load_bf16)(const uint16_t *x, int n, float *out) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = float_of((uint32_t)x[i] << 16);
}

static void NAME(load_f16)(const uint16_t *x, int n, float *out) {
    int done = CONVERT_HALVES(x, n, out);
#pragma omp simd
    for (int i = done; i < n; i++) out[i] = float_of_half(x[i]);
}

static void NAME(store_bf16)(const float *x, int n, uint16_t *out) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = bfloat_of(x[i]);
}

static void NAME(store_f16)(const float *x, int n, uint16_t *out) {
    int done = CONVERT_TO_HALVES(x, n, out);
#pragma omp simd
    for (int i = done; i < n; i++) out[i] = half_of(x[i]);
}

/* ---- sums in float64 ---- */

/* Each of these is a sum of squares in any order: relative error below (n + 1) * 2^-53. It goes
 * into so many vectors, as each addition has to wait for the one before it. */
enum { NAME(SUMS) = 8 };

INLINE double NAME(total)(NAME(f64s) *sums) {
    double total = 0;
    for (int k = NAME(SUMS) / 2; k; k /= 2)
        for (int j = 0; j < k; j++) sums[j] += sums[j + k];
    for (int j = 0; j < NAME(WIDTH); j++) total += sums[0][j];
    return total;
}

static double NAME(sum_f32)(const float *x, int n) {
    enum { STEP = NAME(SUMS) * NAME(WIDTH) };
    NAME(f64s) sums[NAME(SUMS)] = {0};
    int i = 0;
    for (; i + STEP <= n; i += STEP) {
        PREFETCH(x + i, STEP, NEAR);
        UNROLLED for (int k = 0; k < NAME(SUMS); k++) {
            NAME(f64s) v = NAME(f32s_at)(x + i + k * NAME(WIDTH));
            sums[k] = SQUARES_ADD(v, sums[k]);
        }
    }
    for (; i + NAME(WIDTH) <= n; i += NAME(WIDTH)) {
        NAME(f64s) v = NAME(f32s_at)(x + i);
        sums[0] = SQUARES_ADD(v, sums[0]);
    }
    for (; i < n; i++) sums[0][0] += (double)x[i] * x[i];
    return NAME(total)(sums);
}

/* The halves of a 32-bit word are each a number when they stand in its upper half. */
INLINE void NAME(add_bf16)(const uint16_t *x, NAME(f64s) *sums) {
    NAME(pairs) both;
    memcpy(&both, x, sizeof both);
    NAME(f64s) low = WIDEN((NAME(f32s))(both << 16)),
               high = WIDEN((NAME(f32s))(both & 0xffff0000));
    sums[0] = SQUARES_ADD(low, sums[0]);
    sums[1] = SQUARES_ADD(high, sums[1]);
}

static double NAME(sum_bf16)(const uint16_t *x, int n) {
    enum { STEP = NAME(SUMS) * NAME(WIDTH) };
    NAME(f64s) sums[NAME(SUMS)] = {0};
    int i = 0;
    for (; i + STEP <= n; i += STEP) {
        PREFETCH(x + i, STEP, FAR);
        UNROLLED for (int k = 0; k < NAME(SUMS); k += 2)
            NAME(add_bf16)(x + i + k * NAME(WIDTH), &sums[k]);
    }
    for (; i + 2 * NAME(WIDTH) <= n; i += 2 * NAME(WIDTH)) NAME(add_bf16)(x + i, sums);
    for (; i < n; i++) {
        double v = float_of((uint32_t)x[i] << 16);
        sums[0][0] += v * v;
    }
    return NAME(total)(sums);
}

/* What is left over, or all where no instruction converts, by pieces: some are computed on while
 * others are on their way from memory. */
static double NAME(sum_f16)(const uint16_t *x, int n) {
    ALIGNED float piece[PIECE];
    NAME(f64s) sums[NAME(SUMS)] = {0};
    int i = 0;
#ifdef HALVES_AT
    enum { STEP = NAME(SUMS) * NAME(WIDTH) };
    for (; i + STEP <= n; i += STEP) {
        PREFETCH(x + i, STEP, FAR);
        UNROLLED for (int k = 0; k < NAME(SUMS); k++) {
            NAME(f64s) v = HALVES_AT(x + i + k * NAME(WIDTH));
            sums[k] = SQUARES_ADD(v, sums[k]);
        }
    }
#endif
    for (; i < n; i += PIECE) {
        int length = n - i < PIECE ? n - i : PIECE;
        NAME(load_f16)(x + i, length, piece);
        sums[0][0] += NAME(sum_f32)(piece, length);
    }
    return NAME(total)(sums);
}

/* ---- windows of the exact sum ---- */

/* The bits of the largest |x| of each lane, and of the smallest less 1, so that a zero counts as most.
 * Of float64 the upper halves tell. */
typedef struct {
    NAME(u32s) top, bottom;
} NAME(range_t);

INLINE uint32_t NAME(largest)(NAME(u32s) all) {
    uint32_t largest = 0;
    for (unsigned j = 0; j < sizeof all / sizeof all[0]; j++)
        largest = all[j] > largest ? all[j] : largest;
    return largest;
}

INLINE uint32_t NAME(least)(NAME(u32s) all) {
    uint32_t least = UINT32_MAX;
    for (unsigned j = 0; j < sizeof all / sizeof all[0]; j++)
        least = all[j] < least ? all[j] : least;
    return least;
}

/* One pass of the exact sum. Adding c1 = 2^52 u1 rounds squares to multiples of u1, and what that
 * leaves goes into multiples of u2; the bit patterns then add up as integers, which no order can
 * change. Four squares are added between two integer additions: that is a quarter of those. The
 * squares are exact, so fma or not makes no difference. */
INLINE void NAME(window_step_f32)(const float *x, double c1, double c2, NAME(u64s) *sums,
                                  NAME(range_t) *range) {
    enum { SIDE = LANES / NAME(WIDTH) }; /* vectors side by side, so that none waits for another */
    NAME(f64s) high[SIDE], low[SIDE];
    UNROLLED for (int j = 0; j < SIDE; j++) {
        high[j] = NAME(every_f64)(c1);
        low[j] = NAME(every_f64)(c2);
    }
    UNROLLED for (int k = 0; k < STEPS; k++) {
        UNROLLED for (int j = 0; j < SIDE; j++) {
            NAME(f64s) v = NAME(f32s_at)(x + k * LANES + j * NAME(WIDTH));
            NAME(f64s) sum = SQUARES_ADD(v, high[j]);
            low[j] += SQUARES_ADD(v, high[j] - sum);
            high[j] = sum;
        }
    }
    UNROLLED for (int j = 0; j < SIDE; j++) {
        sums[0] += (NAME(u64s))high[j];
        sums[1] += (NAME(u64s))low[j];
    }
    UNROLLED for (int i = 0; i < LANES * STEPS; i += 2 * NAME(WIDTH)) {
        NAME(u32s) magnitude = NAME(u32s_at)(x + i) & 0x7fffffff;
        range->top = LARGER(magnitude, range->top);
        range->bottom = SMALLER(magnitude - 1, range->bottom);
    }
}

static window_t NAME(window_f32)(const float *x, int n, double c1, double c2) {
    enum { STEP = LANES * STEPS };
    float tail[STEP] = {0};
    NAME(u64s) sums[2] = {0};
    NAME(range_t) range = {{0}, NAME(every_u32)(UINT32_MAX)};
    window_t window = {.sums = {0}};
    int whole = n - n % STEP;
    for (int i = whole; i < n; i++) tail[i - whole] = x[i];
    for (int i = 0; i < whole; i += STEP) {
        PREFETCH(x + i, STEP, FAR);
        NAME(window_step_f32)(x + i, c1, c2, sums, &range);
    }
    if (whole < n) NAME(window_step_f32)(tail, c1, c2, sums, &range);
    for (int j = 0; j < NAME(WIDTH); j++)
        for (int k = 0; k < 2; k++) window.sums[k] += sums[k][j];
    window.top = NAME(largest)(range.top);
    window.bottom = (uint32_t)(NAME(least)(range.bottom) + 1);
    return window;
}

/* The square is high + low, and t1 rounds it to a multiple of u1. What that leaves is more than one
 * number holds; its 53 upper bits are enough to round it to a multiple of u2 in t2, and then what is
 * left is exact: a difference of near numbers, and no more bits than one number holds. */
INLINE void NAME(window_step_f64)(const double *x, double c1, double c2, double c3,
                                  NAME(u64s) *sums, NAME(range_t) *range) {
    enum { SIDE = STEPS_F64 };
    NAME(f64s) v[SIDE], high[SIDE], low[SIDE], h1[SIDE], h2[SIDE];
    NAME(f64s) t1 = NAME(every_f64)(c1), t2 = NAME(every_f64)(c2), t3 = NAME(every_f64)(c3);
    UNROLLED for (int j = 0; j < SIDE; j++) {
        v[j] = NAME(f64s_at)(x + j * NAME(WIDTH));
        high[j] = v[j] * v[j];
        low[j] = MULTIPLY_ADD(v[j], v[j], -high[j]);
        NAME(f64s) sum = MULTIPLY_ADD(v[j], v[j], t1);
        h1[j] = sum - t1;
        t1 = sum;
    }
    UNROLLED for (int j = 0; j < SIDE; j++) {
        NAME(f64s) sum = MULTIPLY_ADD(v[j], v[j], -h1[j]) + t2;
        h2[j] = sum - t2;
        t2 = sum;
    }
    UNROLLED for (int j = 0; j < SIDE; j++) {
        NAME(u64s) magnitude = (NAME(u64s))v[j] & 0x7fffffffffffffff;
        range->top = LARGER((NAME(u32s))magnitude, range->top);
        range->bottom = SMALLER((NAME(u32s))(magnitude - 1), range->bottom);
    }
    UNROLLED for (int j = 0; j < SIDE; j++) t3 += ((high[j] - h1[j]) - h2[j]) + low[j];
    sums[0] += (NAME(u64s))t1;
    sums[1] += (NAME(u64s))t2;
    sums[2] += (NAME(u64s))t3;
}

static window_t NAME(window_f64)(const double *x, int n, double c1, double c2, double c3) {
    enum { STEP = STEPS_F64 * NAME(WIDTH) };
    double tail[LANES_F64] = {0};
    NAME(u64s) sums[3] = {0};
    NAME(range_t) range = {{0}, NAME(every_u32)(UINT32_MAX)};
    window_t window = {.sums = {0}};
    int whole = n - n % LANES_F64;
    for (int i = whole; i < n; i++) tail[i - whole] = x[i];
    for (int i = 0; i < whole; i += STEP) {
        PREFETCH(x + i, STEP, FAR);
        NAME(window_step_f64)(x + i, c1, c2, c3, sums, &range);
    }
    for (int i = 0; i < LANES_F64 && whole < n; i += STEP)
        NAME(window_step_f64)(tail + i, c1, c2, c3, sums, &range);
    for (int j = 0; j < NAME(WIDTH); j++)
        for (int k = 0; k < 3; k++) window.sums[k] += sums[k][j];
    /* Of the lower halves make what changes nothing. */
    uint32_t top = NAME(largest)((NAME(u32s))((NAME(u64s))range.top >> 32)),
             bottom = NAME(least)((NAME(u32s))((NAME(u64s))range.bottom | UINT32_MAX));
    int all_zero = bottom == UINT32_MAX;
    window.top = (uint64_t)top << 32 | !all_zero;
    window.bottom = all_zero ? 0 : (uint64_t)bottom << 32;
    return window;
}

/* out = x where from <= bits of |x| < below, else 0; returns the largest bits below `from`: less
 * `from` they run over, and so are above all others. A choice of 0 for those is what Clang 20 cannot
 * turn into vectors. */
static uint32_t NAME(select_f32)(const float *x, int n, uint32_t from, uint32_t below, float *out) {
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
        out[i] = magnitude >= from && magnitude < below ? x[i] : 0;
        uint32_t rest = magnitude - from;
        top = rest > top ? rest : top;
    }
    return top >> 31 ? top + from : 0;
}

static uint64_t NAME(select_f64)(const double *x, int n, uint64_t from, uint64_t below,
                                 double scale, double *out) {
    uint64_t top = 0;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) {
        uint64_t magnitude = bits_of_double(x[i]) & ~((uint64_t)1 << 63);
        out[i] = magnitude >= from && magnitude < below ? x[i] * scale : 0;
        uint64_t rest = magnitude - from;
        top = rest > top ? rest : top;
    }
    return top >> 63 ? top + from : 0;
}

/* ---- scaling ---- */

static void NAME(scale_f32)(const float *x, int n, float c, float *out) {
    for (int i = 0; i < n; i += STRIDE) {
        int end = n - i < STRIDE ? n : i + STRIDE;
        PREFETCH(x + i, STRIDE, FAR);
#pragma omp simd
        for (int j = i; j < end; j++) out[j] = x[j] * c;
    }
}

static void NAME(scale_f32_wide)(const float *x, int n, double c, float *out) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = (float)(x[i] * c);
}

static void NAME(scale_f64)(const double *x, int n, double c, double *out) {
    for (int i = 0; i < n; i += STRIDE) {
        int end = n - i < STRIDE ? n : i + STRIDE;
        PREFETCH(x + i, STRIDE, FAR);
#pragma omp simd
        for (int j = i; j < end; j++) out[j] = x[j] * c;
    }
}

/* The halves of a 32-bit word side by side: lanes need not be widened and narrowed. */
static void NAME(scale_bf16)(const uint16_t *x, int n, float c, uint16_t *out) {
    for (int i = 0; i < n; i += STRIDE) {
        int pairs = (n - i < STRIDE ? n - i : STRIDE) / 2;
        PREFETCH(x + i, STRIDE, FAR);
#pragma omp simd
        for (int j = 0; j < pairs; j++) {
            uint32_t both;
            __builtin_memcpy(&both, x + i + 2 * j, sizeof both);
            uint32_t low = bits_of_bfloat(float_of(both << 16) * c),
                     high = bits_of_bfloat(float_of(both & 0xffff0000) * c);
            both = low >> 16 | (high & 0xffff0000);
            __builtin_memcpy(out + i + 2 * j, &both, sizeof both);
        }
    }
    if (n % 2) out[n - 1] = bfloat_of(float_of((uint32_t)x[n - 1] << 16) * c);
}

static void NAME(scale_f16)(const uint16_t *x, int n, float c, uint16_t *out) {
    ALIGNED float piece[PIECE];
    for (int i = SCALE_HALVES(x, n, c, out); i < n; i += PIECE) {
        int length = n - i < PIECE ? n - i : PIECE;
        NAME(load_f16)(x + i, length, piece);
        NAME(scale_f32)(piece, length, c, piece);
        NAME(store_f16)(piece, length, out + i);
    }
}

/* sums += the rows of x times their factors, rounded to float32, row after row. Several at once: that
 * many streams from memory, and each sum is fetched once for all. */
static void NAME(add_rows_f32)(const float *const x[ROWS], const float c[ROWS], int n,
                               double *sums) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
        double sum = sums[i];
        for (int row = 0; row < ROWS; row++) sum += (double)(x[row][i] * c[row]);
        sums[i] = sum;
    }
}

static void NAME(add_row_f32)(const float *x, float c, int n, double *sums) {
#pragma omp simd
    for (int i = 0; i < n; i++) sums[i] += (double)(x[i] * c);
}

static void NAME(add_f64)(const double *x, int n, double *sums) {
#pragma omp simd
    for (int i = 0; i < n; i++) sums[i] += x[i];
}

static const blocks_t NAME(blocks) = {
    NAME(sum_f32),        NAME(sum_bf16),   NAME(sum_f16),    NAME(load_bf16),  NAME(load_f16),
    NAME(window_f32),     NAME(window_f64), NAME(select_f32), NAME(select_f64), NAME(scale_f32),
    NAME(scale_f32_wide), NAME(scale_f64),  NAME(scale_bf16), NAME(scale_f16),  NAME(store_bf16),
    NAME(store_f16),      NAME(add_rows_f32), NAME(add_row_f32), NAME(add_f64),
};
