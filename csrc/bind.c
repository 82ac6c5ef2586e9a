/* bind.c --- the only file with Python.h. Borrows arrays, checks them against the op's spec, releases the GIL, calls,
 * raises. No op is named here: all that is known of one is its row in ops.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include "cpu/cpu.h"
#include "cpu/scratch.h"
#include "cuda.h"
#include "dlpack.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_ARGS = 24 };
static const char *const dtype_names[] = { "float32", "bfloat16", "float16", "float64", "int32", "int64", "uint8" };

/* ---- specs ------------------------------------------------------------------------------------------------------ */

enum { COMMON = -1, ANY = -2 };
typedef struct {
    char name[24], letters[MAX_NDIM + 1];
    int ndim, dtype, optional, in_place, may_alias, free_strides, output, is_int;
} Arg;
typedef struct { Arg args[MAX_ARGS]; int tensors, outputs, scalars; } Spec;
static Spec *specs;

static int parse_spec(const char *text, Spec *spec) {
    int section = 0;                                                   /* outputs, inputs, scalars */
    for (const char *p = text; *p;) {
        if (*p == ' ') { p++; continue; }
        if (!strncmp(p, "<-", 2)) { section = 1; p += 2; continue; }
        if (*p == '|') { section = 2; p++; continue; }
        if (spec->tensors + spec->scalars == MAX_ARGS) return -1;
        Arg *arg = &spec->args[spec->tensors + spec->scalars];
        size_t n = strcspn(p, "[: ");
        if (n >= sizeof arg->name) return -1;
        memcpy(arg->name, p, n);
        p += n;
        arg->dtype = COMMON;
        arg->output = section == 0;
        if (section == 2) {
            if (!strncmp(p, ":int", 4)) { arg->is_int = 1; p += 4; }
            spec->scalars++;
            continue;
        }
        if (*p++ != '[') return -1;
        for (; *p && *p != ']'; p++) if (*p != ',') {
            if (arg->ndim == MAX_NDIM) return -1;
            arg->letters[arg->ndim++] = *p;
        }
        if (*p++ != ']') return -1;
        for (; *p && *p != ' '; p++) switch (*p) {
            case '?': arg->optional = 1; break;
            case '+': arg->in_place = 1; break;
            case '~': arg->may_alias = 1; break;
            case '*': arg->free_strides = 1; break;
            case ':': {
                static const struct { const char *name; int dtype; } names[] = {
                    { "any", ANY }, { "f32", F32 }, { "f64", F64 }, { "i32", I32 } };
                int found = 0;
                for (size_t i = 0; i < sizeof names / sizeof *names; i++)
                    if (!strncmp(p + 1, names[i].name, 3)) { arg->dtype = names[i].dtype; found = 1; }
                if (!found) return -1;
                p += 3;
                break;
            }
            default: return -1;
        }
        spec->tensors++;
        spec->outputs += arg->output;
    }
    return 0;
}

/* ---- CUDA -------------------------------------------------------------------------------------------------------- */

/* Where work of this thread goes that has no stream of its own library: longlora.cuda.stream() sets it. */
static _Thread_local struct { void *stream; int device; } current = { NULL, -1 };    /* -1: any, as of the default stream */
static PyObject *workspace_hook, *stream_hook;                         /* of longlora/cuda.py, which sets them */

/* "cpu", "cuda:0"; as long as the caller's statement lives. */
typedef struct { char text[16]; } DeviceName;
static DeviceName device_name(int device) {
    DeviceName name = { "cpu" };
    if (device) PyOS_snprintf(name.text, sizeof name.text, "cuda:%d", device - 1);
    return name;
}

/* 0 when the CUDA device of this index can be used; -1 and why in last_error(). */
static int usable(int index) {
    return cuda ? cuda->usable(index) : fail("this build has no CUDA kernels; installed where nvcc is found it has");
}

/* The failure of a call on a device (counted as in Tensor) as an exception, and the error forgotten where it can be; NULL. */
static PyObject *cuda_failed(const char *op, int device) {
    char words[512];
    PyOS_snprintf(words, sizeof words, "%s", last_error());
    if (cuda->recover(device - 1))
        return PyErr_Format(PyExc_RuntimeError, "%s: %s. By this error, of this call or of work queued before it, the process "
                            "has lost %s and must be started anew", op, words, device_name(device).text);
    return PyErr_Format(strstr(words, "out of memory") ? PyExc_MemoryError : PyExc_RuntimeError, "%s: %s", op, words);
}

/* The thread's stream for a device; -1 and fail() if it is another device's. */
static int own_stream(int device, void **stream) {
    *stream = current.stream;
    if (current.device < 0 || current.device == device - 1) return 0;
    return fail("the stream set by longlora.cuda.stream is of cuda:%d, the call is on %s", current.device,
                device_name(device).text);
}

/* Later work on `stream` of `device` waits for what is queued now on `other` of `other_device`. */
static int order(int device, void *stream, int other_device, void *other) {
    void *mark = NULL;
    if (stream == other && device == other_device) return 0;
    int entered = cuda->enter(other_device - 1), status = entered < 0 ? -1 : cuda->mark(other, &mark);
    cuda->leave(entered);
    if (!status) {
        entered = cuda->enter(device - 1);
        status = entered < 0 ? -1 : cuda->wait(stream, mark);
        cuda->leave(entered);
    }
    if (mark) cuda->forget(mark);
    return status;
}

/* ---- longlora.Tensor ---------------------------------------------------------------------------------------------- */

/* Owns its memory, or borrows a foreign buffer's, or is a view; a view keeps the Tensor that owns or borrows (never another
 * view) alive, so memory goes when the last view does. */
typedef struct {
    PyObject_HEAD
    Tensor t;
    int readonly, has_buffer, pinned;
    PyObject *base;                                                    /* of a view */
    Py_buffer buffer;                                                  /* of wrap() */
    void *memory;                                                      /* of an owner, and its size */
    size_t bytes;
    Py_ssize_t shape[MAX_NDIM], strides[MAX_NDIM];                     /* what the buffer protocol hands out, in bytes */
} TensorObject;
static PyTypeObject *TensorType;

static int is_tensor(PyObject *object) { return Py_TYPE(object) == TensorType; }

static int find_dtype(PyObject *name) {
    for (int i = 0; PyUnicode_Check(name) && i < DTYPES; i++)
        if (!PyUnicode_CompareWithASCIIString(name, dtype_names[i])) return i;
    PyErr_Format(PyExc_TypeError,
                 "Tensor: dtype should be float32, bfloat16, float16, float64, int32, int64 or uint8, got %R", name);
    return -1;
}

static int64_t elements_of(const Tensor *t) {
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

static int is_contiguous(const Tensor *t) {
    int64_t stride = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] != 1 && t->stride[i] != stride) return elements_of(t) == 0;
        stride *= t->shape[i];
    }
    return 1;
}

/* The bytes from the lowest to one past the highest element. */
static void extent(const Tensor *t, char **low, char **high) {
    int64_t below = 0, above = 0, size = dtype_size(t->dtype);
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0) { *low = *high = t->data; return; }
        int64_t reach = (t->shape[i] - 1) * t->stride[i];
        if (reach < 0) below += reach; else above += reach;
    }
    *low = (char *)t->data + below * size;
    *high = (char *)t->data + (above + 1) * size;
}

static int overlap(const Tensor *a, const Tensor *b) {
    char *low[2], *high[2];
    extent(a, &low[0], &high[0]);
    extent(b, &low[1], &high[1]);
    return low[0] < high[0] && low[1] < high[1] && low[0] < high[1] && low[1] < high[0];
}

/* Memory of an owner, zero: large blocks come from the system, which has cleared them, and go back to it when the Tensor dies,
 * which malloc does not promise. */
enum { LARGE = 1 << 20 };
static void *take_memory(size_t bytes) {
    if (bytes >= LARGE) return map_memory((int64_t)bytes);
    void *p = scratch((int64_t)bytes);
    return p ? memset(p, 0, bytes) : NULL;
}
static void free_memory(void *p, size_t bytes) {
    if (bytes < LARGE) scratch_free(p);
    else unmap_memory(p, (int64_t)bytes);
}

/* Shape from an int or a sequence of ints, strides dense; 0, or -1 with an exception. */
static int read_shape(PyObject *shape, Tensor *t) {
    PyObject *list = PyIndex_Check(shape) ? Py_BuildValue("(O)", shape) : PySequence_Tuple(shape);
    if (!list) return -1;
    Py_ssize_t n = PyTuple_Size(list);
    int64_t total = 1;
    if (n > MAX_NDIM) PyErr_Format(PyExc_ValueError, "Tensor: shape should have at most %d axes, got %R", MAX_NDIM, shape);
    for (Py_ssize_t i = 0; i < n && !PyErr_Occurred(); i++) {
        int64_t size = t->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(list, i));
        if (PyErr_Occurred()) break;
        if (size < 0) PyErr_Format(PyExc_ValueError, "Tensor: shape should not be negative, got %R", shape);
        else if (__builtin_mul_overflow(total, size ? size : 1, &total))
            PyErr_Format(PyExc_ValueError, "Tensor: shape %R is too large", shape);
    }
    Py_DECREF(list);
    if (PyErr_Occurred()) return -1;
    t->ndim = (int32_t)n;
    int64_t stride = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        t->stride[i] = stride;
        stride *= t->shape[i];
    }
    if (total > INT64_MAX / 16) return PyErr_Format(PyExc_ValueError, "Tensor: shape %R is too large", shape), -1;
    return 0;
}

static TensorObject *new_view(PyObject *base, const Tensor *t, int readonly) {
    TensorObject *view = (TensorObject *)PyType_GenericAlloc(TensorType, 0);
    if (!view) return NULL;
    view->t = *t;
    view->readonly = readonly;
    view->pinned = ((TensorObject *)base)->pinned;
    view->base = Py_NewRef(((TensorObject *)base)->base ? ((TensorObject *)base)->base : base);
    return view;
}

/* An owner of zeros of t's shape, dtype and device. */
static TensorObject *new_tensor(const Tensor *t, int pinned) {
    TensorObject *self = (TensorObject *)PyType_GenericAlloc(TensorType, 0);
    if (!self) return NULL;
    self->bytes = (size_t)(elements_of(t) * dtype_size(t->dtype));
    self->t = *t;
    self->pinned = pinned;
    int status = 0, entered = 0;
    Py_BEGIN_ALLOW_THREADS
    if (pinned) status = cuda->allocate_pinned((int64_t)self->bytes, &self->memory);
    else if (t->device) {
        entered = cuda->enter(t->device - 1);
        status = entered < 0 ? -1 : cuda->allocate((int64_t)self->bytes, &self->memory);
        cuda->leave(entered);
    } else if (!(self->memory = take_memory(self->bytes))) status = fail("out of memory: %zu bytes cannot be had", self->bytes);
    Py_END_ALLOW_THREADS
    self->t.data = self->memory;
    if (!status) return self;
    if (pinned || t->device) cuda_failed("Tensor", t->device ? t->device : 1);
    else PyErr_Format(PyExc_MemoryError, "Tensor: %s", last_error());
    Py_DECREF(self);
    return NULL;
}

/* "cpu", "cuda" (the first), "cuda:1" -> as Tensor.device has it; -1 with an exception. */
static int find_device(PyObject *name) {
    Py_ssize_t length;
    const char *text = PyUnicode_AsUTF8AndSize(name, &length);
    if (!text) return -1;
    if (!strcmp(text, "cpu")) return 0;
    int index = 0, end = 0;
    if (strcmp(text, "cuda") && (sscanf(text, "cuda:%3d%n", &index, &end) != 1 || text[end] || index < 0))
        return PyErr_Format(PyExc_ValueError, "Tensor: device should be cpu, cuda or cuda:N, got %R", name), -1;
    if (usable(index)) return PyErr_Format(PyExc_RuntimeError, "Tensor: %U cannot be used: %s", name, last_error()), -1;
    return index + 1;
}

