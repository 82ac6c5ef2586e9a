/* gemm.c --- the matrix product: packed panels of b (as in BLIS), a micro-kernel whose sums stay in
 * registers.
 *
 * A tile of c, MR rows by one panel, is a sum over k in blocks of KC. SIDE panels of b stay in the second
 * cache while the rows of a task pass by, MR of these in the first while the panels do: so c is written along
 * its rows, not one line of each row of a task after the other; where k is short, as many panels as there is
 * room for. b is packed for all tasks, or, where one task has all rows, by each for itself, part by part, in
 * its own cache; a turned a likewise, where a task has all columns. What is read once is not packed: rows of
 * a are read where they lie, MR streams at a time; for a few rows of output b is swept over where it lies
 * (LoRA's da and db); a few columns (LoRA's u) run their vectors along k instead. The extension by a2 b2 goes
 * on in the same registers. The order of each sum depends on the sizes alone, so every number of threads
 * gives the same bits; how many tiles there are depends on the threads.
 *
 * The ladder, in GF/s on a Zen 5 (FMA peak 240 a core), NT, M = 2048, N = K = 576 unless said:
 *   two cores, float32: KC 192 / 288 / 576: 454 / 465 / 441           (torch with MKL: 195)
 *   two cores, bfloat16 dot products: 326 while tiles were finished one element at a time, then KC 192 / 288
 * / 576: 860 / 929 / 880                                                   (torch with oneDNN: 790) one core,
 * bfloat16 converted to float32: rows of a turned while they are packed 175, only converted 194 one core, TN
 * 576x576, K = 2048: panels of a packed one by one 178, side by side with the dtype decided outside 200 one
 * core, u, N = 8: as a panel of 16 columns 66, with rows fetched ahead 80, vectors along k 128..144 one core,
 * da, M = 8, K = 2048: b packed 72, b in place 220 one core, M = 192, N = 576, K = 8192 (dx of the loss): b
 * in place 180, packed by each tile for itself 196 and on one core of a Zen 3 (FMA peak 95), other work
 * beside it, ways in turn, the best of each: the tile alone, all in the L1 cache: rows in place 81, with a
 * fetch every 16 steps outside of a loop unrolled twice 91; packed 90, so unrolled 93 M = 512, N = K = 2048,
 * rows of a 8 KiB apart: in place 51, copied side by side 52, packed 62; but M = 2048, K = 576, where they
 * are not: in place 81, packed 76 u, N = 8, K = 576: b read for each row 37, kept for two 42; bfloat16: as a
 * panel 27, converted as it is read 36 M = 1, 2048x2048, bfloat16: as a panel 3, a row of the larger matrix
 * at a time 9 M = 2048, N = 576, K = 8: panel after panel 9, row after row 15; bfloat16 15, 17 db, N = 576, M
 * = 8, K = 2048: b packed by each tile 34, two tiles on b in place 49 and there again, processor time of one
 * core, other work beside it, in turn, quartiles; b in place by panels, then 128 columns of it packed row by
 * row and tiles of 4 rows: da and db, R = 8, C = N = 576: 8, 27; bfloat16 (packed by panels before) 18, 42; C
 * = N = 2048, a line from each page: 11, 25; R = 64 (packed by panels before): 41, 53 two cores, M = 240, N =
 * 576, K = 2560 (dx of the loss), ms for V = 49152: a in place, b packed by each tile 133; all packed before,
 * for all tiles, 123; longer fetches or wider sweeps while packing: no gain and two cores there, in turn,
 * medians of 9 to 25: a residual, M = 2048, K = 576, N = 576, over the product without one, best of 9: a pass
 * over finished tiles 1.40, what the first sums are added to 1.05 K = 2048, rows of a 8 KiB apart, M = 4096
 * (32768 for N = 96, 2048 for N = 2048 with the fetch), N = 96, 192, 384, 576, 1024, 2048, in place over
 * packed: with the next rows fetched 1.28, 1.01, 0.93, 0.91, 0.86, 0.84; without 1.46 and 1.12 (over the
 * fetch 1.14, 1.12), 1.07, 1.00, 0.93, 1.01; K = 1536, without, N = 576, 1024, 2048: 1.08, 1.02, 0.97 M = 7,
 * 576x576, bfloat16: on one thread for its few FLOPs, on two for what is packed too 1.33 times the speed no
 * gain: the next panel of b fetched into the L2 cache during the tiles before it (0.99 to 1.02), sums of
 * float32 results kept beside the tile instead of in c (1.00 to 1.02, but one way for all), with K = 8 c
 * fetched six tiles ahead (1.00) and there, LoRA, M = 2048, C = 576, R = 8, processor time of one core, other
 * work beside it, in turn, quartiles: forward and backward over the frozen layer, N = 576, 192: u and du in
 * passes of their own, b of da and db fetched while it is packed 1.087, 1.202, bfloat16 1.068, 1.106; u and
 * du by the tasks of the product, and da and db as below 1.079, 1.145, 1.061, 1.087; R = 16, N =
 * 576 1.139, 1.121, bfloat16 1.139, 1.114 du, da and db just after dx, us, N = 576, 192: 128 columns packed
 * at a time 1950, 1450, bfloat16 1440, 1080; 384, the next fetched by the tiles before 1750, 1190, bfloat16
 * 1230, 930 no gain: b of da and db in place, tiles of 4 rows: db at C = N = 2048 4.5 ms, packed 2.7; half or
 * a third of the steps at once and two cores there, in turn, times the speed of the former, medians of 9 to
 * 15: b packed 64 steps of a panel at a time, now row by row over several panels: M = 96, N = 2048, K = 512
 * and 768 (dx of the loss, rows 8 KiB apart), 4, 8, 16 panels 1.07, 1.09, 1.12; rows of 576 to 3072 floats, M
 * = 2048 1.00 to 1.04 all steps at once where b fits: K = 2048, N = 96, 192 1.05, 1.07; K = 1536, N =
 * 576 1.04; but a turned a 0.96, two slices of b 0.94 a packed for each slice of columns, now for all of them
 * at once: TN, M = 576 and N = 1536, 1.02, 2048 1.05; NN, NT 1.01, 1.03 one panel of b (KC 288) for all rows
 * of a task, now SIDE panels for MR rows: K = 16, 64, 128, 192 1.1 to 1.3, 576 1.0, dweight of the head, K =
 * 112, 1.1, and K = 128, N = 576 1.2; 2, 8, 16 panels 0.97, 1.0, 1.0 of that; then KC 576: K = 576 1.06
 * to 1.13, K = 1536 1.04 to 1.07, K = 2048 0.98 to 1.04; KC 384, 864, 1152 0.95, 0.98 to 1.0, 0.98 to 1.02 of
 * that then K = 8, 16, MR rows over all columns at a time, as before, and SIDE panels as everywhere 1.02
 * to 1.2, 1.07 where k is one block, all columns that the L2 cache has room for at a time, instead of SIDE
 * panels: K = 8, N = 576, 2048, 4096 1.3, 1.5 to 1.9, 1.7; K = 16 1.2 to 1.4, 64 1.1, 128 1.05; into 1 GiB of
 * dweight, K = 112, 128 1.02 to 1.06 with no more rows than a task has, b packed by each task for itself
 * instead of before, for all: M = 112..128 (dx of the head, N = 2048) 1.01 to 1.08, in half of KC and twice
 * the panels 1.02 to 1.05; 208..272 1.04 to 1.10; 512, NT 1.16, TN 1.09, N = 576 1.0; 576, N = 1536,
 * 2048 1.05 to 1.15; but rows 8 KiB apart in place 0.92, packed 1.0; N = 100 of 576 rows 0.91; 2048 rows, NT
 * 0.92 to 1.0, NN 1.0 to 1.08, which stay as they were M = 8, 16, 32, 64, K = 2048 (da, db), N = 576, 2048:
 * swept over instead of packed 1.23, 1.33; 1.18, 1.13; 1.15; 1.19, 1.02; M = 1 of 2048x2048 4 to 5.7, M =
 * 3 2.2 to 3.6; a vector of eight rows of b for each number of a, not two of four: 0.7 to 0.9; without the
 *   fetch 0.55 to 0.9; sums of 3072 or 9216: 0.87 to 1.0, 0.95 to 1.05; k in parts, so that tasks have whole
 * rows: 0.89 to 1.06 u, N = 8, K = 576, a line fetched once and twice unrolled 1.10 LoRA over frozen, R = 8,
 * N = 576 and 192, medians of ratios: da and db in the tasks of dx, in parts of rows 1.080, 1.157 to 1.078,
 *   1.131, not kept for 80 lines; u of MR rows just before their tiles, u as a panel of eight
 * columns: 1.08, 1.16 no gain, before that: KC 144 to 224 (0.94 to 0.98), 320, 384 (0.97 to 1.02); 6 or 8 MiB
 * of b at once (0.95 to 1.02); what is packed fetched two rows ahead instead of four (0.98 to 1.02); columns
 * of a task packed by itself (0.96 where all tasks share them 1.13) and two cores of a Zen 5, in turn, times
 * the speed of the former, medians of 9 to 15, M = 2048: c in bfloat16 written by the tiles, not by a pass
 * over their sums: K = 576 1.02 to 1.06, K = 8 1.5 320 KiB of a in a task, not 480: K = 1536, 2048 1.03
 * to 1.05; as many rows for each thread (K = 576 without 0.93) KC 512, not 288, float32 1.00 to 1.04; of
 * pairs of bfloat16 1.02 at K = 2048, but with errors above their bounds a turned a, K = 576, N = 192, packed
 * by the task that needs it 1.03 to 1.06, float32 1.13 to 1.17; a line of memory into all of its panels at
 * once too, 1.26, 1.24 in all, N = 576 to 2048 1.05 to 1.10, 1.03 to 1.08 (the second without the first, M =
 * 576, K = 2048, N = 192 0.93 to 0.98) no gain, before that: KC 144, 192 0.96 to 0.98; 1, 4 panels side by
 * side 0.99, 1.01; b fetched for the next panels 0.98; rows 4 KiB apart packed 0.99; sums rounded by half of
 * the instructions 0.93 to 1.03 */
