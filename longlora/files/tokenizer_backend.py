"""The calls of the `tokenizers` library by which transformers 5 makes a tokenizer of what its files say."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, Literal

from longlora.errors import UserError
from longlora.files.tokenizer_class import TEKKEN, Class, Described
from longlora.files.tokenizer_files import NAMED, NamedTokens, TokenizerFiles


@contextlib.contextmanager
def guarded(where: str) -> Iterator[None]:
    """Turn any failure of the library into a UserError that names `where`, its panics too."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: not a tokenizer: {error}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{where}: the tokenizers library fails on it: {error}") from None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Send what is written to stderr to nowhere: a panic of the library prints lines before it is raised."""
    try:
        sys.stderr.flush()
        saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError, AttributeError):  # there is no stderr, or it cannot be written
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def probe(backend: Any) -> None:
    """Encode and decode a little, so that a tokenizer on which the library panics fails when it is opened."""
    backend.no_truncation()
    backend.no_padding()
    for text in ("", "a", " The", "\u00e9 \u65e5\n"):
        with contextlib.suppress(Exception):  # other texts may be encoded
            backend.decode(backend.encode(text).ids)


def build(described: Described | bytes, where: str) -> Any:
    """Make a tokenizers.Tokenizer of a tokenizer.json or its dict. UserError if it is none."""
    import tokenizers

    with guarded(where):
        text = described.decode("utf-8") if isinstance(described, bytes) else json.dumps(described)
        return tokenizers.Tokenizer.from_str(text)


def add_tokens(backend: Any, chosen: Class, named: NamedTokens) -> tuple[dict[str, str], list[str]]:
    """Add the tokens of all files to `backend`, as TokenizersBackend's constructor does.

    Returns "bos_token" and so on -> the token's text, and the texts of tokens that a model may lack: those
    that no file holds, but the class adds; those that only added_tokens.json has; and the one for padding.
    """
    from tokenizers import AddedToken

    defaults = {name: text for name, text in chosen.special.items() if name not in named.init}
    special = {name: named.init.get(name, defaults.get(name)) for name in NAMED}
    special = {**special, **chosen.specific, **named.specific}
    special = {name: value for name, value in special.items() if value is not None}
    adding = [added for _, added in sorted(named.decoder.items())]
    held = {added.content for added in backend.get_added_tokens_decoder().values()} | set(map(str, adding))
    for value in [*special.values(), *named.extra]:
        if str(value) not in held:
            adding.append(value)
    names = {str(value) for value in special.values()}
    spare = {*defaults.values(), *chosen.specific.values()} - set(named.by_content)
    spare |= named.loose | {str(value) for name, value in special.items() if name == "pad_token"}
    spare -= backend.get_vocab(with_added_tokens=False).keys()
    for i, value in enumerate(adding):
        if isinstance(value, str):
            adding[i] = AddedToken(value, special=True)
        elif str(value) in names:
            value.special = True
    backend.add_tokens(adding)
    if chosen.repeats:
        again = dict.fromkeys(map(str, [*special.values(), *named.extra]))
        backend.add_tokens([AddedToken(text, special=True) for text in again])
    return {name: str(value) for name, value in special.items()}, sorted(spare)


def post_process(backend: Any, chosen: Class, init: dict[str, Any], special: dict[str, str]) -> None:
    """Let `backend` put the special tokens around a text that the class says, or the config `init`."""
    flags = [init[name] for name in ("add_bos_token", "add_eos_token") if name in init]
    if chosen.add_bos is None and not flags and backend.post_processor is not None:
        return
    bos = init.get("add_bos_token", chosen.add_bos) and special.get("bos_token")
    eos = init.get("add_eos_token") and special.get("eos_token")
    set_template(backend, bos, eos)


def set_template(backend: Any, bos: str | Literal[False] | None, eos: str | Literal[False] | None) -> None:
    """Let `backend` put the tokens `bos` and `eos` around each text. A falsy one is left out."""
    from tokenizers import processors

    first, last = ([f"{token}:0"] if token else [] for token in (bos, eos))
    single = [*first, "$A:0", *last]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, backend.token_to_id(token)) for token in (bos, eos) if token],
    )


def repair(backend: Any, files: TokenizerFiles) -> None:
    """Split words by Tekken's expression where fix_mistral_regex asks for it, as transformers does."""
    import tokenizers
    from tokenizers import pre_tokenizers

    version = files.model.get("transformers_version")
    old = not isinstance(version, str) or version.split(".")[0] in ("0", "1", "2", "3", "4")
    asked = files.config.get("fix_mistral_regex") is True
    large = backend.pre_tokenizer is not None and backend.get_vocab_size() > 100_000
    if not (asked and large and old and files.model and files.model.get("model_type") in (None, "mistral")):
        return
    split = pre_tokenizers.Split(pattern=tokenizers.Regex(TEKKEN), behavior="isolated")
    last = backend.pre_tokenizer
    if isinstance(last, pre_tokenizers.Sequence):
        backend.pre_tokenizer[0] = split
        return
    if isinstance(last, pre_tokenizers.Metaspace):
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, last])