static PyObject *tensor_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = { "shape", "dtype", "device", "pinned", NULL };
    PyObject *shape, *dtype = NULL, *device = NULL;
    int pinned = 0;
    Tensor t = {0};
    (void)type;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|UU$p:Tensor", names, &shape, &dtype, &device, &pinned) ||
        read_shape(shape, &t) || (t.dtype = dtype ? find_dtype(dtype) : F32) < 0 ||
        (t.device = device ? find_device(device) : 0) < 0) return NULL;
    if (pinned && t.device)
        return PyErr_Format(PyExc_ValueError, "Tensor: pinned memory is the CPU's, got device %R", device);
    if (pinned && usable(0)) return PyErr_Format(PyExc_RuntimeError, "Tensor: memory cannot be pinned: %s", last_error());
    return (PyObject *)new_tensor(&t, pinned);
}

/* Waits for the device when there is one, so others run meanwhile. */
static void free_device_memory(TensorObject *self) {
    Py_BEGIN_ALLOW_THREADS
    if (self->pinned) cuda->release_pinned(self->memory);
    else {
        int entered = cuda->enter(self->t.device - 1);
        cuda->release(self->memory);
        cuda->leave(entered);
    }
    Py_END_ALLOW_THREADS
}

static void tensor_dealloc(PyObject *object) {
    TensorObject *self = (TensorObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->memory && (self->t.device || self->pinned)) free_device_memory(self);
    else if (self->memory) free_memory(self->memory, self->bytes);
    if (self->has_buffer) PyBuffer_Release(&self->buffer);
    Py_XDECREF(self->base);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *tensor_wrap(PyObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = { "buffer", "shape", "dtype", "offset", NULL };
    PyObject *source, *shape, *dtype;
    Py_ssize_t offset = 0;
    Tensor t = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOU|n:wrap", names, &source, &shape, &dtype, &offset) ||
        read_shape(shape, &t) || (t.dtype = find_dtype(dtype)) < 0) return NULL;
    TensorObject *self = (TensorObject *)PyType_GenericAlloc((PyTypeObject *)type, 0);
    if (!self) return NULL;
    self->readonly = PyObject_GetBuffer(source, &self->buffer, PyBUF_WRITABLE) != 0;
    if (self->readonly) {
        PyErr_Clear();
        if (PyObject_GetBuffer(source, &self->buffer, PyBUF_SIMPLE)) { Py_DECREF(self); return NULL; }
    }
    self->has_buffer = 1;
    int64_t bytes = elements_of(&t) * dtype_size(t.dtype);
    if (offset < 0 || bytes > self->buffer.len - offset)
        PyErr_Format(PyExc_ValueError, "Tensor.wrap: %lld bytes at offset %zd should lie in a buffer of %zd", (long long)bytes,
                     offset, self->buffer.len);
    else if (((uintptr_t)self->buffer.buf + (size_t)offset) % (size_t)dtype_size(t.dtype))
        PyErr_Format(PyExc_ValueError, "Tensor.wrap: offset %zd is not aligned to %s", offset, dtype_names[t.dtype]);
    if (PyErr_Occurred()) { Py_DECREF(self); return NULL; }
    t.data = (char *)self->buffer.buf + offset;
    self->t = t;
    return (PyObject *)self;
}

static PyObject *tensor_view(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = { "shape", "dtype", "offset", NULL };
    TensorObject *self = (TensorObject *)object;
    PyObject *shape, *dtype = NULL;
    Py_ssize_t offset = 0;
    Tensor t = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|Un:view", names, &shape, &dtype, &offset) || read_shape(shape, &t))
        return NULL;
    if ((t.dtype = dtype ? find_dtype(dtype) : self->t.dtype) < 0) return NULL;
    int64_t have = elements_of(&self->t) * dtype_size(self->t.dtype), want = elements_of(&t) * dtype_size(t.dtype);
    if (!is_contiguous(&self->t)) return PyErr_Format(PyExc_ValueError, "Tensor.view: the tensor should be contiguous");
    if (offset < 0 || want > have - offset)
        return PyErr_Format(PyExc_ValueError, "Tensor.view: %lld bytes at offset %zd should lie in %lld", (long long)want,
                            offset, (long long)have);
    t.data = (char *)self->t.data + offset;
    t.device = self->t.device;
    if ((uintptr_t)t.data % (size_t)dtype_size(t.dtype))
        return PyErr_Format(PyExc_ValueError, "Tensor.view: offset %zd is not aligned to %s", offset, dtype_names[t.dtype]);
    return (PyObject *)new_view(object, &t, self->readonly);
}

static PyObject *tensor_reshape(PyObject *object, PyObject *shape) {
    TensorObject *self = (TensorObject *)object;
    Tensor t = {0};
    if (read_shape(shape, &t)) return NULL;
    t.dtype = self->t.dtype;
    t.device = self->t.device;
    t.data = self->t.data;
    if (!is_contiguous(&self->t)) return PyErr_Format(PyExc_ValueError, "Tensor.reshape: the tensor should be contiguous");
    if (elements_of(&t) != elements_of(&self->t))
        return PyErr_Format(PyExc_ValueError, "Tensor.reshape: %R should have %lld elements, has %lld", shape,
                            (long long)elements_of(&self->t), (long long)elements_of(&t));
    return (PyObject *)new_view(object, &t, self->readonly);
}

/* Integers and slices without a step, one for each of the first axes. */
static PyObject *tensor_getitem(PyObject *object, PyObject *key) {
    TensorObject *self = (TensorObject *)object;
    PyObject *keys = PyTuple_Check(key) ? Py_NewRef(key) : Py_BuildValue("(O)", key);
    if (!keys) return NULL;
    Tensor t = self->t;
    Py_ssize_t count = PyTuple_Size(keys);
    int kept = 0;
    if (count > self->t.ndim) PyErr_Format(PyExc_IndexError, "Tensor: %zd indices for %d axes", count, self->t.ndim);
    for (int axis = 0; axis < self->t.ndim && !PyErr_Occurred(); axis++) {
        int64_t size = self->t.shape[axis], stride = self->t.stride[axis], first = 0, length = size;
        PyObject *k = axis < count ? PyTuple_GetItem(keys, axis) : NULL;
        int drop = k && PyIndex_Check(k);
        if (drop) {
            first = PyLong_AsLongLong(k);
            if (first < 0 && !PyErr_Occurred()) first += size;
            if (!PyErr_Occurred() && (first < 0 || first >= size))
                PyErr_Format(PyExc_IndexError, "Tensor: index %R is out of axis %d of size %lld", k, axis, (long long)size);
        } else if (k && PySlice_Check(k)) {
            Py_ssize_t start, stop, step;
            if (!PySlice_Unpack(k, &start, &stop, &step)) {
                length = PySlice_AdjustIndices((Py_ssize_t)size, &start, &stop, step);
                first = length ? start : 0;
                if (step != 1) PyErr_SetString(PyExc_IndexError, "Tensor: a slice with a step is not a view that ops take");
            }
        } else if (k) PyErr_Format(PyExc_TypeError, "Tensor: an index should be an integer or a slice, got %R", k);
        if (PyErr_Occurred()) break;
        t.data = (char *)t.data + first * stride * dtype_size(t.dtype);
        if (!drop) { t.shape[kept] = length; t.stride[kept++] = stride; }
    }
    t.ndim = kept;
    Py_DECREF(keys);
    return PyErr_Occurred() ? NULL : (PyObject *)new_view(object, &t, self->readonly);
}

static PyObject *tensor_numpy(PyObject *object, PyObject *unused) {
    (void)unused;
    static const int nums[] = { NPY_FLOAT32, -1, NPY_FLOAT16, NPY_FLOAT64, NPY_INT32, NPY_INT64, NPY_UINT8 };
    TensorObject *self = (TensorObject *)object;
    const Tensor *t = &self->t;
    PyArray_Descr *descr = NULL;
    if (t->device)
        return PyErr_Format(PyExc_TypeError, "Tensor.numpy: the tensor is on %s, NumPy is on the CPU; use cpu().numpy()",
                            device_name(t->device).text);
    if (t->dtype == BF16) {
        PyObject *module = PyImport_ImportModule("ml_dtypes");
        PyObject *type = module ? PyObject_GetAttrString(module, "bfloat16") : NULL;
        if (type) PyArray_DescrConverter(type, &descr);
        else PyErr_SetString(PyExc_TypeError, "Tensor.numpy: NumPy has no bfloat16 of its own; install ml_dtypes");
        Py_XDECREF(module); Py_XDECREF(type);
    } else descr = PyArray_DescrFromType(nums[t->dtype]);
    if (!descr) return NULL;
    npy_intp shape[MAX_NDIM], strides[MAX_NDIM];
    for (int i = 0; i < t->ndim; i++) { shape[i] = t->shape[i]; strides[i] = t->stride[i] * dtype_size(t->dtype); }
    PyObject *array = PyArray_NewFromDescr(&PyArray_Type, descr, t->ndim, shape, strides, t->data,
                                           self->readonly ? 0 : NPY_ARRAY_WRITEABLE, NULL);
    if (array && PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(object))) { Py_DECREF(array); return NULL; }
    return array;
}

/* np.asarray() comes here for bfloat16, which the buffer protocol cannot say; NumPy itself converts to `dtype`. */
static PyObject *tensor_array(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = { "dtype", "copy", NULL };
    PyObject *dtype = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO:__array__", names, &dtype, &copy)) return NULL;
    PyObject *array = tensor_numpy(object, NULL);
    if (!array || copy != Py_True) return array;
    PyObject *copied = PyObject_CallMethod(array, "copy", NULL);
    Py_DECREF(array);
    return copied;
}

typedef struct { Tensor out, x; char value[8]; int fill, zero; } Copy;

/* One row of the last axis, by its place among all rows. Fill: zeros, or the bytes of value; the same dtype: the bytes of x;
 * between floats: through float32. */
static int copy_row(int64_t row, void *context) {
    const Copy *c = context;
    int last = c->out.ndim - 1;
    int64_t out_at = 0, x_at = 0, n = last < 0 ? 1 : c->out.shape[last], size = dtype_size(c->out.dtype);
    for (int axis = last - 1; axis >= 0; axis--) {
        int64_t i = row % c->out.shape[axis];
        row /= c->out.shape[axis];
        out_at += i * c->out.stride[axis];
        x_at += i * c->x.stride[axis];
    }
    int64_t out_step = last < 0 ? 1 : c->out.stride[last], x_step = last < 0 ? 1 : c->x.stride[last];
    char *out = at(&c->out, out_at);
    if (c->fill) {
        if (c->zero && out_step == 1) memset(out, 0, (size_t)(n * size));
        else for (int64_t i = 0; i < n; i++) memcpy(out + i * out_step * size, c->value, (size_t)size);
        return 0;
    }
    const char *x = at(&c->x, x_at);
    int64_t x_size = dtype_size(c->x.dtype), same = c->out.dtype == c->x.dtype;
    if (out_step == 1 && x_step == 1) {
        float block[1024];
        if (same) memcpy(out, x, (size_t)(n * size));
        else for (int64_t i = 0; i < n; i += 1024) {
            int64_t m = n - i < 1024 ? n - i : 1024;
            load_row(block, x + i * x_size, c->x.dtype, m);
            store_row(out + i * size, c->out.dtype, block, m);
        }
        return 0;
    }
    for (int64_t i = 0; i < n; i++, out += out_step * size, x += x_step * x_size)
        if (same) memcpy(out, x, (size_t)size);
        else store1(out, c->out.dtype, load1(x, c->x.dtype));
    return 0;
}

