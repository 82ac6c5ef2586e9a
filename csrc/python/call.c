/* call.c --- a call of an op: it borrows the arguments, checks them against the op's spec, releases the GIL,
 * runs the kernel and raises its error. No op is named here: its row in ops.c says all that is needed. */
#include "binding.h"
#include "cpu/cpu.h"

Spec *specs;
atomic_int_least32_t *calls;
int isa;

/* Queues the op; 0, or -1 with an exception. */
static int call_cuda(const Op *op, const void *all, int device, const Queue *queue) {
    static const Arg room_arg = { .name = "workspace", .ndim = 1, .output = 1 };
    CudaCall how = { .stream = queue->stream, .device = device - 1 };
    PyObject *room = NULL;
    Loan loan = { 0 };
    Queue unused = { 0 };
    if (ready()) return -1;
    how.workspace_bytes = op->workspace ? op->workspace(all) : 0;
    if (how.workspace_bytes < 0) return PyErr_SetString(PyExc_ValueError, last_error()), -1;
    if (how.workspace_bytes) {
        Tensor t = { 0 };
        int64_t capture = capture_of(device, how.stream);
        if (capture < 0) return cuda_failed(op->name, device), -1;
        room =
            PyObject_CallFunction(workspace_hook, "LiKOL", (long long)how.workspace_bytes, how.device,
                                  (unsigned long long)(uintptr_t)how.stream, queue->like, (long long)capture);
        int status = room ? borrow(room, &t, &loan, &unused, op->name, &room_arg) : -1;
        if (status > 0) status = borrow_capsule(room, &t, &loan, &unused, op->name, &room_arg);
        int64_t bytes = elements_of(&t) * dtype_size(t.dtype);
        if (!status && (t.device != device || bytes < how.workspace_bytes || (uintptr_t)t.data % 256))
            status = refuse(PyExc_SystemError, op->name, &room_arg,
                            "should be %lld bytes on %s, aligned to 256, got %R",
                            (long long)how.workspace_bytes, device_name(device).text, room);
        if (status) {
            give_back(&loan, 1, NULL);
            Py_XDECREF(room);
            return -1;
        }
        how.workspace = t.data;
    }
    int status;
    Py_BEGIN_ALLOW_THREADS
    int entered = cuda->enter(how.device);
    status = entered < 0 || cuda->describe(&how) ? -1 : op->cuda(all, &how);
    cuda->leave(entered);
    Py_END_ALLOW_THREADS
    if (status) { /* a message "op: ..." is about the arguments */
        size_t n = strlen(op->name);
        if (!strncmp(last_error(), op->name, n) && last_error()[n] == ':')
            PyErr_SetString(PyExc_ValueError, last_error());
        else cuda_failed(op->name, device);
    }
    give_back(&loan, 1, queue);
    Py_XDECREF(room);
    return status;
}

/* What empty tensors point to, so that kernels may do arithmetic with any address, and memcpy of 0 bytes. */
static _Alignas(256) char nowhere[256];

int take(int index, PyObject *const *args, Py_ssize_t count, Struct *all, Loan *loans, Queue *queue) {
    const char *op = ops[index].name;
    const Spec *spec = &specs[index];
    double *scalars = (double *)&all->tensors[spec->tensors];
    uint32_t capsules = 0;
    if (count != spec->tensors + spec->scalars)
        return PyErr_Format(PyExc_TypeError, "%s: takes %d arguments (%s), got %zd", op,
                            spec->tensors + spec->scalars, ops[index].spec, count),
               -1;
    for (int i = 0; i < spec->tensors; i++) {
        int borrowed = borrow(args[i], &all->tensors[i], &loans[i], queue, op, &spec->args[i]);
        if (borrowed < 0) return -1;
        capsules |= (uint32_t)borrowed << i;
    }
    for (int i = 0; capsules >> i; i++)
        if (capsules >> i & 1 &&
            borrow_capsule(args[i], &all->tensors[i], &loans[i], queue, op, &spec->args[i]))
            return -1;
    for (int i = 0; i < spec->scalars; i++) {
        const Arg *arg = &spec->args[spec->tensors + i];
        PyObject *value = args[spec->tensors + i];
        scalars[i] = PyFloat_AsDouble(value);
        int wrong = PyErr_Occurred() != NULL;
        if (wrong && !PyErr_ExceptionMatches(PyExc_Exception)) return -1;
        PyErr_Clear();
        if (wrong || (arg->is_int && !(fabs(scalars[i]) < 9e15 && scalars[i] == (double)(int64_t)scalars[i])))
            return refuse(PyExc_TypeError, op, arg, "should be %s, got %R",
                          arg->is_int ? "an integer" : "a number", value);
    }
    if (merge_rows(op, spec, all->tensors) || check_shapes(op, spec, all->tensors)) return -1;
    for (int i = 0; i < spec->tensors; i++)
        if (given(&all->tensors[i]) && !elements_of(&all->tensors[i])) all->tensors[i].data = nowhere;
    if (ops[index].check && ops[index].check(op, all))
        return PyErr_SetString(PyExc_ValueError, last_error()), -1;
    return 0;
}

int op_named(const char *asker, PyObject *const *args, Py_ssize_t count) {
    if (!count || !PyUnicode_Check(args[0]))
        return PyErr_Format(PyExc_TypeError, "%s: takes the name of an op and its arguments", asker), -1;
    for (int i = 0; i < op_count; i++)
        if (!PyUnicode_CompareWithASCIIString(args[0], ops[i].name)) return i;
    return PyErr_Format(PyExc_ValueError, "%s: there is no op %R", asker, args[0]), -1;
}

int run_on_cpu(int index, const void *all) {
    calls[index]++;
    return ops[index].cpu[isa](all, NULL);
}

void raise_failure(void) { /* scratch() fails with "out of memory", kernels with other messages */
    PyErr_SetString(strncmp(last_error(), "out of memory", 13) ? PyExc_ValueError : PyExc_MemoryError,
                    last_error());
}

PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int index = (int)PyLong_AsLong(self);
    const Spec *spec = &specs[index];
    Struct all = { 0 };
    Loan loans[MAX_ARGS] = { 0 };
    PyObject *result = NULL;
    Queue queue = { 0 };
    int device = 0, status = -1;
    if (take(index, args, count, &all, loans, &queue) || check_overlap(ops[index].name, spec, all.tensors))
        goto done;
    for (int i = 0; i < spec->tensors && !device; i++)
        if (given(&all.tensors[i])) device = all.tensors[i].device;
    if (device) {
        calls[index]++;
        status = call_cuda(&ops[index], &all, device, &queue);
    } else {
        Py_BEGIN_ALLOW_THREADS
        status = run_on_cpu(index, &all);
        Py_END_ALLOW_THREADS
        if (status) raise_failure();
    }
    result = status ? NULL : Py_NewRef(Py_None);
done:
    give_back(loans, spec->tensors, device && !status ? &queue : NULL);
    return result;
}
