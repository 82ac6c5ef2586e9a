/* bind.c --- the module: borrows an op's arguments, checks them against its spec, releases the GIL, calls,
 * raises. No op is named here: all that is known of one is its row in ops.c. */
#define IMPORTS_NUMPY
#include "binding.h"
#include "cpu/cpu.h"

#include <stdatomic.h>
#include <stdlib.h>

enum { MAX_ARGS = 24 };

/* ---- specs ----------------------------------------------------------------------------------- */

typedef struct {
    Arg args[MAX_ARGS];
    int tensors, outputs, scalars;
} Spec;
static Spec *specs;

static int parse_spec(const char *text, Spec *spec) {
    int section = 0; /* outputs, inputs, scalars */
    for (const char *p = text; *p;) {
        if (*p == ' ') {
            p++;
            continue;
        }
        if (!strncmp(p, "<-", 2)) {
            section = 1;
            p += 2;
            continue;
        }
        if (*p == '|') {
            section = 2;
            p++;
            continue;
        }
        if (spec->tensors + spec->scalars == MAX_ARGS) return -1;
        Arg *arg = &spec->args[spec->tensors + spec->scalars];
        size_t n = strcspn(p, "[: ");
        if (n >= sizeof arg->name) return -1;
        memcpy(arg->name, p, n);
        p += n;
        arg->dtype = COMMON;
        arg->output = section == 0;
        if (section == 2) {
            if (!strncmp(p, ":int", 4)) {
                arg->is_int = 1;
                p += 4;
            }
            spec->scalars++;
            continue;
        }
        if (*p++ != '[') return -1;
        for (; *p && *p != ']'; p++)
            if (*p != ',') {
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
                    static const struct {
                        const char *name;
                        int dtype;
                    } names[] = { { "any", ANY }, { "f32", F32 }, { "f64", F64 }, { "i32", I32 } };
                    int found = 0;
                    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
                        if (!strncmp(p + 1, names[i].name, 3)) {
                            arg->dtype = names[i].dtype;
                            found = 1;
                        }
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

/* ---- checks ---------------------------------------------------------------------------------- */

/* Rows may come with the axes that people know them by, [B,T,C] for [M,C]: leading axes are read as one where
 * a spec starts with M. They must lie so, and be the same wherever a call has them. */
static int merge_rows(const char *op, const Spec *spec, Tensor *tensors) {
    const Arg *first = NULL;
    int64_t shape[MAX_NDIM];
    int axes = 0;
    for (int i = spec->tensors - 1; i >= 0; i--) { /* inputs before outputs */
        const Arg *arg = &spec->args[i];
        Tensor *t = &tensors[i];
        int last = t->ndim - arg->ndim; /* of those that become one */
        if (!given(t) || arg->letters[0] != 'M' || last <= 0) continue;
        if (!first) {
            first = arg;
            axes = last + 1;
            memcpy(shape, t->shape, sizeof shape);
        }
        if (last + 1 != axes)
            return refuse(PyExc_ValueError, op, arg,
                          "should have %d axes as %s has before its last ones, got %d", axes, first->name,
                          last + 1);
        int64_t rows = 1, stride = 0;
        for (int axis = last; axis >= 0; axis--) {
            if (t->shape[axis] != shape[axis])
                return refuse(PyExc_ValueError, op, arg, "axis %d should be %lld as %s's is, got %lld", axis,
                              (long long)shape[axis], first->name, (long long)t->shape[axis]);
            if (t->shape[axis] != 1) {
                if (rows == 1) stride = t->stride[axis];
                else if (rows && t->stride[axis] != rows * stride)
                    return refuse(PyExc_ValueError, op, arg,
                                  "axes 0..%d should lie as one, with stride %lld of axis %d, got %lld", last,
                                  (long long)(rows * stride), axis, (long long)t->stride[axis]);
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
            return refuse(PyExc_ValueError, op, arg, "should be on %s as %s is, got %s",
                          device_name(t[first].device).text, spec->args[first].name,
                          device_name(t[i].device).text);
        if (arg->dtype == COMMON) {
            if (common < 0) {
                common = t[i].dtype;
                common_name = arg->name;
            }
            if (t[i].dtype != F32 && t[i].dtype != BF16 && t[i].dtype != F16)
                return refuse(PyExc_TypeError, op, arg, "should be float32, bfloat16 or float16, got %s",
                              dtype_names[t[i].dtype]);
            if (t[i].dtype != common)
                return refuse(PyExc_TypeError, op, arg, "should be %s as %s is, got %s", dtype_names[common],
                              common_name, dtype_names[t[i].dtype]);
        } else if (arg->dtype == ANY ? t[i].dtype > F16 : t[i].dtype != arg->dtype) {
            return refuse(PyExc_TypeError, op, arg, "should be %s, got %s",
                          arg->dtype == ANY ? "float32, bfloat16 or float16" : dtype_names[arg->dtype],
                          dtype_names[t[i].dtype]);
        }
        if (t[i].ndim != arg->ndim)
            return refuse(PyExc_ValueError, op, arg, "should have %d axes, got %d", arg->ndim, t[i].ndim);
    }
    for (int input = 1; input >= 0; input--) /* inputs say what the letters are, outputs follow */
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
                return refuse(PyExc_ValueError, op, arg,
                              "axis %d should be dense (stride 1), got stride %lld", last,
                              (long long)t[i].stride[last]);
            if (elements && (uintptr_t)t[i].data % (uintptr_t)dtype_size(t[i].dtype))
                return refuse(PyExc_ValueError, op, arg, "is not aligned to its element size");
        }
    return 0;
}

/* The bytes from the lowest to one past the highest element. */
static void extent(const Tensor *t, char **low, char **high) {
    int64_t below = 0, above = 0, size = dtype_size(t->dtype);
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0) {
            *low = *high = t->data;
            return;
        }
        int64_t reach = (t->shape[i] - 1) * t->stride[i];
        if (reach < 0) below += reach;
        else above += reach;
    }
    *low = (char *)t->data + below * size;
    *high = (char *)t->data + (above + 1) * size;
}

int overlap(const Tensor *a, const Tensor *b) {
    char *low[2], *high[2];
    extent(a, &low[0], &high[0]);
    extent(b, &low[1], &high[1]);
    return low[0] < high[0] && low[1] < high[1] && low[0] < high[1] && low[1] < high[0];
}

static int same_memory(const Tensor *a, const Tensor *b) {
    if (a->data != b->data || a->ndim != b->ndim || a->dtype != b->dtype) return 0;
    for (int i = 0; i < a->ndim; i++)
        if (a->shape[i] != b->shape[i] || (a->shape[i] > 1 && a->stride[i] != b->stride[i])) return 0;
    return 1;
}

/* The bytes that t touches in each period of `pitch` bytes, from its first on; 0 if it does not keep to such
 * periods. */
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

/* Whether a and b lie side by side in the rows of one matrix, as q, k and v do: modulo the row's length,
 * which is one of their strides, they do not meet. */
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

/* Whether two elements of t share memory. Axes in the order of their strides: each must step over all below
 * it. */
static int overlaps_itself(const Tensor *t) {
    int done[MAX_NDIM] = { 0 };
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
            return refuse(PyExc_ValueError, op, &spec->args[i],
                          "is an output and has elements that share memory");
        for (int j = i + 1; j < spec->tensors; j++) {
            if (!given(&t[j]) || !overlap(&t[i], &t[j]) || interleaved(&t[i], &t[j])) continue;
            if (spec->args[j].may_alias && same_memory(&t[i], &t[j])) continue;
            return refuse(PyExc_ValueError, op, &spec->args[i], "is an output and overlaps %s",
                          spec->args[j].name);
        }
    }
    return 0;
}

/* ---- the call -------------------------------------------------------------------------------- */

static atomic_int_least32_t *calls; /* how often each op ran, for tests that ask which kernels a step used */
static int isa;

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
    Py_BEGIN_ALLOW_THREADS int entered = cuda->enter(how.device);
    status = entered < 0 ? -1 : op->cuda(all, &how);
    cuda->leave(entered);
    Py_END_ALLOW_THREADS if (status) { /* "op: ..." is the kernel's word on its arguments */
        size_t n = strlen(op->name);
        if (!strncmp(last_error(), op->name, n) && last_error()[n] == ':')
            PyErr_SetString(PyExc_ValueError, last_error());
        else cuda_failed(op->name, device);
    }
    give_back(&loan, 1, queue);
    Py_XDECREF(room);
    return status;
}