static void copy_all(const Copy *c) {
    int64_t n = elements_of(&c->out), last = c->out.ndim ? c->out.shape[c->out.ndim - 1] : 1;
    if (n) parallel_for(n / last, last / 4 + 1, copy_row, (void *)c);
}

static void make_dense(Tensor *t) {
    int64_t stride = 1;
    for (int i = t->ndim - 1; i >= 0; stride *= t->shape[i--]) t->stride[i] = stride;
}

/* Between the CPU and the entered device, through a piece of pinned memory that is kept for the next time. */
enum { STAGE = 8 << 20 };
static int copy_by_stage(const Tensor *out, const Tensor *x, void *stage, void *stream) {
    Tensor middle = dtype_size(x->dtype) < dtype_size(out->dtype) ? *x : *out;         /* the fewer bytes */
    if (elements_of(out) * dtype_size(middle.dtype) > STAGE) {         /* the two halves of the first axis that has two */
        Tensor halves[2][2] = { { *out, *x }, { *out, *x } };
        int axis = 0;
        while (out->shape[axis] == 1) axis++;
        int64_t first = out->shape[axis] / 2;
        for (int i = 0; i < 2; i++) {
            Tensor *last = &halves[1][i];
            halves[0][i].shape[axis] = first;
            last->shape[axis] -= first;
            last->data = at(last, first * last->stride[axis]);
        }
        return copy_by_stage(&halves[0][0], &halves[0][1], stage, stream) ||
               copy_by_stage(&halves[1][0], &halves[1][1], stage, stream) ? -1 : 0;
    }
    make_dense(&middle);
    middle.data = stage;
    if (out->device) {
        copy_all(&(Copy){ .out = middle, .x = *x });
        return cuda->copy(out, &middle, stream) || cuda->synchronize(stream) ? -1 : 0;
    }
    if (cuda->copy(&middle, x, stream) || cuda->synchronize(stream)) return -1;
    copy_all(&(Copy){ .out = *out, .x = middle });
    return 0;
}

/* x, whose former work is on x_stream, into out of the same shape on the CPU or on x's device or another; without the GIL.
 * Waits for the copy where one side is the CPU's, unless that is pinned. */
typedef struct { Tensor t; int pinned; void *stream; } Side;

static int copy_with_cpu(const Side *out, const Side *x, void *stream) {
    static _Atomic(void *) spare;
    int64_t bytes = elements_of(&out->t) * dtype_size(out->t.dtype);
    if (out->pinned || x->pinned) return cuda->copy(&out->t, &x->t, stream);
    if (out->t.dtype == x->t.dtype && is_contiguous(&out->t) && is_contiguous(&x->t))
        return cuda->copy_bytes(out->t.data, x->t.data, bytes, stream) || cuda->synchronize(stream) ? -1 : 0;
    void *stage = atomic_exchange(&spare, NULL);
    if (!stage && cuda->allocate_pinned(STAGE, &stage)) return -1;
    int status = copy_by_stage(&out->t, &x->t, stage, stream);
    stage = atomic_exchange(&spare, stage);
    if (stage) cuda->release_pinned(stage);
    return status;
}

/* Between two devices go dense bytes of one dtype: x is brought into that form on its own device, out from it on its. */
static int copy_between_devices(const Side *out, const Side *x, void *stream) {
    int64_t bytes = elements_of(&out->t) * dtype_size(out->t.dtype);
    Tensor from = x->t, to = out->t;
    void *memory[2] = { NULL, NULL };
    int status = 0, entered;
    if (!is_contiguous(&from) || from.dtype != to.dtype) {
        from.dtype = to.dtype;
        make_dense(&from);
        status = (entered = cuda->enter(from.device - 1)) < 0 || cuda->allocate(bytes, &memory[0]);
        from.data = memory[0];
        status = status || cuda->copy(&from, &x->t, x->stream) ? -1 : 0;
        cuda->leave(entered);
    }
    if (!status) status = order(to.device, stream, from.device, x->stream);
    entered = cuda->enter(to.device - 1);
    if (entered < 0) status = -1;
    if (!status && !is_contiguous(&to)) {
        make_dense(&to);
        status = cuda->allocate(bytes, &memory[1]);
        to.data = memory[1];
    }
    if (!status) status = cuda->copy_peer(to.data, to.device - 1, from.data, from.device - 1, bytes, stream);
    if (!status && memory[1]) status = cuda->copy(&out->t, &to, stream);
    if (!status && (memory[0] || memory[1])) status = cuda->synchronize(stream);
    for (int i = 0; i < 2; i++) if (memory[i]) cuda->release(memory[i]);
    cuda->leave(entered);
    return status ? -1 : order(from.device, x->stream, to.device, stream);
}

/* *stream: where the copy was queued. */
static int copy_between(const Side *out, const Side *x, void **stream) {
    int device = out->t.device ? out->t.device : x->t.device, status = 0;
    *stream = out->t.device ? out->stream : x->stream;
    if (!device) return copy_all(&(Copy){ .out = out->t, .x = x->t }), 0;
    if (!elements_of(&out->t)) return 0;
    if (out->t.device && x->t.device && out->t.device != x->t.device) return copy_between_devices(out, x, *stream);
    if (x->t.device) status = order(device, *stream, device, x->stream);
    int entered = cuda->enter(device - 1);
    if (entered < 0) return -1;
    if (!status) status = out->t.device && x->t.device ? cuda->copy(&out->t, &x->t, *stream) : copy_with_cpu(out, x, *stream);
    cuda->leave(entered);
    if (!status && x->t.device) status = order(device, x->stream, device, *stream);
    return status;
}

/* For Python: 0, or -1 with an exception. */
static int copy_sides(const char *op, const Side *out, const Side *x, void **stream) {
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = copy_between(out, x, stream);
    Py_END_ALLOW_THREADS
    if (status) cuda_failed(op, out->t.device ? out->t.device : x->t.device);
    return status;
}

/* A Tensor's side; its work is on the thread's stream. -1 with an exception. */
static int side_of(const TensorObject *self, const char *op, Side *side) {
    *side = (Side){ self->t, self->pinned, NULL };
    if (!self->t.device || !own_stream(self->t.device, &side->stream)) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s", op, last_error());
    return -1;
}

/* A new Tensor on `device` with what `self` has. */
static TensorObject *copy_to(TensorObject *self, int device, const char *op) {
    Tensor t = self->t;
    Side out, x;
    void *stream;
    make_dense(&t);
    t.device = device;
    TensorObject *twin = new_tensor(&t, 0);
    if (twin && (side_of(twin, op, &out) || side_of(self, op, &x) || copy_sides(op, &out, &x, &stream))) Py_CLEAR(twin);
    return twin;
}

static PyObject *tensor_cpu(PyObject *object, PyObject *unused) {
    (void)unused;
    TensorObject *self = (TensorObject *)object;
    return self->t.device ? (PyObject *)copy_to(self, 0, "Tensor.cpu") : Py_NewRef(object);
}

static PyObject *tensor_fill(PyObject *object, PyObject *number) {
    static const double lowest[] = { INT32_MIN, -0x1p53, 0 }, highest[] = { INT32_MAX, 0x1p53, UINT8_MAX };  /* from I32 on */
    TensorObject *self = (TensorObject *)object;
    Copy c = { .out = self->t, .fill = 1 };
    double value = PyFloat_AsDouble(number);
    int dtype = self->t.dtype;
    if (PyErr_Occurred()) return NULL;
    if (self->readonly) return PyErr_Format(PyExc_ValueError, "Tensor.fill: the tensor is read-only");
    if (dtype >= I32 && !(value >= lowest[dtype - I32] && value <= highest[dtype - I32] && value == (double)(int64_t)value))
        return PyErr_Format(PyExc_ValueError, "Tensor.fill: %R is no %s", number, dtype_names[dtype]);
    switch (dtype) {
        case F64: memcpy(c.value, &value, 8); break;
        case I32: memcpy(c.value, &(int32_t){ (int32_t)value }, 4); break;
        case I64: memcpy(c.value, &(int64_t){ (int64_t)value }, 8); break;
        case U8: c.value[0] = (char)(uint8_t)value; break;
        default: store1(c.value, dtype, (float)value);
    }
    c.zero = !memcmp(c.value, (char[8]){0}, 8);
    Side side;
    if (side_of(self, "Tensor.fill", &side)) return NULL;
    int status = 0;
    enum { ROW = 1 << 18 };                                            /* if it is contiguous: many rows for many threads */
    Py_BEGIN_ALLOW_THREADS
    if (c.out.device) {
        int entered = cuda->enter(c.out.device - 1);
        status = entered < 0 ? -1 : cuda->fill(&c.out, c.value, side.stream);
        cuda->leave(entered);
    } else {
        if (is_contiguous(&c.out)) {
            int64_t n = elements_of(&c.out);
            c.out = (Tensor){ c.out.data, { n / ROW, ROW }, { ROW, 1 }, 2, dtype, 0 };
            copy_all(&c);
            c.out = (Tensor){ at(&c.out, n / ROW * ROW), { n % ROW }, { 1 }, 1, dtype, 0 };
        }
        copy_all(&c);
    }
    Py_END_ALLOW_THREADS
    return status ? cuda_failed("Tensor.fill", c.out.device) : Py_NewRef(Py_None);
}

static PyObject *tensor_copy(PyObject *object, PyObject *source);      /* needs borrow(), below */

static PyObject *get_shape(PyObject *object, void *unused) {
    (void)unused;
    const Tensor *t = &((TensorObject *)object)->t;
    PyObject *shape = PyTuple_New(t->ndim);
    for (int i = 0; shape && i < t->ndim; i++) PyTuple_SetItem(shape, i, PyLong_FromLongLong(t->shape[i]));
    return shape;
}
static PyObject *get_dtype(PyObject *object, void *unused) {
    (void)unused;
    return PyUnicode_FromString(dtype_names[((TensorObject *)object)->t.dtype]);
}
static PyObject *get_device(PyObject *object, void *unused) {
    (void)unused;
    return PyUnicode_FromString(device_name(((TensorObject *)object)->t.device).text);
}
static PyObject *get_pinned(PyObject *object, void *unused) {
    (void)unused;
    return PyBool_FromLong(((TensorObject *)object)->pinned);
}
static PyObject *get_ndim(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromLong(((TensorObject *)object)->t.ndim);
}
static PyObject *get_nbytes(PyObject *object, void *unused) {
    (void)unused;
    const Tensor *t = &((TensorObject *)object)->t;
    return PyLong_FromLongLong(elements_of(t) * dtype_size(t->dtype));
}
static PyObject *tensor_repr(PyObject *object) {
    PyObject *shape = get_shape(object, NULL), *text = NULL;
    const Tensor *t = &((TensorObject *)object)->t;
    const char *dtype = dtype_names[t->dtype];
    if (shape && t->device)
        text = PyUnicode_FromFormat("longlora.Tensor(shape=%R, dtype='%s', device='%s')", shape, dtype,
                                    device_name(t->device).text);
    else if (shape) text = PyUnicode_FromFormat("longlora.Tensor(shape=%R, dtype='%s')", shape, dtype);
    Py_XDECREF(shape);
    return text;
}

