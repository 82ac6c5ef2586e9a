/* cublaslt.cpp --- cuBLASLt on the host, as far as cuda/cublaslt.h declares it. gemm.cu finds it when it
 * opens the library. It is strict: it returns an error for all that the real one may refuse (unknown
 * attributes, wrong sizes of them, leading dimensions, layouts that do not fit together, less alignment than
 * the heuristic was promised, no workspace). Sums are float64. LONGLORA_EMULATION_CUBLAS=refuses or none: it
 * has no algorithm, said in either way; fails: its algorithm cannot run. */
#include "../../cuda/cublaslt.h"
#include "emulation.h"

#include <stdlib.h>
#include <string.h>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace lt {
struct HandleOf {
    int unused;
};
struct DescOf {
    int32_t turned_a, turned_b, pointer_mode;
    uint32_t epilogue;
    const void *bias;
};
struct LayoutOf {
    DataType type;
    uint64_t rows, cols;
    int64_t ld;
};
struct PreferenceOf {
    uint64_t workspace;
    uint32_t reductions, align[4];
};
}  // namespace lt
using namespace lt;

EXPORT size_t cublasLtGetVersion() { return 0; }
EXPORT const char *cublasLtGetStatusString(Status status) {
    return status == SUCCESS         ? "success"
           : status == NOT_SUPPORTED ? "not supported"
           : status == INVALID_VALUE ? "invalid value"
                                     : "error";
}
EXPORT Status cublasLtCreate(Handle *handle) {
    *handle = new HandleOf();
    return SUCCESS;
}

EXPORT Status cublasLtMatmulDescCreate(Desc *desc, ComputeType compute, DataType scale) {
    if (compute != COMPUTE_32F || scale != R_32F) return NOT_SUPPORTED;
    *desc = new DescOf{ OP_N, OP_N, POINTER_MODE_HOST, EPILOGUE_DEFAULT, nullptr };
    return SUCCESS;
}
EXPORT Status cublasLtMatmulDescDestroy(Desc desc) {
    delete desc;
    return SUCCESS;
}

template <class T> static Status take(T *to, const void *from, size_t bytes) {
    if (!from || bytes != sizeof *to) return INVALID_VALUE;
    memcpy(to, from, bytes);
    return SUCCESS;
}

EXPORT Status cublasLtMatmulDescSetAttribute(Desc desc, DescAttribute attribute, const void *value,
                                             size_t bytes) {
    switch (attribute) {
        case DESC_POINTER_MODE: return take(&desc->pointer_mode, value, bytes);
        case DESC_TRANSA: return take(&desc->turned_a, value, bytes);
        case DESC_TRANSB: return take(&desc->turned_b, value, bytes);
        case DESC_EPILOGUE: return take(&desc->epilogue, value, bytes);
        case DESC_BIAS_POINTER: return take(&desc->bias, value, bytes);
        default: return INVALID_VALUE;
    }
}

EXPORT Status cublasLtMatrixLayoutCreate(Layout *layout, DataType type, uint64_t rows, uint64_t cols,
                                         int64_t ld) {
    if (!rows || !cols || rows > INT32_MAX || cols > INT32_MAX || ld < (int64_t)rows) return INVALID_VALUE;
    *layout = new LayoutOf{ type, rows, cols, ld };
    return SUCCESS;
}
EXPORT Status cublasLtMatrixLayoutDestroy(Layout layout) {
    delete layout;
    return SUCCESS;
}

EXPORT Status cublasLtMatmulPreferenceCreate(Preference *p) {
    *p = new PreferenceOf{ 0, 7, { 256, 256, 256, 256 } };
    return SUCCESS;
}
EXPORT Status cublasLtMatmulPreferenceDestroy(Preference p) {
    delete p;
    return SUCCESS;
}
EXPORT Status cublasLtMatmulPreferenceSetAttribute(Preference p, PreferenceAttribute attribute,
                                                   const void *value, size_t bytes) {
    switch (attribute) {
        case PREF_WORKSPACE: return take(&p->workspace, value, bytes);
        case PREF_REDUCTIONS: return take(&p->reductions, value, bytes);
        case PREF_ALIGNMENT_A:
        case PREF_ALIGNMENT_B:
        case PREF_ALIGNMENT_C:
        case PREF_ALIGNMENT_D: return take(&p->align[attribute - PREF_ALIGNMENT_A], value, bytes);
        default: return INVALID_VALUE;
    }
}

static bool answers(const char *how) {
    const char *said = getenv("LONGLORA_EMULATION_CUBLAS");
    return said && !strcmp(said, how);
}

/* The algorithm passes the promised alignment from the heuristic to matmul. The mark says that it is ours. */
enum { MARK = 0x4c4f4e47 };

static Status fit(Desc desc, Layout a, Layout b, Layout c, Layout d) {
    uint64_t M = desc->turned_a ? a->cols : a->rows, K = desc->turned_a ? a->rows : a->cols;
    uint64_t N = desc->turned_b ? b->rows : b->cols, K2 = desc->turned_b ? b->cols : b->rows;
    if (K != K2 || c->rows != M || d->rows != M || c->cols != N || d->cols != N) return INVALID_VALUE;
    if (a->type != b->type || c->type != d->type || (d->type != a->type && d->type != R_32F))
        return NOT_SUPPORTED;
    if (desc->epilogue == EPILOGUE_BIAS ? !desc->bias : desc->epilogue != EPILOGUE_DEFAULT)
        return INVALID_VALUE;
    return SUCCESS;
}

