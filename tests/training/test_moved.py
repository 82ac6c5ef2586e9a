"""A kind of tensors that does not train stops the run, with the reason; what may wait, waits."""

import numpy as np
import pytest

from longlora.errors import UserError
from longlora.training.moved import Moved


class Tensor:
    def __init__(self, kind, name, gradient=True):
        self.kind, self.name, self.shape = kind, name, (2, 3)
        self.value, self.grad = np.zeros((2, 3), np.float32), np.full((2, 3), gradient, np.float32)

    def move(self):
        self.value[1, 2] += 1


def check(moved, step=1, low=False):
    """The message of a check, or None."""
    try:
        moved.check(step, low)
    except UserError as error:
        return str(error)
    return None


def test_what_has_moved_once_is_not_asked_again():
    found = [Tensor(kind, kind) for kind in ("norm", "embedding", "lora_B")]
    moved = Moved(found)
    assert list(moved.waiting) == ["norm", "embedding", "lora_B"]
    for p in found:
        p.move()
    assert check(moved) is None and not moved.waiting
    assert check(moved, 2) is None


def test_a_kind_after_one_that_moves_is_looked_at_too():
    found = [Tensor("norm", "a"), Tensor("embedding", "b", False)]
    moved = Moved(found)
    found[0].move()
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
def test_every_tensor_of_a_kind_has_to_move(kind, gradient, why):
    found = [Tensor(kind, name, gradient) for name in "abcd"]
    moved = Moved(found)
    found[1].move()
    words = f"step 1: {kind} does not train: 3 of 4 tensors have not moved (a, c): {why}"
    assert check(moved) == words


def test_those_without_a_gradient_are_named_first():
    found = [Tensor("norm", name, name == "a") for name in "abc"]
    assert check(Moved(found)) == (
        "step 1: norm does not train: 2 of 3 tensors have not moved (b, c): its gradient is zero"
    )


def test_a_bias_without_a_gradient_may_stand_beside_one_that_moves():
    found = [Tensor("bias", name, False) for name in "ab"]
    assert "step 1: bias does not train: 2 of 2 tensors" in check(Moved(found))
    moved = Moved(found)
    found[1].move()
    assert check(moved) is None and not moved.waiting


@pytest.mark.parametrize("gradient", [False, True])
def test_lora_a_may_wait_for_the_second_step(gradient):
    a, norm = Tensor("lora_A", "a", gradient), Tensor("norm", "n")
    moved = Moved([a, norm])
    norm.move()
    assert check(moved) is None and list(moved.waiting) == ["lora_A"]
    assert check(moved, 2).startswith("step 2: lora_A does not train: 1 of 1 tensors")
    moved = Moved([a])
    assert check(moved) is None
    a.move()
    assert check(moved, 2) is None and not moved.waiting


def test_at_a_low_rate_a_gradient_is_enough():
    p = Tensor("norm", "n")
    moved = Moved([p])
    assert check(moved, 1, low=True) is None and list(moved.waiting) == ["norm"]
    assert "below the rounding" in check(moved, 2)
    p.grad[:] = 0
    assert "its gradient is zero" in check(moved, 2, low=True)
