/* The Python side of cpu.c: arrays come in as objects with the buffer protocol, or as tensors behind
 * PyTorch's C interface. The GIL is dropped around every walk. Nothing here computes. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <fenv.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "xla.h"

typedef struct {
    PyObject_HEAD
    list_t list;
    Py_buffer *buffers;
    Py_ssize_t held;   /* buffers */
    PyObject *tensors; /* or else a tuple of these */
    int64_t *geometry; /* the shapes and strides of all leaves */
    leaf_t *leaves;
    PyObject *decode;  /* keeps the tables alive that leaves point to */
    int has_f64;
    int crowded;       /* if leaves to be written reach into each other's memory */
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

/* 0 and how many real numbers an array has, or -1 if int64 cannot count them. */
static int count_numbers(const array_t *array, int64_t *size) {
    *size = array->parts;
    for (int64_t d = 0; d < array->ndim; d++)
        if (!array->shape[d]) *size = 0;
    for (int64_t d = 0; *size && d < array->ndim; d++)
        if (__builtin_mul_overflow(*size, array->shape[d], size)) return -1;
    return 0;
}

/* Lay out an array as few dimensions as possible, in the order of memory. The order in which
 * elements are visited is free, so a negative stride is turned round. Returns 0, or -1 where there
 * are too many elements, or where some share memory and the leaf is to be written. */
static int lay_out(const array_t *array, leaf_t *leaf, int writable, int64_t *geometry) {
    dimension_t dims[MOST_DIMENSIONS + 2];
    int ndim = 0, parts = array->parts;
    int64_t item = item_size(leaf->kind), span = item * parts;
    leaf->data = array->data;
    if (count_numbers(array, &leaf->size) < 0) return -1;
    if (!leaf->size) return 0;
    for (int64_t d = 0; d < array->ndim; d++) {
        int64_t length = array->shape[d], stride = array->strides[d] * array->unit;
        if (length == 1) continue;
        if (stride < 0) {
            leaf->data += (length - 1) * stride;
            stride = -stride;
        }
        dims[ndim++] = (dimension_t){length, stride};
    }
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

/* ---- leaves that share memory ---- */

/* A leaf, small: to visit the leaves themselves in another order than they are in takes long. */
typedef struct {
    uint64_t address;
    uint32_t leaf;
    uint32_t bytes; /* from the first to the last; MANY: ask the leaf */
} place_t;

static const uint32_t MANY = UINT32_MAX;

/* Sort what is nearly in order, as memory that was taken in one go is. Returns 0 if it is not;
 * what has the same address stays in its order in any case. */
static int sort_by_insertion(place_t *places, int64_t count) {
    int64_t moves = count / 8 + 512;
    for (int64_t i = 1; i < count; i++) {
        place_t place = places[i];
        int64_t at = i;
        for (; at && places[at - 1].address > place.address && moves; at--, moves--)
            places[at] = places[at - 1];
        places[at] = place;
    }
    return moves > 0;
}

/* Sort by some bits after the other, the lowest first; returns where the result is. */
static place_t *sort_by_digits(place_t *places, place_t *spare, int64_t count) {
    enum { MOST_BITS = 11 };
    int bits = count < 1024 ? 8 : MOST_BITS;
    uint64_t differ = 0, mask = ((uint64_t)1 << bits) - 1;
    for (int64_t i = 1; i < count; i++) differ |= places[i].address ^ places[0].address;
    for (int shift = __builtin_ctzll(differ); shift < 64 && differ >> shift; shift += bits) {
        int64_t begin[(1 << MOST_BITS) + 1];
        memset(begin, 0, (mask + 2) * sizeof *begin);
        for (int64_t i = 0; i < count; i++) begin[(places[i].address >> shift & mask) + 1]++;
        for (uint64_t digit = 1; digit <= mask; digit++) begin[digit] += begin[digit - 1];
        for (int64_t i = 0; i < count; i++)
            spare[begin[places[i].address >> shift & mask]++] = places[i];
        place_t *sorted = spare;
        spare = places;
        places = sorted;
    }
    return places;
}

/* From the first byte of a leaf to behind the last. */
static uint64_t extent(const leaf_t *leaf) {
    int64_t item = item_size(leaf->kind), bytes = leaf->ndim ? item : leaf->size * item;
    for (int d = 0; d < leaf->ndim; d++) bytes += (leaf->shape[d] - 1) * leaf->strides[d];
    return (uint64_t)bytes;
}

/* Leave a leaf that lists the memory of an earlier one again with no elements of its own. Returns
 * if others reach into each other's memory. */
static int drop_repeats(leaf_t *leaves, const place_t *places, int64_t count) {
    const place_t *first = places; /* of those at one address */
    uint64_t end = 0;
    int crowded = 0;
    for (const place_t *place = places; place < places + count; place++) {
        if (place->address != first->address) {
            first = place;
        } else if (place != first && same_memory(&leaves[first->leaf], &leaves[place->leaf])) {
            leaves[place->leaf].size = 0;
            continue;
        }
        crowded |= place->address < end;
        uint64_t bytes = place->bytes == MANY ? extent(&leaves[place->leaf]) : place->bytes;
        end = place->address + bytes; /* the furthest yet, where none are crowded */
    }
    return crowded;
}

/* Look for memory that is listed twice. Returns if leaves reach into each other's, or -1 if there
 * is no memory for it. */
static int find_repeats(leaf_t *leaves, int64_t count) {
    place_t *places = malloc(2 * ((size_t)count + 1) * sizeof *places), *sorted = places;
    if (!places) return -1;
    int64_t filled = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!leaves[i].size) continue;
        uint64_t bytes = extent(&leaves[i]);
        places[filled++] = (place_t){(uintptr_t)leaves[i].data, (uint32_t)i,
                                     bytes < MANY ? (uint32_t)bytes : MANY};
    }
    if (!sort_by_insertion(places, filled))
        sorted = sort_by_digits(places, places + filled, filled);
    int crowded = drop_repeats(leaves, sorted, filled);
    free(places);
    return crowded;
}

