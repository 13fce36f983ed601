/* Arrays of any layout as leaves, and leaves that share memory. */
#ifndef GRADCLIP_LAYOUT_H
#define GRADCLIP_LAYOUT_H

#include "cpu.h"

/* Dimensions that a leaf may have. */
enum { MOST_DIMENSIONS = 64 };

/* An array as its owner describes it. */
typedef struct {
    char *data;
    int parts; /* real numbers to an element */
    int64_t ndim;
    const int64_t *shape, *strides;
    int64_t unit; /* bytes that a stride of 1 stands for */
} array_t;

/* Lay out an array as few dimensions as possible, in the order of memory, in a leaf of which the
 * kind is known. The order in which elements are visited is free, so a negative stride is turned
 * round. `geometry` has room for twice as many numbers as the array has dimensions, and two more.
 * Returns 0, or -1 where there are too many elements, or where some share memory and the leaf is to
 * be written. */
int lay_out(const array_t *array, leaf_t *leaf, int writable, int64_t *geometry);

/* Leave leaves that list the memory of an earlier one again with no elements of their own. Returns
 * if others reach into each other's memory, or -1 if there is no memory to find out. */
int drop_repeats(leaf_t *leaves, int64_t count);

#endif
