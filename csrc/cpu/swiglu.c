/* swiglu.c --- out = silu(gate) * up, forward and backward. Backward may write over its inputs. Measurements:
 * docs/tuning/swiglu.md. */
#include "cpu.h"

enum { TASK = 32768 }; /* elements of a task: several rows, or a part of one */

#define LOWEST (-87.0f) /* exp(87) is in float32's range */

/* 1 + exp(-x) = 1 / sigmoid(x) for x from LOWEST on, and below that what it is at LOWEST. NaN stays NaN. */
static inline vf one_and_exp(vf x) {
    return 1.0f + vf_exp_within(-vf_max(vf_set1(LOWEST), vf_min(vf_set1(88.0f), x)));
}

/* Whether a gate is below LOWEST, or a NaN, from what one_and_exp() is for two vectors of them. */
static inline int any_low(const vf e[2]) { return __builtin_expect(vf_any_from(e[0] + e[1], 6e37f), 0); }

/* Results of any gate from those that one_and_exp() gives: below LOWEST they lack a factor of exp(x -
 * LOWEST), for others that factor is 1. A result of 0 needs no exact gate, and -inf times 0 would be a NaN.
 */
static inline vf missing(vf x) { return vf_exp_below(vf_min(vf_set1(0.0f), x - LOWEST)); }
static inline vf clipped(vf x) { return vf_max(vf_set1(-1e30f), x); }

static inline __attribute__((always_inline)) void forward_low(vf2 *o, const vf2 *g, const vf2 *u) {
    for (int i = 0; i < 2; i++)
        o->v[i] = clipped(g->v[i]) / one_and_exp(g->v[i]) * u->v[i] * missing(g->v[i]);
}

static inline void forward_pair(char *out, const char *gate, const char *up, int32_t dtype) {
    vf2 g = vf_load2(gate, dtype), u = vf_load2(up, dtype), o, e;
    UNROLLED
    for (int i = 0; i < 2; i++) {
        e.v[i] = one_and_exp(g.v[i]);
        o.v[i] = g.v[i] / e.v[i] * u.v[i];
    }
    if (any_low(e.v)) forward_low(&o, &g, &u);
    vf_store2(out, dtype, o);
}

/* d silu(g)/dg = s (1 + g (1 - s)), s = sigmoid(g). */
static inline __attribute__((always_inline)) void backward_low(vf2 *dg, vf2 *du, const vf2 *d, const vf2 *g,
                                                               const vf2 *u) {
    for (int i = 0; i < 2; i++) {
        vf x = clipped(g->v[i]), s = 1.0f / one_and_exp(x), ds = d->v[i] * s;
        dg->v[i] = ds * u->v[i] * (1.0f + x * (1.0f - s)) * missing(x);
        du->v[i] = ds * x * missing(x);
    }
}

static inline void backward_pair(char *dgate, char *dup, const char *dout, const char *gate, const char *up,
                                 int32_t dtype) {
    vf2 g = vf_load2(gate, dtype), u = vf_load2(up, dtype), d = vf_load2(dout, dtype), dg, du, e;
    UNROLLED
    for (int i = 0; i < 2; i++) {
        e.v[i] = one_and_exp(g.v[i]);
        vf s = 1.0f / e.v[i], ds = d.v[i] * s;
        dg.v[i] = ds * u.v[i] * (1.0f + g.v[i] * (1.0f - s));
        du.v[i] = ds * g.v[i];
    }
    if (any_low(e.v)) backward_low(&dg, &du, &d, &g, &u);
    vf_store2(dgate, dtype, dg);
    vf_store2(dup, dtype, du);
}

