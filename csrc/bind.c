/* bind.c --- the only file with Python.h. Borrows arrays, checks them against the op's spec, releases the GIL, calls,
 * raises. No op is named here: all that is known of one is its row in ops.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include "cpu/cpu.h"

#include <stdatomic.h>
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

/* ---- borrowing --------------------------------------------------------------------------------------------------- */

static int borrow_numpy(PyArrayObject *array, Tensor *t, const char *op, const Arg *arg) {
    static const struct { int num, dtype; } nums[] = {
        { NPY_FLOAT32, F32 }, { NPY_FLOAT16, F16 }, { NPY_FLOAT64, F64 }, { NPY_INT32, I32 }, { NPY_INT64, I64 }, { NPY_UINT8, U8 } };
    int num = PyArray_TYPE(array);
    t->dtype = -1;
    for (size_t i = 0; i < sizeof nums / sizeof *nums; i++) if (nums[i].num == num) t->dtype = nums[i].dtype;
    if (t->dtype < 0) {
        PyObject *name = PyObject_GetAttrString((PyObject *)PyArray_DESCR(array), "name");
        if (!name) return -1;
        if (!PyUnicode_CompareWithASCIIString(name, "bfloat16")) t->dtype = BF16;
        else PyErr_Format(PyExc_TypeError, "%s: %s has dtype %U, which no op takes", op, arg->name, name);
        Py_DECREF(name);
        if (t->dtype < 0) return -1;
    }
    t->ndim = PyArray_NDIM(array);
    if (t->ndim > MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "%s: %s should have %d axes, got %d", op, arg->name, arg->ndim, t->ndim);
        return -1;
    }
    if (!PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s: %s is not in the machine's byte order", op, arg->name);
        return -1;
    }
    if (arg->output && !PyArray_ISWRITEABLE(array)) {
        PyErr_Format(PyExc_ValueError, "%s: output %s is read-only", op, arg->name);
        return -1;
    }
    int64_t size = dtype_size(t->dtype);
    for (int i = 0; i < t->ndim; i++) {
        t->shape[i] = PyArray_DIM(array, i);
        t->stride[i] = PyArray_STRIDE(array, i) / size;
        if (PyArray_STRIDE(array, i) % size && t->shape[i] > 1) {
            PyErr_Format(PyExc_ValueError, "%s: %s axis %d has a stride that is no multiple of its element", op, arg->name, i);
            return -1;
        }
    }
    t->data = PyArray_DATA(array);
    return 0;
}

