/* longlora.h --- what all C and CUDA code shares: arrays as the kernels see them, dtypes, errors, calls. No
 * Python.
 *
 * A Tensor is borrowed: the caller owns the memory and keeps it until the call returns. Kernels write results
 * where they are told to, and allocate nothing that outlives the call. */
#ifndef LONGLORA_H
#define LONGLORA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { F32, BF16, F16, F64, I32, I64, U8, DTYPES } DType;

enum { MAX_NDIM = 4 };

typedef struct {
    void *data; /* NULL if an optional argument is not given; not the tensor's own memory if it is empty */
    int64_t shape[MAX_NDIM];
    int64_t stride[MAX_NDIM]; /* in elements; 0 for a broadcast input axis */
    int32_t ndim;             /* -1: an optional argument that was not given */
    int32_t dtype;            /* DType */
    int32_t device;           /* 0: CPU, n + 1: CUDA device n; the same for all tensors of a call */
} Tensor;

static inline int given(const Tensor *t) { return t->ndim >= 0; }

/* What a call on a GPU gets besides its arguments. It queues its work on `stream` and does not wait. */
typedef struct {
    void *stream;    /* cudaStream_t of the caller */
    void *workspace; /* device memory, 256-byte aligned, for the time of the call's work on the stream */
    int64_t workspace_bytes; /* as many as the op's workspace function asked for */
    int32_t device;          /* the CUDA device, which is the current one */
    int32_t sm;              /* its compute capability, 90 for 9.0 */
    int32_t shared_bytes;    /* shared memory that a block can have on it, dynamic and static together */
} CudaCall;

/* Records the message for the calling thread and returns -1. The binding turns it into an exception. */
int fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
const char *last_error(void);

#ifdef __cplusplus
}
#endif

#endif
