/* cublaslt.h --- the part of cuBLASLt that gemm.cu uses. It is declared here because some toolkits lack the
 * headers of cuBLAS. CUDA 12 and 13 have the same declarations; if the real header is found, the compiler
 * checks every line against it. */
#ifndef LONGLORA_CUBLASLT_H
#define LONGLORA_CUBLASLT_H

#include <stddef.h>
#include <stdint.h>

namespace lt {

typedef struct HandleOf *Handle;
typedef struct DescOf *Desc;
typedef struct LayoutOf *Layout;
typedef struct PreferenceOf *Preference;

enum Status {
    SUCCESS = 0,
    NOT_INITIALIZED = 1,
    INVALID_VALUE = 7,
    EXECUTION_FAILED = 13,
    NOT_SUPPORTED = 15
};
enum DataType { R_32F = 0, R_16F = 2, R_16BF = 14 };
enum ComputeType { COMPUTE_32F = 68 }; /* float32 inputs are multiplied as float32, not TF32 */
enum Operation { OP_N = 0, OP_T = 1 };
enum DescAttribute {
    DESC_POINTER_MODE = 2,
    DESC_TRANSA = 3,
    DESC_TRANSB = 4,
    DESC_EPILOGUE = 7,
    DESC_BIAS_POINTER = 8
};
enum PointerMode { POINTER_MODE_HOST = 0, POINTER_MODE_DEVICE = 1 }; /* where alpha and beta are */
enum Epilogue { EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4 };
enum PreferenceAttribute {
    PREF_WORKSPACE = 1,
    PREF_REDUCTIONS = 3,
    PREF_ALIGNMENT_A = 5,
    PREF_ALIGNMENT_B = 6,
    PREF_ALIGNMENT_C = 7,
    PREF_ALIGNMENT_D = 8,
};
enum Reduction { REDUCTION_NONE = 0, REDUCTION_COMPUTE_TYPE = 2 };

struct Algo {
    uint64_t data[8];
};
struct Heuristic {
    Algo algo;
    size_t workspace;
    Status state;
    float waves;
    int reserved[4];
};

}  // namespace lt

/* X(name in gemm.cu, name in the library, result, parameters) */
#define FOR_EACH_CUBLASLT(X)                                                                                \
    X(version, cublasLtGetVersion, size_t, ())                                                              \
    X(status_string, cublasLtGetStatusString, const char *, (lt::Status))                                   \
    X(create, cublasLtCreate, lt::Status, (lt::Handle *))                                                   \
    X(desc_create, cublasLtMatmulDescCreate, lt::Status, (lt::Desc *, lt::ComputeType, lt::DataType scale)) \
    X(desc_destroy, cublasLtMatmulDescDestroy, lt::Status, (lt::Desc))                                      \
    X(desc_set, cublasLtMatmulDescSetAttribute, lt::Status,                                                 \
      (lt::Desc, lt::DescAttribute, const void *, size_t))                                                  \
    X(layout_create, cublasLtMatrixLayoutCreate, lt::Status,                                                \
      (lt::Layout *, lt::DataType, uint64_t rows, uint64_t cols, int64_t ld))                               \
    X(layout_destroy, cublasLtMatrixLayoutDestroy, lt::Status, (lt::Layout))                                \
    X(preference_create, cublasLtMatmulPreferenceCreate, lt::Status, (lt::Preference *))                    \
    X(preference_destroy, cublasLtMatmulPreferenceDestroy, lt::Status, (lt::Preference))                    \
    X(preference_set, cublasLtMatmulPreferenceSetAttribute, lt::Status,                                     \
      (lt::Preference, lt::PreferenceAttribute, const void *, size_t))                                      \
    X(heuristic, cublasLtMatmulAlgoGetHeuristic, lt::Status,                                                \
      (lt::Handle, lt::Desc, lt::Layout a, lt::Layout b, lt::Layout c, lt::Layout d, lt::Preference,        \
       int wanted, lt::Heuristic *, int *found))                                                            \
    X(matmul, cublasLtMatmul, lt::Status,                                                                   \
      (lt::Handle, lt::Desc, const void *alpha, const void *a, lt::Layout, const void *b, lt::Layout,       \
       const void *beta, const void *c, lt::Layout, void *d, lt::Layout, const lt::Algo *, void *workspace, \
       size_t bytes, void *stream))

