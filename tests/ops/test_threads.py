"""Threads: equal bits for any number of them, simultaneous calls, and forked children."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from systems import on_linux

from longlora import _C, job, ops


@pytest.fixture(autouse=True)
def no_work_too_small():
    """All threads take part, although the sizes here are small."""
    before = _C.get_grain()
    _C.set_grain(0)
    yield
    _C.set_grain(before)


def f32(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def work():
    """Call every op -> the bytes of all results. The sizes give each kernel work for a second thread."""
    x, w, ids = f32(96, 130), f32(200, 130), np.arange(96, dtype=np.int32) * 7 % 200
    a, b, dout = f32(8, 130), f32(200, 8), f32(96, 200)
    q, k = f32(1, 96, 4, 16), f32(1, 96, 2, 16)
    cos, sin = f32(96, 8), f32(96, 8)
    out, lse = ops.s2_attention_forward(q, k, k, group_size=16)
    cache, lengths = (f32(2, 700, 2, 16), f32(2, 700, 2, 16)), np.array([600], np.int32)
    param, m, v = f32(1000), f32(1000), np.abs(f32(1000))
    ops.adamw(param, m, v, f32(1000), lr=1e-3, step=2)
    results = [
        ops.cast(x, "float16"),
        ops.accumulate(f32(96, 130), x, 0.5),
        ops.scale(x, 0.3),
        ops.matmul(x, w.T),
        ops.embedding_forward(w, ids),
        ops.embedding_backward(x, ids, np.argsort(ids, kind="stable").astype(np.int32), 200),
        *ops.rms_norm_forward(x, f32(130), residual=x + 1),
        *ops.rms_norm_backward(x, x, f32(96), f32(130)),
        ops.rope_forward(q, cos, sin),
        ops.rope_backward(q, cos, sin),
        out,
        lse,
        *ops.lora_linear_forward(x, w, a=a, b=b, scale=2.0),
        *ops.lora_linear_backward(dout, x, w, a=a, b=b, scale=2.0, train_weight=True, train_bias=True),
        *ops.s2_attention_backward(f32(1, 96, 4, 16), q, k, k, out, lse, group_size=16),
        ops.cached_attention(q, *cache, lengths, k=k, v=k),
        ops.cached_attention(q[:, :1], *cache, lengths),
        *cache,
        ops.swiglu_forward(x, x + 1),
        *ops.swiglu_backward(x, x + 1, x + 2),
        *ops.linear_cross_entropy_forward(x, w, ids),
        *ops.linear_cross_entropy_backward(x, w, ids, f32(96), train_weight=True),
        param,
        m,
        v,
        np.array(ops.global_norm([f32(100_000), x.ravel()])),
    ]
    return [r.tobytes() for r in results]


def test_work_is_all_ops():
    before = _C.calls()
    work()
    assert not [name for name, n in _C.calls().items() if n == before[name]]


def test_equal_bits_for_any_number_of_threads(each_thread_count):
    one, two, three = each_thread_count(work)
    assert one == two == three


def test_equal_bits_from_several_python_threads_at_once():
    want, got = work(), [None] * 8
    start = threading.Barrier(8)

    def run(i):
        start.wait()
        got[i] = [work() for _ in range(2)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(g == want for pair in got for g in pair)


def test_errors_of_several_threads_are_their_own():
    wrong = {}

    def run(i):
        for _ in range(50):
            with pytest.raises(ValueError) as error:
                ops.embedding_forward(f32(4, 4), np.array([100 + i], np.int32))
            wrong.setdefault(i, set()).add(str(error.value))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        len(messages) == 1 and str(100 + i) in next(iter(messages)) for i, messages in wrong.items()
    ), wrong


def python(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        timeout=1200,
        check=True,
        text=True,
        capture_output=True,
    ).stdout.split()


BODY = """
import os, numpy as np, longlora
from longlora import ops
longlora.set_num_threads(3)
x = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
want = ops.matmul(x, x).tobytes()
"""


def test_more_threads_than_processors_stay():
    """Also when other names of the package are used for the first time afterwards."""
    script = """
import os
os.environ.pop("OMP_NUM_THREADS", None)
import longlora
longlora.set_num_threads(301)
longlora.Tensor((1,), "uint8")
print(longlora.get_num_threads())
"""
    assert python(script) == ["301"]


def test_forked_child_after_the_parent_used_threads():
    out = python(
        BODY
        + """
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        ok = ops.matmul(x, x).tobytes() == want and longlora.get_num_threads() == 1
        if not os.fork():
            os._exit(0 if ok and ops.matmul(x, x).tobytes() == want else 1)
        os._exit(0 if ok and os.wait()[1] == 0 else 1)
    children.append(child)
    assert ops.matmul(x, x).tobytes() == want
print([os.waitpid(child, 0)[1] for child in children] == [0, 0, 0], longlora.get_num_threads())
"""
    )
    assert out == ["True", "3"]


def test_multiprocessing_by_fork():
    out = python(
        BODY
        + """
import multiprocessing
def run(i): return ops.matmul(x, x).tobytes() == want
with multiprocessing.get_context("fork").Pool(2) as pool: print(all(pool.map(run, range(4))))
"""
    )
    assert out == ["True"]


@on_linux
def test_small_work_starts_no_threads():
    """A call of a few microseconds runs on the calling thread only, unless the grain is 0."""
    out = python(
        """
import os, numpy as np, longlora
from longlora import _C, ops
longlora.set_num_threads(3)
x = np.ones((64, 64), np.float32)
def small():
    ops.rms_norm_forward(x, x[0]); ops.matmul(x, x); ops.swiglu_forward(x, x); ops.cast(x, "float16")
    q = x.reshape(1, 64, 1, 64)
    out, lse = ops.s2_attention_forward(q, q, q, group_size=32)
    ops.s2_attention_backward(out, q, q, q, out, lse, group_size=32)
    ops.linear_cross_entropy_backward(x, x, np.zeros(64, np.int32), x[0])
    return len(os.listdir("/proc/self/task"))
