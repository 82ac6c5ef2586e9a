"""An adapter and a merged model get the files of the model's tokenizer and of generation."""

import json

import pytest
from test_adapter import TARGET, extended, made, saved
from test_tokenizer import directory, trained
from test_weights import build

from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.files import adapter, merge
from longlora.files.open_model import open_model

TEMPLATES = {"chat_template.jinja": "main\r\n", "additional_chat_templates/tool_use.jinja": "tools"}


def test_every_file_of_tokenizer_and_generation_is_copied(tmp_path):
    """They stay byte for byte, except model_max_length, where transformers cuts a text."""
    from transformers import AutoTokenizer, GenerationConfig

    build(tmp_path / "base", vocab_size=512)
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", model_max_length=64)
    directory(tmp_path / "base", trained("gpt2"), **config)
    build(tmp_path / "base", vocab_size=512)
    files = {
        **TEMPLATES,
        "tokenizer.model": "what llama.cpp's converter reads",
        "special_tokens_map.json": '{"eos_token":"<|im_end|>"}',
        "added_tokens.json": "{ }",
        "vocab.json": "{}",
        "merges.txt": "#version: 0.2\n",
        "generation_config.json": '{"eos_token_id": [2, 1],"temperature":0.6, "do_sample": true}\n',
    }
    for name, content in files.items():
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_bytes(content.encode())
    base = open_model(tmp_path / "base")
    raw = extended(base)
    adapter.save(tmp_path / "adapter", made(base, LoraConfig()), LoraConfig(), base, raw, base.tokenizer())
    merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "base")
    for path in (tmp_path / "adapter", tmp_path / "merged"):
        for name, content in files.items():
            if name != "generation_config.json" or path.name == "merged":
                assert (path / name).read_bytes() == content.encode(), name
        again = AutoTokenizer.from_pretrained(path)
        assert again.chat_template == theirs.chat_template == {"default": "main\n", "tool_use": "tools"}
        assert (theirs.model_max_length, again.model_max_length) == (64, TARGET)
        text = "the quick brown fox " * TARGET
        assert len(again(text, truncation=True).input_ids) == TARGET
        assert json.loads((path / "tokenizer_config.json").read_text()) == {
            **config,
            "model_max_length": TARGET,
        }
    found = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (found.eos_token_id, found.temperature, found.do_sample) == ([2, 1], 0.6, True)


@pytest.mark.parametrize("length", [None, True, "64", TARGET, 10**30, TARGET + 0.5])
def test_a_model_max_length_that_is_long_enough_stays(tmp_path, length):
    base = build(tmp_path / "base", vocab_size=512)
    directory(tmp_path / "base", trained("gpt2"), model_max_length=length, eos_token="<|im_end|>")
    base.save_pretrained(tmp_path / "base")
    before = (tmp_path / "base" / "tokenizer_config.json").read_bytes()
    open_model(tmp_path / "base").tokenizer().save(tmp_path / "copy", TARGET)
    assert (tmp_path / "copy" / "tokenizer_config.json").read_bytes() == before


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("generation_config.json", b"{", "generation_config.json: not JSON"),
        ("chat_template.jinja", b"caf\xe9", "chat_template.jinja: is not UTF-8 at byte 3"),
        ("additional_chat_templates/x.jinja", b"\xff", "x.jinja: is not UTF-8 at byte 0"),
        ("special_tokens_map.json", b"[]", "special_tokens_map.json: should hold a JSON object, got list"),
    ],
)
def test_damaged_files_are_found_before_anything_is_written(tmp_path, name, content, message):
    base, path, _ = saved(tmp_path, vocab_size=512)
    directory(base, trained("gpt2"), eos_token="<|im_end|>")
    build(base, vocab_size=512)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        merge.merge(base, path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
