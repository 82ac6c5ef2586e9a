/* unit.c --- a product of two bfloat16 matrices on the matrix unit.
 *
 * Both factors are packed in registers of the unit, one behind the other along k, so each is read as one run
 * of memory. 32 columns of b stay in the first cache while the rows of a task pass by, and the rows of a task
 * in the second while the columns do. The unit sums up 32 products before it adds them to a sum, so sums of
 * any length stay exact enough, and k is cut only for the sake of the caches.
 *
 * LoRA: u, scaled and rounded, continues the rows of a, and b2 the columns of b. What was tried, with
 * figures, is in docs/tuning/gemm.md. */
#include "pack.h"
#include "tile.h"

#if MATRIX_UNIT
enum {
    WIDE_SUMS = 2 * UNIT,   /* rows and columns of sums at a time */
    WORDS = UNIT_BYTES / 4, /* floats, or pairs, of a register */
    RUN = 4 * UNIT,         /* steps that are packed of 16 columns before the next take their turn */
};

/* Registers along k of the first product, and of both. */
static int64_t of_k(const Plan *p) { return ceil_div(p->steps, UNIT); }
static int64_t of_all(const Plan *p) { return of_k(p) + ceil_div(p->steps2, UNIT); }

/* ---- packing --------------------------------------------------------------------------------- */

/* Registers of a right factor: steps 0 .. of columns n0 .. n1, out of b[K,N]. `pitch`: floats from 16 columns
 * to the next. */
static void pack_columns(float *out, int64_t pitch, Matrix b, int64_t K, int64_t N, int64_t n0, int64_t n1) {
    int64_t steps = ceil_div(K, UNIT_K) * UNIT;
    for (int64_t s = 0; s < steps; s += RUN)
        for (int64_t n = n0; n < n1; n += UNIT)
            CPU(gemm_pack)(out + (n - n0) / UNIT * pitch + s * UNIT, b, 2 * s, min64(RUN, steps - s), K, n,
                           UNIT, N, 1, PAIRS);
}

/* 16 rows of a[M,K] from row m, as registers of a left factor. */
static void pack_left(float *out, Matrix a, int64_t m, int64_t M, int64_t K, float scale) {
    int64_t registers = ceil_div(K, UNIT_K);
    if (a.dtype == BF16 && a.col == 1 && scale == 1) {
        int64_t whole = K / UNIT_K, rest = K % UNIT_K * 2;
        for (int64_t i = 0; i < UNIT; i++) {
            char *to = (char *)out + i * 64;
            const char *row = element(a, m + i, 0);
            vf x;
            for (int64_t r = 0; r < registers; r++, row += 64) {
                x = (vf){ 0 };
                if (m + i < M && r < whole) memcpy(&x, row, sizeof x);
                else if (m + i < M) memcpy(&x, row, (size_t)rest);
                memcpy(to + r * UNIT_BYTES, &x, sizeof x);
            }
        }
        return;
    }
    for (int64_t r = 0; r < registers; r++, out += WORDS) {
        vf x[UNIT];
        CPU(gemm_pack)((float *)x, transposed(a), r * UNIT_K, UNIT, K, m, UNIT, M, scale, PAIRS);
        transpose(x);
        memcpy(out, x, sizeof x);
    }
}

static int pack_b_task(int64_t i, void *context) {
    const Job *job = context;
    const Plan *p = job->plan;
    const Slice *at = &job->at;
    int64_t pitch = of_all(p) * WORDS, n = at->n0 + i * at->pack_n, n_end = min64(at->n1, n + at->pack_n);
    float *out = job->packed_b + (n - at->n0) / UNIT * pitch;
    pack_columns(out, pitch, p->b, p->K, p->N, n, n_end);
    if (p->R) pack_columns(out + of_k(p) * WORDS, pitch, p->b2, p->R, p->N, n, n_end);
    return 0;
}

/* ---- rows ------------------------------------------------------------------------------------ */

static UnitFactor left(const Job *job, int64_t m) {
    const Plan *p = job->plan;
    if (p->rows_of_a == IN_PLACE)
        return (UnitFactor){ element(p->a, m, 0), UNIT * p->a.row * 2, p->a.row * 2, 64, 1 };
    int64_t pitch = of_all(p) * UNIT_BYTES;
    return (UnitFactor){ (const char *)job->packed_a + (m - job->at.m0) / UNIT * pitch, pitch, 64, UNIT_BYTES,
                         0 };
}

