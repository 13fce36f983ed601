/* The block loops, compiled once for each set of instructions; the processor says which to use. */
#include "targets.h"

#include <math.h>

#include "bits.h"
#include "cpu.h"

enum { PIECE = 512 }; /* of a float16 block, while it is float32 */

typedef struct {
    uint64_t s1[LANES], s2[LANES];
    uint32_t top[LANES], bottom[LANES];
} lanes_t;

/* ---- the targets ---- */

#define AVX512 "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl"
#if defined(__clang__)
#define TARGET_BEGIN_(text) _Pragma(#text)
#define TARGET_BEGIN(flags) \
    TARGET_BEGIN_(clang attribute push(__attribute__((target(flags))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#define TARGET_AVX512 TARGET_BEGIN(AVX512)
#elif defined(__GNUC__)
#define TARGET_BEGIN_(text) _Pragma(#text)
#define TARGET_BEGIN(flags) _Pragma("GCC push_options") TARGET_BEGIN_(GCC target(flags))
#define TARGET_END _Pragma("GCC pop_options")
/* Clang takes whole vectors by itself, and would drop all of the flags for one it does not know. */
#define TARGET_AVX512 TARGET_BEGIN(AVX512) TARGET_BEGIN_(GCC target("prefer-vector-width=512"))
#endif

/* Each copy of the loops has NAME(x), to give it its own names; SQUARE_ADD(v, sum), by fma where
 * that is one instruction; and CONVERT_HALVES and CONVERT_TO_HALVES, which convert as many float16
 * as they can and return how many. The squares are exact, so fma makes no difference but in time;
 * Clang makes no vectors of a sum by fma. */
#define NAME(x) x##_baseline
#if defined(__FP_FAST_FMA) && !defined(__clang__)
#define SQUARE_ADD(v, sum) fma(v, v, sum)
#else
#define SQUARE_ADD(v, sum) ((sum) + (v) * (v))
#endif
#define CONVERT_HALVES(x, n, out) 0
#define CONVERT_TO_HALVES(x, n, out) 0
#include "cpu_blocks.h"
#undef NAME
#undef SQUARE_ADD
#undef CONVERT_HALVES
#undef CONVERT_TO_HALVES

#if defined(__x86_64__) && defined(TARGET_BEGIN)
/* Intrinsics, as compilers do not find this instruction in a loop, and without it float16 takes
 * four times as long to scale. */
#include <cpuid.h>
#include <immintrin.h>

TARGET_BEGIN("avx2,f16c")
static int convert_halves(const uint16_t *x, int n, float *out) {
    int i = 0;
#pragma GCC unroll 4
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    return i;
}

static int convert_to_halves(const float *x, int n, uint16_t *out) {
    int i = 0;
#pragma GCC unroll 4
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    return i;
}
TARGET_END

#if defined(__clang__)
#define SQUARE_ADD(v, sum) ((sum) + (v) * (v))
#else
#define SQUARE_ADD(v, sum) __builtin_fma(v, v, sum)
#endif
#define CONVERT_HALVES convert_halves
#define CONVERT_TO_HALVES convert_to_halves
TARGET_BEGIN("avx2,fma,f16c")
#define NAME(x) x##_avx2
#include "cpu_blocks.h"
#undef NAME
TARGET_END
TARGET_AVX512
#define NAME(x) x##_avx512
#include "cpu_blocks.h"
#undef NAME
TARGET_END
#endif

/* ---- the choice ---- */

typedef struct {
    const char *name;
    const blocks_t *blocks;
} kernel_t;

static const kernel_t KERNELS[] = {
#if defined(__x86_64__) && defined(TARGET_BEGIN)
    {"avx512", &blocks_avx512},
    {"avx2", &blocks_avx2},
#endif
    {"baseline", &blocks_baseline},
};
enum { KERNEL_COUNT = sizeof KERNELS / sizeof KERNELS[0] };

static int processor_has(const char *name) {
#if defined(__x86_64__) && defined(TARGET_BEGIN)
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    /* Clang's function does not know f16c, which needs no more of the system than avx2 does. */
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
    return !strcmp(name, "baseline");
}

static const char *chosen = "baseline";
const blocks_t *blocks = &blocks_baseline;

int choose_kernel(const char *name) {
    for (int i = 0; i < KERNEL_COUNT; i++)
        if (!strcmp(KERNELS[i].name, name) && processor_has(name)) {
            chosen = KERNELS[i].name;
            blocks = KERNELS[i].blocks;
            return 0;
        }
    return -1;
}

const char *kernel_name(void) { return chosen; }

const char *const *kernel_names(void) {
    static const char *names[KERNEL_COUNT + 1];
    int found = 0;
    for (int i = 0; i < KERNEL_COUNT; i++)
        if (processor_has(KERNELS[i].name)) names[found++] = KERNELS[i].name;
    names[found] = NULL;
    return names;
}
