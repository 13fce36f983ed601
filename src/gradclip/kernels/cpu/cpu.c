#include "cpu.h"

#include <math.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum { BLOCK = 4096, BLOCK_F64 = 2048 };
enum { PIECE = 512 }; /* of a float16 block, while it is float32 */
/* Of buffers: a vector that lies across two cache lines takes twice as long. */
#define ALIGNED _Alignas(64)
enum { STREAMED = 1024 }; /* numbers scaled at a time, to be written past the caches */
enum { LARGE = 1 << 21 }; /* so many numbers do not stay in a cache until they are read */
enum { F32_SPREAD = 26, F64_SPREAD = 22 }; /* binades that one window of exact sums spans */
static const uint64_t F64_INFINITE = (uint64_t)0x7ff << 52;

typedef struct {
    uint64_t sums[3];
    uint64_t top;    /* bits of the largest |x| */
    uint64_t bottom; /* bits of the smallest nonzero |x|, 0 if there is none */
} window_t;

/* The float32 window adds up in this many lanes, and this many squares between two integers. */
enum { LANES = 16, STEPS = 4 };
typedef struct {
    uint64_t s1[LANES], s2[LANES];
    uint32_t top[LANES], bottom[LANES];
} lanes_t;

typedef struct {
    double (*sum_f32)(const float *, int);
    double (*sum_bf16)(const uint16_t *, int);
    double (*sum_f16)(const uint16_t *, int);
    void (*load_bf16)(const uint16_t *, int, float *);
    void (*load_f16)(const uint16_t *, int, float *);
    window_t (*window_f32)(const float *, int, double, double);
    window_t (*window_f64)(const double *, int, double, double, double);
    uint32_t (*select_f32)(const float *, int, uint32_t, uint32_t, float *);
    uint64_t (*select_f64)(const double *, int, uint64_t, uint64_t, double, double *);
    void (*scale_f32)(const float *, int, float, float *);
    void (*scale_f32_wide)(const float *, int, double, float *);
    void (*scale_f64)(const double *, int, double, double *);
    void (*scale_bf16)(const uint16_t *, int, float, uint16_t *);
    void (*scale_f16)(const uint16_t *, int, float, uint16_t *);
    void (*store_bf16)(const float *, int, uint16_t *);
    void (*store_f16)(const float *, int, uint16_t *);
} blocks_t;

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) ((void)(address))
#endif

