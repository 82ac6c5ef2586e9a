"""Token ids equal transformers' on difficult texts, for each class of tokenizer.json and GGUF vocabulary."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2 import reading_once, smollm2  # noqa: F401 (a fixture)

from longlora.errors import UserError
from longlora.files.open_model import open_model
from longlora.files.tokenizer import Tokenizer
from longlora.files.tokenizer_class import QWEN2, split
from longlora.files.tokenizer_gguf import SPLITS

UGLY = [
    "",
    " ",
    "\n",
    "Hello world",
    "  two  spaces   three\t\ttabs",
    "don't WON'T I'll they've",
    "1234567890 3.14 1 22 333  4444",
    "line\r\nbreaks\n\n\n  indented\n",
    "naïve café ÅÄÖ ﬁ e\u0301 \u1e9b\u0323",
    "日本語のテキスト 中文 한국어 עברית العربية",
    "🙂👩‍👩‍👧‍👦🇫🇷",
    "\u200b\u00a0\ufeff\u2028x",
    "x" * 500,
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|endoftext|>b <|endoftext|> c",
    "<s>not</s> <unk>",
    "\x00\x01\x7f",
    "def f(x):\n    return x**2  # ∑\n",
    "▁under▁line",
    "\ud7ff\U0010ffff",
]
TRAIN = [
    "the quick brown fox jumps over the lazy dog 0123456789 don't I'll we've",
    "naïve café, 日本語 🙂! <tag> (x) [y] {z}",
    "    indented code\n\n\ttabs   and spaces  ",
    "Hello World HELLO WORLD aaaa bbbb 11 22 333 4444",
] * 3


def trained(kind):
    """A small tokenizers.Tokenizer: "llama" is SentencePiece, any other `kind` a byte-level split."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "llama":
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
        )
        tok.train_from_iterator(TRAIN, trainer)
        # In a real model the byte tokens are plain vocabulary; only the first three tokens are special.
        described = json.loads(tok.to_str())
        described["added_tokens"] = described["added_tokens"][:3]
        tok = Tokenizer.from_str(json.dumps(described))
        tok.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return tok
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(TRAIN, trainer)
    if SPLITS.get(kind):
        described = json.loads(tok.to_str())
        described["pre_tokenizer"] = split(SPLITS[kind])
        tok = Tokenizer.from_str(json.dumps(described))
    return tok


def directory(path, tok, **config):
    tok.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=512, hidden_size=8, num_attention_heads=2).save_pretrained(path)
    return path


def equal(ours, theirs, texts=UGLY):
    for text in texts:
        assert ours.encode(text).tolist() == theirs(text).input_ids, repr(text)
        ids = theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), repr(text)


def auto(path, **kwargs):
    from transformers import AutoTokenizer

    with reading_once():
        return AutoTokenizer.from_pretrained(path, **kwargs)


@pytest.mark.parametrize(
    "config",
    [
        dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|im_start|>", eos_token="<|im_end|>"),
        dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            add_bos_token=True,
            add_eos_token=True,
        ),
        dict(
            tokenizer_class="GPT2Tokenizer",
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            unk_token="<|endoftext|>",
        ),
        dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", add_bos_token=False),
        dict(tokenizer_class="LlamaTokenizerFast", bos_token="<|im_start|>", eos_token="<|im_end|>"),
        dict(
            eos_token={"content": "<|im_end|>", "lstrip": False, "__type": "AddedToken"},
            extra_special_tokens=["<|extra|>"],
        ),
    ],
    ids=lambda config: (
        config.get("tokenizer_class", "none") + ("+bos" if config.get("add_bos_token") else "")
    ),
)
@pytest.mark.parametrize("kind", ["gpt2", "llama-bpe", "qwen2"])
def test_a_byte_level_directory_has_the_ids_of_transformers(tmp_path, kind, config):
    path = directory(tmp_path, trained(kind), **config)
    equal(Tokenizer.from_directory(path), auto(path), [*UGLY, "a <|extra|> b"])


@pytest.mark.parametrize(
    "config",
    [
        dict(
            tokenizer_class="LlamaTokenizer",
            add_bos_token=True,
            add_eos_token=False,
            bos_token="<s>",
            eos_token="</s>",
        ),
        dict(
            tokenizer_class="LlamaTokenizerFast",
            legacy=True,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        ),
        dict(
            tokenizer_class="LlamaTokenizer",
            add_prefix_space=False,
            bos_token="<s>",
            eos_token="</s>",
            add_bos_token=True,
        ),
        dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>"),
    ],
    ids=["llama", "legacy", "no-space", "by-the-letter"],
)
def test_a_sentencepiece_directory_has_the_ids_of_transformers(tmp_path, config):
    path = directory(tmp_path, trained("llama"), **config)
    equal(Tokenizer.from_directory(path), auto(path))