static int tensor_getbuffer(PyObject *object, Py_buffer *view, int flags) {
    static const char *const formats[] = { "f", NULL, "e", "d", "i", "q", "B" };
    TensorObject *self = (TensorObject *)object;
    const Tensor *t = &self->t;
    int asked = flags & ~PyBUF_STRIDES, strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES;
    int rows = !strides || (asked & (PyBUF_C_CONTIGUOUS | PyBUF_ANY_CONTIGUOUS)), columns = asked & PyBUF_F_CONTIGUOUS;
    const char *why = NULL;
    if (t->device) why = "Tensor: the tensor is on a GPU, the buffer protocol is for the CPU's memory; use cpu()";
    else if (!formats[t->dtype])
        why = "Tensor: the buffer protocol has no bfloat16; use view(shape, 'uint8'), numpy() or DLPack";
    else if ((flags & PyBUF_WRITABLE) && self->readonly) why = "Tensor: the tensor is read-only";
    else if (((rows || columns) && !is_contiguous(t)) || (columns && t->ndim > 1))
        why = "Tensor: the tensor is not contiguous in the order asked for";
    view->obj = NULL;
    if (why) return PyErr_SetString(PyExc_BufferError, why), -1;
    for (int i = 0; i < t->ndim; i++) {
        self->shape[i] = (Py_ssize_t)t->shape[i];
        self->strides[i] = (Py_ssize_t)(t->stride[i] * dtype_size(t->dtype));
    }
    *view = (Py_buffer){ .buf = t->data, .obj = Py_NewRef(object), .len = (Py_ssize_t)(elements_of(t) * dtype_size(t->dtype)),
                         .itemsize = (Py_ssize_t)dtype_size(t->dtype), .readonly = self->readonly, .ndim = t->ndim,
                         .format = flags & PyBUF_FORMAT ? (char *)formats[t->dtype] : NULL,
                         .shape = flags & PyBUF_ND ? self->shape : NULL,
                         .strides = strides ? self->strides : NULL };
    return 0;
}

/* ---- DLPack out ---------------------------------------------------------------------------------------------------- */

static const struct { uint8_t code, bits; } dl_types[] = {
    { kDLFloat, 32 }, { kDLBfloat, 16 }, { kDLFloat, 16 }, { kDLFloat, 64 }, { kDLInt, 32 }, { kDLInt, 64 }, { kDLUInt, 8 } };

/* One allocation holds whichever managed tensor was asked for, its shape and strides; the context is the Tensor. */
typedef struct {
    union { DLManagedTensorVersioned versioned; DLManagedTensor old; } managed;
    int64_t shape[MAX_NDIM], strides[MAX_NDIM];
    PyObject *owner;
} Export;

static void release_export(Export *e) {
    if (!Py_IsInitialized()) return;                                   /* after the interpreter there is nobody to tell */
    PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(e->owner);
    PyMem_Free(e);
    PyGILState_Release(state);
}
static void delete_versioned(DLManagedTensorVersioned *m) { release_export(m->manager_ctx); }
static void delete_old(DLManagedTensor *m) { release_export(m->manager_ctx); }

static void drop_capsule(PyObject *capsule) {                          /* a capsule that nobody took */
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *m = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        m->deleter(m);
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *m = PyCapsule_GetPointer(capsule, "dltensor");
        m->deleter(m);
    }
}

/* A pair of ints, as max_version and dl_device are; 1, 0 for None, -1 with an exception. */
static int read_pair(PyObject *pair, const char *name, int *first, int *second) {
    if (pair == Py_None) return 0;
    if (PyTuple_Check(pair) && PyArg_ParseTuple(pair, "ii", first, second)) return 1;
    PyErr_Format(PyExc_TypeError, "Tensor.__dlpack__: %s should be two integers, got %R", name, pair);
    return -1;
}

/* The consumer's stream, by the words of the array API, waits for the thread's; 0, or -1 with an exception. */
static int join_stream(int device, PyObject *stream) {
    static const char op[] = "Tensor.__dlpack__";
    unsigned long long handle = 1;                                     /* None: the legacy default stream */
    void *own;
    int of;
    if (stream != Py_None) {
        long long given = PyLong_AsLongLong(stream);
        if (given == -1 && !PyErr_Occurred()) return 0;                /* -1: the consumer sees to it */
        if (given == -1 || given < -1 || given == 0)
            return PyErr_Format(PyExc_BufferError, "%s: stream should be None, -1, 1 (legacy default), 2 (per thread) or a "
                                "handle, got %R", op, stream), -1;
        handle = (unsigned long long)given;
    }
    if (own_stream(device, &own)) return PyErr_Format(PyExc_ValueError, "%s: %s", op, last_error()), -1;
    if (cuda->stream_device((void *)(uintptr_t)handle, &of)) return cuda_failed(op, device), -1;
    if (of >= 0 && of != device - 1)
        return PyErr_Format(PyExc_BufferError, "%s: stream is of cuda:%d, the tensor is on %s", op, of,
                            device_name(device).text), -1;
    if (!own) own = (void *)1;
    return order(device, (void *)(uintptr_t)handle, device, own) ? (cuda_failed(op, device), -1) : 0;
}

static PyObject *tensor_dlpack(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = { "stream", "max_version", "dl_device", "copy", NULL };
    PyObject *stream = Py_None, *max_version = Py_None, *device = Py_None, *copy = Py_None;
    TensorObject *self = (TensorObject *)object;
    int type = self->t.device ? kDLCUDA : kDLCPU, id = self->t.device ? self->t.device - 1 : 0, major = 0, minor = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream, &max_version, &device, &copy) ||
        read_pair(device, "dl_device", &type, &id) < 0 || read_pair(max_version, "max_version", &major, &minor) < 0)
        return NULL;
    int target = type == kDLCUDA ? id + 1 : 0, versioned = major >= 1, copied = copy == Py_True || target != self->t.device;
    if ((type != kDLCPU || id) && (type != kDLCUDA || usable(id)))
        return PyErr_Format(PyExc_BufferError, "Tensor.__dlpack__: dl_device should be (1, 0) or (2, a CUDA device), got %R",
                            device);
    if (copied && copy == Py_False)
        return PyErr_Format(PyExc_BufferError, "Tensor.__dlpack__: the tensor is on %s and cannot be had on %s without a copy",
                            device_name(self->t.device).text, device_name(target).text);
    if (!target && stream != Py_None)
        return PyErr_Format(PyExc_BufferError, "Tensor.__dlpack__: stream should be None on the CPU, got %R", stream);
    if (copied) self = copy_to(self, target, "Tensor.__dlpack__");
    else Py_INCREF(object);
    if (!self || (target && join_stream(target, stream))) { Py_XDECREF((PyObject *)self); return NULL; }
    Export *e = self->readonly && !versioned ? NULL : PyMem_Malloc(sizeof *e);
    if (!e) {
        if (versioned || !self->readonly) PyErr_NoMemory();
        else PyErr_SetString(PyExc_BufferError, "Tensor.__dlpack__: a read-only tensor needs max_version of at least (1, 0)");
        Py_DECREF(self);
        return NULL;
    }
    for (int i = 0; i < self->t.ndim; i++) { e->shape[i] = self->t.shape[i]; e->strides[i] = self->t.stride[i]; }
    e->owner = (PyObject *)self;                                       /* the reference taken above */
    DLTensor t = { self->t.data, { type, id }, self->t.ndim, { dl_types[self->t.dtype].code, dl_types[self->t.dtype].bits, 1 },
                   e->shape, e->strides, 0 };
    uint64_t flags = copied ? DLPACK_FLAG_BITMASK_IS_COPIED : self->readonly ? DLPACK_FLAG_BITMASK_READ_ONLY : 0;
    if (versioned) e->managed.versioned = (DLManagedTensorVersioned){ { 1, 0 }, e, delete_versioned, flags, t };
    else e->managed.old = (DLManagedTensor){ t, e, delete_old };
    PyObject *capsule = PyCapsule_New(&e->managed, versioned ? "dltensor_versioned" : "dltensor", drop_capsule);
    if (!capsule) release_export(e);
    return capsule;
}

static PyObject *tensor_dlpack_device(PyObject *object, PyObject *unused) {
    (void)unused;
    int device = ((TensorObject *)object)->t.device;
    return Py_BuildValue("(ii)", device ? kDLCUDA : kDLCPU, device ? device - 1 : 0);
}

static PyMethodDef tensor_methods[] = {
    { "wrap", (PyCFunction)(void (*)(void))tensor_wrap, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
      "wrap(buffer, shape, dtype, offset=0)\n--\n\n"
      "The bytes of any buffer from offset on, without a copy; read-only if the buffer is." },
    { "view", (PyCFunction)(void (*)(void))tensor_view, METH_VARARGS | METH_KEYWORDS,
      "view($self, shape, dtype=None, offset=0)\n--\n\nThe same memory from `offset` bytes on, in another shape and dtype." },
    { "reshape", tensor_reshape, METH_O, "reshape($self, shape, /)\n--\n\nThe same elements in another shape; never a copy." },
    { "numpy", tensor_numpy, METH_NOARGS, "numpy($self, /)\n--\n\nAn ndarray on the same memory. bfloat16 needs ml_dtypes." },
    { "__array__", (PyCFunction)(void (*)(void))tensor_array, METH_VARARGS | METH_KEYWORDS,
      "__array__($self, dtype=None, copy=None)\n--\n\n" },
    { "cpu", tensor_cpu, METH_NOARGS,
      "cpu($self, /)\n--\n\nA copy in the CPU's memory, which it waits for; the tensor itself if it is there." },
    { "fill", tensor_fill, METH_O, "fill($self, value, /)\n--\n\nSets every element." },
    { "copy_", tensor_copy, METH_O,
      "copy_($self, source, /)\n--\n\nCopies an array of the same shape, on any device; float dtypes are converted.\n"
      "Between the CPU and a GPU it waits for the copy, unless the CPU's side is a pinned Tensor; other copies are queued." },
    { "__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS,
      "__dlpack__($self, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n" },
    { "__dlpack_device__", tensor_dlpack_device, METH_NOARGS, "__dlpack_device__($self, /)\n--\n\n" },
    { NULL, NULL, 0, NULL },
};
static PyGetSetDef tensor_getset[] = {
    { "shape", get_shape, NULL, "Sizes of the axes.", NULL }, { "dtype", get_dtype, NULL, "The dtype's name.", NULL },
    { "device", get_device, NULL, "\"cpu\" or \"cuda:N\".", NULL },
    { "pinned", get_pinned, NULL, "Whether GPUs copy from and to it in the background.", NULL },
    { "ndim", get_ndim, NULL, "Number of axes.", NULL },
    { "nbytes", get_nbytes, NULL, "Bytes of the elements.", NULL }, { NULL, NULL, NULL, NULL, NULL } };
static PyType_Slot tensor_slots[] = {
    { Py_tp_doc, "Tensor(shape, dtype=\"float32\", device=\"cpu\", *, pinned=False)\n--\n\n"
                 "Zeros with a shape: allocate, view, copy, export; not an array library.\n"
                 "dtype float32, bfloat16, float16, float64, int32, int64 or uint8; at most 4 axes.\n"
                 "device cpu, cuda or cuda:N; pinned: memory of the CPU that GPUs copy from and to in the background.\n"
                 "Speaks DLPack and the buffer protocol, both ways." },
    { Py_tp_new, tensor_new }, { Py_tp_dealloc, tensor_dealloc }, { Py_tp_methods, tensor_methods },
    { Py_tp_getset, tensor_getset },
    { Py_tp_repr, tensor_repr }, { Py_mp_subscript, tensor_getitem }, { Py_bf_getbuffer, tensor_getbuffer }, { 0, NULL } };
