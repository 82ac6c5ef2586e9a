"""The plan of a run on a GPU, made where there is none."""

import math

import pytest
import tiny

import longlora
from longlora import _C, cuda
from longlora.errors import UserError
from longlora.memory.dry_run import untouched
from longlora.memory.plan import Plan

pytestmark = pytest.mark.skipif(cuda.is_available(), reason="there is a GPU")


def test_workspace_is_known_without_cuda():
    """The bytes from the layout of csrc/workspace.h by hand."""

    def array(*shape, dtype="bfloat16"):
        size = 4 if dtype in ("float32", "int32") else 2
        return untouched(size * math.prod(shape)).view(shape, dtype)

    cublas, M, C, V = 32 << 20, 5000, 64, 1000
    x, weight = array(M, C), array(V, C)
    row = array(M, dtype="float32")
    loss = _C.workspace("linear_cross_entropy_forward", row, row, x, weight, array(M, dtype="int32"), -100)
    assert loss == cublas + 256 + 4 * 1728 * 1000  # three chunks of rows, in steps of 64
    assert _C.workspace("matmul", array(M, V), x, array(C, V), 1.0, 0.0) == cublas
    assert _C.workspace("cast", x, array(M, C)) == 0
    u, a, b = None, array(8, C), array(V, 8)
    lora = _C.workspace("lora_linear_forward", array(M, V), u, x, weight, None, a, b, None, 1.0)
    assert lora == cublas + 4 * M * 8


def test_a_plan_for_a_gpu_that_is_not_here(tmp_path):
    tiny.config(tmp_path)
    kwargs = dict(model=str(tmp_path), target_length=512, dtype="bfloat16", device="cuda")
    plan = longlora.plan(**kwargs, max_memory=80)
    assert isinstance(plan, Plan) and plan.device == "cuda:0" and plan.memory == 80 << 30 and plan.fits
    assert plan.parts["workspace of the ops"] > 32 << 20 and "scratch of the ops" not in plan.parts
    assert not longlora.plan(**kwargs, max_memory=0.01).fits
    with pytest.raises(UserError, match="device cuda cannot be used: .*; with --max-memory GIB"):
        longlora.plan(**kwargs)
