/* tile.c --- the micro-kernel: all of MR x NV vectors stay in registers, each step loads a row of a panel of
 * b and broadcasts MR numbers of a. Then what happens to the sums of a finished tile. */
#include "tile.h"

/* sum[mr][nv] += a[.., steps] b[steps, ..]. Rows in place are fetched ahead: a line of each of the next MR
 * rows where k is dense, else the lines of AHEAD steps later. */
static inline __attribute__((always_inline)) void multiply(vf sum[MR][NV], int64_t steps, const Rows *a,
                                                           const float *pb, int in_rows, int mr, int nv,
                                                           Step step) {
    const float *pa = a->data;
    int64_t step_a = in_rows ? a->step : MR;
    for (int64_t s = 0; s < steps; s += 16) {
        if (in_rows) UNROLLED
        for (int i = 0; i < mr; i++) __builtin_prefetch(pa + a->row[i] + a->ahead);
        int64_t end = min64(16, steps - s);
#pragma GCC unroll 2
        for (int64_t t = 0; t < end; t++) {
            vf bv[NV];
            UNROLLED
            for (int j = 0; j < nv; j++) bv[j] = vf_load(pb + j * VW);
            UNROLLED
            for (int i = 0; i < mr; i++) {
                vf av = vf_set1(pa[in_rows ? a->row[i] : i]);
                UNROLLED
                for (int j = 0; j < nv; j++) sum[i][j] = multiply_add(sum[i][j], av, bv[j], step);
            }
            pa += step_a;
            pb += nv * VW;
        }
    }
}

/* As vf_store_any, but products of bfloat16 may turn subnormal numbers into 0: they lose more than that
 * anyway. */
static inline __attribute__((always_inline)) void store_bf16(uint16_t *p, vf x) {
#if defined __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &h, sizeof h);
#else
    vf_store_any(p, BF16, x);
#endif
}

/* Fetches what the end of a tile reads and writes while its products run. */
static inline __attribute__((always_inline)) void fetch_out(const Out *out, int mr, int nv) {
    if (out->bf16) UNROLLED
    for (int i = 0; i < mr; i++) {
        __builtin_prefetch(out->bf16 + i * out->bf16_row, 1);
        __builtin_prefetch(out->bf16 + i * out->bf16_row + nv * VW - 1, 1);
    }
    else UNROLLED for (int i = 0; i < mr; i++) UNROLLED for (int j = 0; j < nv; j++)
        __builtin_prefetch(out->sums + i * out->row + j * VW, 1);
    if (out->add) UNROLLED
    for (int i = 0; i < mr; i++) UNROLLED
    for (int j = 0; j < nv; j++) __builtin_prefetch(out->add + i * out->add_row + j * VW);
    if (out->more) UNROLLED
    for (int i = 0; i < mr; i++) {
        __builtin_prefetch(out->more + i * out->more_row);
        __builtin_prefetch(out->more + i * out->more_row + nv * VW - 1);
    }
}

static inline __attribute__((always_inline)) void tile(int64_t steps, const Rows *a, const float *b,
                                                       int64_t steps2, const Rows *a2, const Out *to,
                                                       int in_rows, int mr, int nv, Step step) {
    Out out = *to; /* a copy, which stays in registers whatever is written */
    vf sum[MR][NV];
    UNROLLED
    for (int i = 0; i < mr; i++) UNROLLED
    for (int j = 0; j < nv; j++) sum[i][j] = (vf){ 0 };
    fetch_out(&out, mr, nv);
    multiply(sum, steps, a, b, in_rows, mr, nv, step);
    if (in_rows) multiply(sum, steps2, a2, b + steps * nv * VW, 0, mr, nv, step);
    if (out.add) UNROLLED
    for (int i = 0; i < mr; i++) UNROLLED
    for (int j = 0; j < nv; j++) sum[i][j] += vf_load(out.add + i * out.add_row + j * VW);
    if (out.more) UNROLLED
    for (int i = 0; i < mr; i++) UNROLLED
    for (int j = 0; j < nv; j++) sum[i][j] += vf_load_any(out.more + i * out.more_row + j * VW, BF16);
    if (out.bf16) UNROLLED
    for (int i = 0; i < mr; i++) UNROLLED
    for (int j = 0; j < nv; j++) store_bf16(out.bf16 + i * out.bf16_row + j * VW, sum[i][j]);
    else UNROLLED for (int i = 0; i < mr; i++) UNROLLED for (int j = 0; j < nv; j++)
        vf_store(out.sums + i * out.row + j * VW, sum[i][j]);
}

