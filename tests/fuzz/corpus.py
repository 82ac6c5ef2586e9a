"""Right files of models, adapters and tokenizers, and damage to them."""

import copy
import json
import struct

import gguf
import numpy as np
import tiny

from longlora.decoder.lora import LoraConfig
from longlora.files import adapter
from longlora.files.gguf import ARCHITECTURES, REFUSED, REQUIRED
from longlora.files.gguf_header import ARRAY, SCALARS, STRING, _Header
from longlora.files.open_model import open_model

END = dict(content="<|end|>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
PAIR = [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]


def gguf_model(path, model):
    """Write a GGUF of two layers, with a byte-level or a SentencePiece vocabulary."""
    writer = gguf.GGUFWriter(path, "llama" if model == "llama" else "granite")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model(model)
    tokens = [*json.loads(tiny.tokenizer_json())["model"]["vocab"], "ab", "abc"]
    if model == "llama":
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    if model == "gpt2":
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    for name, shape in {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        **{f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")},
        **{f"blk.0.{name}": (16, 32) for name in ("attn_k", "attn_v")},
    }.items():
        array = np.ones(shape, np.float32)
        if name == "blk.0.ffn_up":
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizers():
    """Some tokenizer.json, as dicts."""
    plain = json.loads(tiny.tokenizer_json())
    bytes_ = {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **bytes_, "▁": 259}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    pieces = {
        **plain,
        "added_tokens": [{**END, "id": 1, "content": "<s>"}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocab, "merges": []},
    }
    special = {"<|end|>": {"id": "<|end|>", "ids": [256], "tokens": ["<|end|>"]}}
    template = {"type": "TemplateProcessing", "single": PAIR, "pair": PAIR, "special_tokens": special}
    by = {"type": "Split", "pattern": {"Regex": r"\p{N}|\s+"}, "behavior": "Isolated", "invert": False}
    level = {**plain["pre_tokenizer"], "use_regex": False}
    split = {
        **plain,
        "post_processor": template,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [by, level]},
    }
    words = {
        "type": "WordPiece",
        "unk_token": "a",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 9,
    }
    word_piece = {
        **plain,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {**words, "vocab": {"a": 0, "##b": 1, "c": 2}},
    }
    unigram = {
        **pieces,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.5], ["▁a", -3.0]],
        },
    }
    return [plain, pieces, split, word_piece, unigram]


class Corpus:
    """Right files below `root`, from which the damaged ones are made."""

    def __init__(self, root):
        self.root = root
        self.base = tiny.model(root / "base", tie_word_embeddings=False)
        base = open_model(self.base)
        lora = LoraConfig(r=2)
        rng = np.random.default_rng(0)
        tensors = {
            name: rng.standard_normal(shape).astype(np.float32)
            for name, shape in lora.tensor_shapes(base.config).items()
        }
        adapter.save(root / "adapter", tensors, lora, base, base.config.raw, base.tokenizer())
        gguf_model(root / "gpt2.gguf", "gpt2")
        gguf_model(root / "llama.gguf", "llama")
        self.ggufs = [(root / f"{name}.gguf").read_bytes() for name in ("gpt2", "llama")]
        self.tensors = (self.base / "model.safetensors").read_bytes()
        self.lora = (root / "adapter" / adapter.WEIGHTS).read_bytes()
        self.configs = [json.loads((self.base / "config.json").read_text()), *configs()]
        self.adapters = [json.loads((root / "adapter" / adapter.CONFIG).read_text()), *ADAPTERS]
        self.tokenizers = tokenizers()
        with open(self.base / "model.safetensors", "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            names = [name for name in json.loads(file.read(length)) if name != "__metadata__"]
        self.index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "part.safetensors")}


def configs():
    """A config.json of each family and kind of rope."""
    plain = {**tiny.CONFIG, "bos_token_id": 1, "torch_dtype": "float32", "sliding_window": None}
    for family in ("mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3"):
        yield {
            **plain,
            "model_type": family,
            "layer_types": ["full_attention"] * 2,
            "use_sliding_window": False,
        }
    yield {
        **plain,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "original_max_position_embeddings": 16,
    }
    yield {
        **plain,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "rope_theta": 1e4},
    }
    llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    yield {**plain, "rope_scaling": {**llama3, "original_max_position_embeddings": 32}}
    yield {
        **plain,
        "original_rope_theta": 100.0,
        "original_max_position_embeddings": 16,
        "no_rope_layers": [1, 0],
    }


