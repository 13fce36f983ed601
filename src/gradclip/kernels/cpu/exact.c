/* The exact sum: squares in windows of few exponents, the windows in long integers. */
#include <string.h>

#include "bits.h"
#include "walk.h"

enum { F32_SPREAD = 26, F64_SPREAD = 22 }; /* binades that one window of exact sums spans */
static const uint64_t F64_INFINITE = (uint64_t)0x7ff << 52;

/* ---- the words ---- */

void carry(int64_t *words, int count) {
    for (int j = 0; j < count - 1; j++) {
        int64_t up = words[j] >> 32;
        words[j] -= up * ((int64_t)1 << 32);
        words[j + 1] += up;
    }
}

/* words += value * 2^exponent */
static void add_at(int64_t *words, int unit, int64_t value, int exponent) {
    int64_t sign = value < 0 ? -1 : 1;
    uint64_t magnitude = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    int place = exponent - unit;
    if (place < 0) { /* no square of a number is so small: what is cut off is zeros */
        magnitude = place > -64 ? magnitude >> -place : 0;
        place = 0;
    }
    int64_t *word = words + (place >> 5);
    uint64_t low = (magnitude & UINT32_MAX) << (place & 31);
    uint64_t high = (magnitude >> 32) << (place & 31);
    word[0] += sign * (int64_t)(low & UINT32_MAX);
    word[1] += sign * (int64_t)((low >> 32) + (high & UINT32_MAX));
    word[2] += sign * (int64_t)(high >> 32);
}

/* 2^exponent, for a normal double. */
static double power_of_two(int exponent) { return double_of((uint64_t)(exponent + 1023) << 52); }

/* The sum of window `s` of n terms, each offset by `offset`: how many units of it. */
static int64_t units(uint64_t s, int n, double offset) {
    return (int64_t)(s - (uint64_t)n * bits_of_double(offset));
}

static int at_least_one(uint64_t field) { return field ? (int)field : 1; }

static int fits(uint64_t top, uint64_t bottom, int mantissa, int field, int spread) {
    int all_zero = top == 0;
    int highest = (int)(top >> mantissa), lowest = at_least_one(bottom >> mantissa);
    return all_zero || (highest <= field && lowest >= field - spread);
}

/* ---- 32 bits or fewer ---- */

static window_t try_window_f32(const float *x, int n, int field, int64_t *words, int *done) {
    int top = 2 * (field - 127) + 2; /* every square in the window is below 2^top */
    double c1 = power_of_two(top + 2), c2 = 1.5 * power_of_two(top - 48);
    int sums = (n + LANES * STEPS - 1) / (LANES * STEPS) * LANES;
    window_t seen = blocks->window_f32(x, n, c1, c2);
    *done = fits(seen.top, seen.bottom, 23, field, F32_SPREAD);
    if (*done) {
        add_at(words, NARROW_UNIT, units(seen.sums[0], sums, c1), top - 50);
        add_at(words, NARROW_UNIT, units(seen.sums[1], sums, c2), top - 100);
    }
    return seen;
}

static void exact_f32(const float *x, int n, int *field, total_t *total) {
    const uint32_t infinite = 0x7f800000;
    int done;
    window_t seen = try_window_f32(x, n, *field, total->narrow, &done);
    if (!done && seen.top < infinite) {
        *field = at_least_one(seen.top >> 23);
        seen = try_window_f32(x, n, *field, total->narrow, &done);
    }
    if (seen.top >= infinite) {
        for (int i = 0; i < n; i++) {
            uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
            total->narrow[NARROW_WORDS + INF_COUNT] += magnitude == infinite;
            total->narrow[NARROW_WORDS + NAN_COUNT] += magnitude > infinite;
        }
    }
    /* Too wide a spread for one window: class by class of exponents, from the top. */
    ALIGNED float part[BLOCK];
    uint32_t top = (uint32_t)seen.top, below = infinite;
    if (!done && top >= infinite) top = blocks->select_f32(x, n, infinite, infinite, part);
    if (float_of(top) > total->largest) total->largest = float_of(top);
    while (!done && top) {
        int highest = at_least_one(top >> 23);
        uint32_t from = highest - F32_SPREAD > 1 ? (uint32_t)(highest - F32_SPREAD) << 23 : 0;
        int selected;
        top = blocks->select_f32(x, n, from, below, part);
        try_window_f32(part, n, highest, total->narrow, &selected);
        below = from;
    }
}


/* ---- 64 bits ---- */

