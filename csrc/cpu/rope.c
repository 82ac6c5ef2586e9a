/* rope.c --- rotary embedding in rotate-half form from float32 tables. Backward is the inverse rotation. */
#include "cpu.h"

enum { ROWS = 8 }; /* tokens of a task */

typedef struct {
    const char *op;
    const Rope *a;
    float sign;
} Rotation;

/* The row of the tables for token t; -1 after fail() if there is none. */
static inline int64_t position_of(const Rotation *r, int64_t b, int64_t t) {
    const Rope *a = r->a;
    if (!given(&a->positions)) return t;
    int32_t position = index_at(&a->positions, b * a->positions.stride[0] + t);
    if (position >= 0 && position < a->cos.shape[0]) return position;
    return fail("%s: positions[%lld,%lld] should be in 0..%lld, got %d", r->op, (long long)b, (long long)t,
                (long long)a->cos.shape[0] - 1, position);
}

static inline void rotate_head(char *out, const char *x, const float *cos, const float *sin, float sign,
                               int64_t E, int32_t dtype) {
    int64_t e = 0, size = dtype_size(dtype);
    for (; e + VW <= E; e += VW) {
        vf first = vf_load_any(x + e * size, dtype), second = vf_load_any(x + (E + e) * size, dtype);
        vf c = vf_load(cos + e), s = vf_load(sin + e) * sign;
        vf_store_any(out + e * size, dtype, first * c - second * s);
        vf_store_any(out + (E + e) * size, dtype, second * c + first * s);
    }
    for (; e < E; e++) {
        float first = load1(x + e * size, dtype), second = load1(x + (E + e) * size, dtype),
              s = sin[e] * sign;
        store1(out + e * size, dtype, first * cos[e] - second * s);
        store1(out + (E + e) * size, dtype, second * cos[e] + first * s);
    }
}

static int rotate_rows(int64_t task, void *context) {
    const Rotation *r = context;
    const Rope *a = r->a;
    int64_t T = a->x.shape[1], H = a->x.shape[2], E = a->x.shape[3] / 2, tokens = a->x.shape[0] * T;
    int64_t first = task * ROWS, last = first + ROWS < tokens ? first + ROWS : tokens;
    for (int64_t m = first; m < last; m++) {
        int64_t b = m / T, t = m % T, position = position_of(r, b, t);
        if (position < 0) return -1;
        const float *cos = at(&a->cos, position * a->cos.stride[0]),
                    *sin = at(&a->sin, position * a->sin.stride[0]);
        for (int64_t h = 0; h < H; h++) {
            char *out = at(&a->out, b * a->out.stride[0] + t * a->out.stride[1] + h * a->out.stride[2]);
            const char *x = at(&a->x, b * a->x.stride[0] + t * a->x.stride[1] + h * a->x.stride[2]);
            switch (a->x.dtype) {
                case F32: rotate_head(out, x, cos, sin, r->sign, E, F32); break;
                case BF16: rotate_head(out, x, cos, sin, r->sign, E, BF16); break;
                default: rotate_head(out, x, cos, sin, r->sign, E, F16);
            }
        }
    }
    return 0;
}

static int rotate(const char *op, const Rope *a, float sign) {
    int64_t B = a->x.shape[0], T = a->x.shape[1], D = a->x.shape[3];
    Rotation r = { op, a, sign };
    for (int64_t m = 0; given(&a->positions) && m < B * T; m++)
        if (position_of(&r, m / T, m % T) < 0) return -1;
    return parallel_for((B * T + ROWS - 1) / ROWS, ROWS * a->x.shape[2] * (D / 4 + 1), rotate_rows, &r);
}

int CPU(rope_forward)(const void *args, void *stream) {
    (void)stream;
    return rotate("rope_forward", args, 1);
}
int CPU(rope_backward)(const void *args, void *stream) {
    (void)stream;
    return rotate("rope_backward", args, -1);
}