static int borrow(PyObject *object, Tensor *t, const char *op, const Arg *arg) {
    if (object == Py_None) {
        t->ndim = -1;
        if (arg->optional) return 0;
        PyErr_Format(PyExc_TypeError, "%s: %s must be an array, got None", op, arg->name);
        return -1;
    }
    if (PyArray_Check(object)) return borrow_numpy((PyArrayObject *)object, t, op, arg);
    PyErr_Format(PyExc_TypeError, "%s: %s must be an array (NumPy or DLPack), got %R", op, arg->name, (PyObject *)Py_TYPE(object));
    return -1;
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static int check(const char *op, const Spec *spec, const Tensor *t) {
    int64_t letters[128];
    memset(letters, -1, sizeof letters);
    int common = -1;
    const char *common_name = NULL;
    for (int i = 0; i < spec->tensors; i++) {
        const Arg *arg = &spec->args[i];
        if (!given(&t[i])) continue;
        if (arg->dtype == COMMON) {
            if (common < 0) { common = t[i].dtype; common_name = arg->name; }
            if (t[i].dtype != F32 && t[i].dtype != BF16 && t[i].dtype != F16)
                return PyErr_Format(PyExc_TypeError, "%s: %s should be float32, bfloat16 or float16, got %s", op, arg->name,
                                    dtype_names[t[i].dtype]), -1;
            if (t[i].dtype != common)
                return PyErr_Format(PyExc_TypeError, "%s: %s should be %s as %s is, got %s", op, arg->name,
                                    dtype_names[common], common_name, dtype_names[t[i].dtype]), -1;
        } else if (arg->dtype == ANY ? t[i].dtype > F16 : t[i].dtype != arg->dtype) {
            return PyErr_Format(PyExc_TypeError, "%s: %s should be %s, got %s", op, arg->name,
                                arg->dtype == ANY ? "float32, bfloat16 or float16" : dtype_names[arg->dtype],
                                dtype_names[t[i].dtype]), -1;
        }
        if (t[i].ndim != arg->ndim)
            return PyErr_Format(PyExc_ValueError, "%s: %s should have %d axes, got %d", op, arg->name, arg->ndim, t[i].ndim), -1;
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
                    return PyErr_Format(PyExc_ValueError, "%s: %s axis %d should be %c=%lld, got %lld", op, arg->name, axis,
                                        letter, (long long)*size, (long long)t[i].shape[axis]), -1;
            }
            int64_t elements = 1;
            for (int axis = 0; axis < arg->ndim; axis++) elements *= t[i].shape[axis];
            int last = arg->ndim - 1;
            if (elements && last >= 0 && !arg->free_strides && t[i].shape[last] > 1 && t[i].stride[last] != 1)
                return PyErr_Format(PyExc_ValueError, "%s: %s axis %d should be dense (stride 1), got stride %lld", op,
                                    arg->name, last, (long long)t[i].stride[last]), -1;
            if (elements && (uintptr_t)t[i].data % (uintptr_t)dtype_size(t[i].dtype))
                return PyErr_Format(PyExc_ValueError, "%s: %s is not aligned to its element size", op, arg->name), -1;
        }
    return 0;
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

static int same_memory(const Tensor *a, const Tensor *b) {
    if (a->data != b->data || a->ndim != b->ndim || a->dtype != b->dtype) return 0;
    for (int i = 0; i < a->ndim; i++)
        if (a->shape[i] != b->shape[i] || (a->shape[i] > 1 && a->stride[i] != b->stride[i])) return 0;
    return 1;
}

/* Rows of a common larger matrix interleave without touching: [M, .] views whose rows are disjoint column ranges. */
static int interleaved(const Tensor *a, const Tensor *b) {
    if (a->ndim < 2 || a->ndim != b->ndim || a->dtype != b->dtype) return 0;
    int64_t row = a->stride[0], size = dtype_size(a->dtype), inner[2] = { 1, 1 };
    for (int i = 0; i + 1 < a->ndim; i++) if (a->stride[i] != b->stride[i] && i == 0) return 0;
    for (int i = 1; i < a->ndim; i++) {
        inner[0] += (a->shape[i] - 1) * (a->stride[i] < 0 ? -a->stride[i] : a->stride[i]);
        inner[1] += (b->shape[i] - 1) * (b->stride[i] < 0 ? -b->stride[i] : b->stride[i]);
    }
    int64_t offset = ((char *)b->data - (char *)a->data) / size;
    if (row <= 0) return 0;
    offset %= row;
    if (offset < 0) offset += row;
    return offset >= inner[0] && offset + inner[1] <= row;
}

static int check_overlap(const char *op, const Spec *spec, const Tensor *t) {
    for (int i = 0; i < spec->outputs; i++) for (int j = i + 1; j < spec->tensors; j++) {
        if (!given(&t[i]) || !given(&t[j])) continue;
        char *low[2], *high[2];
        extent(&t[i], &low[0], &high[0]);
        extent(&t[j], &low[1], &high[1]);
        if (low[0] == high[0] || low[1] == high[1] || high[0] <= low[1] || high[1] <= low[0]) continue;
        if (spec->args[j].may_alias && same_memory(&t[i], &t[j])) continue;
        if (interleaved(&t[i], &t[j])) continue;
        return PyErr_Format(PyExc_ValueError, "%s: output %s overlaps %s", op, spec->args[i].name, spec->args[j].name), -1;
    }
    return 0;
}

/* ---- the call ---------------------------------------------------------------------------------------------------- */

static atomic_int_least32_t *calls;    /* how often each op ran, for tests that ask which kernels a step used */
static int isa;

static PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int index = (int)PyLong_AsLong(self);
    const char *op = ops[index].name;
    const Spec *spec = &specs[index];
    if (count != spec->tensors + spec->scalars)
        return PyErr_Format(PyExc_TypeError, "%s: takes %d arguments (%s), got %zd", op, spec->tensors + spec->scalars,
                            ops[index].spec, count);
    struct { Tensor tensors[MAX_ARGS]; double scalars[MAX_ARGS]; } all = {0};
    double *scalars = (double *)&all.tensors[spec->tensors];           /* the op's struct: tensors, then doubles */
    for (int i = 0; i < spec->tensors; i++) if (borrow(args[i], &all.tensors[i], op, &spec->args[i])) return NULL;
    for (int i = 0; i < spec->scalars; i++) {
        const Arg *arg = &spec->args[spec->tensors + i];
        PyObject *value = args[spec->tensors + i];
        scalars[i] = PyFloat_AsDouble(value);
        if (PyErr_Occurred() || (arg->is_int && scalars[i] != (double)(int64_t)scalars[i]))
            return PyErr_Format(PyExc_TypeError, "%s: %s should be %s, got %R", op, arg->name,
                                arg->is_int ? "an integer" : "a number", value);
    }
    if (check(op, spec, all.tensors) || check_overlap(op, spec, all.tensors)) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ops[index].cpu[isa](&all, NULL);
    Py_END_ALLOW_THREADS
    calls[index]++;
    if (status) return PyErr_Format(PyExc_ValueError, "%s", last_error());
    Py_RETURN_NONE;
}

