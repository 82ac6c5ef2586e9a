/* gemm.cu --- the matrix product, and the only file that knows cuBLAS.
 *
 * cuBLASLt multiplies inputs of one dtype that have a dense axis each, with float32 sums, into that dtype or
 * float32. Float32 is multiplied as float32, not as TF32. A plain kernel in this file does the rest: mixed
 * dtypes, other strides, K = 0, and products that cuBLASLt has no algorithm for.
 *
 * The first product opens the library: the file named by LONGLORA_CUBLAS, else the copy that the process has
 * already loaded (torch's), else the paths that Python found, else the system's. It is never closed.
 *
 * The descriptors and the algorithm of a product are made once and kept in a table of fixed size. A sum over
 * K is not split, or its parts are added in float32 in a second step (REDUCTION_COMPUTE_TYPE); never in place
 * and never in the output's dtype. The algorithm depends on shapes, strides, dtypes, alignment, device and
 * library only, so equal inputs give equal bits. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* dladdr */
#endif
#include "gemm.cuh"
#include "cublaslt.h"

#include <dlfcn.h>
#include <initializer_list>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the library ----------------------------------------------------------------------------- */

enum { DEVICES = 64, PATHS = 16, PATH_BYTES = 1024 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* protects everything static in this file */
static CublasLt lib;
static bool loaded;
static char loaded_path[PATH_BYTES], paths[PATHS][PATH_BYTES];
static int path_count;
static lt::Handle handles[DEVICES];

/* 0, or -1 with the reason in `why`. */
static int open_library(const char *name, int flags, char (&why)[512]) {
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL | flags);
    if (!library) {
        const char *error = dlerror();
        snprintf(why, sizeof why, "%s", error ? error : name);
        return -1;
    }
    CublasLt found;
#define FIND(function, symbol, result, parameters)                           \
    if (!(found.function = (result(*) parameters)dlsym(library, #symbol))) { \
        snprintf(why, sizeof why, "%s has no %s", name, #symbol);            \
        return -1;                                                           \
    }
    FOR_EACH_CUBLASLT(FIND)
#undef FIND
    Dl_info info;
    bool known = dladdr((void *)found.version, &info) && info.dli_fname;
    snprintf(loaded_path, sizeof loaded_path, "%s", known ? info.dli_fname : name);
    lib = found;
    loaded = true;
    return 0;
}

static int load_library() {
    static const char *const names[] = { "libcublasLt.so.13", "libcublasLt.so.12" };
    char why[512] = "";
    int driver = 0;
    if (loaded) return 0;
    const char *wanted = getenv("LONGLORA_CUBLAS");
    if (wanted && *wanted)
        return open_library(wanted, 0, why) ? fail("cuBLAS was not found at LONGLORA_CUBLAS: %s", why) : 0;
#ifdef LONGLORA_EMULATION
    Dl_info self; /* an emulated build contains a cuBLASLt */
    if (dladdr((void *)load_library, &self) && !open_library(self.dli_fname, 0, why)) return 0;
#endif
    for (const char *name : names)
        if (!open_library(name, RTLD_NOLOAD, why)) return 0;
    for (int i = 0; i < path_count; i++)
        if (!open_library(paths[i], 0, why)) return 0;
    CUDA_TRY(cudaDriverGetVersion(&driver));
    for (int i = driver >= 13000 ? 0 : 1; i < 2; i++)
        if (!open_library(names[i], 0, why)) return 0;
    return fail(
        "cuBLAS was not found in the process, in a pip package (pip install nvidia-cublas for CUDA 13, "
        "nvidia-cublas-cu12 for CUDA 12) or in the system; "
        "LONGLORA_CUBLAS=/path/libcublasLt.so.13 sets its path");
}

/* Sets further paths for the first product to try. They are copied. */
extern "C" void cublas_paths(const char *const *names, int count) {
    pthread_mutex_lock(&lock);
    path_count = 0;
    for (int i = 0; i < count && i < PATHS; i++) snprintf(paths[path_count++], PATH_BYTES, "%s", names[i]);
    pthread_mutex_unlock(&lock);
}

/* The version in use, as cublasLtGetVersion returns it, and its file. Loads the library if necessary; -1
 * after fail() if there is none. */
extern "C" int64_t cublas_version(const char **path) {
    pthread_mutex_lock(&lock);
    int64_t version = load_library() ? -1 : (int64_t)lib.version();
    *path = loaded_path;
    pthread_mutex_unlock(&lock);
    return version;
}

/* ---- plans ----------------------------------------------------------------------------------- */

/* All that the choice of an algorithm depends on. cuBLASLt stores columns, so its matrices are ours
 * transposed: d[N,M] = b' a' + c + bias. */
struct Key {
    int64_t M, N, K, a_ld, b_ld, c_ld, d_ld;
    int32_t device, in, out;
    bool a_turned, b_turned, bias, scalars;
    uint16_t a_align, b_align, c_align, d_align, bias_align, unused2[3];
};
static_assert(sizeof(Key) == 88 && sizeof(Key) % 8 == 0, "no gaps: keys are compared as bytes");

struct Plan {
    Key key; /* M is 0 in an empty place */
    lt::Desc desc;
    lt::Layout a, b, c, d;
    lt::Algo algo;
    bool refused; /* cuBLASLt has no algorithm */
    uint64_t used;
};

enum { PLANS = 512, PROBES = 8 };
static Plan plans[PLANS];
static uint64_t clock_;

static int check(lt::Status status, const char *what) {
    return status == lt::SUCCESS ? 0 : fail("cuBLAS: %s: %s", what, lib.status_string(status));
}
#define LT_TRY(call_, what_)                \
    do {                                    \
        if (check(call_, what_)) return -1; \
    } while (0)

static uint16_t alignment(const void *p) {
    uintptr_t bits = (uintptr_t)p | 256;
    return (uint16_t)(bits & -bits);
}

static lt::DataType type_of(int32_t dtype) {
    return dtype == F32 ? lt::R_32F : dtype == BF16 ? lt::R_16BF : lt::R_16F;
}

static void forget(Plan *p) {
    if (p->desc) lib.desc_destroy(p->desc);
    const lt::Layout layouts[] = { p->a, p->b, p->c, p->d };
    for (lt::Layout layout : layouts)
        if (layout) lib.layout_destroy(layout);
    memset(p, 0, sizeof *p);
}

static int choose_algorithm(Plan *p, lt::Preference wanted, lt::Handle handle) {
    const Key &k = p->key;
    uint64_t workspace = GEMM_WORKSPACE;
    uint32_t reductions = lt::REDUCTION_NONE | lt::REDUCTION_COMPUTE_TYPE;
    uint32_t align[] = { k.b_align, k.a_align, k.c_align, k.d_align };
    LT_TRY(lib.preference_set(wanted, lt::PREF_WORKSPACE, &workspace, sizeof workspace), "workspace");
    LT_TRY(lib.preference_set(wanted, lt::PREF_REDUCTIONS, &reductions, sizeof reductions), "reductions");
    for (int i = 0; i < 4; i++)
        LT_TRY(lib.preference_set(wanted, (lt::PreferenceAttribute)(lt::PREF_ALIGNMENT_A + i), &align[i],
                                  sizeof align[i]),
               "alignment");
    lt::Heuristic found;
    int count = 0;
    lt::Status status = lib.heuristic(handle, p->desc, p->a, p->b, p->c, p->d, wanted, 1, &found, &count);
    p->refused = status == lt::NOT_SUPPORTED || status == lt::INVALID_VALUE ||
                 (status == lt::SUCCESS && (!count || found.state != lt::SUCCESS));
    if (p->refused) return 0;
    LT_TRY(status, "no algorithm");
    p->algo = found.algo;
    return 0;
}

/* Sets the bias, if there is one, before the heuristic runs: it may look at the address. */
static int make(Plan *p, const Key &key, const void *bias, lt::Handle handle) {
    p->key = key;
    LT_TRY(lib.desc_create(&p->desc, lt::COMPUTE_32F, lt::R_32F), "product");
    int32_t turned = lt::OP_T, in_device_memory = lt::POINTER_MODE_DEVICE;
    uint32_t epilogue = lt::EPILOGUE_BIAS;
    if (key.b_turned) LT_TRY(lib.desc_set(p->desc, lt::DESC_TRANSA, &turned, sizeof turned), "transpose");
    if (key.a_turned) LT_TRY(lib.desc_set(p->desc, lt::DESC_TRANSB, &turned, sizeof turned), "transpose");
    if (key.scalars)
        LT_TRY(lib.desc_set(p->desc, lt::DESC_POINTER_MODE, &in_device_memory, sizeof in_device_memory),
               "scalars");
    if (key.bias) {
        LT_TRY(lib.desc_set(p->desc, lt::DESC_EPILOGUE, &epilogue, sizeof epilogue), "bias");
        LT_TRY(lib.desc_set(p->desc, lt::DESC_BIAS_POINTER, &bias, sizeof bias), "bias");
    }
    lt::DataType in = type_of(key.in), out = type_of(key.out);
    uint64_t M = (uint64_t)key.M, N = (uint64_t)key.N, K = (uint64_t)key.K;
    LT_TRY(lib.layout_create(&p->a, in, key.b_turned ? K : N, key.b_turned ? N : K, key.b_ld), "layout");
    LT_TRY(lib.layout_create(&p->b, in, key.a_turned ? M : K, key.a_turned ? K : M, key.a_ld), "layout");
    LT_TRY(lib.layout_create(&p->c, out, N, M, key.c_ld), "layout");
    LT_TRY(lib.layout_create(&p->d, out, N, M, key.d_ld), "layout");
    lt::Preference wanted;
    LT_TRY(lib.preference_create(&wanted), "preference");
    int status = choose_algorithm(p, wanted, handle);
    lib.preference_destroy(wanted);
    return status;
}

/* The plan of a product. A new one replaces the one among PROBES places that was not used for longest. NULL
 * after fail(). */
static Plan *plan_of(const Key &key, const void *bias, lt::Handle handle) {
    uint64_t hash = 0, word;
    for (size_t i = 0; i < sizeof key; i += 8) {
        memcpy(&word, (const char *)&key + i, 8);
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    Plan *oldest = NULL;
    for (int i = 0; i < PROBES; i++) {
        Plan *p = &plans[(hash + (uint64_t)i) % PLANS];
        if (p->key.M && !memcmp(&p->key, &key, sizeof key)) {
            p->used = ++clock_;
            return p;
        }
        if (!oldest || p->used < oldest->used) oldest = p;
    }
    forget(oldest);
    if (make(oldest, key, bias, handle)) {
        forget(oldest);
        return NULL;
    }
    oldest->used = ++clock_;
    return oldest;
}

/* 0, -1 after fail(), or 1 if cuBLASLt has no algorithm. The caller holds the lock, because the bias is an
 * attribute of a shared descriptor. */
static int multiply(const CudaCall *call, const Gemm &g, const Key &key) {
    if (load_library()) return -1;
    if (call->device < 0 || call->device >= DEVICES) return fail("cuBLAS: no device %d", (int)call->device);
    if (call->workspace_bytes < GEMM_WORKSPACE) return fail("cuBLAS: no workspace");
    lt::Handle &handle = handles[call->device];
    if (!handle) LT_TRY(lib.create(&handle), "could not start");
    Plan *p = plan_of(key, g.bias, handle);
    if (!p) return -1;
    if (p->refused) return 1;
    if (g.bias) LT_TRY(lib.desc_set(p->desc, lt::DESC_BIAS_POINTER, &g.bias, sizeof g.bias), "bias");
    const float *alpha = g.scalars ? g.scalars : &g.alpha,
                *beta = g.scalars ? g.scalars + (g.beta != 0 ? 2 : 1) : &g.beta;
    LT_TRY(lib.matmul(handle, p->desc, alpha, g.b.data, p->a, g.a.data, p->b, beta, g.from, p->c, g.c, p->d,
                      &p->algo, call->workspace, GEMM_WORKSPACE, call->stream),
           "product");
    return 0;
}

/* ---- the plain kernel ------------------------------------------------------------------------ */

enum { TILE = 64, DEPTH = 16, EACH = 4, BLOCK = TILE / EACH * (TILE / EACH) };

static __device__ __forceinline__ float element(const void *data, int64_t i, int32_t dtype) {
    return dtype == F32    ? ((const float *)data)[i]
           : dtype == BF16 ? to_float(((const bf16 *)data)[i])
                           : to_float(((const f16 *)data)[i]);
}

/* A block computes a tile of c, a thread 4x4 elements of it, 16 apart. Tiles of a and b are in shared memory
 * as float32, k first. Loads follow the axis with the smaller stride. Each sum is in order of rising k. */
static __global__ void __launch_bounds__(BLOCK) plain_kernel(Gemm g) {
    __shared__ float a[DEPTH][TILE + 1], b[DEPTH][TILE + 1];
    int64_t across = ceil_div(g.N, TILE), m0 = blockIdx.x / across * TILE, n0 = blockIdx.x % across * TILE;
    int x = threadIdx.x % (TILE / EACH), y = threadIdx.x / (TILE / EACH);
    bool a_by_k = g.a.col <= g.a.row, b_by_k = g.b.row < g.b.col;
    float sum[EACH][EACH] = {};
    for (int64_t k0 = 0; k0 < g.K; k0 += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * DEPTH; i += BLOCK) {
            int k = a_by_k ? i % DEPTH : i / TILE, m = a_by_k ? i / DEPTH : i % TILE;
            bool there = k0 + k < g.K && m0 + m < g.M;
            a[k][m] = there ? element(g.a.data, (m0 + m) * g.a.row + (k0 + k) * g.a.col, g.a.dtype) : 0.0f;
            k = b_by_k ? i % DEPTH : i / TILE;
            int n = b_by_k ? i / DEPTH : i % TILE;
            there = k0 + k < g.K && n0 + n < g.N;
            b[k][n] = there ? element(g.b.data, (k0 + k) * g.b.row + (n0 + n) * g.b.col, g.b.dtype) : 0.0f;
        }
        __syncthreads();
        for (int k = 0; k < DEPTH; k++) {
            float u[EACH], v[EACH];
            for (int i = 0; i < EACH; i++)
                u[i] = a[k][y + i * (TILE / EACH)], v[i] = b[k][x + i * (TILE / EACH)];
            for (int i = 0; i < EACH; i++)
                for (int j = 0; j < EACH; j++) sum[i][j] = fmaf(u[i], v[j], sum[i][j]);
        }
    }
    float alpha = g.scalars ? *g.scalars : g.alpha;
    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < EACH; j++) {
            int64_t m = m0 + y + i * (TILE / EACH), n = n0 + x + j * (TILE / EACH);
            if (m >= g.M || n >= g.N) continue;
            float value = alpha * sum[i][j];
            if (g.beta != 0) value += g.beta * element(g.from, m * g.from_row + n, g.c_dtype);
            if (g.bias) value += element(g.bias, n, g.c_dtype);
            int64_t at = m * g.c_row + n;
            if (g.c_dtype == F32) ((float *)g.c)[at] = value;
            else if (g.c_dtype == BF16) ((bf16 *)g.c)[at] = from_float<bf16>(value);
            else ((f16 *)g.c)[at] = from_float<f16>(value);
        }
}

/* ---- which of the two ------------------------------------------------------------------------ */

/* Whether a matrix has a dense axis and distinct elements, as cuBLASLt requires. turned: its columns are
 * dense. */
static bool dense(const Matrix &m, int64_t rows, int64_t cols, int64_t *ld, bool *turned) {
    if ((m.col == 1 || cols == 1) && (m.row >= cols || rows == 1)) {
        *ld = rows == 1 ? cols : m.row, *turned = false;
        return true;
    }
    *ld = cols == 1 ? rows : m.col, *turned = true;
    return (m.row == 1 || rows == 1) && (m.col >= rows || cols == 1);
}

/* The preferences cannot state the alignment of the bias, and an algorithm may read it in vectors. */
enum { BIAS_ALIGNMENT = 16 };

static bool fits(const Gemm &g, int32_t device, Key *k) {
    memset(k, 0, sizeof *k);
    k->M = g.M, k->N = g.N, k->K = g.K, k->device = device, k->in = g.a.dtype, k->out = g.c_dtype,
    k->bias = g.bias != NULL;
    k->scalars = g.scalars != NULL;
    k->d_ld = g.M == 1 ? g.N : g.c_row, k->c_ld = g.M == 1 ? g.N : g.from_row;
    k->a_align = alignment(g.a.data), k->b_align = alignment(g.b.data), k->c_align = alignment(g.from);
    k->d_align = alignment(g.c), k->bias_align = alignment(g.bias);
    int64_t element = size_of(g.a.dtype), out = size_of(g.c_dtype);
    return g.a.dtype == g.b.dtype && (g.c_dtype == g.a.dtype || g.c_dtype == F32) && g.K > 0 &&
           g.M <= INT32_MAX && g.N <= INT32_MAX && g.K <= INT32_MAX &&
           dense(g.a, g.M, g.K, &k->a_ld, &k->a_turned) && dense(g.b, g.K, g.N, &k->b_ld, &k->b_turned) &&
           k->d_ld >= g.N && k->c_ld >= g.N && k->a_align >= element && k->b_align >= element &&
           k->c_align >= out && k->d_align >= out && k->bias_align >= BIAS_ALIGNMENT;
}

int gemm(const CudaCall *call, const Gemm &given) {
    if (!given.M || !given.N) return 0;
    Gemm g = given;
    if (!g.from || g.beta == 0) g.from = g.c, g.from_row = g.c_row;
    Key key;
    if (fits(g, call->device, &key)) {
        pthread_mutex_lock(&lock);
        int status = multiply(call, g, key);
        pthread_mutex_unlock(&lock);
        if (status <= 0) return status;
    }
    return launch(call, plain_kernel, dim3((unsigned)(ceil_div(g.M, TILE) * ceil_div(g.N, TILE))), BLOCK, 0,
                  g);
}
