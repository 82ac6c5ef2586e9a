"""The message of a UserError that starts with a path."""

import pytest

from longlora.errors import UserError


def refusal(path, call):
    """The message of the UserError that call() raises, without the path and the colon that it starts with."""
    with pytest.raises(UserError) as caught:
        call()
    found, start = str(caught.value), f"{path}: "
    assert found.startswith(start) and "\n" not in found
    return found.removeprefix(start)
