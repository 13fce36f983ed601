/* Walks on XLA's threads. */
#include "xla_threads.h"

#include <sched.h>
#include <stdlib.h>

#include "ieee.h"

/* Handing work to a thread that sleeps takes as long as one needs to read so much. */
enum { BYTES_PER_THREAD = 1 << 21 };
enum { CLOSED = 1 << 30 };

/* A walk that XLA's threads may join until its caller has come to the end. It lives until the last
 * task that was scheduled for it has run, which may be after that. */
typedef struct {
    share_t *walk;
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

static void forget(const frame_t *frame, void *error) {
    destroy_args_t destroy = {sizeof destroy, NULL, error};
    frame->api->destroy_error(&destroy);
}

int threads_worth(const frame_t *frame, uint64_t bytes) {
    int64_t threads = 1, worth = (int64_t)(bytes / BYTES_PER_THREAD);
    threads_args_t args = {sizeof args, NULL, frame->context, &threads};
    void *failed = frame->api->count_threads(&args);
    if (failed) {
        forget(frame, failed);
        return 1;
    }
    if (threads > worth) threads = worth;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    return threads > 1 ? (int)threads : 1;
}

int walk_on_xla(const frame_t *frame, share_t *walk, void *job, int threads) {
    if (threads < 2) {
        walk(job, 0);
        return 1;
    }
    party_t *party = malloc(sizeof *party);
    if (!party) return -1;
    *party = (party_t){walk, job, 0, 0, 1};
    for (int i = 1; i < threads; i++) {
        schedule_args_t args = {sizeof args, NULL, frame->context, join, party};
        atomic_fetch_add(&party->holders, 1);
        void *failed = frame->api->schedule(&args);
        if (failed) { /* nobody will come: this thread does all the work */
            forget(frame, failed);
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
