/* What Python calls to have memory held, and what Watch reads of an object that has a handle. */
#ifndef GRADCLIP_TAKING_H
#define GRADCLIP_TAKING_H

#include "leaves.h"

extern const char take_doc[], use_arrays_doc[], use_handles_doc[], take_handles_doc[];
PyObject *take(PyObject *module, PyObject *args);
PyObject *use_arrays(PyObject *module, PyObject *args);
PyObject *use_handles(PyObject *module, PyObject *args);
PyObject *take_handles(PyObject *module, PyObject *args);

/* Hold the memory of a list of NumPy's arrays of native dtypes; None where one is otherwise. */
PyObject *take_arrays(PyObject *list, int writable);

/* 0 and *kind, *parts, *swap for a buffer format that is read, else -1. */
int read_format(const char *format, kind_t *kind, int *parts, int *swap);

/* Python's sizes as they are; macOS has two types of 64 bits. */
static inline const int64_t *as_int64(const Py_ssize_t *sizes) {
    _Static_assert(sizeof *sizes == sizeof(int64_t), "sizes of 64 bits");
    return (const int64_t *)sizes;
}

/* If an object has a handle and is of no type derived from the one that has. */
int has_handle(PyObject *object);

/* Of an object that has: 0 and the array, or -1 if its elements do not lie in this memory. */
int read_host_memory(PyObject *object, array_t *array, leaf_t *leaf);

/* Where its elements are; NULL if there is no telling. */
const char *address_of(PyObject *object);

/* How many threads the framework of such objects allows the calling one. */
int most_threads(void);

#endif