#include "gemm.h"
#include "scratch.h"

/* The tile of the micro-kernel: MR rows by NV vectors. 8 x 48 floats fill 24 of the 32 registers of AVX-512,
 * 8 x 12 as many of those of aarch64, 6 x 16 fill 12 of the 16 of AVX2; what is left holds a row of b and one
 * broadcast element of a. */
#if VW == 16 || defined __aarch64__
enum { MR = 8, NV = 3 };
#elif defined __AVX2__
enum { MR = 6, NV = 2 };
#else
enum { MR = 4, NV = 2 };
#endif
enum {
    NR = NV * VW,
    FEW = 4, /* rows of the lower tile, for what is left of MR: sums enough to keep two multipliers busy */
    KC = VW == 16 ? 512
                  : 576,     /* steps of k between which sums go to memory: MR rows of a fit the L1 cache, */
    SIDE = VW == 16 ? 2 : 4, /* SIDE panels of b, side by side, the L2 cache */
    DOT_KC = 288,            /* of pairs of bfloat16: longer sums would be less exact */
    AHEAD = 8,               /* steps that what is read with a stride is fetched ahead */
    KS = 1280,               /* steps of k that are packed at once, at most; twice that where b is small */
    EXTRA = 8,  /* and both an eighth more, where that saves a block: the few steps of LoRA do not cost one */
    ROWS = 576, /* of a in one task, at most; with no more, and columns enough, tasks pack b themselves */
    FEW_ROWS = 64, /* with no more, FEW_KC: shorter sums are more exact, and few rows add them fast */
    FEW_KC = 96,
    MID_ROWS = 128, /* with no more, where tasks pack b themselves, MID_KC and twice SIDE panels */
    MID_KC = VW == 16 ? 144 : 288,
    TURNED_ROWS = VW == 16 ? 256
                           : FEW_ROWS, /* with no more, a turned a is read in place; with more, packed */
    NEAR = ROWS * SIDE * NR,           /* sums, and a part of b, that a task keeps */
    NEAR_B = (KC + KC / EXTRA) * SIDE * NR,
    TASK_BYTES = (VW == 16 ? 320 : 240)
        << 10,           /* rows of a that one task works on: a third or half of an L2 cache */
    SUM_BYTES = 8 << 20, /* of sums kept in float32 */
};
_Static_assert((int)DOT_KC <= KC && (int)FEW_KC <= KC && 2 * (MID_KC + MID_KC / EXTRA) <= KC + KC / EXTRA,
               "a part of b in NEAR_B");

/* Packed elements are 32 bits: a float, or, in products of bfloat16, the pair of k and k + 1. A "step" is one
 * of them. */
typedef struct Job {
    const Gemm *g;
    struct Job *thin;      /* the product that makes u, where that is made row by row with this one */
    int swapped, dot;      /* computes the transpose; multiplies pairs of bfloat16 */
    int plain;             /* c is written by the tiles themselves, and keeps sums between depths */
    int plain_bf16;        /* c is bfloat16, and written by them once it is finished */
    int direct, copied;    /* reads a where it lies, or in rows that are converted to float32 */
    int local_b, own_a;    /* each task packs its own part of b; of a */
    int64_t M, N, K, R;    /* K and R in elements; after swapping */
    Matrix a, b, a2, b2;   /* here a2 is u, the second half of the sums a2 b2 */
    int64_t steps, steps2; /* K and R in steps */
    int64_t m0, m1, n0, n1, s0, s1;          /* what is packed now; s in steps, of K + R */
    int64_t tile_m, tile_n, tiles_n, pack_n; /* pack_n columns are packed by a task */
    int64_t nr;                              /* columns of a panel: NR, or less where that divides better */
    int64_t kc,
        group; /* steps and columns of b between which sums go to memory; with local_b, packed at a time */
    int64_t a_row, step_a,
        ahead; /* floats from row to row, from step to step of a in place, and to what comes next */
    float *pack_a, *pack_b, *ext;
    float *sum; /* sums of all rows and columns in work, where c cannot hold them between depths */
    int64_t wide_m, wide_n; /* rows and columns packed at once */
} Job;

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- packing --------------------------------------------------------------------------------- */

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

static inline const void *element(Matrix m, int64_t row, int64_t col) {
    return (const char *)m.data + (row * m.row + col * m.col) * dtype_size(m.dtype);
}

/* One step k (in elements) of column j, zero outside of [K, n]. */
static inline uint32_t step1(Matrix b, int64_t k, int64_t j, int64_t K, int64_t n, float scale, int dot) {
    uint32_t u = 0;
    if (j >= n) return 0;
    if (!dot) {
        float x = k < K ? load1(element(b, k, j), b.dtype) * scale : 0;
        memcpy(&u, &x, 4);
    } else
        for (int i = 0; i < 2; i++) {
            uint32_t h = k + i < K ? float_to_bf16(load1(element(b, k + i, j), b.dtype) * scale) : 0;
            u |= h << (16 * i);
        }
    return u;
}

/* Steps of `width` columns where k is dense: transposed in blocks. line: bytes from column to column. A
 * narrow panel (of a) is written in whole vectors too: each store covers the excess of the one before, and
 * the last has none. */
