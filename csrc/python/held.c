/* held.c --- capsules of other libraries that wait for queued work. */
#include "binding.h"

/* Capsules whose memory queued work still uses: a producer may reuse it as soon as it has its capsule back.
 * Later calls give them back when the work has run. */
enum { MOST_HELD = 64 };
static struct {
    PyObject *capsule;
    void *mark;
} held[MOST_HELD];
static int held_count;

void release_held(int all) {
    for (int i = 0; i < held_count;) {
        if (all) cuda->await(held[i].mark);
        if (!all && !cuda->passed(held[i].mark)) {
            i++;
            continue;
        }
        PyObject *capsule = held[i].capsule;
        cuda->forget(held[i].mark);
        held[i] = held[--held_count];
        Py_DECREF(capsule); /* may run Python code that calls this function */
    }
}

void hold(PyObject *capsule, int device, void *stream) {
    void *mark = NULL;
    int64_t capture = capture_of(device, stream);
    if (!capture) release_held(held_count == MOST_HELD);
    int entered = cuda->enter(device - 1);
    if (!capture && entered >= 0 && !cuda->mark(stream, &mark)) {
        held[held_count].capsule = capsule;
        held[held_count++].mark = mark;
    } else Py_DECREF(capsule);
    cuda->leave(entered);
}
