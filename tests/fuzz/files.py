"""Damaged files of models, adapters and tokenizers.

A file is read, or refused by a UserError of one line that prints. Anything else is a failure: another error,
a warning, a crash, or more than LIMIT seconds of processor time. The inputs follow from the seed.

    python tests/fuzz/files.py --count 1000000 --seed 1 [--kind gguf]

A failure prints the number of its input; `--first NUMBER --count 1` repeats it.
"""

import argparse
import collections
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]

import tiny  # noqa: E402
from corpus import ADDED, SPECIAL_MAPS, TOKENIZER_CONFIGS, Corpus, damaged, header_noise, tensors, written  # noqa: E402

from longlora.decoder.config import read_config  # noqa: E402
from longlora.errors import LONGEST, UserError  # noqa: E402
from longlora.files import adapter  # noqa: E402
from longlora.files.open_model import open_model  # noqa: E402
from longlora.files.safetensors import SafetensorsFile  # noqa: E402
from longlora.files.tokenizer import Tokenizer  # noqa: E402

LIMIT = 60  # seconds of processor time for one input


# ---- reading -------------------------------------------------------------------------------------


def read_model(path):
    model = open_model(path)
    for name in model.names():
        model.read(name)
    model.fingerprint()
    if model.has_tokenizer():
        encode(model.tokenizer())


def encode(tokenizer):
    for text in ("", "ab c<|end|> é\n", " <x>"):
        tokenizer.decode(tokenizer.encode(text))
    tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.fingerprint()


class Kinds:
    """Each method writes one damaged input and reads it. `root` is a folder for it."""

    def __init__(self, corpus, root):
        self.corpus, self.root = corpus, root
        self.model, self.file = root / "model", root / "x.gguf"
        self.adapter, self.tokenizer_dir = root / "adapter", root / "tokenizer"
        for path in (self.model, self.adapter):
            path.mkdir()
        self.tokenizer_dir.mkdir()
        shutil.copy(corpus.base / "config.json", self.tokenizer_dir)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            shutil.copy(corpus.base / name, self.model)
        for name in (adapter.CONFIG, adapter.WEIGHTS):
            shutil.copy(corpus.root / "adapter" / name, self.adapter)

    @contextlib.contextmanager
    def changed(self, path, content):
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        try:
            yield
        finally:
            if before is None:
                path.unlink()
            else:
                path.write_bytes(before)

    def safetensors(self, rng):
        with self.changed(self.model / "model.safetensors", tensors(rng, self.corpus.tensors)):
            file = SafetensorsFile(self.model / "model.safetensors")
            for name in file.entries:
                with contextlib.suppress(UserError):
                    file.array(name)
            read_model(self.model)

    def gguf(self, rng):
        self.file.write_bytes(header_noise(rng, rng.choice(self.corpus.ggufs)))
        read_model(self.file)

    def config(self, rng):
        found = damaged(rng, rng.choice(self.corpus.configs), self.corpus.configs)
        with self.changed(self.model / "config.json", written(rng, found)):
            read_config(self.model)
            open_model(self.model)

    def index(self, rng):
        (self.model / "model.safetensors").rename(self.model / "part.safetensors")
        try:
            found = damaged(rng, self.corpus.index, [self.corpus.index])
            with self.changed(self.model / "model.safetensors.index.json", written(rng, found)):
                open_model(self.model)
        finally:
            (self.model / "part.safetensors").rename(self.model / "model.safetensors")

    def adapters(self, rng):
        found = damaged(rng, rng.choice(self.corpus.adapters), self.corpus.adapters)
        with self.changed(self.adapter / adapter.CONFIG, written(rng, found)):
            adapter.read_lora(self.adapter)
            adapter.load(self.adapter, open_model(self.corpus.base))

    def adapter_weights(self, rng):
        with self.changed(self.adapter / adapter.WEIGHTS, tensors(rng, self.corpus.lora)):
            adapter.load(self.adapter, open_model(self.corpus.base))

    def tokenizer(self, rng):
        """tokenizer.json, tokenizer_config.json and the files beside it; mostly one of them is damaged."""
        folder, family = self.tokenizer_dir, rng.choice(("llama", "mistral", "qwen2", "phi3"))
        files = {
            "tokenizer.json": rng.choice(self.corpus.tokenizers),
            "tokenizer_config.json": rng.choice(TOKENIZER_CONFIGS),
            "special_tokens_map.json": rng.choice(SPECIAL_MAPS),
            "added_tokens.json": rng.choice(ADDED),
        }
        if rng.random() < 0.5:
            del files["special_tokens_map.json"], files["added_tokens.json"]
        pools = {
            "tokenizer.json": self.corpus.tokenizers,
            "tokenizer_config.json": TOKENIZER_CONFIGS,
            "special_tokens_map.json": SPECIAL_MAPS,
            "added_tokens.json": ADDED,
        }
        name = rng.choice([*files, "tokenizer.json", "tokenizer_config.json"])
        files[name] = damaged(rng, files[name], pools[name])
        for old in folder.iterdir():
            if old.name != "config.json":
                old.unlink()
        (folder / "config.json").write_text(
            json.dumps({**tiny.CONFIG, "model_type": family, "vocab_size": 400})
        )
        for file, content in files.items():
            text = written(rng, content) if file == name else json.dumps(content).encode()
            (folder / file).write_bytes(text)
        tokenizer = Tokenizer.from_directory(folder).check(read_config(folder), folder)
        encode(tokenizer)
        tokenizer.save(self.root / "saved", 128)


