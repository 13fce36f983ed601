/* The sum of clipped examples, as XLA asks for it. */
#ifndef GRADCLIP_XLA_SUM_H
#define GRADCLIP_XLA_SUM_H

#include "xla_api.h"

/* Decisions, one for each example, and arrays with the examples along their first axis: the sums of
 * what the decisions make of the examples, which is zeros where they are neither kept nor scaled. */
void *give_clipped_sum(const frame_t *frame);

#endif
