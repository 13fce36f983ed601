/* Threads of an OpenMP that a framework has loaded, for walks of its own memory. */
#ifndef GRADCLIP_TEAM_H
#define GRADCLIP_TEAM_H

#include <Python.h>

#include "cpu.h"

/* A thread that is awake takes 5 us to come, in which one reads about so much. */
enum { BYTES_PER_TEAM_MEMBER = 1 << 17 };

/* As GOMP_parallel: each of a team of threads, the caller one of them, calls the function. */
typedef void parallel_t(void (*function)(void *), void *data, unsigned threads, unsigned flags);

/* Say where the team is to be found: GOMP_parallel and omp_get_max_threads, or NULL. */
void use_team(parallel_t *parallel, int (*size)(void));

/* How many threads of the team work for this one; 1 if there is no asking them. */
int team_size(void);

/* Walk on this thread, or on so many of the team, without the GIL. Returns how many shares there
 * were. */
int walk_together(share_t *walk, void *job, int threads);

/* In a forked child, which has none of its parent's threads. */
PyObject *leave_team(PyObject *module, PyObject *unused);

#endif
