/* What XLA calls on the CPU, by its foreign function interface: totals, roots, scaling; sums of
 * clipped examples are in xla_sum.c. */
#include "xla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ieee.h"
#include "xla_frame.h"
#include "xla_sum.h"
#include "xla_threads.h"

/* ---- totals and roots ---- */

/* Put the total of a list into XLA_WORDS words. Returns -1 if memory runs out. */
static int add_up(const frame_t *frame, list_t *list, int threads, int64_t *words) {
    total_t *totals = calloc((size_t)threads, sizeof *totals);
    if (!totals) return -1;
    job_t job = {.list = list, .totals = totals};
    atomic_store(&list->cursor, 0);
    int shares = walk_on_xla(frame, exact_share, &job, threads);
    memset(words, 0, XLA_WORDS * sizeof *words);
    for (int share = 0; share < shares; share++)
        add_total(&totals[share], words, words + XLA_WORDS - COUNTS);
    free(totals);
    return shares < 0 ? -1 : 0;
}

/* A norm as XLA's graphs have it: a significand of 53 bits and an exponent, if it is inf, if NaN. */
static void put_norm(const int64_t *words, int64_t wide, int64_t *number) {
    exact_root(words, XLA_WORDS - COUNTS, wide ? 53 : 24, wide ? -1074 : -149, number);
    number[3] = words[XLA_WORDS - COUNTS + NAN_COUNT] > 0;
    number[2] = !number[3] && words[XLA_WORDS - COUNTS + INF_COUNT] > 0;
}

/* The norm of a list, from float64 sums where they prove it. Returns -1 if memory runs out. */
static int put_norm_of(const frame_t *frame, list_t *list, int threads, int64_t wide,
                       int64_t *number) {
    int64_t words[XLA_WORDS];
    if (!wide && !list->has_f64) {
        sum_t sums[MOST_THREADS];
        job_t job = {.list = list, .sums = sums};
        atomic_store(&list->cursor, 0);
        int shares = walk_on_xla(frame, sum_share, &job, threads);
        if (shares < 0) return -1;
        int inf = 0, nan = 0;
        for (int i = 0; i < shares; i++) inf |= sums[i].has_inf, nan |= sums[i].has_nan;
        if (inf || nan || certified_root(sums, shares, number)) {
            number[2] = inf && !nan;
            number[3] = nan;
            return 0;
        }
    }
    if (add_up(frame, list, threads, words) < 0) return -1;
    put_norm(words, wide, number);
    return 0;
}

/* The exact norm of one leaf, whose words are added to `all`. Returns -1 if memory runs out. */
static int put_exactly(const frame_t *frame, const leaf_t *leaf, int64_t *all, int64_t *number) {
    leaf_t only = *leaf;
    list_t list;
    int64_t words[XLA_WORDS];
    list_leaves(&list, &only, 1);
    if (add_up(frame, &list, threads_worth(frame, bytes_of(&list)), words) < 0) return -1;
    put_norm(words, leaf->kind == F64, number);
    for (int i = 0; i < XLA_WORDS; i++) all[i] += words[i];
    return 0;
}

/* 1 and the norm, if sums prove it or tell that it is none, else 0. */
static int put_certified(const sum_t *sum, int64_t *number) {
    if (!sum->has_inf && !sum->has_nan && !certified_root(sum, 1, number)) return 0;
    number[2] = sum->has_inf && !sum->has_nan;
    number[3] = sum->has_nan;
    return 1;
}

/* The norm of each leaf, after that of all, from float64 sums where they prove it, in one pass.
 * Returns -1 if memory runs out. */
