/* bind.c --- the module longlora._C: a function for each op, which call.c calls; questions about calls; and
 * the settings. */
#define IMPORTS_NUMPY
#include "binding.h"
#include "cpu/cpu.h"

#include <stdlib.h>

/* ---- questions about a call ------------------------------------------------------------------ */

/* Fills `all` for the op args[0] and its arguments args[1..], wherever its arrays are; their memory is not
 * read. The op's index, or -1 with an exception. */
static int take_question(const char *asker, PyObject *const *args, Py_ssize_t count, Struct *all) {
    Loan loans[MAX_ARGS] = { 0 };
    Queue queue = { 0 };
    int index = op_named(asker, args, count);
    if (index < 0) return -1;
    int status = take(index, args + 1, count - 1, all, loans, &queue);
    give_back(loans, specs[index].tensors, NULL);
    return status ? -1 : index;
}

static PyObject *py_workspace(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    Struct all = { 0 };
    int index = take_question("workspace", args, count, &all);
    if (index < 0) return NULL;
    int64_t bytes = ops[index].workspace ? ops[index].workspace(&all) : 0;
    if (bytes < 0) return PyErr_SetString(PyExc_ValueError, last_error()), NULL;
    return PyLong_FromLongLong(bytes);
}

static PyObject *py_scratch(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    Struct all = { 0 };
    int index = take_question("scratch", args, count, &all), blocks = 0;
    if (index < 0) return NULL;
    ScratchFunction ask = ops[index].scratch[isa];
    Scratch s = ask ? ask(&all) : (Scratch){ 0 };
    for (int i = 0; i < SCRATCH_BLOCKS; i++)
        if (s.bytes[i]) s.bytes[blocks++] = s.bytes[i];
    PyObject *tuple = PyTuple_New(blocks);
    for (int i = 0; tuple && i < blocks; i++) {
        PyObject *n = PyLong_FromLongLong(s.bytes[i]);
        if (!n || PyTuple_SetItem(tuple, i, n)) Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *py_scratch_peak(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    return PyLong_FromLongLong(scratch_peak());
}

/* ---- the module ------------------------------------------------------------------------------ */

static PyObject *py_set_threads(PyObject *self, PyObject *arg) {
    (void)self;
    long n = PyLong_AsLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 1 || n > 4096)
        return PyErr_Format(PyExc_ValueError, "set_num_threads: n should be from 1 to 4096, got %ld", n);
    set_threads((int)n);
    Py_RETURN_NONE;
}
static PyObject *py_get_threads(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    return PyLong_FromLong(get_threads());
}
static PyObject *py_set_grain(PyObject *self, PyObject *arg) {
    (void)self;
    long long n = PyLong_AsLongLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 0)
        return PyErr_Format(PyExc_ValueError, "set_grain: nanoseconds should be at least 0, got %lld", n);
    set_grain(n);
    Py_RETURN_NONE;
}
static PyObject *py_get_grain(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    return PyLong_FromLongLong(get_grain());
}
static PyObject *py_set_isa(PyObject *self, PyObject *arg) {
    (void)self;
    long n = PyLong_AsLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 0 || n >= ISA_COUNT || !isa_supported((int)n))
        return PyErr_Format(PyExc_ValueError,
                            "set_isa: this machine or build does not have instruction set %ld", n);
    isa = (int)n;
    Py_RETURN_NONE;
}
static PyObject *py_get_isa(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    return PyLong_FromLong(isa);
}

static PyObject *py_peak(PyObject *self, PyObject *arg) {
    (void)self;
    double (*peak)(int64_t, float *) = NULL, flops;
    float unused;
    long long n = PyLong_AsLongLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 1) return PyErr_Format(PyExc_ValueError, "peak: n should be at least 1, got %lld", n);
    for (int i = 0; i < ISA_COUNT; i++)
        if (isa_supported(i)) peak = peaks[i];
    Py_BEGIN_ALLOW_THREADS
    flops = peak(n, &unused);
    Py_END_ALLOW_THREADS
    return PyFloat_FromDouble(flops);
}

static PyObject *py_calls(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    PyObject *counts = PyDict_New();
    for (int i = 0; counts && i < op_count; i++) {
        PyObject *n = PyLong_FromLong(calls[i]);
        if (!n || PyDict_SetItemString(counts, ops[i].name, n)) Py_CLEAR(counts);
        Py_XDECREF(n);
    }
    return counts;
}