ADAPTERS = (
    {
        "peft_type": "LORA",
        "target_modules": "all-linear",
        "modules_to_save": None,
        "init_lora_weights": "gaussian",
    },
    {
        "peft_type": "LORA",
        "target_modules": ["q_proj"],
        "r": 2,
        "rank_pattern": {},
        "layers_to_transform": None,
    },
)
TOKENIZER_CONFIGS = (
    {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64},
    {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": True, "unk_token": None},
    {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {"256": END},
        "split_special_tokens": False,
    },
    {"bos_token": {"__type": "AddedToken", **END}, "extra_special_tokens": ["<x>"], "image_token": "<|end|>"},
    {
        "additional_special_tokens": ["<y>"],
        "auto_map": {"AutoTokenizer": ["a.B", None]},
        "tokenizer_class": "B",
    },
    {"extra_special_tokens": {"a": "<a>"}, "chat_template": "{{ x }}", "fix_mistral_regex": True},
)
SPECIAL_MAPS = ({"eos_token": {**END}, "pad_token": "<|end|>"}, {"extra_special_tokens": ["<x>", {**END}]})
ADDED = ({"<|end|>": 256, "<x>": 300},)


# ---- damage --------------------------------------------------------------------------------------

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    256,
    65535,
    1 << 31,
    (1 << 32) - 1,
    1 << 62,
    (1 << 63) - 1,
    1 << 64,
    -(1 << 63),
)
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-320, 1e300, float("inf"), -float("inf"), float("nan"))
TEXTS = (
    "",
    "a",
    "\0",
    "\n",
    "\x1b[31m",
    "\ud800",
    "\u202e",
    "a" * 5000,
    "..",
    "/",
    "../x",
    "<|end|>",
    "▁",
    "é",
    "🙂",
)
WORDS = (
    "none",
    "default",
    "linear",
    "yarn",
    "float32",
    "LORA",
    "full_attention",
    "BPE",
    "Unigram",
    "ByteLevel",
)


def value(rng, depth=0):
    """Any JSON value."""
    choice = rng.randrange(10)
    if choice < 7 or depth > 2:
        pool = (NUMBERS, FLOATS, TEXTS, WORDS, (None, True, False), (None, [], {}), (10**30, 10**400))[
            rng.randrange(7)
        ]
        return copy.copy(rng.choice(pool))
    if choice < 9:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS + WORDS): value(rng, depth + 1) for _ in range(rng.randrange(3))}


def nodes(root):
    """Every place in a JSON value, as (container, key)."""
    found, waiting = [], [root]
    while waiting and len(found) < 400:
        at = waiting.pop()
        for key in list(at) if isinstance(at, dict) else range(len(at)):
            found.append((at, key))
            if isinstance(at[key], (dict, list)):
                waiting.append(at[key])
    return found


def damaged(rng, described, others):
    """A copy of a JSON object with one to four changes; `others` are objects of the same kind."""
    root = json.loads(json.dumps(described))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = nodes(root)
        if not places:
            return root
        at, key = rng.choice(places)
        other, name = rng.choice(nodes(rng.choice(others)) or places)
        choice = rng.randrange(6)
        if choice == 0 and isinstance(at, dict):
            del at[key]
        elif choice == 1 and isinstance(at, dict):
            at[rng.choice(TEXTS + WORDS + (name,))] = value(rng)
        elif choice == 2:
            at[key] = copy.deepcopy(other[name])
        elif choice == 3 and isinstance(at, dict):
            at[name if isinstance(other, dict) else key] = copy.deepcopy(other[name])
        elif choice == 4 and isinstance(at, list):
            at.insert(key, value(rng))
        else:
            at[key] = value(rng)
    return root


def written(rng, found):
    """The bytes of a JSON file, sometimes damaged as text."""
    text = json.dumps(found).encode()
    return noise(rng, text) if rng.random() < 0.1 else text


