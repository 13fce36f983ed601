/* Leaves as Python holds them, and how they come to be from what their owners say of them. */
#ifndef GRADCLIP_LEAVES_H
#define GRADCLIP_LEAVES_H

#include <Python.h>

#include "layout.h"

typedef struct {
    PyObject_HEAD
    list_t list;
    Py_buffer *buffers;
    Py_ssize_t held;   /* buffers */
    PyObject *objects; /* or else a tuple of what is held */
    int framework;     /* if they are of one that has threads of its own */
    Py_ssize_t count;
    leaf_t *leaves;    /* each strided one owns its geometry */
    PyObject *decode;  /* keeps the tables alive that leaves point to */
    int crowded;       /* if leaves to be written reach into each other's memory */
} Leaves;

/* What comes of holding memory, if not all goes well. FAILED: an error is set. */
enum { NO_MEMORY = -1, NEEDS_CARE = -2, FAILED = -3 };

/* Leaves with room for so many, of which none is held yet; NULL with an error. */
Leaves *new_leaves(Py_ssize_t count);

/* Then, one leaf after the other: lay out an array in a leaf of which the kind is known. This and
 * the next return 0, NO_MEMORY or NEEDS_CARE. */
int lay_out_leaf(Leaves *self, Py_ssize_t i, const array_t *array, int writable);

/* In the end: list them all. */
int list_all(Leaves *self, Py_ssize_t count, int writable);

/* The leaves, or what Python gets in their place; then they are let go of. */
PyObject *give(Leaves *self, int outcome);

/* Sums as a list of (high, low, has_inf, has_nan). */
PyObject *list_sums(const sum_t *sums, int shares);

/* Append what is new to a list, which is let go of where that fails. */
static inline void append(PyObject **list, PyObject *item) {
    if (!item || PyList_Append(*list, item) < 0) Py_CLEAR(*list);
    Py_XDECREF(item);
}

/* 0, or -1 with an error. */
int add_leaves_type(PyObject *module);

#endif
