/* s2_unit.h --- what attention's tasks on the matrix unit share: rows of bfloat16, transposed and in pairs;
 * rows of float32 in parts; and products of them.
 *
 * As in s2_block.h, scores are kept transposed. Where all arrays are bfloat16, weights and gradients of
 * scores are rounded to bfloat16 before the unit multiplies them. float16 is multiplied in parts. Vectors
 * compute tasks that contain an infinity or a NaN, because the second part of an infinity is a NaN. They also
 * compute float32, because the unit is no faster at it. All sums and the running maximum are float32.
 *
 * Rows of a head have `wide` elements here: D rounded up to what a register holds. */
#ifndef LONGLORA_S2_UNIT_H
#define LONGLORA_S2_UNIT_H

#include "matrix_unit.h"
#include "s2_block.h"

#if MATRIX_UNIT
/* For D = 0 too, a register: the sizes of buffers rely on it. */
static inline int64_t unit_width(int64_t D) { return round_up(max64(D, 1), UNIT_K); }

/* out[padded,wide]: rows first .. first+n-1 of a segment; zeros beyond n and D. */
static void load_halves(uint16_t *out, int64_t wide, const Tensor *x, const Segment *s, int64_t head,
                        int64_t first, int64_t n, int64_t padded) {
    size_t bytes = (size_t)x->shape[3] * 2, all = (size_t)wide * 2;
    for (int64_t i = 0; i < n; i++) {
        fetch(row_at(x, s, first + i + FETCH, head), (int64_t)bytes);
        memcpy(out + i * wide, row_at(x, s, first + i, head), bytes);
        memset((char *)(out + i * wide) + bytes, 0, all - bytes);
    }
    memset(out + n * wide, 0, (size_t)(padded - n) * all);
}

/* out[N,M] = in[M,N] transposed, of 16-bit elements. M and N are multiples of 32. Pairs of columns travel as
 * words; then even and odd columns part. */
static void transpose_halves(uint16_t *out, int64_t out_row, const uint16_t *in, int64_t in_row, int64_t M,
                             int64_t N) {
    for (int64_t m = 0; m < M; m += 32)
        for (int64_t n = 0; n < N; n += 32) {
            vf x[2][VW];
            for (int half = 0; half < 2; half++) {
                UNROLLED
                for (int r = 0; r < VW; r++)
                    x[half][r] = vf_load((const float *)(in + (m + half * VW + r) * in_row + n));
                transpose_square(x[half]);
            }
            UNROLLED
            for (int r = 0; r < VW; r++) {
                halves low = (halves)x[0][r], high = (halves)x[1][r];
                halves even = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22,
                                                      24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 44, 46, 48, 50,
                                                      52, 54, 56, 58, 60, 62);
                halves odd = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25,
                                                     27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53,
                                                     55, 57, 59, 61, 63);
                memcpy(out + (n + 2 * r) * out_row + m, &even, sizeof even);
                memcpy(out + (n + 2 * r + 1) * out_row + m, &odd, sizeof odd);
            }
        }
}

