#include "cpu.h"

int CPU(cast)(const void *args, void *stream) { (void)args; (void)stream; return fail("cast: not written yet"); }
int CPU(accumulate)(const void *args, void *stream) { (void)args; (void)stream; return fail("accumulate: not written yet"); }
int CPU(sum_squares)(const void *args, void *stream) { (void)args; (void)stream; return fail("sum_squares: not written yet"); }
