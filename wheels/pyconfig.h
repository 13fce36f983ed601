/* What Python's headers ask of a machine, for each that wheels are built for: all are little-endian
 * with 64 bits. It stands in for the one of the Python that builds, which knows its own machine. */
#ifndef Py_PYCONFIG_H
#define Py_PYCONFIG_H

#define HAVE_STDDEF_H 1
#define SIZEOF_INT 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_VOID_P 8

#ifdef _WIN32
#define HAVE_DECLSPEC_DLL 1
#define MS_WIN32 1
#define MS_WIN64 1
#define MS_WINDOWS 1
#define Py_ENABLE_SHARED 1
#define SIZEOF_LONG 4
#define SIZEOF_WCHAR_T 2
#else
#define _GNU_SOURCE 1
#define SIZEOF_LONG 8
#define SIZEOF_WCHAR_T 4
#endif

#endif
