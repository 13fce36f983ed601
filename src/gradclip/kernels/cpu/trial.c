/* The arithmetic of the walks tried on numbers of which the results are known, when it is loaded.
 *
 * A compiler's flags, or a fault in it, can make floats behave unlike IEEE 754. What is expected is
 * made of integers here, or stands here as bits, and bits are compared. */
#include <string.h>

#include "cpu.h"
#include "ieee.h"

enum { LENGTH = 133 }; /* numbers of a trial: whole vectors of any kernel, and some more */

typedef union {
    uint64_t b64[LENGTH];
    uint32_t b32[LENGTH];
    uint16_t b16[LENGTH];
} numbers_t;

static void put(numbers_t *numbers, kind_t kind, int i, uint64_t bits) {
    if (kind == F64)
        numbers->b64[i] = bits;
    else if (kind == F32)
        numbers->b32[i] = (uint32_t)bits;
    else
        numbers->b16[i] = (uint16_t)bits;
}

static uint64_t get(const numbers_t *numbers, kind_t kind, int i) {
    return kind == F64 ? numbers->b64[i] : kind == F32 ? numbers->b32[i] : numbers->b16[i];
}

static leaf_t leaf_of(kind_t kind, numbers_t *numbers, int count) {
    return (leaf_t){.data = (char *)numbers, .size = count, .kind = kind};
}

static list_t list_of(const leaf_t *leaf) {
    return (list_t){.leaves = leaf, .count = 1, .size = leaf->size};
}

/* ---- sums of squares ---- */

/* Bits are a sign, a field and a fraction: (2^mantissa + fraction) * 2^(field - bias - mantissa). */
typedef struct {
    kind_t kind;
    int mantissa, bias;
    int calm; /* so many fields fit into one window of an exact sum */
} format_t;

static const format_t FORMATS[] = {
    {F32, 23, 127, 20}, {F64, 52, 1023, 16}, {F16, 10, 15, 8}, {BF16, 7, 127, 20}};
enum { FORMAT_COUNT = sizeof FORMATS / sizeof FORMATS[0] };

static uint64_t infinity_of(const format_t *format) {
    return (uint64_t)(2 * format->bias + 1) << format->mantissa;
}

/* words += value * 2^place; to be carried. */
static void add(int64_t *words, uint64_t value, int place) {
    uint64_t low = (value & UINT32_MAX) << place % 32, high = (value >> 32) << place % 32;
    words += place / 32;
    words[0] += (int64_t)(low & UINT32_MAX);
    words[1] += (int64_t)((low >> 32) + (high & UINT32_MAX));
    words[2] += (int64_t)(high >> 32);
}

static void add_square(int64_t *words, const format_t *format, uint64_t field, uint64_t fraction) {
    int place = 2 * ((int)(field ? field : 1) - format->bias - format->mantissa) - WIDE_UNIT;
    uint64_t high = fraction >> 26, low = fraction & ((1 << 26) - 1);
    add(words, low * low, place);
    add(words, high * low, place + 27);
    add(words, high * high, place + 52);
    if (!field) return;
    add(words, fraction, place + format->mantissa + 1);
    add(words, 1, place + 2 * format->mantissa);
}

static void exact_words(const leaf_t *leaf, int64_t *words) {
    list_t list = list_of(leaf);
    total_t total;
    exact_squares(&list, &total);
    memset(words, 0, (WIDE_WORDS + COUNTS) * sizeof *words);
    add_total(&total, words, words + WIDE_WORDS);
}

/* Numbers of few exponents, or of all that there are, subnormal ones too. */
static int adds_exactly(const format_t *format, int of_all) {
    numbers_t numbers;
    int64_t wanted[WIDE_WORDS + COUNTS] = {0}, found[WIDE_WORDS + COUNTS];
    for (int i = 0; i < LENGTH; i++) {
        int field = of_all ? i * 2 * format->bias / (LENGTH - 1)
                           : format->bias - format->calm / 2 + i % format->calm;
        uint64_t fraction = (uint64_t)(2 * i + 1) * 0x9e3779b97f4a7c15 >> (64 - format->mantissa);
        uint64_t magnitude = (uint64_t)field << format->mantissa | fraction;
        uint64_t sign = (uint64_t)(i % 2) << (format->kind == F64 ? 63 : format->kind == F32 ? 31 : 15);
        put(&numbers, format->kind, i, sign | magnitude);
        add_square(wanted, format, (uint64_t)field, fraction);
    }
    for (int j = 0; j < WIDE_WORDS - 1; j++) {
        wanted[j + 1] += wanted[j] >> 32;
        wanted[j] &= UINT32_MAX;
    }
    leaf_t leaf = leaf_of(format->kind, &numbers, LENGTH);
    exact_words(&leaf, found);
    return !memcmp(found, wanted, sizeof found);
}

