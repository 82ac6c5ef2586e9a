"""Indices that another thread changes while an op runs: the op may refuse them or return any numbers, but it
touches no memory outside its arrays."""

import subprocess
import sys

import pytest

# Flips an array between indices that are in range and others, while the op runs without the GIL.
SCRIPT = """
import sys, threading, time
import numpy as np
from longlora import ops

def f32(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)

M, C, V, T = 4096, 8, 50, 1 << 17
ids = np.sort(np.arange(M, dtype=np.int32) % V)
order = np.arange(M, dtype=np.int32)
far = np.where(np.arange(M) % 2, 2**31 - 1, -(2**31) + 5).astype(np.int32)
rows, weight, table = f32(M, C), f32(V, C), f32(M, 4)
tokens, one_document = np.arange(T + 1, dtype=np.int32), np.append(np.zeros(T, np.int32), np.int32(T))
q = f32(1, T, 1, 1)
name = sys.argv[1]
array, other, call = {
    "embedding_forward ids": (ids, far, lambda x: ops.embedding_forward(weight, x)),
    "embedding_backward ids": (ids, far, lambda x: ops.embedding_backward(rows, x, order, V)),
    "embedding_backward order": (order, far, lambda x: ops.embedding_backward(rows, ids, x, V)),
    "rope_forward positions": (
        order[None], far, lambda x: ops.rope_forward(rows.reshape(1, M, 1, C), table, table, x)
    ),
    "linear_cross_entropy_backward targets": (
        ids, far, lambda x: ops.linear_cross_entropy_backward(rows, weight, x, f32(M), train_weight=True)
    ),
    "s2_attention_forward cu_seqlens": (
        tokens, one_document, lambda x: ops.s2_attention_forward(q, q, q, group_size=4, cu_seqlens=x)
    ),
}[name]
good, array = array.copy(), array.copy()
call(array)
end = time.monotonic() + float(sys.argv[2])
sys.setswitchinterval(1e-5)

def flip():
    waits = np.random.default_rng(1)
    while time.monotonic() < end:
        for x in good, other:
            array[...] = x
            for _ in range(waits.integers(2000)):
                pass

thread = threading.Thread(target=flip)
thread.start()
while time.monotonic() < end:
    try:
        call(array)
    except ValueError as error:
        assert name.split()[0] in str(error), error
thread.join()
"""


@pytest.mark.parametrize(
    "name",
    [
        "embedding_forward ids",
        "embedding_backward ids",
        "embedding_backward order",
        "rope_forward positions",
        "linear_cross_entropy_backward targets",
        "s2_attention_forward cu_seqlens",
    ],
)
def test_indices_that_change_during_the_call(name):
    done = subprocess.run([sys.executable, "-c", SCRIPT, name, "0.5"], capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
