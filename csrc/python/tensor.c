/* tensor.c --- longlora.Tensor: memory with a shape, on the CPU or a GPU; views, fill and copies. */
#include "binding.h"
#include "cpu/cpu.h"

#include <stdio.h>

PyTypeObject *TensorType;

const char *const dtype_names[DTYPES] = { "float32", "bfloat16", "float16", "float64",
                                          "int32",   "int64",    "uint8" };
const struct DlType dl_types[DTYPES] = { { kDLFloat, 32 }, { kDLBfloat, 16 }, { kDLFloat, 16 },
                                         { kDLFloat, 64 }, { kDLInt, 32 },    { kDLInt, 64 },
                                         { kDLUInt, 8 } };

static int find_dtype(PyObject *name) {
    for (int i = 0; PyUnicode_Check(name) && i < DTYPES; i++)
        if (!PyUnicode_CompareWithASCIIString(name, dtype_names[i])) return i;
    PyErr_Format(PyExc_TypeError,
                 "Tensor: dtype should be float32, bfloat16, float16, float64, int32, int64 or uint8, got %R",
                 name);
    return -1;
}

/* Zeroed memory. Large blocks come from the system, which clears them, and go back to it when the Tensor
 * dies; malloc may keep them. */
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

/* Reads a shape, an integer or a sequence of integers, and sets dense strides. 0, or -1 with an exception. */
static int read_shape(PyObject *shape, Tensor *t) {
    PyObject *list = PyIndex_Check(shape) ? Py_BuildValue("(O)", shape) : PySequence_Tuple(shape);
    if (!list) return -1;
    Py_ssize_t n = PyTuple_Size(list);
    int64_t total = 1;
    if (n > MAX_NDIM)
        PyErr_Format(PyExc_ValueError, "Tensor: shape should have at most %d axes, got %R", MAX_NDIM, shape);
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
    make_dense(t);
    if (total > INT64_MAX / 16)
        return PyErr_Format(PyExc_ValueError, "Tensor: shape %R is too large", shape), -1;
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

/* A Tensor that owns zeros, with t's shape, dtype and device. */
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
    } else if (!(self->memory = take_memory(self->bytes)))
        status = fail("out of memory: cannot allocate %zu bytes", self->bytes);
    Py_END_ALLOW_THREADS
    self->t.data = self->memory;
    if (!status) return self;
    if (pinned || t->device) cuda_failed("Tensor", t->device ? t->device : 1);
    else PyErr_Format(PyExc_MemoryError, "Tensor: %s", last_error());
    Py_DECREF(self);
    return NULL;
}

/* The device in Tensor's numbering from "cpu", "cuda" (the first one) or "cuda:1"; -1 with an exception. */
static int find_device(PyObject *name) {
    Py_ssize_t length;
    const char *text = PyUnicode_AsUTF8AndSize(name, &length);
    if (!text) return -1;
    if (!strcmp(text, "cpu")) return 0;
    int index = 0, end = 0;
    if (strcmp(text, "cuda") && (sscanf(text, "cuda:%3d%n", &index, &end) != 1 || text[end] || index < 0))
        return PyErr_Format(PyExc_ValueError, "Tensor: device should be cpu, cuda or cuda:N, got %R", name),
               -1;
    if (usable(index))
        return PyErr_Format(PyExc_RuntimeError, "Tensor: %U cannot be used: %s", name, last_error()), -1;
    return index + 1;
}

static PyObject *tensor_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = { "shape", "dtype", "device", "pinned", NULL };
    PyObject *shape, *dtype = NULL, *device = NULL;
    int pinned = 0;
    Tensor t = { 0 };
    (void)type;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|UU$p:Tensor", names, &shape, &dtype, &device,
                                     &pinned) ||
        read_shape(shape, &t) || (t.dtype = dtype ? find_dtype(dtype) : F32) < 0 ||
        (t.device = device ? find_device(device) : 0) < 0)
        return NULL;
    if (pinned && t.device)
        return PyErr_Format(PyExc_ValueError, "Tensor: pinned memory is on the CPU, got device %R", device);
    if (pinned && usable(0))
        return PyErr_Format(PyExc_RuntimeError, "Tensor: memory cannot be pinned: %s", last_error());
    return (PyObject *)new_tensor(&t, pinned);
}