static inline __attribute__((always_inline)) void pack_turned(float *out, const char *p, int64_t line,
                                                              int64_t steps, int64_t n, int64_t width,
                                                              float scale, int32_t dtype) {
    int64_t size = dtype == F32 ? 4 : 2, per_line = 64 / size, blocks = ceil_div(width, VW) * per_line;
    for (int64_t s0 = 0; s0 < steps; s0 += per_line)
        for (int64_t block = 0; block < blocks; block += VW) { /* whole cache lines, VW of them */
            int64_t s = s0 + block % per_line, j = block / per_line * VW, count = min64(VW, steps - s);
            if (count <= 0) continue;
            vf x[VW];
            UNROLLED
            for (int i = 0; i < VW; i++) {
                x[i] = (vf){ 0 };
                const char *q = p + s * size + (j + i) * line;
                if (j + i >= n) continue;
                if (count == VW) x[i] = vf_load_any(q, dtype) * scale;
                else {
                    char part[4 * VW] = { 0 };
                    memcpy(part, q, (size_t)(count * size));
                    x[i] = vf_load_any(part, dtype) * scale;
                }
            }
            transpose(x);
            int64_t wide = width < VW && s + VW >= steps ? count - 1 : count;
            UNROLLED
            for (int i = 0; i < VW; i++)
                if (i < wide) vf_store(out + (s + i) * width + j, x[i]);
                else if (i < count) memcpy(out + (s + i) * width, &x[i], (size_t)width * 4);
        }
}

/* Whole vectors of columns where those are dense; line: bytes from k to k + 1. `steps` of them, n a multiple
 * of VW or, if there is something to read and to overwrite behind them, less. */
static inline __attribute__((always_inline)) void pack_rows(float *out, const char *p, int64_t line,
                                                            int64_t steps, int64_t n, int64_t width,
                                                            float scale, int32_t dtype, int dot) {
    int64_t size = dtype == F32 ? 4 : 2;
    for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 3
        for (int64_t j = 0; j < n; j += VW) {
            vf x;
            if (dot) {
                vh low, high;
                memcpy(&low, p + 2 * s * line + j * 2, sizeof low);
                memcpy(&high, p + (2 * s + 1) * line + j * 2, sizeof high);
                x = (vf)(__builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16);
            } else {
                __builtin_prefetch(p + (s + AHEAD) * line + j * size);
                x = vf_load_any(p + s * line + j * size, dtype) * scale;
            }
            vf_store(out + s * width + j, x);
        }
    }
}

/* out[steps][width] = scale b[k0 .., j0 .. j0+width-1], zero where b ends. */
static void pack(float *out, Matrix b, int64_t k0, int64_t steps, int64_t K, int64_t j0, int64_t width,
                 int64_t N, float scale, int dot) {
    int64_t per = dot ? 2 : 1, n = min64(width, N - j0), whole = min64(steps, (K - k0) / per), from = 0,
            done = 0;
    const char *p = element(b, k0, j0);
    if (!dot || (b.dtype == BF16 && scale == 1)) {
        if (b.row == 1) { /* pairs travel as floats do */
            int64_t line = b.col * dtype_size(b.dtype);
            done = width, from = whole;
            if (dot || b.dtype == F32) {
                if (scale == 1) pack_turned(out, p, line, whole, n, width, 1, F32);
                else pack_turned(out, p, line, whole, n, width, scale, F32);
            } else if (b.dtype == BF16) pack_turned(out, p, line, whole, n, width, scale, BF16);
            else pack_turned(out, p, line, whole, n, width, scale, F16);
        } else if (b.col == 1) {
            int64_t line = b.row * dtype_size(b.dtype);
            done = n / VW * VW, from = whole;
            if (width < VW && n == width && j0 + VW <= N && whole > 0) done = width, from = whole - 1;
            if (dot) pack_rows(out, p, line, from, done, width, 1, BF16, 1);
            else if (b.dtype == F32) pack_rows(out, p, line, from, done, width, scale, F32, 0);
            else if (b.dtype == BF16) pack_rows(out, p, line, from, done, width, scale, BF16, 0);
            else pack_rows(out, p, line, from, done, width, scale, F16, 0);
        }
    }
    for (int64_t s = done == width ? from : 0; s < steps; s++)
        for (int64_t j = s < from ? done : 0; j < width; j++) {
            uint32_t u = step1(b, k0 + s * per, j0 + j, K, N, scale, dot);
            memcpy(out + s * width + j, &u, 4);
        }
}

/* Columns of a panel for N of them: NR, or two vectors where N is four. */
static inline int64_t panel_columns(int64_t N) { return NV == 3 && ceil_div(N, VW) == 4 ? 2 * VW : NR; }

/* Width of the panel of b from column n: whole vectors, no more than are needed. */
static inline int64_t panel_width(const Job *job, int64_t n) {
    return min64(job->nr, ceil_div(job->n1 - n, VW) * VW);
}

/* Steps s0 .. s1 of the panel of `width` columns from j0, out of those of b and then those of b2. */
static void pack_panel(const Job *job, float *out, int64_t s0, int64_t s1, int64_t j0, int64_t width) {
    int64_t per = job->dot ? 2 : 1, first = min64(s1, job->steps) - s0, from = max64(s0, job->steps);
    if (first > 0) pack(out, job->b, s0 * per, first, job->K, j0, width, job->N, 1, job->dot);
    if (s1 > from)
        pack(out + (from - s0) * width, job->b2, (from - job->steps) * per, s1 - from, job->R, j0, width,
             job->N, 1, job->dot);
}

/* Steps s0 .. s1 of the panels from n0 to n1, one behind the other: row by row, as memory likes it, where k
 * is not dense. */
static inline __attribute__((always_inline)) void
pack_wide(float *out, int64_t pitch, const char *p, int64_t line, int64_t steps, int64_t n, int32_t dtype) {
    int64_t size = dtype == F32 ? 4 : 2;
    for (int64_t s = 0; s < steps; s++, p += line)
        for (int64_t j = 0; j < n; j += NR) {
            __builtin_prefetch(p + AHEAD / 2 * line + j * size);
            UNROLLED
            for (int64_t i = 0; i < NR; i += VW)
                vf_store(out + j * pitch + s * NR + i, vf_load_any(p + (j + i) * size, dtype));
        }
}

static void pack_panels(const Job *job, float *out, int64_t s0, int64_t s1, int64_t n0, int64_t n1) {
    Matrix b = job->b;
    int64_t line = b.row * dtype_size(b.dtype), whole = 0, first = min64(s1, job->steps) - s0;
    if (!job->dot && b.col == 1 && first > 0 && job->nr == NR) {
        whole = (n1 - n0) / NR * NR;
        if (b.dtype == F32) pack_wide(out, s1 - s0, element(b, s0, n0), line, first, whole, F32);
        else if (b.dtype == BF16) pack_wide(out, s1 - s0, element(b, s0, n0), line, first, whole, BF16);
        else pack_wide(out, s1 - s0, element(b, s0, n0), line, first, whole, F16);
    }
    for (int64_t n = n0; n < n1; n += job->nr) {
        int64_t s = n - n0 < whole ? s0 + first : s0, width = panel_width(job, n);
        if (s < s1) pack_panel(job, out + (n - n0) * (s1 - s0) + (s - s0) * width, s, s1, n, width);
    }
}

/* One task packs neighbouring panels side by side, row by row or, where k is dense, SWEEP steps at a time:
 * memory gives whole runs of a row together. */
enum { SWEEP = 64, LEAST_PANELS = 4, PANELS = 16 };
static inline int64_t pack_tasks_b(const Job *job) {
    return job->local_b ? 0 : ceil_div(job->n1 - job->n0, job->pack_n);
}
static inline int64_t columns_of_task(const Job *job, int64_t threads) {
    return job->nr *
           min64(PANELS, max64(LEAST_PANELS, ceil_div(ceil_div(job->n1 - job->n0, job->nr), 4 * threads)));
}
static inline int64_t steps_a(const Job *job) {
    return min64(job->s1, job->steps) - job->s0;
} /* of a in this slice */

/* Columns n0 .. n1 of b. */
static void pack_columns(const Job *job, int64_t n0, int64_t n1) {
    int64_t steps = job->s1 - job->s0;
    float *out = job->pack_b + (n0 - job->n0) * steps;
    if (job->b.col == 1 && !job->dot) pack_panels(job, out, job->s0, job->s1, n0, n1);
    else
        for (int64_t s = job->s0; s < job->s1; s += SWEEP)
            for (int64_t n = n0, end = min64(job->s1, s + SWEEP); n < n1; n += job->nr) {
                int64_t width = panel_width(job, n);
                pack_panel(job, out + (n - n0) * steps + (s - job->s0) * width, s, end, n, width);
            }
}

