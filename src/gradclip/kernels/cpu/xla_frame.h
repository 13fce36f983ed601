/* What a call of XLA brings: attributes, arrays as leaves, decisions. */
#ifndef GRADCLIP_XLA_FRAME_H
#define GRADCLIP_XLA_FRAME_H

#include "cpu.h"
#include "xla_api.h"

/* What XLA takes for an error. */
void *failure(const frame_t *frame, int code, const char *message);

/* An integer that the operation was made with; 0 if there is none of this name. */
int64_t attribute(const frame_t *frame, const char *name);

int64_t elements(const buffer_t *buffer);

/* Lists of as many leaves each as there are buffers from `first` on; of a batch, that of its first
 * member. Returns NULL if a type is not read or memory runs out. */
leaf_t *leaves_of(const buffers_t *buffers, int64_t first, int64_t batch, list_t *list);

/* The factor of an XLA_DECISION to scale. */
factor_t factor_in(const int64_t *decision);

#endif
