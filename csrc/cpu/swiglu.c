/* swiglu.c --- out = silu(gate) * up, forward and backward; backward may write over its inputs.
 *
 * The ladder, bfloat16, ns for 8 elements in cache, one Zen 3 core with other work beside it, forward and backward: 9.1, 13.9;
 * bfloat16 widened by one instruction 7.8, 12.4; the polynomial of exp in pairs 6.6, 11.8. */
#include "cpu.h"

enum { BLOCK = 8192 };                 /* elements of a row in a task */

/* 1 + exp(-x): sigmoid(x) is one by it. NaN stays NaN. */
static inline vf one_and_exp(vf x) { return 1.0f + vf_exp_within(-vf_max(vf_set1(-87.0f), vf_min(vf_set1(88.0f), x))); }

static inline void forward_pair(char *out, const char *gate, const char *up, int32_t dtype) {
    vf2 g = vf_load2(gate, dtype), u = vf_load2(up, dtype), o;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) o.v[i] = g.v[i] / one_and_exp(g.v[i]) * u.v[i];
    vf_store2(out, dtype, o);
}

/* d silu(g)/dg = s (1 + g (1 - s)), s = sigmoid(g). */
static inline void backward_pair(char *dgate, char *dup, const char *dout, const char *gate, const char *up, int32_t dtype) {
    vf2 g = vf_load2(gate, dtype), u = vf_load2(up, dtype), d = vf_load2(dout, dtype), dg, du;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        vf s = 1.0f / one_and_exp(g.v[i]), ds = d.v[i] * s;
        dg.v[i] = ds * u.v[i] * (1.0f + g.v[i] * (1.0f - s));
        du.v[i] = ds * g.v[i];
    }
    vf_store2(dgate, dtype, dg);
    vf_store2(dup, dtype, du);
}

/* The last, shorter pair of vectors goes through buffers of a whole one. */
static inline void forward_block(const SwigluForward *a, int64_t m, int64_t first, int64_t last, int32_t dtype) {
    int64_t size = dtype_size(dtype), i = first;
    char *out = at(&a->out, m * a->out.stride[0]);
    const char *gate = at(&a->gate, m * a->gate.stride[0]), *up = at(&a->up, m * a->up.stride[0]);
    for (; i + 2 * VW <= last; i += 2 * VW) forward_pair(out + i * size, gate + i * size, up + i * size, dtype);
    if (i == last) return;
    char g[8 * VW] = {0}, u[8 * VW] = {0}, o[8 * VW];
    size_t rest = (size_t)((last - i) * size);
    memcpy(g, gate + i * size, rest);
    memcpy(u, up + i * size, rest);
    forward_pair(o, g, u, dtype);
    memcpy(out + i * size, o, rest);
}

static inline void backward_block(const SwigluBackward *a, int64_t m, int64_t first, int64_t last, int32_t dtype) {
    int64_t size = dtype_size(dtype), i = first;
    char *dgate = at(&a->dgate, m * a->dgate.stride[0]), *dup = at(&a->dup, m * a->dup.stride[0]);
    const char *dout = at(&a->dout, m * a->dout.stride[0]), *gate = at(&a->gate, m * a->gate.stride[0]);
    const char *up = at(&a->up, m * a->up.stride[0]);
    for (; i + 2 * VW <= last; i += 2 * VW)
        backward_pair(dgate + i * size, dup + i * size, dout + i * size, gate + i * size, up + i * size, dtype);
    if (i == last) return;
    char g[8 * VW] = {0}, u[8 * VW] = {0}, d[8 * VW] = {0}, dg[8 * VW], du[8 * VW];
    size_t rest = (size_t)((last - i) * size);
    memcpy(g, gate + i * size, rest);
    memcpy(u, up + i * size, rest);
    memcpy(d, dout + i * size, rest);
    backward_pair(dg, du, d, g, u, dtype);
    memcpy(dgate + i * size, dg, rest);
    memcpy(dup + i * size, du, rest);
}

#define EACH_DTYPE(dtype, block, ...) switch (dtype) { \
    case F32: block(__VA_ARGS__, F32); break; case BF16: block(__VA_ARGS__, BF16); break; default: block(__VA_ARGS__, F16); }

static int forward_task(int64_t task, void *context) {
    const SwigluForward *a = context;
    int64_t F = a->gate.shape[1], blocks = (F + BLOCK - 1) / BLOCK, m = task / blocks, first = task % blocks * BLOCK;
    int64_t last = first + BLOCK < F ? first + BLOCK : F;
    EACH_DTYPE(a->gate.dtype, forward_block, a, m, first, last)
    return 0;
}

static int backward_task(int64_t task, void *context) {
    const SwigluBackward *a = context;
    int64_t F = a->gate.shape[1], blocks = (F + BLOCK - 1) / BLOCK, m = task / blocks, first = task % blocks * BLOCK;
    int64_t last = first + BLOCK < F ? first + BLOCK : F;
    EACH_DTYPE(a->gate.dtype, backward_block, a, m, first, last)
    return 0;
}

static int64_t cost_of(int64_t F) { return (F < BLOCK ? F : BLOCK) / 2 + 1; }

int CPU(swiglu_forward)(const void *args, void *stream) {
    const SwigluForward *a = args;
    (void)stream;
    int64_t M = a->gate.shape[0], F = a->gate.shape[1];
    return parallel_for(M * ((F + BLOCK - 1) / BLOCK), cost_of(F), forward_task, (void *)a);
}

int CPU(swiglu_backward)(const void *args, void *stream) {
    const SwigluBackward *a = args;
    (void)stream;
    int64_t M = a->gate.shape[0], F = a->gate.shape[1];
    return parallel_for(M * ((F + BLOCK - 1) / BLOCK), cost_of(F), backward_task, (void *)a);
}
