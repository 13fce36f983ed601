/* The Python side of the walks. The GIL is dropped around every walk. Nothing here computes. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#include "cpu.h"
#include "ieee.h"
#include "taking.h"
#include "team.h"
#include "watch.h"
#include "xla.h"

static PyObject *py_kernel(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(kernel_name());
}

PyDoc_STRVAR(set_ieee_doc,
"set_ieee()\n--\n\n"
"Round to nearest and keep subnormals on this thread; returns what it was set to.");

static PyObject *py_set_ieee(PyObject *module, PyObject *unused) {
    fenv_t saved;
    (void)module, (void)unused;
    set_ieee(&saved);
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
    for (const char *const *name = kernel_names(); names && *name; name++)
        append(&names, PyUnicode_FromString(*name));
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

PyDoc_STRVAR(kinds_doc,
"kinds(items)\n--\n\nThe types of what is in a list, each once.");

/* As set(map(type, items)), in a tenth of the time: lists are long, and mostly of one type. */
static PyObject *py_kinds(PyObject *module, PyObject *items) {
    enum { AHEAD = 8 };
    (void)module;
    items = PyList_AsTuple(items); /* to hash a type may run anyone's code, which may change a list */
    PyObject *kinds = items ? PySet_New(NULL) : NULL;
    PyTypeObject *last = NULL;
    Py_ssize_t count = items ? PyTuple_Size(items) : 0;
    for (Py_ssize_t i = 0; kinds && i < count; i++) {
        if (i + AHEAD < count) __builtin_prefetch(PyTuple_GetItem(items, i + AHEAD));
        PyTypeObject *kind = Py_TYPE(PyTuple_GetItem(items, i));
        if (kind != last && PySet_Add(kinds, (PyObject *)kind) < 0) Py_CLEAR(kinds);
        last = kind;
    }
    Py_XDECREF(items);
    return kinds;
}

PyDoc_STRVAR(distinct_doc,
"distinct(items)\n--\n\nThe objects in a list, each once: equal ones are others.");

static PyObject *py_distinct(PyObject *module, PyObject *items) {
    (void)module;
    Py_ssize_t count = PyList_Size(items);
    PyObject *seen = PySet_New(NULL), *list = count < 0 ? NULL : PyList_New(0), *last = NULL;
    for (Py_ssize_t i = 0; seen && list && i < count; i++) {
        PyObject *item = PyList_GetItem(items, i);
        if (item == last) continue;
        last = item;
        Py_ssize_t before = PySet_Size(seen);
        PyObject *key = PyLong_FromVoidPtr(item);
        if (!key || PySet_Add(seen, key) < 0)
            Py_CLEAR(list);
        else if (PySet_Size(seen) > before)
            append(&list, Py_NewRef(item));
        Py_XDECREF(key);
    }
    Py_XDECREF(seen);
    return list;
}

static PyMethodDef methods[] = {
    {"distinct", py_distinct, METH_O, distinct_doc},
    {"kinds", py_kinds, METH_O, kinds_doc},
    {"xla_handlers", py_xla_handlers, METH_NOARGS, "What XLA may call: capsules by their names."},
    {"take", take, METH_VARARGS, take_doc},
    {"use_arrays", use_arrays, METH_VARARGS, use_arrays_doc},
    {"take_handles", take_handles, METH_VARARGS, take_handles_doc},
    {"use_handles", use_handles, METH_VARARGS, use_handles_doc},
    {"helpers", helpers_ids, METH_NOARGS, "The native ids of the threads that share walks."},
    {"forget_helpers", forget_helpers, METH_NOARGS, "In a forked child, which has none of them."},
    {"set_ieee", py_set_ieee, METH_NOARGS, set_ieee_doc},
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
    if (module && (add_leaves_type(module) < 0 || add_watch_type(module) < 0)) Py_CLEAR(module);
    return module;
}
