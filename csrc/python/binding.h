/* binding.h --- what the files of this folder share. Nothing outside of it includes Python.h. */
#ifndef LONGLORA_BINDING_H
#define LONGLORA_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL longlora_numpy
#ifndef IMPORTS_NUMPY /* bind.c imports NumPy for all files */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include <stdatomic.h>

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

extern PyObject *workspace_hook, *stream_hook; /* functions of longlora/cuda.py, which sets them */
extern PyMethodDef device_methods[];

/* "cpu" or "cuda:0"; text lives as long as the caller's statement. */
typedef struct {
    char text[16];
} DeviceName;
DeviceName device_name(int device);

/* 0 if the CUDA device of this index can be used; else -1 after fail(). */
int usable(int index);
/* Turns the failure of a call on a device (numbered as in Tensor) into an exception, and clears the error on
 * the device if that is possible. Returns NULL. */
PyObject *cuda_failed(const char *op, int device);
/* The thread's stream for a device; -1 after fail() if it belongs to another device. */
int own_stream(int device, void **stream);
/* Makes later work on `stream` of `device` wait for what is queued now on `other` of `other_device`. */
int order(int device, void *stream, int other_device, void *other);
/* The number of the capture that a stream is in; 0 if there is none; -1 after fail(). */
static inline int64_t capture_of(int device, void *stream) {
    int entered = cuda->enter(device - 1);
    int64_t capture = entered < 0 ? -1 : cuda->capture(stream);
    cuda->leave(entered);
    return capture;
}
/* Imports longlora/cuda.py, which sets the hooks. 0, or -1 with an exception. */
int ready(void);

/* ---- tensor.c: longlora.Tensor --------------------------------------------------------------- */

/* A Tensor owns its memory, or borrows a buffer's, or is a view. A view keeps the Tensor that owns or borrows
 * alive, never another view, so memory is freed with its last view. */
typedef struct {
    PyObject_HEAD Tensor t;
    int readonly, has_buffer, pinned;
    PyObject *base;   /* a view's */
    Py_buffer buffer; /* from wrap() */
    void *memory;     /* an owner's, of `bytes` bytes */
    size_t bytes;
    Py_ssize_t shape[MAX_NDIM], strides[MAX_NDIM]; /* for the buffer protocol; strides in bytes */
} TensorObject;
extern PyTypeObject *TensorType;
extern PyType_Spec tensor_spec;

static inline int is_tensor(PyObject *object) { return Py_TYPE(object) == TensorType; }

/* A new Tensor on `device` with the contents of self; NULL with an exception. */
TensorObject *copy_to(TensorObject *self, int device, const char *op);

/* ---- export.c: the memory of a Tensor for other libraries ------------------------------------ */

