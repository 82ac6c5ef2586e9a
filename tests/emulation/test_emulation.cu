/* test_emulation.cu --- tests the emulation: small kernels with known results, and wrong kernels that it must
 * detect. Prints a line per test. The exit code is the number of failed tests. */
#include "common.cuh"

#include <initializer_list>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static char message[512];
extern "C" int fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return -1;
}

static const char *const orders[] = { "forward", "reversed", "shuffled" };
static void set_order(const char *order) { setenv("LONGLORA_EMULATION_ORDER", order, 1); }
static const CudaCall a_call = { nullptr, nullptr, 0, 0, 86, emulation::SHARED };
static const CudaCall *call = &a_call;
static int failures;

/* Runs test() in every order and prints the results. */
template <class F> static void check(const char *name, F test) {
    for (const char *order : orders) {
        set_order(order);
        message[0] = 0;
        bool good = test();
        if (!good) failures++;
        printf("%s %s (%s) %s\n", good ? "ok    " : "FAILED", name, order, message);
    }
}
static bool said(int status, const char *words) { return status == -1 && strstr(message, words); }

/* ---- right kernels --------------------------------------------------------------------------- */

__global__ void sum_kernel(float *out, const float *x, int n) {
    __shared__ float shared[32];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
    sum = block_sum(sum, shared);
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
static bool block_sums() {
    enum { BLOCKS = 3, N = 1000, THREADS = 256 };
    static float x[BLOCKS * N], out[BLOCKS * THREADS];
    double want[BLOCKS] = {};
    for (int i = 0; i < BLOCKS * N; i++) want[i / N] += x[i] = (float)(i % 17 - 5);
    if (launch(call, sum_kernel, BLOCKS, THREADS, 0, out, x, N)) return false;
    for (int i = 0; i < BLOCKS * THREADS; i++)
        if (out[i] != (float)want[i / THREADS]) return false;
    return true;
}

/* Transposes a tile through dynamic shared memory, which begins as NaN. */
__global__ void transpose_kernel(float *out, const float *x, int n) {
    DYNAMIC_SHARED(float, tile);
    int i = threadIdx.x;
    bool poisoned = true;
    for (int j = 0; j < n; j++) poisoned = poisoned && isnan(tile[i * n + j]);
    __syncthreads();
    for (int j = 0; j < n; j++) tile[j * n + i] = x[i * n + j];
    __syncthreads();
    for (int j = 0; j < n; j++) out[i * n + j] = poisoned ? tile[i * n + j] : 0;
}
static bool transposes() {
    enum { N = 70 };
    static float x[N * N], out[N * N];
    for (int i = 0; i < N * N; i++) x[i] = (float)(i + 1);
    for (int block = 0; block < 2; block++)
        if (launch(call, transpose_kernel, 2, N, N * N * sizeof(float), out, x, (int)N)) return false;
    for (int i = 0; i < N * N; i++)
        if (out[i] != x[i % N * N + i / N]) return false;
    return true;
}

/* All shuffles and votes, in groups of 8, of the 20 lanes of a warp that go on, and a barrier after the
 * others have ended. */
__global__ void warp_kernel(int *out) {
    int lane = threadIdx.x % 32;
    unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    int sum = lane;
    for (int offset = 8; offset; offset /= 2) sum += __shfl_xor_sync(half, sum, offset);
    __syncthreads();
    if (lane >= 20) return;
    int *mine = out + (blockIdx.x * blockDim.x + threadIdx.x) * 9;
    unsigned all = 0xfffffu;
    mine[0] = sum;
    mine[1] = __shfl_sync(all, lane * 10, 5, 8);
    mine[2] = __shfl_down_sync(all, lane * 10, 3u, 8);
    mine[3] = __shfl_up_sync(all, lane * 10, 3u, 8);
    mine[4] = (int)__ballot_sync(0xffffffffu, lane % 3 == 0); /* does not wait for lanes that have ended */
    mine[5] = __any_sync(all, lane == 7) + 2 * __any_sync(all, lane == 25);
    mine[6] = __all_sync(all, lane < 20) + 2 * __all_sync(all, lane < 19);
    mine[7] = (int)(__shfl_sync(all, (int64_t)lane << 40, 9) >> 40);
    if (lane % 2) mine[8] = __shfl_xor_sync(0xaaaaau, lane, 2);
    else mine[8] = __shfl_xor_sync(0x55555u, -lane, 4);
    __syncwarp(all);
    __syncthreads();
}
static bool warps() {
    static int out[128 * 9];
    memset(out, 0, sizeof out);
    if (launch(call, warp_kernel, 2, 64, 0, out)) return false;
    for (int i = 0; i < 128; i++) {
        int lane = i % 32, *mine = out + i * 9;
        if (lane >= 20) continue;
        int first = lane / 8 * 8, partner = lane % 2 ? lane ^ 2 : lane ^ 4;
        int up = lane - 3 >= first ? lane - 3 : lane, down = lane + 3 < first + 8 ? lane + 3 : lane;
        bool good = mine[0] == (lane < 16 ? 120 : 376) && mine[2] == (down < 20 ? down * 10 : -1) &&
                    mine[3] == up * 10;
        good = good && mine[1] == (first + 5 < 20 ? (first + 5) * 10 : -1) &&
               mine[4] == (0x49249 & 0xfffff) && mine[5] == 1;
        good = good && mine[6] == 1 && mine[7] == 9 &&
               mine[8] == (partner >= 20 ? -1
                           : lane % 2    ? partner
                                         : -partner);
        if (!good)
            return fail("lane %d: %d %d %d %d %x %d %d %d %d", lane, mine[0], mine[1], mine[2], mine[3],
                        (unsigned)mine[4], mine[5], mine[6], mine[7], mine[8]),
                   false;
    }
    return true;
}

/* c[16,8] = a[16,16] b[16,8] as in a real kernel: cp.async to shared memory, ldmatrix, mma. `a` is [row][k].
 * `b` is [k][n], loaded by the transposing ldmatrix, or [n][k], loaded by the plain one. */
template <class T, bool TRANS> __global__ void mma_kernel(float *c, const T *a, const T *b) {
    __shared__ __align__(128) T sa[16 * 16], sb[16 * 16];
    int lane = threadIdx.x;
    cp_async_16(sa + lane * 8, a + lane * 8, true);
    cp_async_16(sb + lane * 8, b + lane * 8, lane < 16); /* 16 rows of 8; zeros after them */
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    unsigned fa[4], fb[4], half[2];
    float d[4] = { 1, 1, 1, 1 };
    ldmatrix_x4(fa, sa + lane % 16 * 16 + lane / 16 * 8);        /* rows 0-7, 8-15 of k 0-7, then of k 8-15 */
    if (TRANS) ldmatrix_x4_trans(fb, sb + lane % 16 * 8);        /* b is 16 rows (k) of 8 */
    else ldmatrix_x4(fb, sb + lane % 8 * 16 + lane / 8 % 2 * 8); /* b is 8 rows (n) of 16 */
    half[0] = fb[0], half[1] = fb[1];
    mma_16816<T>(d, fa, half);
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
template <class T, bool TRANS> static bool products() {
    alignas(16) T a[256], b[128];
    float c[128];
    for (int i = 0; i < 256; i++) a[i] = from_float<T>((float)((i * 7) % 11 - 5) / 4);
    for (int i = 0; i < 128; i++) b[i] = from_float<T>((float)((i * 5) % 13 - 6) / 2);
    if (launch(call, mma_kernel<T, TRANS>, 1, 32, 0, c, a, b)) return false;
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            float want = 1;
            for (int k = 0; k < 16; k++)
                want += to_float(a[m * 16 + k]) * to_float(b[TRANS ? k * 8 + n : n * 16 + k]);
            if (c[m * 8 + n] != want)
                return fail("c[%d,%d] = %g, wanted %g", m, n, c[m * 8 + n], want), false;
        }
    return true;
}

/* The PTX manual's table for ldmatrix: thread 4 g + t, register i: elements 2t, 2t+1 of row g of matrix i;
 * .trans of column g. */
__global__ void ldmatrix_kernel(unsigned *out, const uint16_t *x, bool transposed) {
    __shared__ __align__(16) uint16_t rows[32 * 8];
    int lane = threadIdx.x;
    for (int i = 0; i < 8; i++) rows[lane * 8 + i] = x[lane * 8 + i];
    __syncwarp();
    unsigned r[4];
    if (transposed) ldmatrix_x4_trans(r, rows + lane * 8);
    else ldmatrix_x4(r, rows + lane * 8);
    for (int i = 0; i < 4; i++) out[lane * 4 + i] = r[i];
}
static bool ldmatrix_layout() {
    uint16_t x[256];
    unsigned out[128];
    for (int i = 0; i < 256; i++)
        x[i] = (uint16_t)(i / 64 * 1000 + i / 8 % 8 * 10 + i % 8); /* matrix, row, column */
    for (int transposed = 0; transposed < 2; transposed++) {
        if (launch(call, ldmatrix_kernel, 1, 32, 0, out, x, transposed != 0)) return false;
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                unsigned g = lane / 4, t = lane % 4,
                         low = i * 1000 + (transposed ? 2 * t * 10 + g : g * 10 + 2 * t);
                if (out[lane * 4 + i] != (low | (low + (transposed ? 10 : 1)) << 16)) return false;
            }
    }
    return true;
}

