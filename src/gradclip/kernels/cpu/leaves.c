#define PY_SSIZE_T_CLEAN
#include "leaves.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "taking.h"
#include "team.h"

static PyObject *leaves_type;

/* ---- coming and going ---- */

Leaves *new_leaves(Py_ssize_t count) {
    PyTypeObject *type = (PyTypeObject *)leaves_type;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Leaves *self = (Leaves *)allocate(type, 0);
    if (!self) return NULL;
    self->leaves = calloc((size_t)count + 1, sizeof *self->leaves);
    self->count = count;
    if (self->leaves) return self;
    Py_DECREF(self);
    PyErr_NoMemory();
    return NULL;
}

int lay_out_leaf(Leaves *self, Py_ssize_t i, const array_t *array, int writable) {
    int64_t geometry[2 * (MOST_DIMENSIONS + 1)];
    leaf_t *leaf = &self->leaves[i];
    if (lay_out(array, leaf, writable, geometry) < 0) return NEEDS_CARE;
    if (!leaf->ndim) return 0;
    size_t numbers = 2 * (size_t)leaf->ndim;
    int64_t *own = malloc(numbers * sizeof *own);
    if (own) memcpy(own, geometry, numbers * sizeof *own);
    leaf->shape = own;
    leaf->strides = own ? own + leaf->ndim : NULL;
    return own ? 0 : NO_MEMORY;
}

int list_all(Leaves *self, Py_ssize_t count, int writable) {
    self->crowded = writable ? drop_repeats(self->leaves, count) : 0;
    if (self->crowded < 0) return NO_MEMORY;
    return list_leaves(&self->list, self->leaves, count) < 0 ? NEEDS_CARE : 0;
}

PyObject *give(Leaves *self, int outcome) {
    if (!outcome) return (PyObject *)self;
    Py_DECREF((PyObject *)self);
    if (outcome == NEEDS_CARE) Py_RETURN_NONE;
    if (outcome == NO_MEMORY) PyErr_NoMemory();
    return NULL;
}

static void leaves_dealloc(Leaves *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    for (Py_ssize_t i = 0; i < self->held; i++) PyBuffer_Release(&self->buffers[i]);
    free(self->buffers);
    Py_XDECREF(self->objects);
    for (Py_ssize_t i = 0; self->leaves && i < self->count; i++)
        if (self->leaves[i].ndim) free((void *)(uintptr_t)self->leaves[i].shape);
    free(self->leaves);
    Py_XDECREF(self->decode);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* ---- walks ---- */

/* Walk the list from its beginning. */
static int walk_all(Leaves *self, share_t *walk, job_t *job, int threads) {
    job->list = &self->list;
    atomic_store(&self->list.cursor, 0);
    return (self->framework ? walk_as_team : walk_together)(walk, job, threads);
}

PyObject *list_sums(const sum_t *sums, int shares) {
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < shares; i++)
        append(&list, Py_BuildValue("ddOO", sums[i].high, sums[i].low,
                                    sums[i].has_inf ? Py_True : Py_False,
                                    sums[i].has_nan ? Py_True : Py_False));
    return list;
}

static PyObject *leaves_sum_squares(Leaves *self, PyObject *args) {
    int threads;
    if (!PyArg_ParseTuple(args, "i", &threads)) return NULL;
    sum_t *sums = calloc((size_t)threads, sizeof *sums);
    if (!sums) return PyErr_NoMemory();
    job_t job = {.sums = sums};
    int shares = walk_all(self, sum_share, &job, threads);
    PyObject *list = list_sums(sums, shares);
    free(sums);
    return list;
}

/* The norm of each leaf as far as sums prove it, from those of all shares; 0 and in `unsure` else. */
static void certify_each(const Leaves *self, const sum_t *sums, int shares, double *significands,
                         int64_t *exponents, PyObject **unsure) {
    int64_t count = self->list.count;
    for (int64_t i = 0; i < count; i++) {
        sum_t sum = sum_of_sums(&sums[i], shares, count);
        int64_t root[2] = {0, 0};
        significands[i] = 0;
        exponents[i] = 0;
        if (sum.has_nan || sum.has_inf) {
            significands[i] = sum.has_nan ? NAN : INFINITY;
        } else if ((self->leaves[i].kind == F64 && self->leaves[i].size) ||
                   !certified_root(&sum, 1, root)) {
            append(unsure, PyLong_FromLongLong((long long)i));
        } else if (root[0]) {
            significands[i] = ldexp((double)root[0], -53);
            exponents[i] = root[1] + 53;
        }
    }
}

