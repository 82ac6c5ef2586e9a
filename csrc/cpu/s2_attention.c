#include "cpu.h"

int CPU(s2_attention_forward)(const void *args, void *stream) { (void)args; (void)stream; return fail("s2_attention_forward: not written yet"); }
int CPU(s2_attention_backward)(const void *args, void *stream) { (void)args; (void)stream; return fail("s2_attention_backward: not written yet"); }
