/* Threads that share walks: helpers of ours, or the team of an OpenMP that a framework has loaded. */
#ifndef GRADCLIP_TEAM_H
#define GRADCLIP_TEAM_H

#include <Python.h>

#include "cpu.h"

/* Walk on this thread, without the GIL, and on as many helpers as are free, up to so many threads.
 * Returns how many shares there were. */
int walk_together(share_t *walk, void *job, int threads);

/* The same over a framework's memory: on its team, while nothing else wants its processors. */
int walk_as_team(share_t *walk, void *job, int threads);

/* As GOMP_parallel: each of a team of threads, the caller one of them, calls the function. */
typedef void parallel_t(void (*function)(void *), void *data, unsigned threads, unsigned flags);

/* Say where the team is to be found; NULL: nowhere. */
void use_team(parallel_t *parallel);
void leave_team(void);

/* In a forked child, which has none of its parent's threads. */
PyObject *forget_helpers(PyObject *module, PyObject *unused);

/* The native ids of the helpers. */
PyObject *helpers_ids(PyObject *module, PyObject *unused);

#endif
