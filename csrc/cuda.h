/* cuda.h --- what the binding asks of CUDA beside the ops: devices, memory, copies, streams. Answered by
 * cuda/device.cu and cuda/copy.cu; a build without CUDA has none of it. No Python, and none of CUDA's
 * headers.
 *
 * Functions return 0, or -1 after fail("CUDA: ..."). Work is queued on `stream` (a cudaStream_t) with its
 * device entered. */
#ifndef LONGLORA_CUDA_H
#define LONGLORA_CUDA_H

#include "longlora.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MAX_DEVICES = 64, OLDEST_SM = 80 };

typedef struct {
    char name[256], bus[32];
    int sm, multiprocessors; /* 90 for compute capability 9.0 */
} CudaProperties;

typedef struct {
    const char *built_for;     /* "80 90a 100 120", or "emulation" */
    int (*count)(void);        /* how many devices there are; -1 and why, if there are none */
    int (*usable)(int device); /* -1 and why this one is not: it does not exist, or is older than OLDEST_SM */
    int (*properties)(int device, CudaProperties *properties);
    void (*versions)(int *driver, int *runtime); /* 13000 for 13.0; driver 0 without one */

    /* Makes the device the thread's current one -> what leave() takes to make the former one current again.
     */
    int (*enter)(int device);
    void (*leave)(int entered);
    /* After a failed call of the thread: forgets the error, so that later calls do not see it -> 1 if that
     * cannot be done, because the process has lost the device (an illegal address in a kernel, say). */
    int (*recover)(int device);

    /* Memory of the entered device; pinned: of the host, that every device copies from and to in the
     * background. Memory is free for others when all work that was queued before has run: both wait for it.
     */
    int (*allocate)(int64_t bytes, void **memory);
    void (*release)(void *memory);
    int (*allocate_pinned)(int64_t bytes, void **memory);
    void (*release_pinned)(void *memory);
    int (*memory)(int64_t *free, int64_t *total);

    /* Between tensors of one shape, any strides, each on the entered device or pinned, floats converted. */
    int (*copy)(const Tensor *out, const Tensor *x, void *stream);
    int (*fill)(const Tensor *out, const void *value, void *stream); /* value: one element */
    /* Dense bytes: from anywhere to anywhere, host memory that is not pinned included. */
    int (*copy_bytes)(void *to, const void *from, int64_t bytes, void *stream);
    int (*copy_peer)(void *to, int to_device, const void *from, int from_device, int64_t bytes, void *stream);

    int (*synchronize)(void *stream); /* waits for what was queued on it */
    int (*synchronize_device)(void);
    int (*stream_device)(void *stream, int *device); /* -1: every device's, as the default streams are */
    int64_t (*capture)(void *stream);                /* the number of the capture it is in, 0: none, -1 */
    /* A mark on a stream; later streams, of any device, wait for it; the host asks whether it has passed, or
     * waits. */
    int (*mark)(void *stream, void **mark);
    int (*wait)(void *stream, void *mark);
    int (*passed)(void *mark); /* 1, 0, or -1 */
    int (*await)(void *mark);
    void (*forget)(void *mark);

    void (*cublas_paths)(const char *const *names, int count); /* of cuda/gemm.cu, see below */
    int64_t (*cublas_version)(const char **path);
} CudaRuntime;

extern const CudaRuntime cuda_runtime;
extern const CudaRuntime *const cuda; /* NULL in a build without CUDA: see ops.c */

/* Of cuda/copy.cu: the two rows of the table with kernels. */
int copy_tensor(const Tensor *out, const Tensor *x, void *stream);
int fill_tensor(const Tensor *out, const void *value, void *stream);

/* Of cuda/gemm.cu: where to look for cuBLASLt beside the process and the system, copied; and what is used,
 * loaded if need be: its version and file, or -1 after fail(). */
void cublas_paths(const char *const *names, int count);
int64_t cublas_version(const char **path);

#ifdef __cplusplus
}
#endif

#endif