static PyType_Spec tensor_spec = { "longlora.Tensor", sizeof(TensorObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                                   tensor_slots };

/* Raises "op: argument ..."; -1. */
static int refuse(PyObject *type, const char *op, const Arg *arg, const char *format, ...) {
    va_list args;
    va_start(args, format);
    PyObject *words = PyUnicode_FromFormatV(format, args);
    va_end(args);
    if (words) PyErr_Format(type, "%s: %s %U", op, arg->name, words);
    Py_XDECREF(words);
    return -1;
}

/* ---- borrowing --------------------------------------------------------------------------------------------------- */

/* What must be given back when the call is over: nothing for NumPy and Tensor, a managed tensor or a capsule else. */
typedef struct { PyObject *capsule; DLManagedTensorVersioned *managed; int device; } Loan;

/* Where a call's work goes: the current stream of the first argument whose library has one in the exchange API (torch), else
 * the hook's answer for the first one (CuPy's current stream), else the thread's own. `like` is that argument. */
typedef struct { PyObject *like; void *stream; enum { NOWHERE, OWN, THEIRS } whose; } Queue;

/* Capsules whose memory queued work still reads or writes: a producer may use it again as soon as it has its capsule back.
 * They go back when the work has run, which later calls look for. */
enum { MOST_HELD = 64 };
static struct { PyObject *capsule; void *mark; } held[MOST_HELD];
static int held_count;

static void release_held(int all) {
    for (int i = 0; i < held_count;) {
        if (all) cuda->await(held[i].mark);
        if (!all && !cuda->passed(held[i].mark)) { i++; continue; }
        PyObject *capsule = held[i].capsule;
        cuda->forget(held[i].mark);
        held[i] = held[--held_count];
        Py_DECREF(capsule);                                            /* may run Python, which may come here again */
    }
}

static void hold(PyObject *capsule, int device, void *stream) {
    void *mark = NULL;
    release_held(held_count == MOST_HELD);
    int entered = cuda->enter(device - 1);
    if (entered < 0 || cuda->mark(stream, &mark)) Py_DECREF(capsule);
    else {
        held[held_count].capsule = capsule;
        held[held_count++].mark = mark;
    }
    cuda->leave(entered);
}

/* queue: where work on the loans is queued, NULL if nothing is. */
static void give_back(Loan *loans, int count, const Queue *queue) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);                            /* deleters may run Python, without an exception set */
    for (int i = 0; i < count; i++) {
        if (queue && loans[i].capsule && loans[i].device) hold(loans[i].capsule, loans[i].device, queue->stream);
        else Py_XDECREF(loans[i].capsule);                             /* still named as it came: its destructor frees it */
        if (loans[i].managed && loans[i].managed->deleter) loans[i].managed->deleter(loans[i].managed);
    }
    PyErr_Restore(type, value, traceback);
}


static int borrow_numpy(PyArrayObject *array, Tensor *t, const char *op, const Arg *arg) {
    static const struct { int num, dtype; } nums[] = {
        { NPY_FLOAT32, F32 }, { NPY_FLOAT16, F16 }, { NPY_FLOAT64, F64 }, { NPY_INT32, I32 }, { NPY_INT64, I64 },
        { NPY_UINT8, U8 } };
    static atomic_int bfloat16 = NPY_NOTYPE;                           /* the number ml_dtypes was given, once it was seen */
    int num = PyArray_TYPE(array);
    t->dtype = num == bfloat16 ? BF16 : -1;
    for (size_t i = 0; i < sizeof nums / sizeof *nums; i++) if (nums[i].num == num) t->dtype = nums[i].dtype;
    if (t->dtype < 0) {
        PyObject *name = PyObject_GetAttrString((PyObject *)PyArray_DESCR(array), "name");
        if (!name) return -1;
        if (!PyUnicode_CompareWithASCIIString(name, "bfloat16")) { t->dtype = BF16; bfloat16 = num; }
        else refuse(PyExc_TypeError, op, arg, "has dtype %U, which no op takes", name);
        Py_DECREF(name);
        if (t->dtype < 0) return -1;
    }
    t->ndim = PyArray_NDIM(array);
    if (t->ndim > MAX_NDIM)
        return refuse(PyExc_ValueError, op, arg, "should have %d axes, got %d", arg->ndim, t->ndim);
    if (!PyArray_ISNOTSWAPPED(array))
        return refuse(PyExc_TypeError, op, arg, "is not in the machine's byte order");
    if (arg->output && !PyArray_ISWRITEABLE(array)) return refuse(PyExc_ValueError, op, arg, "is an output and read-only");
    int64_t size = dtype_size(t->dtype);
    for (int i = 0; i < t->ndim; i++) {
        t->shape[i] = PyArray_DIM(array, i);
        t->stride[i] = PyArray_STRIDE(array, i) / size;
        if (PyArray_STRIDE(array, i) % size && t->shape[i] > 1)
            return refuse(PyExc_ValueError, op, arg, "axis %d has a stride that is no multiple of its element", i);
    }
    t->data = PyArray_DATA(array);
    return 0;
}

static int refuse_device(int index, const char *op, const Arg *arg) {
    return refuse(PyExc_BufferError, op, arg, "is on cuda:%d, which cannot be used: %s", index, last_error());
}

static int borrow_dltensor(const DLTensor *d, Tensor *t, const char *op, const Arg *arg) {
    int device = (int)d->device.device_type;
    if (device == kDLCUDA) {
        if (usable(d->device.device_id))
            return refuse_device(d->device.device_id, op, arg);
        t->device = d->device.device_id + 1;
    } else if (device != kDLCPU && device != kDLCUDAHost && device != kDLCUDAManaged)
        return refuse(PyExc_BufferError, op, arg, "should be on the CPU or a CUDA device, got DLPack device type %d", device);
    t->dtype = -1;
    for (int i = 0; i < DTYPES; i++)
        if (dl_types[i].code == d->dtype.code && dl_types[i].bits == d->dtype.bits && d->dtype.lanes == 1) t->dtype = i;
    if (t->dtype < 0)
        return refuse(PyExc_TypeError, op, arg, "has DLPack dtype (%d, %d, %d), which no op takes", d->dtype.code,
                      d->dtype.bits, d->dtype.lanes);
    if (d->ndim < 0 || d->ndim > MAX_NDIM)
        return refuse(PyExc_ValueError, op, arg, "should have %d axes, got %d", arg->ndim, d->ndim);
    t->ndim = d->ndim;
    int64_t dense = 1;
    for (int i = d->ndim - 1; i >= 0; i--) {
        if (d->shape[i] < 0) return refuse(PyExc_BufferError, op, arg, "has a negative size in its capsule");
        t->shape[i] = d->shape[i];
        t->stride[i] = d->strides ? d->strides[i] : dense;
        dense *= d->shape[i];
    }
    t->data = (char *)d->data + d->byte_offset;
    return 0;
}

/* The C exchange API of an object's type, or NULL. Looked up anew each call: one attribute of a type, about 50 ns. */
static const DLPackExchangeAPI *exchange_api(PyObject *object) {
    PyObject *capsule = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__dlpack_c_exchange_api__");
    if (!capsule) { PyErr_Clear(); return NULL; }
    const DLPackExchangeAPIHeader *header = NULL;
    if (PyCapsule_IsValid(capsule, "dlpack_exchange_api")) header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule);
    while (header && header->version.major > 1) header = header->prev_api;
    return header && header->version.major == 1 ? (const DLPackExchangeAPI *)header : NULL;
}

/* A producer's own words, as a BufferError that says whose argument it was. */
static int producer_failed(const char *op, const Arg *arg) {
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) return -1;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    refuse(PyExc_BufferError, op, arg, "cannot be borrowed: %S", value);
    Py_XDECREF(type); Py_XDECREF(value); Py_XDECREF(traceback);
    return -1;
}

static int borrow_managed(const DLManagedTensorVersioned *m, Tensor *t, const char *op, const Arg *arg) {
    if (m->version.major != 1)
        return refuse(PyExc_BufferError, op, arg, "speaks DLPack %u, wanted 1", (unsigned)m->version.major);
    if (arg->output && (m->flags & DLPACK_FLAG_BITMASK_READ_ONLY))
        return refuse(PyExc_ValueError, op, arg, "is an output and read-only");
    return borrow_dltensor(&m->dl_tensor, t, op, arg);
}

/* The device that an object says it is on, as Tensor counts: 0 for the CPU and what borrow_dltensor refuses; -1 with an
 * exception. */
static int device_of(PyObject *object, const char *op, const Arg *arg) {
    int type = kDLCPU, id = 0;
    PyObject *pair = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (!pair && !PyErr_ExceptionMatches(PyExc_AttributeError)) return producer_failed(op, arg);
    if (!pair) PyErr_Clear();                                          /* NumPy's consumers want it, so only odd ones lack it */
    int status = pair && (!PyTuple_Check(pair) || !PyArg_ParseTuple(pair, "ii", &type, &id)) ? producer_failed(op, arg) : 0;
    Py_XDECREF(pair);
    if (status || type != kDLCUDA) return status;
    return usable(id) ? refuse_device(id, op, arg) : id + 1;
}

/* Brings longlora/cuda.py in, which sets the hooks. */
static int ready(void) {
    if (workspace_hook) return 0;
    PyObject *module = PyImport_ImportModule("longlora.cuda");
    Py_XDECREF(module);
    return module ? 0 : -1;
}

/* An argument is on `device`: the queue may follow its stream. */
static int join_queue(Queue *queue, PyObject *object, int device, const DLPackExchangeAPI *api, const char *op,
                      const Arg *arg) {
    if (queue->whose == THEIRS || (queue->whose == OWN && !api)) return 0;
    queue->like = object;
    queue->whose = api ? THEIRS : OWN;
    if (api) return api->current_work_stream(kDLCUDA, device - 1, &queue->stream) ? producer_failed(op, arg) : 0;
    if (!is_tensor(object)) {
        PyObject *stream = ready() ? NULL : PyObject_CallFunction(stream_hook, "Oi", object, device - 1);
        if (stream && stream != Py_None) queue->stream = (void *)(uintptr_t)PyLong_AsUnsignedLongLong(stream);
        int own = stream == Py_None;
        Py_XDECREF(stream);
        if (PyErr_Occurred()) return -1;
        if (!own) return 0;
    }
    return own_stream(device, &queue->stream) ? refuse(PyExc_ValueError, op, arg, "cannot be used: %s", last_error()) : 0;
}

static int borrow_capsule(PyObject *object, Tensor *t, Loan *loan, Queue *queue, const char *op, const Arg *arg) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (!method) {
        PyErr_Clear();
        refuse(PyExc_TypeError, op, arg, "must be an array (NumPy or DLPack), got %R", (PyObject *)Py_TYPE(object));
        return -1;
    }
    PyObject *none = NULL, *kwargs = NULL, *capsule = NULL;
    loan->device = device_of(object, op, arg);
    if (loan->device < 0 || (loan->device && join_queue(queue, object, loan->device, NULL, op, arg))) goto failed;
    none = PyTuple_New(0);
    kwargs = Py_BuildValue("{s(ii)}", "max_version", 1, 0);
    if (!none || !kwargs) goto failed;
    if (loan->device) {                                                /* 0 is no word for the default stream there, 1 is */
        PyObject *stream = PyLong_FromUnsignedLongLong(queue->stream ? (uintptr_t)queue->stream : 1);
        int status = stream ? PyDict_SetItemString(kwargs, "stream", stream) : -1;
        Py_XDECREF(stream);
        if (status) goto failed;
    }
    capsule = PyObject_Call(method, none, kwargs);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {         /* a producer from before max_version */
        PyErr_Clear();
        if (PyDict_DelItemString(kwargs, "max_version")) goto failed;
        capsule = PyObject_Call(method, none, kwargs);
    }
    if (!capsule) producer_failed(op, arg);
