/* borrow.c --- arrays of other libraries for one call, NumPy's through its C API and others through DLPack;
 * and the stream that the call's work goes to. */
#include "binding.h"
#include "cpu/cpu.h"

#include <stdarg.h>
#include <stdatomic.h>

int refuse(PyObject *type, const char *op, const Arg *arg, const char *format, ...) {
    va_list args;
    va_start(args, format);
    PyObject *words = PyUnicode_FromFormatV(format, args);
    va_end(args);
    if (words) PyErr_Format(type, "%s: %s %U", op, arg->name, words);
    Py_XDECREF(words);
    return -1;
}

void give_back(Loan *loans, int count, const Queue *queue) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback); /* deleters may run Python code, which needs no exception set */
    for (int i = 0; i < count; i++) {
        if (queue && loans[i].capsule && loans[i].device)
            hold(loans[i].capsule, loans[i].device, queue->stream);
        else Py_XDECREF(loans[i].capsule); /* it was not renamed, so its destructor frees the memory */
        if (loans[i].managed && loans[i].managed->deleter) loans[i].managed->deleter(loans[i].managed);
    }
    PyErr_Restore(type, value, traceback);
}

/* -1 with an exception if an array is larger than memory can be. After it no arithmetic on sizes and strides
 * overflows. The stride of an axis of size 1 means nothing; where it is absurd it becomes 0. */
static int check_extent(Tensor *t, const char *op, const Arg *arg) {
    const int64_t most = (int64_t)1 << 59; /* elements, of 8 bytes at most */
    int64_t elements = 1, reach = 0, step;
    for (int i = 0; i < t->ndim; i++) {
        int64_t size = t->shape[i] ? t->shape[i] : 1, stride = t->stride[i];
        int wild = stride <= -most || stride >= most;
        if (size == 1 && wild) stride = t->stride[i] = 0;
        if ((size > 1 && wild) || __builtin_mul_overflow(elements, size, &elements) ||
            __builtin_mul_overflow(size - 1, stride < 0 ? -stride : stride, &step) ||
            __builtin_add_overflow(reach, step, &reach) || elements >= most || reach >= most)
            return refuse(PyExc_ValueError, op, arg, "has axes or strides that reach farther than memory");
    }
    return 0;
}

static int borrow_numpy(PyArrayObject *array, Tensor *t, const char *op, const Arg *arg) {
    static const struct {
        int num, dtype;
    } nums[] = { { NPY_FLOAT32, F32 }, { NPY_FLOAT16, F16 }, { NPY_FLOAT64, F64 },
                 { NPY_INT32, I32 },   { NPY_INT64, I64 },   { NPY_UINT8, U8 } };
    static atomic_int bfloat16 = NPY_NOTYPE; /* the type number of ml_dtypes, once it is known */
    int num = PyArray_TYPE(array);
    t->dtype = num == bfloat16 ? BF16 : -1;
    for (size_t i = 0; i < sizeof nums / sizeof *nums; i++)
        if (nums[i].num == num) t->dtype = nums[i].dtype;
    if (t->dtype < 0) {
        PyObject *name = PyObject_GetAttrString((PyObject *)PyArray_DESCR(array), "name");
        if (!name) return -1;
        if (!PyUnicode_CompareWithASCIIString(name, "bfloat16")) {
            t->dtype = BF16;
            bfloat16 = num;
        } else refuse(PyExc_TypeError, op, arg, "has dtype %U, which no op takes", name);
        Py_DECREF(name);
        if (t->dtype < 0) return -1;
    }
    t->ndim = PyArray_NDIM(array);
    if (t->ndim > MAX_NDIM)
        return refuse(PyExc_ValueError, op, arg, "should have %d axes, got %d", arg->ndim, t->ndim);
    if (!PyArray_ISNOTSWAPPED(array))
        return refuse(PyExc_TypeError, op, arg, "is not in the machine's byte order");
    if (arg->output && !PyArray_ISWRITEABLE(array))
        return refuse(PyExc_ValueError, op, arg, "is an output and read-only");
    int64_t size = dtype_size(t->dtype);
    for (int i = 0; i < t->ndim; i++) {
        t->shape[i] = PyArray_DIM(array, i);
        t->stride[i] = PyArray_STRIDE(array, i) / size;
        if (PyArray_STRIDE(array, i) % size && t->shape[i] > 1)
            return refuse(PyExc_ValueError, op, arg,
                          "axis %d has a stride that is not a multiple of the element size", i);
    }
    t->data = PyArray_DATA(array);
    return check_extent(t, op, arg);
}

static int refuse_device(int index, const char *op, const Arg *arg) {
    return refuse(PyExc_BufferError, op, arg, "is on cuda:%d, which cannot be used: %s", index, last_error());
}

