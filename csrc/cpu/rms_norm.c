/* rms_norm.c --- RMSNorm with a trainable weight, fused with the residual addition; forward and backward.
 *
 * A task is ROWS rows. dweight is a sum over rows: each task sums its own rows into a partial row, and the
 * partial rows are added in rising order. So the bits do not depend on which thread ran what. Measurements:
 * docs/tuning/rms_norm.md. */
#include "cpu.h"

#include <float.h>

enum {
    ROWS = 32,
    STEP = 4 * VW,    /* elements at a time, two pairs of vectors: a single sum would wait for itself */
    SPAN = 16 * STEP, /* elements per partial sum of a row, so that sums of long rows stay exact */
};
typedef struct {
    vf v[4];
} Step;

#define INLINE static inline __attribute__((always_inline))

/* The first n elements of a pair of vectors at the end of a row, and zeros for the others. Masked loads where
 * the processor has them: a load that covers several recent, smaller stores waits until they are done. */
static __attribute__((noinline)) vf2 get_part(const char *p, int32_t dtype, int64_t n) {
#if defined __AVX512F__
    if (dtype == F32) {
        uint32_t mask = (1u << n) - 1; /* n is below 2 VW */
        __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, p),
               high = _mm512_maskz_loadu_ps((__mmask16)(mask >> VW), p + 4 * VW);
        return (vf2){ { (vf)low, (vf)high } };
    }
#elif defined __AVX2__
    if (dtype == F32) {
        vi lane = { 0, 1, 2, 3, 4, 5, 6, 7 };
        __m256i low = (__m256i)(lane < (int32_t)n), high = (__m256i)(lane < (int32_t)n - VW);
        return (vf2){ { (vf)_mm256_maskload_ps((const float *)p, low),
                        (vf)_mm256_maskload_ps((const float *)p + VW, high) } };
    }
#endif
    char part[8 * VW] = { 0 };
    memcpy(part, p, (size_t)(n * dtype_size(dtype)));
    return vf_load2(part, dtype);
}
static __attribute__((noinline)) void put_part(char *p, int32_t dtype, int64_t n, vf2 x) {
    char part[8 * VW];
    vf_store2(part, dtype, x);
    memcpy(p, part, (size_t)(n * dtype_size(dtype)));
}
/* STEP elements of a row from c on: its last n, then zeros, if the row ends before. */
INLINE Step get(const char *row, int32_t dtype, int64_t c, int64_t n) {
    const char *p = row + c * dtype_size(dtype), *q = p + 2 * VW * dtype_size(dtype);
    vf2 low = n >= 2 * VW ? vf_load2(p, dtype) : get_part(p, dtype, n);
    vf2 high = n >= STEP    ? vf_load2(q, dtype)
               : n > 2 * VW ? get_part(q, dtype, n - 2 * VW)
                            : (vf2){ { { 0 } } };
    return (Step){ { low.v[0], low.v[1], high.v[0], high.v[1] } };
}
INLINE void put(char *row, int32_t dtype, int64_t c, int64_t n, Step x) {
    char *p = row + c * dtype_size(dtype), *q = p + 2 * VW * dtype_size(dtype);
    vf2 low = { { x.v[0], x.v[1] } }, high = { { x.v[2], x.v[3] } };
    if (n >= 2 * VW) vf_store2(p, dtype, low);
    else put_part(p, dtype, n, low);
    if (n >= STEP) vf_store2(q, dtype, high);
    else if (n > 2 * VW) put_part(q, dtype, n - 2 * VW, high);
}
/* The first pass over a row prefetches where its result goes, the second prefetches the next row: the
 * processor's own prefetches end with each page. */
INLINE void fetch(const char *row, int32_t dtype, int64_t c) {
    for (int64_t i = 0; i < STEP * dtype_size(dtype); i += 64)
        __builtin_prefetch(row + c * dtype_size(dtype) + i);
}

/* dtype is a constant in each of the three calls below, so the compiler makes three loops without a branch.
 * Squares are those of the sum as it is stored, which is what the backward pass reads. */
