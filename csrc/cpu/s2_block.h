/* s2_block.h --- segments, and what attention does with a block of queries and a block of keys: products in
 * register tiles, rows to float32 and back, scores, and which scores are hidden.
 *
 * Scores are kept transposed, [keys, queries], with vectors along the queries. Then all five products read
 * their left factor one number at a time from rows as they lie in memory, and their right factor in whole
 * vectors. Only q and dout are transposed, a block of BQ rows at a time; keys and values never are. The
 * softmax needs no operation across lanes. */
#ifndef LONGLORA_S2_BLOCK_H
#define LONGLORA_S2_BLOCK_H

#include "cpu.h"
#include "scratch.h"

/* Vectors in a row of a register tile of MR rows. With 32 registers: 24 sums and 4 + 1 operands; with 16
 * registers: 12 sums and 2 + 1 operands. */
#if VW == 16 || defined __aarch64__
#define NV 4
#else
#define NV 2
#endif
enum {
    MR = 6,
    DEPTH = 128,      /* products summed in registers before they are added to memory */
    SHORT = 32,       /* the same for scores, whose errors exp() enlarges */
    FETCH = 16,       /* a row is prefetched this many rows ahead */
    LEAST_ROWS = 512, /* query rows of a forward task, all heads together: at least, for a large D */
    SHORT_ROWS = 768, /* at least, for D up to 128 */
    MOST_ROWS = 1536, /* at most, for D up to 64 */
    TASKS = 24,       /* forward tasks that a sequence is cut into, within these limits */
};

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- segments -------------------------------------------------------------------------------- */

/* A causal attention of its own over one run of tokens, or two. */
typedef struct {
    int64_t b;
    int64_t start[2], length[2];   /* two runs of tokens, one after the other; the second is usually empty */
    int64_t low_from, low_to, low; /* rows low_from .. low_to-1 see no key below `low` */
    int shifted;
} Segment;

static inline int64_t rows_of(const Segment *s) { return s->length[0] + s->length[1]; }
static inline int64_t token(const Segment *s, int64_t row) {
    return row < s->length[0] ? s->start[0] + row : s->start[1] + row - s->length[0];
}

/* Rows first .. last-1 of a segment for the query heads from .. to-1, which share a KV head. */
typedef struct {
    const Segment *segment;
    int64_t kv_head, from, to, first, last;
} Task;

/* Query rows of a forward task, all heads together. A task copies all keys and values that it needs, so long
 * tasks copy less. But they take more of the cache, and every thread should have some. Tasks must not depend
 * on the number of threads: on a matrix unit, one infinity changes the bits of all rows of its task. */
static inline int64_t rows_of_tasks(int64_t T, int64_t H, int64_t D) {
    int64_t most = MOST_ROWS * 64 / max64(D, 64);
    return max64(LEAST_ROWS, min64(most, max64(SHORT_ROWS, T * H / TASKS)));
}

/* ---- products -------------------------------------------------------------------------------- */

typedef void Tile(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t n,
                  int add);

/* c[rows,vecs*VW] (+)= a b[n,vecs*VW], where a is [rows,n], or [n,rows] if `transposed`. */
static inline __attribute__((always_inline)) void tile(int rows, int vecs, int transposed, float *c,
                                                       int64_t ldc, const float *a, int64_t lda,
                                                       const float *b, int64_t ldb, int64_t n, int add) {
    vf sum[MR][NV];
    UNROLLED
    for (int i = 0; i < rows; i++) {
        UNROLLED
        for (int j = 0; j < vecs; j++) sum[i][j] = (vf){ 0 };
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < n; k++) {
        vf x[NV];
        UNROLLED
        for (int j = 0; j < vecs; j++) x[j] = vf_load(b + k * ldb + j * VW);
        UNROLLED
        for (int i = 0; i < rows; i++) {
            vf y = vf_set1(transposed ? a[k * lda + i] : a[i * lda + k]);
            UNROLLED
            for (int j = 0; j < vecs; j++) sum[i][j] += y * x[j];
        }
    }
    UNROLLED
    for (int i = 0; i < rows; i++) {
        UNROLLED
        for (int j = 0; j < vecs; j++) {
            if (add) sum[i][j] += vf_load(c + i * ldc + j * VW);
            vf_store(c + i * ldc + j * VW, sum[i][j]);
        }
    }
}