/* Packs rows m .. m_end of a; computes u for them, and packs it behind them. */
static void ready_rows(const Job *job, int64_t m, int64_t m_end) {
    const Plan *p = job->plan;
    const Gemm *g = job->g;
    int64_t pitch = of_all(p) * WORDS, end = m_end;
    float *out = job->packed_a + (m - job->at.m0) / UNIT * pitch, u[UNIT * UNIT];
    for (; m < end; m += UNIT, out += pitch) {
        pack_left(out, p->a, m, p->M, p->K, 1);
        for (int64_t r = 0; r < p->R && job->of_u; r += UNIT) {
            int64_t columns = min64(UNIT, p->R - r);
            const float *a2 = job->of_u->packed_b + r * of_k(p) * UNIT;
            unit_multiply(u, UNIT, left(job, m), (UnitFactor){ (const char *)a2, 0, 64, UNIT_BYTES, 0 },
                          of_k(p), 1, 1, 0);
            for (int64_t i = 0; i < min64(UNIT, p->M - m); i++)
                memcpy(g->u + (m + i) * g->u_row + r, u + i * UNIT, (size_t)columns * 4);
        }
        if (p->R) pack_left(out + of_k(p) * WORDS, p->a2, m, p->M, p->R, g->scale2);
    }
}

/* ---- tasks ----------------------------------------------------------------------------------- */

/* Writes the block of the transposed product that begins at row m and column n. */
static void finish_turned(const Gemm *g, const float *x, int64_t m, int64_t n, int64_t rows, int64_t cols) {
    float turned[WIDE_SUMS * WIDE_SUMS] __attribute__((aligned(64)));
    for (int64_t i = 0; i < WIDE_SUMS; i += UNIT)
        for (int64_t j = 0; j < WIDE_SUMS; j += UNIT) {
            vf part[UNIT];
            for (int r = 0; r < UNIT; r++) part[r] = vf_load(x + (i + r) * WIDE_SUMS + j);
            transpose(part);
            for (int r = 0; r < UNIT; r++) vf_store(turned + (j + r) * WIDE_SUMS + i, part[r]);
        }
    CPU(gemm_finish)(g, 0, turned, WIDE_SUMS, n, m, cols, rows);
}

/* c[m.., n..] = x + one addend or none, in float32 or bfloat16: what plan.c calls BY_TILES. Two vectors a
 * row. */
static inline __attribute__((always_inline)) void add_and_store(const Gemm *g, const float *x, int64_t m,
                                                                int64_t n, int64_t rows, int32_t dtype) {
    int64_t size = dtype_size(dtype), c_row = g->c_row * size, more_row = c_row;
    char *c = (char *)g->c + m * c_row + n * size;
    const char *more = g->beta == 1 ? c : NULL;
    if (g->residual)
        more_row = g->residual_row * size, more = (const char *)g->residual + m * more_row + n * size;
    for (int64_t i = 0; i < rows; i++, x += WIDE_SUMS, c += c_row) {
        vf low = vf_load(x), high = vf_load(x + VW);
        if (more) {
            low += vf_load_any(more, dtype), high += vf_load_any(more + VW * size, dtype);
            more += more_row;
        }
        if (dtype == F32) vf_store((float *)c, low), vf_store((float *)c + VW, high);
        else {
            halves both = round_two(low, high);
            memcpy(c, &both, sizeof both);
        }
    }
}

/* Writes `rows` by `cols` finished sums of the product as computed. */
static void write_sums(const Job *job, const float *x, int64_t m, int64_t n, int64_t rows, int64_t cols) {
    const Gemm *g = job->g;
    WritesOfC writes = cols == WIDE_SUMS ? job->plan->writes_of_c : AFTER_TILES;
    if (writes == BY_TILES) add_and_store(g, x, m, n, rows, F32);
    else if (writes == BY_TILES_BF16) add_and_store(g, x, m, n, rows, BF16);
    else if (job->plan->swapped) finish_turned(g, x, m, n, rows, cols);
    else CPU(gemm_finish)(g, 0, x, WIDE_SUMS, m, n, rows, cols);
}

