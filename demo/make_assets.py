"""Copies the files that ship with the package to longlora/assets, from the results of get_text.py and
pretrain.sh in CACHE.

    python demo/make_assets.py CACHE
"""

import argparse
import shutil
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "longlora" / "assets"
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# The text for the extension: a part of the pretraining text, novel and Bible in about equal parts.
TRAIN = ("austen-prideprejudice", "kjv-01-genesis", "kjv-02-exodus", "kjv-40-matthew", "kjv-42-luke")
# The text for evaluation, each up to this heading.
HELD_OUT = {"austen-persuasion": "Chapter 7", "kjv-44-acts": "Acts 16"}


def main(cache):
    cache = Path(cache)
    missing = [name for name in ("model", "train", "held_out") if not (cache / name).is_dir()]
    if missing:
        raise SystemExit(f"{cache}: has no folder {missing[0]}; nothing was changed")
    for folder in ("model", "train", "held_out"):
        shutil.rmtree(ASSETS / folder, ignore_errors=True)
        (ASSETS / folder).mkdir(parents=True)
    for name in MODEL:
        shutil.copyfile(cache / "model" / name, ASSETS / "model" / name)
    for name in TRAIN:
        shutil.copyfile(cache / "train" / f"{name}.txt", ASSETS / "train" / f"{name}.txt")
    for name, heading in HELD_OUT.items():
        text = (cache / "held_out" / f"{name}.txt").read_text(encoding="utf-8")
        end = text.index(f"\n\n{heading}\n")
        (ASSETS / "held_out" / f"{name}.txt").write_text(text[: end + 1], encoding="utf-8")
    for path in sorted(ASSETS.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>9,} {path.relative_to(ASSETS)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("cache", metavar="CACHE")
    main(**vars(parser.parse_args()))