static int borrow_dltensor(const DLTensor *d, Tensor *t, const char *op, const Arg *arg) {
    int device = (int)d->device.device_type;
    if (device == kDLCUDA) {
        if (usable(d->device.device_id)) return refuse_device(d->device.device_id, op, arg);
        t->device = d->device.device_id + 1;
    } else if (device != kDLCPU && device != kDLCUDAHost && device != kDLCUDAManaged)
        return refuse(PyExc_BufferError, op, arg,
                      "should be on the CPU or a CUDA device, got DLPack device type %d", device);
    t->dtype = -1;
    for (int i = 0; i < DTYPES; i++)
        if (dl_types[i].code == d->dtype.code && dl_types[i].bits == d->dtype.bits && d->dtype.lanes == 1)
            t->dtype = i;
    if (t->dtype < 0)
        return refuse(PyExc_TypeError, op, arg, "has DLPack dtype (%d, %d, %d), which no op takes",
                      d->dtype.code, d->dtype.bits, d->dtype.lanes);
    if (d->ndim < 0 || d->ndim > MAX_NDIM)
        return refuse(PyExc_ValueError, op, arg, "should have %d axes, got %d", arg->ndim, d->ndim);
    t->ndim = d->ndim;
    if (d->ndim && !d->shape) return refuse(PyExc_BufferError, op, arg, "has no sizes in its capsule");
    for (int i = 0; i < d->ndim; i++) {
        if (d->shape[i] < 0) return refuse(PyExc_BufferError, op, arg, "has a negative size in its capsule");
        t->shape[i] = d->shape[i];
        t->stride[i] = d->strides ? d->strides[i] : 0;
    }
    if (check_extent(t, op, arg)) return -1;
    if (!d->strides) make_dense(t);
    if (!elements_of(t)) return 0;
    if (!d->data)
        return refuse(PyExc_BufferError, op, arg,
                      "has no memory of its own, as fake tensors, tensors of the device meta and distributed "
                      "tensors have none");
    t->data = (char *)d->data + d->byte_offset;
    return 0;
}

/* The C exchange API of an object's type, or NULL. The lookup is one attribute of a type, about 50 ns. */
static const DLPackExchangeAPI *exchange_api(PyObject *object) {
    PyObject *capsule = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__dlpack_c_exchange_api__");
    if (!capsule) {
        PyErr_Clear();
        return NULL;
    }
    const DLPackExchangeAPIHeader *header = NULL;
    if (PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
        header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule);
    while (header && header->version.major > 1) header = header->prev_api;
    return header && header->version.major == 1 ? (const DLPackExchangeAPI *)header : NULL;
}

/* Refuses torch's lazily negated views, such as z.conj().imag: their memory holds the other sign, and neither
 * the exchange API nor a capsule says so. One call of a method, about 60 ns. */
static int check_sign(PyObject *object, const char *op, const Arg *arg) {
    static _Atomic(PyObject *) name;
    if (!name) name = PyUnicode_InternFromString("is_neg");
    PyObject *negative = name ? PyObject_CallMethodObjArgs(object, name, NULL) : NULL;
    if (!negative && !PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    if (!negative) PyErr_Clear();
    int refused = negative == Py_True;
    Py_XDECREF(negative);
    return refused ? refuse(PyExc_BufferError, op, arg, "is a lazily negated view; give x.resolve_neg()") : 0;
}

/* Turns a producer's exception into a BufferError that names the argument. */
static int producer_failed(const char *op, const Arg *arg) {
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) return -1;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    refuse(PyExc_BufferError, op, arg, "cannot be borrowed: %S", value);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return -1;
}

static int borrow_managed(const DLManagedTensorVersioned *m, Tensor *t, const char *op, const Arg *arg) {
    if (m->version.major != 1)
        return refuse(PyExc_BufferError, op, arg, "uses DLPack version %u, expected 1",
                      (unsigned)m->version.major);
    if (arg->output && (m->flags & DLPACK_FLAG_BITMASK_READ_ONLY))
        return refuse(PyExc_ValueError, op, arg, "is an output and read-only");
    return borrow_dltensor(&m->dl_tensor, t, op, arg);
}

/* The device of an object, in Tensor's numbering. 0 also for devices that borrow_dltensor() refuses; -1 with
 * an exception. */
static int device_of(PyObject *object, const char *op, const Arg *arg) {
    int type = kDLCPU, id = 0;
    PyObject *pair = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (!pair && !PyErr_ExceptionMatches(PyExc_AttributeError)) return producer_failed(op, arg);
    if (!pair) PyErr_Clear(); /* few producers lack it: NumPy requires it */
    int status = 0;
    if (pair && (!PyTuple_Check(pair) || !PyArg_ParseTuple(pair, "ii", &type, &id))) {
        PyErr_Clear();
        status =
            refuse(PyExc_TypeError, op, arg, "returned %R as its __dlpack_device__, not two integers", pair);
    }
    Py_XDECREF(pair);
    if (status || type != kDLCUDA) return status;
    return usable(id) ? refuse_device(id, op, arg) : id + 1;
}