#if VW == 16
/* Steps of n rows of a, a multiple of PAIR, where a row of memory holds a step of them all: each vector is
 * two panels', which lie `pitch` apart. */
enum { PAIR = 2 * VW };
static inline __attribute__((always_inline)) void pack_beside(float *out, int64_t pitch, const char *p,
                                                              int64_t line, int64_t steps, int64_t n,
                                                              int32_t dtype, int dot) {
    typedef uint16_t halves __attribute__((vector_size(64)));
    typedef float vf8 __attribute__((vector_size(32)));
    int64_t size = dtype == F32 ? 4 : 2, per = dot ? 2 : 1;
    for (int64_t s = 0; s < steps; s++, p += per * line)
        for (int64_t j = 0; j < n; j += PAIR) {
            const char *q = p + j * size;
            vf x[2];
            UNROLLED
            for (int64_t i = 0; i < per; i++) __builtin_prefetch(q + (AHEAD + i) * line);
            if (!dot) __builtin_prefetch(q + AHEAD * line + VW * size);
            if (dot) {
                halves low, high;
                memcpy(&low, q, sizeof low);
                memcpy(&high, q + line, sizeof high);
                x[0] = (vf)__builtin_shufflevector(low, high, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38,
                                                   7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14,
                                                   46, 15, 47);
                x[1] = (vf)__builtin_shufflevector(low, high, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
                                                   22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29,
                                                   61, 30, 62, 31, 63);
            } else x[0] = vf_load_any(q, dtype), x[1] = vf_load_any(q + VW * size, dtype);
            UNROLLED
            for (int i = 0; i < 2; i++) {
                float *to = out + (j / MR + 2 * i) * pitch + s * MR;
                vf8 first = __builtin_shufflevector(x[i], x[i], 0, 1, 2, 3, 4, 5, 6, 7);
                vf8 second = __builtin_shufflevector(x[i], x[i], 8, 9, 10, 11, 12, 13, 14, 15);
                memcpy(to, &first, sizeof first);
                memcpy(to + pitch, &second, sizeof second);
            }
        }
}
#endif

/* Rows m0 .. m1 of a, in panels of MR. */
static void pack_rows_of_a(const Job *job, int64_t m0, int64_t m1) {
    int64_t per = job->dot ? 2 : 1, end = job->s0 + steps_a(job), beside = 0,
            whole = 0; /* rows and steps by pack_beside */
    float *out = job->pack_a + (m0 - job->m0) * job->a_row;
#if VW == 16
    if (job->a.row == 1) {
        const char *p = element(job->a, m0, job->s0 * per);
        int64_t line = job->a.col * dtype_size(job->a.dtype);
        beside = (m1 - m0) / PAIR * PAIR, whole = min64(end, job->K / per) - job->s0;
        if (job->dot) pack_beside(out, MR * job->a_row, p, line, whole, beside, BF16, 1);
        else if (job->a.dtype == F32) pack_beside(out, MR * job->a_row, p, line, whole, beside, F32, 0);
        else if (job->a.dtype == BF16) pack_beside(out, MR * job->a_row, p, line, whole, beside, BF16, 0);
        else pack_beside(out, MR * job->a_row, p, line, whole, beside, F16, 0);
    }
#endif
    for (int64_t s = job->s0; s < end; s += SWEEP)
        for (int64_t m = m0; m < m1; m += MR) {
            int64_t from = m - m0 < beside ? max64(s, job->s0 + whole) : s,
                    count = min64(end, s + SWEEP) - from;
            if (count > 0)
                pack(out + (m - m0) * job->a_row + (from - job->s0) * MR, transposed(job->a), from * per,
                     count, job->K, m, MR, job->M, 1, job->dot);
        }
}

static int pack_task(int64_t i, void *context) {
    const Job *job = context;
    int64_t tasks_b = pack_tasks_b(job), n = job->n0 + i * job->pack_n,
            m = job->m0 + (i - tasks_b) * MR * PANELS;
    if (i < tasks_b) pack_columns(job, n, min64(job->n1, n + job->pack_n));
    else pack_rows_of_a(job, m, min64(job->m1, m + MR * PANELS));
    return 0;
}

/* ---- the micro-kernel ------------------------------------------------------------------------ */

static inline __attribute__((always_inline)) vf multiply_add(vf sum, vf a, vf b, int dot) {
#if defined __AVX512BF16__
    if (dot) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)a);
#elif DOTS
    if (dot)
        return sum + (vf)((vu)a << 16) * (vf)((vu)b << 16) +
               (vf)((vu)a & 0xffff0000) * (vf)((vu)b & 0xffff0000);
#else
    (void)dot;
#endif
    return sum + a * b;
}

/* MR rows of a: packed, or in place, with their offsets. `ahead` is where the next tile will read. */
typedef struct {
    const float *data;
    int64_t step, ahead, row[MR];
} Rows;

/* sum[MR][nv] += a[.., steps] b[steps, ..]. What is read in place is fetched ahead: a line of each of the
 * next MR rows where k is dense, else the lines of AHEAD steps later. */
static inline __attribute__((always_inline)) void
multiply(vf sum[MR][NV], int64_t steps, const Rows *a, const float *pb, int direct, int mr, int nv, int dot) {
    const float *pa = a->data;
    int64_t step_a = direct ? a->step : MR;
    for (int64_t s = 0; s < steps; s += 16) {
        if (direct) UNROLLED
        for (int i = 0; i < mr; i++) __builtin_prefetch(pa + a->row[i] + a->ahead);
        int64_t end = min64(16, steps - s);
#pragma GCC unroll 2
        for (int64_t t = 0; t < end; t++) {
            vf bv[NV];
            UNROLLED
            for (int j = 0; j < nv; j++) bv[j] = vf_load(pb + j * VW);
            UNROLLED
            for (int i = 0; i < mr; i++) {
                vf av = vf_set1(pa[direct ? a->row[i] : i]);
                UNROLLED
                for (int j = 0; j < nv; j++) sum[i][j] = multiply_add(sum[i][j], av, bv[j], dot);
            }
            pa += step_a;
            pb += nv * VW;
        }
    }
}

/* Where the sums of a tile go: sums + add, which may be NULL and is theirs or other memory; or, finished,
 * sums + add + more in bfloat16. Rows are so many elements apart. */
typedef struct {
    float *sums;
    const float *add;
    uint16_t *bf16; /* NULL where they stay float32 */
    const uint16_t *more;
    int64_t row, add_row, bf16_row, more_row;
} Out;

/* As vf_store_any, but for what products of bfloat16 lose anyhow: subnormal numbers become 0. */
static inline __attribute__((always_inline)) void store_bf16(uint16_t *p, vf x) {
#if defined __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &h, sizeof h);
#else
    vf_store_any(p, BF16, x);
#endif
}