/* An op's struct: its tensors, then its doubles. */
typedef struct {
    Tensor tensors[MAX_ARGS];
    double scalars[MAX_ARGS];
} Struct;

/* Fills the op's struct from its arguments and checks them; 0, or -1 with an exception. The loans are to be
 * given back. */
static int take(int index, PyObject *const *args, Py_ssize_t count, Struct *all, Loan *loans, Queue *queue) {
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
        if (PyErr_Occurred() ||
            (arg->is_int && !(fabs(scalars[i]) < 9e15 && scalars[i] == (double)(int64_t)scalars[i])))
            return refuse(PyExc_TypeError, op, arg, "should be %s, got %R",
                          arg->is_int ? "an integer" : "a number", value);
    }
    if (merge_rows(op, spec, all->tensors) || check(op, spec, all->tensors)) return -1;
    if (ops[index].check && ops[index].check(op, all))
        return PyErr_SetString(PyExc_ValueError, last_error()), -1;
    return 0;
}

static PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t count) {
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
    calls[index]++;
    if (device) {
        status = call_cuda(&ops[index], &all, device, &queue);
        result = status ? NULL : Py_NewRef(Py_None);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS status = ops[index].cpu[isa](&all, NULL);
    Py_END_ALLOW_THREADS if (status) /* scratch() has one way to fail, the kernels another */
        PyErr_SetString(strncmp(last_error(), "out of memory", 13) ? PyExc_ValueError : PyExc_MemoryError,
                        last_error());
    else result = Py_NewRef(Py_None);
done:
    give_back(loans, spec->tensors, device && !status ? &queue : NULL);
    return result;
}

/* ---- questions about a call ------------------------------------------------------------------ */

/* Fills `all` for the op args[0] and its arguments args[1..], wherever its arrays are; their memory is not
 * read. The op's index, or -1 with an exception. */
static int take_question(const char *asker, PyObject *const *args, Py_ssize_t count, Struct *all) {
    Loan loans[MAX_ARGS] = { 0 };
    Queue queue = { 0 };
    int index = 0;
    if (!count || !PyUnicode_Check(args[0]))
        return PyErr_Format(PyExc_TypeError, "%s: takes the name of an op and its arguments", asker), -1;
    while (index < op_count && PyUnicode_CompareWithASCIIString(args[0], ops[index].name)) index++;
    if (index == op_count) return PyErr_Format(PyExc_ValueError, "%s: there is no op %R", asker, args[0]), -1;
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
    for (int i = 0; i < ISA_COUNT; i++)
        if (isa_supported(i)) peak = peaks[i];
    Py_BEGIN_ALLOW_THREADS flops = peak(n, &unused);
    Py_END_ALLOW_THREADS return PyFloat_FromDouble(flops);
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
      "set_num_threads($module, n, /)\n--\n\nThreads that each op may use." },
    { "get_num_threads", py_get_threads, METH_NOARGS, "get_num_threads($module, /)\n--\n\n" },
    { "set_grain", py_set_grain, METH_O,
      "set_grain($module, nanoseconds, /)\n--\n\nWork that is worth a thread of its own; 0: every call uses "
      "all threads." },
    { "get_grain", py_get_grain, METH_NOARGS, "get_grain($module, /)\n--\n\n" },
    { "set_isa", py_set_isa, METH_O, "set_isa($module, index, /)\n--\n\nIndex into isa_names." },
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
      "The bytes of workspace that the op takes on a GPU with these arguments; 0 without CUDA. Arrays are\n"
      "neither read nor written." },
    { "calls", py_calls, METH_NOARGS, "calls($module, /)\n--\n\nHow often each op has run in this process." },
    { NULL, NULL, 0, NULL },
};

static int exec_module(PyObject *module) {
    static PyMethodDef *functions;
    if (functions)
        return PyErr_SetString(PyExc_ImportError, "longlora._C can be loaded once in a process"), -1;
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