/* ---- PyTorch's C interface ---- */

typedef int32_t failed_t; /* 0: all went well */

/* Functions of libtorch_cpu, from torch/csrc/inductor/aoti_torch/c/shim.h, and its numbers. */
static struct {
    failed_t (*get_data)(void *, void **);
    failed_t (*get_ndim)(void *, int64_t *);
    failed_t (*get_shape)(void *, int64_t **);
    failed_t (*get_strides)(void *, int64_t **);
    failed_t (*get_offset)(void *, int64_t *);
    failed_t (*get_storage)(void *, int64_t *);
    failed_t (*get_dtype)(void *, int32_t *);
    failed_t (*get_device)(void *, int32_t *);
    failed_t (*get_layout)(void *, int32_t *);
    failed_t (*get_device_index)(void *, int32_t *);
    /* GOMP_parallel and omp_get_max_threads of the OpenMP that libtorch_cpu has loaded, or NULL:
     * each of a team of threads, the caller one of them, calls the function. */
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*team_size)(void);
    int alone; /* in a forked child, which has none of its parent's threads */
    int32_t f16, bf16, f32, f64, c64, c128, cpu, strided;
    int32_t at; /* where in a Python tensor PyTorch's own begins, to which a handle points */
    PyTypeObject *tensor; /* torch.Tensor */
} torch;

/* ---- taking arrays and tensors ---- */