static int put_norms_of(const frame_t *frame, list_t *list, int64_t wide, int64_t *numbers) {
    int threads = threads_worth(frame, bytes_of(list)), exact = 0;
    int64_t all[XLA_WORDS] = {0};
    sum_t *sums = calloc((size_t)(list->count * threads) + 1, sizeof *sums);
    if (!sums) return -1;
    job_t job = {.list = list, .sums = sums};
    atomic_store(&list->cursor, 0);
    int shares = walk_on_xla(frame, sum_each_share, &job, threads), failed = shares < 0;
    for (int64_t i = 0; i < list->count && !failed; i++) {
        const leaf_t *leaf = &list->leaves[i];
        sum_t sum = sum_of_sums(&sums[i], shares, list->count);
        int64_t *number = numbers + (i + 1) * XLA_NUMBER;
        if (leaf->kind != F64 && put_certified(&sum, number)) continue;
        failed = put_exactly(frame, leaf, all, number) < 0;
        exact++;
    }
    sum_t sum = sum_of_sums(sums, failed ? 0 : shares * list->count, 1);
    free(sums);
    if (failed) return -1;
    if (!wide && put_certified(&sum, numbers)) return 0;
    /* Where sums did for some leaves, the exact sum takes another look at them. */
    if (exact < list->count && add_up(frame, list, threads, all) < 0) return -1;
    put_norm(all, wide, numbers);
    return 0;
}

/* Members of a batch, to be measured. */
typedef struct {
    const frame_t *frame;
    const leaf_t *leaves; /* of the first member */
    int64_t count, batch, at_once;
    int threads; /* that share a member */
    int as_norm;
    int64_t wide, *out;
    _Atomic int64_t next;
    _Atomic int failed;
} members_t;

/* Measure one member, in the room for its leaves. Returns -1 if memory runs out. */
static int measure_member(const members_t *members, int64_t member, leaf_t *leaves) {
    list_t list;
    for (int64_t i = 0; i < members->count; i++) {
        leaves[i] = members->leaves[i];
        leaves[i].data += member * leaves[i].size * item_size(leaves[i].kind);
    }
    list_leaves(&list, leaves, members->count);
    if (members->as_norm)
        return put_norm_of(members->frame, &list, members->threads, members->wide,
                           members->out + member * XLA_NUMBER);
    return add_up(members->frame, &list, members->threads, members->out + member * XLA_WORDS);
}

/* Measure those that no thread has taken. */
static void measure_share(void *data, int share) {
    members_t *members = data;
    leaf_t *leaves = malloc(((size_t)members->count + 1) * sizeof *leaves);
    int64_t begin;
    (void)share;
    if (!leaves) members->failed = 1;
    while (!members->failed &&
           (begin = atomic_fetch_add(&members->next, members->at_once)) < members->batch) {
        int64_t end = begin + members->at_once;
        if (end > members->batch) end = members->batch;
        for (int64_t member = begin; member < end; member++)
            if (measure_member(members, member, leaves) < 0) members->failed = 1;
    }
    free(leaves);
}

/* Of leaves, for each member of a batch: the words of the total, or the norm. Threads share the
 * members, or each member, where those are few and large. */
static void *measure(const frame_t *frame, int as_norm) {
    enum { FEW = 4 }; /* for each thread: the last one to end may have a fifth more than the first */
    int64_t batch = attribute(frame, "batch");
    list_t list;
    if (!batch) return NULL;
    leaf_t *leaves = leaves_of(&frame->arguments, 0, batch, &list);
    if (!leaves) return failure(frame, INVALID_ARGUMENT, "gradclip: no memory or no such dtype");
    int all = threads_worth(frame, bytes_of(&list) * (uint64_t)batch);
    int each = batch < FEW * all ? threads_worth(frame, bytes_of(&list)) : 1;
    members_t members = {.frame = frame,
                         .leaves = leaves,
                         .count = list.count,
                         .batch = batch,
                         .at_once = 1 + CHUNK / (list.size + CHUNK / 64),
                         .threads = each,
                         .as_norm = as_norm,
                         .wide = attribute(frame, "wide"),
                         .out = frame->results.buffers[0]->data};
    int shares = walk_on_xla(frame, measure_share, &members, each > 1 ? 1 : all);
    free(leaves);
    return shares < 0 || members.failed ? failure(frame, RESOURCE_EXHAUSTED, "gradclip: no memory")
                                        : NULL;
}