/* Every 16-bit value is the same after conversion to float32 and back; ties go to even; the largest values.
 */
static bool roundings() {
    for (unsigned bits = 0; bits < 1 << 16; bits++) {
        f16 h = { (uint16_t)bits };
        bf16 b = { (uint16_t)bits };
        bool nan_h = (bits & 0x7fff) > 0x7c00, nan_b = (bits & 0x7fff) > 0x7f80;
        if (nan_h ? !isnan(to_float(h)) : from_float<f16>(to_float(h)).bits != bits)
            return fail("half %04x", bits), false;
        if (nan_b ? !isnan(to_float(b)) : from_float<bf16>(to_float(b)).bits != bits)
            return fail("bfloat16 %04x", bits), false;
        if (nan_h || nan_b || (bits & 0x7fff) >= 0x7bff) continue;
        for (int i = -1; i < 2; i++) { /* around the midpoint of two neighbours */
            float low = to_float(h), high = to_float(f16{ (uint16_t)(bits + 1) }), middle = (low + high) / 2;
            float x = i ? nextafterf(middle, i < 0 ? low : high) : middle;
            unsigned want = i < 0 ? bits : i > 0 ? bits + 1 : bits + (bits & 1);
            if (from_float<f16>(x).bits != want) return fail("%a to half", x), false;
            x = __uint_as_float((bits << 16) + 0x8000 + i);
            want = i < 0 ? bits : i > 0 ? bits + 1 : bits + (bits & 1);
            if (from_float<bf16>(x).bits != want) return fail("%a to bfloat16", x), false;
        }
    }
    return pack<bf16>(1, -2) == 0xc0003f80 && pack<f16>(1, -2) == 0xc0003c00 &&
           from_float<f16>(65519.0f).bits == 0x7bff && from_float<f16>(65520.0f).bits == 0x7c00 &&
           isnan(to_float(from_float<f16>(NAN))) && isnan(to_float(from_float<bf16>(NAN))) &&
           exp2_fast(-INFINITY) == 0 && exp2_fast(3) == 8;
}

