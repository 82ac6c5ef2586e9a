"""The YAML file of --config: options by name, each with a value or a list of values."""

import functools
import os
from collections.abc import Callable
from typing import Any

import yaml

from longlora.disk import open_file
from longlora.errors import UserError, reason

LARGEST = 1 << 16  # bytes; the options of a run take 3 KB


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options in the file `path` as they are written there.

    Nothing is built but the values of options, so that neither aliases nor merge keys can fill the memory.
    UserError if there is no such file, or it holds anything else.
    """
    with open_file(path) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise UserError(f"{path}: is larger than {LARGEST:,} bytes, the limit for a file of options")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}") from None
    loader = _attempt(lambda: yaml.SafeLoader(text), f"{path}: is not YAML")
    root = _attempt(loader.get_single_node, f"{path}: is not YAML")
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: should be a mapping of options, got a {root.id}")
    found: dict[str, Any] = {}
    for key, node in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
        if name in found:
            raise UserError(f"{path}: {name} is given twice")
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            raise UserError(f"{path}: {name} should be a value or a list of values")
        values = []
        for part in parts:
            values.append(_attempt(functools.partial(loader.construct_object, part), f"{path}: {name}"))
        found[name] = values if isinstance(node, yaml.SequenceNode) else values[0]
    return found


def _attempt(call: Callable[[], Any], where: str) -> Any:
    """Call the library, which raises what its code runs into: ValueError, KeyError, RecursionError."""
    try:
        return call()
    except Exception as error:
        is_key = isinstance(error, KeyError)
        said = f"{error.args[0]!r} does not fit its YAML tag" if is_key else reason(error)
        raise UserError(f"{where}: {' '.join(said.split())}") from None