/* Without the GIL, because it waits for the device. */
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
    Tensor t = { 0 };
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOU|n:wrap", names, &source, &shape, &dtype, &offset) ||
        read_shape(shape, &t) || (t.dtype = find_dtype(dtype)) < 0)
        return NULL;
    TensorObject *self = (TensorObject *)PyType_GenericAlloc((PyTypeObject *)type, 0);
    if (!self) return NULL;
    self->readonly = PyObject_GetBuffer(source, &self->buffer, PyBUF_WRITABLE) != 0;
    if (self->readonly) {
        PyErr_Clear();
        if (PyObject_GetBuffer(source, &self->buffer, PyBUF_SIMPLE)) {
            Py_DECREF(self);
            return NULL;
        }
    }
    self->has_buffer = 1;
    int64_t bytes = elements_of(&t) * dtype_size(t.dtype);
    if (offset < 0 || bytes > self->buffer.len - offset)
        PyErr_Format(PyExc_ValueError,
                     "Tensor.wrap: %lld bytes at offset %zd do not fit in a buffer of %zd bytes",
                     (long long)bytes, offset, self->buffer.len);
    else if (((uintptr_t)self->buffer.buf + (size_t)offset) % (size_t)dtype_size(t.dtype))
        PyErr_Format(PyExc_ValueError, "Tensor.wrap: offset %zd is not aligned to %s", offset,
                     dtype_names[t.dtype]);
    if (PyErr_Occurred()) {
        Py_DECREF(self);
        return NULL;
    }
    t.data = (char *)self->buffer.buf + offset;
    self->t = t;
    return (PyObject *)self;
}

static PyObject *tensor_view(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = { "shape", "dtype", "offset", NULL };
    TensorObject *self = (TensorObject *)object;
    PyObject *shape, *dtype = NULL;
    Py_ssize_t offset = 0;
    Tensor t = { 0 };
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|Un:view", names, &shape, &dtype, &offset) ||
        read_shape(shape, &t))
        return NULL;
    if ((t.dtype = dtype ? find_dtype(dtype) : self->t.dtype) < 0) return NULL;
    int64_t have = elements_of(&self->t) * dtype_size(self->t.dtype),
            want = elements_of(&t) * dtype_size(t.dtype);
    if (!is_contiguous(&self->t))
        return PyErr_Format(PyExc_ValueError, "Tensor.view: the tensor should be contiguous");
    if (offset < 0 || want > have - offset)
        return PyErr_Format(PyExc_ValueError,
                            "Tensor.view: %lld bytes at offset %zd do not fit in %lld bytes", (long long)want,
                            offset, (long long)have);
    t.data = (char *)self->t.data + offset;
    t.device = self->t.device;
    if ((uintptr_t)t.data % (size_t)dtype_size(t.dtype))
        return PyErr_Format(PyExc_ValueError, "Tensor.view: offset %zd is not aligned to %s", offset,
                            dtype_names[t.dtype]);
    return (PyObject *)new_view(object, &t, self->readonly);
}

static PyObject *tensor_reshape(PyObject *object, PyObject *shape) {
    TensorObject *self = (TensorObject *)object;
    Tensor t = { 0 };
    if (read_shape(shape, &t)) return NULL;
    t.dtype = self->t.dtype;
    t.device = self->t.device;
    t.data = self->t.data;
    if (!is_contiguous(&self->t))
        return PyErr_Format(PyExc_ValueError, "Tensor.reshape: the tensor should be contiguous");
    if (elements_of(&t) != elements_of(&self->t))
        return PyErr_Format(PyExc_ValueError, "Tensor.reshape: %R should have %lld elements, got %lld", shape,
                            (long long)elements_of(&self->t), (long long)elements_of(&t));
    return (PyObject *)new_view(object, &t, self->readonly);
}

