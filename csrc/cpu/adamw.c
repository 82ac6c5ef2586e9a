#include "cpu.h"

int CPU(adamw)(const void *args, void *stream) { (void)args; (void)stream; return fail("adamw: not written yet"); }