/* ---- the module -------------------------------------------------------------------------------------------------- */

static PyObject *py_set_threads(PyObject *self, PyObject *arg) {
    (void)self;
    long n = PyLong_AsLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 1) return PyErr_Format(PyExc_ValueError, "set_num_threads: wanted at least 1, got %ld", n);
    set_threads((int)n);
    Py_RETURN_NONE;
}
static PyObject *py_get_threads(PyObject *self, PyObject *unused) {
    (void)self; (void)unused;
    return PyLong_FromLong(get_threads());
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

static PyMethodDef call_def = { "op", (PyCFunction)(void (*)(void))call, METH_FASTCALL, NULL };
static PyMethodDef methods[] = {
    { "set_num_threads", py_set_threads, METH_O, "set_num_threads($module, n, /)\n--\n\nThreads that each op may use." },
    { "get_num_threads", py_get_threads, METH_NOARGS, "get_num_threads($module, /)\n--\n\n" },
    { "set_isa", py_set_isa, METH_O, "set_isa($module, index, /)\n--\n\nIndex into isa_names." },
    { "get_isa", py_get_isa, METH_NOARGS, "get_isa($module, /)\n--\n\n" },
    { NULL, NULL, 0, NULL },
};

static int exec_module(PyObject *module) {
    import_array1(-1);
    isa = choose_isa();
    if (isa < 0) return PyErr_SetString(PyExc_ImportError, last_error()), -1;
    specs = calloc((size_t)op_count, sizeof *specs);
    calls = calloc((size_t)op_count, sizeof *calls);
    PyObject *table = PyDict_New();
    if (!specs || !calls || !table) return PyErr_NoMemory(), -1;
    for (int i = 0; i < op_count; i++) {
        size_t size = 0;
        if (parse_spec(ops[i].spec, &specs[i]) ||
            (size = (size_t)specs[i].tensors * sizeof(Tensor) + (size_t)specs[i].scalars * sizeof(double)) != (size_t)ops[i].args_size)
            return PyErr_Format(PyExc_SystemError, "%s: its spec and its struct disagree: %s", ops[i].name, ops[i].spec), -1;
        PyObject *index = PyLong_FromLong(i), *function = index ? PyCFunction_New(&call_def, index) : NULL;
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
    return 0;
}

static PyModuleDef_Slot slots[] = { { Py_mod_exec, (void *)exec_module }, { 0, NULL } };
static PyModuleDef definition = { PyModuleDef_HEAD_INIT, "_C", "The ops of longlora, destination passing.", 0, methods, slots,
                                  NULL, NULL, NULL };
PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