/* Two rounded vectors as pairs of their elements. */
static inline halves in_pairs(halves x) {
    return __builtin_shufflevector(x, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                                   10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

/* out[keys/2,BQ]: weights p[keys,BQ] in pairs of keys; zeros from `keys` on, up to a multiple of UNIT_K. */
static void pair_keys(uint16_t *out, const float *p, int64_t keys) {
    int64_t padded = round_up(keys, UNIT_K);
    for (int64_t j = 0; j < padded; j += 2)
        for (int64_t i = 0; i < BQ; i += VW) {
            vf a = j < keys ? vf_load(p + j * BQ + i) : (vf){ 0 };
            vf b = j + 1 < keys ? vf_load(p + (j + 1) * BQ + i) : (vf){ 0 };
            halves both = in_pairs(round_two(a, b));
            memcpy(out + j * BQ + 2 * i, &both, sizeof both);
        }
}

/* ---- parts: `part` elements lie between the parts of a number --------------------------------- */

/* out[parts][n,wide]: rows [n,wide] as a left factor, along their elements. Pair d of 32 has elements d and
 * d + 16. */
static void split_rows(uint16_t *out, int64_t part, int parts, const float *rows, int64_t wide, int64_t n) {
    for (int64_t i = 0; i < n * wide; i += UNIT_K) {
        vu x[UNIT_PARTS];
        split(x, vf_load(rows + i), vf_load(rows + i + VW), parts);
        for (int p = 0; p < parts; p++) memcpy(out + p * part + i, &x[p], sizeof x[p]);
    }
}

/* out[parts][n/2,wide] words: rows [n,wide] as a right factor, along the rows. Pair r of 32 has rows r and
 * r + 16. */
static void split_pairs(uint16_t *out, int64_t part, int parts, const float *rows, int64_t wide, int64_t n) {
    for (int64_t r = 0; r < n / 2; r++, out += 2 * wide) {
        const float *low = rows + (r / UNIT * UNIT_K + r % UNIT) * wide;
        for (int64_t d = 0; d < wide; d += VW) {
            vu x[UNIT_PARTS];
            split(x, vf_load(low + d), vf_load(low + UNIT * wide + d), parts);
            for (int p = 0; p < parts; p++) memcpy(out + p * part + 2 * d, &x[p], sizeof x[p]);
        }
    }
}

/* Each part of in[M,N], words, transposed. */
static void transpose_parts(uint16_t *out, int64_t part, int parts, const uint16_t *in, int64_t M,
                            int64_t N) {
    for (int p = 0; p < parts; p++)
        transpose((float *)(out + p * part), (const float *)(in + p * part), M, N);
}

/* Transposes a register of words. out_row and in_row: elements from row to row. */
static inline void turn_register(uint16_t *out, int64_t out_row, const uint16_t *in, int64_t in_row) {
    vf x[VW];
    UNROLLED
    for (int r = 0; r < VW; r++) x[r] = vf_load((const float *)(in + r * in_row));
    transpose_square(x);
    UNROLLED
    for (int r = 0; r < VW; r++) vf_store((float *)(out + r * out_row), x[r]);
}

/* Loads rows as load_rows() does. Returns whether all are finite. */
static int load_finite_rows(float *out, int64_t wide, const Tensor *x, const Segment *s, int64_t head,
                            int64_t first, int64_t n, int64_t padded) {
    vf zeros = { 0 };
    load_rows(out, wide, x, s, head, first, n, padded, 1);
    for (int64_t i = 0; i < n * wide; i += VW) zeros += 0 * vf_load(out + i);
    return vf_sum(zeros) == 0;
}

/* ---- products -------------------------------------------------------------------------------- */

/* c[M,N] (+)= a b. M and N are multiples of 32. */
static inline void unit_product(float *c, int64_t c_row, UnitFactor a, UnitFactor b, int64_t M, int64_t N,
                                int64_t registers, int add) {
    for (int64_t n = 0; n < N; n += 2 * UNIT)
        for (int64_t m = 0; m < M; m += 2 * UNIT) {
            UnitFactor x = a, y = b;
            x.data += m / UNIT * a.next, y.data += n / UNIT * b.next;
            unit_multiply(c + m * c_row + n, c_row, x, y, registers, 2, 2, add, (UnitFetch){ 0 });
        }
}

/* Rows of `row` elements as a left factor; words in rows of BQ as a right factor. */
static inline UnitFactor rows_of_16(const uint16_t *x, int64_t row) {
    return (UnitFactor){ (const char *)x, UNIT * row * 2, row * 2, UNIT_K * 2, .parts = 1 };
}
static inline UnitFactor words_of_16(const void *x, int64_t row) {
    return (UnitFactor){ x, UNIT * 4, row * 4, UNIT * row * 4, .parts = 1 };
}
static inline UnitFactor in_parts(UnitFactor x, int64_t part, int parts) {
    x.part = part * 2, x.parts = parts;
    return x;
}

#endif

#endif