__global__ void indices_kernel(int *seen) {
    seen[((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x]++;
}
static bool every_block_once() {
    static int seen[7 * 5 * 3 * 33];
    memset(seen, 0, sizeof seen);
    if (launch(call, indices_kernel, dim3(7, 5, 3), 33, 0, seen)) return false;
    for (int n : seen)
        if (n != 1) return false;
    return !launch(call, indices_kernel, dim3(7, 0, 3), 33, 0, seen);
}

/* ---- wrong kernels --------------------------------------------------------------------------- */

/* Lacks a __syncthreads: reads what a thread of another warp may not have written yet. */
__global__ void race_kernel(float *out) {
    DYNAMIC_SHARED(float, x);
    x[threadIdx.x] = (float)threadIdx.x;
    out[threadIdx.x] = x[(threadIdx.x + 32) % blockDim.x];
}
static bool a_race_shows() {
    float out[2][128];
    for (int i = 0; i < 2; i++) {
        set_order(orders[i]);
        if (launch(call, race_kernel, 1, 128, 128 * sizeof(float), out[i])) return false;
    }
    return memcmp(out[0], out[1], sizeof out[0]) != 0;
}

/* Lacks a second barrier: overwrites what slower threads have not read yet. */
__global__ void early_kernel(float *out) {
    DYNAMIC_SHARED(float, x);
    float sum = 0;
    for (int round = 0; round < 3; round++) {
        x[threadIdx.x] = (float)(round * 100 + threadIdx.x);
        __syncthreads();
        sum += x[(threadIdx.x + 64) % blockDim.x];
    }
    out[threadIdx.x] = sum;
}
static bool an_early_write_shows() {
    float out[2][128];
    for (int i = 0; i < 2; i++) {
        set_order(orders[i]);
        if (launch(call, early_kernel, 1, 128, 128 * sizeof(float), out[i])) return false;
    }
    return memcmp(out[0], out[1], sizeof out[0]) != 0;
}

__global__ void no_wait_kernel(float *out, const float *in, bool waits) {
    __shared__ __align__(16) float x[2][32 * 4];
    int i = threadIdx.x;
    for (int stage = 0; stage < 2; stage++) {
        cp_async_16(x[stage] + i * 4, in + i * 4, true);
        cp_async_commit();
    }
    if (waits) cp_async_wait<1>();
    out[i] = x[0][i * 4];
    out[32 + i] = x[1][i * 4];
}
static bool a_missing_wait_shows() {
    alignas(16) float in[128], out[64];
    for (int i = 0; i < 128; i++) in[i] = (float)i;
    if (launch(call, no_wait_kernel, 1, 32, 0, out, in, true)) return false;
    for (int i = 0; i < 32; i++)
        if (out[i] != (float)(4 * i) || !isnan(out[32 + i])) return false;
    if (launch(call, no_wait_kernel, 1, 32, 0, out, in, false)) return false;
    for (float x : out)
        if (!isnan(x)) return false;
    return true;
}

enum Wrong {
    DEADLOCK,
    TWO_BARRIERS,
    NOT_IN_MASK,
    LANES_MISSING,
    MISALIGNED_ROW,
    MISALIGNED_COPY,
    MISALIGNED_VECTOR,
    OUTSIDE,
    OVERFLOW_SHARED,
    ILLEGAL,
    STACK,
    OUTSIDE_MEMORY
};
static void deep(int n) {
    volatile char much[4096];
    much[n % 4096] = 1;
    if (n) deep(n - 1);
    much[0] = much[1];
}
__global__ void wrong_kernel(Wrong what, float *global) {
    __shared__ __align__(16) float x[64];
    DYNAMIC_SHARED(float, dynamic);
    unsigned r[4], b[2] = { 0, 0 };
    float d[4] = { 0, 0, 0, 0 };
    int i = threadIdx.x;
    switch (what) {
        case DEADLOCK:
            if (i < 32) __syncthreads();
            else __shfl_sync(0xffffffffu, i, i == 40 ? (__syncthreads(), 0) : 0);
            break;
        case TWO_BARRIERS:
            if (i < 32) __syncthreads();
            else __syncthreads();
            break;
        case NOT_IN_MASK: __syncwarp(0xfu); break;
        case LANES_MISSING:
            if (i % 32 < 30) {
                for (unsigned &y : r) y = 0;
                mma_16816<bf16>(d, r, b);
            }
            break;
        case MISALIGNED_ROW: ldmatrix_x4(r, x + i % 8 + 1); break;
        case MISALIGNED_COPY: cp_async_16(x, global + 1, true); break;
        case MISALIGNED_VECTOR: {
            float y[4];
            load(y, global + 2);
            x[0] = y[0];
            break;
        }
        case OUTSIDE: x[i + 1] = 1; break;
        case OVERFLOW_SHARED: dynamic[i] = 1; break;
        case ILLEGAL:
            if (i == 7) global[(int64_t)1 << 40] = 1;
            break;
        case OUTSIDE_MEMORY: x[i] = global[i + 1]; break;
        case STACK: deep(1 << 20); break;
    }
}
static bool wrong(Wrong what, const char *words) {
    alignas(16) static float global[64];
    return said(launch(call, wrong_kernel, 2, 64, 63 * sizeof(float), what, global), words);
}

static bool limits() {
    return said(launch(call, indices_kernel, 1, 1025, 0, (int *)nullptr), "1 to 1024 threads") &&
           said(launch(call, indices_kernel, 1, 32, 100 << 10, (int *)nullptr), "shared memory");
}

/* ---- the runtime ----------------------------------------------------------------------------- */

static bool runtime() {
    float *p, *q, back[3];
    int device = -1, count;
    cudaPointerAttributes of;
    size_t before, free, total;
    setenv("LONGLORA_EMULATION_MEMORY", "1000000", 1);
    bool good = !cudaMemGetInfo(&before, &total) && total == 1000000 && !cudaMalloc(&p, 3 * sizeof(float));
    good = good && !cudaMemGetInfo(&free, &total) && before - free == 12 &&
           !cudaMemcpy(back, p, 12, cudaMemcpyDeviceToHost);
    good = good && isnan(back[0]) && isnan(back[2]) && !cudaPointerGetAttributes(&of, p + 1) &&
           of.type == cudaMemoryTypeDevice;
    good = good && of.device == 0 && !cudaPointerGetAttributes(&of, back) &&
           of.type == cudaMemoryTypeUnregistered;
    good = good && cudaMalloc(&q, 1000000) == cudaErrorMemoryAllocation && !q &&
           cudaGetLastError() == cudaErrorMemoryAllocation;
    good = good && !cudaGetLastError() &&
           !strcmp(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory");
    good = good && cudaFree(p + 1) == cudaErrorInvalidValue && !cudaFree(p) &&
           cudaFree(p) == cudaErrorInvalidValue;
    good = good && !cudaMallocHost(&q, 100) && !cudaPointerGetAttributes(&of, q) &&
           of.type == cudaMemoryTypeHost && !cudaFreeHost(q);
    good = good && !cudaGetDevice(&device) && device == 0 && cudaSetDevice(1) == cudaErrorInvalidDevice &&
           !cudaGetDeviceCount(&count) && count == 1;
    unsetenv("LONGLORA_EMULATION_MEMORY");
    cudaGetLastError();
    return good;
}

/* A call that does not describe the current device. */
static bool wrong_calls() {
    CudaCall other = a_call, older = a_call, larger = a_call;
    other.device = 1;
    older.sm = 0;
    larger.shared_bytes++;
    for (const CudaCall *wrong : { &other, &older, &larger })
        if (!said(launch(wrong, indices_kernel, 1, 32, 0, (int *)nullptr), "the call is for")) return false;
    return true;
}

/* Code for sm_90a runs on sm_90 only, and a build may lack it. */
static bool choices() {
    struct {
        int sm;
        bool hopper;
    } cases[] = { { 80, false }, { 86, false }, { 89, false }, { 90, true }, { 100, false }, { 120, false } };
    for (auto of : cases) {
        CudaCall there = a_call;
        there.sm = of.sm;
        if (choose(&there, 'g', 'h') != (of.hopper ? 'h' : 'g') ||
            choose(&there, &block_sums, HOPPER(&transposes)) != &block_sums)
            return false;
    }
    return true;
}

__global__ void switch_kernel(float *out, int rounds) {
    float x = (float)threadIdx.x;
    for (int i = 0; i < rounds; i++) x = warp_max(x);
    out[threadIdx.x] = x;
}
__global__ void barrier_kernel(int rounds) {
    for (int i = 0; i < rounds; i++) __syncthreads();
}
static double seconds() {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main() {
    check("block sums", block_sums);
    check("shared memory", transposes);
    check("shuffles and votes", warps);
    check("mma bf16, b [n][k]", products<bf16, false>);
    check("mma bf16, b [k][n]", products<bf16, true>);
    check("mma f16, b [n][k]", products<f16, false>);
    check("mma f16, b [k][n]", products<f16, true>);
    check("ldmatrix", ldmatrix_layout);
    check("roundings", roundings);
    check("every block once", every_block_once);
    check("a race shows", a_race_shows);
    check("an early write shows", an_early_write_shows);
    check("a missing wait shows", a_missing_wait_shows);
    check("deadlock", [] { return wrong(DEADLOCK, "stands still"); });
    check("two barriers", [] { return wrong(TWO_BARRIERS, "meet at two barriers"); });
    check("a lane outside its mask", [] { return wrong(NOT_IN_MASK, "where it is not"); });
    check("mma without all lanes", [] { return wrong(LANES_MISSING, "needs all 32 lanes"); });
    check("misaligned ldmatrix", [] { return wrong(MISALIGNED_ROW, "not 16-byte aligned"); });
    check("misaligned cp.async", [] { return wrong(MISALIGNED_COPY, "not 16-byte aligned"); });
    check("misaligned vector", [] { return wrong(MISALIGNED_VECTOR, "a misaligned access"); });
    check("outside an array", [] { return wrong(OUTSIDE, "outside its array"); });
    check("outside shared memory", [] { return wrong(OVERFLOW_SHARED, "past the end of its 252 bytes"); });
    check("an illegal address", [] { return wrong(ILLEGAL, "illegal address"); });
    check("a stack too deep", [] { return wrong(STACK, "illegal address"); });
    check("memory behind an allocation", [] {
        float *p;
        bool found = !cudaMalloc(&p, 256) &&
                     said(launch(call, wrong_kernel, 1, 64, 252, OUTSIDE_MEMORY, p), "illegal address");
        return cudaFree(p) == cudaSuccess && found;
    });
    check("limits", limits);
    check("wrong calls", wrong_calls);
    check("the choice of a kernel", choices);
    check("runtime", runtime);
    check("after all that", block_sums);
    set_order("forward");
    float out[1024];
    double start = seconds();
    launch(call, switch_kernel, 10, 1024, 0, out, 20);
    printf("%.1f ns a switch in shuffles, ", (seconds() - start) * 1e9 / (10 * 1024 * 20 * 5));
    start = seconds();
    launch(call, barrier_kernel, 10, 1024, 0, 100);
    printf("%.1f ns in barriers; %d failed\n", (seconds() - start) * 1e9 / (10 * 1024 * 100), failures);
    return failures;
}
