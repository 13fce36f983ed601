#define PY_SSIZE_T_CLEAN
#include "team.h"

#include "ieee.h"

static struct {
    parallel_t *parallel;
    int (*size)(void);
    int alone; /* in a forked child */
} team;

void use_team(parallel_t *parallel, int (*size)(void)) {
    if (!team.alone) team.parallel = parallel;
    team.size = size;
}

int team_size(void) { return team.parallel && team.size ? team.size() : 1; }

PyObject *leave_team(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    team.parallel = NULL;
    team.alone = 1;
    Py_RETURN_NONE;
}

/* A walk that each thread takes a share in. */
typedef struct {
    share_t *walk;
    void *job;
    _Atomic int shares;
} shared_t;

static void take_part(void *data) {
    shared_t *shared = data;
    fenv_t saved;
    set_ieee(&saved);
    shared->walk(shared->job, atomic_fetch_add(&shared->shares, 1));
    fesetenv(&saved);
}

int walk_together(share_t *walk, void *job, int threads) {
    shared_t shared = {walk, job, 0};
    Py_BEGIN_ALLOW_THREADS
    if (threads > 1 && team.parallel)
        team.parallel(take_part, &shared, (unsigned)threads, 0);
    else
        take_part(&shared);
    Py_END_ALLOW_THREADS
    return atomic_load(&shared.shares);
}