/* For an argument on `device`, whose stream may become the queue's. */
static int join_queue(Queue *queue, PyObject *object, int device, const DLPackExchangeAPI *api,
                      const char *op, const Arg *arg) {
    if (queue->whose == THEIRS || (queue->whose == OWN && !api)) return 0;
    queue->like = object;
    queue->whose = api ? THEIRS : OWN;
    if (api)
        return api->current_work_stream(kDLCUDA, device - 1, &queue->stream) ? producer_failed(op, arg) : 0;
    if (!is_tensor(object)) {
        PyObject *stream = ready() ? NULL : PyObject_CallFunction(stream_hook, "Oi", object, device - 1);
        if (stream && stream != Py_None) queue->stream = (void *)(uintptr_t)PyLong_AsUnsignedLongLong(stream);
        int own = stream == Py_None;
        Py_XDECREF(stream);
        if (PyErr_Occurred()) return -1;
        if (!own) return 0;
    }
    return own_stream(device, &queue->stream)
               ? refuse(PyExc_ValueError, op, arg, "cannot be used: %s", last_error())
               : 0;
}

/* Fills t from the loan's capsule, which should be on the loan's device. */
static int open_capsule(Tensor *t, const Loan *loan, const char *op, const Arg *arg) {
    PyObject *capsule = loan->capsule;
    int status, versioned = PyCapsule_IsValid(capsule, "dltensor_versioned");
    if (!versioned && !PyCapsule_IsValid(capsule, "dltensor"))
        return refuse(PyExc_TypeError, op, arg, "returned %R instead of a DLPack capsule", capsule);
    if (!versioned && arg->output) /* old capsules have no read-only flag */
        return refuse(PyExc_BufferError, op, arg, "is an output and needs DLPack 1, got an old capsule");
    if (versioned) status = borrow_managed(PyCapsule_GetPointer(capsule, "dltensor_versioned"), t, op, arg);
    else {
        const DLManagedTensor *old = PyCapsule_GetPointer(capsule, "dltensor");
        status = borrow_dltensor(&old->dl_tensor, t, op, arg);
    }
    if (!status && t->device != loan->device)
        return refuse(PyExc_BufferError, op, arg, "is on %s, its __dlpack_device__ is %s",
                      device_name(t->device).text, device_name(loan->device).text);
    return status;
}

int borrow_capsule(PyObject *object, Tensor *t, Loan *loan, Queue *queue, const char *op, const Arg *arg) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (!method) {
        PyErr_Clear();
        refuse(PyExc_TypeError, op, arg, "must be an array (NumPy or DLPack), got %R",
               (PyObject *)Py_TYPE(object));
        return -1;
    }
    PyObject *none = NULL, *kwargs = NULL, *capsule = NULL;
    loan->device = check_sign(object, op, arg) ? -1 : device_of(object, op, arg);
    if (loan->device < 0 || (loan->device && join_queue(queue, object, loan->device, NULL, op, arg)))
        goto failed;
    none = PyTuple_New(0);
    kwargs = Py_BuildValue("{s(ii)}", "max_version", 1, 0);
    if (!none || !kwargs) goto failed;
    if (loan->device) { /* DLPack calls the default stream 1, not 0 */
        PyObject *stream = PyLong_FromUnsignedLongLong(queue->stream ? (uintptr_t)queue->stream : 1);
        int status = stream ? PyDict_SetItemString(kwargs, "stream", stream) : -1;
        Py_XDECREF(stream);
        if (status) goto failed;
    }
    capsule = PyObject_Call(method, none, kwargs);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) { /* an old producer, without max_version */
        PyErr_Clear();
        if (PyDict_DelItemString(kwargs, "max_version")) goto failed;
        capsule = PyObject_Call(method, none, kwargs);
    }
    if (!capsule) producer_failed(op, arg);
failed:
    Py_DECREF(method);
    Py_XDECREF(none);
    Py_XDECREF(kwargs);
    if (!capsule) return -1;
    loan->capsule = capsule;
    return open_capsule(t, loan, op, arg);
}

int borrow(PyObject *object, Tensor *t, Loan *loan, Queue *queue, const char *op, const Arg *arg) {
    if (object == Py_None) {
        t->ndim = -1;
        if (arg->optional) return 0;
        refuse(PyExc_TypeError, op, arg, "must be an array, got None");
        return -1;
    }
    if (is_tensor(object)) {
        const TensorObject *tensor = (TensorObject *)object;
        *t = tensor->t;
        if (arg->output && tensor->readonly)
            return refuse(PyExc_ValueError, op, arg, "is an output and read-only");
        return t->device ? join_queue(queue, object, t->device, NULL, op, arg) : 0;
    }
    if (PyArray_Check(object)) return borrow_numpy((PyArrayObject *)object, t, op, arg);
    const DLPackExchangeAPI *api = exchange_api(object);
    if (!api) return 1;
    if (check_sign(object, op, arg)) return -1;
    int status;
    if (api->dltensor_from_py_object_no_sync && !arg->output) { /* cheaper, but without a read-only flag */
        DLTensor d;
        if (api->dltensor_from_py_object_no_sync(object, &d)) return producer_failed(op, arg);
        status = borrow_dltensor(&d, t, op, arg);
    } else {
        if (api->managed_tensor_from_py_object_no_sync(object, &loan->managed))
            return producer_failed(op, arg);
        status = borrow_managed(loan->managed, t, op, arg);
    }
    return !status && t->device ? join_queue(queue, object, t->device, api, op, arg) : status;
}
