"""llama.cpp computes what we do on the GGUF files that merge writes: logits, greedy tokens, ids of texts.

It takes minutes to build: `pip install 'longlora[peers]'`.
"""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from gguf_cases import CASES, LONGER, ROPES, base, logits, tokenizer
from smollm2 import smollm2  # noqa: F401 (fixture)
from test_adapter import made
from test_gguf_writer import _around, _complete
from test_sentencepiece import MODELS
from test_sentencepiece import model as sentencepiece_model
from test_tokenizer import UGLY

from longlora import _C
from longlora.decoder import rope as rope_
from longlora.decoder.lora import LoraConfig
from longlora.files import adapter
from longlora.files.merge import merge
from longlora.files.open_model import open_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed: pip install 'longlora[peers]' builds it in some minutes",
)
NEW = 24  # greedy tokens
# Its 16-bit and quantised products round activations too.
NEAR = {"f32": 2e-5, "f16": 2e-3, "bf16": 1.5e-2, "q8_0": 3e-2}


class Peer:
    """The process with llama.cpp."""

    def __init__(self, folder):
        script = Path(__file__).with_name("llama_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(folder / "stderr", "w"),  # noqa: SIM115 (the process keeps it)
            text=True,
        )
        self.folder = folder
        assert self.read() == "ready"

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            code, said = self.process.wait(), (self.folder / "stderr").read_text()[-2000:]
            amx = _C.isa_supported[_C.isa_names.index("amx")]
            if code == -signal.SIGILL and amx:
                pytest.skip("this build of llama.cpp has an illegal instruction for machines with AMX")
            raise AssertionError(f"llama.cpp ended with {code}: {said}")
        found = json.loads(line)
        assert not (isinstance(found, dict) and "error" in found), found
        return found

    def ask(self, path, context=LONGER + NEW, **request):
        self.process.stdin.write(json.dumps(dict(path=str(path), context=context, **request)) + "\n")
        self.process.stdin.flush()
        return self.read()

    def run(self, path, ids, new=NEW, **request):
        """Logits of `ids` and of `new` greedy tokens after them, and these tokens."""
        out = self.folder / "logits.npy"
        tokens = self.ask(path, ids=[int(x) for x in ids], new=new, out=str(out), **request)
        return np.load(out), tokens


@pytest.fixture
def llama(tmp_path_factory):
    peer = Peer(tmp_path_factory.mktemp("llama"))
    yield peer
    peer.process.kill()
    peer.process.wait()


def perplexity(scores, ids):
    scores = np.float64(scores[: len(ids) - 1])
    top = scores.max(1)
    losses = top + np.log(np.exp(scores - top[:, None]).sum(1)) - scores[np.arange(len(ids) - 1), ids[1:]]
    return np.exp(losses.mean())


def compare(llama, path, count, near=NEAR["f32"], ids=None, **request):
    """Logits, perplexity and greedy tokens are ours. Of two logits that are nearly equal, either may lead."""
    ids = np.arange(count) * 7 % 390 + 3 if ids is None else ids
    theirs, tokens = llama.run(path, ids, **request)
    ours = logits(path, [*ids, *tokens])
    error = near * np.abs(ours).max()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=error)
    assert perplexity(theirs, ids) == pytest.approx(perplexity(ours, ids), rel=near)
    chosen = ours[len(ids) - 1 : -1]
    best = chosen.max(1)
    assert (best - chosen[np.arange(len(tokens)), tokens] <= 2 * error).all()
    return [int(x) for x in chosen.argmax(1)], tokens


@pytest.mark.parametrize("name", CASES)
def test_every_family(tmp_path, llama, name):
    ours, theirs = compare(
        llama, merge(base(tmp_path / "base", name), None, tmp_path / "out", format="gguf"), 60
    )
    assert ours == theirs


@pytest.mark.parametrize("name, kind", [(name, kind) for name, kinds in ROPES.items() for kind in kinds])
def test_longer_positions(tmp_path, llama, name, kind):
    path = base(tmp_path / "base", name, extend=kind)
    compare(llama, merge(path, None, tmp_path / "out", format="gguf"), LONGER, new=4)


@pytest.mark.parametrize("more", [dict(attention_factor=0.7), dict(mscale=2.0, mscale_all_dim=0.5)])
def test_yarn_with_an_attention_factor(tmp_path, llama, more):
    path = base(tmp_path / "base")
    raw = json.loads((path / "config.json").read_text()) | dict(max_position_embeddings=256)
    raw["rope_scaling"] = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, **more)
    (path / "config.json").write_text(json.dumps(raw | dict(rope_parameters=None)))
    compare(llama, merge(path, None, tmp_path / "out", format="gguf"), LONGER, new=4)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_dtypes(tmp_path, llama, dtype):
    file = merge(base(tmp_path / "base"), None, tmp_path / "out", format="gguf", dtype=dtype)
    compare(llama, file, 60, NEAR[dtype], new=4)