INLINE void square_step(const char *x, const char *residual, char *sum, int32_t dtype, int64_t c, int64_t n,
                        vf squares[4]) {
    Step v = get(x, dtype, c, n);
    if (residual) {
        Step r = get(residual, dtype, c, n);
        UNROLLED
        for (int i = 0; i < 4; i++) v.v[i] += r.v[i];
    }
    if (sum) {
        put(sum, dtype, c, n, v);
        v = get(sum, dtype, c, n);
    }
    UNROLLED
    for (int i = 0; i < 4; i++) squares[i] += v.v[i] * v.v[i];
}

INLINE void scale_step(char *out, const char *x, const char *weight, int32_t dtype, int64_t c, int64_t n,
                       vf rstd) {
    Step v = get(x, dtype, c, n), w = get(weight, dtype, c, n);
    UNROLLED
    for (int i = 0; i < 4; i++) v.v[i] = v.v[i] * rstd * w.v[i];
    put(out, dtype, c, n, v);
}

/* A row whose sum of squares leaves float32's range, in float64: numbers above 2^48, or below 2^-50 and eps
 * as small. Returns rstd. */
static __attribute__((noinline)) float forward_far(const RmsNormForward *a, int64_t m, int32_t dtype) {
    const Tensor *source = given(&a->sum) ? &a->sum : &a->x;
    int64_t C = a->x.shape[1], size = dtype_size(dtype);
    char *out = at(&a->out, m * a->out.stride[0]);
    const char *x = at(source, m * source->stride[0]), *weight = a->weight.data;
    double squares = 0;
    for (int64_t c = 0; c < C; c++) {
        double v = load1(x + c * size, dtype);
        squares += v * v;
    }
    double rstd = 1 / sqrt(squares / (double)(C ? C : 1) + a->eps);
    for (int64_t c = 0; c < C; c++)
        store1(out + c * size, dtype,
               (float)(load1(x + c * size, dtype) * rstd * load1(weight + c * size, dtype)));
    return (float)rstd;
}

INLINE void forward_row(const RmsNormForward *a, int64_t m, int32_t dtype) {
    int64_t C = a->x.shape[1], size = dtype_size(dtype), c = 0;
    char *out = at(&a->out, m * a->out.stride[0]),
         *sum = given(&a->sum) ? at(&a->sum, m * a->sum.stride[0]) : NULL;
    const char *x = at(&a->x, m * a->x.stride[0]), *weight = a->weight.data;
    const char *residual = given(&a->residual) ? at(&a->residual, m * a->residual.stride[0]) : NULL;
    const char *next = x + a->x.stride[0] * size,
               *next_residual = residual ? residual + a->residual.stride[0] * size : NULL;
    vf total = { 0 };
    for (int64_t end; c < C; c = end) {
        end = c + SPAN < C ? c + SPAN : C;
        vf squares[4] = { { 0 } };
        for (; c + STEP <= end; c += STEP) {
            fetch(out, dtype, c);
            square_step(x, residual, sum, dtype, c, STEP, squares);
        }
        if (c < end) square_step(x, residual, sum, dtype, c, end - c, squares);
        total += (squares[0] + squares[1]) + (squares[2] + squares[3]);
    }
    float mean = vf_sum(total) / (float)(C ? C : 1) + (float)a->eps, rstd = 1.0f / sqrtf(mean);
    if (__builtin_expect(mean < 0x1p-100f || mean > FLT_MAX, 0)) {
        ((float *)a->rstd.data)[m] = forward_far(a, m, dtype);
        return;
    }
    const char *source = sum ? sum : x;
    for (c = 0; c + STEP <= C; c += STEP) {
        fetch(next, dtype, c);
        if (next_residual) fetch(next_residual, dtype, c);
        scale_step(out, source, weight, dtype, c, STEP, vf_set1(rstd));
    }
    if (c < C) scale_step(out, source, weight, dtype, c, C - c, vf_set1(rstd));
    ((float *)a->rstd.data)[m] = rstd;
}

