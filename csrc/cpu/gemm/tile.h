/* tile.h --- the micro-kernel and the end of a tile: the sums that MR rows of a and one panel of b add up to,
 * and what happens to them. */
#ifndef LONGLORA_GEMM_TILE_H
#define LONGLORA_GEMM_TILE_H

#include "plan.h"

static inline __attribute__((always_inline)) vf multiply_add(vf sum, vf a, vf b, Step step) {
#if defined __AVX512BF16__
    if (step == PAIRS) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)a);
#elif DOTS
    if (step == PAIRS)
        return sum + (vf)((vu)a << 16) * (vf)((vu)b << 16) +
               (vf)((vu)a & 0xffff0000) * (vf)((vu)b & 0xffff0000);
#else
    (void)step;
#endif
    return sum + a * b;
}

/* MR rows of a: a panel, or rows in place, row i at data + row[i], `step` floats from step to step. `ahead`
 * leads to what the next tile will read. */
typedef struct {
    const float *data;
    int64_t step, ahead, row[MR];
} Rows;

/* Where the sums of a tile go. Not finished: sums = the tile's + add. Finished in bfloat16: bf16 = the tile's
 * + add + more. add and more may be NULL, or the memory that is written. Each has its distance from row to
 * row. */
typedef struct {
    float *sums;
    const float *add;
    uint16_t *bf16; /* NULL: to sums */
    const uint16_t *more;
    int64_t row, add_row, bf16_row, more_row;
} Out;

/* `steps` steps of a and a panel of b, then `steps2` steps of a2, packed, and the panel's next. */
typedef void Tile(int64_t steps, const Rows *a, const float *b, int64_t steps2, const Rows *a2,
                  const Out *out);

/* [step][whether a is read as rows][whether FEW rows are enough][vectors - 1] */
extern Tile *const CPU(gemm_tiles)[DOTS + 1][2][2][NV];

/* c[m.., n..] = alpha x + beta c + bias + residual, for `rows` by `cols` sums x of the product as computed,
 * so of the transpose if that is swapped. */
void CPU(gemm_finish)(const Gemm *g, int swapped, const float *x, int64_t x_row, int64_t m, int64_t n,
                      int64_t rows, int64_t cols);

#endif