/* The key has an integer or a slice without a step for each of the first axes. */
static PyObject *tensor_getitem(PyObject *object, PyObject *key) {
    TensorObject *self = (TensorObject *)object;
    PyObject *keys = PyTuple_Check(key) ? Py_NewRef(key) : Py_BuildValue("(O)", key);
    if (!keys) return NULL;
    Tensor t = self->t;
    Py_ssize_t count = PyTuple_Size(keys);
    int kept = 0;
    if (count > self->t.ndim)
        PyErr_Format(PyExc_IndexError, "Tensor: %zd indices for %d axes", count, self->t.ndim);
    for (int axis = 0; axis < self->t.ndim && !PyErr_Occurred(); axis++) {
        int64_t size = self->t.shape[axis], stride = self->t.stride[axis], first = 0, length = size;
        PyObject *k = axis < count ? PyTuple_GetItem(keys, axis) : NULL;
        int drop = k && PyIndex_Check(k);
        if (drop) {
            first = PyLong_AsLongLong(k);
            if (first < 0 && !PyErr_Occurred()) first += size;
            if (!PyErr_Occurred() && (first < 0 || first >= size))
                PyErr_Format(PyExc_IndexError, "Tensor: index %R is out of bounds for axis %d of size %lld",
                             k, axis, (long long)size);
        } else if (k && PySlice_Check(k)) {
            Py_ssize_t start, stop, step;
            if (!PySlice_Unpack(k, &start, &stop, &step)) {
                length = PySlice_AdjustIndices((Py_ssize_t)size, &start, &stop, step);
                first = length ? start : 0;
                if (step != 1) PyErr_SetString(PyExc_IndexError, "Tensor: a slice should have no step");
            }
        } else if (k)
            PyErr_Format(PyExc_TypeError, "Tensor: an index should be an integer or a slice, got %R", k);
        if (PyErr_Occurred()) break;
        t.data = (char *)t.data + first * stride * dtype_size(t.dtype);
        if (!drop) {
            t.shape[kept] = length;
            t.stride[kept++] = stride;
        }
    }
    t.ndim = kept;
    Py_DECREF(keys);
    return PyErr_Occurred() ? NULL : (PyObject *)new_view(object, &t, self->readonly);
}

/* Fills `side`, whose work is on the thread's stream. 0, or -1 with an exception. */
static int side_of(const TensorObject *self, const char *op, Side *side) {
    *side = (Side){ self->t, self->pinned, NULL };
    if (!self->t.device || !own_stream(self->t.device, &side->stream)) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s", op, last_error());
    return -1;
}

TensorObject *copy_to(TensorObject *self, int device, const char *op) {
    Tensor t = self->t;
    Side out, x;
    void *stream;
    make_dense(&t);
    t.device = device;
    TensorObject *twin = new_tensor(&t, 0);
    if (twin && (side_of(twin, op, &out) || side_of(self, op, &x) || copy_sides(op, &out, &x, &stream)))
        Py_CLEAR(twin);
    return twin;
}

static PyObject *tensor_cpu(PyObject *object, PyObject *unused) {
    (void)unused;
    TensorObject *self = (TensorObject *)object;
    return self->t.device ? (PyObject *)copy_to(self, 0, "Tensor.cpu") : Py_NewRef(object);
}