failed:
    Py_DECREF(method); Py_XDECREF(none); Py_XDECREF(kwargs);
    if (!capsule) return -1;
    loan->capsule = capsule;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned"))
        return borrow_managed(PyCapsule_GetPointer(capsule, "dltensor_versioned"), t, op, arg);
    if (!PyCapsule_IsValid(capsule, "dltensor"))
        return refuse(PyExc_TypeError, op, arg, "gave %R instead of a DLPack capsule", capsule);
    if (arg->output)                                                   /* an old capsule cannot say that it is read-only */
        return refuse(PyExc_BufferError, op, arg, "is an output and should speak DLPack 1, got an old capsule");
    return borrow_dltensor(&((DLManagedTensor *)PyCapsule_GetPointer(capsule, "dltensor"))->dl_tensor, t, op, arg);
}

/* 0, -1 with an exception, or 1: borrow_capsule() is to be called when all other arguments of the call are borrowed, since it
 * needs to know the stream. */
static int borrow(PyObject *object, Tensor *t, Loan *loan, Queue *queue, const char *op, const Arg *arg) {
    if (object == Py_None) {
        t->ndim = -1;
        if (arg->optional) return 0;
        refuse(PyExc_TypeError, op, arg, "must be an array, got None");
        return -1;
    }
    if (is_tensor(object)) {
        const TensorObject *tensor = (TensorObject *)object;
        *t = tensor->t;
        if (arg->output && tensor->readonly) return refuse(PyExc_ValueError, op, arg, "is an output and read-only");
        return t->device ? join_queue(queue, object, t->device, NULL, op, arg) : 0;
    }
    if (PyArray_Check(object)) return borrow_numpy((PyArrayObject *)object, t, op, arg);
    const DLPackExchangeAPI *api = exchange_api(object);
    if (!api) return 1;
    int status;
    if (api->dltensor_from_py_object_no_sync && !arg->output) {        /* the cheaper way; it has no read-only flag */
        DLTensor d;
        if (api->dltensor_from_py_object_no_sync(object, &d)) return producer_failed(op, arg);
        status = borrow_dltensor(&d, t, op, arg);
    } else {
        if (api->managed_tensor_from_py_object_no_sync(object, &loan->managed)) return producer_failed(op, arg);
        status = borrow_managed(loan->managed, t, op, arg);
    }
    return !status && t->device ? join_queue(queue, object, t->device, api, op, arg) : status;
}

static PyObject *tensor_copy(PyObject *object, PyObject *source) {
    static const Arg arg = { .name = "source", .ndim = MAX_NDIM };
    TensorObject *self = (TensorObject *)object;
    Side out, side = { .pinned = is_tensor(source) && ((TensorObject *)source)->pinned };
    Tensor *x = &side.t;
    Loan loan = {0};
    Queue queue = {0};
    static const char op[] = "Tensor.copy_";
    if (self->readonly) return PyErr_Format(PyExc_ValueError, "Tensor.copy_: the tensor is read-only");
    if (side_of(self, op, &out)) return NULL;
    int status = borrow(source, x, &loan, &queue, op, &arg);
    if (status > 0) status = borrow_capsule(source, x, &loan, &queue, op, &arg);
    if (!status && x->ndim != self->t.ndim)
        status = refuse(PyExc_ValueError, op, &arg, "should have %d axes, got %d", self->t.ndim, x->ndim);
    for (int i = 0; !status && i < self->t.ndim; i++) if (x->shape[i] != self->t.shape[i])
        status = refuse(PyExc_ValueError, op, &arg, "axis %d should be %lld, got %lld", i, (long long)self->t.shape[i],
                        (long long)x->shape[i]);
    if (!status && x->dtype != self->t.dtype && (x->dtype > F16 || self->t.dtype > F16))
        status = refuse(PyExc_TypeError, op, &arg, "should be %s, got %s", dtype_names[self->t.dtype], dtype_names[x->dtype]);
    if (!status && x->device && (uintptr_t)x->data % (uintptr_t)dtype_size(x->dtype))
        status = refuse(PyExc_ValueError, op, &arg, "is not aligned to its element size");
    if (!status && overlap(&self->t, x)) status = refuse(PyExc_ValueError, op, &arg, "overlaps the tensor");
    side.stream = queue.stream;
    if (!status) status = copy_sides(op, &out, &side, &queue.stream);
    give_back(&loan, 1, status ? NULL : &queue);
    return status ? NULL : Py_NewRef(Py_None);
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

/* Rows may come with the axes that people know them by, [B,T,C] for [M,C]: leading axes are read as one where a spec starts
 * with M. They must lie so, and be the same wherever a call has them. */
static int merge_rows(const char *op, const Spec *spec, Tensor *tensors) {
    const Arg *first = NULL;
    int64_t shape[MAX_NDIM];
    int axes = 0;
    for (int i = spec->tensors - 1; i >= 0; i--) {                     /* inputs before outputs */
        const Arg *arg = &spec->args[i];
        Tensor *t = &tensors[i];
        int last = t->ndim - arg->ndim;                                /* of those that become one */
        if (!given(t) || arg->letters[0] != 'M' || last <= 0) continue;
        if (!first) {
            first = arg;
            axes = last + 1;
            memcpy(shape, t->shape, sizeof shape);
        }
        if (last + 1 != axes)
            return refuse(PyExc_ValueError, op, arg, "should have %d axes as %s has before its last ones, got %d", axes,
                          first->name, last + 1);
        int64_t rows = 1, stride = 0;
        for (int axis = last; axis >= 0; axis--) {
            if (t->shape[axis] != shape[axis])
                return refuse(PyExc_ValueError, op, arg, "axis %d should be %lld as %s's is, got %lld", axis,
                              (long long)shape[axis], first->name, (long long)t->shape[axis]);
            if (t->shape[axis] != 1) {
                if (rows == 1) stride = t->stride[axis];
                else if (rows && t->stride[axis] != rows * stride)
                    return refuse(PyExc_ValueError, op, arg, "axes 0..%d should lie as one, with stride %lld of axis %d, got %lld",
                                  last, (long long)(rows * stride), axis, (long long)t->stride[axis]);
            }
            rows *= t->shape[axis];
        }
        t->shape[0] = rows;
        t->stride[0] = stride;
        for (int axis = 1; axis < arg->ndim; axis++) {
            t->shape[axis] = t->shape[last + axis];
            t->stride[axis] = t->stride[last + axis];
        }
        t->ndim = arg->ndim;
    }
    return 0;
}

static int check(const char *op, const Spec *spec, const Tensor *t) {
    int64_t letters[128];
    memset(letters, -1, sizeof letters);
    int common = -1, first = -1;
    const char *common_name = NULL;
    for (int i = 0; i < spec->tensors; i++) {
        const Arg *arg = &spec->args[i];
        if (!given(&t[i])) continue;
        if (first < 0) first = i;
        if (t[i].device != t[first].device)
            return refuse(PyExc_ValueError, op, arg, "should be on %s as %s is, got %s", device_name(t[first].device).text,
                          spec->args[first].name, device_name(t[i].device).text);
        if (arg->dtype == COMMON) {
            if (common < 0) { common = t[i].dtype; common_name = arg->name; }
            if (t[i].dtype != F32 && t[i].dtype != BF16 && t[i].dtype != F16)
                return refuse(PyExc_TypeError, op, arg, "should be float32, bfloat16 or float16, got %s",
                              dtype_names[t[i].dtype]);
            if (t[i].dtype != common)
                return refuse(PyExc_TypeError, op, arg, "should be %s as %s is, got %s",
                              dtype_names[common], common_name, dtype_names[t[i].dtype]);
        } else if (arg->dtype == ANY ? t[i].dtype > F16 : t[i].dtype != arg->dtype) {
            return refuse(PyExc_TypeError, op, arg, "should be %s, got %s",
                          arg->dtype == ANY ? "float32, bfloat16 or float16" : dtype_names[arg->dtype],
                          dtype_names[t[i].dtype]);
        }
        if (t[i].ndim != arg->ndim)
            return refuse(PyExc_ValueError, op, arg, "should have %d axes, got %d", arg->ndim, t[i].ndim);
    }
    for (int input = 1; input >= 0; input--)                           /* inputs say what the letters are, outputs follow */
        for (int i = 0; i < spec->tensors; i++) {
            const Arg *arg = &spec->args[i];
            if (!given(&t[i]) || arg->output == input) continue;
            for (int axis = 0; axis < arg->ndim; axis++) {
                unsigned char letter = (unsigned char)arg->letters[axis];
                int64_t *size = &letters[letter];
                if (letter >= '0' && letter <= '9') *size = letter - '0';
                if (*size < 0) *size = t[i].shape[axis];
                if (*size != t[i].shape[axis])
                    return refuse(PyExc_ValueError, op, arg, "axis %d should be %c=%lld, got %lld", axis,
                                  letter, (long long)*size, (long long)t[i].shape[axis]);
            }
            int64_t elements = 1;
            for (int axis = 0; axis < arg->ndim; axis++) elements *= t[i].shape[axis];
            int last = arg->ndim - 1;
            if (elements && last >= 0 && !arg->free_strides && t[i].shape[last] > 1 && t[i].stride[last] != 1)
                return refuse(PyExc_ValueError, op, arg, "axis %d should be dense (stride 1), got stride %lld", last,
                              (long long)t[i].stride[last]);
            if (elements && (uintptr_t)t[i].data % (uintptr_t)dtype_size(t[i].dtype))
                return refuse(PyExc_ValueError, op, arg, "is not aligned to its element size");
        }
    return 0;
}

static int same_memory(const Tensor *a, const Tensor *b) {
    if (a->data != b->data || a->ndim != b->ndim || a->dtype != b->dtype) return 0;
    for (int i = 0; i < a->ndim; i++)
        if (a->shape[i] != b->shape[i] || (a->shape[i] > 1 && a->stride[i] != b->stride[i])) return 0;
    return 1;
}

/* The bytes that t touches in each period of `pitch` bytes, from its first on; 0 if it does not keep to such periods. */
static int64_t reach_within(const Tensor *t, int64_t pitch) {
    int64_t size = dtype_size(t->dtype), reach = size;
    for (int i = 0; i < t->ndim; i++) {
        int64_t stride = t->stride[i] * size;
        if (t->shape[i] == 1 || stride % pitch == 0) continue;
        if (stride < 0 || stride > pitch) return 0;
        reach += (t->shape[i] - 1) * stride;
    }
    return reach;
}

/* Whether a and b lie side by side in the rows of one matrix, as q, k and v do: modulo the row's length, which is one of
 * their strides, they do not meet. */
static int interleaved(const Tensor *a, const Tensor *b) {
    for (int i = 0; i < a->ndim; i++) {
        int64_t pitch = a->stride[i] * dtype_size(a->dtype);
        if (a->shape[i] == 1 || pitch <= 0) continue;
        int64_t reach[2] = { reach_within(a, pitch), reach_within(b, pitch) };
        int64_t offset = (((char *)b->data - (char *)a->data) % pitch + pitch) % pitch;
        if (reach[0] && reach[1] && offset >= reach[0] && offset + reach[1] <= pitch) return 1;
    }
    return 0;
}

/* Whether two elements of t share memory. Axes in the order of their strides: each must step over all below it. */
static int overlaps_itself(const Tensor *t) {
    int done[MAX_NDIM] = {0};
    int64_t reach = 1;
    if (elements_of(t) == 0) return 0;
    for (int n = 0; n < t->ndim; n++) {
        int least = -1;
        for (int i = 0; i < t->ndim; i++)
            if (!done[i] && (least < 0 || llabs(t->stride[i]) < llabs(t->stride[least]))) least = i;
        done[least] = 1;
        if (t->shape[least] == 1) continue;
        if (llabs(t->stride[least]) < reach) return 1;
        reach += (t->shape[least] - 1) * llabs(t->stride[least]);
    }
    return 0;
}

static int check_overlap(const char *op, const Spec *spec, const Tensor *t) {
    for (int i = 0; i < spec->outputs; i++) {
        if (!given(&t[i])) continue;
        if (overlaps_itself(&t[i]))
            return refuse(PyExc_ValueError, op, &spec->args[i], "is an output and has elements that share memory");
        for (int j = i + 1; j < spec->tensors; j++) {
            if (!given(&t[j]) || !overlap(&t[i], &t[j]) || interleaved(&t[i], &t[j])) continue;
            if (spec->args[j].may_alias && same_memory(&t[i], &t[j])) continue;
            return refuse(PyExc_ValueError, op, &spec->args[i], "is an output and overlaps %s", spec->args[j].name);
        }
    }
    return 0;
}

/* ---- the call ---------------------------------------------------------------------------------------------------- */

static atomic_int_least32_t *calls;    /* how often each op ran, for tests that ask which kernels a step used */
static int isa;

/* Queues the op; 0, or -1 with an exception. */
static int call_cuda(const Op *op, const void *all, int device, const Queue *queue) {
    static const Arg room_arg = { .name = "workspace", .ndim = 1, .output = 1 };
    CudaCall how = { .stream = queue->stream, .device = device - 1 };
    PyObject *room = NULL;
    Loan loan = {0};
    Queue unused = {0};
    if (ready()) return -1;
    how.workspace_bytes = op->workspace ? op->workspace(all) : 0;
    if (how.workspace_bytes < 0) return PyErr_SetString(PyExc_ValueError, last_error()), -1;
    if (how.workspace_bytes) {
        Tensor t = {0};
        room = PyObject_CallFunction(workspace_hook, "LiKO", (long long)how.workspace_bytes, how.device,
                                     (unsigned long long)(uintptr_t)how.stream, queue->like);
        int status = room ? borrow(room, &t, &loan, &unused, op->name, &room_arg) : -1;
        if (status > 0) status = borrow_capsule(room, &t, &loan, &unused, op->name, &room_arg);
        int64_t bytes = elements_of(&t) * dtype_size(t.dtype);
        if (!status && (t.device != device || bytes < how.workspace_bytes || (uintptr_t)t.data % 256))
            status = refuse(PyExc_SystemError, op->name, &room_arg, "should be %lld bytes on %s, aligned to 256, got %R",
                            (long long)how.workspace_bytes, device_name(device).text, room);
        if (status) { give_back(&loan, 1, NULL); Py_XDECREF(room); return -1; }
        how.workspace = t.data;
    }
    int status;
    Py_BEGIN_ALLOW_THREADS
    int entered = cuda->enter(how.device);
    status = entered < 0 ? -1 : op->cuda(all, &how);
    cuda->leave(entered);
    Py_END_ALLOW_THREADS
    if (status) {                                                      /* "op: ..." is the kernel's word on its arguments */
        size_t n = strlen(op->name);
        if (!strncmp(last_error(), op->name, n) && last_error()[n] == ':') PyErr_SetString(PyExc_ValueError, last_error());
        else cuda_failed(op->name, device);
    }
    give_back(&loan, 1, queue);
    Py_XDECREF(room);
    return status;
}

/* An op's struct: its tensors, then its doubles. */
typedef struct { Tensor tensors[MAX_ARGS]; double scalars[MAX_ARGS]; } Struct;

/* Fills the op's struct from its arguments and checks them; 0, or -1 with an exception. The loans are to be given back. */
static int take(int index, PyObject *const *args, Py_ssize_t count, Struct *all, Loan *loans, Queue *queue) {
    const char *op = ops[index].name;
    const Spec *spec = &specs[index];
    double *scalars = (double *)&all->tensors[spec->tensors];
    uint32_t capsules = 0;
    if (count != spec->tensors + spec->scalars)
        return PyErr_Format(PyExc_TypeError, "%s: takes %d arguments (%s), got %zd", op, spec->tensors + spec->scalars,
                            ops[index].spec, count), -1;
    for (int i = 0; i < spec->tensors; i++) {
        int borrowed = borrow(args[i], &all->tensors[i], &loans[i], queue, op, &spec->args[i]);
        if (borrowed < 0) return -1;
        capsules |= (uint32_t)borrowed << i;
    }
    for (int i = 0; capsules >> i; i++)
        if (capsules >> i & 1 && borrow_capsule(args[i], &all->tensors[i], &loans[i], queue, op, &spec->args[i])) return -1;
    for (int i = 0; i < spec->scalars; i++) {
        const Arg *arg = &spec->args[spec->tensors + i];
        PyObject *value = args[spec->tensors + i];
        scalars[i] = PyFloat_AsDouble(value);
        if (PyErr_Occurred() || (arg->is_int && !(fabs(scalars[i]) < 9e15 && scalars[i] == (double)(int64_t)scalars[i])))
            return refuse(PyExc_TypeError, op, arg, "should be %s, got %R", arg->is_int ? "an integer" : "a number", value);
    }
    return merge_rows(op, spec, all->tensors) ? -1 : check(op, spec, all->tensors);
}

static PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int index = (int)PyLong_AsLong(self);
    const Spec *spec = &specs[index];
    Struct all = {0};
    Loan loans[MAX_ARGS] = {0};
    PyObject *result = NULL;
    Queue queue = {0};
    int device = 0, status = -1;
    if (take(index, args, count, &all, loans, &queue) || check_overlap(ops[index].name, spec, all.tensors)) goto done;
    for (int i = 0; i < spec->tensors && !device; i++) if (given(&all.tensors[i])) device = all.tensors[i].device;
    calls[index]++;
    if (device) {
        status = call_cuda(&ops[index], &all, device, &queue);
        result = status ? NULL : Py_NewRef(Py_None);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = ops[index].cpu[isa](&all, NULL);
    Py_END_ALLOW_THREADS
    if (status)                                                        /* scratch() has one way to fail, the kernels another */
        PyErr_SetString(strncmp(last_error(), "out of memory", 13) ? PyExc_ValueError : PyExc_MemoryError, last_error());
    else result = Py_NewRef(Py_None);
done:
    give_back(loans, spec->tensors, device && !status ? &queue : NULL);
    return result;
}

/* The workspace of a call on a GPU, asked with arrays of its shapes wherever they are; nothing is read or written. */
static PyObject *py_workspace(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    Struct all = {0};
    Loan loans[MAX_ARGS] = {0};
    Queue queue = {0};
    int index = 0;
    if (!count || !PyUnicode_Check(args[0])) return PyErr_Format(PyExc_TypeError, "workspace: wanted an op's name and its arguments");
    while (index < op_count && PyUnicode_CompareWithASCIIString(args[0], ops[index].name)) index++;
    if (index == op_count) return PyErr_Format(PyExc_ValueError, "workspace: there is no op %R", args[0]);
    int status = take(index, args + 1, count - 1, &all, loans, &queue);
    int64_t bytes = status || !ops[index].workspace ? 0 : ops[index].workspace(&all);
    give_back(loans, specs[index].tensors, NULL);
    if (bytes < 0) PyErr_SetString(PyExc_ValueError, last_error());
    return status || bytes < 0 ? NULL : PyLong_FromLongLong(bytes);
}

/* ---- the module -------------------------------------------------------------------------------------------------- */

static PyObject *py_set_threads(PyObject *self, PyObject *arg) {
    (void)self;
    long n = PyLong_AsLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 1 || n > 4096) return PyErr_Format(PyExc_ValueError, "set_num_threads: n should be from 1 to 4096, got %ld", n);
    set_threads((int)n);
    Py_RETURN_NONE;
}
static PyObject *py_get_threads(PyObject *self, PyObject *unused) {
    (void)self; (void)unused;
    return PyLong_FromLong(get_threads());
}
static PyObject *py_set_grain(PyObject *self, PyObject *arg) {
    (void)self;
    long long n = PyLong_AsLongLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 0) return PyErr_Format(PyExc_ValueError, "set_grain: nanoseconds should be at least 0, got %lld", n);
    set_grain(n);
    Py_RETURN_NONE;
}
static PyObject *py_get_grain(PyObject *self, PyObject *unused) {
    (void)self; (void)unused;
    return PyLong_FromLongLong(get_grain());
}
static PyObject *py_set_isa(PyObject *self, PyObject *arg) {
    (void)self;
    long n = PyLong_AsLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 0 || n >= ISA_COUNT || !isa_supported((int)n))
        return PyErr_Format(PyExc_ValueError, "set_isa: this machine or build does not have instruction set %ld", n);
    isa = (int)n;
    Py_RETURN_NONE;
}
static PyObject *py_get_isa(PyObject *self, PyObject *unused) {
    (void)self; (void)unused;
    return PyLong_FromLong(isa);
}

