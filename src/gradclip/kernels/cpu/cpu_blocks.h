/* The loops over one block of contiguous elements. targets.c includes this file once for each set
 * of instructions. Plain loops: the compiler turns them into vectors. */

/* Sum of squares in float64, in any order: relative error below (n + 1) * 2^-53. */
static double NAME(sum_f32)(const float *x, int n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
        double v = x[i];
        sum = SQUARE_ADD(v, sum);
    }
    return sum;
}

static double NAME(sum_bf16)(const uint16_t *x, int n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
        double v = float_of((uint32_t)x[i] << 16);
        sum = SQUARE_ADD(v, sum);
    }
    return sum;
}

static void NAME(load_bf16)(const uint16_t *x, int n, float *out) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = float_of((uint32_t)x[i] << 16);
}

static void NAME(load_f16)(const uint16_t *x, int n, float *out) {
    int done = CONVERT_HALVES(x, n, out);
#pragma omp simd
    for (int i = done; i < n; i++) out[i] = float_of_half(x[i]);
}

/* By pieces, so that some are computed on while others are on their way from memory. */
static double NAME(sum_f16)(const uint16_t *x, int n) {
    ALIGNED float piece[PIECE];
    double sum = 0;
    for (int i = 0; i < n; i += PIECE) {
        int length = n - i < PIECE ? n - i : PIECE;
        NAME(load_f16)(x + i, length, piece);
        sum += NAME(sum_f32)(piece, length);
    }
    return sum;
}

/* One pass of the exact sum. Adding c1 = 2^52 u1 rounds squares to multiples of u1, and what that
 * leaves goes into multiples of u2; the bit patterns then add up as integers, which no order can
 * change. Four squares are added between two integer additions: that is a quarter of those. */
static inline void NAME(window_step)(const float *x, double c1, double c2, lanes_t *lanes) {
#pragma omp simd
    for (int j = 0; j < LANES; j++) {
        double high = c1, low = c2;
        uint32_t top = lanes->top[j], bottom = lanes->bottom[j];
        for (int k = 0; k < STEPS; k++) {
            float value = x[k * LANES + j];
            uint32_t magnitude = bits_of(value) & 0x7fffffff;
            top = magnitude > top ? magnitude : top;
            bottom = magnitude - 1 < bottom ? magnitude - 1 : bottom; /* a zero drops out */
            double v = value; /* its square is exact, so fma or not makes no difference */
            double sum = SQUARE_ADD(v, high);
            low += SQUARE_ADD(v, high - sum);
            high = sum;
        }
        lanes->s1[j] += bits_of_double(high);
        lanes->s2[j] += bits_of_double(low);
        lanes->top[j] = top;
        lanes->bottom[j] = bottom;
    }
}

static window_t NAME(window_f32)(const float *x, int n, double c1, double c2) {
    float tail[STEPS * LANES] = {0};
    lanes_t lanes = {0};
    window_t window = {.bottom = UINT32_MAX};
    int whole = n - n % (STEPS * LANES);
    for (int j = 0; j < LANES; j++) lanes.bottom[j] = UINT32_MAX;
    for (int i = whole; i < n; i++) tail[i - whole] = x[i];
    for (int i = 0; i < whole; i += STEPS * LANES) NAME(window_step)(x + i, c1, c2, &lanes);
    if (whole < n) NAME(window_step)(tail, c1, c2, &lanes);
    for (int j = 0; j < LANES; j++) {
        window.sums[0] += lanes.s1[j];
        window.sums[1] += lanes.s2[j];
        window.top = lanes.top[j] > window.top ? lanes.top[j] : window.top;
        window.bottom = lanes.bottom[j] < window.bottom ? lanes.bottom[j] : window.bottom;
    }
    window.bottom = (uint32_t)(window.bottom + 1);
    return window;
}

static window_t NAME(window_f64)(const double *x, int n, double c1, double c2, double c3) {
    uint64_t s1 = 0, s2 = 0, s3 = 0, top = 0, bottom = UINT64_MAX;
#pragma omp simd reduction(+ : s1, s2, s3) reduction(max : top) reduction(min : bottom)
    for (int i = 0; i < n; i++) {
        uint64_t magnitude = bits_of_double(x[i]) & 0x7fffffffffffffff;
        top = magnitude > top ? magnitude : top;
        bottom = magnitude - 1 < bottom ? magnitude - 1 : bottom;
        double v = x[i];
        double high = v * v;
        double low = fma(v, v, -high);
        double t1 = high + c1, r1 = high - (t1 - c1);
        double t2 = r1 + c2, r2 = r1 - (t2 - c2);
        double w2 = low + c2, l2 = low - (w2 - c2);
        double t3 = (r2 + l2) + c3;
        s1 += bits_of_double(t1);
        s2 += bits_of_double(t2) + bits_of_double(w2);
        s3 += bits_of_double(t3);
    }
    return (window_t){{s1, s2, s3}, top, bottom + 1};
}

/* out = x where from <= bits of |x| < below, else 0; returns the largest bits below `from`. */
static uint32_t NAME(select_f32)(const float *x, int n, uint32_t from, uint32_t below, float *out) {
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
        out[i] = magnitude >= from && magnitude < below ? x[i] : 0;
        uint32_t rest = magnitude < from ? magnitude : 0;
        top = rest > top ? rest : top;
    }
    return top;
}

static uint64_t NAME(select_f64)(const double *x, int n, uint64_t from, uint64_t below,
                                 double scale, double *out) {
    uint64_t top = 0;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) {
        uint64_t magnitude = bits_of_double(x[i]) & ~((uint64_t)1 << 63);
        out[i] = magnitude >= from && magnitude < below ? x[i] * scale : 0;
        uint64_t rest = magnitude < from ? magnitude : 0;
        top = rest > top ? rest : top;
    }
    return top;
}

static void NAME(scale_f32)(const float *x, int n, float c, float *out) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = x[i] * c;
}

static void NAME(scale_f32_wide)(const float *x, int n, double c, float *out) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = (float)(x[i] * c);
}

static void NAME(scale_f64)(const double *x, int n, double c, double *out) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = x[i] * c;
}

static void NAME(scale_bf16)(const uint16_t *x, int n, float c, uint16_t *out) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = bfloat_of(float_of((uint32_t)x[i] << 16) * c);
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

static void NAME(scale_f16)(const uint16_t *x, int n, float c, uint16_t *out) {
    ALIGNED float piece[PIECE];
    for (int i = 0; i < n; i += PIECE) {
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