def test_an_adapter(tmp_path, llama):
    path = base(tmp_path / "base", "qwen2-tied")
    opened = open_model(path)
    raw = rope_.to_config(opened.config.raw, rope_.extend(opened.config, "linear", LONGER)[0], LONGER)
    adapter.save(tmp_path / "adapter", made(opened, LoraConfig()), LoraConfig(), opened, raw)
    file = merge(path, tmp_path / "adapter", tmp_path / "out", format="gguf")
    compare(llama, file, LONGER, new=4)
    scores, _ = llama.run(file, np.arange(LONGER) * 7 % 390 + 3, new=0)
    merge(path, tmp_path / "adapter", tmp_path / "merged")
    wanted = logits(tmp_path / "merged", np.arange(LONGER) * 7 % 390 + 3)
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=NEAR["f32"] * np.abs(wanted).max())


DIGITS = dict(type="Digits", individual_digits=True)
LETTERS = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
TOKENIZERS = {
    "gpt2": None,
    "smollm": lambda x: x.update(pre_tokenizer=dict(type="Sequence", pretokenizers=[DIGITS, LETTERS])),
    "llama-bpe": lambda x: x["model"].update(ignore_merges=True),
    "smaug-bpe": None,
    "qwen2": None,
    "qwen35": None,
    "tekken": lambda x: x["model"].update(ignore_merges=True),
    "gpt-4o": None,
    "llama": lambda x: (_complete(x), _around(("<s>", 1))(x)),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_of_texts(tmp_path, llama, kind):
    """SentencePiece is as in its own library: a text that begins with a space gets another one."""
    path = base(tmp_path / "base")
    tokenizer(path, kind, TOKENIZERS[kind], tokenizer_class="TokenizersBackend")
    ours = open_model(path).tokenizer()
    file = merge(path, None, tmp_path / "out", format="gguf")
    pre = open_model(file).metadata["tokenizer.ggml.pre"]
    assert pre == {"gpt2": "gpt-2", "llama": "default"}.get(kind, kind)
    texts = [text for text in UGLY if text and "\x00" not in text]
    for text, theirs in zip(texts, llama.ask(file, texts=texts), strict=True):
        assert theirs == ours.encode(text).tolist(), (pre, repr(text))


@pytest.mark.parametrize(
    "kind, name",
    [
        ("llama", "TokenizersBackend"),
        ("llama", "LlamaTokenizer"),
        ("no prefix", "TokenizersBackend"),
        ("symbols", "LlamaTokenizer"),
    ],
)
def test_ids_of_a_sentencepiece_model(tmp_path, llama, kind, name):
    """They are those of the library SentencePiece, and ours."""
    path = base(tmp_path / "base")
    (path / "tokenizer.json").unlink()
    options = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    content = sentencepiece_model(**{**MODELS[kind], **options})
    (path / "tokenizer.model").write_bytes(content)
    prefix = kind != "no prefix"
    config = dict(
        tokenizer_class=name, legacy=True, bos_token="<s>", eos_token="</s>", add_prefix_space=prefix
    )
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = open_model(path).tokenizer()
    file = merge(path, None, tmp_path / "out", format="gguf")
    found = open_model(file).metadata
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    texts = [text for text in UGLY if text and "\x00" not in text and "<" not in text]
    theirs = llama.ask(file, texts=texts)
    for text, ids in zip(texts, theirs, strict=True):
        assert ids == processor.encode(text), repr(text)
        if not text.startswith((" ", "▁")):
            assert ids == ours.encode(text).tolist(), repr(text)


def test_smollm2_with_a_longer_context(tmp_path, llama, smollm2):  # noqa: F811
    """The real model, extended by yarn: 300 tokens of text and greedy tokens after it."""
    opened = open_model(smollm2)
    lora = LoraConfig(r=2, modules_to_save=None)
    tensors = {name: array * np.float32(0.02) for name, array in made(opened, lora).items()}
    raw = rope_.to_config(opened.config.raw, rope_.extend(opened.config, "yarn", 16384)[0], 16384)
    adapter.save(tmp_path / "adapter", tensors, lora, opened, raw)
    file = merge(smollm2, tmp_path / "adapter", tmp_path / "out", format="gguf", dtype="f32")
    text = (Path(__file__).parents[2] / "README.md").read_text()
    ids = open_model(file).tokenizer().encode(text)[:300]
    ours, theirs = compare(llama, file, 0, ids=ids, context=512)
    assert ours == theirs
