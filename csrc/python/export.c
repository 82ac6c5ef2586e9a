/* export.c --- the memory of a Tensor for other libraries: NumPy, the buffer protocol, DLPack capsules. */
#include "binding.h"
#include "cpu/cpu.h"

/* ---- NumPy and the buffer protocol ----------------------------------------------------------- */

PyObject *tensor_numpy(PyObject *object, PyObject *unused) {
    (void)unused;
    static const int nums[] = { NPY_FLOAT32, -1, NPY_FLOAT16, NPY_FLOAT64, NPY_INT32, NPY_INT64, NPY_UINT8 };
    TensorObject *self = (TensorObject *)object;
    const Tensor *t = &self->t;
    PyArray_Descr *descr = NULL;
    if (t->device)
        return PyErr_Format(PyExc_TypeError, "Tensor.numpy: the tensor is on %s; use cpu().numpy()",
                            device_name(t->device).text);
    if (t->dtype == BF16) {
        PyObject *module = PyImport_ImportModule("ml_dtypes");
        PyObject *type = module ? PyObject_GetAttrString(module, "bfloat16") : NULL;
        if (type) PyArray_DescrConverter(type, &descr);
        else PyErr_SetString(PyExc_TypeError, "Tensor.numpy: NumPy has no bfloat16; install ml_dtypes");
        Py_XDECREF(module);
        Py_XDECREF(type);
    } else descr = PyArray_DescrFromType(nums[t->dtype]);
    if (!descr) return NULL;
    npy_intp shape[MAX_NDIM], strides[MAX_NDIM];
    for (int i = 0; i < t->ndim; i++) {
        shape[i] = t->shape[i];
        strides[i] = t->stride[i] * dtype_size(t->dtype);
    }
    PyObject *array = PyArray_NewFromDescr(&PyArray_Type, descr, t->ndim, shape, strides, t->data,
                                           self->readonly ? 0 : NPY_ARRAY_WRITEABLE, NULL);
    if (array && PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(object))) {
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

/* np.asarray() calls it for bfloat16, which the buffer protocol does not have. NumPy itself converts to
 * `dtype`. */
PyObject *tensor_array(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = { "dtype", "copy", NULL };
    PyObject *dtype = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO:__array__", names, &dtype, &copy)) return NULL;
    PyObject *array = tensor_numpy(object, NULL);
    if (!array || copy != Py_True) return array;
    PyObject *copied = PyObject_CallMethod(array, "copy", NULL);
    Py_DECREF(array);
    return copied;
}

int tensor_getbuffer(PyObject *object, Py_buffer *view, int flags) {
    static const char *const formats[] = { "f", NULL, "e", "d", "i", "q", "B" };
    TensorObject *self = (TensorObject *)object;
    const Tensor *t = &self->t;
    int asked = flags & ~PyBUF_STRIDES, strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES;
    int rows = !strides || (asked & (PyBUF_C_CONTIGUOUS | PyBUF_ANY_CONTIGUOUS)),
        columns = asked & PyBUF_F_CONTIGUOUS;
    const char *why = NULL;
    if (t->device)
        why = "Tensor: the tensor is on a GPU, where the buffer protocol cannot reach it; use cpu()";
    else if (!formats[t->dtype])
        why = "Tensor: the buffer protocol has no bfloat16; use view(shape, 'uint8'), numpy() or DLPack";
    else if ((flags & PyBUF_WRITABLE) && self->readonly) why = "Tensor: the tensor is read-only";
    else if (((rows || columns) && !is_contiguous(t)) || (columns && t->ndim > 1))
        why = "Tensor: the tensor is not contiguous in the requested order";
    view->obj = NULL;
    if (why) return PyErr_SetString(PyExc_BufferError, why), -1;
    for (int i = 0; i < t->ndim; i++) {
        self->shape[i] = (Py_ssize_t)t->shape[i];
        self->strides[i] = (Py_ssize_t)(t->stride[i] * dtype_size(t->dtype));
    }
    *view = (Py_buffer){ .buf = t->data,
                         .obj = Py_NewRef(object),
                         .len = (Py_ssize_t)(elements_of(t) * dtype_size(t->dtype)),
                         .itemsize = (Py_ssize_t)dtype_size(t->dtype),
                         .readonly = self->readonly,
                         .ndim = t->ndim,
                         .format = flags & PyBUF_FORMAT ? (char *)formats[t->dtype] : NULL,
                         .shape = flags & PyBUF_ND ? self->shape : NULL,
                         .strides = strides ? self->strides : NULL };
    return 0;
}

/* ---- DLPack ---------------------------------------------------------------------------------- */

/* One allocation for the managed tensor, of either kind, its shape and its strides. It keeps the Tensor
 * alive. */
typedef struct {
    union {
        DLManagedTensorVersioned versioned;
        DLManagedTensor old;
    } managed;
    int64_t shape[MAX_NDIM], strides[MAX_NDIM];
    PyObject *owner;
} Export;

static void release_export(Export *e) {
    if (!Py_IsInitialized()) return; /* nothing can be released without an interpreter */
    PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(e->owner);
    PyMem_Free(e);
    PyGILState_Release(state);
}
static void delete_versioned(DLManagedTensorVersioned *m) { release_export(m->manager_ctx); }
static void delete_old(DLManagedTensor *m) { release_export(m->manager_ctx); }

static void drop_capsule(PyObject *capsule) { /* if no consumer took it */
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *m = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        m->deleter(m);
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *m = PyCapsule_GetPointer(capsule, "dltensor");
        m->deleter(m);
    }
}

