/* binding.h --- between the files that know Python, and nobody else's: device.c, copy.c, tensor.c, borrow.c,
 * bind.c. */
#ifndef LONGLORA_BINDING_H
#define LONGLORA_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL longlora_numpy
#ifndef IMPORTS_NUMPY /* bind.c does, for all */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "cuda.h"
#include "dlpack.h"
#include "ops.h"

/* ---- arrays ---------------------------------------------------------------------------------- */

extern const char *const dtype_names[DTYPES];
extern const struct DlType {
    uint8_t code, bits;
} dl_types[DTYPES];

static inline int64_t elements_of(const Tensor *t) {
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

static inline int is_contiguous(const Tensor *t) {
    int64_t stride = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] != 1 && t->stride[i] != stride) return elements_of(t) == 0;
        stride *= t->shape[i];
    }
    return 1;
}

static inline void make_dense(Tensor *t) {
    int64_t stride = 1;
    for (int i = t->ndim - 1; i >= 0; stride *= t->shape[i--]) t->stride[i] = stride;
}

/* ---- device.c: devices, streams, and what longlora/cuda.py is made of ------------------------ */

extern PyObject *workspace_hook, *stream_hook; /* of longlora/cuda.py, which sets them */
extern PyMethodDef device_methods[];

/* "cpu", "cuda:0"; as long as the caller's statement lives. */
typedef struct {
    char text[16];
} DeviceName;
DeviceName device_name(int device);

/* 0 when the CUDA device of this index can be used; -1 and why in last_error(). */
int usable(int index);
/* The failure of a call on a device (counted as in Tensor) as an exception, and the error forgotten where it
 * can be; NULL. */
PyObject *cuda_failed(const char *op, int device);
/* The thread's stream for a device; -1 and fail() if it is another device's. */
int own_stream(int device, void **stream);
/* Later work on `stream` of `device` waits for what is queued now on `other` of `other_device`. */
int order(int device, void *stream, int other_device, void *other);
/* The number of the capture that a stream is in, 0 for none, -1 and fail(). */
int64_t capture_of(int device, void *stream);
/* Brings longlora/cuda.py in, which sets the hooks. */
int ready(void);

/* ---- tensor.c: longlora.Tensor --------------------------------------------------------------- */

/* Owns its memory, or borrows a foreign buffer's, or is a view; a view keeps the Tensor that owns or borrows
 * (never another view) alive, so memory goes when the last view does. */
typedef struct {
    PyObject_HEAD Tensor t;
    int readonly, has_buffer, pinned;
    PyObject *base;   /* of a view */
    Py_buffer buffer; /* of wrap() */
    void *memory;     /* of an owner, and its size */
    size_t bytes;
    Py_ssize_t shape[MAX_NDIM], strides[MAX_NDIM]; /* what the buffer protocol hands out, in bytes */
} TensorObject;
extern PyTypeObject *TensorType;
extern PyType_Spec tensor_spec;

static inline int is_tensor(PyObject *object) { return Py_TYPE(object) == TensorType; }

/* ---- copy.c: from anywhere to anywhere ------------------------------------------------------- */

/* On the CPU. Fill: zeros, or the bytes of value; the same dtype: the bytes of x; between floats: through
 * float32. */
typedef struct {
    Tensor out, x;
    char value[8];
    int fill, zero;
} Copy;
void copy_all(const Copy *c);

/* x, whose former work is on x_stream, into out of the same shape on the CPU or on x's device or another;
 * without the GIL. Waits for the copy where one side is the CPU's, unless that is pinned. */
typedef struct {
    Tensor t;
    int pinned;
    void *stream;
} Side;
/* Copies x to out; 0, or -1 with an exception. */
int copy_sides(const char *op, const Side *out, const Side *x, void **stream);

/* ---- borrow.c: arrays of others for one call ------------------------------------------------- */

/* An argument, as its op's spec has it. */
enum { COMMON = -1, ANY = -2 };
typedef struct {
    char name[24], letters[MAX_NDIM + 1];
    int ndim, dtype, optional, in_place, may_alias, free_strides, output, is_int;
} Arg;

/* What must be given back when the call is over: nothing for NumPy and Tensor, a managed tensor or a capsule
 * else. */
typedef struct {
    PyObject *capsule;
    DLManagedTensorVersioned *managed;
    int device;
} Loan;

/* Where a call's work goes: the current stream of the first argument whose library has one in the exchange
 * API (torch), else the hook's answer for the first one (CuPy's current stream), else the thread's own.
 * `like` is that argument. */
typedef struct {
    PyObject *like;
    void *stream;
    enum { NOWHERE, OWN, THEIRS } whose;
} Queue;

int refuse(PyObject *type, const char *op, const Arg *arg, const char *format,
           ...); /* raises "op: argument ..."; -1 */
/* 0, -1 with an exception, or 1: borrow_capsule() is to be called when all other arguments of the call are
 * borrowed, since it needs to know the stream. */
int borrow(PyObject *object, Tensor *t, Loan *loan, Queue *queue, const char *op, const Arg *arg);
int borrow_capsule(PyObject *object, Tensor *t, Loan *loan, Queue *queue, const char *op, const Arg *arg);
/* queue: where work on the loans is queued, NULL if nothing is. */
void give_back(Loan *loans, int count, const Queue *queue);
void release_held(int all); /* see give_back; all: waits for it */

/* ---- bind.c: specs, checks, calls ------------------------------------------------------------ */

int overlap(const Tensor *a, const Tensor *b);

#endif
