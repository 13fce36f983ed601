#ifndef GRADCLIP_XLA_THREADS_H
#define GRADCLIP_XLA_THREADS_H

#include "party.h"
#include "xla_api.h"

/* How many threads a walk over so many bytes is worth. */
int threads_worth(const frame_t *frame, uint64_t bytes);

/* Walk on this thread, and on as many of XLA's as are free, up to so many. Returns how many shares
 * there were, or -1 if memory ran out. */
int walk_on_xla(const frame_t *frame, share_t *walk, void *job, int threads);

#endif
