/* rope.cu --- rotary embedding, rotate-half form, from float32 tables. The backward is the inverse rotation.
 * Both can work in place.
 *
 * Bound by memory: each element is read and written once, and a token's rows of the tables (4 D bytes) serve
 * all its heads. A thread takes 16 bytes of the first half of a head and their partners in the second half,
 * of HEADS heads at a time: 128 bytes of loads. It keeps cos and sin of the token's position in registers for
 * all heads. */
#include "rows.cuh"

enum { HEADS = 4 };

/* [B,T,H,D] and its strides. */
template <class T> struct Array {
    T *data;
    int64_t b, t, h;
};

/* A block has BLOCK >> (lanes + groups) tokens by 1 << groups groups of heads by 1 << lanes vectors. */
template <class T, bool ALIGNED> __global__ void __launch_bounds__(BLOCK, 2)
    rotate_kernel(Array<T> out, Array<const T> x, const float *cos, int64_t cos_row, const float *sin,
                  int64_t sin_row, const int32_t *positions, int64_t positions_row, int64_t tokens,
                  int64_t length, int64_t H, int64_t E, int64_t P, float sign, int lanes, int groups) {
    constexpr int N = 16 / sizeof(T);
    int64_t token = (int64_t)blockIdx.x * (BLOCK >> (lanes + groups)) + (threadIdx.x >> (lanes + groups));
    if (token >= tokens) return;
    int64_t b = token / length, t = token - b * length;
    int64_t position = positions ? positions[b * positions_row + t] : t;
    bool there = position >= 0 && position < P;
    out.data += b * out.b + t * out.t;
    x.data += b * x.b + t * x.t;
#pragma unroll 1
    for (int64_t e = (threadIdx.x & ((1 << lanes) - 1)) * N; e < E; e += (int64_t)N << lanes) {
        float c[N], s[N];
        if (there) {
            Raw<float, N> raw[2];
            get<ALIGNED>(raw[0], cos + position * cos_row, e, E);
            get<ALIGNED>(raw[1], sin + position * sin_row, e, E);
            widen<float>(c, raw[0]);
            widen<float>(s, raw[1]);
        } else {
#pragma unroll
            for (int j = 0; j < N; j++) c[j] = s[j] = NAN;
        }
#pragma unroll 1
        for (int64_t h = (threadIdx.x >> lanes & ((1 << groups) - 1)) * HEADS; h < H;
             h += (int64_t)HEADS << groups) {
            Raw<T, N> first[HEADS], second[HEADS];
#pragma unroll
            for (int i = 0; i < HEADS; i++) {
                get<ALIGNED>(first[i], x.data + (h + i) * x.h, e, h + i < H ? E : 0);
                get<ALIGNED>(second[i], x.data + (h + i) * x.h + E, e, h + i < H ? E : 0);
            }
#pragma unroll
            for (int i = 0; i < HEADS; i++) {
                float one[N], two[N];
                widen<T>(one, first[i]);
                widen<T>(two, second[i]);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    float x1 = one[j], x2 = two[j], sine = sign * s[j];
                    one[j] = x1 * c[j] - x2 * sine;
                    two[j] = x2 * c[j] + x1 * sine;
                }
                narrow<T>(first[i], one);
                narrow<T>(second[i], two);
                put<ALIGNED>(out.data + (h + i) * out.h, first[i], e, h + i < H ? E : 0);
                put<ALIGNED>(out.data + (h + i) * out.h + E, second[i], e, h + i < H ? E : 0);
            }
        }
    }
}

static int log2_up_to(int64_t n, int most) {
    int log = 0;
    while (log < most && (int64_t)1 << log < n) log++;
    return log;
}

static int rotate(const void *args, const CudaCall *call, float sign) {
    const Rope *a = (const Rope *)args;
    int64_t B = a->x.shape[0], length = a->x.shape[1], H = a->x.shape[2];
    int64_t P = a->cos.shape[0], E = a->cos.shape[1];
    return for_dtype(a->x.dtype, [&](auto t) {
        using T = typename decltype(t)::is;
        constexpr int N = 16 / sizeof(T);
        int lanes = log2_up_to(ceil_div(E, N), 8), groups = log2_up_to(ceil_div(H, HEADS), 8 - lanes);
        bool fit = aligned(N, E, &a->out, &a->x, &a->cos, &a->sin);
        return launch(call, fit ? rotate_kernel<T, true> : rotate_kernel<T, false>,
                      dim3((unsigned)ceil_div(H && E ? B * length : 0, BLOCK >> (lanes + groups))), BLOCK, 0,
                      Array<T>{ (T *)a->out.data, a->out.stride[0], a->out.stride[1], a->out.stride[2] },
                      Array<const T>{ (const T *)a->x.data, a->x.stride[0], a->x.stride[1], a->x.stride[2] },
                      (const float *)a->cos.data, a->cos.stride[0], (const float *)a->sin.data,
                      a->sin.stride[0], given(&a->positions) ? (const int32_t *)a->positions.data : nullptr,
                      a->positions.stride[0], B * length, length, H, E, P, sign, lanes, groups);
    });
}

extern "C" int rope_forward_cuda(const void *args, const CudaCall *call) { return rotate(args, call, 1); }
extern "C" int rope_backward_cuda(const void *args, const CudaCall *call) { return rotate(args, call, -1); }
