/* cpu.h --- what every CPU kernel uses: the vector of this instruction set, conversion of rows of any dtype
 * to float32 and back, parallel loops, scratch memory.
 *
 * Every file of this folder but parallel.c is compiled once for each ISA of ops.h, with -DISA=<name> and that
 * ISA's flags. Kernels are plain C on `vf`, a vector of VW floats (an extension of GCC and clang), so one
 * source serves every width. */
#ifndef LONGLORA_CPU_H
#define LONGLORA_CPU_H

#include "../ops.h"

#include <math.h>
#include <stddef.h>
#include <string.h>
#if defined __AVX2__ || defined __F16C__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif

#ifndef ISA
#define ISA portable /* for editors; setup.py always defines it */
#endif
#define PASTE_(name, isa) name##_##isa
#define PASTE(name, isa) PASTE_(name, isa)
/* CPU(rms_norm_forward) is rms_norm_forward_avx512 in the AVX-512 build of a file. Every name that is not
 * static needs it. */
#define CPU(name) PASTE(name, ISA)

/* Stands before a loop over registers, of at most 32 turns, and turns it into straight code. clang 14 treats
 * a number as a hint, so it is told "full". */
#if defined __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 32")
#endif

/* ---- vectors --------------------------------------------------------------------------------- */

/* WIDE (see setup.py): portable C in the sizes of AVX-512, with products of bfloat16, so that processors
 * without them can test those sizes. WIDE=2: with the products of the matrix unit as well. */
#if defined __AVX512F__ || defined WIDE
#define VW 16
#elif defined __AVX2__
#define VW 8
#else
#define VW 4
#endif
#if defined __AVX512BF16__ || defined WIDE
#define DOTS 1 /* pairs of bfloat16 are multiplied at once */
#else
#define DOTS 0
#endif
typedef float vf __attribute__((vector_size(4 * VW), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VW), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * VW), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * VW), may_alias));

static inline vf vf_set1(float x) { return x - (vf){ 0 }; }
static inline vf vf_load(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline void vf_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
/* mask is all ones or all zeros in each lane. */
static inline vf vf_select(vi mask, vf a, vf b) {
#if defined __AVX2__ && !defined __AVX512F__
    return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
    return (vf)(((vi)a & mask) | ((vi)b & ~mask));
#endif
}
/* a > b ? a : b and a < b ? a : b, so b where one is a NaN, as the instructions of x86 have it. */
static inline vf vf_max(vf a, vf b) {
#if defined __AVX512F__
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined __AVX2__
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return vf_select(a > b, a, b);
#endif
}
static inline vf vf_min(vf a, vf b) {
#if defined __AVX512F__
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined __AVX2__
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return vf_select(a < b, a, b);
#endif
}
/* Keeps x in a register. gcc would load it again for every use. */
static inline vf vf_keep(vf x) {
#if defined __AVX2__
    __asm__("" : "+v"(x));
#endif
    return x;
}

/* The sum of the lanes, in a fixed tree: halves, quarters, ... Written as shuffles, because gcc turns indices
 * into a loop through memory. */
static inline float vf_sum(vf x) {
#define HALF(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#if VW == 16
    __typeof__(HALF(x, 0, 1, 2, 3, 4, 5, 6, 7)) y =
        HALF(x, 0, 1, 2, 3, 4, 5, 6, 7) + HALF(x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    vf y = x;
#endif
#if VW >= 8
    __typeof__(HALF(y, 0, 1, 2, 3)) z = HALF(y, 0, 1, 2, 3) + HALF(y, 4, 5, 6, 7);
#else
    vf z = y;
#endif
    __typeof__(HALF(z, 0, 1)) sum = HALF(z, 0, 1) + HALF(z, 2, 3);
#undef HALF
    return sum[0] + sum[1];
}

/* Whether any lane of x is `limit` or more, or a NaN. No lane is negative. May also be so for their sum. */
static inline int vf_any_from(vf x, float limit) {
#if defined __AVX512F__
    return _mm512_cmp_ps_mask((__m512)x, (__m512)vf_set1(limit), _CMP_NLT_UQ);
#elif defined __AVX2__
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)vf_set1(limit), _CMP_NLT_UQ));
#else
    return !(vf_sum(x) < limit);
