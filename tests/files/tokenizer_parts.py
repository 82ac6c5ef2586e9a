"""Parts of tokenizer.json that several tests use."""

import json

import tiny

BYTE_LEVEL = json.loads(tiny.tokenizer_json())["pre_tokenizer"]
METASPACE = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)
# A post-processor that adds no tokens.
TRIMMING = {**BYTE_LEVEL, "add_prefix_space": True, "trim_offsets": False}


def around(*tokens):
    """A post-processor that puts tokens around a text. tokens: pairs of text and id, None for the text."""
    steps = [
        {"SpecialToken": {"id": x[0], "type_id": 0}} if x else {"Sequence": {"id": "A", "type_id": 0}}
        for x in tokens
    ]
    ids = {x[0]: {"id": x[0], "ids": [x[1]], "tokens": [x[0]]} for x in tokens if x}
    return {"type": "TemplateProcessing", "single": steps, "pair": steps, "special_tokens": ids}