static int forward_rows(int64_t task, void *context) {
    const RmsNormForward *a = context;
    int64_t first = task * ROWS, last = first + ROWS;
    if (last > a->x.shape[0]) last = a->x.shape[0];
    switch (a->x.dtype) {
        case F32:
            for (int64_t m = first; m < last; m++) forward_row(a, m, F32);
            break;
        case BF16:
            for (int64_t m = first; m < last; m++) forward_row(a, m, BF16);
            break;
        default:
            for (int64_t m = first; m < last; m++) forward_row(a, m, F16);
    }
    return 0;
}

int CPU(rms_norm_forward)(const void *args, void *stream) {
    const RmsNormForward *a = args;
    (void)stream;
    return parallel_for((a->x.shape[0] + ROWS - 1) / ROWS, ROWS * (a->x.shape[1] / 4 + 1), forward_rows,
                        (void *)a);
}

/* Where a partial row of dweight has column c: vectors lie as they were loaded. */
static int64_t place_of(int32_t dtype, int64_t c) {
    return c / (2 * VW) * (2 * VW) + vf2_place(dtype, c % (2 * VW));
}

INLINE void dot_step(const char *dout, const char *weight, const char *x, int32_t dtype, int64_t c, int64_t n,
                     vf dots[4]) {
    Step d = get(dout, dtype, c, n), w = get(weight, dtype, c, n), v = get(x, dtype, c, n);
    UNROLLED
    for (int i = 0; i < 4; i++) dots[i] += d.v[i] * w.v[i] * v.v[i];
}

INLINE void gradient_step(char *dx, float *dweight, const char *dout, const char *x, const char *weight,
                          const char *dresidual, int32_t dtype, int64_t c, int64_t n, vf r, vf k) {
    Step d = get(dout, dtype, c, n), v = get(x, dtype, c, n), w = get(weight, dtype, c, n), grad;
    UNROLLED
    for (int i = 0; i < 4; i++) {
        vf rd = r * d.v[i];
        grad.v[i] = rd * w.v[i] - k * v.v[i];
        if (dweight) vf_store(dweight + c + i * VW, vf_load(dweight + c + i * VW) + rd * v.v[i]);
    }
    if (dresidual) {
        Step more = get(dresidual, dtype, c, n);
        UNROLLED
        for (int i = 0; i < 4; i++) grad.v[i] += more.v[i];
    }
    put(dx, dtype, c, n, grad);
}

/* A row whose rstd is far from 1: products with the powers of rstd below leave float32's range. In float64.
 */
static __attribute__((noinline)) void backward_far(const RmsNormBackward *a, int64_t m, int32_t dtype,
                                                   float *dweight) {
    int64_t C = a->x.shape[1], size = dtype_size(dtype);
    char *dx = at(&a->dx, m * a->dx.stride[0]);
    const char *x = at(&a->x, m * a->x.stride[0]), *dout = at(&a->dout, m * a->dout.stride[0]),
               *weight = a->weight.data;
    const char *dresidual = given(&a->dresidual) ? at(&a->dresidual, m * a->dresidual.stride[0]) : NULL;
    double r = ((const float *)a->rstd.data)[m], total = 0;
    for (int64_t i = 0; i < C * size; i += size)
        total += (double)load1(dout + i, dtype) * load1(weight + i, dtype) * (load1(x + i, dtype) * r);
    double k = total * r / (double)C;
    for (int64_t c = 0, i = 0; c < C; c++, i += size) {
        double d = load1(dout + i, dtype), v = load1(x + i, dtype) * r;
        double grad = r * d * load1(weight + i, dtype) - k * v;
        if (dweight) dweight[place_of(dtype, c)] += (float)(d * v);
        store1(dx + i, dtype, (float)(dresidual ? grad + load1(dresidual + i, dtype) : grad));
    }
}

