/* tensor.c --- longlora.Tensor: memory with a shape, on the CPU or a GPU; views, copies, NumPy, the buffer
 * protocol, DLPack out. */
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

/* Memory of an owner, zero: large blocks come from the system, which has cleared them, and go back to it when
 * the Tensor dies, which malloc does not promise. */
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

/* An owner of zeros of t's shape, dtype and device. */
static TensorObject *new_tensor(const Tensor *t, int pinned) {
    TensorObject *self = (TensorObject *)PyType_GenericAlloc(TensorType, 0);
    if (!self) return NULL;
    self->bytes = (size_t)(elements_of(t) * dtype_size(t->dtype));
    self->t = *t;
    self->pinned = pinned;
    int status = 0, entered = 0;
    Py_BEGIN_ALLOW_THREADS if (pinned) status = cuda->allocate_pinned((int64_t)self->bytes, &self->memory);
    else if (t->device) {
        entered = cuda->enter(t->device - 1);
        status = entered < 0 ? -1 : cuda->allocate((int64_t)self->bytes, &self->memory);
        cuda->leave(entered);
    }
    else if (!(self->memory = take_memory(self->bytes))) status =
        fail("out of memory: %zu bytes cannot be had", self->bytes);
    Py_END_ALLOW_THREADS self->t.data = self->memory;
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
        return PyErr_Format(PyExc_ValueError, "Tensor: pinned memory is the CPU's, got device %R", device);
    if (pinned && usable(0))
        return PyErr_Format(PyExc_RuntimeError, "Tensor: memory cannot be pinned: %s", last_error());
    return (PyObject *)new_tensor(&t, pinned);
}