EXPORT Status cublasLtMatmulAlgoGetHeuristic(Handle handle, Desc desc, Layout a, Layout b, Layout c, Layout d,
                                             Preference p, int wanted, Heuristic *found, int *count) {
    *count = 0;
    if (!handle || wanted < 1 || p->workspace < 1 << 20 ||
        (p->reductions & ~(unsigned)REDUCTION_COMPUTE_TYPE))
        return INVALID_VALUE;
    if (Status status = fit(desc, a, b, c, d)) return status;
    if (answers("refuses") || answers("none")) return answers("none") ? SUCCESS : NOT_SUPPORTED;
    memset(found, 0, sizeof *found);
    found->algo.data[0] = MARK;
    for (int i = 0; i < 4; i++) found->algo.data[1 + i] = p->align[i];
    found->algo.data[5] = found->workspace = p->workspace;
    *count = 1;
    return SUCCESS;
}

static int64_t bytes_of(DataType type) { return type == R_32F ? 4 : 2; }

static double value(const void *data, int64_t i, DataType type) {
    return type == R_32F    ? ((const float *)data)[i]
           : type == R_16BF ? __bfloat162float(((const __nv_bfloat16 *)data)[i])
                            : __half2float(((const __half *)data)[i]);
}

/* sum[m][n] of TOGETHER rows of a and TOGETHER columns of b, both with k first. */
enum { TOGETHER = 4 };
typedef double Row __attribute__((vector_size(8 * TOGETHER), aligned(8)));
__attribute__((no_sanitize("alignment"))) static void multiply(Row *sum, const double *left,
                                                               const double *right, int64_t K) {
    Row rows[TOGETHER] = {};
    for (int64_t k = 0; k < K; k++)
        for (int i = 0; i < TOGETHER; i++)
            rows[i] += left[k * TOGETHER + i] * *(const Row *)(right + k * TOGETHER);
    memcpy(sum, rows, sizeof rows);
}

/* d[M,N] = alpha a[M,K] b[K,N] + beta c + bias[M]. All matrices are stored by columns. */
EXPORT Status cublasLtMatmul(Handle handle, Desc desc, const void *alpha, const void *A, Layout a,
                             const void *B, Layout b, const void *beta, const void *C, Layout c, void *D,
                             Layout d, const Algo *algo, void *workspace, size_t bytes, void *) {
    if (!handle || !algo || algo->data[0] != MARK || bytes < algo->data[5] || !workspace ||
        (uintptr_t)workspace % 256)
        return INVALID_VALUE;
    if (Status status = fit(desc, a, b, c, d)) return status;
    const void *data[] = { A, B, C, D };
    DataType types[] = { a->type, b->type, c->type, d->type };
    for (int i = 0; i < 4; i++)
        if (!data[i] || (uintptr_t)data[i] % algo->data[1 + i] || (uintptr_t)data[i] % bytes_of(types[i]))
            return INVALID_VALUE;
    if (C == D && c->ld != d->ld) return INVALID_VALUE;
    if (answers("fails")) return EXECUTION_FAILED;
    if (desc->epilogue == EPILOGUE_BIAS && (uintptr_t)desc->bias % 16)
        return INVALID_VALUE; /* the real one sometimes reads an illegal address */
    cudaPointerAttributes alphas, betas;
    cudaPointerGetAttributes(&alphas, alpha), cudaPointerGetAttributes(&betas, beta);
    bool on_device = desc->pointer_mode == POINTER_MODE_DEVICE;
    if ((alphas.type == cudaMemoryTypeDevice) != on_device ||
        (betas.type == cudaMemoryTypeDevice) != on_device)
        return INVALID_VALUE;
    memset(workspace, 0xff, 4096); /* scratch: it may hold nothing else */
    int64_t M = (int64_t)d->rows, N = (int64_t)d->cols, K = (int64_t)(desc->turned_a ? a->rows : a->cols);
    float scale = *(const float *)alpha, keep = *(const float *)beta;
    int64_t groups = (M + TOGETHER - 1) / TOGETHER;
    std::vector<double> left(groups * K * TOGETHER), right(K * TOGETHER);
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++)
            left[(m / TOGETHER * K + k) * TOGETHER + m % TOGETHER] =
                value(A, desc->turned_a ? m * a->ld + k : k * a->ld + m, a->type);
    for (int64_t n0 = 0; n0 < N; n0 += TOGETHER) {
        int columns = N - n0 < TOGETHER ? (int)(N - n0) : TOGETHER;
        for (int n = 0; n < columns; n++)
            for (int64_t k = 0; k < K; k++)
                right[k * TOGETHER + n] =
                    value(B, desc->turned_b ? k * b->ld + n0 + n : (n0 + n) * b->ld + k, b->type);
        for (int64_t group = 0; group < groups; group++) {
            Row sum[TOGETHER];
            multiply(sum, &left[group * K * TOGETHER], right.data(), K);
            for (int64_t m = group * TOGETHER; m < M && m < (group + 1) * TOGETHER; m++)
                for (int n = 0; n < columns; n++) {
                    double x = scale * sum[m % TOGETHER][n] +
                               (keep ? keep * value(C, (n0 + n) * c->ld + m, c->type) : 0);
                    if (desc->epilogue == EPILOGUE_BIAS) x += value(desc->bias, m, d->type);
                    int64_t at = (n0 + n) * d->ld + m;
                    if (d->type == R_32F) ((float *)D)[at] = (float)x;
                    else if (d->type == R_16BF) ((__nv_bfloat16 *)D)[at] = __float2bfloat16_rn((float)x);
                    else ((__half *)D)[at] = __float2half_rn((float)x);
                }
        }
    }
    return SUCCESS;
}