/* out[mr][nv VW] = a b, of `steps` steps, + a2 b2, of `steps2` packed ones. */
static inline __attribute__((always_inline)) void tile(int64_t steps, const Rows *a, const float *b,
                                                       int64_t steps2, const Rows *a2, const Out *to,
                                                       int direct, int mr, int nv, int dot) {
    Out out = *to; /* in registers, whatever is written */
    vf sum[MR][NV];
    UNROLLED
    for (int i = 0; i < mr; i++) UNROLLED
    for (int j = 0; j < nv; j++) sum[i][j] = (vf){ 0 };
    if (out.bf16) UNROLLED
    for (int i = 0; i < mr; i++) {
        __builtin_prefetch(out.bf16 + i * out.bf16_row, 1);
        __builtin_prefetch(out.bf16 + i * out.bf16_row + nv * VW - 1, 1);
    }
    else UNROLLED for (int i = 0; i < mr; i++) UNROLLED for (int j = 0; j < nv; j++)
        __builtin_prefetch(out.sums + i * out.row + j * VW, 1);
    if (out.add) UNROLLED
    for (int i = 0; i < mr; i++) UNROLLED
    for (int j = 0; j < nv; j++) __builtin_prefetch(out.add + i * out.add_row + j * VW);
    if (out.more) UNROLLED
    for (int i = 0; i < mr; i++) {
        __builtin_prefetch(out.more + i * out.more_row);
        __builtin_prefetch(out.more + i * out.more_row + nv * VW - 1);
    }
    multiply(sum, steps, a, b, direct, mr, nv, dot);
    if (direct) multiply(sum, steps2, a2, b + steps * nv * VW, 0, mr, nv, dot);
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

typedef void (*Tile)(int64_t steps, const Rows *a, const float *b, int64_t steps2, const Rows *a2,
                     const Out *out);
#define TILE(name, direct, mr, nv, dot)                                                                      \
    static __attribute__((noinline)) void name(int64_t steps, const Rows *a, const float *b, int64_t steps2, \
                                               const Rows *a2, const Out *out) {                             \
        tile(steps, a, b, steps2, a2, out, direct, mr, nv, dot);                                             \
    }
#if VW == 16 || defined __aarch64__
#define TILES(name, direct, mr, dot) \
    TILE(name##_1, direct, mr, 1, dot) TILE(name##_2, direct, mr, 2, dot) TILE(name##_3, direct, mr, 3, dot)
#define NAMES(name) { name##_1, name##_2, name##_3 }
#else
#define TILES(name, direct, mr, dot) TILE(name##_1, direct, mr, 1, dot) TILE(name##_2, direct, mr, 2, dot)
#define NAMES(name) { name##_1, name##_2 }
#endif
TILES(packed, 0, MR, 0)
TILES(direct, 1, MR, 0) TILES(packed_few, 0, FEW, 0) TILES(direct_few, 1, FEW, 0)
#if DOTS
    TILES(packed_dot, 0, MR, 1) TILES(direct_dot, 1, MR, 1) TILES(packed_dot_few, 0, FEW, 1)
        TILES(direct_dot_few, 1, FEW, 1)
#endif
    /* By dot, direct, whether FEW rows are enough, vectors. */
    static const Tile tiles[][2][2][NV] = {
        { { NAMES(packed), NAMES(packed_few) }, { NAMES(direct), NAMES(direct_few) } },
#if DOTS
        { { NAMES(packed_dot), NAMES(packed_dot_few) }, { NAMES(direct_dot), NAMES(direct_dot_few) } },
#endif
    };

/* ---- what happens to a finished tile --------------------------------------------------------- */

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

static void finish(const Gemm *g, int swapped, const float *x, int64_t x_row, int64_t m, int64_t n,
                   int64_t rows, int64_t cols, float beta) {
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

static void tile_rows(const Job *job, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
    const Gemm *g = job->g;
    Gemm onward = *g; /* once c has a part of its sums and all else */
    onward.beta = 1, onward.residual = NULL;
    int64_t steps = job->s1 - job->s0, all = job->steps + job->steps2;
    int whole = !job->local_b && !job->sum &&
                steps <= job->kc + job->kc / EXTRA; /* no sums are kept between depths */
    int64_t group = whole ? job->nr * max64(SIDE, SIDE * KC / max64(1, steps)) : job->group;
    int64_t sum_row = job->sum ? job->wide_n : whole ? job->nr : group;
    float near[NEAR] __attribute__((aligned(64))), near_b[NEAR_B] __attribute__((aligned(64)));
    for (int64_t n0 = n_begin; n0 < n_end; n0 += group) {
        int64_t n1 = min64(n_end, n0 + group), s = job->s0, next;
        do {
            next = s + ceil_div(job->s1 - s, max64(1, ceil_div(job->s1 - s, job->kc + job->kc / EXTRA)));
            int64_t part = job->direct ? max64(0, min64(next, job->steps) - s) : next - s;
            if (job->local_b) pack_panels(job, near_b, s, next, n0, n1);
            for (int64_t m = m_begin; m < m_end; m += MR) {
                int64_t rows = min64(MR, m_end - m);
                Rows a = { .step = job->step_a, .ahead = job->ahead }, a2 = { 0 };
                if (job->direct) {
                    a.data = job->copied ? job->pack_a + (m - job->m0) * job->a_row + s - job->s0
                                         : (const float *)job->a.data + m * job->a_row + s * job->step_a;
                    for (int64_t r = 0; r < MR; r++) a.row[r] = min64(r, rows - 1) * job->a_row;
                    a2.data =
                        job->ext + (m - job->m0) * job->steps2 + (max64(s, job->steps) - job->steps) * MR;
                } else a.data = job->pack_a + (m - job->m0) * job->a_row + (s - job->s0) * MR;
                for (int64_t n = n0; n < n1; n += job->nr) {
                    int64_t width = panel_width(job, n), cols = min64(width, n1 - n);
                    int tall = rows > FEW ? MR : FEW;
                    const float *b = job->local_b
                                         ? near_b + (n - n0) * (next - s)
                                         : job->pack_b + (n - job->n0) * steps + (s - job->s0) * width;
                    Tile run = tiles[job->dot][job->direct][tall == FEW][width / VW - 1];
                    int first = s == (job->sum ? 0 : job->s0), last = next == (job->sum ? all : job->s1);
                    int entire = cols == width && rows == tall, straight = job->plain && entire;
                    int in_bf16 = job->plain_bf16 && entire && last;
                    Out out = { .row = sum_row };
                    float *sum = out.sums = job->sum ? job->sum + (m - job->m0) * job->wide_n + n - job->n0
                                                     : near + (whole ? 0 : (m - m_begin) * group + n - n0);
                    if (!first) out.add = sum, out.add_row = sum_row;
                    if (straight) {
                        float *c = (float *)g->c + m * g->c_row + n;
                        int again = s > 0 || g->beta == 1;
                        if (first) {
                            out.add = again         ? c
                                      : g->residual ? (const float *)g->residual + m * g->residual_row + n
                                                    : NULL;
                            out.add_row = again ? g->c_row : g->residual_row;
                        }
                        if (last) out.sums = c, out.row = g->c_row;
                    }
                    if (in_bf16) {
                        out.bf16 = (uint16_t *)g->c + m * g->c_row + n, out.bf16_row = g->c_row;
                        out.more = g->beta == 1  ? out.bf16
                                   : g->residual ? (const uint16_t *)g->residual + m * g->residual_row + n
                                                 : NULL;
                        out.more_row = g->beta == 1 ? g->c_row : g->residual_row;
                    }
                    run(part, &a, b, next - s - part, &a2, &out);
                    if (!straight && !in_bf16 && last) {
                        const Gemm *rest = job->plain && job->s0 > 0 ? &onward : g;
                        finish(rest, job->swapped, sum, sum_row, m, n, rows, cols, rest->beta);
                    }
                }
            }
        } while ((s = next) < job->s1);
    }
}

/* ---- a few columns: u = x a^T of LoRA; one row of output ------------------------------------- */

/* Here the vectors run along k, so that no lane is idle: VW/COLUMNS rows of a, converted to float32 as they
 * are read, times COLUMNS columns of b, VW sums of VW lanes each, which one transposition brings together. A
 * single column takes VW rows at once: then each element of a is read for itself, as fast as memory gives it.
 * b is copied with k dense and zeros at its end. */
enum { NARROW_ROWS = 128, COLUMNS = VW / 2 };

static inline __attribute__((always_inline)) void narrow_step(vf sum[VW], const char *const x[VW], int64_t at,
                                                              const float *b, int64_t depth, int32_t dtype,
                                                              int dot, int columns) {
    vf av[VW];
    UNROLLED
    for (int i = 0; i < VW / columns; i++)
        av[i] = dot ? vf_load((const float *)(x[i] + at)) : vf_load_any(x[i] + at, dtype);
    UNROLLED
    for (int j = 0; j < columns; j++) {
        vf bv = vf_keep(vf_load(b + j * depth));
        UNROLLED
        for (int i = 0; i < VW / columns; i++)
            sum[i * columns + j] = multiply_add(sum[i * columns + j], av[i], bv, dot);
    }
}

static inline __attribute__((always_inline)) void narrow_rows(const Job *job, int64_t begin, int64_t end,
                                                              int32_t dtype, int dot, int columns) {
    enum { MOST = 16 };
    int64_t size = dtype == F32 || dot ? 4 : 2, bytes = job->K * dtype_size(dtype),
            whole = bytes / (size * VW), line = 64 / (size * VW);
    int64_t depth = ceil_div(bytes, size * VW) * VW, all = ceil_div(job->N, columns) * columns,
            rows = VW / columns;
    int64_t ahead = (columns == 1 ? 1 : 4) * rows * job->a.row * dtype_size(dtype);
    float buffer[VW * MOST];
    for (int64_t m = begin; m < end; m += rows) {
        const char *x[VW], *end_of[VW];
        char rest[VW][4 * VW];
        UNROLLED
        for (int i = 0; i < rows; i++) {
            x[i] = element(job->a, min64(m + i, end - 1), 0), end_of[i] = rest[i];
            if (depth == whole * VW) continue;
            memset(rest[i], 0, sizeof rest[i]);
            memcpy(rest[i], x[i] + whole * size * VW, (size_t)(bytes - whole * size * VW));
        }
        for (int64_t n = 0; n < all; n += columns) {
            const float *b = job->pack_b + n * depth;
            vf sum[VW];
            UNROLLED
            for (int j = 0; j < VW; j++) sum[j] = (vf){ 0 };
            int64_t k = 0;
#pragma GCC unroll 2
            for (; k + line <= whole; k += line) {
                UNROLLED
                for (int i = 0; i < rows; i++) __builtin_prefetch(x[i] + k * size * VW + ahead);
                UNROLLED
                for (int t = 0; t < line; t++)
                    narrow_step(sum, x, (k + t) * size * VW, b + (k + t) * VW, depth, dtype, dot, columns);
            }
            for (; k < whole; k++) narrow_step(sum, x, k * size * VW, b + k * VW, depth, dtype, dot, columns);
            if (depth > whole * VW) narrow_step(sum, end_of, 0, b + whole * VW, depth, dtype, dot, columns);
            transpose(sum);
            UNROLLED
            for (int j = 1; j < VW; j++) sum[0] += sum[j];
            UNROLLED
            for (int i = 0; i < rows; i++)
                memcpy(buffer + i * MOST + n, (float *)&sum[0] + i * columns, sizeof(float) * columns);
        }
        finish(job->g, job->swapped, buffer, MOST, m, 0, min64(rows, end - m), job->N, job->g->beta);
    }
}

static inline __attribute__((always_inline)) void narrow_dtype(const Job *job, int64_t begin, int64_t end,
                                                               int32_t dtype, int dot) {
    if (job->N == 1) narrow_rows(job, begin, end, dtype, dot, 1);
    else narrow_rows(job, begin, end, dtype, dot, COLUMNS);
}

static void narrow_block(const Job *job, int64_t begin, int64_t end) {
    if (job->dot) narrow_dtype(job, begin, end, BF16, 1);
    else if (job->a.dtype == F32) narrow_dtype(job, begin, end, F32, 0);
    else if (job->a.dtype == BF16) narrow_dtype(job, begin, end, BF16, 0);
    else narrow_dtype(job, begin, end, F16, 0);
}

static int narrow_task(int64_t block, void *context) {
    const Job *job = context;
    narrow_block(job, block * NARROW_ROWS, min64(job->M, (block + 1) * NARROW_ROWS));
    return 0;
}

static int narrow_pack(int64_t n, void *context) {
    const Job *job = context;
    int64_t depth = ceil_div(job->steps, VW) * VW, per = job->dot ? 2 : 1, s = 0;
    if (n < job->N && job->b.row == 1 && !job->dot)
        load_row(job->pack_b + n * depth, element(job->b, 0, n), job->b.dtype, s = job->K);
    for (; s < depth; s++) {
        uint32_t u = step1(job->b, s * per, n, job->K, job->N, 1, job->dot);
        memcpy(job->pack_b + n * depth + s, &u, 4);
    }
    return 0;
}

static inline int is_narrow(const Job *job) {
    return job->N <= 16 && job->R == 0 && job->K && job->a.col == 1 &&
           (!job->dot || (job->K % 2 == 0 && job->a.row % 2 == 0));
}
static inline int64_t narrow_columns(const Job *job) {
    return job->N == 1 ? 1 : ceil_div(job->N, COLUMNS) * COLUMNS;
}
static inline int64_t narrow_size(const Job *job) {
    return narrow_columns(job) * ceil_div(job->steps, VW) * VW;
}

static int narrow(Job *job) {
    if (!(job->pack_b = scratch(4 * narrow_size(job)))) return -1;
    int status = parallel_for(narrow_columns(job), job->steps, narrow_pack, job);
    int64_t cost = NARROW_ROWS * narrow_columns(job) * (job->steps / 64 + 1);
    if (!status) status = parallel_for(ceil_div(job->M, NARROW_ROWS), cost, narrow_task, job);
    scratch_free(job->pack_b);
    return status;
}

/* ---- a few rows: da and db of LoRA; one row of output ---------------------------------------- */

/* Rows of b are read where they lie, SWEPT of them from one end to the other, and pairs of vectors of them
 * multiplied with all rows of a; the sums of FEW_KC steps stay in the first cache. Rows of a are packed,
 * ABREAST of them side by side. */
enum { SWEPT = 4, ABREAST = 8, SWEPT_SUMS = 6144 };

/* sum[rows][nv VW] += a b, for `depth` rows of b. */
static inline __attribute__((always_inline)) void sweep_tile(float *sum, int64_t pitch, const float *a,
                                                             vf x[SWEPT][2], int rows, int depth, int nv) {
    vf y[2][2];
    UNROLLED
    for (int i = 0; i < rows; i++) UNROLLED
    for (int j = 0; j < nv; j++) y[i][j] = vf_load(sum + i * pitch + j * VW);
    UNROLLED
    for (int t = 0; t < depth; t++) UNROLLED
    for (int i = 0; i < rows; i++) UNROLLED
    for (int j = 0; j < nv; j++) y[i][j] += vf_set1(a[t * ABREAST + i]) * x[t][j];
    UNROLLED
    for (int i = 0; i < rows; i++) UNROLLED
    for (int j = 0; j < nv; j++) vf_store(sum + i * pitch + j * VW, y[i][j]);
}

static inline __attribute__((always_inline)) void sweep_vectors(float *sum, int64_t pitch, const float *a,
                                                                int64_t steps, int64_t rows, vf x[SWEPT][2],
                                                                int depth, int nv) {
    for (int64_t m = 0; m < rows; m += ABREAST, a += ABREAST * steps) {
        int64_t r = 0, end = min64(ABREAST, rows - m);
        for (; r + 2 <= end; r += 2, sum += 2 * pitch) sweep_tile(sum, pitch, a + r, x, 2, depth, nv);
        if (r < end) sweep_tile(sum, pitch, a + r, x, 1, depth, nv);
    }
}

static inline __attribute__((always_inline)) void sweep_rows(float *sum, int64_t pitch, const float *a,
                                                             int64_t steps, int64_t rows, const char *b,
                                                             int64_t line, int64_t cols, int32_t dtype,
                                                             int depth) {
    int64_t size = dtype == F32 ? 4 : 2, j = 0;
    vf x[SWEPT][2];
    for (; j + 2 * VW <= cols; j += 2 * VW) {
        UNROLLED
        for (int t = 0; t < depth; t++) {
            const char *p = b + t * line + j * size;
            x[t][0] = vf_load_any(p, dtype), x[t][1] = vf_load_any(p + VW * size, dtype);
            UNROLLED
            for (int i = 0; i < 2 * VW * size; i += 64) __builtin_prefetch(p + 2 * depth * line + i);
        }
        sweep_vectors(sum + j, pitch, a, steps, rows, x, depth, 2);
    }
    for (; j < cols; j += VW) {
        UNROLLED
        for (int t = 0; t < depth; t++) {
            char part[4 * VW] = { 0 };
            memcpy(part, b + t * line + j * size, (size_t)(min64(VW, cols - j) * size));
            x[t][0] = vf_load_any(part, dtype);
        }
        sweep_vectors(sum + j, pitch, a, steps, rows, x, depth, 1);
    }
}

static inline __attribute__((always_inline)) void sweep_steps(float *sum, int64_t pitch, const float *a,
                                                              int64_t steps, int64_t rows, const char *b,
                                                              int64_t line, int64_t cols, int32_t dtype) {
    int64_t s = 0;
    for (; s + SWEPT <= steps; s += SWEPT)
        sweep_rows(sum, pitch, a + s * ABREAST, steps, rows, b + s * line, line, cols, dtype, SWEPT);
    for (; s < steps; s++)
        sweep_rows(sum, pitch, a + s * ABREAST, steps, rows, b + s * line, line, cols, dtype, 1);
}

/* Rows m .. of a, ABREAST of them or what is left, from step s on. pack() would take a turned a of fewer rows
 * than a vector has one element at a time. */
static void sweep_pack(float *out, const Job *job, int64_t m, int64_t s, int64_t steps) {
    int64_t n = min64(ABREAST, job->M - m);
    if (job->a.dtype != F32 || job->a.row != 1)
        pack(out, transposed(job->a), s, steps, job->K, m, ABREAST, job->M, 1, 0);
    else
        for (int64_t t = 0; t < steps; t++) {
            const float *p = element(job->a, m, s + t);
            if (n == ABREAST) memcpy(out + t * ABREAST, p, ABREAST * 4);
            else
                for (int64_t r = 0; r < n; r++) out[t * ABREAST + r] = p[r];
        }
}

static int sweep_task(int64_t i, void *context) {
    const Job *job = context;
    int64_t n = i * job->tile_n, cols = min64(job->tile_n, job->N - n), size = job->M * job->tile_n, next;
    int64_t line = job->b.row * dtype_size(job->b.dtype);
    float sum[SWEPT_SUMS], part[SWEPT_SUMS], a[(FEW_ROWS + ABREAST) * (FEW_KC + FEW_KC / EXTRA)];
    memset(sum, 0, (size_t)size * 4);
    for (int64_t s = 0; s < job->K; s = next) {
        next = s + ceil_div(job->K - s, ceil_div(job->K - s, FEW_KC + FEW_KC / EXTRA));
        for (int64_t m = 0; m < job->M; m += ABREAST) sweep_pack(a + m * (next - s), job, m, s, next - s);
        memset(part, 0, (size_t)size * 4);
        const char *b = element(job->b, s, n);
        if (job->b.dtype == F32) sweep_steps(part, job->tile_n, a, next - s, job->M, b, line, cols, F32);
        else if (job->b.dtype == BF16)
            sweep_steps(part, job->tile_n, a, next - s, job->M, b, line, cols, BF16);
        else sweep_steps(part, job->tile_n, a, next - s, job->M, b, line, cols, F16);
        for (int64_t j = 0; j < size; j += VW) vf_store(sum + j, vf_load(sum + j) + vf_load(part + j));
    }
    for (int64_t m = 0; m < job->M; m += MR)
        finish(job->g, job->swapped, sum + m * job->tile_n, job->tile_n, m, n, min64(MR, job->M - m), cols,
               job->g->beta);
    return 0;
}

static int sweep(Job *job) {
    enum { LINE = 16 }; /* floats; sums of a task are whole vectors */
    int64_t threads = get_threads(), most = SWEPT_SUMS / job->M / LINE * LINE;
    job->tile_n =
        ceil_div(ceil_div(job->N, ceil_div(ceil_div(job->N, most), threads) * threads), LINE) * LINE;
    return parallel_for(ceil_div(job->N, job->tile_n), (job->M + ABREAST) * job->tile_n * job->K / 64,
                        sweep_task, job);
}

/* ---- the rows of a task ---------------------------------------------------------------------- */

/* What the tiles need of rows of a: them as float32, and u, which this slice of k adds to, packed once it is
 * whole. They are in the cache then, so that memory gives them once for both products. */
static void ready_rows(const Job *job, int64_t m_begin, int64_t m_end) {
    const Job *thin = job->thin;
    if (job->own_a) pack_rows_of_a(job, m_begin, m_end);
    for (int64_t m = m_begin; m < m_end && job->copied; m++)
        load_row(job->pack_a + (m - job->m0) * job->a_row, element(job->a, m, job->s0), job->a.dtype,
                 steps_a(job));
    if (thin && job->n0 == 0 && !is_narrow(thin)) tile_rows(thin, m_begin, m_end, 0, thin->N);
    else if (thin && job->n0 == 0 && job->s0 == 0) narrow_block(thin, m_begin, m_end);
    for (int64_t m = m_begin; m < m_end && job->R && job->s1 > job->steps; m += MR)
        pack(job->direct ? job->ext + (m - job->m0) * job->steps2
                         : job->pack_a + (m - job->m0) * job->a_row + steps_a(job) * MR,
             transposed(job->a2), 0, job->steps2, job->R, m, MR, job->M, job->g->scale2, job->dot);
}

static int ready_task(int64_t i, void *context) {
    const Job *job = context;
    int64_t m = job->m0 + i * MR * PANELS;
    ready_rows(job, m, min64(job->m1, m + MR * PANELS));
    return 0;
}

static int tile_task(int64_t i, void *context) {
    const Job *job = context;
    int64_t m = job->m0 + i / job->tiles_n * job->tile_m, m_end = min64(job->m1, m + job->tile_m);
    int64_t n = job->n0 + i % job->tiles_n * job->tile_n, n_end = min64(job->n1, n + job->tile_n);
    if (job->tiles_n == 1) ready_rows(job, m, m_end);
    tile_rows(job, m, m_end, n, n_end);
    return 0;
}

/* Rows of a task, `most` or somewhat fewer: with as little as can be to wait for at the end. */
static int64_t fair_rows(int64_t rows, int64_t most, int64_t threads) {
    int64_t best = most, least = INT64_MAX;
    for (int64_t tile = most; tile > 0 && tile >= most * 3 / 4; tile -= MR) {
        int64_t tasks = ceil_div(rows, tile), full = (tasks - 1) / threads * tile;
        int64_t longest = full + ((tasks - 1) % threads ? tile : rows - (tasks - 1) * tile);
        if (longest < least) least = longest, best = tile;
    }
    return best;
}

/* Packs steps s0 .. s1 of columns n0 .. n1 of b, and of rows m0 .. m1 of a where that is not done yet, and
 * multiplies them. */
static int slice(Job *job, int64_t threads, int pack_a) {
    Job *thin = job->thin;
    int64_t rows = job->m1 - job->m0, cols = job->n1 - job->n0, steps = job->s1 - job->s0;
    if (!job->direct) job->a_row = steps;
    job->tile_m = min64(ROWS, max64(1, TASK_BYTES / 4 / max64(1, steps) / MR) * MR);
    job->tile_n = ceil_div(cols, NR) * NR;
    if (job->local_b) { /* equal parts for all threads */
        job->tile_m = ROWS / MR * MR;
        int64_t panels = job->tile_n / NR;
        job->tile_n = ceil_div(panels, ceil_div(ceil_div(cols, job->group), threads) * threads) * NR;
        if (ceil_div(cols, job->tile_n) % threads) job->tile_n = ceil_div(panels, threads) * NR;
    } else {
        job->tile_m = fair_rows(rows, job->tile_m, threads);
        while (job->tile_m > 4 * MR &&
               ceil_div(rows, job->tile_m) * ceil_div(cols, job->tile_n) < 4 * threads)
            if (job->tile_n > 4 * NR) job->tile_n = ceil_div(job->tile_n / NR, 2) * NR;
            else job->tile_m = ceil_div(job->tile_m / MR, 2) * MR;
    }
    job->tiles_n = ceil_div(cols, job->tile_n);
    job->pack_n = columns_of_task(job, threads);
    job->own_a = !job->direct && pack_a && job->tiles_n == 1;
    int64_t tasks_m = ceil_div(rows, MR * PANELS),
            all = pack_tasks_b(job) + (job->direct || !pack_a || job->own_a ? 0 : tasks_m);
    if (parallel_for(all, steps * job->pack_n / 4, pack_task, job)) return -1;
    if (thin) {
        thin->m0 = job->m0, thin->m1 = job->m1, thin->s0 = job->s0, thin->s1 = min64(job->s1, job->steps);
        if (!job->direct) thin->a_row = job->a_row;
        if (job->n0 == 0 && !is_narrow(thin) &&
            parallel_for(pack_tasks_b(thin), steps * thin->pack_n / 4, pack_task, thin))
            return -1;
    }
    int64_t tasks = ceil_div(rows, job->tile_m) * job->tiles_n,
            ready = MR * PANELS * (job->R + 8) * steps / 64;
    int64_t cost = (rows + (job->local_b ? 32 : 0)) * cols * steps / 64; /* what each packs included */
    if ((job->R || job->copied) && job->tiles_n > 1 && parallel_for(tasks_m, ready, ready_task, job))
        return -1;
    return parallel_for(tasks, cost / tasks, tile_task, job);
}

int CPU(gemm)(const Gemm *g) {
    Job job = { .g = g, .M = g->M, .N = g->N, .K = g->K, .R = g->R, .a = g->a, .b = g->b, .b2 = g->b2 };
    Gemm of_u = { .M = g->M,
                  .N = g->R,
                  .K = g->K,
                  .a = g->a,
                  .b = g->a2,
                  .alpha = 1,
                  .c = g->u,
                  .c_row = g->u_row,
                  .c_dtype = F32 };
    job.a2 = (Matrix){ g->u, g->u_row, 1, F32 };
    if (g->M == 0 || g->N == 0) return 0;
    job.dot = DOTS && g->a.dtype == BF16 && g->b.dtype == BF16;
    int32_t unit = job.dot ? BF16 : F32;
    int64_t per = job.dot ? 2 : 1;
    /* Few rows: the transposed product reads the larger matrix where it lies instead of packing it for so
     * little use. Few columns and a dense along m: as rows they fill the vectors. */
    if ((g->M <= 128 && g->M < g->N && g->b.row == 1 && (g->b.dtype == unit || (g->M == 1 && g->R == 0))) ||
        (g->N <= 64 && g->N < g->M && g->a.row == 1)) {
        job.swapped = 1;
        job.M = g->N, job.N = g->M;
        job.a = transposed(g->b), job.b = transposed(g->a), job.b2 = transposed(job.a2),
        job.a2 = transposed(g->b2);
        if (g->R && CPU(gemm)(&of_u)) return -1;
    }
    job.nr = panel_columns(job.N);
    job.local_b = job.M <= ROWS && job.N > 4 * NR && job.N >= job.M;
    job.direct = job.a.col == 1 && job.a.dtype == unit && job.K % per == 0 && job.a.row % per == 0;
    job.step_a = 1, job.a_row = job.a.row / per, job.ahead = MR * job.a_row;
    if (!job.dot && job.a.row == 1 && job.a.dtype == F32 &&
        job.M <= TURNED_ROWS) /* too few rows to pack them */
        job.direct = 1, job.step_a = job.a.col, job.ahead = AHEAD * job.a.col;
    if (!job.dot && !job.direct && job.a.col == 1) job.direct = job.copied = 1;
    /* Rows a multiple of half a page apart fall on the same few lines of the L1 cache, where they push each
     * other out: nothing is fetched ahead there, and with columns enough to pay for it they are packed. */
    if (!job.dot && !job.copied && job.a.col == 1 && job.a.row % 512 == 0)
        job.ahead = 0, job.direct = job.direct && job.N <= 768 && !(job.local_b && job.M > FEW_ROWS);
    job.kc = job.M <= FEW_ROWS ? FEW_KC : job.local_b && job.M <= MID_ROWS ? MID_KC : job.dot ? DOT_KC : KC;
    job.group = (job.local_b && job.M <= MID_ROWS ? 2 : 1) * SIDE * job.nr;
    job.steps = ceil_div(job.K, per), job.steps2 = ceil_div(job.R, per);
    if (is_narrow(&job)) return narrow(&job);
    if (!job.dot && job.b.col == 1 && job.R == 0 && job.M <= FEW_ROWS) return sweep(&job);
    int64_t all = job.steps + job.steps2, most = KS + KS / EXTRA;
    if ((job.direct || job.local_b) && job.steps <= 2 * KS && job.steps * job.N <= PACK_BYTES / 4)
        most = 2 * KS; /* b in one piece */
    int64_t depth = max64(1, ceil_div(job.steps, max64(1, ceil_div(job.steps, most))));
    int64_t depth_b = depth + job.steps2;
    int one = !job.swapped && g->alpha == 1 && (g->beta == 0 || (g->beta == 1 && !g->residual)) &&
              !g->bias; /* addend at most */
    job.plain = one && g->c_dtype == F32, job.plain_bf16 = one && g->c_dtype == BF16;
    int keep = !job.plain && depth < job.steps;
    job.wide_n = ceil_div(job.N, NR) * NR;
    if (!job.local_b || keep) job.wide_n = min64(job.wide_n, max64(1, PACK_BYTES / 4 / depth_b / NR) * NR);
    job.wide_m = ceil_div(job.M, MR) * MR;
    if (!job.direct || job.copied)
        job.wide_m = min64(job.wide_m, max64(1, PACK_BYTES / 2 / depth_b / MR) * MR);
    if (keep) job.wide_m = min64(job.wide_m, max64(1, SUM_BYTES / 4 / job.wide_n / MR) * MR);
    if (job.copied) job.a_row = depth + VW, job.ahead = MR * job.a_row;
    Job thin = job;
    thin.g = &of_u, thin.N = thin.n1 = job.R, thin.R = thin.steps2 = 0, thin.b = g->a2,
    thin.nr = panel_columns(job.R);
    thin.plain = 1, thin.plain_bf16 = 0, thin.local_b = 0, thin.group = SIDE * thin.nr;
    if (job.R && !job.swapped) job.thin = &thin;
    int64_t threads = get_threads();
    thin.pack_n = columns_of_task(&thin, threads);
    int64_t size_u = !job.thin ? 0 : is_narrow(&thin) ? narrow_size(&thin) : depth * ceil_div(job.R, NR) * NR;
    int64_t size_b = job.local_b ? 0 : depth_b * job.wide_n,
            size_ext = job.direct ? job.steps2 * job.wide_m + VW : 0;
    int64_t size_a = job.copied ? job.a_row * job.wide_m : job.direct ? 0 : depth_b * job.wide_m + VW;
    int status = -1;
    float *memory = scratch(4 * (size_b + size_u + size_ext + size_a + (keep ? job.wide_m * job.wide_n : 0)));
    if (!memory) return -1;
    job.pack_b = memory, thin.pack_b = memory + size_b, job.ext = thin.pack_b + size_u;
    job.pack_a = thin.pack_a = job.ext + size_ext;
    if (keep) job.sum = job.pack_a + size_a;
    if (job.thin && is_narrow(&thin) && parallel_for(narrow_columns(&thin), job.steps, narrow_pack, &thin))
        goto done;
    for (job.m0 = 0; job.m0 < job.M; job.m0 = job.m1) {
        job.m1 = min64(job.M, job.m0 + job.wide_m);
        for (int64_t n = 0, n_end; n < job.N; n = n_end) {
            n_end = keep ? min64(job.N, n + job.wide_n)
                         : job.N; /* the sums have room for no more, or c keeps them */
            job.s0 = 0;
            do {
                job.s1 = job.s0 + depth < job.steps ? job.s0 + depth : all;
                for (job.n0 = n; job.n0 < n_end; job.n0 = job.n1) {
                    job.n1 = min64(n_end, job.n0 + job.wide_n);
                    if (slice(&job, threads, job.n0 == n)) goto done;
                }
                job.s0 = job.s1;
            } while (job.s0 < all);
        }
    }
    status = 0;
done:
    scratch_free(memory);
    return status;
}