/* Reads a pair of integers, as max_version and dl_device are. 1, 0 for None, -1 with an exception. */
static int read_pair(PyObject *pair, const char *name, int *first, int *second) {
    if (pair == Py_None) return 0;
    if (PyTuple_Check(pair) && PyArg_ParseTuple(pair, "ii", first, second)) return 1;
    PyErr_Format(PyExc_TypeError, "Tensor.__dlpack__: %s should be two integers, got %R", name, pair);
    return -1;
}

/* Makes the consumer's stream, numbered as in the array API, wait for the thread's. 0, or -1 with an
 * exception. */
static int join_stream(int device, PyObject *stream) {
    static const char op[] = "Tensor.__dlpack__";
    unsigned long long handle = 1; /* None: the legacy default stream */
    void *own;
    int stream_device;
    if (stream != Py_None) {
        long long given = PyLong_AsLongLong(stream);
        if (given == -1 && !PyErr_Occurred()) return 0; /* -1: the consumer synchronises by itself */
        if (given == -1 || given < -1 || given == 0)
            return PyErr_Format(PyExc_BufferError,
                                "%s: stream should be None, -1, 1 (legacy default), 2 (per thread) or a "
                                "handle, got %R",
                                op, stream),
                   -1;
        handle = (unsigned long long)given;
    }
    if (own_stream(device, &own)) return PyErr_Format(PyExc_ValueError, "%s: %s", op, last_error()), -1;
    if (cuda->stream_device((void *)(uintptr_t)handle, &stream_device)) return cuda_failed(op, device), -1;
    if (stream_device >= 0 && stream_device != device - 1)
        return PyErr_Format(PyExc_BufferError, "%s: stream belongs to cuda:%d, the tensor is on %s", op,
                            stream_device, device_name(device).text),
               -1;
    if (!own) own = (void *)1;
    return order(device, (void *)(uintptr_t)handle, device, own) ? (cuda_failed(op, device), -1) : 0;
}

PyObject *tensor_dlpack(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = { "stream", "max_version", "dl_device", "copy", NULL };
    PyObject *stream = Py_None, *max_version = Py_None, *device = Py_None, *copy = Py_None;
    TensorObject *self = (TensorObject *)object;
    int type = self->t.device ? kDLCUDA : kDLCPU, id = self->t.device ? self->t.device - 1 : 0, major = 0,
        minor = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream, &max_version, &device,
                                     &copy) ||
        read_pair(device, "dl_device", &type, &id) < 0 ||
        read_pair(max_version, "max_version", &major, &minor) < 0)
        return NULL;
    int target = type == kDLCUDA ? id + 1 : 0, versioned = major >= 1,
        copied = copy == Py_True || target != self->t.device;
    if ((type != kDLCPU || id) && (type != kDLCUDA || usable(id)))
        return PyErr_Format(PyExc_BufferError,
                            "Tensor.__dlpack__: dl_device should be (1, 0) or (2, a CUDA device), got %R",
                            device);
    if (copied && copy == Py_False)
        return PyErr_Format(PyExc_BufferError,
                            "Tensor.__dlpack__: the tensor is on %s and cannot go to %s without a copy",
                            device_name(self->t.device).text, device_name(target).text);
    if (!target && stream != Py_None)
        return PyErr_Format(PyExc_BufferError, "Tensor.__dlpack__: stream should be None on the CPU, got %R",
                            stream);
    if (copied) self = copy_to(self, target, "Tensor.__dlpack__");
    else Py_INCREF(object);
    if (!self || (target && join_stream(target, stream))) {
        Py_XDECREF((PyObject *)self);
        return NULL;
    }
    Export *e = self->readonly && !versioned ? NULL : PyMem_Malloc(sizeof *e);
    if (!e) {
        if (versioned || !self->readonly) PyErr_NoMemory();
        else
            PyErr_SetString(PyExc_BufferError,
                            "Tensor.__dlpack__: a read-only tensor needs max_version of at least (1, 0)");
        Py_DECREF(self);
        return NULL;
    }
    for (int i = 0; i < self->t.ndim; i++) {
        e->shape[i] = self->t.shape[i];
        e->strides[i] = self->t.stride[i];
    }
    e->owner = (PyObject *)self; /* takes over the reference from above */
    DLTensor t = { self->t.data,
                   { type, id },
                   self->t.ndim,
                   { dl_types[self->t.dtype].code, dl_types[self->t.dtype].bits, 1 },
                   e->shape,
                   e->strides,
                   0 };
    uint64_t flags = copied           ? DLPACK_FLAG_BITMASK_IS_COPIED
                     : self->readonly ? DLPACK_FLAG_BITMASK_READ_ONLY
                                      : 0;
    if (versioned)
        e->managed.versioned = (DLManagedTensorVersioned){ { 1, 0 }, e, delete_versioned, flags, t };
    else e->managed.old = (DLManagedTensor){ t, e, delete_old };
    PyObject *capsule =
        PyCapsule_New(&e->managed, versioned ? "dltensor_versioned" : "dltensor", drop_capsule);
    if (!capsule) release_export(e);
    return capsule;
}

PyObject *tensor_dlpack_device(PyObject *object, PyObject *unused) {
    (void)unused;
    int device = ((TensorObject *)object)->t.device;
    return Py_BuildValue("(ii)", device ? kDLCUDA : kDLCPU, device ? device - 1 : 0);
}
