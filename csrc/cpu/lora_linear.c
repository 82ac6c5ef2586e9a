#include "cpu.h"

int CPU(lora_linear_forward)(const void *args, void *stream) { (void)args; (void)stream; return fail("lora_linear_forward: not written yet"); }
int CPU(lora_linear_backward)(const void *args, void *stream) { (void)args; (void)stream; return fail("lora_linear_backward: not written yet"); }
