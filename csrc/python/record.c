/* record.c --- longlora._C.Recording: calls of ops that are checked once and made as often as wanted.
 *
 * A token that is decoded takes hundreds of calls of microseconds each, always the same ones. Between them
 * Python's own memory has been pushed out of the caches by the weights, so a call from Python costs as much
 * as a small op. A recording has what the calls need, one struct after the other. */
#include "binding.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

static const double CHECK_SIGNALS = 0.05; /* seconds */

PyTypeObject *RecordingType;

typedef struct {
    int64_t bytes; /* of this and of the op's struct behind it */
    int64_t index; /* of the op */
} Entry;

typedef struct {
    PyObject_HEAD PyObject *tensors; /* list: what the recorded calls read and write stays alive */
    char *entries;
    int64_t size, room; /* bytes used and taken */
    int running;        /* threads in run(): with the GIL only */
} Recording;

static PyObject *recording_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    if (PyTuple_Size(args) || (kwargs && PyDict_Size(kwargs)))
        return PyErr_SetString(PyExc_TypeError, "Recording: takes no arguments"), NULL;
    Recording *self = (Recording *)PyType_GenericAlloc(type, 0);
    if (self && !(self->tensors = PyList_New(0))) Py_CLEAR(self);
    return (PyObject *)self;
}

static void recording_dealloc(PyObject *object) {
    Recording *self = (Recording *)object;
    PyTypeObject *type = Py_TYPE(object);
    Py_XDECREF(self->tensors);
    free(self->entries);
    PyObject_Free(object);
    Py_DECREF(type);
}

/* Adds the struct of a checked call. -1 with an exception. */
static int append(Recording *self, int index, const Struct *all) {
    int64_t bytes = (int64_t)sizeof(Entry) + (int64_t)ops[index].args_size;
    if (self->size + bytes > self->room) {
        int64_t room = 2 * self->room + bytes;
        char *larger = realloc(self->entries, (size_t)room);
        if (!larger) return PyErr_NoMemory(), -1;
        self->entries = larger;
        self->room = room;
    }
    Entry entry = { bytes, index };
    memcpy(self->entries + self->size, &entry, sizeof entry);
    memcpy(self->entries + self->size + sizeof entry, all, (size_t)ops[index].args_size);
    self->size += bytes;
    return 0;
}

static PyObject *recording_add(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    Recording *self = (Recording *)object;
    Struct all = { 0 };
    Loan loans[MAX_ARGS] = { 0 }; /* stay empty: a Tensor is not lent */
    Queue queue = { 0 };
    int index = op_named("Recording", args, count);
    if (index < 0) return NULL;
    if (self->running)
        return PyErr_SetString(PyExc_RuntimeError, "Recording: it runs in another thread"), NULL;
    const Spec *spec = &specs[index];
    for (int i = 0; i < spec->tensors && i + 1 < count; i++)
        if (args[i + 1] != Py_None && (!is_tensor(args[i + 1]) || ((TensorObject *)args[i + 1])->t.device))
            return refuse(PyExc_TypeError, ops[index].name, &spec->args[i],
                          "should be a Tensor on the CPU to be recorded, got %R", args[i + 1]),
                   NULL;
    if (take(index, args + 1, count - 1, &all, loans, &queue) ||
        check_overlap(ops[index].name, spec, all.tensors))
        return NULL;
    for (int i = 0; i < spec->tensors; i++)
        if (args[i + 1] != Py_None && PyList_Append(self->tensors, args[i + 1])) return NULL;
    return append(self, index, &all) ? NULL : Py_NewRef(Py_None);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static PyObject *recording_run(PyObject *object, PyObject *unused) {
    Recording *self = (Recording *)object;
    int status = 0, interrupted = 0;
    double checked = seconds();
    (void)unused;
    self->running++;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t at = 0; at < self->size && !status && !interrupted;) {
        const Entry *entry = (const Entry *)(self->entries + at);
        status = run_on_cpu((int)entry->index, entry + 1);
        at += entry->bytes;
        if (seconds() - checked < CHECK_SIGNALS) continue;
        Py_BLOCK_THREADS; /* Ctrl-C ends a long pass between two calls */
        interrupted = PyErr_CheckSignals();
        Py_UNBLOCK_THREADS;
        checked = seconds();
    }
    Py_END_ALLOW_THREADS
    self->running--;
    if (interrupted) return NULL;
    if (!status) Py_RETURN_NONE;
    raise_failure();
    return NULL;
}

static PyMethodDef recording_methods[] = {
    { "add", (PyCFunction)(void (*)(void))recording_add, METH_FASTCALL,
      "add($self, op, /, *args)\n--\n\n"
      "Checks a call of an op and notes it, without making it. Its arrays are Tensors on the CPU, and stay "
      "alive." },
    { "run", recording_run, METH_NOARGS,
      "run($self, /)\n--\n\n"
      "Makes the calls in their order, on what the Tensors hold now. The first one that fails raises its "
      "error and ends the run." },
    { NULL, NULL, 0, NULL },
};
static PyType_Slot recording_slots[] = {
    { Py_tp_doc, "Recording()\n--\n\nCalls of ops that are checked once and made as often as wanted." },
    { Py_tp_new, recording_new },
    { Py_tp_dealloc, recording_dealloc },
    { Py_tp_methods, recording_methods },
    { 0, NULL }
};
PyType_Spec recording_spec = { "longlora._C.Recording", sizeof(Recording), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, recording_slots };