static PyObject *py_peak(PyObject *self, PyObject *arg) {
    (void)self;
    double (*peak)(int64_t, float *) = NULL, flops;
    float unused;
    long long n = PyLong_AsLongLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    for (int i = 0; i < ISA_COUNT; i++) if (isa_supported(i)) peak = peaks[i];
    Py_BEGIN_ALLOW_THREADS
    flops = peak(n, &unused);
    Py_END_ALLOW_THREADS
    return PyFloat_FromDouble(flops);
}

static PyObject *py_matmul_scratch(PyObject *self, PyObject *unused) {
    (void)self; (void)unused;
    return Py_BuildValue("(LL)", (long long)PACK_BYTES, 2 * (long long)PACK_BYTES);
}
static PyObject *py_head_scratch(PyObject *self, PyObject *args) {
    (void)self;
    long long M, C, V;
    int narrow;
    if (!PyArg_ParseTuple(args, "LLLp:head_scratch", &M, &C, &V, &narrow)) return NULL;
    return PyLong_FromLongLong(head_scratch(M, C, V, narrow));
}
static PyObject *py_attention_scratch(PyObject *self, PyObject *args) {
    (void)self;
    long long B, T, H, K, D;
    int narrow;
    if (!PyArg_ParseTuple(args, "LLLLLp:attention_scratch", &B, &T, &H, &K, &D, &narrow)) return NULL;
    int64_t sums = narrow ? attention_heads_at_once(B, T, H, K, D) * attention_head_sums(T, H, K, D) : 0;
    return Py_BuildValue("(LL)", (long long)attention_thread_scratch((D + 15) / 16 * 16), (long long)sums);
}

/* ---- what longlora/cuda.py is made of ---- */

static PyObject *py_cuda_hooks(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *workspace, *stream;
    if (!PyArg_ParseTuple(args, "OO:cuda_hooks", &workspace, &stream)) return NULL;
    Py_XDECREF(workspace_hook); Py_XDECREF(stream_hook);
    workspace_hook = Py_NewRef(workspace);
    stream_hook = Py_NewRef(stream);
    Py_RETURN_NONE;
}

/* -> (how many devices there are, why there is none or None). */
static PyObject *py_cuda_devices(PyObject *self, PyObject *unused) {
    (void)self; (void)unused;
    int count = cuda ? cuda->count() : usable(0);
    return count < 0 ? Py_BuildValue("(is)", 0, last_error()) : Py_BuildValue("(iO)", count, Py_None);
}

