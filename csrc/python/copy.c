/* copy.c --- copies for Tensor.copy_, cpu and fill: on the CPU, between it and a GPU through pinned memory,
 * and between two GPUs. */
#include "binding.h"
#include "cpu/cpu.h"

#include <stdatomic.h>

/* Copies one row of the last axis. */
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
        else
            for (int64_t i = 0; i < n; i++) memcpy(out + i * out_step * size, c->value, (size_t)size);
        return 0;
    }
    const char *x = at(&c->x, x_at);
    int64_t x_size = dtype_size(c->x.dtype), same = c->out.dtype == c->x.dtype;
    if (out_step == 1 && x_step == 1) {
        float block[1024];
        if (same) memcpy(out, x, (size_t)(n * size));
        else
            for (int64_t i = 0; i < n; i += 1024) {
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

void copy_all(const Copy *c) {
    int64_t n = elements_of(&c->out), last = c->out.ndim ? c->out.shape[c->out.ndim - 1] : 1;
    if (n) parallel_for(n / last, last / 4 + 1, copy_row, (void *)c);
}

/* Copies between the CPU and the entered device through `stage`, pinned memory of STAGE bytes. */
enum { STAGE = 8 << 20 };
static int copy_by_stage(const Tensor *out, const Tensor *x, void *stage, void *stream) {
    Tensor middle = dtype_size(x->dtype) < dtype_size(out->dtype) ? *x : *out; /* the narrower dtype */
    if (elements_of(out) * dtype_size(middle.dtype) > STAGE) { /* copy the halves of the first longer axis */
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
                       copy_by_stage(&halves[1][0], &halves[1][1], stage, stream)
                   ? -1
                   : 0;
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

static int copy_with_cpu(const Side *out, const Side *x, void *stream) {
    static _Atomic(void *) spare; /* a stage, kept for the next copy */
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

/* Devices exchange dense bytes of one dtype. x is converted to that form on its own device, and the result to
 * the form of out on out's device. */
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
    for (int i = 0; i < 2; i++)
        if (memory[i]) cuda->release(memory[i]);
    cuda->leave(entered);
    return status ? -1 : order(from.device, x->stream, to.device, stream);
}

static int copy_between(const Side *out, const Side *x, void **stream) {
    int device = out->t.device ? out->t.device : x->t.device, status = 0;
    *stream = out->t.device ? out->stream : x->stream;
    if (!device) return copy_all(&(Copy){ .out = out->t, .x = x->t }), 0;
    if (!elements_of(&out->t)) return 0;
    if (out->t.device && x->t.device && out->t.device != x->t.device)
        return copy_between_devices(out, x, *stream);
    if (x->t.device) status = order(device, *stream, device, x->stream);
    int entered = cuda->enter(device - 1);
    if (entered < 0) return -1;
    if (!status)
        status = out->t.device && x->t.device ? cuda->copy(&out->t, &x->t, *stream)
                                              : copy_with_cpu(out, x, *stream);
    cuda->leave(entered);
    if (!status && x->t.device) status = order(device, x->stream, device, *stream);
    return status;
}

int copy_sides(const char *op, const Side *out, const Side *x, void **stream) {
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = copy_between(out, x, stream);
    Py_END_ALLOW_THREADS
    if (status) cuda_failed(op, out->t.device ? out->t.device : x->t.device);
    return status;
}