static PyObject *leaves_norms(Leaves *self, PyObject *args) {
    int threads;
    if (!PyArg_ParseTuple(args, "i", &threads)) return NULL;
    size_t count = (size_t)self->list.count;
    sum_t *sums = calloc(count * (size_t)threads + 1, sizeof *sums);
    double *significands = malloc((count + 1) * sizeof *significands);
    int64_t *exponents = malloc((count + 1) * sizeof *exponents);
    PyObject *unsure = NULL, *result = NULL;
    if (sums && significands && exponents) {
        job_t job = {.sums = sums};
        int shares = walk_all(self, sum_each_share, &job, threads);
        unsure = PyList_New(0);
        certify_each(self, sums, shares, significands, exponents, &unsure);
        sum_t whole = sum_of_sums(sums, shares * (int64_t)count, 1);
        PyObject *all = list_sums(&whole, 1);
        if (unsure && all)
            result = Py_BuildValue("y#y#OO", (const char *)significands, (Py_ssize_t)(8 * count),
                                   (const char *)exponents, (Py_ssize_t)(8 * count), unsure, all);
        Py_XDECREF(all);
    } else {
        PyErr_NoMemory();
    }
    Py_XDECREF(unsure);
    free(sums);
    free(significands);
    free(exponents);
    return result;
}

static PyObject *leaves_only(Leaves *self, PyObject *args) {
    Py_ssize_t i;
    if (!PyArg_ParseTuple(args, "n", &i)) return NULL;
    if (i < 0 || i >= (Py_ssize_t)self->list.count) {
        PyErr_SetString(PyExc_IndexError, "there is no such leaf");
        return NULL;
    }
    Leaves *only = new_leaves(1);
    if (!only) return NULL;
    leaf_t *leaf = &only->leaves[0];
    *leaf = self->leaves[i];
    leaf->ndim = 0; /* until it owns its geometry */
    only->framework = self->framework;
    only->objects = PyTuple_Pack(1, (PyObject *)self); /* which keeps the memory */
    size_t numbers = 2 * (size_t)self->leaves[i].ndim;
    int64_t *own = numbers ? malloc(numbers * sizeof *own) : NULL;
    if (!only->objects || (numbers && !own)) return give(only, own || !numbers ? FAILED : NO_MEMORY);
    if (own) {
        leaf->ndim = self->leaves[i].ndim;
        memcpy(own, leaf->shape, numbers / 2 * sizeof *own);
        memcpy(own + leaf->ndim, leaf->strides, numbers / 2 * sizeof *own);
        leaf->shape = own;
        leaf->strides = own + leaf->ndim;
    }
    return give(only, list_all(only, 1, 0));
}

static PyObject *leaves_rows(Leaves *self, PyObject *args) {
    const char *given;
    Py_ssize_t bytes, count = (Py_ssize_t)self->list.count, all = 0;
    if (!PyArg_ParseTuple(args, "y#", &given, &bytes)) return NULL;
    int64_t *rows = malloc((size_t)bytes + 1);
    if (!rows) return PyErr_NoMemory();
    memcpy(rows, given, (size_t)bytes);
    int good = bytes == 8 * count;
    for (Py_ssize_t i = 0; good && i < count; i++) {
        const leaf_t *leaf = &self->leaves[i];
        good = rows[i] > 0 && leaf->size % rows[i] == 0 && !leaf->ndim &&
               !__builtin_add_overflow(all, rows[i], &all);
    }
    Leaves *new = good ? new_leaves(all) : NULL;
    if (new) {
        leaf_t *row = new->leaves;
        for (Py_ssize_t i = 0; i < count; i++)
            for (int64_t j = 0; j < rows[i]; j++, row++) {
                *row = self->leaves[i];
                row->size /= rows[i];
                row->data += j * row->size * item_size(row->kind);
            }
        new->framework = self->framework;
        new->objects = PyTuple_Pack(1, (PyObject *)self); /* which keeps the memory */
    }
    free(rows);
    if (!good) Py_RETURN_NONE;
    return new ? give(new, new->objects ? list_all(new, all, 0) : FAILED) : NULL;
}

