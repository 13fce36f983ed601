/* Scaling: the factor in the forms that kinds take, and the walk that multiplies by it. */
#include <math.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "walk.h"

enum { STREAMED = 1024 }; /* numbers scaled at a time, to be written past the caches */
enum { LARGE = 1 << 21 }; /* so many numbers do not stay in a cache until they are read */

factor_t factor_of(double significand, int64_t exponent) {
    const int64_t far = 1 << 13; /* such a factor takes everything to zero, or to inf */
    int power = (int)(exponent > far ? far : exponent < -far ? -far : exponent);
    float rounded = (float)significand;
    factor_t factor;
    /* Below the float64 range a factor takes every float32 to zero; unless it is zero it stays
     * above zero itself, so that inf * factor is inf. */
    factor.narrow_wide = ldexp(rounded, power);
    if (rounded != 0 && factor.narrow_wide == 0) factor.narrow_wide = 0x1p-1074;
    factor.narrow = factor.narrow_wide >= 0x1p-126 ? (float)factor.narrow_wide : 0;
    /* Where a factor is too small for float64, powers of two are split off: x * shift is exact, or
     * else the product rounds to zero anyway. */
    int halves = (power < -1021 ? power + 1021 : 0) / 2 - (power < -1021 && (power + 1021) % 2);
    factor.shift = ldexp(1, halves);
    factor.wide = ldexp(significand, power - 2 * halves);
    return factor;
}

static void scale_f64(const double *x, int n, const factor_t *factor, double *out) {
    blocks->scale_f64(x, n, factor->shift == 1 ? factor->wide : factor->shift, out);
    if (factor->shift != 1) {
        blocks->scale_f64(out, n, factor->shift, out);
        blocks->scale_f64(out, n, factor->wide, out);
    }
}

/* By a factor that is not a normal float32. */
static void scale_wide(kind_t kind, const void *x, int n, double factor, void *out) {
    ALIGNED float wide[BLOCK];
    if (kind == F32) {
        blocks->scale_f32_wide(x, n, factor, out);
        return;
    }
    (kind == F16 ? blocks->load_f16 : blocks->load_bf16)(x, n, wide);
    blocks->scale_f32_wide(wide, n, factor, wide);
    (kind == F16 ? blocks->store_f16 : blocks->store_bf16)(wide, n, out);
}

static void recode_bytes(const uint8_t *x, int n, const uint8_t *recode, uint8_t *out) {
    for (int i = 0; i < n; i++) out[i] = recode[x[i]];
}

void scale_block(kind_t kind, const void *x, int n, const factor_t *factor,
                 const uint8_t *recode, void *out) {
    if (kind == F64)
        scale_f64(x, n, factor, out);
    else if (kind == BYTE)
        recode_bytes(x, n, recode, out);
    else if (!isnormal(factor->narrow))
        scale_wide(kind, x, n, factor->narrow_wide, out);
    else if (kind == F32)
        blocks->scale_f32(x, n, factor->narrow, out);
    else
        (kind == F16 ? blocks->scale_f16 : blocks->scale_bf16)(x, n, factor->narrow, out);
}

/* Copy to memory that is not read soon, past the caches: an ordinary store would first read what it
 * overwrites, half as much again to move. An intrinsic: no plain C says so. */
static void stream(char *to, const char *from, int64_t bytes) {
#if defined(__SSE2__)
    int64_t head = -(intptr_t)to & 15;
    if (head > bytes) head = bytes;
    memcpy(to, from, head);
    for (; head + 16 <= bytes; head += 16)
        _mm_stream_si128((__m128i *)(to + head), _mm_loadu_si128((const __m128i *)(from + head)));
    memcpy(to + head, from + head, bytes - head);
#else
    memcpy(to, from, bytes);
#endif
}

/* Scale a block into `to` by way of a piece that stays in the nearest cache. */
static void scale_past_caches(kind_t kind, const char *x, int n, const factor_t *factor,
                              const uint8_t *recode, char *to) {
    ALIGNED char piece[STREAMED * sizeof(double)];
    int64_t item = item_size(kind);
    for (int i = 0; i < n; i += STREAMED) {
        int length = n - i < STREAMED ? n - i : STREAMED;
        scale_block(kind, x + i * item, length, factor, recode, piece);
        stream(to + i * item, piece, length * item);
    }
}

static int is_one(const factor_t *factor) {
    return factor->wide == 1 && factor->shift == 1;
}

void scale(const list_t *source, list_t *target, const factor_t *factors, int step,
           const uint8_t *const *recode) {
    room_t room;
    walk_t walk = {0};
    int large = target->size >= LARGE;
    while (next_block(target, &walk)) {
        const leaf_t *from = &source->leaves[walk.leaf], *to = &target->leaves[walk.leaf];
        const uint8_t *codes = recode ? recode[walk.leaf] : NULL;
        const factor_t *factor = &factors[step * walk.leaf];
        if (from->data == to->data && is_one(factor)) continue; /* not a bit of it changes */
        const void *x = fetch(from, walk.begin, walk.length, &room);
        char *place = to->data + walk.begin * item_size(to->kind);
        if (to->ndim) {
            scale_block(to->kind, x, walk.length, factor, codes, &room);
            store(to, walk.begin, walk.length, &room);
        } else if (large && from->data != to->data) {
            scale_past_caches(to->kind, x, walk.length, factor, codes, place);
        } else {
            scale_block(to->kind, x, walk.length, factor, codes, place);
        }
    }
#if defined(__SSE2__)
    _mm_sfence(); /* what was streamed is seen by other threads from here on */
#endif
}

void scale_share(void *data, int share) {
    job_t *job = data;
    (void)share;
    scale(job->source, job->list, job->factors, job->step, job->recode);
}