/* out_i = x_i r w_i with r = (mean x^2 + eps)^-1/2, so dx_i = r g_i - x_i r^3 mean(g x), g = dout w. */
INLINE void backward_row(const RmsNormBackward *a, int64_t m, int32_t dtype, float *dweight) {
    int64_t C = a->x.shape[1], size = dtype_size(dtype), c = 0;
    char *dx = at(&a->dx, m * a->dx.stride[0]);
    const char *x = at(&a->x, m * a->x.stride[0]), *dout = at(&a->dout, m * a->dout.stride[0]),
               *weight = a->weight.data;
    const char *dresidual = given(&a->dresidual) ? at(&a->dresidual, m * a->dresidual.stride[0]) : NULL;
    const char *next_x = x + a->x.stride[0] * size, *next_dout = dout + a->dout.stride[0] * size;
    float r = ((const float *)a->rstd.data)[m];
    if (__builtin_expect(fabsf(r) < 0x1p-40f || fabsf(r) > 0x1p40f, 0)) {
        backward_far(a, m, dtype, dweight);
        return;
    }
    vf total = { 0 };
    for (int64_t end; c < C; c = end) {
        end = c + SPAN < C ? c + SPAN : C;
        vf dots[4] = { { 0 } };
        for (; c + STEP <= end; c += STEP) {
            fetch(dx, dtype, c);
            dot_step(dout, weight, x, dtype, c, STEP, dots);
        }
        if (c < end) dot_step(dout, weight, x, dtype, c, end - c, dots);
        total += (dots[0] + dots[1]) + (dots[2] + dots[3]);
    }
    vf k = vf_set1(vf_sum(total) * r * r * r / (float)(C ? C : 1));
    for (c = 0; c + STEP <= C; c += STEP) {
        fetch(next_x, dtype, c);
        fetch(next_dout, dtype, c);
        gradient_step(dx, dweight, dout, x, weight, dresidual, dtype, c, STEP, vf_set1(r), k);
    }
    if (c < C) gradient_step(dx, dweight, dout, x, weight, dresidual, dtype, c, C - c, vf_set1(r), k);
}

typedef struct {
    const RmsNormBackward *a;
    float *partial;
    int64_t pitch;
} Backward;

static int backward_rows(int64_t task, void *context) {
    const Backward *b = context;
    const RmsNormBackward *a = b->a;
    int64_t first = task * ROWS, last = first + ROWS;
    float *dweight = b->partial ? b->partial + task * b->pitch : NULL;
    if (last > a->x.shape[0]) last = a->x.shape[0];
    if (dweight) memset(dweight, 0, (size_t)b->pitch * sizeof(float));
    switch (a->x.dtype) {
        case F32:
            for (int64_t m = first; m < last; m++) backward_row(a, m, F32, dweight);
            break;
        case BF16:
            for (int64_t m = first; m < last; m++) backward_row(a, m, BF16, dweight);
            break;
        default:
            for (int64_t m = first; m < last; m++) backward_row(a, m, F16, dweight);
    }
    return 0;
}

int CPU(rms_norm_backward)(const void *args, void *stream) {
    const RmsNormBackward *a = args;
    (void)stream;
    int64_t C = a->x.shape[1], tasks = (a->x.shape[0] + ROWS - 1) / ROWS;
    Backward b = { a, NULL, (C + STEP - 1) / STEP * STEP };
    if (given(&a->dweight) && tasks && !(b.partial = scratch(tasks * b.pitch * (int64_t)sizeof(float))))
        return -1;
    int status = parallel_for(tasks, ROWS * (C / 2 + 1), backward_rows, &b);
    if (b.partial) {
        float *dweight = a->dweight.data;
        for (int64_t task = 1; task < tasks; task++)
            for (int64_t c = 0; c < b.pitch; c++) b.partial[c] += b.partial[task * b.pitch + c];
        for (int64_t c = 0; c < C; c++) dweight[c] += b.partial[place_of(a->x.dtype, c)];
        scratch_free(b.partial);
    }
    return status;
}

/* The partial rows of dweight. */
Scratch CPU(rms_norm_backward_scratch)(const void *args) {
    const RmsNormBackward *a = args;
    int64_t C = a->x.shape[1], tasks = (a->x.shape[0] + ROWS - 1) / ROWS;
    return (Scratch){ { given(&a->dweight) ? tasks * ((C + STEP - 1) / STEP * STEP) * 4 : 0 } };
}
