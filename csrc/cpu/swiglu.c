#include "cpu.h"

int CPU(swiglu_forward)(const void *args, void *stream) { (void)args; (void)stream; return fail("swiglu_forward: not written yet"); }
int CPU(swiglu_backward)(const void *args, void *stream) { (void)args; (void)stream; return fail("swiglu_backward: not written yet"); }
