/* device.c --- CUDA for the binding: names of devices, the thread's stream, order between streams, errors;
 * and the functions that longlora/cuda.py uses. */
#include "binding.h"

#include <string.h>

#ifndef LONGLORA_WITHOUT_CUDA /* why not, a string of setup.py */
#define LONGLORA_WITHOUT_CUDA ""
#endif

/* The stream for work of this thread whose arrays have no stream of their own; longlora.cuda.stream() sets
 * it. */
static _Thread_local struct {
    void *stream;
    int device;
} current = { NULL, -1 }; /* -1: any device, as for the default stream */
PyObject *workspace_hook, *stream_hook;

DeviceName device_name(int device) {
    DeviceName name = { "cpu" };
    if (device) PyOS_snprintf(name.text, sizeof name.text, "cuda:%d", device - 1);
    return name;
}

int usable(int index) {
    return cuda ? cuda->usable(index) : fail("this build has no CUDA kernels: %s", LONGLORA_WITHOUT_CUDA);
}

PyObject *cuda_failed(const char *op, int device) {
    char words[512];
    PyOS_snprintf(words, sizeof words, "%s", last_error());
    if (cuda->recover(device - 1))
        return PyErr_Format(PyExc_RuntimeError,
                            "%s: %s. After this error, in this call or in work queued before it, the process "
                            "cannot use %s any more: start it again",
                            op, words, device_name(device).text);
    return PyErr_Format(strstr(words, "out of memory") ? PyExc_MemoryError : PyExc_RuntimeError, "%s: %s", op,
                        words);
}

int own_stream(int device, void **stream) {
    *stream = current.stream;
    if (current.device < 0 || current.device == device - 1) return 0;
    return fail("the stream set by longlora.cuda.stream belongs to cuda:%d, the call is on %s",
                current.device, device_name(device).text);
}

int order(int device, void *stream, int other_device, void *other) {
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

int ready(void) {
    if (workspace_hook) return 0;
    PyObject *module = PyImport_ImportModule("longlora.cuda");
    Py_XDECREF(module);
    return module ? 0 : -1;
}

/* ---- functions for longlora/cuda.py ---------------------------------------------------------- */

static PyObject *py_cuda_hooks(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *workspace, *stream;
    if (!PyArg_ParseTuple(args, "OO:cuda_hooks", &workspace, &stream)) return NULL;
    Py_XDECREF(workspace_hook);
    Py_XDECREF(stream_hook);
    workspace_hook = Py_NewRef(workspace);
    stream_hook = Py_NewRef(stream);
    Py_RETURN_NONE;
}

/* -> (number of devices, None or why there is none). */
static PyObject *py_cuda_devices(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    int count = cuda ? cuda->count() : usable(0);
    return count < 0 ? Py_BuildValue("(is)", 0, last_error()) : Py_BuildValue("(iO)", count, Py_None);
}

/* -> None, or why the device cannot be used. */
static PyObject *py_cuda_refusal(PyObject *self, PyObject *index) {
    (void)self;
    int device = (int)PyLong_AsLong(index);
    if (PyErr_Occurred()) return NULL;
    return usable(device) ? PyUnicode_FromString(last_error()) : Py_NewRef(Py_None);
}

/* Calls a function with a device entered. None, or NULL with an exception. */
static PyObject *on_device(PyObject *index, const char *name, int (*what)(void *context), void *context) {
    int device = (int)PyLong_AsLong(index), status;
    if (PyErr_Occurred()) return NULL;
    if (usable(device))
        return PyErr_Format(PyExc_RuntimeError, "%s: cuda:%d cannot be used: %s", name, device, last_error());
    Py_BEGIN_ALLOW_THREADS
    int entered = cuda->enter(device);
    status = entered < 0 ? -1 : what(context);
    cuda->leave(entered);
    Py_END_ALLOW_THREADS
    return status ? cuda_failed(name, device + 1) : Py_NewRef(Py_None);
}

static int synchronize_device(void *unused) {
    (void)unused;
    return cuda->synchronize_device();
}
static PyObject *py_cuda_synchronize(PyObject *self, PyObject *index) {
    (void)self;
    PyObject *result = on_device(index, "synchronize", synchronize_device, NULL);
    if (result) release_held(0);
    return result;
}

static int memory_info(void *context) {
    int64_t *m = context;
    return cuda->memory(&m[0], &m[1]);
}
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
    return Py_BuildValue("{s:s,s:i,s:i,s:s}", "name", p.name, "sm", p.sm, "multiprocessors",
                         p.multiprocessors, "bus", p.bus);
}