static PyObject *leaves_exact_squares(Leaves *self, PyObject *args) {
    int threads;
    if (!PyArg_ParseTuple(args, "i", &threads)) return NULL;
    total_t *totals = calloc((size_t)threads, sizeof *totals);
    if (!totals) return PyErr_NoMemory();
    job_t job = {.totals = totals};
    int shares = walk_all(self, exact_share, &job, threads);
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < shares; i++)
        append(&list,
               Py_BuildValue("y#y#d", (const char *)totals[i].narrow,
                             (Py_ssize_t)sizeof totals[i].narrow, (const char *)totals[i].wide,
                             (Py_ssize_t)sizeof totals[i].wide, totals[i].largest));
    free(totals);
    return list;
}

static int have_same_layout(const list_t *a, const list_t *b) {
    if (a->count != b->count) return 0;
    for (int64_t i = 0; i < a->count; i++)
        if (a->leaves[i].size != b->leaves[i].size || a->leaves[i].kind != b->leaves[i].kind)
            return 0;
    return 1;
}

/* The new bytes for each leaf of codes, from a list; NULL with an error. To be freed. */
static const uint8_t **read_tables(const list_t *list, PyObject *tables) {
    const uint8_t **recode = calloc((size_t)list->count + 1, sizeof *recode);
    if (!recode) PyErr_NoMemory();
    for (int64_t i = 0; recode && i < list->count; i++) {
        if (list->leaves[i].kind != BYTE || !list->leaves[i].size) continue;
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
    return recode;
}

/* Scale what is in `source` by factors, one for each leaf or, with a step of 0, one for all. */
static PyObject *scale_from(Leaves *self, PyObject *source, const factor_t *factors, int step,
                            PyObject *tables, int threads) {
    if (Py_TYPE(source) != (PyTypeObject *)leaves_type) {
        PyErr_SetString(PyExc_TypeError, "source must be Leaves");
        return NULL;
    }
    const list_t *from = &((Leaves *)source)->list;
    if (!have_same_layout(from, &self->list)) {
        PyErr_SetString(PyExc_ValueError, "source and target differ in layout");
        return NULL;
    }
    const uint8_t **recode = read_tables(&self->list, tables);
    if (!recode) return NULL;
    job_t job = {.source = from, .factors = factors, .step = step, .recode = recode};
    walk_all(self, scale_share, &job, threads);
    free(recode);
    Py_RETURN_NONE;
}

static PyObject *leaves_scale(Leaves *self, PyObject *args) {
    PyObject *source, *tables;
    double significand;
    long long exponent;
    int threads;
    if (!PyArg_ParseTuple(args, "OdLOi", &source, &significand, &exponent, &tables, &threads))
        return NULL;
    factor_t factor = factor_of(significand, exponent);
    return scale_from(self, source, &factor, 0, tables, threads);
}

static PyObject *leaves_scale_each(Leaves *self, PyObject *args) {
    PyObject *source, *tables;
    const char *significands, *exponents;
    Py_ssize_t ones, others, count = (Py_ssize_t)self->list.count;
    int threads;
    if (!PyArg_ParseTuple(args, "Oy#y#Oi", &source, &significands, &ones, &exponents, &others,
                          &tables, &threads))
        return NULL;
    if (ones != 8 * count || others != 8 * count) {
        PyErr_SetString(PyExc_ValueError, "there must be a factor for each leaf");
        return NULL;
    }
    factor_t *factors = malloc((size_t)(count + 1) * sizeof *factors);
    if (!factors) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        double significand;
        int64_t exponent;
        memcpy(&significand, significands + 8 * i, 8);
        memcpy(&exponent, exponents + 8 * i, 8);
        factors[i] = factor_of(significand, exponent);
    }
    PyObject *done = scale_from(self, source, factors, 1, tables, threads);
    free(factors);
    return done;
}

/* ---- where leaves lie ---- */

