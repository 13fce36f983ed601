/* The loops over one block of contiguous elements, for the instructions that have been chosen. */
#ifndef GRADCLIP_TARGETS_H
#define GRADCLIP_TARGETS_H

#include <stdint.h>

/* Of buffers: a vector that lies across two cache lines takes twice as long. */
#define ALIGNED _Alignas(64)

/* The float32 window adds up in so many lanes, and so many squares between two integers. */
enum { LANES = 16, STEPS = 4 };
/* The float64 window adds up so many at a time, or a part of them. */
enum { LANES_F64 = 16, STEPS_F64 = 2 };

/* Sums over examples take so many of them at a time. */
enum { ROWS = 8 };

typedef struct {
    uint64_t sums[3];
    uint64_t top;    /* bits of the largest |x|; of float64 the upper half, and then 0, or 1 where
                        not all are zero */
    uint64_t bottom; /* bits of the smallest nonzero |x|, 0 if there is none; of float64 the upper
                        half of what is less by one: a power of two counts as of the exponent below */
} window_t;

typedef struct {
    double (*sum_f32)(const float *, int);
    double (*sum_bf16)(const uint16_t *, int);
    double (*sum_f16)(const uint16_t *, int);
    void (*load_bf16)(const uint16_t *, int, float *);
    void (*load_f16)(const uint16_t *, int, float *);
    window_t (*window_f32)(const float *, int, double, double);
    window_t (*window_f64)(const double *, int, double, double, double);
    uint32_t (*select_f32)(const float *, int, uint32_t, uint32_t, float *);
    uint64_t (*select_f64)(const double *, int, uint64_t, uint64_t, double, double *);
    void (*scale_f32)(const float *, int, float, float *);
    void (*scale_f32_wide)(const float *, int, double, float *);
    void (*scale_f64)(const double *, int, double, double *);
    void (*scale_bf16)(const uint16_t *, int, float, uint16_t *);
    void (*scale_f16)(const uint16_t *, int, float, uint16_t *);
    void (*store_bf16)(const float *, int, uint16_t *);
    void (*store_f16)(const float *, int, uint16_t *);
    void (*add_rows_f32)(const float *const *, const float *, int, double *);
    void (*add_row_f32)(const float *, float, int, double *);
    void (*add_f64)(const double *, int, double *);
} blocks_t;

extern const blocks_t *blocks;

#endif
