"""The tokenizer classes of transformers 5: which one files ask for, and what it makes of tokenizer.json.

`TokenizersBackend` takes tokenizer.json as it is. The other classes keep its vocabulary, its merges and its
post-processor and build the rest themselves, so a file says one thing and transformers does another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from longlora.errors import UserError
from longlora.files.tokenizer_files import CONFIG, JSON, SENTENCEPIECE, VOCAB, TokenizerFiles

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {**BYTE_LEVEL, "add_prefix_space": True}  # the decoder of bytes
NFC = {"type": "NFC"}
Described = dict[str, Any]  # a tokenizer.json


@dataclass(frozen=True)
class Class:
    """A tokenizer class. build(config) gives what it puts in place of tokenizer.json's parts, or is None."""

    name: str
    build: Callable[[dict[str, Any]], Described] | None = None
    # Special tokens that it has where no file names others, and those with names of its own.
    special: dict[str, str] = field(default_factory=dict)
    specific: dict[str, str] = field(default_factory=dict)
    # add_bos_token where no file says so. None leaves tokenizer.json's post-processor in place.
    add_bos: bool | None = None
    repeats: bool = False  # it adds its special tokens again, with the default flags
    vocabulary: tuple[str, ...] = (SENTENCEPIECE,)  # the files that it reads without a tokenizer.json


def metaspace(prefix_space: bool, legacy: bool, strip: bool | None = None) -> Described:
    """SentencePiece's spaces, as LlamaTokenizer has them. strip: whether to decode without the first one."""
    steps: list[Described] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space if strip is None else strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    scheme = "never" if not prefix_space else "always" if legacy else "first"
    pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return {
        "normalizer": None,
        "pre_tokenizer": pre,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {"fuse_unk": True, "byte_fallback": True},
    }


def split(pattern: str, prefix_space: bool = False) -> Described:
    """A pre-tokenizer that splits by a regular expression and spells the parts in bytes."""
    by = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "type": "Sequence",
        "pretokenizers": [by, {**BYTE_LEVEL, "add_prefix_space": prefix_space, "use_regex": False}],
    }


