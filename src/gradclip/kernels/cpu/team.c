#define PY_SSIZE_T_CLEAN
#include "team.h" /* with Python.h, which asks the headers below for what is Linux's alone */

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if !defined(_WIN32)
#include <signal.h>
#endif

#include "leaves.h"
#include "party.h"

enum { TURNS = 500 }; /* of waiting awake for more to do: a clip scales soon after it has measured */

/* PYTHREAD_INVALID_THREAD_ID, which the limited API leaves out. */
static const unsigned long NOT_STARTED = (unsigned long)-1;

typedef struct {
    PyThread_type_lock wake;
    _Atomic(party_t *) told; /* what it is to join; NULL while it is free */
    _Atomic long id;         /* the system's; 0 before it runs, and where nobody asks */
    _Atomic int kept_off;    /* the processor that it does not run on; -1: none */
} helper_t;

static helper_t helpers[MOST_THREADS];
static _Atomic int helper_count;
static atomic_flag starting = ATOMIC_FLAG_INIT;

/* ---- one helper ---- */

static void serve(void *data) {
    helper_t *self = data;
#if defined(__linux__)
    atomic_store(&self->id, syscall(SYS_gettid));
#endif
#if !defined(_WIN32)
    /* Those that a program waits for are not for this thread. */
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
#endif
    for (;;) {
        for (int turn = 0; !atomic_load(&self->told) && turn < TURNS; turn++) pause_awake();
        PyThread_acquire_lock(self->wake, WAIT_LOCK);
        join_party(atomic_load(&self->told));
        atomic_store(&self->told, NULL);
    }
}

/* Have a helper wake on another processor than this. Linux wakes a thread where it last ran: where
 * that is the processor of the thread which asks for help, and which goes on working there, it has
 * been seen to wait up to 4 ms for a turn. A sandbox may forbid it; that only costs time. */
static void keep_off_this_processor(helper_t *helper) {
#if defined(__linux__)
    long id = atomic_load(&helper->id);
    int here = sched_getcpu();
    cpu_set_t others;
    if (!id || here < 0 || here == atomic_load(&helper->kept_off)) return;
    if (sched_getaffinity(0, sizeof others, &others)) return;
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others)) sched_setaffinity((pid_t)id, sizeof others, &others);
    atomic_store(&helper->kept_off, here);
#else
    (void)helper;
#endif
}

/* ---- all of them ---- */

/* Have so many helpers, or as many as the system gives. */
static void start_helpers(int wanted) {
    if (atomic_load(&helper_count) >= wanted || atomic_flag_test_and_set(&starting)) return;
    while (atomic_load(&helper_count) < wanted) {
        helper_t *helper = &helpers[atomic_load(&helper_count)];
        *helper = (helper_t){.wake = PyThread_allocate_lock(), .kept_off = -1};
        if (!helper->wake) break;
        PyThread_acquire_lock(helper->wake, WAIT_LOCK);
        if (PyThread_start_new_thread(serve, helper) == NOT_STARTED) {
            PyThread_free_lock(helper->wake);
            break;
        }
        atomic_fetch_add(&helper_count, 1);
    }
    atomic_flag_clear(&starting);
}

/* Ask so many helpers to join, those that are free. */
static void invite(party_t *party, int wanted) {
    int count = atomic_load(&helper_count);
    for (int i = 0; i < count && wanted; i++) {
        party_t *nothing = NULL;
        hold_party(party);
        if (atomic_compare_exchange_strong(&helpers[i].told, &nothing, party)) {
            keep_off_this_processor(&helpers[i]);
            PyThread_release_lock(helpers[i].wake);
            wanted--;
        } else {
            let_go_of_party(party);
        }
    }
}

int walk_together(share_t *walk, void *job, int threads) {
    _Atomic int shares = 0;
    int most = threads < MOST_THREADS ? threads : MOST_THREADS;
    party_t *party = most > 1 ? new_party(walk, job) : NULL;
    if (party) start_helpers(most - 1);
    Py_BEGIN_ALLOW_THREADS
    if (party) {
        invite(party, most - 1);
        shares = finish_party(party);
    } else {
        take_share(walk, job, &shares);
    }
    Py_END_ALLOW_THREADS
    return shares;
}

PyObject *forget_helpers(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    atomic_store(&helper_count, 0);
    atomic_flag_clear(&starting);
    leave_team();
    Py_RETURN_NONE;
}

PyObject *helpers_ids(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *ids = PyList_New(0);
    for (int i = 0; ids && i < atomic_load(&helper_count); i++)
        append(&ids, PyLong_FromLong(atomic_load(&helpers[i].id)));
    return ids;
}