static PyMethodDef methods[] = {
    { "set_num_threads", py_set_threads, METH_O,
      "set_num_threads($module, n, /)\n--\n\nSets how many threads an op may use." },
    { "get_num_threads", py_get_threads, METH_NOARGS, "get_num_threads($module, /)\n--\n\n" },
    { "set_grain", py_set_grain, METH_O,
      "set_grain($module, nanoseconds, /)\n--\n\nSets how much work is worth another thread; with 0 every "
      "call uses all threads." },
    { "get_grain", py_get_grain, METH_NOARGS, "get_grain($module, /)\n--\n\n" },
    { "set_isa", py_set_isa, METH_O,
      "set_isa($module, index, /)\n--\n\nSelects an instruction set by its index in isa_names." },
    { "get_isa", py_get_isa, METH_NOARGS, "get_isa($module, /)\n--\n\n" },
    { "peak", py_peak, METH_O,
      "peak($module, n, /)\n--\n\nn rounds of multiply-adds in registers on this thread -> floating point "
      "operations." },
    { "scratch", (PyCFunction)(void (*)(void))py_scratch, METH_FASTCALL,
      "scratch($module, op, /, *args)\n--\n\n"
      "The blocks of memory, in bytes, that the op holds at one time while it runs on the CPU with these\n"
      "arguments, in the order in which it takes them, for the current instruction set and number of "
      "threads.\n"
      "Arrays are neither read nor written, so they may be untouched memory. Consecutive calls share "
      "blocks:\n"
      "a run holds, for each rank, the largest block of this rank in any of its calls." },
    { "scratch_peak", py_scratch_peak, METH_NOARGS,
      "scratch_peak($module, /)\n--\n\n"
      "The most bytes of scratch that were in use at one time since the last call of this function." },
    { "workspace", (PyCFunction)(void (*)(void))py_workspace, METH_FASTCALL,
      "workspace($module, op, /, *args)\n--\n\n"
      "The bytes of workspace that the op takes on a GPU with these arguments, which may be on any device, "
      "also\n"
      "in a build without CUDA. Arrays are neither read nor written." },
    { "calls", py_calls, METH_NOARGS, "calls($module, /)\n--\n\nHow often each op has run in this process." },
    { NULL, NULL, 0, NULL },
};

static int exec_module(PyObject *module) {
    static PyMethodDef *functions;
    if (functions)
        return PyErr_SetString(PyExc_ImportError, "longlora._C can be loaded only once in a process"), -1;
    import_array1(-1);
    isa = choose_isa();
    if (isa < 0) return PyErr_SetString(PyExc_ImportError, last_error()), -1;
    TensorType = (PyTypeObject *)PyType_FromModuleAndSpec(module, &tensor_spec, NULL);
    if (!TensorType || PyModule_AddObjectRef(module, "Tensor", (PyObject *)TensorType)) return -1;
    RecordingType = (PyTypeObject *)PyType_FromModuleAndSpec(module, &recording_spec, NULL);
    if (!RecordingType || PyModule_AddObjectRef(module, "Recording", (PyObject *)RecordingType)) return -1;
    specs = calloc((size_t)op_count, sizeof *specs);
    calls = calloc((size_t)op_count, sizeof *calls);
    functions = calloc((size_t)op_count, sizeof *functions);
    PyObject *table = PyDict_New();
    if (!specs || !calls || !functions || !table) return PyErr_NoMemory(), -1;
    for (int i = 0; i < op_count; i++) {
        const Spec *spec = &specs[i];
        if (parse_spec(ops[i].spec, &specs[i]) ||
            spec->tensors * (int64_t)sizeof(Tensor) + spec->scalars * (int64_t)sizeof(double) !=
                ops[i].args_size)
            return PyErr_Format(PyExc_SystemError, "%s: its spec and its struct disagree: %s", ops[i].name,
                                ops[i].spec),
                   -1;
        functions[i] =
            (PyMethodDef){ ops[i].name, (PyCFunction)(void (*)(void))call, METH_FASTCALL, ops[i].spec };
        PyObject *index = PyLong_FromLong(i),
                 *function = index ? PyCFunction_New(&functions[i], index) : NULL;
        PyObject *text = PyUnicode_FromString(ops[i].spec);
        if (!function || !text || PyModule_AddObjectRef(module, ops[i].name, function) ||
            PyDict_SetItemString(table, ops[i].name, text))
            return -1;
        Py_DECREF(index);
        Py_DECREF(function);
        Py_DECREF(text);
    }
    PyObject *names = PyTuple_New(ISA_COUNT), *supported = PyTuple_New(ISA_COUNT);
    if (!names || !supported) return -1;
    for (int i = 0; i < ISA_COUNT; i++) {
        PyTuple_SetItem(names, i, PyUnicode_FromString(isa_names[i]));
        PyTuple_SetItem(supported, i, PyBool_FromLong(isa_supported(i)));
    }
    if (PyModule_AddObjectRef(module, "specs", table) || PyModule_AddObjectRef(module, "isa_names", names) ||
        PyModule_AddObjectRef(module, "isa_supported", supported))
        return -1;
    Py_DECREF(table);
    Py_DECREF(names);
    Py_DECREF(supported);
    if (PyModule_AddFunctions(module, device_methods)) return -1;
    if (PyModule_AddStringConstant(module, "cuda_built_for", cuda ? cuda->built_for : "")) return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = { { Py_mod_exec, (void *)exec_module }, { 0, NULL } };
static PyModuleDef definition = { PyModuleDef_HEAD_INIT,
                                  "_C",
                                  "The ops of longlora, destination passing.",
                                  0,
                                  methods,
                                  slots,
                                  NULL,
                                  NULL,
                                  NULL };
PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
