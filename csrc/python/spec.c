/* spec.c --- what an op's spec says of its arguments: reading it, and checking shapes, dtypes and memory. The
 * language of specs is explained in ops.h. */
#include "binding.h"
#include "cpu/cpu.h"

#include <stdlib.h>

/* Reads what follows the "]" of an argument: its dtype and the marks ? + ~ *. Moves *text to the space or the
 * end behind them. */
static int parse_marks(const char **text, Arg *arg) {
    static const struct {
        const char *name;
        int dtype;
    } names[] = { { "any", ANY }, { "f32", F32 }, { "f64", F64 }, { "i32", I32 } };
    const char *p = *text;
    for (; *p && *p != ' '; p++) switch (*p) {
            case '?': arg->optional = 1; break;
            case '+': arg->in_place = 1; break;
            case '~': arg->may_alias = 1; break;
            case '*': arg->free_strides = 1; break;
            case ':': {
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
    *text = p;
    return 0;
}

int parse_spec(const char *text, Spec *spec) {
    enum { OUTPUTS, INPUTS, SCALARS } section = OUTPUTS;
    for (const char *p = text; *p;) {
        if (*p == ' ') {
            p++;
            continue;
        }
        if (!strncmp(p, "<-", 2)) {
            section = INPUTS;
            p += 2;
            continue;
        }
        if (*p == '|') {
            section = SCALARS;
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
        arg->output = section == OUTPUTS;
        if (section == SCALARS) {
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
        if (*p++ != ']' || parse_marks(&p, arg)) return -1;
        spec->tensors++;
        spec->outputs += arg->output;
    }
    return 0;
}

/* ---- shapes and dtypes ----------------------------------------------------------------------- */

int merge_rows(const char *op, const Spec *spec, Tensor *tensors) {
    const Arg *first = NULL;
    int64_t shape[MAX_NDIM];
    int axes = 0;
    for (int i = spec->tensors - 1; i >= 0; i--) { /* inputs before outputs */
        const Arg *arg = &spec->args[i];
        Tensor *t = &tensors[i];
        int last = t->ndim - arg->ndim; /* axes 0..last become one */
        if (!given(t) || arg->letters[0] != 'M' || last <= 0) continue;
        if (!first) {
            first = arg;
            axes = last + 1;
            memcpy(shape, t->shape, sizeof shape);
        }
        if (last + 1 != axes)
            return refuse(PyExc_ValueError, op, arg, "should have %d leading axes like %s, got %d", axes,
                          first->name, last + 1);
        int64_t rows = 1, stride = 0;
        for (int axis = last; axis >= 0; axis--) {
            if (t->shape[axis] != shape[axis])
                return refuse(PyExc_ValueError, op, arg, "axis %d should be %lld like %s's, got %lld", axis,
                              (long long)shape[axis], first->name, (long long)t->shape[axis]);
            if (t->shape[axis] != 1) {
                if (rows == 1) stride = t->stride[axis];
                else if (rows && t->stride[axis] != rows * stride)
                    return refuse(PyExc_ValueError, op, arg,
                                  "axes 0..%d should be contiguous with each other: the stride of axis %d "
                                  "should be %lld, "
                                  "got %lld",
                                  last, axis, (long long)(rows * stride), (long long)t->stride[axis]);
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

/* Devices, dtypes and numbers of axes. */
static int check_kinds(const char *op, const Spec *spec, const Tensor *t) {
    const Arg *first = NULL, *common = NULL;
    int device = 0, dtype = -1;
    for (int i = 0; i < spec->tensors; i++) {
        const Arg *arg = &spec->args[i];
        if (!given(&t[i])) continue;
        if (!first) {
            first = arg;
            device = t[i].device;
        }
        if (t[i].device != device)
            return refuse(PyExc_ValueError, op, arg, "should be on %s like %s, got %s",
                          device_name(device).text, first->name, device_name(t[i].device).text);
        if (arg->dtype == COMMON) {
            if (!common) {
                common = arg;
                dtype = t[i].dtype;
            }
            if (t[i].dtype != F32 && t[i].dtype != BF16 && t[i].dtype != F16)
                return refuse(PyExc_TypeError, op, arg, "should be float32, bfloat16 or float16, got %s",
                              dtype_names[t[i].dtype]);
            if (t[i].dtype != dtype)
                return refuse(PyExc_TypeError, op, arg, "should be %s like %s, got %s", dtype_names[dtype],
                              common->name, dtype_names[t[i].dtype]);
        } else if (arg->dtype == ANY ? t[i].dtype > F16 : t[i].dtype != arg->dtype) {
            return refuse(PyExc_TypeError, op, arg, "should be %s, got %s",
                          arg->dtype == ANY ? "float32, bfloat16 or float16" : dtype_names[arg->dtype],
                          dtype_names[t[i].dtype]);
        }
        if (t[i].ndim != arg->ndim)
            return refuse(PyExc_ValueError, op, arg, "should have %d axes, got %d", arg->ndim, t[i].ndim);
    }
    return 0;
}

/* One argument against the sizes of the letters, -1 where a letter has none yet; strides and alignment. */
static int check_layout(const char *op, const Arg *arg, const Tensor *t, int64_t *letters) {
    int64_t elements = 1;
    int last = arg->ndim - 1;
    for (int axis = 0; axis < arg->ndim; axis++) {
        unsigned char letter = (unsigned char)arg->letters[axis];
        int64_t *size = &letters[letter];
        if (letter >= '0' && letter <= '9') *size = letter - '0';
        if (*size < 0) *size = t->shape[axis];
        if (*size != t->shape[axis])
            return refuse(PyExc_ValueError, op, arg, "axis %d should be %c=%lld, got %lld", axis, letter,
                          (long long)*size, (long long)t->shape[axis]);
        elements *= t->shape[axis];
    }
    if (elements && last >= 0 && !arg->free_strides && t->shape[last] > 1 && t->stride[last] != 1)
        return refuse(PyExc_ValueError, op, arg, "axis %d should be dense (stride 1), got stride %lld", last,
                      (long long)t->stride[last]);
    if (elements && (uintptr_t)t->data % (uintptr_t)dtype_size(t->dtype))
        return refuse(PyExc_ValueError, op, arg, "is not aligned to its element size");
    return 0;
}

int check_shapes(const char *op, const Spec *spec, const Tensor *t) {
    int64_t letters[128];
    memset(letters, -1, sizeof letters);
    if (check_kinds(op, spec, t)) return -1;
    for (int output = 0; output <= 1; output++) /* inputs say what the letters are, outputs follow */
        for (int i = 0; i < spec->tensors; i++)
            if (given(&t[i]) && spec->args[i].output == output &&
                check_layout(op, &spec->args[i], &t[i], letters))
                return -1;
    return 0;
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* From the first byte of the lowest element to one past the highest element. */
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

/* The bytes that t touches in each period of `pitch` bytes that begins at its first element; 0 if elements
 * cross periods. */
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

/* Whether a and b lie side by side in the rows of one matrix, as q, k and v may: their offsets within a row
 * do not overlap. The length of a row is one of a's strides. */
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

/* Whether two elements of t share memory. By rising stride, each axis must step over the axes before it. */
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

int check_overlap(const char *op, const Spec *spec, const Tensor *t) {
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
