"""The folder of an adapter that holds its base model with the longer positions.

LoRA cannot express positions, and PEFT's adapter_config.json has no field for them. It does have the
path of the base model, and loaders that open the base themselves follow it (AutoPeftModelForCausalLM, the
from_pretrained of transformers). So the path leads to this folder: links to the files of the base, and a
config.json of its own, which has the positions. A loader that is given the plain base does not see the
folder. For those adapter_config.json has a key that PEFT does not know, and PEFT warns with its name.
"""

import contextlib
import os
import re
from typing import Any

from longlora.disk import make_directory, sweep, unlink
from longlora.errors import UserError

Path = str | os.PathLike[str]
FOLDER, CONFIG = "longlora_base", "config.json"
KEY = "needs_the_positions_in_its_folder_" + FOLDER
# For the model card of an adapter.
NOTE = f"""The longer positions are in the folder `{FOLDER}`: load with \
`AutoPeftModelForCausalLM.from_pretrained(adapter)`,
or give any other loader `{FOLDER}` where it asks for the base model. Loaded on the base itself, the adapter \
gives wrong
results. `longlora merge` makes a plain model, which every loader and server reads right.
"""


def fields(adapter: Path, base: Path | None) -> dict[str, Any]:
    """What adapter_config.json says about the folder.

    adapter: where the adapter will lie in the end; base: the path or name of the base model.
    """
    named = None if base is None else os.fspath(base)
    return {"base_model_name_or_path": os.path.join(os.path.abspath(adapter), FOLDER), KEY: named}


def find(adapter: Path) -> str | None:
    """The directory whose config.json has the positions of an adapter, or None where there is no such file.

    Adapters of longlora 0.1.0 have it beside adapter_config.json.
    """
    places = (os.path.join(adapter, FOLDER), os.fspath(adapter))
    return next((place for place in places if os.path.isfile(os.path.join(place, CONFIG))), None)


def check(adapter: Path) -> None:
    """UserError if the directory `adapter` has such a folder with files that are not ours.

    A copy of an adapter has them where links were followed. What killed processes left half written goes.
    """
    folder = os.path.join(adapter, FOLDER)
    if not os.path.isdir(folder):
        return
    sweep(folder, re.escape(CONFIG))
    for entry in os.scandir(folder):
        if not entry.is_symlink() and entry.name != CONFIG:
            raise UserError(
                f"{entry.path}: is in the way: longlora writes all files of an adapter's {FOLDER}"
            )


def make(adapter: Path, base: Path | None) -> str:
    """Make the folder in the directory `adapter`, without its config.json -> its path.

    base: the directory of the base model, or None. Without a link to the weights, loaders say that there are
    none: so a .gguf file, which transformers reads with positions of its own, gets no link, and a file system
    that has no links does not stop a run. UserError if the folder holds files that are not ours.
    """
    folder = os.path.join(adapter, FOLDER)
    check(adapter)
    make_directory(folder)
    for entry in os.scandir(folder):
        if entry.is_symlink():
            unlink(entry.path)
    if base is not None and os.path.isfile(os.path.join(base, CONFIG)):
        for entry in os.scandir(base):
            ours = entry.name == CONFIG or entry.name.startswith(".") or entry.name.endswith(".gguf")
            if not ours and entry.is_file():
                with contextlib.suppress(OSError):
                    os.symlink(os.path.abspath(entry.path), os.path.join(folder, entry.name))
    return folder
