/* Threads of ours that share walks. */
#ifndef GRADCLIP_TEAM_H
#define GRADCLIP_TEAM_H

#include <Python.h>

#include "cpu.h"

/* Walk on this thread, without the GIL, and on as many helpers as are free, up to so many threads.
 * Returns how many shares there were. */
int walk_together(share_t *walk, void *job, int threads);

/* In a forked child, which has none of its parent's threads. */
PyObject *forget_helpers(PyObject *module, PyObject *unused);

/* The native ids of the helpers. */
PyObject *helpers_ids(PyObject *module, PyObject *unused);

#endif
