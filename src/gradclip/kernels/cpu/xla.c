/* What XLA calls on the CPU, by its foreign function interface: exact totals, their roots, scaling.
 *
 * The structures below are those of the interface, as xla/ffi/api/c_api.h describes it, up to the
 * last field that is read here. Each says its own size, so that later ones may be longer. */
#include "xla.h"

#include <fenv.h>
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

/* ---- the interface ---- */

typedef struct extension {
    size_t size;
    int type;
    struct extension *next;
} extension_t;

enum { METADATA = 1 }; /* an extension by which XLA asks what a handler was written for */

typedef struct {
    size_t size;
    extension_t *extensions;
    int major, minor;
} version_t;

typedef struct {
    size_t size;
    version_t version;
} metadata_t;

typedef struct {
    extension_t head;
    metadata_t *metadata;
} metadata_extension_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    int dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
} buffer_t;

enum { F16_TYPE = 10, F32_TYPE = 11, F64_TYPE = 12, C64_TYPE = 15, BF16_TYPE = 16, C128_TYPE = 18 };

typedef struct {
    size_t size;
    extension_t *extensions;
    int64_t count;
    int *types;
    buffer_t **buffers;
} buffers_t;

typedef struct {
    const char *text;
    size_t length;
} span_t;

typedef struct {
    int dtype;
    int64_t *value;
} scalar_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    int64_t count;
    int *types;
    span_t **names;
    scalar_t **values;
} attributes_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    const char *message;
    int code;
} error_args_t;

enum { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8 };

typedef struct {
    size_t size;
    extension_t *extensions;
    void *context;
    void (*task)(void *);
    void *data;
} schedule_args_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    void *context;
    int64_t *threads;
} threads_args_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    version_t version;
    const void *internal;
    void *(*create_error)(error_args_t *);
    void *(*message_of_error)(void *);
    void (*destroy_error)(void *);
    void *others[8];
    void *(*schedule)(schedule_args_t *);
    void *(*count_threads)(threads_args_t *);
} api_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    const api_t *api;
    void *context;
    int stage;
    buffers_t arguments;
    buffers_t results;
    attributes_t attributes;
} frame_t;

/* As `XLA_FFI_Error_Destroy_Args`. */
typedef struct {
    size_t size;
    extension_t *extensions;
    void *error;
} destroy_args_t;

static void *error(const frame_t *frame, int code, const char *message) {
    error_args_t args = {sizeof args, NULL, message, code};
    return frame->api->create_error(&args);
}

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

static int64_t attribute(const frame_t *frame, const char *name) {
    for (int64_t i = 0; i < frame->attributes.count; i++) {
        const span_t *span = frame->attributes.names[i];
        if (span->length == strlen(name) && !memcmp(span->text, name, span->length))
            return *frame->attributes.values[i]->value;
    }
    return 0;
}

/* XLA's threads flush subnormal numbers: what computes is to round to nearest and keep them. */
static void set_ieee(fenv_t *saved) {
    fegetenv(saved);
    fesetenv(FE_DFL_ENV);
}

/* ---- XLA's threads ---- */

/* Handing work to a thread that sleeps takes as long as one needs to read so much. */
enum { BYTES_PER_THREAD = 1 << 21, MOST_THREADS = 64, CLOSED = 1 << 30 };

/* A walk that XLA's threads may join until its caller has come to the end. It lives until the last
 * task that was scheduled for it has run, which may be after that. */
typedef struct {
    void (*walk)(void *job, int share);
    void *job;
    _Atomic int shares;
    _Atomic int inside; /* threads that walk; CLOSED is added at the end */
    _Atomic int holders;
} party_t;

static void let_go(party_t *party) {
    if (atomic_fetch_sub(&party->holders, 1) == 1) free(party);
}

static void walk_along(party_t *party) {
    party->walk(party->job, atomic_fetch_add(&party->shares, 1));
}

static void join(void *data) {
    party_t *party = data;
    fenv_t saved;
    set_ieee(&saved);
    if (!(atomic_fetch_add(&party->inside, 1) & CLOSED)) walk_along(party);
    fesetenv(&saved);
    atomic_fetch_sub(&party->inside, 1);
    let_go(party);
}

/* How many threads a walk over so many bytes is worth. */
static int worth(const frame_t *frame, int64_t bytes) {
    int64_t threads = 1;
    threads_args_t args = {sizeof args, NULL, frame->context, &threads};
    void *failed = frame->api->count_threads(&args);
    if (failed) {
        destroy_args_t destroy = {sizeof destroy, NULL, failed};
        frame->api->destroy_error(&destroy);
        return 1;
    }
    if (threads > bytes / BYTES_PER_THREAD) threads = bytes / BYTES_PER_THREAD;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    return threads > 1 ? (int)threads : 1;
}

/* Walk on this thread, and on as many of XLA's as are free, up to so many. Returns how many shares
 * there were, or -1 if memory ran out. */