print(small())
_C.set_grain(0)
print(small())
""",
        OPENBLAS_NUM_THREADS="1",
    )
    assert out[0] == "1" and int(out[1]) > 1


@on_linux
def test_threads_survive_between_loops_of_different_sizes():
    """GCC's OpenMP ends idle threads when a smaller team starts, so all teams have one size."""
    out = python(
        """
import os, numpy as np
from longlora import _C, ops
_C.set_grain(0)
x, w = np.ones((700, 1100), np.float32), np.ones((1000, 1100), np.float32)
q = np.ones((1, 9, 2, 8), np.float32)
found = []
for _ in range(5):
    for call in (lambda: ops.matmul(x, w.T), lambda: ops.s2_attention_forward(q, q, q, group_size=9)):
        call()  # many tasks, then one for each of the two heads
        found.append(sorted(os.listdir("/proc/self/task")))
print(len(found[0]), all(x == found[0] for x in found))
""",
        OMP_NUM_THREADS="4",
        OPENBLAS_NUM_THREADS="1",
    )
    assert out == ["4", "True"]


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizer has its own allocator")
def test_large_scratch_is_not_faulted_in_anew():
    """Repeated calls that take megabytes of scratch cause almost no page faults, also after a fork.

    If blocks were not kept, each call would cause hundreds (or several, with huge pages).
    """
    out = python(
        """
import os, resource, numpy as np
from longlora import ops
x, w = np.ones((700, 1100), np.float32), np.ones((1000, 1100), np.float32)
q = np.ones((1, 512, 2, 64), np.float16)
o, lse = ops.s2_attention_forward(q, q, q, group_size=256)
out, dq = np.empty((700, 1000), np.float32), [np.empty_like(q) for _ in range(3)]
def calls():
    ops._C.matmul(out, x, w.T, 1.0, 0.0)
    ops._C.s2_attention_backward(*dq, o, q, q, q, o, lse, None, 256, 0, 0, 0.125)
calls(), calls()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50): calls()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(5)))  # the smallest: a system may take pages back now and then
if not os.fork():
    calls()
    os._exit(0)
print(os.wait()[1])
calls()
""",
        OPENBLAS_NUM_THREADS="1",
    )
    assert int(out[0]) < 25 and out[1] == "0"


def test_scratch_that_is_kept_is_bounded():
    """A call takes 280 MB and returns it to the system at its end."""
    out = python("""
import numpy as np
from longlora import ops
from longlora import job
def resident(): return job.resident_memory() >> 20
q, k = np.ones((1, 16384, 64, 64), np.float16), np.ones((1, 16384, 1, 64), np.float16)
o, lse = ops.s2_attention_forward(q, k, k, group_size=4, shift="none")
dq, dk, dv = np.ones_like(q), np.ones_like(k), np.ones_like(k)
before = resident()
ops._C.s2_attention_backward(dq, dk, dv, o, q, k, k, o, lse, None, 4, 0, 1, 0.125)
peak = job.peak_memory() >> 20
print(peak - before > 250, resident() - before < 128)
""")
    assert out == ["True", "True"]


def test_number_of_threads():
    show = "import longlora; print(longlora.get_num_threads())"
    assert python(show, OMP_NUM_THREADS="3") == ["3"] and python(show, OMP_NUM_THREADS="1") == ["1"]
    unset = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    out = subprocess.run(
        [sys.executable, "-c", show], env=unset, capture_output=True, text=True, check=True
    ).stdout
    assert int(out) == job.processors()
    before = _C.get_num_threads()
    try:
        _C.set_num_threads(5)
        assert _C.get_num_threads() == 5
        for wrong, error in (
            (0, ValueError),
            (-1, ValueError),
            (2**40, ValueError),
            ("2", TypeError),
            (1.5, TypeError),
        ):
            with pytest.raises(error):
                _C.set_num_threads(wrong)
        assert _C.get_num_threads() == 5
    finally:
        _C.set_num_threads(before)


@on_linux
def test_threads_really_run():
    """More than one thread of the process has used the processor, according to /proc."""
    out = python(
        BODY
        + """
import glob
def used():
    stats = [open(f).read() for f in glob.glob("/proc/self/task/*/stat")]
    return sum(int(stat.rsplit(")", 1)[1].split()[11]) > 0 for stat in stats)
big = np.ones((1500, 1500), np.float32)
for _ in range(20): ops.matmul(big, big)
print(len(os.listdir("/proc/self/task")) >= 3, used() >= 2)
""",
        OPENBLAS_NUM_THREADS="1",
    )
    assert out == ["True", "True"]


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_how_threads_wait(given):
    """Waiting threads sleep soon, unless the user has set otherwise. The environment does not change."""
    code = (
        "import os; before = dict(os.environ); from longlora import get_num_threads; get_num_threads(); "
        "assert dict(os.environ) == before"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = (
        {name: value for name, value in os.environ.items() if name not in names}
        | given
        | {"OMP_DISPLAY_ENV": "verbose"}
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this build's OpenMP is not GCC's")
    policy, count = (
        (line.partition("'")[2].partition("'")[0])
        for name in names
        for line in done.stderr.splitlines()
        if name in line
    )
    if given:
        assert (
            given.get("OMP_WAIT_POLICY", policy).upper() == policy
            and given.get("GOMP_SPINCOUNT", count) == count != "1000"
        )
    else:
        assert (policy, count) == ("PASSIVE", "1000")
