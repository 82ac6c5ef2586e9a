/* checks.c --- checks of arguments that a spec cannot express. The binding runs them before each call, on
 * every device. Kernels check the contents of arrays, and only on the CPU. */
#include "ops.h"

int check_rms_norm_forward(const char *op, const void *args) {
    const RmsNormForward *a = args;
    if (given(&a->residual) && !given(&a->sum))
        return fail("%s: sum must be given with residual, got None", op);
    return 0;
}

int check_rope(const char *op, const void *args) {
    const Rope *a = args;
    int64_t T = a->x.shape[1], D = a->x.shape[3], P = a->cos.shape[0], E = a->cos.shape[1];
    if (D != 2 * E)
        return fail("%s: cos axis 1 should be D/2 of D=%lld, got %lld", op, (long long)D, (long long)E);
    if (!given(&a->positions) && a->x.shape[0] && T > P)
        return fail("%s: cos axis 0 should be at least T=%lld, got %lld", op, (long long)T, (long long)P);
    return 0;
}

int check_lora_linear_forward(const char *op, const void *args) {
    const LoraLinearForward *f = args;
    if (given(&f->a) != given(&f->b))
        return fail("%s: a and b go together, got only %s", op, given(&f->a) ? "a" : "b");
    if (given(&f->u) && !given(&f->a)) return fail("%s: u needs a and b, got None", op);
    return 0;
}

int check_lora_linear_backward(const char *op, const void *args) {
    const LoraLinearBackward *f = args;
    int lora = given(&f->a);
    if (given(&f->a) != given(&f->b))
        return fail("%s: a and b go together, got only %s", op, lora ? "a" : "b");
    if (!lora && given(&f->da)) return fail("%s: da needs a and b, got None", op);
    if (!lora && given(&f->db)) return fail("%s: db needs a and b, got None", op);
    if (!lora && given(&f->u)) return fail("%s: u needs a and b, got None", op);
    if (!given(&f->x) && given(&f->dweight)) return fail("%s: x is needed for dweight, got None", op);
    if (!given(&f->x) && given(&f->da)) return fail("%s: x is needed for da, got None", op);
    if (!given(&f->x) && !given(&f->u) && given(&f->db))
        return fail("%s: x or u is needed for db, got None for both", op);
    return 0;
}

static int check_attention(const char *op, const Tensor *q, const Tensor *k, const Tensor *cu_seqlens,
                           double group_size, double boundary, double shift) {
    long long B = q->shape[0], T = q->shape[1], H = q->shape[2], K = k->shape[2], G = (long long)group_size;
    if (G < 1) return fail("%s: group_size should be at least 1, got %lld", op, G);
    if (boundary < SPLIT || boundary > SWAP)
        return fail("%s: boundary should be 0 (split), 1 (wrap) or 2 (swap), got %g", op, boundary);
    if (shift < HALF || shift > ALL)
        return fail("%s: shift should be 0 (half), 1 (none) or 2 (all), got %g", op, shift);
    if (K ? H % K : H) return fail("%s: k axis 2 should divide H=%lld, got %lld", op, H, K);
    if (given(cu_seqlens)) {
        if (B != 1) return fail("%s: cu_seqlens should come with B=1, got B=%lld", op, B);
        if (cu_seqlens->shape[0] < (T ? 2 : 1))
            return fail("%s: cu_seqlens should begin with 0 and end with T=%lld", op, T);
    } else if (boundary != SPLIT && shift != NONE && T % G)
        return fail("%s: boundary %s needs a length that is a multiple of group_size=%lld, got %lld", op,
                    boundary == WRAP ? "wrap" : "swap", G, T);
    return 0;
}

int check_s2_attention_forward(const char *op, const void *args) {
    const S2AttentionForward *a = args;
    return check_attention(op, &a->q, &a->k, &a->cu_seqlens, a->group_size, a->boundary, a->shift);
}

int check_s2_attention_backward(const char *op, const void *args) {
    const S2AttentionBackward *a = args;
    return check_attention(op, &a->q, &a->k, &a->cu_seqlens, a->group_size, a->boundary, a->shift);
}

int check_cached_attention(const char *op, const void *args) {
    const CachedAttention *a = args;
    long long B = a->q.shape[0], H = a->q.shape[2], N = a->k_cache.shape[0], K = a->k_cache.shape[2];
    if (given(&a->k) != given(&a->v))
        return fail("%s: k and v go together, got only %s", op, given(&a->k) ? "k" : "v");
    if (K ? H % K : H) return fail("%s: k_cache axis 2 should divide H=%lld, got %lld", op, H, K);
    if (!given(&a->rows) && B > N)
        return fail("%s: k_cache axis 0 should be at least B=%lld, got %lld", op, B, N);
    return 0;
}

int check_adamw(const char *op, const void *args) {
    const Adamw *a = args;
    if (a->step < 1) return fail("%s: step should be at least 1, got %g", op, a->step);
    return 0;
}