static int walk_together(const frame_t *frame, void (*walk)(void *, int), void *job, int threads) {
    party_t *party = malloc(sizeof *party);
    if (!party) return -1;
    *party = (party_t){walk, job, 0, 0, 1};
    for (int i = 1; i < threads; i++) {
        schedule_args_t args = {sizeof args, NULL, frame->context, join, party};
        atomic_fetch_add(&party->holders, 1);
        void *failed = frame->api->schedule(&args);
        if (failed) { /* nobody will come: this thread does all the work */
            destroy_args_t destroy = {sizeof destroy, NULL, failed};
            frame->api->destroy_error(&destroy);
            let_go(party);
        }
    }
    walk_along(party);
    atomic_fetch_or(&party->inside, CLOSED);
    while (atomic_load(&party->inside) & ~CLOSED) sched_yield();
    int shares = atomic_load(&party->shares);
    let_go(party);
    return shares;
}

/* ---- leaves ---- */

/* 0 and *kind, *parts for an element type this kernel reads, else -1. */
static int read_type(int dtype, kind_t *kind, int *parts) {
    *parts = dtype == C64_TYPE || dtype == C128_TYPE ? 2 : 1;
    switch (dtype) {
    case F16_TYPE: *kind = F16; return 0;
    case BF16_TYPE: *kind = BF16; return 0;
    case F32_TYPE:
    case C64_TYPE: *kind = F32; return 0;
    case F64_TYPE:
    case C128_TYPE: *kind = F64; return 0;
    }
    return -1;
}

static int64_t elements(const buffer_t *buffer) {
    int64_t size = 1;
    for (int64_t d = 0; d < buffer->rank; d++) size *= buffer->dims[d];
    return size;
}

/* Lists of as many leaves each as there are buffers from `first` on; of a batch, that of its first
 * member. Returns NULL if a type is not read or memory runs out. */
static leaf_t *leaves_of(const buffers_t *buffers, int64_t first, int64_t batch, list_t *list) {
    int64_t count = buffers->count - first;
    leaf_t *leaves = calloc((size_t)count + 1, sizeof *leaves);
    if (!leaves) return NULL;
    *list = (list_t){.leaves = leaves, .count = count};
    for (int64_t i = 0; i < count; i++) {
        const buffer_t *buffer = buffers->buffers[first + i];
        int parts;
        if (read_type(buffer->dtype, &leaves[i].kind, &parts) < 0) {
            free(leaves);
            return NULL;
        }
        leaves[i].data = buffer->data;
        leaves[i].size = elements(buffer) * parts / batch;
        leaves[i].first = list->size;
        list->size += leaves[i].size;
    }
    return leaves;
}

static void next_member(leaf_t *leaves, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        leaves[i].data += leaves[i].size * item_size(leaves[i].kind);
}

static int64_t bytes_of(const list_t *list) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < list->count; i++)
        bytes += list->leaves[i].size * item_size(list->leaves[i].kind);
    return bytes;
}

static int has_f64(const list_t *list) {
    for (int64_t i = 0; i < list->count; i++)
        if (list->leaves[i].kind == F64) return 1;
    return 0;
}

/* ---- totals and roots ---- */

typedef struct {
    list_t *list;
    sum_t *sums;
    total_t *totals;
    list_t *source;
    factor_t factor;
} job_t;

static void exact_share(void *data, int share) {
    job_t *job = data;
    exact_squares(job->list, &job->totals[share]);
}

/* Put the total of a list into XLA_WORDS words. Returns -1 if memory runs out. */
static int add_up(const frame_t *frame, list_t *list, int64_t *words) {
    int threads = worth(frame, bytes_of(list));
    total_t *totals = calloc((size_t)threads, sizeof *totals);
    if (!totals) return -1;
    job_t job = {.list = list, .totals = totals};
    atomic_store(&list->cursor, 0);
    int shares = walk_together(frame, exact_share, &job, threads);
    memset(words, 0, XLA_WORDS * sizeof *words);
    for (int share = 0; share < shares; share++) {
        enum { AT = (NARROW_UNIT - WIDE_UNIT) / 32 };
        for (int j = 0; j < NARROW_WORDS; j++) words[AT + j] += totals[share].narrow[j];
        for (int j = 0; j < WIDE_WORDS; j++) words[j] += totals[share].wide[j];
        for (int j = 0; j < COUNTS; j++)
            words[XLA_WORDS - COUNTS + j] +=
                totals[share].narrow[NARROW_WORDS + j] + totals[share].wide[WIDE_WORDS + j];
    }
    free(totals);
    return shares < 0 ? -1 : 0;
}

/* A norm as XLA's graphs have it: a significand of 53 bits and an exponent, if it is inf, if NaN. */
static void put_norm(const int64_t *words, int64_t wide, int64_t *number) {
    exact_root(words, XLA_WORDS - COUNTS, wide ? 53 : 24, wide ? -1074 : -149, number);
    number[3] = words[XLA_WORDS - COUNTS + NAN_COUNT] > 0;
    number[2] = !number[3] && words[XLA_WORDS - COUNTS + INF_COUNT] > 0;
}

