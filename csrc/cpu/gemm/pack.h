/* pack.h --- copies of a and b in the order in which tiles read them. A packed step is 32 bits: a float, or
 * the pair of bfloat16 of k and k + 1. */
#ifndef LONGLORA_GEMM_PACK_H
#define LONGLORA_GEMM_PACK_H

#include "plan.h"

/* out[steps][width] = scale b[k0.., j0..j0+width-1]; zeros where b, of K rows and N columns, ends. */
void CPU(gemm_pack)(float *out, Matrix b, int64_t k0, int64_t steps, int64_t K, int64_t j0, int64_t width,
                    int64_t N, float scale, Step step);
/* Steps s0 .. s1 of columns n0 .. n1, panel behind panel, out of b and then b2. */
void CPU(gemm_pack_panels)(const Job *job, float *out, int64_t s0, int64_t s1, int64_t n0, int64_t n1);
/* Rows m0 .. m1 of a to packed_a, in panels of MR, all steps of the slice. */
void CPU(gemm_pack_rows)(const Job *job, int64_t m0, int64_t m1);
/* The slice's panels of b, and with `with_a` its rows of a, on all threads. */
int CPU(gemm_pack_slice)(Job *job, int with_a);

static inline const void *element(Matrix m, int64_t row, int64_t col) {
    return (const char *)m.data + (row * m.row + col * m.col) * dtype_size(m.dtype);
}

/* One step from row k (in elements) of column j; zeros outside of [K, n]. */
static inline uint32_t step_at(Matrix b, int64_t k, int64_t j, int64_t K, int64_t n, float scale, Step step) {
    uint32_t u = 0;
    if (j >= n) return 0;
    if (step == FLOATS) {
        float x = k < K ? load1(element(b, k, j), b.dtype) * scale : 0;
        memcpy(&u, &x, 4);
    } else
        for (int i = 0; i < 2; i++) {
            uint32_t h = k + i < K ? float_to_bf16(load1(element(b, k + i, j), b.dtype) * scale) : 0;
            u |= h << (16 * i);
        }
    return u;
}

/* Columns of x become its rows. */
static inline __attribute__((always_inline)) void transpose(vf x[VW]) {
#if defined __AVX2__ && !defined __AVX512F__ /* pairs, pairs of pairs, halves: one instruction each */
    vf y[VW];
    UNROLLED
    for (int i = 0; i < VW; i += 2) {
        y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    UNROLLED
    for (int i = 0; i < VW; i += 4) UNROLLED
    for (int j = 0; j < 2; j++) {
        x[i + 2 * j] = __builtin_shufflevector(y[i + j], y[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        x[i + 2 * j + 1] = __builtin_shufflevector(y[i + j], y[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    UNROLLED
    for (int i = 0; i < VW / 2; i++) {
        y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        y[i + 4] = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    UNROLLED
    for (int i = 0; i < VW; i++) x[i] = y[i];
#else /* log2(VW) rounds of a perfect shuffle */
#if VW == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
    UNROLLED
    for (int round = 1; round < VW; round *= 2) {
        vf y[VW];
        UNROLLED
        for (int i = 0; i < VW / 2; i++) {
            y[2 * i] = __builtin_shufflevector(x[i], x[i + VW / 2], LOW);
            y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + VW / 2], HIGH);
        }
        UNROLLED
        for (int i = 0; i < VW; i++) x[i] = y[i];
    }
#endif
}

#endif