static void *give_norm(const frame_t *frame) { return measure(frame, 1); }

static void *give_total(const frame_t *frame) { return measure(frame, 0); }

/* Put leaves on to the next member of a batch. */
static void next_member(leaf_t *leaves, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        leaves[i].data += leaves[i].size * item_size(leaves[i].kind);
}

static void *give_norms(const frame_t *frame) {
    int64_t batch = attribute(frame, "batch"), wide = attribute(frame, "wide");
    int64_t *numbers = frame->results.buffers[0]->data;
    list_t list;
    if (!batch) return NULL;
    leaf_t *leaves = leaves_of(&frame->arguments, 0, batch, &list);
    int failed = !leaves;
    for (int64_t member = 0; member < batch && !failed; member++) {
        failed = put_norms_of(frame, &list, wide, numbers) < 0;
        numbers += (list.count + 1) * XLA_NUMBER;
        next_member(leaves, list.count);
    }
    free(leaves);
    return failed ? failure(frame, RESOURCE_EXHAUSTED, "gradclip: no memory or no such dtype") : NULL;
}

/* Of each leaf the words of the total. */
static void *give_totals(const frame_t *frame) {
    int64_t batch = attribute(frame, "batch"), *words = frame->results.buffers[0]->data;
    list_t list;
    if (!batch) return NULL;
    leaf_t *leaves = leaves_of(&frame->arguments, 0, batch, &list);
    int failed = !leaves;
    for (int64_t member = 0; member < batch && !failed; member++) {
        for (int64_t i = 0; i < list.count && !failed; i++, words += XLA_WORDS) {
            int64_t number[XLA_NUMBER];
            memset(words, 0, XLA_WORDS * sizeof *words);
            failed = put_exactly(frame, &list.leaves[i], words, number) < 0;
        }
        next_member(leaves, list.count);
    }
    free(leaves);
    return failed ? failure(frame, RESOURCE_EXHAUSTED, "gradclip: no memory or no such dtype") : NULL;
}

static void *give_root(const frame_t *frame) {
    int64_t wide = attribute(frame, "wide");
    const buffer_t *words = frame->arguments.buffers[0];
    int64_t *number = frame->results.buffers[0]->data;
    for (int64_t member = 0; member < elements(words) / XLA_WORDS; member++)
        put_norm((const int64_t *)words->data + member * XLA_WORDS, wide,
                 number + member * XLA_NUMBER);
    return NULL;
}

/* ---- scaling ---- */

/* Every element NaN. */
static void fill_nan(const leaf_t *leaf) {
    for (int64_t i = 0; i < leaf->size; i++) {
        char *at = leaf->data + i * item_size(leaf->kind);
        const float narrow = NAN;
        const double wide = NAN;
        const uint16_t half = 0x7e00, bfloat = 0x7fc0;
        switch (leaf->kind) {
        case F64: memcpy(at, &wide, sizeof wide); break;
        case F16: memcpy(at, &half, sizeof half); break;
        case BF16: memcpy(at, &bfloat, sizeof bfloat); break;
        default: memcpy(at, &narrow, sizeof narrow);
        }
    }
}

/* Fill a leaf, or copy it, as an XLA_DECISION that does not scale says. */
static void put_unscaled(int64_t action, const leaf_t *from, const leaf_t *to) {
    size_t bytes = (size_t)(to->size * item_size(to->kind));
    if (action == XLA_ZERO)
        memset(to->data, 0, bytes);
    else if (action == XLA_NAN)
        fill_nan(to);
    else if (to->data != from->data)
        memcpy(to->data, from->data, bytes);
}

/* Do to leaf i what the i-th XLA_DECISION says, or with a step of 0 to all what the first says: those
 * to be scaled in one walk. There is room for lists as long. Returns -1 if memory runs out. */
