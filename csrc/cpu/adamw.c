/* adamw.c --- AdamW (arXiv 1711.05101, algorithm 2) on float32 masters and moments, in place, in one pass:
 *
 *     param = param (1 - lr weight_decay) - (lr / c1) m / (sqrt(v) / sqrt(c2) + eps),  c = 1 - beta^step
 *
 * The factors that depend only on the step are computed once, in float64. */
#include "cpu.h"

enum { BLOCK = 8192 };

typedef struct {
    const Adamw *a;
    float decay, rate, root, keep1, keep2, add1, add2, eps, scale;
} Step;

static int update_block(int64_t block, void *context) {
    const Step s = *(const Step *)context; /* a copy, which no store below can change: vectors need that */
    const Adamw *a = s.a;
    int64_t first = block * BLOCK, n = a->grad.shape[0] - first < BLOCK ? a->grad.shape[0] - first : BLOCK;
    float *restrict param = (float *)a->param.data + first, *restrict m = (float *)a->m.data + first;
    float *restrict v = (float *)a->v.data + first;
    const float *restrict grad = (const float *)a->grad.data + first;
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i] * s.scale;
        m[i] = s.keep1 * m[i] + s.add1 * g;
        /* The square of a large gradient overflows, its share in v need not. */
        int large = fabsf(g) > 1e19f;
        float part = large ? g * 0x1p-32f : g, share = large ? s.add2 * 0x1p64f : s.add2;
        v[i] = s.keep2 * v[i] + share * (part * part);
        param[i] = param[i] * s.decay - s.rate * m[i] / (sqrtf(v[i]) * s.root + s.eps);
    }
    if (given(&a->copy)) store_row(at(&a->copy, first), a->copy.dtype, param, n);
    return 0;
}

int CPU(adamw)(const void *args, void *stream) {
    const Adamw *a = args;
    (void)stream;
    double c1 = 1 - pow(a->beta1, a->step), c2 = 1 - pow(a->beta2, a->step);
    Step s = { a,
               (float)(1 - a->lr * a->weight_decay),
               (float)(a->lr / c1),
               (float)(1 / sqrt(c2)),
               (float)a->beta1,
               (float)a->beta2,
               (float)(1 - a->beta1),
               (float)(1 - a->beta2),
               (float)a->eps,
               (float)a->grad_scale };
    int64_t N = a->grad.shape[0];
    return parallel_for((N + BLOCK - 1) / BLOCK, N < BLOCK ? N / 2 : BLOCK / 2, update_block, &s);
}
