/* The Python side of cpu.c: arrays come in as objects with the buffer protocol, the GIL is dropped
 * around every walk. Nothing here computes. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

typedef struct {
    PyObject_HEAD
    list_t list;
    Py_buffer *buffers;
    Py_ssize_t held;
    int64_t *geometry; /* the shapes and strides of all leaves */
    leaf_t *leaves;
    PyObject *decode;  /* keeps the tables alive that leaves point to */
    int has_f64;
} Leaves;

/* ---- taking arrays ---- */

/* 0 and *kind, *parts, *swap for a buffer format this kernel reads, else -1. */
static int read_format(const char *format, kind_t *kind, int *parts, int *swap) {
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

typedef struct {
    int64_t length, stride;
} dimension_t;

static int by_stride(const void *a, const void *b) {
    int64_t x = ((const dimension_t *)a)->stride, y = ((const dimension_t *)b)->stride;
    return (x < y) - (x > y);
}

/* Lay out one buffer as few dimensions as possible, in the order of memory. The order in which
 * elements are visited is free, so a negative stride is turned round. Returns 0, or -1 where
 * elements share memory and the leaf is to be written. */
static int lay_out(const Py_buffer *buffer, leaf_t *leaf, int parts, int writable,
                   int64_t *geometry) {
    dimension_t dims[66];
    int ndim = 0;
    int64_t item = item_size(leaf->kind), span = item * parts;
    leaf->data = buffer->buf;
    leaf->size = parts;
    for (int d = 0; d < buffer->ndim; d++) {
        int64_t length = buffer->shape[d], stride = buffer->strides[d];
        leaf->size *= length;
        if (length == 1) continue;
        if (stride < 0) {
            leaf->data += (length - 1) * stride;
            stride = -stride;
        }
        dims[ndim++] = (dimension_t){length, stride};
    }
    if (!leaf->size) return 0;
    qsort(dims, (size_t)ndim, sizeof *dims, by_stride);
    for (int d = ndim - 1; d >= 0 && writable; d--) {
        if (dims[d].stride < span) return -1;
        span = (dims[d].length - 1) * dims[d].stride + span;
    }
    if (parts == 2) dims[ndim++] = (dimension_t){2, item};
    int kept = 0;
    for (int d = 0; d < ndim; d++) {
        if (kept && dims[kept - 1].stride == dims[d].length * dims[d].stride)
            dims[kept - 1] = (dimension_t){dims[kept - 1].length * dims[d].length, dims[d].stride};
        else
            dims[kept++] = dims[d];
    }
    int contiguous = !kept || (kept == 1 && dims[0].stride == item);
    if (contiguous && !leaf->swap && (uintptr_t)leaf->data % (uintptr_t)item == 0) return 0;
    if (!kept) dims[kept++] = (dimension_t){1, item};
    leaf->ndim = kept;
    leaf->shape = geometry;
    leaf->strides = geometry + kept;
    for (int d = 0; d < kept; d++) {
        geometry[d] = dims[d].length;
        geometry[kept + d] = dims[d].stride;
    }
    return 0;
}

static int same_memory(const leaf_t *a, const leaf_t *b) {
    if (a->data != b->data || a->kind != b->kind || a->size != b->size || a->swap != b->swap ||
        a->ndim != b->ndim)
        return 0;
    size_t bytes = (size_t)a->ndim * sizeof(int64_t);
    return !bytes || (!memcmp(a->shape, b->shape, bytes) && !memcmp(a->strides, b->strides, bytes));
}

/* A leaf that lists the memory of an earlier one again is left with no elements of its own. */
static int drop_repeats(leaf_t *leaves, int64_t count) {
    size_t slots = 16;
    while (slots < (size_t)count * 2) slots *= 2;
    int64_t *table = calloc(slots, sizeof *table); /* index + 1; 0 is an empty slot */
    if (!table) return -1;
    for (int64_t i = 0; i < count; i++) {
        if (!leaves[i].size) continue;
        size_t slot = ((uintptr_t)leaves[i].data >> 4) * (size_t)0x9E3779B97F4A7C15 & (slots - 1);
        while (table[slot] && !same_memory(&leaves[table[slot] - 1], &leaves[i]))
            slot = (slot + 1) & (slots - 1);
        if (table[slot])
            leaves[i].size = 0;
        else
            table[slot] = i + 1;
    }
    free(table);
    return 0;
}

static void leaves_dealloc(Leaves *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    for (Py_ssize_t i = 0; i < self->held; i++) PyBuffer_Release(&self->buffers[i]);
    free(self->buffers);
    free(self->geometry);
    free(self->leaves);
    Py_XDECREF(self->decode);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

PyDoc_STRVAR(take_doc,
"take(arrays, writable, decode)\n--\n\n"
"Hold the memory of a list of arrays, or return None if one of them needs care.\n\n"
"decode is None where the arrays come from a user: then only objects of one type are taken, and\n"
"only float16, float32, float64, complex64 and complex128. Else it has an entry for each array: a uint16 array is\n"
"bfloat16, and a uint8 array holds codes whose 256 float32 values the entry gives as bytes.\n"
"With writable, an array listed twice counts once.");

static PyObject *leaves_type;

static PyObject *take(PyObject *module, PyObject *args) {
    PyObject *arrays, *decode;
    int writable;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!pO", &PyList_Type, &arrays, &writable, &decode)) return NULL;
    Py_ssize_t count = PyList_Size(arrays);
    if (decode != Py_None && (!PyList_Check(decode) || PyList_Size(decode) != count)) {
        PyErr_SetString(PyExc_ValueError, "decode must be None or a list as long as arrays");
        return NULL;
    }
    PyTypeObject *type = (PyTypeObject *)leaves_type;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Leaves *self = (Leaves *)allocate(type, 0);
    if (!self) return NULL;
    self->decode = decode == Py_None ? NULL : PyList_AsTuple(decode);
    if (decode != Py_None && !self->decode) goto error;
    size_t room = (size_t)count + 1;
    self->buffers = calloc(room, sizeof *self->buffers);
    self->leaves = calloc(room, sizeof *self->leaves);
    if (!self->buffers || !self->leaves) goto memory;
    size_t dimensions = 0;
    int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *array = PyList_GetItem(arrays, i);
        if (decode == Py_None && Py_TYPE(array) != Py_TYPE(PyList_GetItem(arrays, 0))) goto careful;
        if (PyObject_GetBuffer(array, &self->buffers[i], flags) < 0) {
            PyErr_Clear();
            goto careful;
        }
        self->held = i + 1;
        dimensions += 2 * ((size_t)self->buffers[i].ndim + 1);
    }
    self->geometry = malloc((dimensions + 1) * sizeof *self->geometry);
    if (!self->geometry) goto memory;
    int64_t *geometry = self->geometry;
    for (Py_ssize_t i = 0; i < count; i++) {
        leaf_t *leaf = &self->leaves[i];
        int parts;
        if (read_format(self->buffers[i].format, &leaf->kind, &parts, &leaf->swap) < 0)
            goto careful;
        if (leaf->kind == BF16 || leaf->kind == BYTE) {
            if (decode == Py_None) goto careful;
            PyObject *table = PyTuple_GetItem(self->decode, i);
            if (leaf->kind == BYTE) {
                char *bytes;
                Py_ssize_t size;
                if (PyBytes_AsStringAndSize(table, &bytes, &size) < 0) goto error;
                if (size != 256 * (Py_ssize_t)sizeof(float)) {
                    PyErr_SetString(PyExc_ValueError, "a decode table has 256 float32 values");
                    goto error;
                }
                leaf->decode = (const float *)(const void *)bytes;
            }
        }
        if (lay_out(&self->buffers[i], leaf, parts, writable, geometry) < 0) goto careful;
        geometry += 2 * (self->buffers[i].ndim + 1);
        self->has_f64 |= leaf->kind == F64;
    }
    if (writable && drop_repeats(self->leaves, count) < 0) goto memory;
    self->list.leaves = self->leaves;
    self->list.count = count;
    for (Py_ssize_t i = 0; i < count; i++) {
        self->leaves[i].first = self->list.size;
        self->list.size += self->leaves[i].size;
    }
    return (PyObject *)self;
careful:
    Py_DECREF(self);
    Py_RETURN_NONE;
memory:
    PyErr_NoMemory();
error:
    Py_DECREF(self);
    return NULL;
}

/* ---- the walks ---- */

static PyObject *leaves_rewind(Leaves *self, PyObject *unused) {
    (void)unused;
    atomic_store(&self->list.cursor, 0);
    Py_RETURN_NONE;
}

static PyObject *leaves_sum_squares(Leaves *self, PyObject *unused) {
    sum_t sum;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    sum_squares(&self->list, &sum);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("ddOO", sum.high, sum.low, sum.has_inf ? Py_True : Py_False,
                         sum.has_nan ? Py_True : Py_False);
}

static PyObject *leaves_exact_squares(Leaves *self, PyObject *unused) {
    total_t total;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    exact_squares(&self->list, &total);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("y#y#d", (const char *)total.narrow, (Py_ssize_t)sizeof total.narrow,
                         (const char *)total.wide, (Py_ssize_t)sizeof total.wide, total.largest);
}

static PyObject *leaves_scale(Leaves *self, PyObject *args) {
    PyObject *source, *tables;
    factor_t factor;
    if (!PyArg_ParseTuple(args, "OfdddO", &source, &factor.narrow, &factor.narrow_wide,
                          &factor.wide, &factor.shift, &tables))
        return NULL;
    if (Py_TYPE(source) != (PyTypeObject *)leaves_type) {
        PyErr_SetString(PyExc_TypeError, "source must be Leaves");
        return NULL;
    }
    const list_t *from = &((Leaves *)source)->list;
    int64_t count = self->list.count;
    int same = from->count == count;
    for (int64_t i = 0; same && i < count; i++)
        same = from->leaves[i].size == self->leaves[i].size &&
               from->leaves[i].kind == self->leaves[i].kind;
    if (!same) {
        PyErr_SetString(PyExc_ValueError, "source and target differ in layout");
        return NULL;
    }
    const uint8_t **recode = calloc((size_t)count + 1, sizeof *recode);
    if (!recode) return PyErr_NoMemory();
    for (int64_t i = 0; i < count; i++) {
        if (self->leaves[i].kind != BYTE || !self->leaves[i].size) continue;
        char *bytes;
        Py_ssize_t size;
        PyObject *table = PyList_Check(tables) ? PyList_GetItem(tables, i) : NULL;
        if (!table || PyBytes_AsStringAndSize(table, &bytes, &size) < 0 || size != 256) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "a uint8 leaf needs a table of 256 bytes");
            free(recode);
            return NULL;
        }
        recode[i] = (const uint8_t *)bytes;
    }
    Py_BEGIN_ALLOW_THREADS
    scale(from, &self->list, &factor, recode);
    Py_END_ALLOW_THREADS
    free(recode);
    Py_RETURN_NONE;
}