#define TILE(name, in_rows, mr, nv, step)                                                                    \
    static __attribute__((noinline)) void name(int64_t steps, const Rows *a, const float *b, int64_t steps2, \
                                               const Rows *a2, const Out *out) {                             \
        tile(steps, a, b, steps2, a2, out, in_rows, mr, nv, step);                                           \
    }
#if VW == 16 || defined __aarch64__
#define TILES(name, in_rows, mr, step)   \
    TILE(name##_1, in_rows, mr, 1, step) \
    TILE(name##_2, in_rows, mr, 2, step) TILE(name##_3, in_rows, mr, 3, step)
#define NAMES(name) { name##_1, name##_2, name##_3 }
#else
#define TILES(name, in_rows, mr, step) \
    TILE(name##_1, in_rows, mr, 1, step) TILE(name##_2, in_rows, mr, 2, step)
#define NAMES(name) { name##_1, name##_2 }
#endif
/* clang-format off */
TILES(panels, 0, MR, FLOATS)
TILES(rows, 1, MR, FLOATS)
TILES(panels_few, 0, FEW, FLOATS)
TILES(rows_few, 1, FEW, FLOATS)
#if DOTS
TILES(panels_pairs, 0, MR, PAIRS)
TILES(rows_pairs, 1, MR, PAIRS)
TILES(panels_pairs_few, 0, FEW, PAIRS)
TILES(rows_pairs_few, 1, FEW, PAIRS)
#endif

Tile *const CPU(gemm_tiles)[DOTS + 1][2][2][NV] = {
    { { NAMES(panels), NAMES(panels_few) }, { NAMES(rows), NAMES(rows_few) } },
#if DOTS
    { { NAMES(panels_pairs), NAMES(panels_pairs_few) }, { NAMES(rows_pairs), NAMES(rows_pairs_few) } },
#endif
};
/* clang-format on */

/* ---- the sums of a finished tile ------------------------------------------------------------- */

/* out[cols], c's row r from column c: alpha x + beta out + bias + residual; `bare`: alpha x. Whole vectors,
 * then the rest one by one. */
static inline __attribute__((always_inline)) void finish_row(const Gemm *g, const float *x, int64_t r,
                                                             int64_t c, int64_t cols, float beta,
                                                             int32_t out_dtype, int bare) {
    int64_t size = dtype_size(out_dtype);
    char *out = (char *)g->c + (r * g->c_row + c) * size;
    const char *bias = bare ? NULL : (const char *)g->bias + c * size;
    const char *residual = bare ? NULL : (const char *)g->residual + (r * g->residual_row + c) * size;
    int64_t j = 0;
    for (; j + VW <= cols; j += VW) {
        vf v = g->alpha * vf_load(x + j);
        if (!bare && beta != 0) v += beta * vf_load_any(out + j * size, out_dtype);
        if (!bare && g->bias) v += vf_load_any(bias + j * size, out_dtype);
        if (!bare && g->residual) v += vf_load_any(residual + j * size, out_dtype);
        vf_store_any(out + j * size, out_dtype, v);
    }
    for (; j < cols; j++) {
        float v = g->alpha * x[j];
        if (!bare && beta != 0) v += beta * load1(out + j * size, out_dtype);
        if (!bare && g->bias) v += load1(bias + j * size, out_dtype);
        if (!bare && g->residual) v += load1(residual + j * size, out_dtype);
        store1(out + j * size, out_dtype, v);
    }
}

static inline __attribute__((always_inline)) void finish_rows(const Gemm *g, const float *x, int64_t x_row,
                                                              int64_t m, int64_t n, int64_t rows,
                                                              int64_t cols, float beta, int32_t dtype) {
    for (int64_t i = 0; i < rows; i++)
        if (beta == 0 && !g->bias && !g->residual) finish_row(g, x + i * x_row, m + i, n, cols, 0, dtype, 1);
        else finish_row(g, x + i * x_row, m + i, n, cols, beta, dtype, 0);
}

void CPU(gemm_finish)(const Gemm *g, int swapped, const float *x, int64_t x_row, int64_t m, int64_t n,
                      int64_t rows, int64_t cols) {
    float beta = g->beta;
    if (!swapped) {
        if (g->c_dtype == F32) finish_rows(g, x, x_row, m, n, rows, cols, beta, F32);
        else if (g->c_dtype == BF16) finish_rows(g, x, x_row, m, n, rows, cols, beta, BF16);
        else finish_rows(g, x, x_row, m, n, rows, cols, beta, F16);
        return;
    }
    float turned[(int)MR > (int)VW ? MR : VW];
    for (int64_t j = 0; j < cols; j++) {
        for (int64_t i = 0; i < rows; i++) turned[i] = x[i * x_row + j];
        finish_row(g, turned, n + j, m, rows, beta, g->c_dtype, 0);
    }
}