def noise(rng, data):
    """A copy of `data` with bytes changed, lost, doubled or inserted."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 100))
        choice = rng.randrange(6)
        if choice == 0:
            data[at : at + size] = rng.randbytes(size)
        elif choice == 1:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) & ((1 << 8 * width) - 1)
            data[at : at + width] = number.to_bytes(width, "little")
        elif choice == 2:
            del data[at : at + size]
        elif choice == 3:
            data[at:at] = data[at : at + size]
        elif choice == 4:
            del data[at:]
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def tensors(rng, whole):
    """A damaged safetensors file: its header as JSON, or its bytes."""
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = whole[8 : 8 + length], whole[8 + length :]
    if rng.random() < 0.5:
        front = noise(rng, whole[: 8 + length])
        return front + data if rng.random() < 0.9 else noise(rng, whole)
    described = json.loads(header)
    text = written(rng, damaged(rng, described, [described]))
    return struct.pack("<Q", len(text)) + text + data


class GgufParts:
    """A GGUF in parts: `entries`, its metadata as (key, type, packed value), and what follows them."""

    def __init__(self, whole):
        header = _Header(whole)
        header.at = 8
        self.tensors, pairs = header.scalar("Q"), header.scalar("Q")
        self.entries = []
        for _ in range(pairs):
            key, kind, start = header.string(), header.scalar("I"), header.at
            header.value(kind)
            self.entries.append((key, kind, whole[start : header.at]))
        start = header.at
        for _ in range(self.tensors):
            header.string()
            header.take(header.scalar("I") * 8 + 12)
        self.infos, self.data = whole[start : header.at], whole[-(-header.at // 32) * 32 :]

    def whole(self, entries):
        """The file with these entries."""
        head = b"GGUF" + struct.pack("<IQQ", 3, self.tensors, len(entries))
        for key, kind, packed in entries:
            head += struct.pack("<Q", len(key.encode())) + key.encode() + struct.pack("<I", kind) + packed
        head += self.infos
        return head + bytes(-len(head) % 32) + self.data


def packed(rng, kind=None):
    """Any value of the metadata of a GGUF -> its type and its bytes."""
    kind = rng.choice((*SCALARS, STRING, STRING, ARRAY, ARRAY)) if kind is None else kind
    if kind == STRING:
        text = rng.choice(TEXTS + WORDS + ("llama", "gpt2", "qwen2", "phi3")).encode("utf-8", "replace")
        return kind, struct.pack("<Q", len(text)) + text
    if kind == ARRAY:
        inner, count = rng.choice((*SCALARS, STRING)), rng.choice((0, 1, 2, 16))
        values = b"".join(packed(rng, inner)[1] for _ in range(count))
        return kind, struct.pack("<IQ", inner, count) + values
    code = SCALARS[kind]
    if code in "fd":
        number = rng.choice(FLOATS)
        return kind, struct.pack("<" + code, number if code == "d" or abs(number) < 1e38 else 1.0)
    if code == "?":
        return kind, rng.choice((b"\0", b"\1"))
    size = struct.calcsize(code)
    return kind, (rng.choice(NUMBERS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


TOKENIZER_KEYS = """model pre tokens token_type scores merges bos_token_id eos_token_id unknown_token_id
padding_token_id add_bos_token add_eos_token add_space_prefix""".split()
ROPE_KEYS = (
    "dimension_count freq_base scale_linear scaling.type scaling.factor scaling.original_context_length"
)
KEYS = (
    *(f"tokenizer.ggml.{key}" for key in TOKENIZER_KEYS),
    *(f"llama.{key}" for key in (*REFUSED, *REQUIRED.values(), "attention.key_length", "vocab_size")),
    *(f"llama.rope.{key}" for key in ROPE_KEYS.split()),
    *("general.architecture", "general.alignment", "split.no", "split.count", "tokenizer.chat_template"),
)


def header_noise(rng, whole):
    """A damaged GGUF: values of its metadata, or bytes, mostly of its header."""
    if rng.random() < 0.5:
        parts = GgufParts(whole)
        entries = parts.entries
        for _ in range(rng.choice((1, 1, 2, 3))):
            at, choice = rng.randrange(len(entries)), rng.randrange(5)
            if choice == 0:
                entries.insert(at, (rng.choice(KEYS), *packed(rng)))
            elif choice == 1 and len(entries) > 1:
                del entries[at]
            elif choice == 2:
                entries[at] = (entries[at][0], *rng.choice(entries)[1:])
            elif choice == 3 and entries[at][0] == "general.architecture":
                name = rng.choice(list(ARCHITECTURES)).encode()
                entries[at] = (entries[at][0], STRING, struct.pack("<Q", len(name)) + name)
            else:
                entries[at] = (entries[at][0], *packed(rng))
        return parts.whole(entries)
    if rng.random() < 0.1:
        return noise(rng, whole)
    size = 9000 if rng.random() < 0.5 else 700
    return noise(rng, whole[:size]) + whole[size:]
