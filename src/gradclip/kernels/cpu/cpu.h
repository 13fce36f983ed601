/* Sums of squares and scaling over a list of strided arrays, on any number of threads.
 *
 * A caller fills an array of leaf_t and lists it; each of its threads calls the same one of the
 * three walks, or shares, on the same list_t. They share out the work through list_t.cursor. */
#ifndef GRADCLIP_CPU_H
#define GRADCLIP_CPU_H

#include <stdatomic.h>
#include <stdint.h>

/* ---- lists of leaves ---- */

typedef enum { F32, F64, F16, BF16, BYTE } kind_t;

static inline int64_t item_size(kind_t kind) {
    switch (kind) {
    case F64: return 8;
    case F32: return 4;
    case F16:
    case BF16: return 2;
    case BYTE: return 1;
    }
    return 0;
}

typedef struct {
    char *data;
    int64_t size;            /* real numbers in it; a complex element holds two */
    int64_t first;           /* how many stand in the leaves before it */
    kind_t kind;
    int swap;                /* bytes stand in the other order */
    int ndim;                /* 0: contiguous, aligned and native; else read it through strides */
    const int64_t *shape;    /* outermost first; neighbours that can be one dimension are one */
    const int64_t *strides;  /* in bytes, never negative */
    const float *decode;     /* BYTE: the value of each of the 256 bytes */
} leaf_t;

typedef struct {
    const leaf_t *leaves;
    int64_t count;
    int64_t size;
    int has_f64;
    _Atomic int64_t cursor;  /* the next chunk that no thread has taken */
} list_t;

/* Elements that one thread takes at a time. */
enum { CHUNK = 65536 };

/* List leaves, of which each comes to know its place. Returns 0, or -1 where int64 cannot count
 * their elements. */
int list_leaves(list_t *list, leaf_t *leaves, int64_t count);

/* Bytes of all leaves. Where they run over, an array is broadcast: no memory has so many. */
uint64_t bytes_of(const list_t *list);

/* ---- sums of squares ---- */

typedef struct {
    double high, low;        /* their sum is the sum of squares, see sum_squares */
    int has_inf, has_nan;
} sum_t;

/* Words of the two accumulators: value = sum of word[j] * 2^(32 j + unit). After the value come
 * the count of Inf and the count of NaN. */
enum { NARROW_WORDS = 22, NARROW_UNIT = -384, WIDE_WORDS = 134, WIDE_UNIT = -2176 };
enum { INF_COUNT = 0, NAN_COUNT = 1, COUNTS = 2 };

typedef struct {
    int64_t narrow[NARROW_WORDS + COUNTS];
    int64_t wide[WIDE_WORDS + COUNTS];
    double largest;          /* the largest finite |x| */
} total_t;

/* Add up x^2 over what this thread takes: each block of 4096 in any order, the blocks in
 * double-double. F64 leaves are passed over. */
void sum_squares(list_t *list, sum_t *sum);

/* Several sums as one: the first and every step-th after it, so many in all. */
sum_t sum_of_sums(const sum_t *sums, int64_t count, int64_t step);

/* As sum_squares, exactly, F64 leaves too. The words of `total` are carry-normalised. */
void exact_squares(list_t *list, total_t *total);

/* Add a total to WIDE_WORDS words of unit WIDE_UNIT and to COUNTS counts. */
void add_total(const total_t *total, int64_t *words, int64_t *counts);

/* Take what is over 32 bits of each word but the last to the next. */
void carry(int64_t *words, int count);

/* ---- roots ---- */

/* Whether sums prove the correctly rounded float32 norm: 1 and root as in exact_root, or 0. */
int certified_root(const sum_t *sums, int count, int64_t root[2]);

/* The root of `count` words of unit WIDE_UNIT, rounded once, ties to even, to `precision` bits whose
 * last place is not below 2^lowest: root[0] * 2^root[1], root[0] of 53 bits or 0. */
void exact_root(const int64_t *words, int count, int precision, int lowest, int64_t root[2]);

/* ---- scaling ---- */

typedef struct {
    float narrow;            /* leaves of 32 bits or fewer: x * narrow in float32, or, where */
    double narrow_wide;      /* narrow is not a normal float32, x * narrow_wide in float64 */
    double wide, shift;      /* float64 leaves: x * shift * shift * wide; shift is 1 or tiny */
} factor_t;

/* The factor significand * 2^exponent; the significand lies in [0.5, 1), or is 0. */
factor_t factor_of(double significand, int64_t exponent);

/* out = x * factor for at most BLOCK contiguous numbers, of F64 BLOCK_F64. recode is of BYTE. */
void scale_block(kind_t kind, const void *x, int n, const factor_t *factor, const uint8_t *recode,
                 void *out);

/* target = source * factor: leaf i by factors[i], or with a step of 0 all by the first. Both lists
 * have the same sizes and the same strides. recode[i] maps the bytes of leaf i where it is of kind
 * BYTE. */
void scale(const list_t *source, list_t *target, const factor_t *factors, int step,
           const uint8_t *const *recode);

/* ---- a walk that threads share ---- */

/* What a thread does of a job, being the so-manieth that came. */
typedef void share_t(void *job, int share);

typedef struct {
    list_t *list;
    sum_t *sums;     /* of sum_share: one for each share; of sum_each_share: for each leaf of it */
    total_t *totals; /* of exact_share */
    const list_t *source; /* of scale_share, as in scale */
    const factor_t *factors;
    int step;
    const uint8_t *const *recode;
} job_t;

share_t sum_share, sum_each_share, exact_share, scale_share;

/* ---- the kernel in use ---- */

/* Choose the instructions to use: a name from kernel_names() that this processor has.
 * Returns 0, or -1 for any other name. */
int choose_kernel(const char *name);
const char *kernel_name(void);
/* Ends with NULL; widest first; only those that this processor has. */
const char *const *kernel_names(void);

/* Try the kernel in use: NULL, or what it gets wrong. */
const char *trial_fault(void);

#endif