static int carry_out(const frame_t *frame, const int64_t *decisions, int step, const list_t *from,
                     const list_t *to, leaf_t *old, leaf_t *new, factor_t *factors) {
    int64_t scaled = 0;
    for (int64_t i = 0; i < to->count; i++) {
        const int64_t *decision = decisions + step * i * XLA_DECISION;
        if (decision[0] == XLA_SCALE) {
            old[scaled] = from->leaves[i];
            new[scaled] = to->leaves[i];
            factors[scaled++] = factor_in(decision);
        } else {
            put_unscaled(decision[0], &from->leaves[i], &to->leaves[i]);
        }
    }
    list_t source, target;
    list_leaves(&source, old, scaled);
    list_leaves(&target, new, scaled);
    job_t job = {.list = &target, .source = &source, .factors = factors, .step = 1};
    return walk_on_xla(frame, scale_share, &job, threads_worth(frame, bytes_of(&target)));
}

static void *give_scaled(const frame_t *frame) {
    int64_t batch = attribute(frame, "batch");
    const int64_t *decisions = frame->arguments.buffers[0]->data;
    list_t source, target;
    if (!batch) return NULL;
    leaf_t *from = leaves_of(&frame->arguments, 1, batch, &source);
    leaf_t *to = leaves_of(&frame->results, 0, batch, &target);
    int64_t count = frame->results.count, step = attribute(frame, "each");
    leaf_t *old = malloc((size_t)(count + 1) * sizeof *old);
    leaf_t *new = malloc((size_t)(count + 1) * sizeof *new);
    factor_t *factors = malloc((size_t)(count + 1) * sizeof *factors);
    int failed = !from || !to || !old || !new || !factors;
    for (int64_t member = 0; member < batch && !failed; member++) {
        failed = carry_out(frame, decisions, (int)step, &source, &target, old, new, factors) < 0;
        decisions += (step ? count : 1) * XLA_DECISION;
        next_member(from, source.count);
        next_member(to, target.count);
    }
    free(from);
    free(to);
    free(old);
    free(new);
    free(factors);
    return failed ? failure(frame, RESOURCE_EXHAUSTED, "gradclip: no memory or no such dtype") : NULL;
}

/* ---- what XLA calls ---- */

/* If XLA asks what this was written for; it has been told. */
static int is_a_question(const frame_t *frame) {
    for (extension_t *each = frame->extensions; each; each = each->next)
        if (each->type == METADATA) {
            version_t *version = &((metadata_extension_t *)each)->metadata->version;
            version->major = XLA_MAJOR;
            version->minor = XLA_MINOR;
            return 1;
        }
    return 0;
}

static void *answer(void *data, void *(*give)(const frame_t *)) {
    const frame_t *frame = data;
    fenv_t saved;
    if (is_a_question(frame)) return NULL;
    set_ieee(&saved);
    void *failed = give(frame);
    fesetenv(&saved);
    return failed;
}

static void *xla_norm(void *frame) { return answer(frame, give_norm); }

static void *xla_norms(void *frame) { return answer(frame, give_norms); }

static void *xla_totals(void *frame) { return answer(frame, give_totals); }

static void *xla_total(void *frame) { return answer(frame, give_total); }

static void *xla_root(void *frame) { return answer(frame, give_root); }

static void *xla_scale(void *frame) { return answer(frame, give_scaled); }

static void *xla_clipped_sum(void *frame) { return answer(frame, give_clipped_sum); }

const xla_handler_t XLA_HANDLERS[] = {
    {"gradclip_norm", xla_norm},
    {"gradclip_norms", xla_norms},
    {"gradclip_total", xla_total},
    {"gradclip_totals", xla_totals},
    {"gradclip_root", xla_root},
    {"gradclip_scale", xla_scale},
    {"gradclip_clipped_sum", xla_clipped_sum},
    {NULL, NULL},
};