static window_t try_window_f64(const double *x, int n, int field, int shift, int64_t *words,
                               int *done) {
    int top = 2 * (field - 1023) + 2;
    double c1 = power_of_two(top + 1), c2 = 1.5 * power_of_two(top - 49),
           c3 = 1.5 * power_of_two(top - 99);
    int sums = (n + LANES_F64 - 1) / LANES_F64 * (LANES_F64 / STEPS_F64);
    window_t seen = blocks->window_f64(x, n, c1, c2, c3);
    *done = fits(seen.top, seen.bottom, 52, field, F64_SPREAD);
    if (*done) {
        add_at(words, WIDE_UNIT, units(seen.sums[0], sums, c1), top - 51 + shift);
        add_at(words, WIDE_UNIT, units(seen.sums[1], sums, c2), top - 101 + shift);
        add_at(words, WIDE_UNIT, units(seen.sums[2], sums, c3), top - 151 + shift);
    }
    return seen;
}

/* words += sum of (x * 2^(shift/2))^2, for x that are zero or moderate: class by class of
 * exponents, from the top. */
static void peel_f64(const double *x, int n, int shift, int64_t *words) {
    ALIGNED double part[BLOCK_F64];
    uint64_t below = F64_INFINITE;
    uint64_t top = blocks->select_f64(x, n, below, below, 1, part);
    while (top) {
        int selected, highest = (int)(top >> 52);
        /* One less than fit, as a power of two counts as of the exponent below. */
        uint64_t from = (uint64_t)(highest - F64_SPREAD + 1) << 52;
        top = blocks->select_f64(x, n, from, below, 1, part);
        try_window_f64(part, n, highest, shift, words, &selected);
        below = from;
    }
}

static void exact_f64(const double *x, int n, int *field, total_t *total) {
    /* Between these no part of a square overflows or underflows; outside, a power of two helps. */
    const uint64_t low = (uint64_t)(1023 - 450) << 52, high = (uint64_t)(1023 + 490) << 52;
    int done;
    window_t seen = try_window_f64(x, n, *field, 0, total->wide, &done);
    if (!done && seen.top >= low && seen.top < high) {
        *field = (int)(seen.top >> 52);
        seen = try_window_f64(x, n, *field, 0, total->wide, &done);
    }
    if (seen.top >= F64_INFINITE) {
        for (int i = 0; i < n; i++) {
            uint64_t magnitude = bits_of_double(x[i]) & ~((uint64_t)1 << 63);
            total->wide[WIDE_WORDS + INF_COUNT] += magnitude == F64_INFINITE;
            total->wide[WIDE_WORDS + NAN_COUNT] += magnitude > F64_INFINITE;
        }
    }
    ALIGNED double part[BLOCK_F64];
    /* Which is the largest takes another look, where it may be larger than those before. */
    if (seen.top >> 32 >= bits_of_double(total->largest) >> 32) {
        uint64_t top = blocks->select_f64(x, n, F64_INFINITE, F64_INFINITE, 1, part);
        if (double_of(top) > total->largest) total->largest = double_of(top);
    }
    if (done) return;
    blocks->select_f64(x, n, high, F64_INFINITE, 0x1p-600, part);
    peel_f64(part, n, 1200, total->wide);
    blocks->select_f64(x, n, low, high, 1, part);
    peel_f64(part, n, 0, total->wide);
    blocks->select_f64(x, n, 0, low, 0x1p700, part); /* and the least unit is normal */
    peel_f64(part, n, -1400, total->wide);
}

/* ---- all kinds ---- */

void exact_squares(list_t *list, total_t *total) {
    room_t room;
    ALIGNED float out[BLOCK];
    walk_t walk = {0};
    /* Neighbouring blocks are alike: the window that held the last one is tried first. */
    int field_f32 = 127, field_f64 = 1023;
    memset(total, 0, sizeof *total);
    while (next_block(list, &walk)) {
        const leaf_t *leaf = &list->leaves[walk.leaf];
        if (leaf->kind == F64)
            exact_f64(fetch(leaf, walk.begin, walk.length, &room), walk.length, &field_f64, total);
        else
            exact_f32(fetch_f32(leaf, walk.begin, walk.length, &room, out), walk.length,
                      &field_f32, total);
        if (walk.new_chunk) { /* long before any word could run over */
            carry(total->narrow, NARROW_WORDS);
            carry(total->wide, WIDE_WORDS);
        }
    }
    carry(total->narrow, NARROW_WORDS);
    carry(total->wide, WIDE_WORDS);
}

void exact_share(void *data, int share) {
    job_t *job = data;
    exact_squares(job->list, &job->totals[share]);
}

void add_total(const total_t *total, int64_t *words, int64_t *counts) {
    enum { AT = (NARROW_UNIT - WIDE_UNIT) / 32 };
    for (int j = 0; j < NARROW_WORDS; j++) words[AT + j] += total->narrow[j];
    for (int j = 0; j < WIDE_WORDS; j++) words[j] += total->wide[j];
    for (int j = 0; j < COUNTS; j++)
        counts[j] += total->narrow[NARROW_WORDS + j] + total->wide[WIDE_WORDS + j];
}