static void leaves_dealloc(Leaves *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    for (Py_ssize_t i = 0; i < self->held; i++) PyBuffer_Release(&self->buffers[i]);
    free(self->buffers);
    Py_XDECREF(self->tensors);
    free(self->geometry);
    free(self->leaves);
    Py_XDECREF(self->decode);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *leaves_type;

/* Leaves with room for so many, of which none is held yet. */
static Leaves *new_leaves(Py_ssize_t count) {
    PyTypeObject *type = (PyTypeObject *)leaves_type;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Leaves *self = (Leaves *)allocate(type, 0);
    if (!self) return NULL;
    self->leaves = calloc((size_t)count + 1, sizeof *self->leaves);
    if (self->leaves) return self;
    Py_DECREF(self);
    PyErr_NoMemory();
    return NULL;
}

enum { NO_MEMORY = -1, TOO_MANY = -2 };

/* List the leaves that are laid out. Returns 0, NO_MEMORY, or TOO_MANY elements to be counted. */
static int list_leaves(Leaves *self, Py_ssize_t count, int writable) {
    self->crowded = writable ? find_repeats(self->leaves, count) : 0;
    if (self->crowded < 0) return NO_MEMORY;
    self->list.leaves = self->leaves;
    self->list.count = count;
    for (Py_ssize_t i = 0; i < count; i++) {
        self->has_f64 |= self->leaves[i].kind == F64;
        self->leaves[i].first = self->list.size;
        if (__builtin_add_overflow(self->list.size, self->leaves[i].size, &self->list.size))
            return TOO_MANY;
    }
    return 0;
}

PyDoc_STRVAR(take_doc,
"take(arrays, writable, decode)\n--\n\n"
"Hold the memory of a list of arrays, or return None if one of them needs care, or all have more\n"
"elements than int64 counts.\n\n"
"decode is None where the arrays come from a user: then only objects of one type are taken, and\n"
"only float16, float32, float64, complex64 and complex128. Else it has an entry for each array: a uint16 array is\n"
"bfloat16, and a uint8 array holds codes whose 256 float32 values the entry gives as bytes.\n"
"With writable, an array listed twice counts once.");

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
    Leaves *self = new_leaves(count);
    if (!self) return NULL;
    self->decode = decode == Py_None ? NULL : PyList_AsTuple(decode);
    if (decode != Py_None && !self->decode) goto error;
    self->buffers = calloc((size_t)count + 1, sizeof *self->buffers);
    if (!self->buffers) goto memory;
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
        const Py_buffer *buffer = &self->buffers[i];
        const array_t array = {buffer->buf, parts, buffer->ndim, buffer->shape, buffer->strides, 1};
        if (lay_out(&array, leaf, writable, geometry) < 0) goto careful;
        geometry += 2 * (buffer->ndim + 1);
    }
    switch (list_leaves(self, count, writable)) {
    case NO_MEMORY: goto memory;
    case TOO_MANY: goto careful;
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

PyDoc_STRVAR(use_torch_doc,
"use_torch(functions, numbers, tensor)\n--\n\n"
"Say where PyTorch's C interface is, in the order of cpumodule.c; and what torch.Tensor is.");

static PyObject *use_torch(PyObject *module, PyObject *args) {
    unsigned long long f[12];
    PyObject *tensor;
    (void)module;
    if (!PyArg_ParseTuple(args, "(KKKKKKKKKKKK)(iiiiiiiii)O", &f[0], &f[1], &f[2], &f[3], &f[4],
                          &f[5], &f[6], &f[7], &f[8], &f[9], &f[10], &f[11], &torch.f16,
                          &torch.bf16, &torch.f32, &torch.f64, &torch.c64, &torch.c128, &torch.cpu,
                          &torch.strided, &torch.at, &tensor))
        return NULL;
    Py_INCREF(tensor);
    torch.tensor = (PyTypeObject *)tensor;
    torch.get_data = (failed_t(*)(void *, void **))(uintptr_t)f[0];
    torch.get_ndim = (failed_t(*)(void *, int64_t *))(uintptr_t)f[1];
    torch.get_shape = (failed_t(*)(void *, int64_t **))(uintptr_t)f[2];
    torch.get_strides = (failed_t(*)(void *, int64_t **))(uintptr_t)f[3];
    torch.get_offset = (failed_t(*)(void *, int64_t *))(uintptr_t)f[4];
    torch.get_storage = (failed_t(*)(void *, int64_t *))(uintptr_t)f[5];
    torch.get_dtype = (failed_t(*)(void *, int32_t *))(uintptr_t)f[6];
    torch.get_device = (failed_t(*)(void *, int32_t *))(uintptr_t)f[7];
    torch.get_layout = (failed_t(*)(void *, int32_t *))(uintptr_t)f[8];
    torch.get_device_index = (failed_t(*)(void *, int32_t *))(uintptr_t)f[9];
    if (!torch.alone)
        torch.parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))(uintptr_t)f[10];
    torch.team_size = (int (*)(void))(uintptr_t)f[11];
    Py_RETURN_NONE;
}

static PyObject *leave_team(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    torch.parallel = NULL;
    torch.alone = 1;
    Py_RETURN_NONE;
}

/* 0 and *kind, *parts for a dtype of PyTorch that this kernel reads, else -1. */
static int read_dtype(int32_t dtype, kind_t *kind, int *parts) {
    *parts = dtype == torch.c64 || dtype == torch.c128 ? 2 : 1;
    if (dtype == torch.f32 || dtype == torch.c64)
        *kind = F32;
    else if (dtype == torch.f64 || dtype == torch.c128)
        *kind = F64;
    else if (dtype == torch.bf16)
        *kind = BF16;
    else if (dtype == torch.f16)
        *kind = F16;
    else
        return -1;
    return 0;
}