#endif
}

/* exp for x in -88..88, with a relative error below 2^-22 for |x| below 40 and 2^-21.6 at the ends; 0 from
 * -87.7 down. x = n ln2 + r with |r| <= ln2/2; a polynomial in r, times 2^n. The magic number contains the
 * exponent's bias, so n need only be shifted into place. */
static inline vf vf_exp_within(vf x) {
    const float magic = 12582912.0f + 127.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf t = x * 1.44269504088896341f + magic, n = t - magic;
#if defined __AVX512F__
    vf r = (vf)_mm512_fnmadd_ps((__m512)n, (__m512)vf_set1(0.693147182f), (__m512)x);
#elif defined __AVX2__
    vf r = (vf)_mm256_fnmadd_ps((__m256)n, (__m256)vf_set1(0.693147182f), (__m256)x);
#else
    vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
#endif
    vf r2 = r * r,
       p = (4.16683927e-2f + r * 8.36878084e-3f) + r2 * 1.38144672e-3f; /* pairs: a chain half as long */
    p = (0.49999994f + r * 0.166665196f) + r2 * p;
    p = (1.0f + r) + r2 * p;
    return p * (vf)((vu)t << 23);
}
/* The same for any x below 88; NaN stays NaN. */
static inline vf vf_exp_below(vf x) { return vf_exp_within(vf_max(vf_set1(-88.0f), x)); }

/* The same for a score minus a maximum or minus lse. AVX-512 has an instruction for y - floor(y) and one that
 * multiplies by 2^floor(y): y = x / ln2 + 1/2, and the polynomial is 2^(r - 1/2) for r = y - floor(y).
 * Rounding y makes the relative error 2^-22 + 2^-24 |x|, which is less than the error of scores of that size.
 */
static inline vf vf_exp_score(vf x) {
#if defined __AVX512DQ__
    vf y = x * 1.44269504088896341f + 0.5f;
    /* What is subnormal becomes 0, because the processor is slow with it. */
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)y, (__m512)vf_set1(-125.5f), _CMP_NLT_UQ);
    vf r = (vf)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf p = 6.35642334e-3f + r * 1.3276472e-3f;
    p = 3.94751681e-2f + r * p;
    p = 0.169814251f + r * p;
    p = 0.490133238f + r * p;
    p = 0.707106728f + r * p;
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)y);
#else
    return vf_exp_below(x);
#endif
}

/* ---- dtypes: only this part of the CPU side knows how elements are stored -------------------- */

static inline int64_t dtype_size(int32_t dtype) {
    switch (dtype) {
        case F32:
        case I32: return 4;
        case F64:
        case I64: return 8;
        case U8: return 1;
        default: return 2;
    }
}

static inline void *at(const Tensor *t, int64_t offset) {
    return (char *)t->data + offset * dtype_size(t->dtype);
}

static inline float bf16_to_float(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}
static inline uint16_t float_to_bf16(float x) { /* to nearest even; a NaN stays a (quiet) NaN */
    uint32_t u;
    memcpy(&u, &x, 4);
    if (x != x) return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* float16 in plain C, with the same bits as F16C and aarch64. clang before 15 and some C libraries have no
 * _Float16. */
static inline float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, u = (uint32_t)(h & 0x7fff) << 13;
    float x;
    if (u >= 0x0f800000) u |= u > 0x0f800000 ? 0x7fc00000 : 0x7f800000;
    else {
        memcpy(&x, &u, 4);
        x *= 0x1p112f;
        memcpy(&u, &x, 4);
    } /* 2^112 is the difference of the exponents' biases; the product is right for subnormals too */
    u |= sign;
    memcpy(&x, &u, 4);
    return x;
}
static inline uint16_t float_to_f16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (u >> 13 & 0x3ff));
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and above round to infinity */
    if (u < 0x38800000) { /* subnormal: the sum with 1/2 is rounded at 2^-24 */
        x = fabsf(x) + 0.5f;
        memcpy(&u, &x, 4);
        return (uint16_t)(sign | (u - 0x3f000000));
    }
    return (uint16_t)(sign | ((u + 0xfff + (u >> 13 & 1) - (112u << 23)) >> 13));
}