/* The last pair of vectors may be shorter: it goes through buffers of full length. */
static inline void forward_block(const SwigluForward *a, int64_t m, int64_t first, int64_t last,
                                 int32_t dtype) {
    int64_t size = dtype_size(dtype), i = first;
    char *out = at(&a->out, m * a->out.stride[0]);
    const char *gate = at(&a->gate, m * a->gate.stride[0]), *up = at(&a->up, m * a->up.stride[0]);
    for (; i + 2 * VW <= last; i += 2 * VW)
        forward_pair(out + i * size, gate + i * size, up + i * size, dtype);
    if (i == last) return;
    char g[8 * VW] = { 0 }, u[8 * VW] = { 0 }, o[8 * VW];
    size_t rest = (size_t)((last - i) * size);
    memcpy(g, gate + i * size, rest);
    memcpy(u, up + i * size, rest);
    forward_pair(o, g, u, dtype);
    memcpy(out + i * size, o, rest);
}

static inline void backward_block(const SwigluBackward *a, int64_t m, int64_t first, int64_t last,
                                  int32_t dtype) {
    int64_t size = dtype_size(dtype), i = first;
    char *dgate = at(&a->dgate, m * a->dgate.stride[0]), *dup = at(&a->dup, m * a->dup.stride[0]);
    const char *dout = at(&a->dout, m * a->dout.stride[0]), *gate = at(&a->gate, m * a->gate.stride[0]);
    const char *up = at(&a->up, m * a->up.stride[0]);
    for (; i + 2 * VW <= last; i += 2 * VW)
        backward_pair(dgate + i * size, dup + i * size, dout + i * size, gate + i * size, up + i * size,
                      dtype);
    if (i == last) return;
    char g[8 * VW] = { 0 }, u[8 * VW] = { 0 }, d[8 * VW] = { 0 }, dg[8 * VW], du[8 * VW];
    size_t rest = (size_t)((last - i) * size);
    memcpy(g, gate + i * size, rest);
    memcpy(u, up + i * size, rest);
    memcpy(d, dout + i * size, rest);
    backward_pair(dg, du, d, g, u, dtype);
    memcpy(dgate + i * size, dg, rest);
    memcpy(dup + i * size, du, rest);
}

#define EACH_DTYPE(dtype, block, ...)               \
    switch (dtype) {                                \
        case F32: block(__VA_ARGS__, F32); break;   \
        case BF16: block(__VA_ARGS__, BF16); break; \
        default: block(__VA_ARGS__, F16);           \
    }

/* Rows m .. m_end-1 and columns first .. last-1 of [M,F]. */
typedef struct {
    int64_t m, m_end, first, last;
} Part;

static int64_t rows_of(int64_t F) { return F < TASK ? TASK / (F > 0 ? F : 1) : 1; }
static int64_t parts_of(int64_t F) { return (F + TASK - 1) / TASK; }

static Part part_of(int64_t task, int64_t M, int64_t F) {
    int64_t rows = rows_of(F), m = task / parts_of(F) * rows, first = task % parts_of(F) * TASK;
    return (Part){ m, m + rows < M ? m + rows : M, first, first + TASK < F ? first + TASK : F };
}

static int forward_task(int64_t task, void *context) {
    const SwigluForward *a = context;
    Part p = part_of(task, a->gate.shape[0], a->gate.shape[1]);
    for (int64_t m = p.m; m < p.m_end; m++) EACH_DTYPE(a->gate.dtype, forward_block, a, m, p.first, p.last)
    return 0;
}

static int backward_task(int64_t task, void *context) {
    const SwigluBackward *a = context;
    Part p = part_of(task, a->gate.shape[0], a->gate.shape[1]);
    for (int64_t m = p.m; m < p.m_end; m++) EACH_DTYPE(a->gate.dtype, backward_block, a, m, p.first, p.last)
    return 0;
}

static int run(const Tensor *gate, int (*body)(int64_t, void *), const void *args) {
    int64_t M = gate->shape[0], F = gate->shape[1], rows = rows_of(F);
    return parallel_for((M + rows - 1) / rows * parts_of(F), (F < TASK ? rows * F : TASK) / 2 + 1, body,
                        (void *)args);
}

int CPU(swiglu_forward)(const void *args, void *stream) {
    (void)stream;
    return run(&((const SwigluForward *)args)->gate, forward_task, args);
}

int CPU(swiglu_backward)(const void *args, void *stream) {
    (void)stream;
    return run(&((const SwigluBackward *)args)->gate, backward_task, args);
}