/* 0 and the array of a tensor, or -1 if its elements do not lie in its storage on the device. */
static int read_tensor(void *tensor, int32_t type, int32_t index, array_t *array, leaf_t *leaf) {
    int32_t on_type, on_index = index, layout, dtype;
    int64_t *shape, *strides, offset, storage;
    void *data;
    if (torch.get_device(tensor, &on_type) || on_type != type) return -1;
    if (type != torch.cpu && torch.get_device_index(tensor, &on_index)) return -1;
    if (on_index != index) return -1;
    if (torch.get_layout(tensor, &layout) || layout != torch.strided) return -1;
    if (torch.get_dtype(tensor, &dtype) || read_dtype(dtype, &leaf->kind, &array->parts)) return -1;
    if (torch.get_ndim(tensor, &array->ndim) || array->ndim > MOST_DIMENSIONS) return -1;
    if (torch.get_shape(tensor, &shape) || torch.get_strides(tensor, &strides)) return -1;
    if (torch.get_offset(tensor, &offset) || torch.get_storage(tensor, &storage)) return -1;
    if (torch.get_data(tensor, &data)) return -1;
    array->unit = item_size(leaf->kind) * array->parts;
    int64_t end = offset + 1;
    for (int64_t d = 0; d < array->ndim; d++) {
        if (!shape[d]) end = 0;
        if (end) end += (shape[d] - 1) * strides[d];
    }
    if (end * array->unit > storage || (end && !data)) return -1;
    array->data = data;
    array->shape = shape;
    array->strides = strides;
    return 0;
}

static void *handle_of(PyObject *tensors, Py_ssize_t i) {
    return (char *)PyTuple_GetItem(tensors, i) + torch.at;
}

enum { AHEAD = 8 };

PyDoc_STRVAR(take_tensors_doc,
"take_tensors(tensors, writable, type, index)\n--\n\n"
"Hold the memory of torch.Tensor objects, or return None if one of them needs care, or all have\n"
"more elements than int64 counts.\n\n"
"Only float16, bfloat16, float32, float64, complex64 and complex128 are taken, on the device of\n"
"this type and index, of which only spans() is for others than the CPU: type -1.\n"
"With writable, memory that is listed twice counts once.");

static PyObject *take_tensors(PyObject *module, PyObject *args) {
    PyObject *tensors;
    int writable;
    int32_t type, index;
    (void)module;
    if (!PyArg_ParseTuple(args, "Opii", &tensors, &writable, &type, &index)) return NULL;
    if (!torch.at) Py_RETURN_NONE;
    if (type < 0) type = torch.cpu;
    tensors = PySequence_Tuple(tensors);
    if (!tensors) return NULL;
    Py_ssize_t count = PyTuple_Size(tensors);
    Leaves *self = new_leaves(count);
    if (!self) {
        Py_DECREF(tensors);
        return NULL;
    }
    self->tensors = tensors;
    array_t *arrays = calloc((size_t)count + 1, sizeof *arrays);
    if (!arrays) goto memory;
    size_t dimensions = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + AHEAD < count) __builtin_prefetch(*(void **)handle_of(tensors, i + AHEAD));
        if (read_tensor(handle_of(tensors, i), type, index, &arrays[i], &self->leaves[i]) < 0)
            goto careful;
        dimensions += 2 * ((size_t)arrays[i].ndim + 1);
    }
    self->geometry = malloc((dimensions + 1) * sizeof *self->geometry);
    if (!self->geometry) goto memory;
    int64_t *geometry = self->geometry;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (lay_out(&arrays[i], &self->leaves[i], writable, geometry) < 0) goto careful;
        geometry += 2 * (arrays[i].ndim + 1);
    }
    switch (list_leaves(self, count, writable)) {
    case NO_MEMORY: goto memory;
    case TOO_MANY: goto careful;
    }
    free(arrays);
    return (PyObject *)self;
careful:
    free(arrays);
    Py_DECREF(self);
    Py_RETURN_NONE;
