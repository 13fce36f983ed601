/* The certified sum: in float64, with a bound on what that may be off. */
#include <math.h>

#include "walk.h"

static void add_block(sum_t *sum, double block) {
    double high = sum->high + block; /* TwoSum */
    double part = high - sum->high;
    sum->low += (sum->high - (high - part)) + (block - part);
    sum->high = high;
}

/* Add the squares of leaf i to sums[i], or with a step of 0 those of all to the first. */
static void add_squares(list_t *list, sum_t *sums, int step) {
    room_t room;
    ALIGNED float out[BLOCK];
    walk_t walk = {0};
    while (next_block(list, &walk)) {
        const leaf_t *leaf = &list->leaves[walk.leaf];
        sum_t *sum = &sums[step * walk.leaf];
        double block;
        switch (leaf->kind) {
        case F64: continue;
        case F16:
            block = blocks->sum_f16(fetch(leaf, walk.begin, walk.length, &room), walk.length);
            break;
        case BF16:
            block = blocks->sum_bf16(fetch(leaf, walk.begin, walk.length, &room), walk.length);
            break;
        default:
            block = blocks->sum_f32(fetch_f32(leaf, walk.begin, walk.length, &room, out),
                                    walk.length);
        }
        /* No finite square of 32 bits overflows float64, so only an Inf or NaN gives one. */
        if (isnan(block))
            sum->has_nan = 1;
        else if (isinf(block))
            sum->has_inf = 1;
        else
            add_block(sum, block);
    }
}

void sum_squares(list_t *list, sum_t *sum) {
    *sum = (sum_t){0};
    add_squares(list, sum, 0);
}

void sum_share(void *data, int share) {
    job_t *job = data;
    sum_squares(job->list, &job->sums[share]);
}

void sum_each_share(void *data, int share) {
    job_t *job = data;
    add_squares(job->list, &job->sums[share * job->list->count], 1);
}

/* See certified_norm in core/exact.py, which does the same for the walks that Python asks for. */
static const double BOUND = (4096 + 16) * 0x1p-53;

/* To the nearest float32, its largest exponent lifted, its smallest kept. */
static double round24(double x) {
    int exponent;
    double significand = frexp(x, &exponent);
    return exponent < -125 ? (float)x : ldexp((float)significand, exponent);
}

sum_t sum_of_sums(const sum_t *sums, int64_t count, int64_t step) {
    sum_t total = {0};
    for (int64_t i = 0; i < count; i++) {
        const sum_t *each = &sums[step * i];
        add_block(&total, each->high);
        total.low += each->low;
        total.has_inf |= each->has_inf;
        total.has_nan |= each->has_nan;
    }
    return total;
}

int certified_root(const sum_t *sums, int count, int64_t root[2]) {
    sum_t total = sum_of_sums(sums, count, 1);
    double sum = total.high + total.low;
    double low = round24(sqrt(sum * (1 - BOUND))), high = round24(sqrt(sum * (1 + BOUND)));
    int exponent;
    root[0] = (int64_t)(frexp(low, &exponent) * 0x1p53);
    root[1] = root[0] ? exponent - 53 : 0;
    return low == high;
}