#define DECLARE_CUBLASLT(name, symbol, result, parameters) result(*name) parameters;
struct CublasLt {
    FOR_EACH_CUBLASLT(DECLARE_CUBLASLT)
};
#undef DECLARE_CUBLASLT

#if !defined LONGLORA_EMULATION && __has_include(<cublasLt.h>)
#include <cublasLt.h>
#include <type_traits>

/* Equally many parameters, of equal sizes, with pointers in the same places. */
template <class R, class... P, class S, class... Q> constexpr bool alike(R (*)(P...), S (*)(Q...)) {
    return sizeof(R) == sizeof(S) &&
           ((sizeof(P) == sizeof(Q) && std::is_pointer<P>::value == std::is_pointer<Q>::value) && ...);
}
#define CHECK(name, symbol, result, parameters)                                      \
    static_assert(alike((decltype(&symbol))nullptr, (result(*) parameters) nullptr), \
                  #symbol " is not what cublaslt.h says");
FOR_EACH_CUBLASLT(CHECK)
#undef CHECK
#define CHECK(ours, theirs) \
    static_assert((int)lt::ours == (int)theirs, #theirs " is not what cublaslt.h says");
CHECK(SUCCESS, CUBLAS_STATUS_SUCCESS)
CHECK(NOT_INITIALIZED, CUBLAS_STATUS_NOT_INITIALIZED)
CHECK(INVALID_VALUE, CUBLAS_STATUS_INVALID_VALUE)
CHECK(EXECUTION_FAILED, CUBLAS_STATUS_EXECUTION_FAILED)
CHECK(NOT_SUPPORTED, CUBLAS_STATUS_NOT_SUPPORTED)
CHECK(R_32F, CUDA_R_32F)
CHECK(R_16F, CUDA_R_16F)
CHECK(R_16BF, CUDA_R_16BF)
CHECK(COMPUTE_32F, CUBLAS_COMPUTE_32F)
CHECK(OP_N, CUBLAS_OP_N)
CHECK(OP_T, CUBLAS_OP_T)
CHECK(DESC_POINTER_MODE, CUBLASLT_MATMUL_DESC_POINTER_MODE)
CHECK(DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSA)
CHECK(DESC_TRANSB, CUBLASLT_MATMUL_DESC_TRANSB)
CHECK(DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_EPILOGUE)
CHECK(DESC_BIAS_POINTER, CUBLASLT_MATMUL_DESC_BIAS_POINTER)
CHECK(POINTER_MODE_HOST, CUBLASLT_POINTER_MODE_HOST)
CHECK(POINTER_MODE_DEVICE, CUBLASLT_POINTER_MODE_DEVICE)
CHECK(EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_DEFAULT)
CHECK(EPILOGUE_BIAS, CUBLASLT_EPILOGUE_BIAS)
CHECK(PREF_WORKSPACE, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
CHECK(PREF_REDUCTIONS, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)
CHECK(PREF_ALIGNMENT_A, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES)
CHECK(PREF_ALIGNMENT_B, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES)
CHECK(PREF_ALIGNMENT_C, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES)
CHECK(PREF_ALIGNMENT_D, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES)
CHECK(REDUCTION_NONE, CUBLASLT_REDUCTION_SCHEME_NONE)
CHECK(REDUCTION_COMPUTE_TYPE, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)
#undef CHECK
static_assert(sizeof(lt::Algo) == sizeof(cublasLtMatmulAlgo_t) &&
                  sizeof(lt::Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t) &&
                  offsetof(lt::Heuristic, workspace) ==
                      offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize) &&
                  offsetof(lt::Heuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state),
              "lt::Heuristic is not what the library has");
#endif

#endif
