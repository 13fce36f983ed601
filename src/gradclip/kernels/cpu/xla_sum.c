#include "xla_sum.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bits.h"
#include "targets.h"
#include "xla.h"
#include "xla_frame.h"
#include "xla_threads.h"

/* Numbers of an example at a time, at most, and at least where there are so many: their sums in
 * float64 stay in a near cache, and each stretch of memory is long enough to be read ahead. */
enum { COLUMNS = 4096, FEWEST_COLUMNS = 512 };

/* What becomes of an example. */
typedef struct {
    int64_t action;
    factor_t factor; /* 1 where it is kept */
} weight_t;

/* Examples to be added up: of the first sum those come first, and then those of the next. */
typedef struct {
    const leaf_t *from; /* the first example */
    leaf_t *to;         /* the first sum; `first` is how many blocks are in the leaves before */
    const weight_t *weights;
    int64_t sums, examples, blocks; /* of each sum */
    int64_t columns;                /* of each block */
    _Atomic int64_t next;
} summing_t;

/* ---- one block ---- */

/* x as float32, rounded to odd: what is rounded then to fewer bits is as if rounded once. */
static float odd_of(double x) {
    float nearest = (float)x;
    uint32_t bits = bits_of(nearest) - (fabs((double)nearest) > fabs(x));
    return float_of(bits | (nearest != x));
}

static void put_sums(kind_t kind, const double *sums, int n, char *out) {
    ALIGNED float odd[COLUMNS];
    if (kind == F64) {
        memcpy(out, sums, (size_t)n * sizeof *sums);
    } else if (kind == F32) {
        for (int i = 0; i < n; i++) odd[i] = (float)sums[i];
        memcpy(out, odd, (size_t)n * sizeof *odd);
    } else {
        for (int i = 0; i < n; i++) odd[i] = odd_of(sums[i]);
        (kind == F16 ? blocks->store_f16 : blocks->store_bf16)(odd, n, (uint16_t *)out);
    }
}

/* If an example adds more than zeros. */
static int adds(const weight_t *weight) {
    return weight->action == XLA_KEEP || weight->action == XLA_SCALE;
}

/* If it does so by a product in float32. */
static int is_plain(kind_t kind, const weight_t *weight) {
    return kind == F32 && adds(weight) && isnormal(weight->factor.narrow);
}

/* sums += an example, its numbers rounded in their own kind. */
static void add_example(kind_t kind, const void *x, int n, const weight_t *weight, double *sums) {
    ALIGNED char scaled[COLUMNS * sizeof(double)];
    ALIGNED float wide[COLUMNS];
    if (!adds(weight)) return;
    if (is_plain(kind, weight)) {
        blocks->add_row_f32(x, weight->factor.narrow, n, sums);
        return;
    }
    if (weight->action == XLA_SCALE) {
        scale_block(kind, x, n, &weight->factor, NULL, scaled);
        x = scaled;
    }
    if (kind == F64) {
        blocks->add_f64(x, n, sums);
        return;
    }
    if (kind != F32) (kind == F16 ? blocks->load_f16 : blocks->load_bf16)(x, n, wide);
    blocks->add_row_f32(kind == F32 ? x : wide, 1, n, sums);
}

/* The sums of n numbers of so many examples, of which each begins `stride` bytes after another. */
static void sum_block(kind_t kind, const char *x, int64_t stride, int n, const weight_t *weights,
                      int64_t examples, double *sums) {
    /* To -0 every number adds itself: one example alone keeps its zeros of either sign. */
    double zero = examples == 1 && adds(weights) ? -0.0 : 0.0;
    for (int i = 0; i < n; i++) sums[i] = zero;
    for (int64_t i = 0; i < examples;) {
        const float *rows[ROWS];
        float factors[ROWS];
        int plain = 0;
        while (plain < ROWS && i + plain < examples && is_plain(kind, &weights[i + plain])) {
            rows[plain] = (const float *)(x + (i + plain) * stride);
            factors[plain] = weights[i + plain].factor.narrow;
            plain++;
        }
        if (plain == ROWS) {
            blocks->add_rows_f32(rows, factors, n, sums);
            i += ROWS;
        } else {
            add_example(kind, x + i * stride, n, &weights[i], sums);
            i++;
        }
    }
}

/* ---- all blocks ---- */

static int64_t blocks_of(const summing_t *job, const leaf_t *leaf) {
    return (leaf->size + job->columns - 1) / job->columns;
}

/* Cut the leaves into blocks of so many columns. */
static void cut(summing_t *job, int64_t leaves, int64_t columns) {
    job->columns = columns;
    job->blocks = 0;
    for (int64_t i = 0; i < leaves; i++) {
        job->to[i].first = job->blocks;
        job->blocks += blocks_of(job, &job->to[i]);
    }
}

/* Add up the blocks that no thread has taken. */
static void columns_share(void *data, int share) {
    summing_t *job = data;
    ALIGNED double sums[COLUMNS];
    int64_t taken, leaf = 0, last = 0;
    (void)share;
    while ((taken = atomic_fetch_add(&job->next, 1)) < job->sums * job->blocks) {
        int64_t sum = taken / job->blocks, block = taken % job->blocks;
        if (sum != last) leaf = 0;
        last = sum;
        while (block - job->to[leaf].first >= blocks_of(job, &job->to[leaf])) leaf++;
        const leaf_t *to = &job->to[leaf];
        int64_t begin = (block - to->first) * job->columns, item = item_size(to->kind);
        int64_t rest = to->size - begin;
        int n = (int)(rest < job->columns ? rest : job->columns);
        const char *x = job->from[leaf].data + (sum * job->examples * to->size + begin) * item;
        sum_block(to->kind, x, to->size * item, n, job->weights + sum * job->examples,
                  job->examples, sums);
        put_sums(to->kind, sums, n, to->data + (sum * to->size + begin) * item);
    }
}

/* What XLA_DECISIONs say. Returns NULL if memory runs out. */
static weight_t *weights_of(const int64_t *decisions, int64_t count) {
    weight_t *weights = malloc(((size_t)count + 1) * sizeof *weights);
    for (int64_t i = 0; weights && i < count; i++, decisions += XLA_DECISION) {
        weights[i].action = decisions[0];
        weights[i].factor = decisions[0] == XLA_SCALE ? factor_in(decisions) : factor_of(0.5, 1);
    }
    return weights;
}

void *give_clipped_sum(const frame_t *frame) {
    int64_t sums = attribute(frame, "batch");
    const buffer_t *decisions = frame->arguments.buffers[0];
    int64_t all = elements(decisions) / XLA_DECISION;
    list_t source, target;
    if (!sums) return NULL;
    leaf_t *from = leaves_of(&frame->arguments, 1, all ? all : 1, &source);
    leaf_t *to = leaves_of(&frame->results, 0, sums, &target);
    weight_t *weights = weights_of(decisions->data, all);
    int failed = !from || !to || !weights;
    if (!failed) {
        summing_t job = {
            .from = from, .to = to, .weights = weights, .sums = sums, .examples = all / sums};
        int threads = threads_worth(frame, bytes_of(&source) * (uint64_t)all);
        cut(&job, target.count, COLUMNS);
        while (job.sums * job.blocks < 4 * threads && job.columns > FEWEST_COLUMNS)
            cut(&job, target.count, job.columns / 2); /* else one thread ends long after another */
        failed = walk_on_xla(frame, columns_share, &job, threads) < 0;
    }
    free(from);
    free(to);
    free(weights);
    return failed ? failure(frame, RESOURCE_EXHAUSTED, "gradclip: no memory or no such dtype") : NULL;
}
