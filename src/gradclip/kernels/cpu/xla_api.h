/* XLA's foreign function interface, as xla/ffi/api/c_api.h describes it, up to the last field that
 * is read here. Each structure says its own size, so that later ones may be longer. */
#ifndef GRADCLIP_XLA_API_H
#define GRADCLIP_XLA_API_H

#include <stddef.h>
#include <stdint.h>

typedef struct extension {
    size_t size;
    int type;
    struct extension *next;
} extension_t;

enum { METADATA = 1 }; /* an extension by which XLA asks what a handler was written for */

typedef struct {
    size_t size;
    extension_t *extensions;
    int major, minor;
} version_t;

typedef struct {
    size_t size;
    version_t version;
} metadata_t;

typedef struct {
    extension_t head;
    metadata_t *metadata;
} metadata_extension_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    int dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
} buffer_t;

enum { F16_TYPE = 10, F32_TYPE = 11, F64_TYPE = 12, C64_TYPE = 15, BF16_TYPE = 16, C128_TYPE = 18 };

typedef struct {
    size_t size;
    extension_t *extensions;
    int64_t count;
    int *types;
    buffer_t **buffers;
} buffers_t;

typedef struct {
    const char *text;
    size_t length;
} span_t;

typedef struct {
    int dtype;
    int64_t *value;
} scalar_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    int64_t count;
    int *types;
    span_t **names;
    scalar_t **values;
} attributes_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    const char *message;
    int code;
} error_args_t;

enum { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8 };

typedef struct {
    size_t size;
    extension_t *extensions;
    void *context;
    void (*task)(void *);
    void *data;
} schedule_args_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    void *context;
    int64_t *threads;
} threads_args_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    version_t version;
    const void *internal;
    void *(*create_error)(error_args_t *);
    void *(*message_of_error)(void *);
    void (*destroy_error)(void *);
    void *others[8];
    void *(*schedule)(schedule_args_t *);
    void *(*count_threads)(threads_args_t *);
} api_t;

typedef struct {
    size_t size;
    extension_t *extensions;
    const api_t *api;
    void *context;
    int stage;
    buffers_t arguments;
    buffers_t results;
    attributes_t attributes;
} frame_t;

/* As `XLA_FFI_Error_Destroy_Args`. */
typedef struct {
    size_t size;
    extension_t *extensions;
    void *error;
} destroy_args_t;

#endif