def gguf_file(path, tok, model, architecture="llama", types=(), **keys):
    """A GGUF with the vocabulary of `tok` and a minimal model. types: token -> its type, or a new token's."""
    import gguf

    described = json.loads(tok.to_str())
    vocab = sorted(tok.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    tokens, special = [token for token, _ in vocab], {token["content"] for token in described["added_tokens"]}
    types = dict(types)
    tokens += [token for token in types if token not in tokens]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    known = {token: 3 if token in special else 6 if token.startswith("<0x") else 1 for token in tokens}
    writer.add_token_types([types.get(token, known[token]) for token in tokens])
    merges = [" ".join(pair) for pair in described["model"]["merges"]]
    if model == "gpt2" or keys.pop("with_merges", False):
        writer.add_token_merges(merges)
    else:
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
    for key, value in keys.items():
        {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)](
            f"tokenizer.ggml.{key}", value
        )
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {
        "token_embd": (len(tokens), 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.ffn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (8, 8),
        "blk.0.attn_v": (8, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_gate": (16, 8),
        "blk.0.ffn_up": (16, 8),
        "blk.0.ffn_down": (8, 16),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["default", "smollm", "llama-bpe", "smaug-bpe", "dbrx", "qwen2"])
@pytest.mark.parametrize("bos", [False, True])
def test_a_byte_level_gguf_has_the_ids_of_transformers(tmp_path, pre, bos):
    path = gguf_file(
        tmp_path / "model.gguf",
        trained(pre),
        "gpt2",
        pre=pre,
        bos_token_id=1,
        eos_token_id=2,
        add_bos_token=bos,
    )
    ours = open_model(path).tokenizer()
    equal(ours, auto(tmp_path, gguf_file="model.gguf"))
    assert ours.bos_token_id == 1 and ours.eos_token_id == 2


@pytest.mark.parametrize("keys", [{}, {"add_bos_token": False}], ids=["bos", "no-bos"])
def test_a_sentencepiece_gguf_has_the_ids_of_transformers(tmp_path, keys):
    path = gguf_file(
        tmp_path / "model.gguf",
        trained("llama"),
        "llama",
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        **keys,
    )
    equal(open_model(path).tokenizer(), auto(tmp_path, gguf_file="model.gguf"))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize(
    "keys",
    [
        {"add_eos_token": True},
        {"add_eos_token": False},
        {"add_eos_token": True, "add_bos_token": True},
        {"add_eos_token": True, "add_bos_token": False},
    ],
    ids=str,
)
def test_a_gguf_decides_about_its_end_token(tmp_path, kind, keys):
    model, split = ("llama", {}) if kind == "llama" else ("gpt2", {"pre": kind})
    keys = keys | {"bos_token_id": 1, "eos_token_id": 2}
    ours = open_model(gguf_file(tmp_path / "model.gguf", trained(kind), model, **split, **keys)).tokenizer()
    equal(ours, auto(tmp_path, gguf_file="model.gguf"))
    assert (ours.encode("Hello")[-1] == 2) == keys["add_eos_token"]


def test_smollm2_has_the_ids_of_transformers(smollm2, tmp_path):  # noqa: F811
    ours, theirs = open_model(smollm2).tokenizer(), auto(smollm2.parent, gguf_file=smollm2.name)
    equal(ours, theirs)
    ours.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    equal(again, auto(tmp_path))
    equal(ours, auto(tmp_path))
    assert again.fingerprint() == ours.fingerprint()
    assert ours.vocab_size == 49152 and ours.eos_token_id == 2 and ours.encode("a").dtype == np.int32
    assert auto(tmp_path).chat_template == theirs.chat_template

    @given(st.text(max_size=60))
    @settings(max_examples=200)
    def any_text(text):
        if all(not 0xD800 <= ord(letter) < 0xE000 for letter in text):
            equal(ours, theirs, [text])

    any_text()


def test_a_saved_directory_equals_the_one_read(tmp_path):
    (tmp_path / "a").mkdir()
    path = directory(
        tmp_path / "a", trained("qwen2"), tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>"
    )
    Tokenizer.from_directory(path).save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (path / name).read_bytes()


def test_more_tokens_than_rows_are_refused(tmp_path):
    path = directory(tmp_path, trained("gpt2"), eos_token="<|im_end|>")

    class Config:
        vocab_size = 394

    tokenizer = Tokenizer.from_directory(path)
    with pytest.raises(UserError, match="tokenizer has 395 tokens, the embedding 394 rows"):
        tokenizer.check(Config, path)
    Config.vocab_size = 512
    assert tokenizer.check(Config, path) is tokenizer


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"model": 3}', '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'],
)
def test_a_damaged_tokenizer_is_one_line(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer.json") as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


class Rows:
    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "class"])
def test_a_token_without_a_row_is_dropped_if_no_text_needs_it(tmp_path, file):
    """Many models have one, such as Llama 2 with <pad> as token 32,000 of 32,000."""
    tok = trained("llama")
    rows = tok.get_vocab_size()
    config = {"class": dict(tokenizer_class="CodeLlamaTokenizer", unk_token="<unk>")}.get(file, {})
    pad = {"class": "<FILL_ME>"}.get(file, "<pad>")
    path = directory(
        tmp_path, tok, **config, **(dict(pad_token=pad) if file == "tokenizer_config.json" else {})
    )
    if file == "added_tokens.json":
        (path / file).write_text(json.dumps({pad: rows}))
    tokenizer = Tokenizer.from_directory(path)
    assert max(tokenizer.encode(f"the {pad}")) >= rows
    equal(tokenizer, auto(path), [text for text in UGLY if pad not in text])
    assert tokenizer.check(Rows(rows), path).encode(f"the {pad}").max() < rows
    assert "pad_token" not in tokenizer.special and tokenizer.vocab_size <= rows
    equal(tokenizer, auto(path), [text for text in UGLY if pad not in text])
    again = Tokenizer.from_directory(path).check(Rows(rows + 9), path)
    assert max(again.encode(f"the {pad}")) >= rows  # a padded embedding has a row for the token


@pytest.mark.parametrize("config", [dict(eos_token="<end>"), dict(extra_special_tokens=["<user>"])])
def test_a_token_without_a_row_is_refused_if_texts_need_it(tmp_path, config):
    path = directory(tmp_path, trained("gpt2"), **config)
    tokenizer = Tokenizer.from_directory(path)
    with pytest.raises(UserError, match="the tokenizer has 396 tokens, the embedding 395 rows"):
        tokenizer.check(Rows(395), path)


def test_qwen2_has_the_split_of_transformers():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert QWEN2 == PRETOKENIZE_REGEX
