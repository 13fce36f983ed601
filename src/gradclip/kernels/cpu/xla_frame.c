/* What a call of XLA brings. */
#include "xla_frame.h"

#include <stdlib.h>
#include <string.h>

void *failure(const frame_t *frame, int code, const char *message) {
    error_args_t args = {sizeof args, NULL, message, code};
    return frame->api->create_error(&args);
}

int64_t attribute(const frame_t *frame, const char *name) {
    for (int64_t i = 0; i < frame->attributes.count; i++) {
        const span_t *span = frame->attributes.names[i];
        if (span->length == strlen(name) && !memcmp(span->text, name, span->length))
            return *frame->attributes.values[i]->value;
    }
    return 0;
}

/* ---- leaves ---- */

/* 0 and *kind, *parts for an element type this kernel reads, else -1. */
static int read_type(int dtype, kind_t *kind, int *parts) {
    *parts = dtype == C64_TYPE || dtype == C128_TYPE ? 2 : 1;
    switch (dtype) {
    case F16_TYPE: *kind = F16; return 0;
    case BF16_TYPE: *kind = BF16; return 0;
    case F32_TYPE:
    case C64_TYPE: *kind = F32; return 0;
    case F64_TYPE:
    case C128_TYPE: *kind = F64; return 0;
    }
    return -1;
}

int64_t elements(const buffer_t *buffer) {
    int64_t size = 1;
    for (int64_t d = 0; d < buffer->rank; d++) size *= buffer->dims[d];
    return size;
}

leaf_t *leaves_of(const buffers_t *buffers, int64_t first, int64_t batch, list_t *list) {
    int64_t count = buffers->count - first;
    leaf_t *leaves = calloc((size_t)count + 1, sizeof *leaves);
    int failed = !leaves;
    for (int64_t i = 0; i < count && !failed; i++) {
        const buffer_t *buffer = buffers->buffers[first + i];
        int parts;
        failed = read_type(buffer->dtype, &leaves[i].kind, &parts) < 0;
        leaves[i].data = buffer->data;
        leaves[i].size = elements(buffer) * parts / batch;
    }
    if (!failed && list_leaves(list, leaves, count) == 0) return leaves;
    free(leaves);
    return NULL;
}

factor_t factor_in(const int64_t *decision) {
    return factor_of((double)decision[1] * 0x1p-53, decision[2] + 53);
}