/* An index from an array of the caller, which another thread may change during the call. Whoever uses an
 * index reads it once and checks what was read. */
static inline int32_t index_at(const Tensor *t, int64_t offset) {
    return __atomic_load_n((const int32_t *)at(t, offset), __ATOMIC_RELAXED);
}

/* One element, any of the three float dtypes. */
static inline float load1(const void *p, int32_t dtype) {
    if (dtype == F32) {
        float x;
        memcpy(&x, p, 4);
        return x;
    }
    if (dtype == BF16) {
        uint16_t h;
        memcpy(&h, p, 2);
        return bf16_to_float(h);
    }
    uint16_t h;
    memcpy(&h, p, 2);
    return f16_to_float(h);
}
static inline void store1(void *p, int32_t dtype, float x) {
    if (dtype == F32) memcpy(p, &x, 4);
    else if (dtype == BF16) {
        uint16_t h = float_to_bf16(x);
        memcpy(p, &h, 2);
    } else {
        uint16_t h = float_to_f16(x);
        memcpy(p, &h, 2);
    }
}

/* VW elements. */
static inline vf vf_from_f16(vh h) {
#if defined __AVX512F__
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined __F16C__
    return (vf)_mm256_cvtph_ps((__m128i)h);
#elif defined __aarch64__ && VW == 4
    return (vf)vcvt_f32_f16((float16x4_t)h);
#else
    vf x = { 0 };
    for (int i = 0; i < VW; i++) x[i] = f16_to_float(h[i]);
    return x;
#endif
}
static inline vh vf_to_f16(vf x) {
#if defined __AVX512F__
    return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined __F16C__
    return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined __aarch64__ && VW == 4
    return (vh)vcvt_f16_f32((float32x4_t)x);
#else
    vh h = { 0 };
    for (int i = 0; i < VW; i++) h[i] = float_to_f16(x[i]);
    return h;
#endif
}
static inline vf vf_from_bf16(vh h) { /* gcc would widen each half on its own */
#if defined __AVX512F__
    return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#elif defined __AVX2__
    return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
static inline vf vf_load_any(const void *p, int32_t dtype) {
    if (dtype == F32) return vf_load(p);
    if (dtype == BF16) {
        vh h;
        memcpy(&h, p, sizeof h);
        return vf_from_bf16(h);
    }
    vh h;
    memcpy(&h, p, sizeof h);
    return vf_from_f16(h);
}
static inline void vf_store_any(void *p, int32_t dtype, vf x) {
    if (dtype == F32) {
        vf_store(p, x);
        return;
    }
    if (dtype == BF16) {
        vu u = (vu)x, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = (u >> 16) | 0x40;
        vu whole = (vu)vf_select(x != x, (vf)nan, (vf)rounded);
#if defined __AVX2__ && !defined __AVX512F__ /* gcc would clear the upper halves once more */
        vh h = (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)whole),
                                    _mm256_extracti128_si256((__m256i)whole, 1));
#else
        vh h = __builtin_convertvector(whole, vh);
#endif
        memcpy(p, &h, sizeof h);
        return;
    }
    vh h = vf_to_f16(x);
    memcpy(p, &h, sizeof h);
}

/* 2 VW elements in an order of the pair's own, for sums and for results that vf_store2 puts back. With AVX2
 * the even elements of bfloat16 are in v[0] and the odd ones in v[1], so that nothing crosses a lane. */
typedef struct {
    vf v[2];
} vf2;

