#ifndef GRADCLIP_WATCH_H
#define GRADCLIP_WATCH_H

#include <Python.h>

/* 0, or -1 with an error. */
int add_watch_type(PyObject *module);

#endif