static void multiply_rows(const Job *job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    const Plan *p = job->plan;
    int64_t all = of_all(p), pitch = all * UNIT_BYTES, blocks = ceil_div(all, UNIT_BLOCK + 2);
    float near[UNIT_ROWS * WIDE_SUMS] __attribute__((aligned(64)));
    for (int64_t n = n0; n < n1; n += WIDE_SUMS) {
        const char *packed = (const char *)job->packed_b + (n - job->at.n0) / UNIT * pitch;
        int64_t cols = min64(WIDE_SUMS, p->N - n);
        for (int64_t block = 0, s = 0, end; block < blocks; block++, s = end) {
            end = s + ceil_div(all - s, blocks - block);
            UnitFactor b = { packed + s * UNIT_BYTES, pitch, 64, UNIT_BYTES, 0 };
            for (int64_t m = m0; m < m1; m += WIDE_SUMS) {
                int64_t rows = min64(WIDE_SUMS, p->M - m);
                float *c = blocks == 1 ? near : near + (m - m0) * WIDE_SUMS;
                UnitFactor a = left(job, m);
                a.data += s * a.step;
                int low = rows <= UNIT, slim = cols <= UNIT;
                if (!low && !slim) unit_multiply(c, WIDE_SUMS, a, b, end - s, 2, 2, s > 0);
                else if (!low) unit_multiply(c, WIDE_SUMS, a, b, end - s, 2, 1, s > 0);
                else if (!slim) unit_multiply(c, WIDE_SUMS, a, b, end - s, 1, 2, s > 0);
                else unit_multiply(c, WIDE_SUMS, a, b, end - s, 1, 1, s > 0);
                if (end < all) continue;
                write_sums(job, c, m, n, rows, cols);
            }
        }
    }
}

static int ready_task(int64_t i, void *context) {
    const Job *job = context;
    int64_t m = job->at.m0 + i * 4 * UNIT;
    unit_begin();
    ready_rows(job, m, min64(job->at.m1, m + 4 * UNIT));
    unit_end();
    return 0;
}

static int multiply_task(int64_t i, void *context) {
    const Job *job = context;
    const Slice *at = &job->at;
    int64_t m = at->m0 + i / at->tiles_n * at->tile_m, m_end = min64(at->m1, m + at->tile_m);
    int64_t n = at->n0 + i % at->tiles_n * at->tile_n, n_end = min64(at->n1, n + at->tile_n);
    unit_begin();
    if (at->task_packs_a) ready_rows(job, m, m_end);
    multiply_rows(job, m, m_end, n, n_end);
    unit_end();
    return 0;
}

static int run_slice(Job *job, int64_t threads) {
    const Plan *p = job->plan;
    Slice *at = &job->at;
    int64_t rows = at->m1 - at->m0, cols = at->n1 - at->n0, registers = of_all(p);
    int packs_a = p->rows_of_a != IN_PLACE && at->n0 == 0;
    at->pack_n = max64(1, min64(PANELS, ceil_div(cols, 4 * threads * UNIT))) * UNIT;
    if (parallel_for(ceil_div(cols, at->pack_n), at->pack_n * registers * UNIT / 4, pack_b_task, job))
        return -1;
    at->tile_m = min64(UNIT_ROWS, max64(1, UNIT_TASK_BYTES / (registers * 2 * UNIT_BYTES)) * WIDE_SUMS);
    while (at->tile_m > WIDE_SUMS && ceil_div(rows, at->tile_m) < 4 * threads)
        at->tile_m = ceil_div(at->tile_m / WIDE_SUMS, 2) * WIDE_SUMS;
    int64_t down = ceil_div(rows, at->tile_m), beside = max64(1, ceil_div(4 * threads, down));
    at->tile_n = ceil_div(ceil_div(cols, WIDE_SUMS), beside) * WIDE_SUMS;
    at->tiles_n = ceil_div(cols, at->tile_n);
    at->task_packs_a = packs_a && at->tiles_n == 1;
    if (packs_a && !at->task_packs_a &&
        parallel_for(ceil_div(rows, 4 * UNIT), 4 * registers * UNIT, ready_task, job))
        return -1;
    int64_t tasks = down * at->tiles_n;
    return parallel_for(tasks, at->tile_m * at->tile_n * registers * UNIT_K / 1024, multiply_task, job);
}

int CPU(gemm_unit)(Job *job) {
    const Plan *p = job->plan;
    Slice *at = &job->at;
    if (job->of_u) pack_columns(job->of_u->packed_b, of_k(p) * WORDS, job->g->a2, p->K, p->R, 0, p->R);
    for (at->m0 = 0; at->m0 < p->M; at->m0 = at->m1) {
        at->m1 = min64(p->M, at->m0 + p->wide_m);
        for (at->n0 = 0; at->n0 < p->N; at->n0 = at->n1) {
            at->n1 = min64(p->N, at->n0 + p->wide_n);
            if (run_slice(job, get_threads())) return -1;
        }
    }
    return 0;
}
#else
int CPU(gemm_unit)(Job *job) {
    (void)job;
    return 0; /* no plan asks for it */
}
#endif
