"""_C.Recording: calls of ops that are checked once, and made again on what the Tensors hold then."""

import gc
import os
import re
import signal
import threading
import weakref

import numpy as np
import pytest
from tiny import CONFIG

from longlora import _C, ops
from longlora.decoder import generate
from longlora.decoder.cache import Cache
from longlora.decoder.config import read_config
from longlora.decoder.layer import Layer
from longlora.decoder.model import Model
from longlora.decoder.streaming import StreamingCache, Window


def tensor(array):
    made = _C.Tensor(array.shape, array.dtype.name)
    made.copy_(array)
    return made


def random(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def test_runs_have_the_bits_of_calls():
    x, w, gp = tensor(random(5, 8)), tensor(random(12, 8)), _C.Tensor((5, 12))
    f = _C.Tensor((5, 6))
    recording = _C.Recording()
    recording.add("matmul", gp, x, w.T, 1.5, 0.0)
    recording.add("swiglu_forward", f, gp[:, :6], gp[:, 6:])
    assert not gp.numpy().any()  # nothing has been computed
    before = _C.calls()
    for seed in range(3):
        x.copy_(random(5, 8) + seed)
        recording.run()
        product = ops.matmul(x.numpy(), w.numpy().T, alpha=1.5)
        np.testing.assert_array_equal(gp.numpy(), product)
        np.testing.assert_array_equal(f.numpy(), ops.swiglu_forward(product[:, :6], product[:, 6:]))
    assert _C.calls()["swiglu_forward"] == before["swiglu_forward"] + 6
    _C.Recording().run()


def test_what_is_recorded_stays_alive():
    class Owner(np.ndarray):
        pass

    array = random(2, 3).view(Owner)
    gone, x, out = weakref.ref(array), _C.Tensor.wrap(array, (2, 3), "float32"), _C.Tensor((2, 3))
    recording = _C.Recording()
    recording.add("scale", out, x, 2.0)
    want = 2 * np.asarray(array)
    del array, x
    gc.collect()
    recording.run()
    np.testing.assert_array_equal(out.numpy(), want)
    assert gone() is not None
    del recording
    gc.collect()
    assert gone() is None


def test_the_first_error_ends_a_run():
    out, weight, ids, after = (
        _C.Tensor((2, 3)),
        tensor(random(4, 3)),
        _C.Tensor((2,), "int32"),
        _C.Tensor((2, 3)),
    )
    recording = _C.Recording()
    recording.add("embedding_forward", out, weight, ids)
    recording.add("scale", after, out, 1.0)
    recording.run()
    ids.copy_(np.array([1, 4], np.int32))
    kept = after.numpy().copy()
    with pytest.raises(ValueError, match=r"embedding_forward: ids\[1\] should be in 0..3, got 4"):
        recording.run()
    np.testing.assert_array_equal(after.numpy(), kept)
    ids.copy_(np.array([1, 2], np.int32))
    recording.run()
    np.testing.assert_array_equal(after.numpy(), weight.numpy()[1:3])


@pytest.mark.parametrize(
    "args, error, words",
    [
        ((), TypeError, "Recording: takes the name of an op and its arguments"),
        ((3,), TypeError, "Recording: takes the name of an op and its arguments"),
        (("scales",), ValueError, "Recording: there is no op 'scales'"),
        (("scale", _C.Tensor((2,))), TypeError, "scale: takes 3 arguments"),
        (
            ("scale", _C.Tensor((2, 2)), _C.Tensor((2, 3)), 1.0),
            ValueError,
            "scale: out axis 1 should be N=3, got 2",
        ),
        (
            ("scale", _C.Tensor((2,)), np.zeros(2, np.float32), 1.0),
            TypeError,
            "scale: x should be a Tensor on the CPU",
        ),
        (("scale", None, _C.Tensor((2,)), 1.0), TypeError, "scale: out must be an array, got None"),
        (
            ("scale", _C.Tensor((2,)), _C.Tensor((2,)), "2"),
            TypeError,
            "scale: scale should be a number, got '2'",
        ),
    ],
)
def test_what_is_refused(args, error, words):
    recording = _C.Recording()
    with pytest.raises(error, match=re.escape(words)):
        recording.add(*args)
    recording.run()


def test_overlapping_outputs_are_refused():
    memory = _C.Tensor((8, 4))
    with pytest.raises(ValueError, match="overlap"):
        _C.Recording().add("scale", memory[:6], memory[2:], 1.0)


def test_nothing_is_added_while_it_runs():
    a, out, one = tensor(random(700, 700)), _C.Tensor((700, 700)), _C.Tensor((1, 1))
    recording = _C.Recording()
    for _ in range(40):
        recording.add("matmul", out, a, a, 1.0, 0.0)
    thread = threading.Thread(target=recording.run)
    thread.start()
    refused = 0
    while thread.is_alive() and not refused:
        try:
            recording.add("scale", one, one, 1.0)
        except RuntimeError as error:
            assert str(error) == "Recording: it runs in another thread"
            refused = 1
    thread.join()
    assert refused


def test_a_signal_ends_a_long_run():
    """A handler of Python runs between two calls, and its exception ends the run."""
    size = 500
    a, out = tensor(random(size, size)), _C.Tensor((size, size))
    recording = _C.Recording()
    for _ in range(20000):  # a minute of a fast processor
        recording.add("matmul", out, a, a, 1.0, 0.0)

    class Stopped(Exception):
        pass

    def stop(number, frame):
        raise Stopped

    before, handler = _C.calls()["matmul"], signal.signal(signal.SIGUSR2, stop)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR2))
    timer.start()
    try:
        with pytest.raises(Stopped):
            recording.run()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, handler)
    done = _C.calls()["matmul"] - before
    assert 0 < done < 20000


@pytest.fixture
def recorders(monkeypatch):
    """The RecordedOps that are made."""
    made = []

    class Counted(generate.RecordedOps):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(generate, "RecordedOps", Counted)
    return made


def test_a_pass_is_recorded_once(recorders):
    config = read_config(CONFIG)
    model = Model(config).init_random(1)
    generator = generate.Generator(model, Cache(config, 2, 32))
    for row in range(2):
        generator.extend(row, np.arange(5, dtype=np.int32) + row)
    for token in range(4):
        generator.step([0, 1], [token, token + 1])
    assert len(recorders) == 2  # 5 tokens of one row, and a token of two


def test_a_window_that_moves_is_recorded_again(recorders):
    config = read_config(CONFIG)
    model = Model(config).init_random(1)
    cache = StreamingCache(config, Window(2, 6), model.rope)
    generator = generate.Generator(model, cache)
    for token in range(8):
        generator.step([0], [token])
    assert len(recorders) == 1
    for token in range(3):
        generator.step([0], [token])
    assert len(recorders) == 4


def test_an_interrupted_recording_is_made_again(monkeypatch):
    """Ctrl-C in the middle of the first pass: the next one has all calls."""
    config = read_config(CONFIG)
    model = Model(config).init_random(1)
    generators = [generate.Generator(model, Cache(config, 1, 32)) for _ in range(2)]
    ids = np.arange(5, dtype=np.int32)
    forward = Layer.forward

    def interrupted(layer, *args):
        if layer.index:
            raise KeyboardInterrupt
        forward(layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generators[0].extend(0, ids)
    first, second = (generator.extend(0, ids) for generator in generators)
    np.testing.assert_array_equal(first, second)
