"""Functions of longlora.ops raise TypeError for what is not an array, ValueError for a wrong shape."""

import inspect

import numpy as np
import pytest

from longlora import ops

# An array for every parameter that takes one. Shapes need not fit each other: one of them is always wrong.
FLOAT, IDS = np.ones((2, 4, 2, 4), np.float32), np.zeros(2, np.int32)
KEYWORDS = dict(group_size=2, lr=1e-3, step=1, dtype="float32", rows=4, scale=1.0)


def functions():
    for name, function in vars(ops).items():
        if inspect.isfunction(function) and function.__module__ == ops.__name__ and name[0] != "_":
            parameters = inspect.signature(function).parameters
            arrays = [n for n, p in parameters.items() if p.annotation in (ops.Array, ops.Array | None)]
            if arrays and name != "attention_scalars":
                yield name, function, parameters, arrays


def call(function, parameters, **wrong):
    given = {n: (IDS if n in ("ids", "order", "targets", "positions") else FLOAT) for n in parameters}
    for n, p in parameters.items():
        if p.default is not p.empty and n not in wrong:
            del given[n]
    given = {n: KEYWORDS.get(n, value) for n, value in given.items()}
    return function(**(given | wrong))


@pytest.mark.parametrize(
    "name, function, parameters, arrays", list(functions()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_an_object_that_is_not_an_array(name, function, parameters, arrays):
    for argument in arrays:
        for wrong in ("x", 3, object(), [1.0]):
            with pytest.raises((TypeError, ValueError)):
                call(function, parameters, **{argument: wrong})
        with pytest.raises((TypeError, ValueError)):
            call(function, parameters, **{argument: np.float32(1).reshape(())})


@pytest.mark.parametrize("wrong", ["x", None, 3])
def test_it_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="wanted an array"):
        ops.rms_norm_forward(wrong, np.ones(4, np.float32))
    with pytest.raises(TypeError, match="weight: wanted an array"):
        ops.lora_linear_forward(np.ones((2, 4), np.float32), wrong)
    with pytest.raises(TypeError, match="embedding_backward: dout: wanted an array"):
        ops.embedding_backward(wrong, IDS, IDS, 4)
    with pytest.raises(TypeError, match="rms_norm_backward: weight: wanted an array"):
        ops.rms_norm_backward(FLOAT, FLOAT, FLOAT[..., 0], wrong)


# The argument that gives the result its shape.
WAYS = "forward", "backward"
LIKE = {name: "x" for name in ("cast", "scale", "rms_norm_forward", "rms_norm_backward", "rope_forward")}
LIKE |= {f"{op}_{way}": "x" for op in ("lora_linear", "linear_cross_entropy") for way in WAYS}
LIKE |= dict(matmul="a", rope_backward="dout", swiglu_forward="gate", swiglu_backward="gate")
LIKE |= dict(s2_attention_forward="q", s2_attention_backward="q", cached_attention="q")


@pytest.mark.parametrize("name", LIKE)
def test_the_argument_that_is_wrong_is_named_and_not_the_result(name):
    ((_, function, parameters, _),) = (found for found in functions() if found[0] == name)
    argument = LIKE[name]
    with pytest.raises(ValueError, match=f"^{name}: {argument} should have (at least 2|4) axes, got 1$"):
        call(function, parameters, **{argument: np.ones(4, np.float32)})
    with pytest.raises(TypeError, match=f"^{name}: {argument}: wanted an array"):
        call(function, parameters, **{argument: "x"})