static PyObject *py_cuda_versions(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    int driver = 0, runtime = 0;
    if (cuda) cuda->versions(&driver, &runtime);
    return Py_BuildValue("(ii)", driver, runtime);
}

/* Sets the thread's stream -> the previous one, as (handle, device or -1). */
static PyObject *py_cuda_set_stream(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long handle;
    int device = current.device, stream_device = -1;
    void *before = current.stream;
    if (!PyArg_ParseTuple(args, "K:cuda_set_stream", &handle)) return NULL;
    if (usable(0)) return PyErr_Format(PyExc_RuntimeError, "stream: %s", last_error());
    if (cuda->stream_device((void *)(uintptr_t)handle, &stream_device)) return cuda_failed("stream", 1);
    current.stream = (void *)(uintptr_t)handle;
    current.device = stream_device;
    return Py_BuildValue("(Ki)", (unsigned long long)(uintptr_t)before, device);
}
static PyObject *py_cuda_get_stream(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    return Py_BuildValue("(Ki)", (unsigned long long)(uintptr_t)current.stream, current.device);
}

static PyObject *py_cublas_paths(PyObject *self, PyObject *paths) {
    (void)self;
    const char *names[16];
    int count = 0;
    if (!cuda || !PyTuple_Check(paths))
        return PyErr_Format(PyExc_TypeError, "cublas_paths: expected a tuple and a build with CUDA");
    for (Py_ssize_t i = 0; i < PyTuple_Size(paths) && count < 16; i++)
        if (!(names[count++] = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(paths, i), NULL))) return NULL;
    cuda->cublas_paths(names, count);
    Py_RETURN_NONE;
}
/* Loads cuBLASLt if necessary -> (version, file). RuntimeError if there is none. */
static PyObject *py_cublas_version(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    const char *path = "";
    if (!cuda) return PyErr_Format(PyExc_RuntimeError, "this build has no CUDA kernels");
    int64_t version = cuda->cublas_version(&path);
    if (version < 0) return PyErr_SetString(PyExc_RuntimeError, last_error()), NULL;
    return Py_BuildValue("(Ls)", (long long)version, path);
}

PyMethodDef device_methods[] = {
    { "cuda_hooks", py_cuda_hooks, METH_VARARGS,
      "cuda_hooks($module, workspace, stream, /)\n--\n\nSee longlora/cuda.py." },
    { "cuda_devices", py_cuda_devices, METH_NOARGS,
      "cuda_devices($module, /)\n--\n\n(count, None or why there is none)" },
    { "cuda_refusal", py_cuda_refusal, METH_O,
      "cuda_refusal($module, index, /)\n--\n\nNone, or why the device cannot be used." },
    { "cuda_properties", py_cuda_properties, METH_O,
      "cuda_properties($module, index, /)\n--\n\nname, sm, multiprocessors, bus." },
    { "cuda_versions", py_cuda_versions, METH_NOARGS,
      "cuda_versions($module, /)\n--\n\n(driver, runtime), 13000 for 13.0." },
    { "cuda_synchronize", py_cuda_synchronize, METH_O, "cuda_synchronize($module, index, /)\n--\n\n" },
    { "cuda_memory", py_cuda_memory, METH_O, "cuda_memory($module, index, /)\n--\n\n(free, total) bytes." },
    { "cuda_set_stream", py_cuda_set_stream, METH_VARARGS,
      "cuda_set_stream($module, handle, /)\n--\n\nSets the thread's stream -> the previous one: (handle, "
      "device "
      "or -1)." },
    { "cuda_get_stream", py_cuda_get_stream, METH_NOARGS,
      "cuda_get_stream($module, /)\n--\n\n(handle, device or -1)" },
    { "cublas_paths", py_cublas_paths, METH_O,
      "cublas_paths($module, paths, /)\n--\n\nWhere to look for cuBLASLt." },
    { "cublas_version", py_cublas_version, METH_NOARGS,
      "cublas_version($module, /)\n--\n\nLoads cuBLASLt -> (version, file)." },
    { NULL, NULL, 0, NULL },
};
