#include "cpu.h"

int CPU(embedding_forward)(const void *args, void *stream) { (void)args; (void)stream; return fail("embedding_forward: not written yet"); }
int CPU(embedding_backward)(const void *args, void *stream) { (void)args; (void)stream; return fail("embedding_backward: not written yet"); }
