/* A framework that says by C functions where its objects' memory is: each object holds a handle,
 * which the functions take. PyTorch is one. */
#define PY_SSIZE_T_CLEAN
#include <limits.h>

#include "taking.h"
#include "team.h"

typedef int32_t failed_t; /* 0: all went well */
typedef failed_t get_pointer_t(void *handle, void **pointer);
typedef failed_t get_numbers_t(void *handle, int64_t **numbers);
typedef failed_t get_number_t(void *handle, int64_t *number);
typedef failed_t get_code_t(void *handle, int32_t *code);

/* The functions, and the numbers that stand for what they say. */
static struct {
    get_pointer_t *get_data;
    get_number_t *get_ndim;
    get_numbers_t *get_shape, *get_strides;
    get_number_t *get_offset, *get_storage;
    get_code_t *get_dtype, *get_device, *get_layout, *get_device_index;
    int32_t f16, bf16, f32, f64, c64, c128, host, strided;
    int32_t at; /* where in an object that begins which its handle points to; 0: not told yet */
    PyTypeObject *type;
    PyObject *strided_layout; /* told where get_layout is 0 */
    int (*most_threads)(void);
} handles;

const char use_handles_doc[] =
"use_handles(functions, numbers, type, strided)\n--\n\n"
"Say by which functions the objects of a type tell where their memory is, and what numbers those\n"
"use, in the order of handles.c; then come omp_get_max_threads and GOMP_parallel, or 0. Where\n"
"there is no function for the layout, and 0 in its place, the objects' attribute is asked, which\n"
"has to be this one.";

PyObject *use_handles(PyObject *module, PyObject *args) {
    unsigned long long f[12];
    PyObject *type, *strided;
    (void)module;
    if (!PyArg_ParseTuple(args, "(KKKKKKKKKKKK)(iiiiiiiii)OO", &f[0], &f[1], &f[2], &f[3], &f[4],
                          &f[5], &f[6], &f[7], &f[8], &f[9], &f[10], &f[11], &handles.f16, &handles.bf16,
                          &handles.f32, &handles.f64, &handles.c64, &handles.c128,
                          &handles.host, &handles.strided, &handles.at, &type, &strided))
        return NULL;
    Py_INCREF(type);
    Py_INCREF(strided);
    handles.strided_layout = strided;
    handles.type = (PyTypeObject *)type;
    handles.get_data = (get_pointer_t *)(uintptr_t)f[0];
    handles.get_ndim = (get_number_t *)(uintptr_t)f[1];
    handles.get_shape = (get_numbers_t *)(uintptr_t)f[2];
    handles.get_strides = (get_numbers_t *)(uintptr_t)f[3];
    handles.get_offset = (get_number_t *)(uintptr_t)f[4];
    handles.get_storage = (get_number_t *)(uintptr_t)f[5];
    handles.get_dtype = (get_code_t *)(uintptr_t)f[6];
    handles.get_device = (get_code_t *)(uintptr_t)f[7];
    handles.get_layout = (get_code_t *)(uintptr_t)f[8];
    handles.get_device_index = (get_code_t *)(uintptr_t)f[9];
    handles.most_threads = (int (*)(void))(uintptr_t)f[10];
    use_team((parallel_t *)(uintptr_t)f[11]);
    Py_RETURN_NONE;
}

int most_threads(void) { return handles.most_threads ? handles.most_threads() : INT_MAX; }

/* ---- one object ---- */

/* 0 and *kind, *parts for a dtype that this kernel reads, else -1. */
static int read_dtype(int32_t dtype, kind_t *kind, int *parts) {
    *parts = dtype == handles.c64 || dtype == handles.c128 ? 2 : 1;
    if (dtype == handles.f32 || dtype == handles.c64)
        *kind = F32;
    else if (dtype == handles.f64 || dtype == handles.c128)
        *kind = F64;
    else if (dtype == handles.bf16)
        *kind = BF16;
    else if (dtype == handles.f16)
        *kind = F16;
    else
        return -1;
    return 0;
}

static void *handle_of(PyObject *object) { return (char *)object + handles.at; }