NAMES = ("safetensors", "gguf", "config", "index", "adapters", "adapter_weights", "tokenizer")


# ---- the run -------------------------------------------------------------------------------------


def one(kinds, kind, rng):
    """Read one input -> "accepted", "refused", or the traceback of a failure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            getattr(kinds, kind)(rng)
    except UserError as error:
        text = str(error)
        good = text.isprintable() and len(text) < 10 * LONGEST and text.encode()
        return "refused" if good else f"a message that does not print: {text!r}"
    except BaseException:
        return traceback.format_exc()
    return "accepted"


def run(first, count, seed, chosen, counter, results):
    """Read the inputs in a folder of this process; count the outcomes and print failures to stderr."""
    outcomes, seen = collections.Counter(), set()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # saving flushes each file to disk
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        root = Path(folder)
        (root / "work").mkdir()
        kinds = Kinds(Corpus(root / "corpus"), root / "work")
        for number in range(first, first + count):
            counter[:8] = struct.pack("<Q", number)
            kind = chosen or NAMES[number % len(NAMES)]
            rng = random.Random(f"{seed} {number}")
            signal.setitimer(signal.ITIMER_PROF, LIMIT)
            outcome = one(kinds, kind, rng)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if outcome in ("accepted", "refused"):
                outcomes[f"{kind} {outcome}"] += 1
                continue
            outcomes["failed"] += 1
            where = outcome.splitlines()[-1][:40] + "".join(
                line for line in outcome.splitlines() if line.strip().startswith("File")
            )
            if where not in seen:
                seen.add(where)
                print(f"input {number} ({kind}): {outcome}", file=sys.stderr)
    os.write(results, json.dumps(outcomes).encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=NAMES)
    o = parser.parse_args()
    total, number, end = collections.Counter(), o.first, o.first + o.count
    while number < end:
        # A child reads the inputs, so that a crash or a hang is known by its number, and the run goes on.
        counter, (results, write) = mmap.mmap(-1, 8), os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                run(number, end - number, o.seed, o.kind, counter, write)
                code = 0
            os._exit(code)
        os.close(write)
        with os.fdopen(results, "rb") as file:
            total.update(json.loads(file.read() or b"{}"))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        at = struct.unpack("<Q", counter[:8])[0]
        why = f"ended by {signal.Signals(-status).name}" if status < 0 else "the run itself failed"
        print(f"input {at}: {why}", file=sys.stderr)
        total["failed"] += 1
        if status > 0:
            break
        number = at + 1
    print(dict(total))
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