/* ---- one number ---- */

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint64_t bits_of_double(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline double double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Comparisons below are of signed integers, which every instruction set has for vectors. */

static inline float float_of_half(uint16_t half) {
    int32_t magnitude = (int32_t)(half & 0x7fff) << 13;
    float normal = float_of((uint32_t)(magnitude + (112 << 23)));
    /* With the exponent of 2^-14 put in, the leading one that a subnormal lacks is subtracted. */
    float subnormal = float_of((uint32_t)(magnitude + (113 << 23))) - 0x1p-14f;
    float special = float_of((uint32_t)magnitude | 0x7f800000);
    float x = magnitude < (1 << 23) ? subnormal : normal;
    x = magnitude >= (31 << 23) ? special : x;
    return float_of(bits_of(x) | (uint32_t)(half & 0x8000) << 16);
}

static inline uint16_t half_of(float x) {
    int32_t magnitude = (int32_t)(bits_of(x) & 0x7fffffff);
    int32_t sign = (int32_t)(bits_of(x) >> 16 & 0x8000);
    int32_t normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    normal = normal > 0x7c00 ? 0x7c00 : normal;
    /* The last place of 0.5f is the last place of a subnormal half: the addition rounds. */
    int32_t subnormal = (int32_t)(bits_of(float_of((uint32_t)magnitude) + 0.5f) - bits_of(0.5f));
    int32_t nan = 0x7e00 | (magnitude >> 13 & 0x3ff);
    int32_t half = magnitude < (113 << 23) ? subnormal : normal;
    half = magnitude > 0x7f800000 ? nan : half;
    return (uint16_t)(half | sign);
}

static inline uint16_t bfloat_of(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uint32_t nan = bits >> 16 | 0x40;
    return (uint16_t)((int32_t)(bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

/* ---- the block loops, once for each set of instructions ---- */

#define AVX512 "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl"
#if defined(__clang__)
#define TARGET_BEGIN_(text) _Pragma(#text)
#define TARGET_BEGIN(flags) \
    TARGET_BEGIN_(clang attribute push(__attribute__((target(flags))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#define TARGET_AVX512 TARGET_BEGIN(AVX512)
#elif defined(__GNUC__)
#define TARGET_BEGIN_(text) _Pragma(#text)
#define TARGET_BEGIN(flags) _Pragma("GCC push_options") TARGET_BEGIN_(GCC target(flags))
#define TARGET_END _Pragma("GCC pop_options")
/* Clang takes whole vectors by itself, and would drop all of the flags for one it does not know. */
#define TARGET_AVX512 TARGET_BEGIN(AVX512) TARGET_BEGIN_(GCC target("prefer-vector-width=512"))
#endif

/* Each copy of the loops has NAME(x), to give it its own names; SQUARE_ADD(v, sum), by fma where
 * that is one instruction; and CONVERT_HALVES and CONVERT_TO_HALVES, which convert as many float16
 * as they can and return how many. The squares are exact, so fma makes no difference but in time;
 * Clang makes no vectors of a sum by fma. */
#define NAME(x) x##_baseline
#if defined(__FP_FAST_FMA) && !defined(__clang__)
#define SQUARE_ADD(v, sum) fma(v, v, sum)
#else
#define SQUARE_ADD(v, sum) ((sum) + (v) * (v))
#endif
#define CONVERT_HALVES(x, n, out) 0
#define CONVERT_TO_HALVES(x, n, out) 0
#include "cpu_blocks.h"
#undef NAME
#undef SQUARE_ADD
#undef CONVERT_HALVES
#undef CONVERT_TO_HALVES

#if defined(__x86_64__) && defined(TARGET_BEGIN)
/* Intrinsics, as compilers do not find this instruction in a loop, and without it float16 takes
 * four times as long to scale. */
#include <cpuid.h>
#include <immintrin.h>

TARGET_BEGIN("avx2,f16c")
static int convert_halves(const uint16_t *x, int n, float *out) {
    int i = 0;
#pragma GCC unroll 4
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    return i;
}

static int convert_to_halves(const float *x, int n, uint16_t *out) {
    int i = 0;
#pragma GCC unroll 4
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    return i;
}
TARGET_END

#if defined(__clang__)
#define SQUARE_ADD(v, sum) ((sum) + (v) * (v))
#else
#define SQUARE_ADD(v, sum) __builtin_fma(v, v, sum)
#endif
#define CONVERT_HALVES convert_halves
#define CONVERT_TO_HALVES convert_to_halves
TARGET_BEGIN("avx2,fma,f16c")
#define NAME(x) x##_avx2
#include "cpu_blocks.h"
#undef NAME
TARGET_END
TARGET_AVX512
#define NAME(x) x##_avx512
#include "cpu_blocks.h"
#undef NAME
TARGET_END
#endif

typedef struct {
    const char *name;
    const blocks_t *blocks;
} kernel_t;

static const kernel_t KERNELS[] = {
#if defined(__x86_64__) && defined(TARGET_BEGIN)
    {"avx512", &blocks_avx512},
    {"avx2", &blocks_avx2},
#endif
    {"baseline", &blocks_baseline},
};
enum { KERNEL_COUNT = sizeof KERNELS / sizeof KERNELS[0] };

static int processor_has(const char *name) {
#if defined(__x86_64__) && defined(TARGET_BEGIN)
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    /* Clang's function does not know f16c, which needs no more of the system than avx2 does. */
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
    return !strcmp(name, "baseline");
}

static const kernel_t *chosen = &KERNELS[KERNEL_COUNT - 1];

int choose_kernel(const char *name) {
    for (int i = 0; i < KERNEL_COUNT; i++)
        if (!strcmp(KERNELS[i].name, name) && processor_has(name)) {
            chosen = &KERNELS[i];
            return 0;
        }
    return -1;
}

const char *kernel_name(void) { return chosen->name; }

const char *const *kernel_names(void) {
    static const char *names[KERNEL_COUNT + 1];
    int found = 0;
    for (int i = 0; i < KERNEL_COUNT; i++)
        if (processor_has(KERNELS[i].name)) names[found++] = KERNELS[i].name;
    names[found] = NULL;
    return names;
}

/* ---- walking a list ---- */

int64_t item_size(kind_t kind) {
    switch (kind) {
    case F64: return 8;
    case F32: return 4;
    case F16:
    case BF16: return 2;
    case BYTE: return 1;
    }
    return 0;
}

/* Where a thread stands: it takes a chunk of the list's elements, then block after block in it,
 * none across two leaves. */
typedef struct {
    int64_t at, end;     /* elements of the list: the next one, and the end of the chunk */
    int64_t leaf;
    int64_t begin;       /* the block: its first element within the leaf, and its length */
    int length;
    int new_chunk;
} walk_t;

static int64_t leaf_holding(const list_t *list, int64_t element) {
    int64_t low = 0, high = list->count;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (list->leaves[middle].first <= element)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static int next_block(list_t *list, walk_t *walk) {
    walk->new_chunk = walk->at >= walk->end;
    if (walk->new_chunk) {
        int64_t chunk = atomic_fetch_add(&list->cursor, 1);
        walk->at = chunk * CHUNK;
        if (walk->at >= list->size) return 0;
        walk->end = list->size - walk->at < CHUNK ? list->size : walk->at + CHUNK;
        walk->leaf = leaf_holding(list, walk->at);
    }
    const leaf_t *leaf = &list->leaves[walk->leaf];
    while (walk->at - leaf->first >= leaf->size) leaf = &list->leaves[++walk->leaf];
    walk->begin = walk->at - leaf->first;
    int64_t length = leaf->size - walk->begin;
    int64_t most = leaf->kind == F64 ? BLOCK_F64 : BLOCK;
    if (length > walk->end - walk->at) length = walk->end - walk->at;
    if (length > most) length = most;
    walk->length = (int)length;
    walk->at += length;
    /* The processor reads ahead within an array, not on to the next: that is asked for here. */
    if (length == leaf->size - walk->begin && walk->leaf + 1 < list->count)
        for (int line = 0; line < 8; line++) PREFETCH(leaf[1].data + 64 * line);
    return 1;
}

/* Copy elements between a contiguous block and their places in a strided leaf. */
static void move_strided(const leaf_t *leaf, int64_t begin, int64_t length, void *room,
                         int into_leaf) {
    enum { MAX_NDIM = 66 };
    char *block = room;
    int64_t size = item_size(leaf->kind), index[MAX_NDIM];
    int last = leaf->ndim - 1;
    char *at = leaf->data;
    for (int d = last; d >= 0; d--) {
        index[d] = begin % leaf->shape[d];
        begin /= leaf->shape[d];
        at += index[d] * leaf->strides[d];
    }
    for (int64_t i = 0; i < length; i++) {
        char item[8];
        const char *from = into_leaf ? block : at;
        char *to = into_leaf ? at : block;
        for (int64_t b = 0; b < size; b++) item[b] = from[leaf->swap ? size - 1 - b : b];
        memcpy(to, item, (size_t)size);
        block += size;
        at += leaf->strides[last];
        index[last]++;
        for (int d = last; d > 0 && index[d] == leaf->shape[d]; d--) {
            at += leaf->strides[d - 1] - index[d] * leaf->strides[d];
            index[d] = 0;
            index[d - 1]++;
        }
    }
}

/* A block's elements, contiguous and native: where they lie, or a copy in `room`. */
static const void *fetch(const leaf_t *leaf, int64_t begin, int length, void *room) {
    if (!leaf->ndim) return leaf->data + begin * item_size(leaf->kind);
    move_strided(leaf, begin, length, room, 0);
    return room;
}

/* The same as float32, which holds every kind of 32 bits or fewer exactly. */
static const float *fetch_f32(const leaf_t *leaf, int64_t begin, int length, void *room,
                              float *out) {
    const void *x = fetch(leaf, begin, length, room);
    switch (leaf->kind) {
    case F16: chosen->blocks->load_f16(x, length, out); return out;
    case BF16: chosen->blocks->load_bf16(x, length, out); return out;
    case BYTE:
        for (int i = 0; i < length; i++) out[i] = leaf->decode[((const uint8_t *)x)[i]];
        return out;
    default: return x;
    }
}

typedef union {
    ALIGNED double wide[BLOCK_F64];
    float narrow[BLOCK];
} room_t;

/* ---- the certified sum ---- */

static void add_block(sum_t *sum, double block) {
    double high = sum->high + block; /* TwoSum */
    double part = high - sum->high;
    sum->low += (sum->high - (high - part)) + (block - part);
    sum->high = high;
}

void sum_squares(list_t *list, sum_t *sum) {
    const blocks_t *blocks = chosen->blocks;
    room_t room;
    ALIGNED float out[BLOCK];
    walk_t walk = {0};
    *sum = (sum_t){0};
    while (next_block(list, &walk)) {
        const leaf_t *leaf = &list->leaves[walk.leaf];
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

/* ---- the exact sum ---- */

static void carry(int64_t *words, int count) {
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

static window_t try_window_f32(const float *x, int n, int field, int64_t *words, int *done) {
    int top = 2 * (field - 127) + 2; /* every square in the window is below 2^top */
    double c1 = power_of_two(top + 2), c2 = 1.5 * power_of_two(top - 48);
    int sums = (n + LANES * STEPS - 1) / (LANES * STEPS) * LANES;
    window_t seen = chosen->blocks->window_f32(x, n, c1, c2);
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
    if (!done && top >= infinite) top = chosen->blocks->select_f32(x, n, infinite, infinite, part);
    if (float_of(top) > total->largest) total->largest = float_of(top);
    while (!done && top) {
        int highest = at_least_one(top >> 23);
        uint32_t from = highest - F32_SPREAD > 1 ? (uint32_t)(highest - F32_SPREAD) << 23 : 0;
        int selected;
        top = chosen->blocks->select_f32(x, n, from, below, part);
        try_window_f32(part, n, highest, total->narrow, &selected);
        below = from;
    }
}

static window_t try_window_f64(const double *x, int n, int field, int shift, int64_t *words,
                               int *done) {
    int top = 2 * (field - 1023) + 2;
    double c1 = power_of_two(top + 1), c2 = 1.5 * power_of_two(top - 49),
           c3 = 1.5 * power_of_two(top - 99);
    window_t seen = chosen->blocks->window_f64(x, n, c1, c2, c3);
    *done = fits(seen.top, seen.bottom, 52, field, F64_SPREAD);
    if (*done) {
        add_at(words, WIDE_UNIT, units(seen.sums[0], n, c1), top - 51 + shift);
        add_at(words, WIDE_UNIT, units(seen.sums[1], 2 * n, c2), top - 101 + shift);
        add_at(words, WIDE_UNIT, units(seen.sums[2], n, c3), top - 151 + shift);
    }
    return seen;
}

/* words += sum of (x * 2^(shift/2))^2, for x that are zero or moderate: class by class of
 * exponents, from the top. */
static void peel_f64(const double *x, int n, int shift, int64_t *words) {
    ALIGNED double part[BLOCK_F64];
    uint64_t below = F64_INFINITE;
    uint64_t top = chosen->blocks->select_f64(x, n, below, below, 1, part);
    while (top) {
        int selected, highest = (int)(top >> 52);
        uint64_t from = (uint64_t)(highest - F64_SPREAD) << 52;
        top = chosen->blocks->select_f64(x, n, from, below, 1, part);
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
    uint64_t top = seen.top;
    if (top >= F64_INFINITE)
        top = chosen->blocks->select_f64(x, n, F64_INFINITE, F64_INFINITE, 1, part);
    if (double_of(top) > total->largest) total->largest = double_of(top);
    if (done) return;
    chosen->blocks->select_f64(x, n, high, F64_INFINITE, 0x1p-600, part);
    peel_f64(part, n, 1200, total->wide);
    chosen->blocks->select_f64(x, n, low, high, 1, part);
    peel_f64(part, n, 0, total->wide);
    chosen->blocks->select_f64(x, n, 0, low, 0x1p600, part);
    peel_f64(part, n, -1200, total->wide);
}

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

/* ---- the root ---- */

enum { MOST_WORDS = 160 };

static int bit_at(const int64_t *words, int64_t place) {
    return (int)(words[place >> 5] >> (place & 31) & 1);
}

static int any_below(const int64_t *words, int64_t place) {
    for (int64_t j = 0; j < place >> 5; j++)
        if (words[j]) return 1;
    return (words[place >> 5] & (((int64_t)1 << (place & 31)) - 1)) != 0;
}

void exact_root(const int64_t *words, int count, int precision, int lowest, int64_t root[2]) {
    int64_t sum[MOST_WORDS + 1] = {0};
    memcpy(sum, words, (size_t)count * sizeof *sum);
    carry(sum, count + 1);
    int64_t length = 32 * (count + 1);
    while (length && !bit_at(sum, length - 1)) length--;
    root[0] = root[1] = 0;
    if (!length) return;
    int64_t last = (length + 1) / 2 + WIDE_UNIT / 2 - precision;
    if (last < lowest) last = lowest;
    /* In halves of the last place, whose square is bit `first`: digit by digit, two bits at a time.
     * The remainder is at most twice the root, of 54 bits. */
    int64_t first = 2 * (last - 1) - WIDE_UNIT;
    uint64_t halves = 0, rest = 0;
    for (int64_t place = first + (length > first ? (length - first) / 2 * 2 : 0); place >= first;
         place -= 2) {
        rest = rest << 2 | (uint64_t)(bit_at(sum, place + 1) << 1 | bit_at(sum, place));
        uint64_t trial = halves << 2 | 1;
        halves <<= 1;
        if (rest >= trial) {
            rest -= trial;
            halves |= 1;
        }
    }
    int inexact = rest != 0 || any_below(sum, first);
    uint64_t places = halves >> 1;
    places += halves & 1 && (inexact || places & 1);
    while (places && places < (uint64_t)1 << 52) {
        places <<= 1;
        last--;
    }
    while (places >> 53) { /* a carry out of 53 bits: the last is 0 */
        places >>= 1;
        last++;
    }
    root[0] = (int64_t)places;
    root[1] = places ? last : 0;
}

/* See certified_norm in _exact.py, which does the same for the walks that Python asks for. */
static const double BOUND = (4096 + 16) * 0x1p-53;

/* To the nearest float32, its largest exponent lifted, its smallest kept. */
static double round24(double x) {
    int exponent;
    double significand = frexp(x, &exponent);
    return exponent < -125 ? (float)x : ldexp((float)significand, exponent);
}

int certified_root(const sum_t *sums, int count, int64_t root[2]) {
    sum_t total = {0};
    for (int i = 0; i < count; i++) add_block(&total, sums[i].high);
    for (int i = 0; i < count; i++) add_block(&total, sums[i].low);
    double sum = total.high + total.low;
    double low = round24(sqrt(sum * (1 - BOUND))), high = round24(sqrt(sum * (1 + BOUND)));
    int exponent;
    root[0] = (int64_t)(frexp(low, &exponent) * 0x1p53);
    root[1] = root[0] ? exponent - 53 : 0;
    return low == high;
}

/* ---- scaling ---- */

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

static void scale_block(const leaf_t *leaf, const void *x, int n, const factor_t *factor,
                        const uint8_t *recode, void *out) {
    const blocks_t *blocks = chosen->blocks;
    ALIGNED float wide[BLOCK];
    int direct = isnormal(factor->narrow);
    switch (leaf->kind) {
    case F64:
        blocks->scale_f64(x, n, factor->shift == 1 ? factor->wide : factor->shift, out);
        if (factor->shift != 1) {
            blocks->scale_f64(out, n, factor->shift, out);
            blocks->scale_f64(out, n, factor->wide, out);
        }
        return;
    case F32:
        if (direct)
            blocks->scale_f32(x, n, factor->narrow, out);
        else
            blocks->scale_f32_wide(x, n, factor->narrow_wide, out);
        return;
    case F16:
        if (direct) {
            blocks->scale_f16(x, n, factor->narrow, out);
            return;
        }
        blocks->load_f16(x, n, wide);
        blocks->scale_f32_wide(wide, n, factor->narrow_wide, wide);
        blocks->store_f16(wide, n, out);
        return;
    case BF16:
        if (direct) {
            blocks->scale_bf16(x, n, factor->narrow, out);
            return;
        }
        blocks->load_bf16(x, n, wide);
        blocks->scale_f32_wide(wide, n, factor->narrow_wide, wide);
        blocks->store_bf16(wide, n, out);
        return;
    case BYTE:
        for (int i = 0; i < n; i++) ((uint8_t *)out)[i] = recode[((const uint8_t *)x)[i]];
    }
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
static void scale_past_caches(const leaf_t *leaf, const char *x, int n, const factor_t *factor,
                              const uint8_t *recode, char *to) {
    ALIGNED char piece[STREAMED * sizeof(double)];
    int64_t item = item_size(leaf->kind);
    for (int i = 0; i < n; i += STREAMED) {
        int length = n - i < STREAMED ? n - i : STREAMED;
        scale_block(leaf, x + i * item, length, factor, recode, piece);
        stream(to + i * item, piece, length * item);
    }
}

void scale(const list_t *source, list_t *target, const factor_t *factor,
           const uint8_t *const *recode) {
    room_t room;
    walk_t walk = {0};
    int large = target->size >= LARGE;
    while (next_block(target, &walk)) {
        const leaf_t *from = &source->leaves[walk.leaf], *to = &target->leaves[walk.leaf];
        const uint8_t *codes = recode ? recode[walk.leaf] : NULL;
        const void *x = fetch(from, walk.begin, walk.length, &room);
        char *place = to->data + walk.begin * item_size(to->kind);
        if (to->ndim) {
            scale_block(to, x, walk.length, factor, codes, &room);
            move_strided(to, walk.begin, walk.length, &room, 1);
        } else if (large && from->data != to->data) {
            scale_past_caches(to, x, walk.length, factor, codes, place);
        } else {
            scale_block(to, x, walk.length, factor, codes, place);
        }
    }
#if defined(__SSE2__)
    _mm_sfence(); /* what was streamed is seen by other threads from here on */
#endif
}
