#include "cpu.h"

int CPU(linear_cross_entropy_forward)(const void *args, void *stream) { (void)args; (void)stream; return fail("linear_cross_entropy_forward: not written yet"); }
int CPU(linear_cross_entropy_backward)(const void *args, void *stream) { (void)args; (void)stream; return fail("linear_cross_entropy_backward: not written yet"); }