/* A function for each layout of a and each size of a tile: tiles[layout][vecs - 1][rows - 1]. */
/* clang-format off */
#define DEFINE_TILE(layout, is_transposed, rows, vecs)                                                       \
    static void layout##_##rows##_##vecs(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, \
                                         int64_t ldb, int64_t n, int add) {                                  \
        tile(rows, vecs, is_transposed, c, ldc, a, lda, b, ldb, n, add);                                     \
    }
#define BOTH(rows, vecs) DEFINE_TILE(normal, 0, rows, vecs) DEFINE_TILE(transposed, 1, rows, vecs)
#define TILES(vecs) BOTH(1, vecs) BOTH(2, vecs) BOTH(3, vecs) BOTH(4, vecs) BOTH(5, vecs) BOTH(6, vecs)
#define NAMES(layout, vecs) { layout##_1_##vecs, layout##_2_##vecs, layout##_3_##vecs, \
                              layout##_4_##vecs, layout##_5_##vecs, layout##_6_##vecs }
TILES(1)
TILES(2)
#if NV == 4
TILES(3)
TILES(4)
#define TABLE(layout) { NAMES(layout, 1), NAMES(layout, 2), NAMES(layout, 3), NAMES(layout, 4) }
#else
#define TABLE(layout) { NAMES(layout, 1), NAMES(layout, 2) }
#endif
/* clang-format on */
static Tile *const tiles[2][NV][MR] = { TABLE(normal), TABLE(transposed) };

enum { NORMAL, TRANSPOSED };
#define FAR (INT64_MAX / 2)

/* c[M,vecs*VW] (+)= a b[n,vecs*VW], where a is [M,n], or [n,M] if the layout is TRANSPOSED. Columns are cut
 * into nearly equal strips of at most NV vectors. At most `depth` products are summed in registers before
 * they are added to c, so that long sums stay exact. a may be triangular: a[i,k] is zero, and left out, for k
 * < from + i and for k > to + i. */
static void multiply(int layout, float *c, int64_t ldc, const float *a, int64_t lda, const float *b,
                     int64_t ldb, int64_t M, int64_t vecs, int64_t n, int64_t depth, int add, int64_t from,
                     int64_t to) {
    for (int64_t strips = (vecs + NV - 1) / NV, j = 0; strips; strips--) {
        int64_t width = (vecs - j + strips - 1) / strips;
        for (int64_t i = 0; i < M; i += MR) {
            int64_t rows = min64(MR, M - i), first = max64(0, from + i), last = min64(n, to + i + rows);
            for (int64_t k = first, more = add, step; k < last || !more; k += step, more = 1) {
                step = max64(0, last - k);
                if (step > depth) /* the last two steps are equally long: neither is short */
                    step = step < 2 * depth ? (step + 1) / 2 : depth;
                tiles[layout][width - 1][rows - 1](c + i * ldc + j * VW, ldc,
                                                   layout == TRANSPOSED ? a + k * lda + i : a + i * lda + k,
                                                   lda, b + k * ldb + j * VW, ldb, step, (int)more);
            }
        }
        j += width;
    }
}

/* ---- rows in and out ------------------------------------------------------------------------- */

static inline void *row_at(const Tensor *x, const Segment *s, int64_t row, int64_t head) {
    return at(x, s->b * x->stride[0] + token(s, row) * x->stride[1] + head * x->stride[2]);
}
static inline float *lse_at(const Tensor *lse, const Segment *s, int64_t row, int64_t head) {
    return at(lse, s->b * lse->stride[0] + head * lse->stride[1] + token(s, row));
}

/* Rows of a head are too far apart for the processor to prefetch them by itself. */
static inline void fetch(const char *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

/* out[padded,pitch]: rows first .. first+n-1 of a segment in float32, times scale; zeros beyond n and D. */
static void load_rows(float *out, int64_t pitch, const Tensor *x, const Segment *s, int64_t head,
                      int64_t first, int64_t n, int64_t padded, float scale) {
    int64_t D = x->shape[3], bytes = D * dtype_size(x->dtype);
    for (int64_t i = 0; i < n; i++) {
        float *row = out + i * pitch;
        fetch(row_at(x, s, first + i + FETCH, head), bytes);
        load_row(row, row_at(x, s, first + i, head), x->dtype, D);
        for (int64_t d = D; d < pitch; d++) row[d] = 0;
        if (scale != 1.0f)
            for (int64_t d = 0; d < pitch; d += VW) vf_store(row + d, vf_load(row + d) * scale);
    }
    memset(out + n * pitch, 0, (size_t)((padded - n) * pitch) * sizeof(float));
}

/* Fetches rows first .. last-1 of a segment into the second cache, for load_rows(). */
static void fetch_rows(const Tensor *x, const Segment *s, int64_t head, int64_t first, int64_t last) {
    int64_t bytes = x->shape[3] * dtype_size(x->dtype);
    for (int64_t i = first; i < last; i++) {
        const char *row = row_at(x, s, i, head);
        for (int64_t d = 0; d < bytes; d += 64) __builtin_prefetch(row + d, 0, 2);
    }
}

/* The elements of two vectors in turn: of their first halves, of their second halves. */
#if VW == 16
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) \
    __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined __AVX2__
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