/* If an object's elements lie one by one in its storage. */
static int is_strided(PyObject *object) {
    int32_t code;
    if (handles.get_layout)
        return !handles.get_layout(handle_of(object), &code) && code == handles.strided;
    PyObject *layout = PyObject_GetAttrString(object, "layout");
    if (!layout) PyErr_Clear(); /* it is met again by whoever takes care of this object */
    Py_XDECREF(layout);
    return layout == handles.strided_layout;
}

/* 0 and the array, or -1 if its elements do not lie in its storage on the device. */
static int read_object(PyObject *object, int32_t type, int32_t index, array_t *array,
                       leaf_t *leaf) {
    void *handle = handle_of(object);
    int32_t on_type, on_index = index, dtype;
    int64_t *shape, *strides, offset, storage;
    void *data;
    if (handles.get_device(handle, &on_type) || on_type != type) return -1;
    if (type != handles.host && handles.get_device_index(handle, &on_index)) return -1;
    if (on_index != index) return -1;
    if (!is_strided(object)) return -1;
    if (handles.get_dtype(handle, &dtype) || read_dtype(dtype, &leaf->kind, &array->parts)) return -1;
    if (handles.get_ndim(handle, &array->ndim) || array->ndim > MOST_DIMENSIONS) return -1;
    if (handles.get_shape(handle, &shape) || handles.get_strides(handle, &strides)) return -1;
    if (handles.get_offset(handle, &offset) || handles.get_storage(handle, &storage)) return -1;
    if (handles.get_data(handle, &data)) return -1;
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

int has_handle(PyObject *object) { return Py_TYPE(object) == handles.type; }

int read_host_memory(PyObject *object, array_t *array, leaf_t *leaf) {
    return read_object(object, handles.host, 0, array, leaf);
}

const char *address_of(PyObject *object) {
    void *data;
    return handles.get_data(handle_of(object), &data) ? NULL : data;
}

/* ---- all of them ---- */

/* What an object and what its handle points to take, in lines of memory that are asked for before
 * they are needed: of thousands of objects none is in a near cache. */
enum { AHEAD = 8, LINES = 4 };

static void ask_ahead(PyObject *objects, Py_ssize_t count, Py_ssize_t i) {
    if (i + 2 * AHEAD < count)
        __builtin_prefetch(handle_of(PyTuple_GetItem(objects, i + 2 * AHEAD)));
    if (i + AHEAD >= count) return;
    const char *held = *(char **)handle_of(PyTuple_GetItem(objects, i + AHEAD));
    for (int line = 0; line < LINES; line++) __builtin_prefetch(held + 64 * line);
}

static int hold_handles(Leaves *self, int32_t type, int32_t index, int writable) {
    for (Py_ssize_t i = 0; i < self->count; i++) {
        array_t array;
        ask_ahead(self->objects, self->count, i);
        PyObject *object = PyTuple_GetItem(self->objects, i);
        if (read_object(object, type, index, &array, &self->leaves[i]) < 0) return NEEDS_CARE;
        int outcome = lay_out_leaf(self, i, &array, writable);
        if (outcome) return outcome;
    }
    return list_all(self, self->count, writable);
}

const char take_handles_doc[] =
"take_handles(objects, writable, type, index)\n--\n\n"
"Hold the memory of objects that have handles, or return None if one of them needs care, or all\n"
"have more elements than int64 counts.\n\n"
"Only float16, bfloat16, float32, float64, complex64 and complex128 are taken, on the device of\n"
"this type and index, of which only spans() is for others than the CPU: type -1.\n"
"With writable, memory that is listed twice counts once.";

PyObject *take_handles(PyObject *module, PyObject *args) {
    PyObject *objects;
    int writable;
    int32_t type, index;
    (void)module;
    if (!PyArg_ParseTuple(args, "Opii", &objects, &writable, &type, &index)) return NULL;
    if (!handles.at) Py_RETURN_NONE;
    if (type < 0) type = handles.host;
    objects = PySequence_Tuple(objects);
    if (!objects) return NULL;
    Leaves *self = new_leaves(PyTuple_Size(objects));
    if (!self) {
        Py_DECREF(objects);
        return NULL;
    }
    self->objects = objects;
    self->framework = 1;
    return give(self, hold_handles(self, type, index, writable));
}
