"""A kind of tensors that does not train stops the run with the reason; lora_A has one step more."""

import pytest
from engines import Parameter

from longlora.errors import UserError
from longlora.training.moved import Moved


def tensor(kind, name, gradient=True):
    made = Parameter(name, kind, 2, 3)
    made.grad[:] = gradient
    return made


def move(tensor):
    tensor.value[1, 2] += 1


def check(moved, step=1, low=False):
    """The error of a check, or None."""
    try:
        moved.check(step, low)
    except UserError as error:
        return str(error)
    return None


def test_a_kind_that_has_moved_is_not_checked_again():
    found = [tensor(kind, kind) for kind in ("norm", "embedding", "lora_B")]
    moved = Moved(found)
    assert list(moved.waiting) == ["norm", "embedding", "lora_B"]
    for p in found:
        move(p)
    assert check(moved) is None and not moved.waiting
    assert check(moved, 2) is None


def test_every_kind_is_checked():
    found = [tensor("norm", "a"), tensor("embedding", "b", False)]
    moved = Moved(found)
    move(found[0])
    assert check(moved, 7) == (
        "step 7: embedding does not train: 1 of 1 tensors have not moved (b): its gradient is zero"
    )


@pytest.mark.parametrize("kind", ["norm", "embedding", "head", "lora_B", "linear"])
@pytest.mark.parametrize(
    "gradient, why",
    [
        (False, "its gradient is zero"),
        (True, "its updates are below the rounding of float32; raise the learning rate"),
    ],
)
def test_every_tensor_of_a_kind_must_move(kind, gradient, why):
    found = [tensor(kind, name, gradient) for name in "abcd"]
    moved = Moved(found)
    move(found[1])
    words = f"step 1: {kind} does not train: 3 of 4 tensors have not moved (a, c): {why}"
    assert check(moved) == words


def test_tensors_without_a_gradient_are_named_first():
    found = [tensor("norm", name, name == "a") for name in "abc"]
    assert check(Moved(found)) == (
        "step 1: norm does not train: 2 of 3 tensors have not moved (b, c): its gradient is zero"
    )


def test_one_bias_that_moves_is_enough():
    found = [tensor("bias", name, False) for name in "ab"]
    assert "step 1: bias does not train: 2 of 2 tensors" in check(Moved(found))
    moved = Moved(found)
    move(found[1])
    assert check(moved) is None and not moved.waiting


@pytest.mark.parametrize("gradient", [False, True])
def test_lora_a_may_wait_for_the_second_step(gradient):
    a, norm = tensor("lora_A", "a", gradient), tensor("norm", "n")
    moved = Moved([a, norm])
    move(norm)
    assert check(moved) is None and list(moved.waiting) == ["lora_A"]
    assert check(moved, 2).startswith("step 2: lora_A does not train: 1 of 1 tensors")
    moved = Moved([a])
    assert check(moved) is None
    move(a)
    assert check(moved, 2) is None and not moved.waiting


def test_at_a_low_rate_a_gradient_is_enough():
    p = tensor("norm", "n")
    moved = Moved([p])
    assert check(moved, 1, low=True) is None and list(moved.waiting) == ["norm"]
    assert "below the rounding" in check(moved, 2)
    p.grad[:] = 0
    assert "its gradient is zero" in check(moved, 2, low=True)
