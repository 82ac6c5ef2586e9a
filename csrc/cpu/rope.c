#include "cpu.h"

int CPU(rope_forward)(const void *args, void *stream) { (void)args; (void)stream; return fail("rope_forward: not written yet"); }
int CPU(rope_backward)(const void *args, void *stream) { (void)args; (void)stream; return fail("rope_backward: not written yet"); }