static void sum_share(void *data, int share) {
    job_t *job = data;
    sum_squares(job->list, &job->sums[share]);
}

/* The norm of a list, from float64 sums where they prove it. Returns -1 if memory runs out. */
static int put_norm_of(const frame_t *frame, list_t *list, int64_t wide, int64_t *number) {
    int64_t words[XLA_WORDS];
    if (!wide && !has_f64(list)) {
        sum_t sums[MOST_THREADS];
        job_t job = {.list = list, .sums = sums};
        atomic_store(&list->cursor, 0);
        int shares = walk_together(frame, sum_share, &job, worth(frame, bytes_of(list)));
        if (shares < 0) return -1;
        int inf = 0, nan = 0;
        for (int i = 0; i < shares; i++) inf |= sums[i].has_inf, nan |= sums[i].has_nan;
        if (inf || nan || certified_root(sums, shares, number)) {
            number[2] = inf && !nan;
            number[3] = nan;
            return 0;
        }
    }
    if (add_up(frame, list, words) < 0) return -1;
    put_norm(words, wide, number);
    return 0;
}

/* Of leaves, for each member of a batch: the words of the total, or the norm. */
static void *measure(const frame_t *frame, int as_norm) {
    int64_t batch = attribute(frame, "batch"), wide = attribute(frame, "wide");
    int64_t *out = frame->results.buffers[0]->data;
    list_t list;
    if (!batch) return NULL;
    leaf_t *leaves = leaves_of(&frame->arguments, 0, batch, &list);
    if (!leaves) return error(frame, INVALID_ARGUMENT, "gradclip: no memory or no such dtype");
    int failed = 0;
    for (int64_t member = 0; member < batch && !failed; member++) {
        failed = as_norm ? put_norm_of(frame, &list, wide, out + member * XLA_NUMBER)
                         : add_up(frame, &list, out + member * XLA_WORDS);
        next_member(leaves, list.count);
    }
    free(leaves);
    return failed ? error(frame, RESOURCE_EXHAUSTED, "gradclip: no memory") : NULL;
}

static void *give_norm(const frame_t *frame) { return measure(frame, 1); }

static void *give_total(const frame_t *frame) { return measure(frame, 0); }

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

static void scale_share(void *data, int share) {
    job_t *job = data;
    (void)share;
    scale(job->source, job->list, &job->factor, NULL);
}

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

/* Do to leaves what an XLA_DECISION says. */
static int carry_out(const frame_t *frame, const int64_t *decision, list_t *from, list_t *to) {
    if (decision[0] == XLA_SCALE) {
        job_t job = {.list = to, .source = from};
        job.factor = factor_of((double)decision[1] * 0x1p-53, decision[2] + 53);
        atomic_store(&to->cursor, 0);
        return walk_together(frame, scale_share, &job, worth(frame, bytes_of(to))) < 0 ? -1 : 0;
    }
    for (int64_t i = 0; i < to->count; i++) {
        const leaf_t *leaf = &to->leaves[i];
        size_t bytes = (size_t)(leaf->size * item_size(leaf->kind));
        if (decision[0] == XLA_ZERO)
            memset(leaf->data, 0, bytes);
        else if (decision[0] == XLA_NAN)
            fill_nan(leaf);
        else if (leaf->data != from->leaves[i].data)
            memcpy(leaf->data, from->leaves[i].data, bytes);
    }
    return 0;
}

static void *give_scaled(const frame_t *frame) {
    int64_t batch = attribute(frame, "batch");
    const int64_t *decisions = frame->arguments.buffers[0]->data;
    list_t source, target;
    if (!batch) return NULL;
    leaf_t *from = leaves_of(&frame->arguments, 1, batch, &source);
    leaf_t *to = leaves_of(&frame->results, 0, batch, &target);
    int failed = !from || !to;
    for (int64_t member = 0; member < batch && !failed; member++) {
        failed = carry_out(frame, decisions + member * XLA_DECISION, &source, &target);
        next_member(from, source.count);
        next_member(to, target.count);
    }
    free(from);
    free(to);
    return failed ? error(frame, RESOURCE_EXHAUSTED, "gradclip: no memory or no such dtype") : NULL;
}

/* ---- what XLA calls ---- */

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

static void *xla_total(void *frame) { return answer(frame, give_total); }

static void *xla_root(void *frame) { return answer(frame, give_root); }

static void *xla_scale(void *frame) { return answer(frame, give_scaled); }

const xla_handler_t XLA_HANDLERS[] = {
    {"gradclip_norm", xla_norm},
    {"gradclip_total", xla_total},
    {"gradclip_root", xla_root},
    {"gradclip_scale", xla_scale},
    {NULL, NULL},
};