/* Waits for the device when there is one, so others run meanwhile. */
static void free_device_memory(TensorObject *self) {
    Py_BEGIN_ALLOW_THREADS if (self->pinned) cuda->release_pinned(self->memory);
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
        PyErr_Format(PyExc_ValueError, "Tensor.wrap: %lld bytes at offset %zd should lie in a buffer of %zd",
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
        return PyErr_Format(PyExc_ValueError, "Tensor.view: %lld bytes at offset %zd should lie in %lld",
                            (long long)want, offset, (long long)have);
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
                PyErr_Format(PyExc_IndexError, "Tensor: index %R is out of axis %d of size %lld", k, axis,
                             (long long)size);
        } else if (k && PySlice_Check(k)) {
            Py_ssize_t start, stop, step;
            if (!PySlice_Unpack(k, &start, &stop, &step)) {
                length = PySlice_AdjustIndices((Py_ssize_t)size, &start, &stop, step);
                first = length ? start : 0;
                if (step != 1)
                    PyErr_SetString(PyExc_IndexError,
                                    "Tensor: a slice with a step is not a view that ops take");
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

static PyObject *tensor_numpy(PyObject *object, PyObject *unused) {
    (void)unused;
    static const int nums[] = { NPY_FLOAT32, -1, NPY_FLOAT16, NPY_FLOAT64, NPY_INT32, NPY_INT64, NPY_UINT8 };
    TensorObject *self = (TensorObject *)object;
    const Tensor *t = &self->t;
    PyArray_Descr *descr = NULL;
    if (t->device)
        return PyErr_Format(PyExc_TypeError,
                            "Tensor.numpy: the tensor is on %s, NumPy is on the CPU; use cpu().numpy()",
                            device_name(t->device).text);
    if (t->dtype == BF16) {
        PyObject *module = PyImport_ImportModule("ml_dtypes");
        PyObject *type = module ? PyObject_GetAttrString(module, "bfloat16") : NULL;
        if (type) PyArray_DescrConverter(type, &descr);
        else
            PyErr_SetString(PyExc_TypeError,
                            "Tensor.numpy: NumPy has no bfloat16 of its own; install ml_dtypes");
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

/* np.asarray() comes here for bfloat16, which the buffer protocol cannot say; NumPy itself converts to
 * `dtype`. */
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
        return PyErr_Format(PyExc_ValueError, "Tensor.fill: %R is no %s", number, dtype_names[dtype]);
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
    enum { ROW = 1 << 18 }; /* if it is contiguous: many rows for many threads */
    Py_BEGIN_ALLOW_THREADS if (c.out.device) {
        int entered = cuda->enter(c.out.device - 1);
        status = entered < 0 ? -1 : cuda->fill(&c.out, c.value, side.stream);
        cuda->leave(entered);
    }
    else {
        if (is_contiguous(&c.out)) {
            int64_t n = elements_of(&c.out);
            c.out = (Tensor){ c.out.data, { n / ROW, ROW }, { ROW, 1 }, 2, dtype, 0 };
            copy_all(&c);
            c.out = (Tensor){ at(&c.out, n / ROW * ROW), { n % ROW }, { 1 }, 1, dtype, 0 };
        }
        copy_all(&c);
    }
    Py_END_ALLOW_THREADS return status ? cuda_failed("Tensor.fill", c.out.device) : Py_NewRef(Py_None);
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
    int rows = !strides || (asked & (PyBUF_C_CONTIGUOUS | PyBUF_ANY_CONTIGUOUS)),
        columns = asked & PyBUF_F_CONTIGUOUS;
    const char *why = NULL;
    if (t->device)
        why = "Tensor: the tensor is on a GPU, the buffer protocol is for the CPU's memory; use cpu()";
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

/* ---- DLPack out ------------------------------------------------------------------------------ */

/* One allocation holds whichever managed tensor was asked for, its shape and strides; the context is the
 * Tensor. */
typedef struct {
    union {
        DLManagedTensorVersioned versioned;
        DLManagedTensor old;
    } managed;
    int64_t shape[MAX_NDIM], strides[MAX_NDIM];
    PyObject *owner;
} Export;

static void release_export(Export *e) {
    if (!Py_IsInitialized()) return; /* after the interpreter there is nobody to tell */
    PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(e->owner);
    PyMem_Free(e);
    PyGILState_Release(state);
}
static void delete_versioned(DLManagedTensorVersioned *m) { release_export(m->manager_ctx); }
static void delete_old(DLManagedTensor *m) { release_export(m->manager_ctx); }

static void drop_capsule(PyObject *capsule) { /* a capsule that nobody took */
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

/* The consumer's stream, by the words of the array API, waits for the thread's; 0, or -1 with an exception.
 */
static int join_stream(int device, PyObject *stream) {
    static const char op[] = "Tensor.__dlpack__";
    unsigned long long handle = 1; /* None: the legacy default stream */
    void *own;
    int of;
    if (stream != Py_None) {
        long long given = PyLong_AsLongLong(stream);
        if (given == -1 && !PyErr_Occurred()) return 0; /* -1: the consumer sees to it */
        if (given == -1 || given < -1 || given == 0)
            return PyErr_Format(PyExc_BufferError,
                                "%s: stream should be None, -1, 1 (legacy default), 2 (per thread) or a "
                                "handle, got %R",
                                op, stream),
                   -1;
        handle = (unsigned long long)given;
    }
    if (own_stream(device, &own)) return PyErr_Format(PyExc_ValueError, "%s: %s", op, last_error()), -1;
    if (cuda->stream_device((void *)(uintptr_t)handle, &of)) return cuda_failed(op, device), -1;
    if (of >= 0 && of != device - 1)
        return PyErr_Format(PyExc_BufferError, "%s: stream is of cuda:%d, the tensor is on %s", op, of,
                            device_name(device).text),
               -1;
    if (!own) own = (void *)1;
    return order(device, (void *)(uintptr_t)handle, device, own) ? (cuda_failed(op, device), -1) : 0;
}

static PyObject *tensor_dlpack(PyObject *object, PyObject *args, PyObject *kwargs) {
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
                            "Tensor.__dlpack__: the tensor is on %s and cannot be had on %s without a copy",
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
    e->owner = (PyObject *)self; /* the reference taken above */
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
      "view($self, shape, dtype=None, offset=0)\n--\n\nThe same memory from `offset` bytes on, in another "
      "shape and dtype." },
    { "reshape", tensor_reshape, METH_O,
      "reshape($self, shape, /)\n--\n\nThe same elements in another shape; never a copy." },
    { "numpy", tensor_numpy, METH_NOARGS,
      "numpy($self, /)\n--\n\nAn ndarray on the same memory. bfloat16 needs ml_dtypes." },
    { "__array__", (PyCFunction)(void (*)(void))tensor_array, METH_VARARGS | METH_KEYWORDS,
      "__array__($self, dtype=None, copy=None)\n--\n\n" },
    { "cpu", tensor_cpu, METH_NOARGS,
      "cpu($self, /)\n--\n\nA copy in the CPU's memory, which it waits for; the tensor itself if it is "
      "there." },
    { "fill", tensor_fill, METH_O, "fill($self, value, /)\n--\n\nSets every element." },
    { "copy_", tensor_copy, METH_O,
      "copy_($self, source, /)\n--\n\nCopies an array of the same shape, on any device; float dtypes are "
      "converted.\n"
      "Between the CPU and a GPU it waits for the copy, unless the CPU's side is a pinned Tensor; other "
      "copies are queued." },
    { "__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS,
      "__dlpack__($self, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n" },
    { "__dlpack_device__", tensor_dlpack_device, METH_NOARGS, "__dlpack_device__($self, /)\n--\n\n" },
    { NULL, NULL, 0, NULL },
};
static PyGetSetDef tensor_getset[] = { { "shape", get_shape, NULL, "Sizes of the axes.", NULL },
                                       { "dtype", get_dtype, NULL, "The dtype's name.", NULL },
                                       { "device", get_device, NULL, "\"cpu\" or \"cuda:N\".", NULL },
                                       { "pinned", get_pinned, NULL,
                                         "Whether GPUs copy from and to it in the background.", NULL },
                                       { "ndim", get_ndim, NULL, "Number of axes.", NULL },
                                       { "nbytes", get_nbytes, NULL, "Bytes of the elements.", NULL },
                                       { NULL, NULL, NULL, NULL, NULL } };
static PyType_Slot tensor_slots[] = {
    { Py_tp_doc,
      "Tensor(shape, dtype=\"float32\", device=\"cpu\", *, pinned=False)\n--\n\n"
      "Zeros with a shape: allocate, view, copy, export; not an array library.\n"
      "dtype float32, bfloat16, float16, float64, int32, int64 or uint8; at most 4 axes.\n"
      "device cpu, cuda or cuda:N; pinned: memory of the CPU that GPUs copy from and to in the background.\n"
      "Speaks DLPack and the buffer protocol, both ways." },
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