/* Where each leaf lies: its address, how many numbers it has, and their kind. */
static PyObject *leaves_spans(Leaves *self, PyObject *unused) {
    (void)unused;
    Py_ssize_t count = (Py_ssize_t)self->list.count;
    for (Py_ssize_t i = 0; i < count; i++)
        if (self->leaves[i].size && (self->leaves[i].ndim || self->leaves[i].swap)) Py_RETURN_NONE;
    int64_t *spans = malloc((size_t)(3 * count + 1) * sizeof *spans);
    if (!spans) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        spans[3 * i] = (int64_t)(uintptr_t)self->leaves[i].data;
        spans[3 * i + 1] = self->leaves[i].size;
        spans[3 * i + 2] = self->leaves[i].kind;
    }
    PyObject *bytes = PyBytes_FromStringAndSize((char *)spans, 24 * count);
    free(spans);
    return bytes;
}

/* The dimensions of a leaf, outermost first: pairs of a stride in bytes and a length. */
static PyObject *steps_of(const leaf_t *leaf) {
    int ndim = leaf->ndim ? leaf->ndim : 1;
    PyObject *steps = PyTuple_New(ndim);
    for (int d = 0; steps && d < ndim; d++) {
        long long stride = leaf->ndim ? leaf->strides[d] : item_size(leaf->kind);
        long long length = leaf->ndim ? leaf->shape[d] : leaf->size;
        PyObject *step = Py_BuildValue("LL", stride, length);
        if (!step || PyTuple_SetItem(steps, d, step) < 0) Py_CLEAR(steps);
    }
    return steps;
}

static PyObject *leaves_crowded(Leaves *self, PyObject *unused) {
    (void)unused;
    if (!self->crowded) Py_RETURN_NONE;
    PyObject *list = PyList_New(0);
    for (int64_t i = 0; list && i < self->list.count; i++) {
        const leaf_t *leaf = &self->leaves[i];
        if (!leaf->size) continue;
        PyObject *steps = steps_of(leaf);
        append(&list, steps ? Py_BuildValue("LKLN", (long long)i,
                                            (unsigned long long)(uintptr_t)leaf->data,
                                            (long long)item_size(leaf->kind), steps)
                            : NULL);
    }
    return list;
}

/* ---- the type ---- */

static PyObject *leaves_get_nbytes(Leaves *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(bytes_of(&self->list));
}

static PyObject *leaves_get_has_f64(Leaves *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->list.has_f64);
}

static PyObject *leaves_get_most_threads(Leaves *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(self->framework ? most_threads() : INT_MAX);
}

static PyMethodDef leaves_methods[] = {
    {"crowded", (PyCFunction)leaves_crowded, METH_NOARGS,
     "crowded(): None; or, where leaves to be written reach into each other's memory, of each that\n"
     "has elements its number, address, bytes of an element, and (stride, length) of dimensions."},
    {"spans", (PyCFunction)leaves_spans, METH_NOARGS,
     "spans(): of each leaf its address, size and kind, as int64; None if one is not in one run."},
    {"sum_squares", (PyCFunction)leaves_sum_squares, METH_VARARGS,
     "sum_squares(threads): shares in float64, each (high, low, has_inf, has_nan)."},
    {"exact_squares", (PyCFunction)leaves_exact_squares, METH_VARARGS,
     "exact_squares(threads): shares, each (narrow words, wide words, largest finite |x|)."},
    {"norms", (PyCFunction)leaves_norms, METH_VARARGS,
     "norms(threads): of each leaf a significand, in float64, and an exponent, in int64; the\n"
     "numbers of those whose norm no sum proves; and the sum of all, in a list, as sum_squares."},
    {"only", (PyCFunction)leaves_only, METH_VARARGS, "only(number): the memory of one leaf."},
    {"rows", (PyCFunction)leaves_rows, METH_VARARGS,
     "rows(counts): each leaf cut into so many, int64, as leaves; None if one is not in one run."},
    {"scale", (PyCFunction)leaves_scale, METH_VARARGS,
     "scale(source, significand, exponent, recode, threads): write shares."},
    {"scale_each", (PyCFunction)leaves_scale_each, METH_VARARGS,
     "scale_each(source, significands, exponents, recode, threads): each leaf by its own."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef leaves_getset[] = {
    {"most_threads", (getter)leaves_get_most_threads, NULL, "That a walk may use.", NULL},
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
    .name = "gradclip.kernels.cpu._cpu.Leaves",
    .basicsize = sizeof(Leaves),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = leaves_slots,
};

int add_leaves_type(PyObject *module) {
    leaves_type = PyType_FromSpec(&leaves_spec);
    return PyModule_AddObjectRef(module, "Leaves", leaves_type);
}