memory:
    PyErr_NoMemory();
    free(arrays);
    Py_DECREF(self);
    return NULL;
}

/* ---- the walks: to nearest and with subnormals, whatever the thread is set to ---- */

static PyObject *leaves_rewind(Leaves *self, PyObject *unused) {
    (void)unused;
    atomic_store(&self->list.cursor, 0);
    Py_RETURN_NONE;
}

/* A thread that is awake takes 5 us to come, in which one reads about so much. */
enum { BYTES_PER_TEAM_MEMBER = 1 << 17 };

/* A walk that each thread of a team takes a share in. */
typedef struct {
    void (*walk)(void *job, int share);
    void *job;
    _Atomic int shares;
} team_t;

static void take_part(void *data) {
    team_t *team = data;
    fenv_t saved;
    fegetenv(&saved);
    fesetenv(FE_DFL_ENV);
    team->walk(team->job, atomic_fetch_add(&team->shares, 1));
    fesetenv(&saved);
}

/* Walk on this thread, or on so many of the team that it shares with PyTorch. Returns how many
 * shares there were. */
static int walk_together(void (*walk)(void *, int), void *job, int threads) {
    team_t team = {walk, job, 0};
    Py_BEGIN_ALLOW_THREADS
    if (threads > 1 && torch.parallel)
        torch.parallel(take_part, &team, (unsigned)threads, 0);
    else
        take_part(&team);
    Py_END_ALLOW_THREADS
    return atomic_load(&team.shares);
}

typedef struct {
    list_t *list;
    sum_t *sums;
    total_t *totals;
    const list_t *source;
    const factor_t *factor;
    const uint8_t *const *recode;
} job_t;

static void sum_share(void *data, int share) {
    job_t *job = data;
    sum_squares(job->list, &job->sums[share]);
}

static void exact_share(void *data, int share) {
    job_t *job = data;
    exact_squares(job->list, &job->totals[share]);
}

static void scale_share(void *data, int share) {
    job_t *job = data;
    (void)share;
    scale(job->source, job->list, job->factor, job->recode);
}

/* The shares as a list of (high, low, has_inf, has_nan). */
static PyObject *list_sums(const sum_t *sums, int shares) {
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < shares; i++) {
        PyObject *share = Py_BuildValue("ddOO", sums[i].high, sums[i].low,
                                        sums[i].has_inf ? Py_True : Py_False,
                                        sums[i].has_nan ? Py_True : Py_False);
        if (!share || PyList_Append(list, share) < 0) Py_CLEAR(list);
        Py_XDECREF(share);
    }
    return list;
}

static PyObject *leaves_sum_squares(Leaves *self, PyObject *args) {
    int threads;
    if (!PyArg_ParseTuple(args, "i", &threads)) return NULL;
    sum_t *sums = calloc((size_t)threads, sizeof *sums);
    if (!sums) return PyErr_NoMemory();
    job_t job = {.list = &self->list, .sums = sums};
    int shares = walk_together(sum_share, &job, threads);
    PyObject *list = list_sums(sums, shares);
    free(sums);
    return list;
}

static PyObject *leaves_exact_squares(Leaves *self, PyObject *args) {
    int threads;
    if (!PyArg_ParseTuple(args, "i", &threads)) return NULL;
    total_t *totals = calloc((size_t)threads, sizeof *totals);
    if (!totals) return PyErr_NoMemory();
    job_t job = {.list = &self->list, .totals = totals};
    int shares = walk_together(exact_share, &job, threads);
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < shares; i++) {
        PyObject *share =
            Py_BuildValue("y#y#d", (const char *)totals[i].narrow,
                          (Py_ssize_t)sizeof totals[i].narrow, (const char *)totals[i].wide,
                          (Py_ssize_t)sizeof totals[i].wide, totals[i].largest);
        if (!share || PyList_Append(list, share) < 0) Py_CLEAR(list);
        Py_XDECREF(share);
    }
    free(totals);
    return list;
}

static PyObject *leaves_scale(Leaves *self, PyObject *args) {
    PyObject *source, *tables;
    double significand;
    long long exponent;
    int threads;
    if (!PyArg_ParseTuple(args, "OdLOi", &source, &significand, &exponent, &tables, &threads))
        return NULL;
    factor_t factor = factor_of(significand, exponent);
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
    job_t job = {.list = &self->list, .source = from, .factor = &factor, .recode = recode};
    walk_together(scale_share, &job, threads);
    free(recode);
    Py_RETURN_NONE;
}