static int counts_nonfinite(const format_t *format) {
    numbers_t numbers;
    int64_t found[WIDE_WORDS + COUNTS];
    for (int i = 0; i < LENGTH; i++)
        put(&numbers, format->kind, i, infinity_of(format) + (uint64_t)(i % 3 == 0));
    leaf_t leaf = leaf_of(format->kind, &numbers, LENGTH);
    exact_words(&leaf, found);
    int nans = (LENGTH + 2) / 3;
    return found[WIDE_WORDS + NAN_COUNT] == nans && found[WIDE_WORDS + INF_COUNT] == LENGTH - nans;
}

/* 2^40, then 1 so many times, then 2^-10: float64 holds the sum of squares in two parts only. */
static int adds_in_two_parts(void) {
    const uint64_t bits[] = {0x53800000, 0x3f800000, 0x3a800000};
    numbers_t numbers[3];
    leaf_t leaves[3];
    list_t list = {.leaves = leaves, .count = 3, .size = LENGTH + 2};
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < LENGTH; j++) put(&numbers[i], F32, j, bits[i]);
        leaves[i] = leaf_of(F32, &numbers[i], i == 1 ? LENGTH : 1);
        leaves[i].first = i ? leaves[i - 1].first + leaves[i - 1].size : 0;
    }
    sum_t sum;
    sum_squares(&list, &sum);
    return sum.high == 0x1p80 && sum.low == LENGTH + 0x1p-20 && !sum.has_inf && !sum.has_nan;
}

/* One number so often, and then one number. */
static sum_t sum_of(kind_t kind, uint64_t bits, uint64_t last) {
    numbers_t numbers;
    sum_t sum;
    for (int i = 0; i < LENGTH; i++) put(&numbers, kind, i, i < LENGTH - 1 ? bits : last);
    leaf_t leaf = leaf_of(kind, &numbers, LENGTH);
    list_t list = list_of(&leaf);
    sum_squares(&list, &sum);
    return sum;
}

static int adds_in_float64(const format_t *format) {
    uint64_t one = (uint64_t)format->bias << format->mantissa, inf = infinity_of(format);
    sum_t finite = sum_of(format->kind, one, 1), has_inf = sum_of(format->kind, one, inf),
          has_nan = sum_of(format->kind, one, inf + 1);
    return finite.high + finite.low == LENGTH - 1 && !finite.has_inf && !finite.has_nan &&
           has_inf.has_inf && !has_inf.has_nan && has_nan.has_nan;
}

/* ---- scaling ---- */

enum { GIVEN = 8 };

typedef struct {
    kind_t kind;
    double significand;
    int64_t exponent;
    uint64_t given[GIVEN], wanted[GIVEN];
} scaling_t;

