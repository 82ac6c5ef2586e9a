"""What a run starts from: the weights and tokenizer, what the options mean for them, and the sequences."""

import json
import os

import pytest
import tiny
from runs import adapter_of

import longlora
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.files.open_model import open_model
from longlora.training import inputs, options

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_threads_are_set_if_the_options_say_how_many(monkeypatch):
    calls = []
    monkeypatch.setattr(longlora, "set_num_threads", calls.append)
    for count in (None, 3):
        inputs.use_threads(options.TrainOptions(num_threads=count))
    assert calls == [3]


# ---- weights and tokenizer -----------------------------------------------------------------------


def test_a_base_model_gives_the_tokenizer_and_the_dtypes(tmp_path):
    o = options.from_dict(tiny.options(tmp_path))
    source, base = inputs.Source(o), open_model(tmp_path / "base")
    assert source.config == base.config and source.fingerprint == base.fingerprint()
    assert source.tokenizer.vocab_size == 257
    assert source.dtype == dict.fromkeys(base.names(), "float32") and "model.norm.weight" in source.dtype
    assert source.adapter is None and source.adapter_fingerprint is None
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert inputs.Source(o).tokenizer is None


def test_the_fingerprint_of_an_adapter_depends_on_its_positions(tmp_path):
    base = tiny.model(tmp_path / "base")
    found = []
    for name, target in (("a", None), ("b", None), ("c", 256), ("d", 512)):
        path = adapter_of(tmp_path / name, base, target)
        source = inputs.Source(options.from_dict(tiny.options(tmp_path, adapter=str(path))))
        found.append(source.adapter_fingerprint)
        assert source.adapter["model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (8, 32)
    assert found[0] == found[1] and len(set(found)) == 3


@pytest.mark.parametrize(
    "fields, dtype",
    [
        (dict(), "float32"),
        (dict(dtype="bfloat16"), "bfloat16"),
        (dict(torch_dtype="float16"), "float16"),  # transformers before 5
        (dict(dtype="bfloat16", torch_dtype="float16"), "bfloat16"),
    ],
)
def test_a_new_model_is_stored_in_the_dtype_of_its_config(tmp_path, fields, dtype):
    tiny.config(tmp_path / "new", **fields)
    o = options.from_dict(dict(init=str(tmp_path / "new"), full=True, seed=7), planning=True)
    source = inputs.Source(o)
    assert (source.base, source.fingerprint, source.dtype) == (None, "random 7", dtype)


def refused(words, init):
    with pytest.raises(UserError) as caught:
        inputs.Source(options.from_dict(dict(init=init, full=True), planning=True))
    assert str(caught.value) == words


def test_the_tokenizer_of_a_new_model_lies_beside_its_config(tmp_path, monkeypatch):
    path = tiny.config(tmp_path / "new")
    monkeypatch.chdir(path)
    for init in (".", "config.json", str(path), str(path / "config.json")):
        source = inputs.Source(options.from_dict(dict(init=init, full=True), planning=True))
        assert source.tokenizer.vocab_size == 257 and source.config.vocab_size == 260
    tiny.config(path, vocab_size=200)
    monkeypatch.chdir(tmp_path)
    for init in (path, path / "config.json"):
        refused(f"{path}: the tokenizer has 257 tokens, the embedding 200 rows", init)
    monkeypatch.chdir(path)
    refused(".: the tokenizer has 257 tokens, the embedding 200 rows", "config.json")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    assert inputs.Source(options.from_dict(dict(init=str(path), full=True), planning=True)).tokenizer is None


def test_the_chat_template_is_saved_with_the_tokenizer(tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    o = options.from_dict(tiny.options(tmp_path, chat_template=str(tmp_path / "t.jinja")))
    source = inputs.Source(o)
    assert source.template(o).source == TEMPLATE
    assert source.tokenizer.file("chat_template.jinja") == TEMPLATE.encode()
    source.tokenizer = None
    assert source.template(o).source == TEMPLATE


# ---- what the options mean -----------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch):
    """Replaces plan.plan. Returns its calls: config, keywords."""
    calls = []
    monkeypatch.setattr(inputs.plan, "plan", lambda config, **how: calls.append((config, how)) or "a plan")
    return calls


def setup(*given, **fields):
    """The Setup for a base of 64 tokens. given: further arguments of Setup."""
    o = options.from_dict(dict(model="m", **fields), planning=True)
    return inputs.Setup(o, read_config(dict(tiny.CONFIG)), *given)


def test_the_plan_gets_the_options(planned):
    fields = dict(
        target_length=128,
        dtype="bfloat16",
        per_device_train_batch_size=3,
        sequence_length=96,
        group_size=32,
        packing_boundaries="document",
        checkpointing="full",
        max_memory=1.5,
        r=4,
        lora_alpha=8,
        target_modules=["all-linear"],
        modules_to_save=["norm"],
    )
    found = setup("cuda:0", **fields)
    ((config, how),) = planned
    assert found.plan == "a plan" and config == found.config
    assert found.raw["max_position_embeddings"] == config.max_position_embeddings == 128
    assert how == dict(
        dtype="bfloat16",
        batch_size=3,
        sequence_length=96,
        group_size=32,
        lora=LoraConfig(4, 8.0, "all-linear", ("norm",)),
        packed=True,
        checkpointing="full",
        memory=3 << 29,
        device="cuda:0",
    )


def test_the_defaults_keep_the_positions_of_the_base(planned):
    found = setup()
    assert found.rope == "rope: default, as the base: 64 positions"
    assert found.config.max_position_embeddings == 64 and found.raw == tiny.CONFIG
    assert found.lora == LoraConfig()  # the defaults of the paper
    ((_, how),) = planned
    assert (how["device"], how["memory"], how["packed"], how["sequence_length"]) == ("cpu", None, False, 64)
    assert setup(full=True).lora is None and planned[1][1]["lora"] is None
    assert setup(target_modules=["q_proj"]).lora.target_modules == ("q_proj",)
    setup("cpu", True)  # questions and answers
    assert planned[-1][1]["packed"] is True


@pytest.mark.parametrize(
    "fields, attention, multiple",
    [
        (dict(), dict(group_size=16, boundary="split", shift="half"), 1),
        (
            dict(boundary="wrap", group_size=32, shift="all"),
            dict(group_size=32, boundary="wrap", shift="all"),
            32,
        ),
        (dict(boundary="swap"), dict(group_size=16, boundary="swap", shift="half"), 16),
        (dict(attention="dense"), None, 1),
        (dict(attention="dense", boundary="wrap"), None, 1),
    ],
)
def test_the_options_of_s2_attention(planned, fields, attention, multiple):
    found = setup(**fields)
    assert (found.attention, found.multiple) == (attention, multiple)


def test_an_adapter_decides_lora_and_positions(tmp_path, planned):
    """Also what no option sets, such as rsLoRA."""
    base = tiny.model(tmp_path / "base")
    for target, words in ((256, "yarn, as the adapter: 256"), (None, "default, as the base: 64")):
        fields = dict(r=4, lora_alpha=6.0, target_modules=("q_proj",), modules_to_save=(), use_rslora=True)
        path = adapter_of(tmp_path / f"adapter{target}", base, target, **fields)
        o = options.from_dict(dict(model=str(base), adapter=str(path)), planning=True)
        found = inputs.Setup(o, open_model(base).config)
        assert found.lora == LoraConfig(**fields) and planned[-1][1]["lora"] == LoraConfig(**fields)
        assert found.rope == f"rope: {words} positions"
        length = found.config.max_position_embeddings
        assert found.raw["max_position_embeddings"] == length == o.sequence_length == (target or 64)


# ---- sequences -----------------------------------------------------------------------------------


def corpus(tmp_path):
    """Write a file of each kind. Returns kind -> path."""
    records = dict(
        words=dict(text="shift group " * 9),
        plain=dict(prompt="one two", completion=" three"),
        talk=dict(instruction="What is it?", output="A group."),
    )
    for name, record in records.items():
        (tmp_path / f"{name}.jsonl").write_text(3 * (json.dumps(record) + "\n"))
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "other.jinja").write_text(" " + TEMPLATE)
    (tmp_path / "again.jinja").write_text(TEMPLATE)
    tiny.text(tmp_path / "text.txt", 100)
    found = {name: str(tmp_path / f"{name}.jsonl") for name in records}
    return {**found, "text": str(tmp_path / "text.txt"), "none": None}


def read(tmp_path, said=None, data="text", **fields):
    """Call read_data with files of corpus() as data and eval_data."""
    files = corpus(tmp_path)
    fields = {key: str(tmp_path / x) if key == "chat_template" else x for key, x in fields.items()}
    fields |= dict(data=files[data], eval_data=files[fields.pop("eval_data", "none")])
    o = options.from_dict(tiny.options(tmp_path, **fields))
    source = inputs.Source(o)
    made = inputs.Setup(o, source.config, instructs=inputs.instructs(o))
    return inputs.read_data(o, source, made, (said if said is not None else []).append)


def test_the_heap_is_trimmed_after_the_text_was_tokenised(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(inputs.job, "trim_heap", lambda: said.append("trimmed"))
    read(tmp_path, said)
    assert said[0].startswith("tokenised") and said[-1] == "trimmed" and said.count("trimmed") == 1


def test_only_records_with_answers_are_instructions(tmp_path):
    files = corpus(tmp_path)
    found = {name: inputs.instructs(options.TrainOptions(data=path)) for name, path in files.items() if path}
    assert found == dict(words=False, text=False, plain=True, talk=True)


BUILT_IN = "rendered by the built-in chat template; loss and perplexity are over"


@pytest.mark.parametrize(
    "fields, wanted",
    [
        (dict(data="text"), {}),
        (dict(data="words"), dict(words="text; loss and perplexity are over everything")),
        (dict(data="plain"), dict(plain="prompt and completion; loss and perplexity are over the answers")),
        (
            dict(data="plain", train_on_inputs=True),
            dict(plain="prompt and completion; loss and perplexity are over everything"),
        ),
        (dict(data="talk"), dict(talk=f"Alpaca, {BUILT_IN} the answers")),
        (
            dict(data="plain", eval_data="talk", chat_template="t.jinja"),
            dict(
                plain="prompt and completion; loss and perplexity are over the answers",
                talk="Alpaca, rendered by DIR/t.jinja; loss and perplexity are over the answers",
            ),
        ),
        (
            dict(data="text", eval_data="talk", train_on_inputs=True),
            dict(
                talk="Alpaca, rendered by the built-in chat template; loss and perplexity are over everything"
            ),
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_the_report_names_the_form_of_records(tmp_path, fields, wanted):
    said = []
    read(tmp_path, said, **fields)
    records = [line for line in said if ": records of " in line]
    assert records == [
        f"{tmp_path / name}.jsonl: records of {words}".replace("DIR", str(tmp_path))
        for name, words in wanted.items()
    ]


def test_the_key_of_what_decides_which_tokens_are_answers(tmp_path):
    """The key contains the template's text, and only if the training data use a template."""

    def rules(**fields):
        return read(tmp_path, **fields)[3]

    assert rules(data="text") is None and rules(data="text", eval_data="talk") is None
    plain = rules(data="plain")
    assert plain == rules(data="plain", eval_data="talk") == rules(data="plain", eval_data="text")
    talk = rules(data="talk", chat_template="t.jinja")
    assert talk == rules(data="talk", chat_template="again.jinja")
    others = [
        rules(data="talk"),
        rules(data="talk", chat_template="other.jinja"),
        rules(data="talk", chat_template="t.jinja", train_on_inputs=True),
        rules(data="plain", train_on_inputs=True),
    ]
    assert len({plain, talk, *others}) == 6


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            dict(data="text", chat_template="t.jinja"),
            "chat_template is for conversations; DIR/text.txt holds",
        ),
        (dict(data="plain", chat_template="t.jinja"), "is for conversations; DIR/plain.jsonl holds none"),
        (dict(data="text", train_on_inputs=True), "is for questions and answers; DIR/text.txt is text"),
        (dict(data="words", train_on_inputs=True), "is for questions and answers; DIR/words.jsonl is text"),
    ],
)
def test_options_without_effect_on_the_data_are_refused(tmp_path, fields, words):
    with pytest.raises(UserError) as caught:
        read(tmp_path, **fields)
    assert words.replace("DIR", str(tmp_path)) in str(caught.value)


def test_only_conversations_read_the_template_of_the_base(tmp_path):
    tiny.model(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{% if %}")
    assert len(read(tmp_path, data="plain")[0]) == 1
    with pytest.raises(UserError, match="chat_template.jinja: the chat template is not valid"):
        read(tmp_path, data="talk")


ANSWERS, WHOLE = ("refuse", "document"), ("split", "none")


@pytest.mark.parametrize(
    "fields, learned, held",
    [
        (dict(data="text", eval_data="words"), WHOLE, WHOLE),
        (dict(data="text", eval_data="talk"), WHOLE, ANSWERS),
        (dict(data="talk", eval_data="text"), ANSWERS, WHOLE),
        (dict(data="talk", eval_data="plain"), ANSWERS, ANSWERS),
        (
            dict(data="text", eval_data="talk", long_documents="truncate"),
            ("truncate", "none"),
            ("truncate", "document"),
        ),
        (
            dict(data="talk", eval_data="text", packing_boundaries="none"),
            ("refuse", "none"),
            ("split", "none"),
        ),
        (
            dict(data="talk", eval_data="talk", packing_boundaries="none", long_documents="truncate"),
            ("truncate", "none"),
            ("truncate", "none"),
        ),
    ],
    ids=lambda value: "-".join(value),
)
def test_held_out_data_have_the_defaults_of_their_own_form(tmp_path, monkeypatch, fields, learned, held):
    made, real = {}, inputs.Sequences

    def sequences(tokens, length, long, where, boundaries):
        made[os.path.basename(where).partition(".")[0], len(made)] = (long, boundaries)
        return real(tokens, length, long, where, boundaries)

    monkeypatch.setattr(inputs, "Sequences", sequences)
    read(tmp_path, **fields)
    assert made == {(fields["data"], 0): learned, (fields["eval_data"], 1): held}


def test_options_need_not_be_made_by_from_dict(tmp_path):
    """Only from_dict records which options the user has set."""
    corpus(tmp_path)
    o = options.TrainOptions(**tiny.options(tmp_path), packing_boundaries="document").check()
    source = inputs.Source(o)
    assert inputs.read_data(o, source, inputs.Setup(o, source.config), print)[0].apart


def test_sequences_are_held_out_by_a_share_or_a_file(tmp_path):
    whole, held, name, _ = read(tmp_path)
    assert held is None and len(whole) > 3 and name == f"{whole.tokens.fingerprint} {len(whole)}"
    rest, held, less, _ = read(tmp_path, eval_fraction=0.5)
    assert len(rest) + len(held) == len(whole) and less == f"{whole.tokens.fingerprint} {len(rest)}"
    rest, held, same, _ = read(tmp_path, eval_data="words")
    assert len(rest) == len(whole) and same == name and held.tokens.fingerprint != whole.tokens.fingerprint


@pytest.mark.parametrize("given, place", [("elsewhere", "elsewhere"), (None, "out/cache")])
def test_tokens_are_cached_where_the_options_say(tmp_path, given, place):
    place = tmp_path / place
    read(tmp_path, cache_dir=str(tmp_path / given) if given else None)
    assert sorted(path.suffix for path in place.glob("tokens-*")) == [".bin", ".json"]
