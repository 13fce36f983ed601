#include "layout.h"

#include <stdlib.h>

typedef struct {
    int64_t length, stride;
} dimension_t;

static int by_stride(const void *a, const void *b) {
    int64_t x = ((const dimension_t *)a)->stride, y = ((const dimension_t *)b)->stride;
    return (x < y) - (x > y);
}

/* 0 and how many real numbers an array has, or -1 if int64 cannot count them. */
static int count_numbers(const array_t *array, int64_t *size) {
    *size = array->parts;
    for (int64_t d = 0; d < array->ndim; d++)
        if (!array->shape[d]) *size = 0;
    for (int64_t d = 0; *size && d < array->ndim; d++)
        if (__builtin_mul_overflow(*size, array->shape[d], size)) return -1;
    return 0;
}

/* The dimensions that have a stride, outermost first, and where the first element in memory is. */
static int read_dimensions(const array_t *array, dimension_t *dims, char **data) {
    int ndim = 0;
    *data = array->data;
    for (int64_t d = 0; d < array->ndim; d++) {
        int64_t length = array->shape[d], stride = array->strides[d] * array->unit;
        if (length == 1) continue;
        if (stride < 0) {
            *data += (length - 1) * stride;
            stride = -stride;
        }
        dims[ndim++] = (dimension_t){length, stride};
    }
    qsort(dims, (size_t)ndim, sizeof *dims, by_stride);
    return ndim;
}

/* If elements of so many bytes lie apart. */
static int lie_apart(const dimension_t *dims, int ndim, int64_t bytes) {
    for (int d = ndim - 1; d >= 0; d--) {
        if (dims[d].stride < bytes) return 0;
        bytes += (dims[d].length - 1) * dims[d].stride;
    }
    return 1;
}

/* Make one dimension of neighbours where that can be; returns how many are left. */
static int join(dimension_t *dims, int ndim) {
    int kept = 0;
    for (int d = 0; d < ndim; d++) {
        if (kept && dims[kept - 1].stride == dims[d].length * dims[d].stride)
            dims[kept - 1] = (dimension_t){dims[kept - 1].length * dims[d].length, dims[d].stride};
        else
            dims[kept++] = dims[d];
    }
    return kept;
}

static void set_strides(leaf_t *leaf, const dimension_t *dims, int ndim, int64_t *geometry) {
    leaf->ndim = ndim;
    leaf->shape = geometry;
    leaf->strides = geometry + ndim;
    for (int d = 0; d < ndim; d++) {
        geometry[d] = dims[d].length;
        geometry[ndim + d] = dims[d].stride;
    }
}

/* If the elements of an array follow each other in the order of its dimensions, and how many real
 * numbers it has then. Most do, and then there is nothing to sort or to join. */
static int is_in_order(const array_t *array, int64_t item, int64_t *size) {
    int64_t step, bytes = item * array->parts;
    *size = array->parts;
    for (int64_t d = array->ndim - 1; d >= 0; d--) {
        int64_t length = array->shape[d];
        if (length == 1) continue;
        if (__builtin_mul_overflow(array->strides[d], array->unit, &step) || step != bytes) return 0;
        if (__builtin_mul_overflow(bytes, length, &bytes)) return 0;
        *size *= length;
    }
    return 1;
}

/* Its dimensions in the order of memory, as few as possible; -1 as lay_out. */
static int sort_dimensions(const array_t *array, leaf_t *leaf, int writable, dimension_t *dims) {
    int64_t item = item_size(leaf->kind);
    if (count_numbers(array, &leaf->size) < 0) return -1;
    if (!leaf->size) return 0;
    int ndim = read_dimensions(array, dims, &leaf->data);
    if (writable && !lie_apart(dims, ndim, item * array->parts)) return -1;
    if (array->parts == 2) dims[ndim++] = (dimension_t){2, item};
    if (!ndim) dims[ndim++] = (dimension_t){1, item};
    return join(dims, ndim);
}

int lay_out(const array_t *array, leaf_t *leaf, int writable, int64_t *geometry) {
    dimension_t dims[MOST_DIMENSIONS + 2];
    int64_t item = item_size(leaf->kind);
    int ndim = 1;
    leaf->data = array->data;
    if (is_in_order(array, item, &leaf->size))
        dims[0] = (dimension_t){leaf->size, item};
    else
        ndim = sort_dimensions(array, leaf, writable, dims);
    if (ndim < 0) return -1;
    if (!leaf->size) return 0;
    int contiguous = ndim == 1 && dims[0].stride == item && !leaf->swap;
    if (contiguous && (uintptr_t)leaf->data % (uintptr_t)item == 0) return 0;
    set_strides(leaf, dims, ndim, geometry);
    return 0;
}
