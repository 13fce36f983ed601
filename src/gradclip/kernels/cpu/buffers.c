/* Arrays that come in as objects with the buffer protocol. */
#define PY_SSIZE_T_CLEAN
#include <stdlib.h>
#include <string.h>

#include "taking.h"

int read_format(const char *format, kind_t *kind, int *parts, int *swap) {
    const uint16_t one = 1;
    int little = *(const uint8_t *)&one;
    *swap = 0;
    if (!format) return -1;
    if (strchr("@=<>!", format[0]) && format[0]) {
        *swap = (format[0] == '<' && !little) || ((format[0] == '>' || format[0] == '!') && little);
        format++;
    }
    *parts = 1;
    if (format[0] == 'Z') {
        *parts = 2;
        format++;
    }
    if (!format[0] || format[1]) return -1;
    switch (format[0]) {
    case 'e': *kind = F16; return *parts == 1 ? 0 : -1;
    case 'f': *kind = F32; return 0;
    case 'd': *kind = F64; return 0;
    case 'H': *kind = BF16; return *parts == 1 ? 0 : -1;
    case 'B': *kind = BYTE; return *parts == 1 ? 0 : -1;
    }
    return -1;
}

static int hold_buffers(Leaves *self, PyObject *arrays, int writable) {
    Py_ssize_t count = PyList_Size(arrays);
    int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    self->buffers = malloc(((size_t)count + 1) * sizeof *self->buffers);
    if (!self->buffers) return NO_MEMORY;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *array = PyList_GetItem(arrays, i);
        if (!self->decode && Py_TYPE(array) != Py_TYPE(PyList_GetItem(arrays, 0)))
            return NEEDS_CARE;
        if (PyObject_GetBuffer(array, &self->buffers[i], flags) < 0) {
            PyErr_Clear();
            return NEEDS_CARE;
        }
        self->held = i + 1;
    }
    return 0;
}

static int read_table(PyObject *table, leaf_t *leaf) {
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(table, &bytes, &size) < 0) return FAILED;
    if (size != 256 * (Py_ssize_t)sizeof(float)) {
        PyErr_SetString(PyExc_ValueError, "a decode table has 256 float32 values");
        return FAILED;
    }
    leaf->decode = (const float *)(const void *)bytes;
    return 0;
}

/* The array in a buffer, and the kind of its leaf. */
static int read_buffer(Leaves *self, Py_ssize_t i, array_t *array) {
    const Py_buffer *buffer = &self->buffers[i];
    leaf_t *leaf = &self->leaves[i];
    int parts;
    if (read_format(buffer->format, &leaf->kind, &parts, &leaf->swap) < 0) return NEEDS_CARE;
    *array = (array_t){buffer->buf, parts, buffer->ndim, as_int64(buffer->shape),
                       as_int64(buffer->strides), 1};
    if (leaf->kind != BF16 && leaf->kind != BYTE) return 0;
    if (!self->decode) return NEEDS_CARE;
    return leaf->kind == BYTE ? read_table(PyTuple_GetItem(self->decode, i), leaf) : 0;
}

static int lay_out_buffers(Leaves *self, int writable) {
    for (Py_ssize_t i = 0; i < self->held; i++) {
        array_t array;
        int outcome = read_buffer(self, i, &array);
        if (!outcome) outcome = lay_out_leaf(self, i, &array, writable);
        if (outcome) return outcome;
    }
    return list_all(self, self->held, writable);
}

const char take_doc[] =
"take(arrays, writable, decode)\n--\n\n"
"Hold the memory of a list of arrays, or return None if one of them needs care, or all have more\n"
"elements than int64 counts.\n\n"
"decode is None where the arrays come from a user: then only objects of one type are taken, and\n"
"only float16, float32, float64, complex64 and complex128. Else it has an entry for each array: a uint16 array is\n"
"bfloat16, and a uint8 array holds codes whose 256 float32 values the entry gives as bytes.\n"
"With writable, an array listed twice counts once.";

PyObject *take(PyObject *module, PyObject *args) {
    PyObject *arrays, *decode;
    int writable;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!pO", &PyList_Type, &arrays, &writable, &decode)) return NULL;
    Py_ssize_t count = PyList_Size(arrays);
    if (decode != Py_None && (!PyList_Check(decode) || PyList_Size(decode) != count)) {
        PyErr_SetString(PyExc_ValueError, "decode must be None or a list as long as arrays");
        return NULL;
    }
    PyObject *taken = decode == Py_None ? take_arrays(arrays, writable) : NULL;
    if (taken != Py_None && (taken || PyErr_Occurred())) return taken;
    Py_XDECREF(taken);
    Leaves *self = new_leaves(count);
    if (!self) return NULL;
    self->decode = decode == Py_None ? NULL : PyList_AsTuple(decode);
    if (decode != Py_None && !self->decode) return give(self, FAILED);
    int outcome = hold_buffers(self, arrays, writable);
    return give(self, outcome ? outcome : lay_out_buffers(self, writable));
}