/* The place of element i in the pair, where v[1] follows v[0]. */
static inline int64_t vf2_place(int32_t dtype, int64_t i) {
#if defined __AVX2__ && !defined __AVX512F__
    if (dtype == BF16) return i % 2 * VW + i / 2;
#endif
    (void)dtype;
    return i;
}
static inline vf2 vf_load2(const void *p, int32_t dtype) {
#if defined __AVX2__ && !defined __AVX512F__
    if (dtype == BF16) {
        vu u;
        memcpy(&u, p, sizeof u);
        return (vf2){ { (vf)(u << 16), (vf)(u & 0xffff0000) } };
    }
#endif
    return (vf2){ { vf_load_any(p, dtype), vf_load_any((const char *)p + VW * dtype_size(dtype), dtype) } };
}
static inline void vf_store2(void *p, int32_t dtype, vf2 x) {
#if defined __AVX2__ && !defined __AVX512F__
    if (dtype == BF16) {
        vu even = (vu)x.v[0], odd = (vu)x.v[1];
        __m256i high = _mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
        __m256i low = _mm256_blend_epi16((__m256i)even, (__m256i)(odd << 16), 0xaa);
        /* (low + 0x7fff + (high & 1)) >> 16 is what rounding carries; avg computes (a + b + 1) >> 1 in 17
         * bits */
        __m256i half =
            _mm256_and_si256(_mm256_or_si256(high, _mm256_set1_epi16(0x7ffe)), _mm256_set1_epi16(0x7fff));
        __m256i rounded = _mm256_add_epi16(high, _mm256_srli_epi16(_mm256_avg_epu16(low, half), 15));
        if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x.v[0], (__m256)x.v[1], _CMP_UNORD_Q)),
                             0)) {
            vi nan[2] = { x.v[0] != x.v[0], x.v[1] != x.v[1] };
            rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi16(0x40)),
                                         _mm256_blend_epi16((__m256i)nan[0], (__m256i)nan[1], 0xaa));
        }
        memcpy(p, &rounded, sizeof rounded);
        return;
    }
#endif
    vf_store_any(p, dtype, x.v[0]);
    vf_store_any((char *)p + VW * dtype_size(dtype), dtype, x.v[1]);
}

/* A row of n elements to float32 and back; n need not be a multiple of anything. */
static inline void load_row(float *out, const void *row, int32_t dtype, int64_t n) {
    int64_t i = 0, size = dtype_size(dtype);
    for (; i + VW <= n; i += VW) vf_store(out + i, vf_load_any((const char *)row + i * size, dtype));
    for (; i < n; i++) out[i] = load1((const char *)row + i * size, dtype);
}
static inline void store_row(void *row, int32_t dtype, const float *x, int64_t n) {
    int64_t i = 0, size = dtype_size(dtype);
    for (; i + VW <= n; i += VW) vf_store_any((char *)row + i * size, dtype, vf_load(x + i));
    for (; i < n; i++) store1((char *)row + i * size, dtype, x[i]);
}

/* ---- loops and memory (parallel.c, compiled once) -------------------------------------------- */

/* Calls body(i, context) for i in 0..n-1, each exactly once, on at most set_threads() threads, and on fewer
 * where each would have less than set_grain() nanoseconds of work (0: no such limit). `cost` is about how
 * many nanoseconds a body takes on one core. The result of a body must not depend on the thread that runs it,
 * so that results are the same for any number of threads. A body that fails returns non-zero after fail().
 * Then parallel_for returns -1, and the first message is kept. */
int parallel_for(int64_t n, int64_t cost, int (*body)(int64_t i, void *context), void *context);
void set_threads(int n);
int get_threads(void);
void set_grain(int64_t nanoseconds);
int64_t get_grain(void);

/* Memory for the time of a call, aligned to 64 bytes; NULL after fail() if there is none. The op gives it
 * back with scratch_free before it returns, and lists it in its scratch function (see ops.h). */
void *scratch(int64_t bytes);
void scratch_free(void *p);
/* The most bytes of scratch that were in use at one time since the last call of this function. */
int64_t scratch_peak(void);

/* Zeroed pages of the system, for memory that lives longer than a call; NULL if there are none. */
void *map_memory(int64_t bytes);
void unmap_memory(void *p, int64_t bytes);

#endif
