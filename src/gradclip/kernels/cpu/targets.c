/* The block loops, compiled once for each set of instructions; the processor says which to use. */
#include "targets.h"

#include <math.h>

#include "bits.h"
#include "cpu.h"

enum { PIECE = 512 };  /* of a float16 block, while it is float32 */
enum { STRIDE = 256 }; /* numbers scaled before more memory is asked for */

/* Ask for what follows so many numbers a while later. Loops that do much with each number want it
 * from farther ahead, but on Intel not from 2 kB or more. */
enum { NEAR = 1024, LINE = 64 };
#define PREFETCH(at, count, ahead)                                       \
    for (unsigned line = 0; line < sizeof *(at) * (count); line += LINE) \
    __builtin_prefetch((const char *)(at) + (ahead) + line)

/* ---- the targets ---- */

#define AVX512_ "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl"
#if __clang_major__ >= 18 && __clang_major__ <= 21 && !defined(__apple_build_version__)
/* These can leave the 512-bit registers out, and `zig cc` has them do so. */
#define AVX512 AVX512_ ",evex512"
#else
#define AVX512 AVX512_
#endif
#if defined(__clang__)
#define TARGET_BEGIN_(text) _Pragma(#text)
#define TARGET_BEGIN(flags) \
    TARGET_BEGIN_(clang attribute push(__attribute__((target(flags))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#elif defined(__GNUC__)
#define TARGET_BEGIN_(text) _Pragma(#text)
#define TARGET_BEGIN(flags) _Pragma("GCC push_options") TARGET_BEGIN_(GCC target(flags))
#define TARGET_END _Pragma("GCC pop_options")
#endif

/* Each copy of the loops has NAME(x), to give it its own names, and
 * - VECTOR: bytes of the vectors that it works on;
 * - FAR: bytes from which on it asks for memory, but the shortest loop;
 * - WIDEN(x): float32 as float64, each half a vector as a whole one;
 * - MULTIPLY_ADD(a, b, c): a * b + c in float64, rounded once;
 * - SQUARES_ADD(v, sum): sum + v * v, where v * v is exact;
 * - LARGER(a, b), SMALLER(a, b): of each two uint32;
 * - CONVERT_HALVES, CONVERT_TO_HALVES, SCALE_HALVES: do as many float16 as they can, and return how
 *   many; HALVES_AT(x), where there is an instruction: so many as fill a vector, as float64. */
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif
#define NAME(x) x##_baseline
#define VECTOR 16
#define FAR 2048
#define WIDEN(x) __builtin_convertvector(x, NAME(f64s))
#define MULTIPLY_ADD(a, b, c) ((NAME(f64s)){fma((a)[0], (b)[0], (c)[0]), fma((a)[1], (b)[1], (c)[1])})
#if defined(__FP_FAST_FMA)
#define SQUARES_ADD(v, sum) MULTIPLY_ADD(v, v, sum)
#else
#define SQUARES_ADD(v, sum) ((sum) + (v) * (v))
#endif
#define LARGER(a, b) SELECT((a) > (b), a, b)
#define SMALLER(a, b) SELECT((a) < (b), a, b)
#define SELECT(which, a, b) (((NAME(u32s))(which) & (a)) | (~(NAME(u32s))(which) & (b)))
#define CONVERT_HALVES(x, n, out) 0
#define CONVERT_TO_HALVES(x, n, out) 0
#define SCALE_HALVES(x, n, c, out) 0
#include "cpu_blocks.h"
#undef NAME
#undef VECTOR
#undef FAR
#undef WIDEN
#undef MULTIPLY_ADD
#undef SQUARES_ADD
#undef LARGER
#undef SMALLER
#undef SELECT
#undef CONVERT_HALVES
#undef CONVERT_TO_HALVES
#undef SCALE_HALVES

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

/* In registers all the way: as by way of float32 in memory, each is rounded to that and then again. */
static int scale_halves(const uint16_t *x, int n, float c, uint16_t *out) {
    enum { STEP = 32 };
    __m256 factor = _mm256_set1_ps(c);
    int i = 0;
    for (; i + STEP <= n; i += STEP) {
        PREFETCH(x + i, STEP, NEAR);
        UNROLLED for (int j = i; j < i + STEP; j += 8) {
            __m256 old = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + j)));
            __m128i new = _mm256_cvtps_ph(_mm256_mul_ps(old, factor), _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128((__m128i *)(out + j), new);
        }
    }
    return i;
}
TARGET_END

#define SQUARES_ADD(v, sum) MULTIPLY_ADD(v, v, sum)
#define CONVERT_HALVES convert_halves
#define CONVERT_TO_HALVES convert_to_halves
#define SCALE_HALVES scale_halves
TARGET_BEGIN("avx2,fma,f16c")
#define NAME(x) x##_avx2
#define VECTOR 32
#define FAR 2048
#define WIDEN(x) ((NAME(f64s))_mm256_cvtps_pd((__m128)(x)))
#define MULTIPLY_ADD(a, b, c) ((NAME(f64s))_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define LARGER(a, b) ((NAME(u32s))_mm256_max_epu32((__m256i)(a), (__m256i)(b)))
#define SMALLER(a, b) ((NAME(u32s))_mm256_min_epu32((__m256i)(a), (__m256i)(b)))
#define HALVES_AT(x) WIDEN(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(x))))
#include "cpu_blocks.h"
#undef NAME
#undef VECTOR
#undef FAR
#undef WIDEN
#undef MULTIPLY_ADD
#undef LARGER
#undef SMALLER
#undef HALVES_AT
TARGET_END
TARGET_BEGIN(AVX512)
#define NAME(x) x##_avx512
#define VECTOR 64
#define FAR NEAR
#define WIDEN(x) ((NAME(f64s))_mm512_cvtps_pd((__m256)(x)))
#define MULTIPLY_ADD(a, b, c) ((NAME(f64s))_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#define LARGER(a, b) ((NAME(u32s))_mm512_max_epu32((__m512i)(a), (__m512i)(b)))
#define SMALLER(a, b) ((NAME(u32s))_mm512_min_epu32((__m512i)(a), (__m512i)(b)))
#define HALVES_AT(x) WIDEN(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x))))
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

#if defined(__x86_64__) && defined(TARGET_BEGIN)
/* Asked of the processor itself: Clang's __builtin_cpu_supports does not know f16c, and `zig cc` for
 * Windows lacks what is behind it. A system has to keep the registers too, which macOS says of those
 * of AVX-512 only when they have been used: there avx2 is taken. */
static unsigned registers_kept(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int avx2_is_there(void) {
    const unsigned with_avx2 = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & with_avx2) == with_avx2 &&
           (registers_kept() & 0x06) == 0x06 && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           b & bit_AVX2;
}

static int avx512_is_there(void) {
    const unsigned all = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    unsigned a, b, c, d;
    return avx2_is_there() && (registers_kept() & 0xe6) == 0xe6 &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & all) == all;
}
#endif

static int processor_has(const char *name) {
#if defined(__x86_64__) && defined(TARGET_BEGIN)
    if (!strcmp(name, "avx2")) return avx2_is_there();
    if (!strcmp(name, "avx512")) return avx512_is_there();
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