static PyObject *leaves_get_nbytes(Leaves *self, void *unused) {
    int64_t nbytes = 0;
    (void)unused;
    for (int64_t i = 0; i < self->list.count; i++)
        nbytes += self->leaves[i].size * item_size(self->leaves[i].kind);
    return PyLong_FromLongLong(nbytes);
}

static PyObject *leaves_get_has_f64(Leaves *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->has_f64);
}

static PyMethodDef leaves_methods[] = {
    {"rewind", (PyCFunction)leaves_rewind, METH_NOARGS,
     "Start over: call it before the threads of each walk."},
    {"sum_squares", (PyCFunction)leaves_sum_squares, METH_NOARGS,
     "Add up this thread's share in float64: (high, low, has_inf, has_nan)."},
    {"exact_squares", (PyCFunction)leaves_exact_squares, METH_NOARGS,
     "Add up this thread's share exactly: (narrow words, wide words, largest finite |x|)."},
    {"scale", (PyCFunction)leaves_scale, METH_VARARGS,
     "scale(source, narrow, narrow_wide, wide, shift, recode): write this thread's share."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef leaves_getset[] = {
    {"nbytes", (getter)leaves_get_nbytes, NULL, "Bytes of all leaves.", NULL},
    {"has_f64", (getter)leaves_get_has_f64, NULL, "If a leaf is float64 or complex128.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot leaves_slots[] = {
    {Py_tp_dealloc, leaves_dealloc},
    {Py_tp_methods, leaves_methods},
    {Py_tp_getset, leaves_getset},
    {0, NULL},
};

static PyType_Spec leaves_spec = {
    .name = "gradclip.kernels._cpu.Leaves",
    .basicsize = sizeof(Leaves),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = leaves_slots,
};

/* ---- the module ---- */

static PyObject *py_kernel(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(kernel_name());
}

static PyObject *py_kernels(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *names = PyList_New(0);
    for (const char *const *name = kernel_names(); names && *name; name++) {
        PyObject *text = PyUnicode_FromString(*name);
        if (!text || PyList_Append(names, text) < 0) Py_CLEAR(names);
        Py_XDECREF(text);
    }
    return names;
}

static PyObject *py_choose_kernel(PyObject *module, PyObject *args) {
    const char *name;
    (void)module;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    if (choose_kernel(name) < 0) {
        PyErr_Format(PyExc_ValueError, "this processor has no kernel %s", name);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"take", take, METH_VARARGS, take_doc},
    {"kernel", py_kernel, METH_NOARGS, "The kernel in use."},
    {"kernels", py_kernels, METH_NOARGS, "The kernels this processor can run, widest first."},
    {"choose_kernel", py_choose_kernel, METH_VARARGS, "Use the kernel of this name."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_cpu", "The native CPU kernel.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__cpu(void) {
    choose_kernel(kernel_names()[0]);
    PyObject *module = PyModule_Create(&definition);
    leaves_type = PyType_FromSpec(&leaves_spec);
    if (!module || !leaves_type || PyModule_AddObjectRef(module, "Leaves", leaves_type) < 0) {
        Py_XDECREF(module);
        return NULL;
    }
    return module;
}
