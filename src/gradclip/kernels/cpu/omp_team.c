/* The team of an OpenMP. After work its threads wait awake for some milliseconds, so they come at
 * once, and helpers of ours would have to share processors with them. But it waits for each of them,
 * also for one that has no processor: so it is asked only while nothing else wants processors. */
#define PY_SSIZE_T_CLEAN
#include "team.h" /* with Python.h, which asks the headers below for what is Linux's alone */

#if defined(__linux__)
#include <sys/resource.h>
#include <time.h>
#endif

#include "party.h"

static parallel_t *parallel;
static int alone; /* in a forked child it would be waited for for ever */

void use_team(parallel_t *found) {
    if (!alone) parallel = found;
}

void leave_team(void) {
    parallel = NULL;
    alone = 1;
}

/* If this thread has had its processor for itself lately. It is taken away some 5 times a second on an
 * idle machine, some 100 times where as many other threads want it as there are processors. */
static int is_calm(void) {
#if defined(__linux__)
    enum { LEAST_MS = 50, MOST_PER_S = 25 };
    static _Thread_local struct {
        int64_t since_ms;
        long taken;
        int calm;
    } seen;
    struct rusage usage;
    struct timespec now;
    getrusage(RUSAGE_THREAD, &usage);
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t now_ms = (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    int64_t passed_ms = now_ms - seen.since_ms, taken = usage.ru_nivcsw - seen.taken;
    if (passed_ms < LEAST_MS && taken * 1000 <= (int64_t)LEAST_MS * MOST_PER_S) return seen.calm;
    seen.calm = taken * 1000 <= passed_ms * MOST_PER_S;
    seen.since_ms = now_ms;
    seen.taken = usage.ru_nivcsw;
    return seen.calm;
#else
    return 0;
#endif
}

typedef struct {
    share_t *walk;
    void *job;
    _Atomic int shares;
} shared_t;

static void take_part(void *data) {
    shared_t *shared = data;
    take_share(shared->walk, shared->job, &shared->shares);
}

int walk_as_team(share_t *walk, void *job, int threads) {
    shared_t shared = {walk, job, 0};
    if (threads < 2 || !parallel || !is_calm()) return walk_together(walk, job, threads);
    Py_BEGIN_ALLOW_THREADS
    parallel(take_part, &shared, (unsigned)threads, 0);
    Py_END_ALLOW_THREADS
    return atomic_load(&shared.shares);
}