/* Methods of Tensor. */
PyObject *tensor_numpy(PyObject *object, PyObject *unused);
PyObject *tensor_array(PyObject *object, PyObject *args, PyObject *kwargs);
int tensor_getbuffer(PyObject *object, Py_buffer *view, int flags);
PyObject *tensor_dlpack(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *tensor_dlpack_device(PyObject *object, PyObject *unused);

/* ---- copy.c: copies between devices, dtypes and strides -------------------------------------- */

/* On the CPU: sets each element to `value` if `fill`, else copies x. Bytes are copied between equal dtypes,
 * floats are converted between different ones. */
typedef struct {
    Tensor out, x;
    char value[8];
    int fill, zero; /* zero: value is all zeros */
} Copy;
void copy_all(const Copy *c);

/* One side of a copy. Earlier work on t is queued on `stream`. */
typedef struct {
    Tensor t;
    int pinned;
    void *stream;
} Side;
/* Copies x to out, of the same shape, each on the CPU or on any device. Waits for the copy if one side is
 * memory of the CPU that is not pinned. *stream is where the copy is queued. 0, or -1 with an exception. */
int copy_sides(const char *op, const Side *out, const Side *x, void **stream);

/* ---- held.c: capsules that wait for queued work ---------------------------------------------- */

/* Takes over the reference to a capsule and gives it back when the work queued on the stream has run. During
 * a capture it gives it back at once: the owner of the graph keeps its memory, and marks cannot be asked then
 * whether they have passed. */
void hold(PyObject *capsule, int device, void *stream);
/* Gives held capsules back: those whose work has run, or all of them, after waiting. */
void release_held(int all);

/* ---- borrow.c: arrays of other libraries for one call ---------------------------------------- */

/* An argument, as described by its op's spec. */
enum { COMMON = -1, ANY = -2 };
typedef struct {
    char name[24], letters[MAX_NDIM + 1];
    int ndim, dtype, optional, in_place, may_alias, free_strides, output, is_int;
} Arg;

/* What must be given back after the call: a managed tensor or a capsule, nothing for NumPy and Tensor. */
typedef struct {
    PyObject *capsule;
    DLManagedTensorVersioned *managed;
    int device;
} Loan;

/* Which stream a call's work goes to: the current stream of the first argument whose library has one in the
 * DLPack exchange API (torch); else what stream_hook returns for the first argument (CuPy's current stream);
 * else the thread's own stream. `like` is that argument. */
typedef struct {
    PyObject *like;
    void *stream;
    enum { NOWHERE, OWN, THEIRS } whose;
} Queue;

/* Raises "op: argument ..." and returns -1. */
int refuse(PyObject *type, const char *op, const Arg *arg, const char *format, ...);
/* 0, -1 with an exception, or 1 if borrow_capsule() must be called after borrow() of all other arguments,
 * because it needs the stream. */
int borrow(PyObject *object, Tensor *t, Loan *loan, Queue *queue, const char *op, const Arg *arg);
int borrow_capsule(PyObject *object, Tensor *t, Loan *loan, Queue *queue, const char *op, const Arg *arg);
/* queue: where work on the loans is queued, NULL if none is. Capsules are held until that work has run. */
void give_back(Loan *loans, int count, const Queue *queue);

/* ---- spec.c: specs and checks ---------------------------------------------------------------- */

enum { MAX_ARGS = 24 };
typedef struct {
    Arg args[MAX_ARGS];
    int tensors, outputs, scalars; /* outputs are the first of the tensors */
} Spec;

/* -1 if the text is not a spec. */
int parse_spec(const char *text, Spec *spec);

/* The checks return -1 with an exception. `tensors` and `t` have spec->tensors elements. */

/* An array may have several axes in place of a leading M, say [B,T,C] for [M,C]: makes them one axis. They
 * must be contiguous with each other, and equal in all arguments that have them. */
int merge_rows(const char *op, const Spec *spec, Tensor *tensors);
/* Devices, dtypes, shapes, strides and alignment. */
int check_shapes(const char *op, const Spec *spec, const Tensor *t);
/* Outputs overlap neither each other nor inputs, unless the spec allows it. */
int check_overlap(const char *op, const Spec *spec, const Tensor *t);
int overlap(const Tensor *a, const Tensor *b); /* whether the ranges of their bytes overlap */

/* ---- call.c: calls of ops --------------------------------------------------------------------- */

extern Spec *specs;                 /* one for each op */
extern atomic_int_least32_t *calls; /* how often each op has run, for tests */
extern int isa;                     /* the instruction set in use */

/* An op's struct: its tensors, then its doubles. */
typedef struct {
    Tensor tensors[MAX_ARGS];
    double scalars[MAX_ARGS];
} Struct;

/* The op that args[0] names, or -1 with an exception. */
int op_named(const char *asker, PyObject *const *args, Py_ssize_t count);
/* Fills the op's struct from its arguments and checks them. 0, or -1 with an exception; either way the caller
 * gives the loans back. */
int take(int index, PyObject *const *args, Py_ssize_t count, Struct *all, Loan *loans, Queue *queue);
/* Runs an op on the CPU, with or without the GIL: 0, or -1 after fail(). */
int run_on_cpu(int index, const void *all);
/* Raises what run_on_cpu() failed with. */
void raise_failure(void);
/* The function of an op; self is its index. */
PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t count);

/* ---- record.c: calls that are made again ------------------------------------------------------- */

extern PyTypeObject *RecordingType;
extern PyType_Spec recording_spec;

#endif