static const scaling_t SCALINGS[] = {
    {F32, 0x1.5555555555555p-1, 0,
     {0x3f800000, 0x40490fdb, 0xbf7fffff, 0x3fc00001, 0x7f7fffff, 0x00800001, 0x80000003,
      0x7f800000},
     {0x3f2aaaab, 0x40060a92, 0xbf2aaaaa, 0x3f800001, 0x7f2aaaaa, 0x00555556, 0x80000002,
      0x7f800000}},
    {F32, 0x1.5555555555555p-1, -130, /* by way of float64 */
     {0x3f800000, 0x40490fdb, 0xbf7fffff, 0x3fc00001, 0x7f7fffff, 0x00800001, 0x80000003,
      0x7f800000},
     {0x00055555, 0x0010c152, 0x80055555, 0x00080000, 0x3e2aaaaa, 0x00000000, 0x80000000,
      0x7f800000}},
    {F64, 0x1.5555555555555p-1, 0,
     {0x3ff0000000000000, 0x400921fb54442d18, 0xbfefffffffffffff, 0x3ff8000000000001,
      0x7fefffffffffffff, 0x0010000000000001, 0x8000000000000003, 0x7ff0000000000000},
     {0x3fe5555555555555, 0x4000c152382d7365, 0xbfe5555555555554, 0x3ff0000000000000,
      0x7fe5555555555554, 0x000aaaaaaaaaaaab, 0x8000000000000002, 0x7ff0000000000000}},
    {F64, 0x1.5555555555555p-1, -1060, /* by powers of two apart */
     {0x3ff0000000000000, 0x400921fb54442d18, 0xbfefffffffffffff, 0x3ff8000000000001,
      0x7fefffffffffffff, 0x0010000000000001, 0x8000000000000003, 0x7ff0000000000000},
     {0x0000000000002aab, 0x000000000000860b, 0x8000000000002aab, 0x0000000000004000,
      0x3da5555555555554, 0x0000000000000000, 0x8000000000000000, 0x7ff0000000000000}},
    {F16, 0x1.5555555555555p-1, 0,
     {0x3c00, 0x4248, 0xbbff, 0x7bff, 0x0401, 0x8003, 0x03ff, 0x7c00},
     {0x3955, 0x4030, 0xb955, 0x7955, 0x02ab, 0x8002, 0x02aa, 0x7c00}},
    {F16, 0.75, 0, /* ties */
     {0x645b, 0x4e82, 0x3aea, 0x0483, 0x4093, 0x641b, 0x53b6, 0x2495},
     {0x6288, 0x4ce2, 0x3930, 0x0362, 0x3edc, 0x6228, 0x51c8, 0x22e0}},
    {BF16, 0x1.5555555555555p-1, -130,
     {0x3f80, 0x4049, 0xbf7f, 0x7f7f, 0x0081, 0x8003, 0x007f, 0x7f80},
     {0x0005, 0x0011, 0x8005, 0x3e2a, 0x0000, 0x8000, 0x0000, 0x7f80}},
    {BF16, 0.75, 0, /* ties */
     {0x1887, 0x7f52, 0x05fe, 0x131d, 0x532e, 0x066a, 0x5fa5, 0x002a},
     {0x184a, 0x7f1e, 0x05be, 0x12ec, 0x5302, 0x0630, 0x5f78, 0x0020}},
};
enum { SCALING_COUNT = sizeof SCALINGS / sizeof SCALINGS[0] };

static int scales(const scaling_t *trial) {
    numbers_t old, new;
    for (int i = 0; i < LENGTH; i++) put(&old, trial->kind, i, trial->given[i % GIVEN]);
    leaf_t source = leaf_of(trial->kind, &old, LENGTH), target = leaf_of(trial->kind, &new, LENGTH);
    list_t from = list_of(&source), to = list_of(&target);
    factor_t factor = factor_of(trial->significand, trial->exponent);
    scale(&from, &to, &factor, 0, NULL);
    for (int i = 0; i < LENGTH; i++)
        if (get(&new, trial->kind, i) != trial->wanted[i % GIVEN]) return 0;
    return 1;
}

/* ---- roots ---- */

static int root_is(const int64_t found[2], int64_t significand, int64_t exponent) {
    return found[0] == significand && found[1] == exponent;
}

/* Of 2, and of what lies between two float32: (1 + 2^-24)^2. */
static int takes_roots(void) {
    const sum_t two = {.high = 2}, between = {.high = 0x1.000002000001p0};
    int64_t words[WIDE_WORDS] = {0}, root[2];
    if (!certified_root(&two, 1, root) || !root_is(root, (int64_t)0xb504f3 << 29, -52)) return 0;
    if (certified_root(&between, 1, root)) return 0;
    words[-WIDE_UNIT / 32] = 2;
    exact_root(words, WIDE_WORDS, 24, -149, root);
    if (!root_is(root, (int64_t)0xb504f3 << 29, -52)) return 0;
    exact_root(words, WIDE_WORDS, 53, -1074, root);
    return root_is(root, 0x16a09e667f3bcd, -52);
}

static const char *first_fault(void) {
    if (!adds_in_two_parts()) return "a sum in two parts";
    if (!takes_roots()) return "a root";
    for (int i = 0; i < FORMAT_COUNT; i++) {
        const format_t *format = &FORMATS[i];
        if (!adds_exactly(format, 0) || !adds_exactly(format, 1)) return "an exact sum";
        if (!counts_nonfinite(format)) return "a count of NaN and inf";
        if (format->kind != F64 && !adds_in_float64(format)) return "a sum in float64";
    }
    for (int i = 0; i < SCALING_COUNT; i++)
        if (!scales(&SCALINGS[i])) return "a product";
    return NULL;
}

const char *trial_fault(void) {
    fenv_t saved;
    set_ieee(&saved);
    const char *fault = first_fault();
    fesetenv(&saved);
    return fault;
}
