/* s2_unit.h --- a forward task of attention on the matrix unit: q, k and v are bfloat16.
 *
 * As in s2_block.h, scores are kept transposed, and so is the output: out^T [D,queries] is v^T p^T. Weights
 * are rounded to bfloat16 before they multiply values; they are added up, and the running maximum is kept, in
 * float32. Rows of a head have `wide` elements here: D rounded up to what a register holds. */
#ifndef LONGLORA_S2_UNIT_H
#define LONGLORA_S2_UNIT_H

#include "matrix_unit.h"
#include "s2_forward.h"

#if MATRIX_UNIT
static inline int64_t unit_width(int64_t D) { return round_up(D, UNIT_K); }

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

/* c[M,N] (+)= a b for M and N of 16 at least; multiples of 16. */
static inline void unit_product(float *c, int64_t c_row, UnitFactor a, UnitFactor b, int64_t M, int64_t N,
                                int64_t registers, int add) {
    for (int64_t n = 0; n < N; n += 2 * UNIT)
        for (int64_t m = 0; m < M; m += 2 * UNIT) {
            UnitFactor x = a, y = b;
            x.data += m / UNIT * a.next, y.data += n / UNIT * b.next;
            unit_multiply(c + m * c_row + n, c_row, x, y, registers, 2, 2, add);
        }
}

/* Rows of `row` elements as a left factor; words in rows of BQ as a right factor. */
static inline UnitFactor rows_of_16(const uint16_t *x, int64_t row) {
    return (UnitFactor){ (const char *)x, UNIT * row * 2, row * 2, UNIT_K * 2, 0 };
}
static inline UnitFactor words_of_16(const void *x, int64_t row) {
    return (UnitFactor){ x, UNIT * 4, row * 4, UNIT * row * 4, 0 };
}

/* Floats that a task takes. */
static inline int64_t unit_forward_floats(int64_t D) {
    int64_t wide = unit_width(D);
    return ROWS * wide / 2 + ROWS * wide + 2 * ROWS + BQ + BQ * wide + BK * wide + BK * BQ + BK * BQ / 2;
}

static void unit_forward_task(const S2AttentionForward *a, const Task *task, float *memory) {
    const Segment *s = task->segment;
    int64_t D = a->q.shape[3], wide = unit_width(D), n = task->last - task->first, size = round_up(n, BQ);
    int64_t all = (task->to - task->from) * size;
    float *qt = memory, *out = qt + all * wide / 2, *maximum = out + all * wide, *sum = maximum + all,
          *shrink = sum + all, *rows_memory = shrink + BQ;
    uint16_t *k = (uint16_t *)(rows_memory + BQ * wide), *vt = k + BK * wide, *pairs = vt + BK * wide;
    float *p = (float *)(pairs + BK * BQ);
    unit_begin();
    for (int64_t i = 0; i < all; i += BQ) {
        int64_t first = i % size;
        load_halves((uint16_t *)rows_memory, wide, &a->q, s, task->from + i / size, task->first + first,
                    min64(BQ, n - first), BQ);
        transpose(qt + i * wide / 2, rows_memory, BQ, wide / 2);
    }
    memset(out, 0, (size_t)(all * wide) * sizeof(float));
    for (int64_t i = 0; i < all; i++) {
        maximum[i] = -INFINITY;
        sum[i] = 0;
    }
    for (int64_t key = 0; key < task->last; key += BK) {
        int64_t keys = min64(BK, task->last - key);
        load_halves(k, wide, &a->v, s, task->kv_head, key, keys, BK);
        transpose_halves(vt, BK, k, wide, BK, wide);
        load_halves(k, wide, &a->k, s, task->kv_head, key, keys, BK);
        for (int64_t i = 0; i < all; i += BQ) {
            int64_t row = task->first + i % size, rows = min64(BQ, task->last - row);
            Block b = { s, row, rows, key, min64(keys, row + rows - key) };
            if (b.keys <= 0) continue;
            int64_t padded = round_up(b.keys, UNIT_K);
            unit_product(p, BQ, rows_of_16(k, wide), words_of_16(qt + i * wide / 2, BQ), padded, BQ,
                         wide / UNIT_K, 0);
            softmax(p, &b, (float)a->scale, maximum + i, sum + i, shrink);
            pair_keys(pairs, p, keys_of(&b, 0, BQ / VW));
            float *o = out + i * wide;
            int shrinks = 0;
            for (int64_t r = 0; r < BQ; r++) shrinks |= shrink[r] != 1.0f;
            for (int64_t d = 0; d < wide && shrinks; d++)
                for (int64_t r = 0; r < BQ; r += VW)
                    vf_store(o + d * BQ + r, vf_load(o + d * BQ + r) * vf_load(shrink + r));
            unit_product(o, BQ, rows_of_16(vt, BK), words_of_16(pairs, BQ), wide, BQ, padded / UNIT_K, 1);
        }
    }
    unit_end();
    for (int64_t i = 0; i < all; i++) {
        int64_t row = task->first + i % size, head = task->from + i / size;
        if (i % BQ == 0) transpose(rows_memory, out + i * wide, wide, BQ);
        if (row >= task->last) continue;
        float *x = rows_memory + i % BQ * wide, scale = sum[i] == 0 ? 0 : 1.0f / sum[i];
        for (int64_t d = 0; d < wide; d += VW) vf_store(x + d, vf_load(x + d) * scale);
        store_row(row_at(&a->out, s, row, head), a->out.dtype, x, D);
        if (given(&a->lse)) *lse_at(&a->lse, s, row, head) = maximum[i] + logf(sum[i]);
    }
}
#endif

/* What a forward task takes, in floats, whichever way it goes; and the task. */
static inline int64_t attention_floats(const S2AttentionForward *a) {
    int64_t floats = forward_floats(round_up(a->q.shape[3], VW));
#if MATRIX_UNIT
    floats = max64(floats, round_up(unit_forward_floats(a->q.shape[3]), VW));
#endif
    return floats;
}
static inline void attention_task(const S2AttentionForward *a, const Task *task, float *memory) {
#if MATRIX_UNIT
    if (a->q.dtype == BF16 && a->k.dtype == BF16 && a->v.dtype == BF16 && a->scale > 0) {
        unit_forward_task(a, task, memory);
        return;
    }
#endif
    forward_task(a, task, memory);
}

#endif