static PyObject *leaves_get_nbytes(Leaves *self, void *unused) {
    uint64_t nbytes = 0; /* where it runs over, an array is broadcast: no memory has so many */
    (void)unused;
    for (int64_t i = 0; i < self->list.count; i++)
        nbytes += (uint64_t)self->leaves[i].size * (uint64_t)item_size(self->leaves[i].kind);
    return PyLong_FromUnsignedLongLong(nbytes);
}

static PyObject *leaves_get_has_f64(Leaves *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->has_f64);
}

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
        PyObject *entry = steps ? Py_BuildValue("LKLN", (long long)i,
                                                (unsigned long long)(uintptr_t)leaf->data,
                                                (long long)item_size(leaf->kind), steps)
                                : NULL;
        if (!entry || PyList_Append(list, entry) < 0) Py_CLEAR(list);
        Py_XDECREF(entry);
    }
    return list;
}

static PyMethodDef leaves_methods[] = {
    {"crowded", (PyCFunction)leaves_crowded, METH_NOARGS,
     "crowded(): None; or, where leaves to be written reach into each other's memory, of each that\n"
     "has elements its number, address, bytes of an element, and (stride, length) of dimensions."},
    {"spans", (PyCFunction)leaves_spans, METH_NOARGS,
     "spans(): of each leaf its address, size and kind, as int64; None if one is not in one run."},
    {"rewind", (PyCFunction)leaves_rewind, METH_NOARGS,
     "Start over: call it before the threads of each walk."},
    {"sum_squares", (PyCFunction)leaves_sum_squares, METH_VARARGS,
     "sum_squares(threads): shares in float64, each (high, low, has_inf, has_nan)."},
    {"exact_squares", (PyCFunction)leaves_exact_squares, METH_VARARGS,
     "exact_squares(threads): shares, each (narrow words, wide words, largest finite |x|)."},
    {"scale", (PyCFunction)leaves_scale, METH_VARARGS,
     "scale(source, significand, exponent, recode, threads): write shares."},
    {NULL, NULL, 0, NULL},
};

/* How many threads of PyTorch work for this one; 1 if there is no asking them. */
static int team_size(void) {
    return torch.parallel && torch.team_size ? torch.team_size() : 1;
}

static PyObject *leaves_get_team_size(Leaves *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(self->tensors ? team_size() : 1);
}