/* The square x becomes its transpose: the first half of the rows is zipped with the second half, log2(VW)
 * times. */
static inline __attribute__((always_inline)) void transpose_square(vf x[VW]) {
    vf y[VW];
    UNROLLED
    for (int step = 0; step < (VW == 16 ? 4 : VW == 8 ? 3 : 2); step++) {
        UNROLLED
        for (int r = 0; r < VW / 2; r++) {
            y[2 * r] = ZIP_LOW(x[r], x[r + VW / 2]);
            y[2 * r + 1] = ZIP_HIGH(x[r], x[r + VW / 2]);
        }
        UNROLLED
        for (int r = 0; r < VW; r++) x[r] = y[r];
    }
}

/* out[N,M] = in[M,N] transposed. M and N are multiples of VW. */
static void transpose(float *out, const float *in, int64_t M, int64_t N) {
    for (int64_t n = 0; n < N; n += VW)
        for (int64_t m = 0; m < M; m += VW) {
            vf x[VW];
            UNROLLED
            for (int r = 0; r < VW; r++) x[r] = vf_load(in + (m + r) * N + n);
            transpose_square(x);
            UNROLLED
            for (int r = 0; r < VW; r++) vf_store(out + (n + r) * M + m, x[r]);
        }
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* Rows (queries) against keys, both numbered within their segment. */
typedef struct {
    const Segment *segment;
    int64_t row, rows, key, keys;
} Block;

/* out[keys,BQ] = k[keys,D] qt[D,BQ]. Vectors whose queries all come before the key are left as they are. */
static void scores(float *out, const Block *b, const float *k, int64_t pitch, const float *qt, int64_t D) {
    int64_t vecs = (b->rows + VW - 1) / VW;
    /* First all keys that every vector needs, then a tile of keys at a time. Where the vectors are more than
     * a strip, always a tile of keys, so that all strips find them in the first cache. */
    int64_t n = min64(b->keys, vecs > NV ? MR : max64(MR, round_up(b->row - b->key + VW, MR)));
    for (int64_t j = 0; j < b->keys; j += n, n = min64(MR, b->keys - j)) {
        int64_t skip = max64(0, b->key + j - b->row) / VW;
        multiply(NORMAL, out + j * BQ + skip * VW, BQ, k + j * pitch, pitch, qt + skip * VW, BQ, n,
                 vecs - skip, D, SHORT, 0, -FAR, FAR);
    }
}

/* Whether key j of the block is hidden from any row in vector v or later. */
static inline int any_hidden(const Block *b, int64_t j, int64_t v) {
    const Segment *s = b->segment;
    return b->key + j > b->row + v * VW ||
           (b->key + j < s->low && s->low_from < b->row + b->rows && s->low_to > b->row);
}
/* The lanes of vector v from which key j is hidden. */
static inline vi hidden(const Block *b, int64_t j, int64_t v) {
    const Segment *s = b->segment;
    int64_t row = b->row + v * VW, key = b->key + j;
    vi lane;
    for (int i = 0; i < VW; i++) lane[i] = i;
    vi mask = lane < (int32_t)min64(max64(key - row, 0), VW);
    if (key < s->low) {
        int32_t from = (int32_t)min64(max64(s->low_from - row, 0), VW),
                to = (int32_t)min64(max64(s->low_to - row, 0), VW);
        mask |= (lane >= from) & (lane < to);
    }
    return mask;
}

/* Products leave out what the diagonal hides, but only whole tiles of it: they read fewer than MR keys behind
 * a row. keys_of() is how many keys they read for `vecs` vectors of rows from vector v on; first_vector() is
 * the first vector for which they read key j. */
static inline int64_t keys_of(const Block *b, int64_t v, int64_t vecs) {
    return min64(b->keys, max64(0, b->row - b->key + (v + vecs) * VW + MR - 1));
}
static inline int64_t first_vector(const Block *b, int64_t j) {
    return max64(0, b->key - b->row + j - MR + 1) / VW;
}

#endif
