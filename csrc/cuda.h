/* cuda.h --- what the binding needs of CUDA besides the ops: devices, memory, copies, streams. cuda/device.cu
 * and cuda/copy.cu implement it; a build without CUDA has none of it. No Python, and none of CUDA's headers.
 *
 * Functions return 0, or -1 after fail("CUDA: ..."). The device of `stream` (a cudaStream_t) must be entered
 * when work is queued on it. */
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
    int (*count)(void);        /* the number of devices, or -1 and the reason if there are none */
    int (*usable)(int device); /* 0, or -1 and the reason: no such device, or no code for it */
    int (*properties)(int device, CudaProperties *properties);
    void (*versions)(int *driver, int *runtime); /* 13000 for 13.0; driver 0 without one */

    /* Makes the device the thread's current one. leave() takes the result and restores the former device. */
    int (*enter)(int device);
    void (*leave)(int entered);
    /* Fills in the parts of a call that describe the entered device. */
    int (*describe)(CudaCall *call);
    /* Clears the error of the thread's failed call, so that later calls do not report it. Returns 1 if the
     * error stays because the process has lost the device, for example by an illegal address in a kernel. */
    int (*recover)(int device);

    /* Memory of the entered device, or pinned memory of the host, which all devices copy in the background.
     * Both functions that release memory wait until all work queued before has run. */
    int (*allocate)(int64_t bytes, void **memory);
    void (*release)(void *memory);
    int (*allocate_pinned)(int64_t bytes, void **memory);
    void (*release_pinned)(void *memory);
    int (*memory)(int64_t *free, int64_t *total);

    /* Copies between tensors of one shape with any strides and converts floats. Each tensor is on the entered
     * device or pinned. */
    int (*copy)(const Tensor *out, const Tensor *x, void *stream);
    int (*fill)(const Tensor *out, const void *value, void *stream); /* value points to one element */
    /* Copies dense bytes between any two places, also host memory that is not pinned. */
    int (*copy_bytes)(void *to, const void *from, int64_t bytes, void *stream);
    int (*copy_peer)(void *to, int to_device, const void *from, int from_device, int64_t bytes, void *stream);

    int (*synchronize)(void *stream); /* waits for all work queued on it */
    int (*synchronize_device)(void);
    int (*stream_device)(void *stream, int *device); /* -1: the default streams, which each device has */
    int64_t (*capture)(void *stream);                /* the number of its capture, 0 if none, or -1 */
    /* A mark follows the work queued on a stream so far. Streams of any device can wait for it; the host can
     * ask whether it has passed, or wait. */
    int (*mark)(void *stream, void **mark);
    int (*wait)(void *stream, void *mark);
    int (*passed)(void *mark); /* 1, 0, or -1 */
    int (*await)(void *mark);
    void (*forget)(void *mark);

    void (*cublas_paths)(const char *const *names, int count); /* see below */
    int64_t (*cublas_version)(const char **path);
} CudaRuntime;

extern const CudaRuntime cuda_runtime;
extern const CudaRuntime *const cuda; /* NULL in a build without CUDA: see ops.c */

/* In cuda/device.cu: a row of the table that copy.cu calls too. */
int describe_device(CudaCall *call);

/* In cuda/copy.cu: the two rows of the table that have kernels. */
int copy_tensor(const Tensor *out, const Tensor *x, void *stream);
int fill_tensor(const Tensor *out, const void *value, void *stream);

/* In cuda/gemm.cu. cublas_paths: further places to look for cuBLASLt; the names are copied. cublas_version:
 * the version and the file in use, loaded if necessary, or -1 after fail(). */
void cublas_paths(const char *const *names, int count);
int64_t cublas_version(const char **path);

#ifdef __cplusplus
}
#endif

#endif