/* -> (why this one cannot be used or None). */
static PyObject *py_cuda_refusal(PyObject *self, PyObject *index) {
    (void)self;
    int device = (int)PyLong_AsLong(index);
    if (PyErr_Occurred()) return NULL;
    return usable(device) ? PyUnicode_FromString(last_error()) : Py_NewRef(Py_None);
}

/* One function of the table on a device; NULL with an exception. */
static PyObject *on_device(PyObject *index, const char *name, int (*what)(void *context), void *context) {
    int device = (int)PyLong_AsLong(index), status;
    if (PyErr_Occurred()) return NULL;
    if (usable(device)) return PyErr_Format(PyExc_RuntimeError, "%s: cuda:%d cannot be used: %s", name, device, last_error());
    Py_BEGIN_ALLOW_THREADS
    int entered = cuda->enter(device);
    status = entered < 0 ? -1 : what(context);
    cuda->leave(entered);
    Py_END_ALLOW_THREADS
    return status ? cuda_failed(name, device + 1) : Py_NewRef(Py_None);
}

static int synchronize_device(void *unused) { (void)unused; return cuda->synchronize_device(); }
static PyObject *py_cuda_synchronize(PyObject *self, PyObject *index) {
    (void)self;
    PyObject *result = on_device(index, "synchronize", synchronize_device, NULL);
    if (result) release_held(0);
    return result;
}

static int memory_info(void *context) { int64_t *m = context; return cuda->memory(&m[0], &m[1]); }
static PyObject *py_cuda_memory(PyObject *self, PyObject *index) {
    (void)self;
    int64_t m[2];
    PyObject *result = on_device(index, "memory_info", memory_info, m);
    if (!result) return NULL;
    Py_DECREF(result);
    return Py_BuildValue("(LL)", (long long)m[0], (long long)m[1]);
}

static PyObject *py_cuda_properties(PyObject *self, PyObject *index) {
    (void)self;
    CudaProperties p;
    int device = (int)PyLong_AsLong(index);
    if (PyErr_Occurred()) return NULL;
    if (!cuda || cuda->properties(device, &p))
        return PyErr_Format(PyExc_RuntimeError, "properties: cuda:%d: %s", device,
                            cuda ? last_error() : "this build has no CUDA kernels");
    return Py_BuildValue("{s:s,s:i,s:i,s:s}", "name", p.name, "sm", p.sm, "multiprocessors", p.multiprocessors, "bus", p.bus);
}

static PyObject *py_cuda_versions(PyObject *self, PyObject *unused) {
    (void)self; (void)unused;
    int driver = 0, runtime = 0;
    if (cuda) cuda->versions(&driver, &runtime);
    return Py_BuildValue("(ii)", driver, runtime);
}

/* The thread's stream -> the former one, as (handle, device or -1). */
static PyObject *py_cuda_set_stream(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long handle;
    int device = current.device, of = -1;
    void *before = current.stream;
    if (!PyArg_ParseTuple(args, "K:cuda_set_stream", &handle)) return NULL;
    if (usable(0)) return PyErr_Format(PyExc_RuntimeError, "stream: %s", last_error());
    if (cuda->stream_device((void *)(uintptr_t)handle, &of)) return cuda_failed("stream", 1);
    current.stream = (void *)(uintptr_t)handle;
    current.device = of;
    return Py_BuildValue("(Ki)", (unsigned long long)(uintptr_t)before, device);
}
static PyObject *py_cuda_get_stream(PyObject *self, PyObject *unused) {
    (void)self; (void)unused;
    return Py_BuildValue("(Ki)", (unsigned long long)(uintptr_t)current.stream, current.device);
}

static PyObject *py_cublas_paths(PyObject *self, PyObject *paths) {
    (void)self;
    const char *names[16];
    int count = 0;
    if (!cuda || !PyTuple_Check(paths))
        return PyErr_Format(PyExc_TypeError, "cublas_paths: wanted a tuple, in a build with CUDA");
    for (Py_ssize_t i = 0; i < PyTuple_Size(paths) && count < 16; i++)
        if (!(names[count++] = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(paths, i), NULL))) return NULL;
    cuda->cublas_paths(names, count);
    Py_RETURN_NONE;
}
/* -> (version, file) of cuBLASLt, loaded if it is not yet; RuntimeError when there is none. */
static PyObject *py_cublas_version(PyObject *self, PyObject *unused) {
    (void)self; (void)unused;
    const char *path = "";
    if (!cuda) return PyErr_Format(PyExc_RuntimeError, "this build has no CUDA kernels");
    int64_t version = cuda->cublas_version(&path);
    if (version < 0) return PyErr_SetString(PyExc_RuntimeError, last_error()), NULL;
    return Py_BuildValue("(Ls)", (long long)version, path);
}

static PyObject *py_calls(PyObject *self, PyObject *unused) {
    (void)self; (void)unused;
    PyObject *counts = PyDict_New();
    for (int i = 0; counts && i < op_count; i++) {
        PyObject *n = PyLong_FromLong(calls[i]);
        if (!n || PyDict_SetItemString(counts, ops[i].name, n)) Py_CLEAR(counts);
        Py_XDECREF(n);
    }
    return counts;
}

static PyMethodDef methods[] = {
    { "set_num_threads", py_set_threads, METH_O, "set_num_threads($module, n, /)\n--\n\nThreads that each op may use." },
    { "get_num_threads", py_get_threads, METH_NOARGS, "get_num_threads($module, /)\n--\n\n" },
    { "set_grain", py_set_grain, METH_O,
      "set_grain($module, nanoseconds, /)\n--\n\nWork that is worth a thread of its own; 0: every call uses all threads." },
    { "get_grain", py_get_grain, METH_NOARGS, "get_grain($module, /)\n--\n\n" },
    { "set_isa", py_set_isa, METH_O, "set_isa($module, index, /)\n--\n\nIndex into isa_names." },
    { "get_isa", py_get_isa, METH_NOARGS, "get_isa($module, /)\n--\n\n" },
    { "peak", py_peak, METH_O,
      "peak($module, n, /)\n--\n\nn rounds of multiply-adds in registers on this thread -> floating point operations." },
    { "matmul_scratch", py_matmul_scratch, METH_NOARGS,
      "matmul_scratch($module, /)\n--\n\nBytes that a product packs at most: of b, of a." },
    { "head_scratch", py_head_scratch, METH_VARARGS,
      "head_scratch($module, M, C, V, narrow, /)\n--\n\nBytes of linear_cross_entropy_backward; narrow: x is not float32." },
    { "attention_scratch", py_attention_scratch, METH_VARARGS,
      "attention_scratch($module, B, T, H, K, D, narrow, /)\n--\n\nBytes of s2_attention_backward: of a thread, of sums." },
    { "workspace", (PyCFunction)(void (*)(void))py_workspace, METH_FASTCALL,
      "workspace($module, op, /, *args)\n--\n\nBytes that the op takes for a call with these arguments on a GPU; 0 without CUDA." },
    { "cuda_hooks", py_cuda_hooks, METH_VARARGS, "cuda_hooks($module, workspace, stream, /)\n--\n\nSee longlora/cuda.py." },
    { "cuda_devices", py_cuda_devices, METH_NOARGS, "cuda_devices($module, /)\n--\n\n(count, why there is none or None)" },
    { "cuda_refusal", py_cuda_refusal, METH_O, "cuda_refusal($module, index, /)\n--\n\nWhy a device cannot be used, or None." },
    { "cuda_properties", py_cuda_properties, METH_O,
      "cuda_properties($module, index, /)\n--\n\nname, sm, multiprocessors, bus." },
    { "cuda_versions", py_cuda_versions, METH_NOARGS, "cuda_versions($module, /)\n--\n\n(driver, runtime), 13000 for 13.0." },
    { "cuda_synchronize", py_cuda_synchronize, METH_O, "cuda_synchronize($module, index, /)\n--\n\n" },
    { "cuda_memory", py_cuda_memory, METH_O, "cuda_memory($module, index, /)\n--\n\n(free, total) bytes." },
    { "cuda_set_stream", py_cuda_set_stream, METH_VARARGS,
      "cuda_set_stream($module, handle, /)\n--\n\nThe thread's stream -> the former one: (handle, device or -1)." },
    { "cuda_get_stream", py_cuda_get_stream, METH_NOARGS, "cuda_get_stream($module, /)\n--\n\n(handle, device or -1)" },
    { "cublas_paths", py_cublas_paths, METH_O, "cublas_paths($module, paths, /)\n--\n\nWhere to look for cuBLASLt." },
    { "cublas_version", py_cublas_version, METH_NOARGS, "cublas_version($module, /)\n--\n\n(version, file), loading it." },
    { "calls", py_calls, METH_NOARGS, "calls($module, /)\n--\n\nHow often each op has run in this process." },
    { NULL, NULL, 0, NULL },
};

static int exec_module(PyObject *module) {
    static PyMethodDef *functions;
    if (functions) return PyErr_SetString(PyExc_ImportError, "longlora._C can be loaded once in a process"), -1;
    import_array1(-1);
    isa = choose_isa();
    if (isa < 0) return PyErr_SetString(PyExc_ImportError, last_error()), -1;
    TensorType = (PyTypeObject *)PyType_FromModuleAndSpec(module, &tensor_spec, NULL);
    if (!TensorType || PyModule_AddObjectRef(module, "Tensor", (PyObject *)TensorType)) return -1;
    specs = calloc((size_t)op_count, sizeof *specs);
    calls = calloc((size_t)op_count, sizeof *calls);
    functions = calloc((size_t)op_count, sizeof *functions);
    PyObject *table = PyDict_New();
    if (!specs || !calls || !functions || !table) return PyErr_NoMemory(), -1;
    for (int i = 0; i < op_count; i++) {
        const Spec *spec = &specs[i];
        if (parse_spec(ops[i].spec, &specs[i]) ||
            spec->tensors * (int64_t)sizeof(Tensor) + spec->scalars * (int64_t)sizeof(double) != ops[i].args_size)
            return PyErr_Format(PyExc_SystemError, "%s: its spec and its struct disagree: %s", ops[i].name, ops[i].spec), -1;
        functions[i] = (PyMethodDef){ ops[i].name, (PyCFunction)(void (*)(void))call, METH_FASTCALL, ops[i].spec };
        PyObject *index = PyLong_FromLong(i), *function = index ? PyCFunction_New(&functions[i], index) : NULL;
        PyObject *text = PyUnicode_FromString(ops[i].spec);
        if (!function || !text || PyModule_AddObjectRef(module, ops[i].name, function) ||
            PyDict_SetItemString(table, ops[i].name, text)) return -1;
        Py_DECREF(index); Py_DECREF(function); Py_DECREF(text);
    }
    PyObject *names = PyTuple_New(ISA_COUNT), *supported = PyTuple_New(ISA_COUNT);
    if (!names || !supported) return -1;
    for (int i = 0; i < ISA_COUNT; i++) {
        PyTuple_SetItem(names, i, PyUnicode_FromString(isa_names[i]));
        PyTuple_SetItem(supported, i, PyBool_FromLong(isa_supported(i)));
    }
    if (PyModule_AddObjectRef(module, "specs", table) || PyModule_AddObjectRef(module, "isa_names", names) ||
        PyModule_AddObjectRef(module, "isa_supported", supported)) return -1;
    Py_DECREF(table); Py_DECREF(names); Py_DECREF(supported);
    if (PyModule_AddStringConstant(module, "cuda_built_for", cuda ? cuda->built_for : "")) return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = { { Py_mod_exec, (void *)exec_module }, { 0, NULL } };
static PyModuleDef definition = { PyModuleDef_HEAD_INIT, "_C", "The ops of longlora, destination passing.", 0, methods, slots,
                                  NULL, NULL, NULL };
PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