def byte_level(pre_tokenizer: Described, normalizer: Described | None = None) -> Described:
    """Byte-level BPE."""
    model = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    return {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": BYTES, "model": model}


def _llama(config):
    return metaspace(_flag(config, "add_prefix_space", True), _flag(config, "legacy", False))


def _code_llama(config):
    built = metaspace(_flag(config, "add_prefix_space", True), legacy=False, strip=True)
    built["model"]["unk_token"] = str(config.get("unk_token", "<unk>"))
    return built


def _gpt2(config):
    return byte_level({**BYTE_LEVEL, "add_prefix_space": _flag(config, "add_prefix_space", False)})


def _gpt_neox(config):
    return {**_gpt2(config), "normalizer": NFC}


def _qwen(pattern):
    def build(config):
        return byte_level(split(pattern, _flag(config, "add_prefix_space", False)), NFC)

    return build


def _gemma(config):
    built = metaspace(False, False)
    built["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    built["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    built["model"]["unk_token"] = str(config.get("unk_token", "<unk>"))
    return built


def _flag(config, name, default):
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise UserError(f"{name} should be true or false, got {value!r}")
    return default if value is None else value


_SENTENCES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_GPT2 = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
_QWEN = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_FILES = (SENTENCEPIECE, VOCAB)
BACKEND = Class("TokenizersBackend")
CLASSES = {
    row.name: row
    for row in (
        BACKEND,
        Class("LlamaTokenizer", _llama, _SENTENCES),
        Class(
            "CodeLlamaTokenizer",
            _code_llama,
            _SENTENCES,
            dict(
                prefix_token="▁<PRE>",
                middle_token="▁<MID>",
                suffix_token="▁<SUF>",
                eot_token="▁<EOT>",
                fill_token="<FILL_ME>",
            ),
            add_bos=True,
        ),
        Class("GPT2Tokenizer", _gpt2, _GPT2, vocabulary=_FILES),
        Class(
            "GPTNeoXTokenizer", _gpt_neox, {**_GPT2, "pad_token": "<|padding|>"}, add_bos=False, vocabulary=()
        ),
        Class("Qwen2Tokenizer", _qwen(QWEN2), _QWEN, repeats=True, vocabulary=_FILES),
        Class("Qwen3_5Tokenizer", _qwen(QWEN35), _QWEN, vocabulary=()),
        Class(
            "GemmaTokenizer",
            _gemma,
            dict(
                unk_token="<unk>",
                bos_token="<bos>",
                eos_token="<eos>",
                pad_token="<pad>",
                mask_token="<mask>",
            ),
            vocabulary=(),
        ),
    )
}
# The names without "Tokenizer" of classes that build another tokenizer or compute in Python: refused.
# transformers does not know a class of another name, and takes tokenizer.json as it is.
REFUSED = frozenset(
    """
    Albert Bart Barthez Bartpho Bert BertGeneration BertJapanese Bertweet BigBird BioGpt Blenderbot
    BlenderbotSmall ByT5 CLIP CTRL Camembert Canine Clvp CodeGen Cohere ConvBert Cpm CpmAnt DPRContextEncoder
    DPRQuestionEncoder DPRReader Deberta DebertaV2 Dia DistilBert Esm Esmc FNet FSMT FastSpeech2Conformer
    Flaubert Funnel GPTNeoXJapanese GPTSw3 Herbert LED Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke Lxmert M2M100
    MBart MBart50 MLuke MPNet Marian MarkupLM Mgpstr MobileBert Mvp MyT5 Nllb Nougat OpenAIGPT PLBart Pegasus
    Perceiver Phobert Pop2Piano ProphetNet Rag Reformer RemBert RoCBert RoFormer Roberta SeamlessM4T Siglip
    Siglip2 Speech2Text SpeechT5 Splinter SqueezeBert T5 Tapas Tipsv2 Udop VideoPrism Vits Wav2Vec2CTC
    Wav2Vec2PhonemeCTC Whisper XGLM XLM XLMRoberta XLNet
    """.split()
)
# Names under which transformers takes tokenizer.json as it is.
OTHER_NAMES = ("PreTrainedTokenizer", "PythonBackend", "BloomTokenizer", "ParakeetTokenizer")
# The class of a model family in transformers, where its table has the family.
OF_FAMILY = {
    "mistral": BACKEND.name,
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "phi3": BACKEND.name,
    "granite": BACKEND.name,
}
# Families whose files are known to name a wrong class.
OVERRULED = ("phi3", "qwen2")


def choose(files: TokenizerFiles) -> Class:
    """The class by which AutoTokenizer reads the directory. UserError for one that is not supported."""
    where, family = files.name(CONFIG), files.model.get("model_type")
    in_config, in_model = (_declared(raw, where) for raw in (files.config, files.model))
    declared = in_config or in_model
    own = OF_FAMILY.get(family) if isinstance(family, str) else None
    code = files.config.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if code is None:
        if own == BACKEND.name or family in OVERRULED:
            return _class(own, where)
        if declared == "LlamaTokenizer" and b'"ByteLevel"' in files.bytes.get(JSON, b""):
            return BACKEND
    elif own is None and (in_config is None or not _is_known(in_config)):
        raise UserError(
            f"{where}: auto_map asks for the model authors' Python code, which longlora does not run"
        )
    return _class(in_config or in_model or own or BACKEND.name, where)


def _declared(raw, where):
    name = raw.get("tokenizer_class")
    if not isinstance(name, str | None):
        raise UserError(f"{where}: tokenizer_class should be a name, got {name!r}")
    return name.removesuffix("Fast") if name else None


def _is_known(name):
    return name in CLASSES or name in OTHER_NAMES or name.removesuffix("Tokenizer") in REFUSED


def _class(name, where):
    if name.endswith("Tokenizer") and name.removesuffix("Tokenizer") in REFUSED:
        supported = ", ".join(CLASSES)
        raise UserError(f"{where}: tokenizer_class {name} is not supported; supported are {supported}")
    return CLASSES.get(name, BACKEND)


def as_class(files: TokenizerFiles, chosen: Class, model: Described, post_processor: Any = None) -> Described:
    """The tokenizer.json that `chosen` builds of `model`, the vocabulary and merges in a file's own form."""
    assert chosen.build is not None
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # of Unigram: pairs of a token and its score
        tokens = [entry[0] if isinstance(entry, list) and entry else entry for entry in vocab]
        if not all(isinstance(entry, str) for entry in tokens):
            raise UserError(f"{files.name(JSON)}: vocab should be tokens with their scores")
        vocab = {entry: index for index, entry in enumerate(tokens)}
    try:
        built = chosen.build(files.config)
    except UserError as error:
        raise UserError(f"{files.name(CONFIG)}: {error}") from None
    merges = model.get("merges") or []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": post_processor,
        **built,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, **built["model"]},
    }
