"""A SentencePiece model (tokenizer.model) as a tokenizer.json, as transformers 5 converts it.

The `sentencepiece` library reads the file. It is an extra: most models ship tokenizer.json as well.
"""

import base64
import re
from typing import Any

from longlora.errors import UserError
from longlora.files.tokenizer_class import Class, Described, TokenizerFiles, as_class
from longlora.files.tokenizer_files import SENTENCEPIECE, NamedTokens

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
UNIGRAM, BPE = 1, 2
SPACE = "▁"


class Missing(UserError):
    """The library that reads a SentencePiece model is not installed."""


def read(content: bytes, where: str) -> Any:
    """Parse a SentencePiece model -> its ModelProto. UserError if it is none, Missing without the library."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as protobuf
    except ImportError:
        raise Missing(
            f"{where}: is read by the library sentencepiece, which is not installed: "
            "pip install 'longlora[sentencepiece]', or save the tokenizer as tokenizer.json"
        ) from None
    model = protobuf.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(content)
    except Exception:  # the class of the error depends on protobuf's implementation
        raise UserError(f"{where}: is not a SentencePiece model") from None
    kind = model.trainer_spec.model_type
    if not model.pieces or kind not in (UNIGRAM, BPE):
        raise UserError(f"{where}: is not a SentencePiece model of kind Unigram or BPE")
    return model


def described(files: TokenizerFiles, chosen: Class, named: NamedTokens) -> Described:
    """Convert the directory's tokenizer.model to a tokenizer.json for the class `chosen`.

    What the model says of special tokens is added to `named`. UserError as in `read`.
    """
    model = read(files.bytes[SENTENCEPIECE], files.name(SENTENCEPIECE))
    from tokenizers import AddedToken

    pieces = model.pieces
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    # A class that takes the model as it is leaves its user-defined pieces to the pre-tokenizer.
    special = (CONTROL,) if chosen.build is None else (CONTROL, USER_DEFINED)
    if "extra_special_tokens" not in named.init:
        named.extra = [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in pieces
            if piece.type in special
        ]
    if chosen.build is not None:
        return as_class(files, chosen, {"vocab": vocab, "merges": merges_of(vocab)})
    if model.normalizer_spec.add_dummy_prefix:
        named.decoder = {
            index: AddedToken(**{**token.__getstate__(), "normalized": False})
            for index, token in named.decoder.items()
        }
    _name_special(model.trainer_spec, named)
    return _as_it_is(model, _renamed(vocab, named), bool(files.config.get("legacy", True)))


def merges_of(vocab: dict[str, int], scores: dict[str, float] | None = None) -> list[list[str]]:
    """The merges that a SentencePiece vocabulary implies: the splits of each token into two.

    The best score comes first, or without scores the smallest id.
    """
    found = []
    for token, score in (vocab if scores is None else scores).items():
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        found += [(left, right, score) for left, right in splits if left in vocab and right in vocab]
    found.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=scores is not None)
    return [[left, right] for left, right, _ in found]


def _name_special(spec, named):
    """Name the special tokens of the model where no file does."""
    for name, index, piece, default in (
        ("bos_token", spec.bos_id, spec.bos_piece, "<s>"),
        ("eos_token", spec.eos_id, spec.eos_piece, "</s>"),
        ("unk_token", spec.unk_id, spec.unk_piece, "<unk>"),
    ):
        if index >= 0:
            named.init.setdefault(name, piece or default)


def _renamed(vocab, named):
    """`vocab` with the names that added tokens give to its ids."""
    given = {index: str(token) for index, token in named.decoder.items()}
    kept = {piece for piece, index in vocab.items() if index not in given}
    return {
        given[index] if index in given and given[index] not in kept else piece: index
        for piece, index in vocab.items()
    }


def _as_it_is(model, vocab, legacy):
    """The tokenizer.json that encodes as the model itself says."""
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    fallback = bool(trainer.byte_fallback)
    if trainer.model_type == UNIGRAM:
        scored = [[piece.piece, piece.score] for piece in model.pieces]
        names = dict(enumerate(piece.piece for piece in model.pieces))
        core = {"type": "Unigram", "unk_id": trainer.unk_id, "vocab": scored}
    else:
        names = {index: piece for piece, index in vocab.items()}
        core = {"type": "BPE", "unk_token": trainer.unk_piece, "fuse_unk": True, "vocab": vocab}
        core["merges"] = _ranked(model.pieces, names)
    whole = [names[i] for i, piece in enumerate(model.pieces) if piece.type == USER_DEFINED and i in names]
    if trainer.model_type == BPE:
        core["ignore_merges"] = bool(whole)
    scheme = "always" if legacy else "first"
    first = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    pre = [first] if normalizer.add_dummy_prefix else []
    if whole:
        pattern = "|".join(re.escape(piece) for piece in sorted(whole, key=len, reverse=True))
        by = {"Regex": pattern}
        pre.append({"type": "Split", "pattern": by, "behavior": "Isolated", "invert": False})
    decoders: list[Described] = [_replace({"String": SPACE}, " ")]
    if fallback:
        decoders.append({"type": "ByteFallback"})
    if fallback or normalizer.add_dummy_prefix:
        decoders.append({"type": "Fuse"})
    if normalizer.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(normalizer, legacy)},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre} if pre else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**core, "byte_fallback": fallback},
    }


def _ranked(pieces, names):
    """The merges of a BPE model: best score first. Only normal pieces are merged."""
    normal = {
        names[i]: (-piece.score, i) for i, piece in enumerate(pieces) if piece.type == NORMAL and i in names
    }
    splits = (
        (*rank, token[:at], token[at:]) for token, rank in normal.items() for at in range(1, len(token))
    )
    return [[*split[2:]] for split in sorted(split for split in splits if {*split[2:]} <= normal.keys())]


def _normalizers(spec, legacy):
    """What SentencePiece does to a text before it splits it, in its order."""
    found = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode("ascii")
        found.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        found += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if spec.escape_whitespaces:
        found.append(_replace({"String": " "}, SPACE))
    if spec.add_dummy_prefix and legacy:
        # Metaspace puts no space before a text that begins with one. SentencePiece does.
        found.append(_replace({"Regex": rf"\A{SPACE}"}, SPACE * 2))
    return found


def _replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}