static PyObject *tensor_fill(PyObject *object, PyObject *number) {
    static const double lowest[] = { INT32_MIN, -0x1p53, 0 },
                        highest[] = { INT32_MAX, 0x1p53, UINT8_MAX }; /* from I32 on */
    TensorObject *self = (TensorObject *)object;
    Copy c = { .out = self->t, .fill = 1 };
    double value = PyFloat_AsDouble(number);
    int dtype = self->t.dtype;
    if (PyErr_Occurred()) return NULL;
    if (self->readonly) return PyErr_Format(PyExc_ValueError, "Tensor.fill: the tensor is read-only");
    if (dtype >= I32 &&
        !(value >= lowest[dtype - I32] && value <= highest[dtype - I32] && value == (double)(int64_t)value))
        return PyErr_Format(PyExc_ValueError, "Tensor.fill: %R is not a valid %s", number,
                            dtype_names[dtype]);
    switch (dtype) {
        case F64: memcpy(c.value, &value, 8); break;
        case I32: memcpy(c.value, &(int32_t){ (int32_t)value }, 4); break;
        case I64: memcpy(c.value, &(int64_t){ (int64_t)value }, 8); break;
        case U8: c.value[0] = (char)(uint8_t)value; break;
        default: store1(c.value, dtype, (float)value);
    }
    c.zero = !memcmp(c.value, (char[8]){ 0 }, 8);
    Side side;
    if (side_of(self, "Tensor.fill", &side)) return NULL;
    int status = 0;
    enum { ROW = 1 << 18 }; /* contiguous memory is cut into rows, for the threads */
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

static PyObject *tensor_copy(PyObject *object, PyObject *source) {
    static const Arg arg = { .name = "source", .ndim = MAX_NDIM };
    TensorObject *self = (TensorObject *)object;
    Side out, side = { .pinned = is_tensor(source) && ((TensorObject *)source)->pinned };
    Tensor *x = &side.t;
    Loan loan = { 0 };
    Queue queue = { 0 };
    static const char op[] = "Tensor.copy_";
    if (self->readonly) return PyErr_Format(PyExc_ValueError, "Tensor.copy_: the tensor is read-only");
    if (side_of(self, op, &out)) return NULL;
    int status = borrow(source, x, &loan, &queue, op, &arg);
    if (status > 0) status = borrow_capsule(source, x, &loan, &queue, op, &arg);
    if (!status && x->ndim != self->t.ndim)
        status = refuse(PyExc_ValueError, op, &arg, "should have %d axes, got %d", self->t.ndim, x->ndim);
    for (int i = 0; !status && i < self->t.ndim; i++)
        if (x->shape[i] != self->t.shape[i])
            status = refuse(PyExc_ValueError, op, &arg, "axis %d should be %lld, got %lld", i,
                            (long long)self->t.shape[i], (long long)x->shape[i]);
    if (!status && x->dtype != self->t.dtype && (x->dtype > F16 || self->t.dtype > F16))
        status = refuse(PyExc_TypeError, op, &arg, "should be %s, got %s", dtype_names[self->t.dtype],
                        dtype_names[x->dtype]);
    if (!status && x->device && (uintptr_t)x->data % (uintptr_t)dtype_size(x->dtype))
        status = refuse(PyExc_ValueError, op, &arg, "is not aligned to its element size");
    if (!status && overlap(&self->t, x)) status = refuse(PyExc_ValueError, op, &arg, "overlaps the tensor");
    side.stream = queue.stream;
    if (!status) status = copy_sides(op, &out, &side, &queue.stream);
    give_back(&loan, 1, status ? NULL : &queue);
    return status ? NULL : Py_NewRef(Py_None);
}

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
static PyObject *get_transposed(PyObject *object, void *unused) {
    (void)unused;
    TensorObject *self = (TensorObject *)object;
    Tensor t = self->t;
    if (t.ndim != 2)
        return PyErr_Format(PyExc_ValueError, "Tensor: T needs 2 axes, this one has %d", (int)t.ndim);
    for (int i = 0; i < 2; i++) {
        t.shape[i] = self->t.shape[1 - i];
        t.stride[i] = self->t.stride[1 - i];
    }
    return (PyObject *)new_view(object, &t, self->readonly);
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

static PyMethodDef tensor_methods[] = {
    { "wrap", (PyCFunction)(void (*)(void))tensor_wrap, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
      "wrap(buffer, shape, dtype, offset=0)\n--\n\n"
      "A Tensor on the bytes of any buffer, from `offset` on, without a copy; read-only if the buffer is." },
    { "view", (PyCFunction)(void (*)(void))tensor_view, METH_VARARGS | METH_KEYWORDS,
      "view($self, shape, dtype=None, offset=0)\n--\n\nThe same memory, from `offset` bytes on, with another "
      "shape and dtype." },
    { "reshape", tensor_reshape, METH_O,
      "reshape($self, shape, /)\n--\n\nThe same elements with another shape; never a copy." },
    { "numpy", tensor_numpy, METH_NOARGS,
      "numpy($self, /)\n--\n\nAn ndarray on the same memory. bfloat16 needs ml_dtypes." },
    { "__array__", (PyCFunction)(void (*)(void))tensor_array, METH_VARARGS | METH_KEYWORDS,
      "__array__($self, dtype=None, copy=None)\n--\n\n" },
    { "cpu", tensor_cpu, METH_NOARGS,
      "cpu($self, /)\n--\n\nA copy in the CPU's memory, after waiting for it; the tensor itself if it is on "
      "the CPU." },
    { "fill", tensor_fill, METH_O, "fill($self, value, /)\n--\n\nSets every element." },
    { "copy_", tensor_copy, METH_O,
      "copy_($self, source, /)\n--\n\nCopies an array of the same shape, on any device; float dtypes are "
      "converted.\n"
      "Waits for copies between a GPU and memory of the CPU that is not pinned; queues other copies on a "
      "GPU." },
    { "__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS,
      "__dlpack__($self, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n" },
    { "__dlpack_device__", tensor_dlpack_device, METH_NOARGS, "__dlpack_device__($self, /)\n--\n\n" },
    { NULL, NULL, 0, NULL },
};
static PyGetSetDef tensor_getset[] = {
    { "shape", get_shape, NULL, "Sizes of the axes.", NULL },
    { "dtype", get_dtype, NULL, "The dtype's name.", NULL },
    { "device", get_device, NULL, "\"cpu\" or \"cuda:N\".", NULL },
    { "pinned", get_pinned, NULL, "Whether GPUs can copy from and to it in the background.", NULL },
    { "ndim", get_ndim, NULL, "Number of axes.", NULL },
    { "nbytes", get_nbytes, NULL, "Bytes of the elements.", NULL },
    { "T", get_transposed, NULL, "The same memory with its 2 axes swapped.", NULL },
    { NULL, NULL, NULL, NULL, NULL }
};
static PyType_Slot tensor_slots[] = {
    { Py_tp_doc,
      "Tensor(shape, dtype=\"float32\", device=\"cpu\", *, pinned=False)\n--\n\n"
      "Zeros with a shape, to allocate, view, copy and export; not an array library.\n"
      "dtype is float32, bfloat16, float16, float64, int32, int64 or uint8; there are at most 4 axes.\n"
      "device is cpu, cuda or cuda:N. pinned asks for CPU memory that GPUs can copy from and to in the "
      "background.\n"
      "Imports and exports DLPack and the buffer protocol." },
    { Py_tp_new, tensor_new },
    { Py_tp_dealloc, tensor_dealloc },
    { Py_tp_methods, tensor_methods },
    { Py_tp_getset, tensor_getset },
    { Py_tp_repr, tensor_repr },
    { Py_mp_subscript, tensor_getitem },
    { Py_bf_getbuffer, tensor_getbuffer },
    { 0, NULL }
};
PyType_Spec tensor_spec = { "longlora.Tensor", sizeof(TensorObject), 0,
                            Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, tensor_slots };
