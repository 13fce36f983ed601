/* The latest sum of squares of a parameter's gradient. */
#define PY_SSIZE_T_CLEAN
#include "watch.h"

#include <string.h>

#include "taking.h"
#include "team.h"

enum { MOST_SHARES = 64, SAMPLES = 8 };

typedef struct {
    PyObject_HEAD
    int threads;         /* at most so many */
    int bytes_per_thread;
    unsigned long calls;
    PyObject *gradient;  /* a weak reference to what was measured, NULL if nothing was */
    long long version;
    const char *data;
    int64_t last, item;  /* the place of the last number, and bytes of one */
    uint32_t samples[SAMPLES];
    int shares;
    sum_t sums[MOST_SHARES];
} Watch;

static uint32_t sample(const Watch *self, int i) {
    uint32_t bits = 0;
    memcpy(&bits, self->data + self->last * i / (SAMPLES - 1) * self->item, (size_t)self->item);
    return bits;
}

/* If numbers here and there are as they were when the gradient was measured. Some operations of
 * PyTorch write a tensor without counting it: GradScaler.unscale_ does, which changes every number
 * but 0. */
static int looks_the_same(const Watch *self) {
    uint32_t nonzero = 0, differ = 0;
    for (int i = 0; i < SAMPLES; i++) {
        nonzero |= self->samples[i] << (32 - 8 * self->item + 1);
        differ |= self->samples[i] ^ sample(self, i);
    }
    int zero = self->shares == 1 && self->sums[0].high == 0;
    return !differ && (nonzero || zero);
}

/* 0 and how often a tensor has been written, or -1 with an error. */
static int read_version(PyObject *tensor, long long *version) {
    PyObject *number = PyObject_GetAttrString(tensor, "_version");
    *version = number ? PyLong_AsLongLong(number) : 0;
    Py_XDECREF(number);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *watch_new(PyTypeObject *type, PyObject *args, PyObject *unused) {
    int threads, bytes_per_thread;
    (void)unused;
    if (!PyArg_ParseTuple(args, "ii", &threads, &bytes_per_thread)) return NULL;
    Watch *self = (Watch *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) return NULL;
    self->threads = threads < MOST_SHARES ? threads : MOST_SHARES;
    self->bytes_per_thread = bytes_per_thread;
    return (PyObject *)self;
}

static void watch_dealloc(Watch *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    Py_CLEAR(self->gradient);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *watch_forget(Watch *self, PyObject *unused) {
    (void)unused;
    Py_CLEAR(self->gradient);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(watch_doc,
"Watch(threads, bytes_per_thread)\n--\n\n"
"Called with a parameter, it measures its gradient, and remembers which tensor that was.\n\n"
"In C, since it runs when a backward pass has driven everything else out of the caches.");

/* Measure a gradient; nothing is remembered of one that another thread measures or writes too. */
static int measure_gradient(Watch *self, PyObject *gradient, const leaf_t *leaf) {
    long long before, after;
    sum_t sums[MOST_SHARES];
    unsigned long call = ++self->calls;
    list_t list = {.leaves = leaf, .count = 1, .size = leaf->size};
    job_t job = {.list = &list, .sums = sums};
    int64_t worth = leaf->size * item_size(leaf->kind) / self->bytes_per_thread;
    int threads = most_threads();
    if (threads > self->threads) threads = self->threads;
    if (threads > worth) threads = worth > 1 ? (int)worth : 1;
    if (read_version(gradient, &before) < 0) return -1;
    int shares = walk_as_team(sum_share, &job, threads); /* other threads may run meanwhile */
    if (read_version(gradient, &after) < 0) return -1;
    if (call != self->calls || before != after) return 0;
    PyObject *reference = PyWeakref_NewRef(gradient, NULL);
    if (!reference) return -1;
    self->version = after;
    self->data = leaf->data;
    self->last = leaf->size - 1;
    self->item = item_size(leaf->kind);
    for (int i = 0; i < SAMPLES; i++) self->samples[i] = sample(self, i);
    self->shares = shares;
    memcpy(self->sums, sums, (size_t)shares * sizeof *sums);
    PyObject *old = self->gradient;
    self->gradient = reference;
    Py_XDECREF(old);
    return 0;
}

/* If a gradient is one run of numbers that sum_squares adds up. */
static int read_run(PyObject *gradient, leaf_t *leaf) {
    array_t array;
    int64_t geometry[2 * (MOST_DIMENSIONS + 1)];
    return has_handle(gradient) && read_host_memory(gradient, &array, leaf) == 0 &&
           leaf->kind != F64 && lay_out(&array, leaf, 1, geometry) == 0 && !leaf->ndim &&
           leaf->size;
}

static PyObject *watch_call(Watch *self, PyObject *args, PyObject *unused) {
    PyObject *parameter;
    leaf_t leaf = {0};
    (void)unused;
    if (!PyArg_ParseTuple(args, "O", &parameter)) return NULL;
    Py_CLEAR(self->gradient);
    PyObject *gradient = PyObject_GetAttrString(parameter, "grad");
    if (!gradient) return NULL;
    int failed = read_run(gradient, &leaf) ? measure_gradient(self, gradient, &leaf) : 0;
    Py_DECREF(gradient);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyObject *watch_sums(Watch *self, PyObject *gradient) {
    long long version;
    if (!self->gradient || PyWeakref_GetObject(self->gradient) != gradient ||
        !has_handle(gradient))
        Py_RETURN_NONE;
    if (read_version(gradient, &version) < 0) return NULL;
    if (version != self->version || address_of(gradient) != self->data || !looks_the_same(self))
        Py_RETURN_NONE;
    return list_sums(self->sums, self->shares);
}

static PyMethodDef watch_methods[] = {
    {"sums", (PyCFunction)watch_sums, METH_O,
     "sums(gradient): as Leaves.sum_squares; None unless it is as it was when measured."},
    {"forget", (PyCFunction)watch_forget, METH_NOARGS, "Let go of the gradient."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot watch_slots[] = {
    {Py_tp_new, watch_new},
    {Py_tp_dealloc, watch_dealloc},
    {Py_tp_call, watch_call},
    {Py_tp_methods, watch_methods},
    {Py_tp_doc, (void *)watch_doc},
    {0, NULL},
};

static PyType_Spec watch_spec = {
    .name = "gradclip.kernels.cpu._cpu.Watch",
    .basicsize = sizeof(Watch),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = watch_slots,
};

int add_watch_type(PyObject *module) {
    PyObject *type = PyType_FromSpec(&watch_spec);
    int failed = PyModule_AddObjectRef(module, "Watch", type);
    Py_XDECREF(type);
    return failed;
}
