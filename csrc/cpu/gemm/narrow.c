/* narrow.c --- a product with at most 16 columns, such as LoRA's u = x a^T, or a single row of output.
 *
 * The vectors run along k, so that no lane is idle: VW / NARROW_COLUMNS rows of a, converted to float32 as
 * they are read, times NARROW_COLUMNS columns of b give VW sums of VW lanes, and one transposition brings the
 * lanes together. A single column takes VW rows at once: memory then gives each element of a once, as fast as
 * it can. b is copied with k dense and zeros at its end. */
#include "pack.h"
#include "tile.h"

enum { NARROW_ROWS = 128, MOST = 16 }; /* rows of a task; columns at most */

static inline __attribute__((always_inline)) void narrow_step(vf sum[VW], const char *const x[VW], int64_t at,
                                                              const float *b, int64_t depth, int32_t dtype,
                                                              Step step, int columns) {
    vf av[VW];
    UNROLLED
    for (int i = 0; i < VW / columns; i++)
        av[i] = step == PAIRS ? vf_load((const float *)(x[i] + at)) : vf_load_any(x[i] + at, dtype);
    UNROLLED
    for (int j = 0; j < columns; j++) {
        vf bv = vf_keep(vf_load(b + j * depth));
        UNROLLED
        for (int i = 0; i < VW / columns; i++)
            sum[i * columns + j] = multiply_add(sum[i * columns + j], av[i], bv, step);
    }
}

static inline __attribute__((always_inline)) void narrow_rows(const Job *job, int64_t begin, int64_t end,
                                                              int32_t dtype, Step step, int columns) {
    const Plan *plan = job->plan;
    int64_t size = dtype == F32 || step == PAIRS ? 4 : 2, bytes = plan->K * dtype_size(dtype),
            whole = bytes / (size * VW), line = 64 / (size * VW);
    int64_t depth = ceil_div(bytes, size * VW) * VW, all = ceil_div(plan->N, columns) * columns,
            rows = VW / columns;
    int64_t ahead = (columns == 1 ? 1 : 4) * rows * plan->a.row * dtype_size(dtype);
    float buffer[VW * MOST];
    for (int64_t m = begin; m < end; m += rows) {
        const char *x[VW], *end_of[VW];
        char rest[VW][4 * VW];
        UNROLLED
        for (int i = 0; i < rows; i++) {
            x[i] = element(plan->a, min64(m + i, end - 1), 0), end_of[i] = rest[i];
            if (depth == whole * VW) continue;
            memset(rest[i], 0, sizeof rest[i]);
            memcpy(rest[i], x[i] + whole * size * VW, (size_t)(bytes - whole * size * VW));
        }
        for (int64_t n = 0; n < all; n += columns) {
            const float *b = job->packed_b + n * depth;
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
                    narrow_step(sum, x, (k + t) * size * VW, b + (k + t) * VW, depth, dtype, step, columns);
            }
            for (; k < whole; k++)
                narrow_step(sum, x, k * size * VW, b + k * VW, depth, dtype, step, columns);
            if (depth > whole * VW) narrow_step(sum, end_of, 0, b + whole * VW, depth, dtype, step, columns);
            transpose(sum);
            UNROLLED
            for (int j = 1; j < VW; j++) sum[0] += sum[j];
            UNROLLED
            for (int i = 0; i < rows; i++)
                memcpy(buffer + i * MOST + n, (float *)&sum[0] + i * columns, sizeof(float) * columns);
        }
        CPU(gemm_finish)(job->g, plan->swapped, buffer, MOST, m, 0, min64(rows, end - m), plan->N);
    }
}

static inline __attribute__((always_inline)) void narrow_dtype(const Job *job, int64_t begin, int64_t end,
                                                               int32_t dtype, Step step) {
    if (job->plan->N == 1) narrow_rows(job, begin, end, dtype, step, 1);
    else narrow_rows(job, begin, end, dtype, step, NARROW_COLUMNS);
}

void CPU(gemm_narrow_rows)(const Job *job, int64_t m_begin, int64_t m_end) {
    int32_t dtype = job->plan->a.dtype;
    if (job->plan->step == PAIRS) narrow_dtype(job, m_begin, m_end, BF16, PAIRS);
    else if (dtype == F32) narrow_dtype(job, m_begin, m_end, F32, FLOATS);
    else if (dtype == BF16) narrow_dtype(job, m_begin, m_end, BF16, FLOATS);
    else narrow_dtype(job, m_begin, m_end, F16, FLOATS);
}

static int narrow_task(int64_t block, void *context) {
    const Job *job = context;
    CPU(gemm_narrow_rows)(job, block * NARROW_ROWS, min64(job->plan->M, (block + 1) * NARROW_ROWS));
    return 0;
}

static int pack_column(int64_t n, void *context) {
    const Job *job = context;
    const Plan *plan = job->plan;
    int64_t depth = narrow_depth(plan), s = 0;
    float *out = job->packed_b + n * depth;
    if (n < plan->N && plan->b.row == 1 && plan->step == FLOATS)
        load_row(out, element(plan->b, 0, n), plan->b.dtype, s = plan->K);
    for (; s < depth; s++) {
        uint32_t u = step_at(plan->b, s * per_step(plan), n, plan->K, plan->N, 1, plan->step);
        memcpy(out + s, &u, 4);
    }
    return 0;
}

int CPU(gemm_narrow_pack)(Job *job) {
    return parallel_for(narrow_columns(job->plan), job->plan->steps, pack_column, job);
}

int CPU(gemm_narrow)(Job *job) {
    const Plan *plan = job->plan;
    /* With few columns a task waits for its rows of a: 8 bytes come in a nanosecond. */
    int64_t reading = plan->K * dtype_size(plan->a.dtype) / 8, counting = plan->steps / 64 + 1;
    int64_t cost = NARROW_ROWS * max64(narrow_columns(plan) * counting, reading);
    if (CPU(gemm_narrow_pack)(job)) return -1;
    return parallel_for(ceil_div(plan->M, NARROW_ROWS), cost, narrow_task, job);
}
