/* sweep.c --- a product with at most FEW_ROWS rows, such as LoRA's da and db, or a single row of output.
 *
 * b is read once, where it lies: SWEPT rows of it from one end to the other, and pairs of their vectors are
 * multiplied with all rows of a. The sums of FEW_KC steps stay in the first cache. Rows of a are packed,
 * ABREAST of them side by side. */
#include "pack.h"
#include "tile.h"

enum { SWEPT = 4, ABREAST = 8, SWEPT_SUMS = 6144 }; /* SWEPT_SUMS: sums of a task, in floats, at most */

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

/* Rows m.. of a, ABREAST of them or the rest, from step s on. gemm_pack would take a transposed a that
 * has fewer rows than a vector one element at a time. */
static void pack_rows(float *out, const Plan *plan, int64_t m, int64_t s, int64_t steps) {
    int64_t n = min64(ABREAST, plan->M - m);
    if (plan->a.dtype != F32 || plan->a.row != 1)
        CPU(gemm_pack)(out, transposed(plan->a), s, steps, plan->K, m, ABREAST, plan->M, 1, FLOATS);
    else
        for (int64_t t = 0; t < steps; t++) {
            const float *p = element(plan->a, m, s + t);
            if (n == ABREAST) memcpy(out + t * ABREAST, p, ABREAST * 4);
            else
                for (int64_t r = 0; r < n; r++) out[t * ABREAST + r] = p[r];
        }
}

static int sweep_task(int64_t i, void *context) {
    const Job *job = context;
    const Plan *plan = job->plan;
    const Matrix b = plan->b;
    int64_t tile_n = job->at.tile_n, n = i * tile_n, cols = min64(tile_n, plan->N - n),
            size = plan->M * tile_n, next;
    int64_t line = b.row * dtype_size(b.dtype);
    float sum[SWEPT_SUMS], part[SWEPT_SUMS], a[(FEW_ROWS + ABREAST) * (FEW_KC + FEW_KC / EXTRA)];
    memset(sum, 0, (size_t)size * 4);
    for (int64_t s = 0; s < plan->K; s = next) {
        next = s + ceil_div(plan->K - s, ceil_div(plan->K - s, FEW_KC + FEW_KC / EXTRA));
        for (int64_t m = 0; m < plan->M; m += ABREAST) pack_rows(a + m * (next - s), plan, m, s, next - s);
        memset(part, 0, (size_t)size * 4);
        const char *p = element(b, s, n);
        if (b.dtype == F32) sweep_steps(part, tile_n, a, next - s, plan->M, p, line, cols, F32);
        else if (b.dtype == BF16) sweep_steps(part, tile_n, a, next - s, plan->M, p, line, cols, BF16);
        else sweep_steps(part, tile_n, a, next - s, plan->M, p, line, cols, F16);
        for (int64_t j = 0; j < size; j += VW) vf_store(sum + j, vf_load(sum + j) + vf_load(part + j));
    }
    for (int64_t m = 0; m < plan->M; m += MR)
        CPU(gemm_finish)(job->g, plan->swapped, sum + m * tile_n, tile_n, m, n, min64(MR, plan->M - m), cols);
    return 0;
}

int CPU(gemm_sweep)(Job *job) {
    enum { LINE = 16 }; /* floats: the sums of a task are whole cache lines */
    const Plan *plan = job->plan;
    int64_t threads = get_threads(), most = SWEPT_SUMS / plan->M / LINE * LINE;
    int64_t tasks = ceil_div(ceil_div(plan->N, most), threads) * threads;
    int64_t tile_n = job->at.tile_n = ceil_div(ceil_div(plan->N, tasks), LINE) * LINE;
    return parallel_for(ceil_div(plan->N, tile_n), (plan->M + ABREAST) * tile_n * plan->K / 64, sweep_task,
                        job);
}
