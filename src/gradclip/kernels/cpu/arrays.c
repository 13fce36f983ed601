/* NumPy's arrays, by the C structure that its headers give to all that is compiled against them: to
 * ask each for a buffer takes three times as long. NumPy is not needed to build this; that its
 * arrays are so is tried before they are read. */
#define PY_SSIZE_T_CLEAN
#include <string.h>

#include "taking.h"

typedef struct {
    PyObject_HEAD
    char *data;
    int nd;
    Py_ssize_t *dimensions, *strides;
    PyObject *base, *dtype;
    int flags;
} fields_t;

/* Of the flags: that it may be written, and that NumPy warns of whoever does so. */
static const unsigned WRITEABLE = 0x400, WARN_ON_WRITE = 0x80000000;

typedef struct {
    PyObject *dtype;
    kind_t kind;
    int parts;
} known_t;

enum { MOST_DTYPES = 5 };

static struct {
    PyTypeObject *type; /* NULL: not told yet, or not found to be so */
    known_t dtypes[MOST_DTYPES];
} arrays;

static const known_t *find(PyObject *dtype) {
    for (const known_t *each = arrays.dtypes; each < arrays.dtypes + MOST_DTYPES; each++)
        if (each->dtype == dtype) return each;
    return NULL;
}

/* ---- what they are like ---- */

/* If the structure says of an array what the array says by its buffer. */
static int agree(const fields_t *array, const Py_buffer *buffer) {
    size_t bytes = (size_t)buffer->ndim * sizeof *buffer->shape;
    return array->data == buffer->buf && array->nd == buffer->ndim &&
           buffer->readonly == !(array->flags & WRITEABLE) &&
           !memcmp(array->dimensions, buffer->shape, bytes) &&
           !memcmp(array->strides, buffer->strides, bytes);
}

/* 0 and what a sample's dtype is, or -1 where the structure is another. */
static int learn(PyObject *sample, known_t *known) {
    Py_buffer buffer;
    int swap;
    known->dtype = PyObject_GetAttrString(sample, "dtype"); /* kept */
    if (!known->dtype || PyObject_GetBuffer(sample, &buffer, PyBUF_RECORDS_RO) < 0) return -1;
    int so = ((fields_t *)sample)->dtype == known->dtype && agree((fields_t *)sample, &buffer) &&
             !read_format(buffer.format, &known->kind, &known->parts, &swap) && !swap;
    PyBuffer_Release(&buffer);
    return so ? 0 : -1;
}

const char use_arrays_doc[] =
"use_arrays(*samples)\n--\n\n"
"Try if arrays of this type are as they are read here: one of each of five dtypes, laid out in\n"
"different ways. Returns if they are; else they are asked for buffers, as other objects are.";

PyObject *use_arrays(PyObject *module, PyObject *args) {
    PyObject *samples[MOST_DTYPES];
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOO", &samples[0], &samples[1], &samples[2], &samples[3],
                          &samples[4]))
        return NULL;
    int so = 1;
    for (int i = 0; i < MOST_DTYPES; i++) so &= !learn(samples[i], &arrays.dtypes[i]);
    PyErr_Clear();
    arrays.type = so ? Py_TYPE(samples[0]) : NULL;
    return PyBool_FromLong(so);
}

/* ---- all of them ---- */

/* An array, and the kind of its leaf. */
static int read_array(const fields_t *fields, int writable, array_t *array, leaf_t *leaf) {
    if (Py_TYPE((PyObject *)fields) != arrays.type) return NEEDS_CARE; /* and may be shorter */
    const known_t *known = find(fields->dtype);
    unsigned flags = (unsigned)fields->flags;
    if (!known || fields->nd > MOST_DIMENSIONS) return NEEDS_CARE;
    if (writable && (flags & (WRITEABLE | WARN_ON_WRITE)) != WRITEABLE) return NEEDS_CARE;
    leaf->kind = known->kind;
    *array = (array_t){fields->data, known->parts, fields->nd, as_int64(fields->dimensions),
                       as_int64(fields->strides), 1};
    return 0;
}

static int hold_arrays(Leaves *self, int writable) {
    for (Py_ssize_t i = 0; i < self->count; i++) {
        const fields_t *fields = (fields_t *)PyTuple_GetItem(self->objects, i);
        array_t array;
        int outcome = read_array(fields, writable, &array, &self->leaves[i]);
        if (!outcome) outcome = lay_out_leaf(self, i, &array, writable);
        if (outcome) return outcome;
    }
    return list_all(self, self->count, writable);
}

PyObject *take_arrays(PyObject *list, int writable) {
    if (!arrays.type || !PyList_Size(list)) Py_RETURN_NONE;
    PyObject *objects = PyList_AsTuple(list);
    Leaves *self = objects ? new_leaves(PyTuple_Size(objects)) : NULL;
    if (!self) {
        Py_XDECREF(objects);
        return NULL;
    }
    self->objects = objects;
    return give(self, hold_arrays(self, writable));
}