static PyGetSetDef leaves_getset[] = {
    {"team_size", (getter)leaves_get_team_size, NULL, "Threads that a walk may use.", NULL},
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

/* ---- the latest sum of squares of a parameter's gradient ---- */

enum { MOST_SHARES = 64, SAMPLES = 8 };

typedef struct {
    PyObject_HEAD
    int threads;         /* at most so many */
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
    int threads;
    (void)unused;
    if (!PyArg_ParseTuple(args, "i", &threads)) return NULL;
    Watch *self = (Watch *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self) self->threads = threads < MOST_SHARES ? threads : MOST_SHARES;
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
"Watch(threads)\n--\n\n"
"Called with a parameter, it measures its gradient, and remembers which tensor that was.\n\n"
"In C, since it runs when a backward pass has driven everything else out of the caches.");

/* Measure a gradient; nothing is remembered of one that another thread measures or writes too. */
static int measure_gradient(Watch *self, PyObject *gradient, const leaf_t *leaf) {
    long long before, after;
    sum_t sums[MOST_SHARES];
    unsigned long call = ++self->calls;
    list_t list = {.leaves = leaf, .count = 1, .size = leaf->size};
    job_t job = {.list = &list, .sums = sums};
    int64_t worth = leaf->size * item_size(leaf->kind) / BYTES_PER_TEAM_MEMBER;
    int threads = team_size();
    if (threads > self->threads) threads = self->threads;
    if (threads > worth) threads = worth > 1 ? (int)worth : 1;
    if (read_version(gradient, &before) < 0) return -1;
    int shares = walk_together(sum_share, &job, threads); /* other threads may run meanwhile */
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

static PyObject *watch_call(Watch *self, PyObject *args, PyObject *unused) {
    PyObject *parameter;
    (void)unused;
    if (!PyArg_ParseTuple(args, "O", &parameter)) return NULL;
    Py_CLEAR(self->gradient);
    PyObject *gradient = PyObject_GetAttrString(parameter, "grad");
    if (!gradient) return NULL;
    array_t array;
    leaf_t leaf = {0};
    int64_t geometry[2 * (MOST_DIMENSIONS + 1)];
    int failed = 0;
    if (Py_TYPE(gradient) == torch.tensor &&
        read_tensor((char *)gradient + torch.at, torch.cpu, 0, &array, &leaf) == 0 &&
        leaf.kind != F64 &&
        lay_out(&array, &leaf, 1, geometry) == 0 && !leaf.ndim && leaf.size)
        failed = measure_gradient(self, gradient, &leaf);
    Py_DECREF(gradient);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyObject *watch_sums(Watch *self, PyObject *gradient) {
    long long version;
    void *data;
    if (!self->gradient || PyWeakref_GetObject(self->gradient) != gradient ||
        Py_TYPE(gradient) != torch.tensor)
        Py_RETURN_NONE;
    if (read_version(gradient, &version) < 0) return NULL;
    if (version != self->version ||
        torch.get_data((char *)gradient + torch.at, &data) || data != self->data ||
        !looks_the_same(self))
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
    .name = "gradclip.kernels._cpu.Watch",
    .basicsize = sizeof(Watch),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = watch_slots,
};

/* ---- the module ---- */

static PyObject *py_kernel(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(kernel_name());
}

PyDoc_STRVAR(set_ieee_doc,
"set_ieee()\n--\n\n"
"Round to nearest and keep subnormals on this thread; returns what it was set to.");

static PyObject *set_ieee(PyObject *module, PyObject *unused) {
    fenv_t saved;
    (void)module, (void)unused;
    fegetenv(&saved);
    fesetenv(FE_DFL_ENV);
    return PyBytes_FromStringAndSize((const char *)&saved, (Py_ssize_t)sizeof saved);
}

PyDoc_STRVAR(set_arithmetic_doc,
"set_arithmetic(saved)\n--\n\nAs it was before set_ieee.");

static PyObject *set_arithmetic(PyObject *module, PyObject *saved) {
    fenv_t env;
    (void)module;
    if (PyBytes_Size(saved) != (Py_ssize_t)sizeof env) return NULL;
    memcpy(&env, PyBytes_AsString(saved), sizeof env);
    fesetenv(&env);
    Py_RETURN_NONE;
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

static PyObject *py_xla_handlers(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *handlers = PyDict_New();
    for (const xla_handler_t *each = XLA_HANDLERS; handlers && each->name; each++) {
        PyObject *capsule = PyCapsule_New((void *)(uintptr_t)each->handler, NULL, NULL);
        if (!capsule || PyDict_SetItemString(handlers, each->name, capsule) < 0)
            Py_CLEAR(handlers);
        Py_XDECREF(capsule);
    }
    return handlers;
}

static PyObject *py_fault(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const char *fault = trial_fault();
    if (!fault) Py_RETURN_NONE;
    return PyUnicode_FromString(fault);
}

static PyMethodDef methods[] = {
    {"xla_handlers", py_xla_handlers, METH_NOARGS, "What XLA may call: capsules by their names."},
    {"take", take, METH_VARARGS, take_doc},
    {"take_tensors", take_tensors, METH_VARARGS, take_tensors_doc},
    {"use_torch", use_torch, METH_VARARGS, use_torch_doc},
    {"leave_team", leave_team, METH_NOARGS, "Ask no thread of PyTorch any more."},
    {"set_ieee", set_ieee, METH_NOARGS, set_ieee_doc},
    {"set_arithmetic", set_arithmetic, METH_O, set_arithmetic_doc},
    {"fault", py_fault, METH_NOARGS, "Try the kernel in use: None, or what it gets wrong."},
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
    PyObject *watch_type = PyType_FromSpec(&watch_spec);
    if (!module || !leaves_type || PyModule_AddObjectRef(module, "Leaves", leaves_type) < 0 ||
        !watch_type || PyModule_AddObjectRef(module, "Watch", watch_type) < 0 ||
        PyModule_AddIntConstant(module, "BYTES_PER_TEAM_MEMBER", BYTES_PER_TEAM_MEMBER) < 0) {
        Py_XDECREF(module);
        return NULL;
    }
    return module;
}
