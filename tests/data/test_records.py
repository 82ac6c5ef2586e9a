"""Every container gives the same records, every form the same messages; errors have a place."""

import gzip
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import KINDS, TALK, failure, tokenizer, write
from test_chat_template import SPECIAL

from longlora.data import records
from longlora.data.chat import FORMS, Instructions, form_of, samples
from longlora.data.chat_template import LLAMA_2, ChatTemplate
from longlora.data.tokens import tokenise
from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer

USER, ASSISTANT = TALK[:2]
ROWS = [
    {"instruction": "Say \u00e9", "input": "twice", "output": "\u00e9\u00e9"},
    {"instruction": "b", "output": "c"},
]
TEMPLATE = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt }}",
    SPECIAL,
    "here",
)
PROMPT = "prompt and completion"


def messages(path):
    return [list(sample.messages) for _, sample in samples([path], form_of(path))]


def contain(path, rows):
    """Write the rows to the file `path` as its suffix says -> the path."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    elif path.name == "list.json":
        path.write_text("\ufeff " + json.dumps(rows, indent=1) + "\n")
    else:
        path.write_text(lines)
    return str(path)


# ---- containers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz", "list.json", "lines.json", "a.parquet"])
def test_every_container_gives_the_same_records(tmp_path, name):
    path = contain(tmp_path / name, ROWS)
    assert [record for _, record in records.read(path)] == ROWS
    assert form_of(path).name == "Alpaca"
    text = contain(tmp_path / f"text-{name}", [{"text": "one"}, {"text": "two \u00e9"}])
    assert form_of(text) is None
    made = KINDS["llama3"]
    found = tokenise(text, made, 500, str(tmp_path / "cache"), str)
    for i, words in enumerate(("one", "two \u00e9")):
        np.testing.assert_array_equal(found.document(i)[:-1], made.encode(words))


def test_a_dataset_is_read_by_its_name(tmp_path, monkeypatch):
    """By the datasets library, from a folder: the Hub cannot be reached here."""
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    contain(tmp_path / "train.parquet", ROWS)
    contain(tmp_path / "other.jsonl", [{"instruction": "d", "output": "e"}])
    files = {"train": str(tmp_path / "train.parquet")}

    def from_folder(name, split):
        assert name == "someone/talks"
        if split == "train":
            return load("parquet", data_files=files, split=split, cache_dir=str(tmp_path / "hub"))
        raise ValueError(f"no {split}")

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    assert records.kind("someone/talks") == records.kind("someone/talks:test") == records.HUB
    assert [record for _, record in records.read("someone/talks")] == ROWS
    how = Instructions(form_of("someone/talks"), ChatTemplate(LLAMA_2, SPECIAL, "here"))
    found = tokenise("someone/talks", KINDS["llama3"], 500, str(tmp_path / "cache"), str, how)
    assert len(found) == 2
    assert "someone/talks:test: no such file, and it cannot be loaded as a dataset" in failure(
        form_of, "someone/talks:test"
    )
    (tmp_path / "someone").mkdir()
    monkeypatch.chdir(tmp_path)  # a wrong name in a folder that exists is a wrong path
    assert failure(form_of, "someone/talks") == "someone/talks: no such file or directory"


class Library:
    """A fake of the datasets library. It loads `rows`, and records the arguments of each call in `asked`."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def load_dataset(self, name, split):
        self.asked.append((name, split))
        return self.rows


def test_fields_of_a_dataset_that_are_none_are_left_out(monkeypatch):
    """A table has every field in every row. A None in a list stays, so that places do not change."""
    library = Library([{"a": None, "b": [{"c": None, "d": [None, 1]}], "e": {"f": None}}, {"a": 0, "b": ""}])
    monkeypatch.setitem(sys.modules, "datasets", library)
    wanted = [("row 1", {"b": [{"d": [None, 1]}], "e": {}}), ("row 2", {"a": 0, "b": ""})]
    assert list(records.read("someone/talks")) == wanted
    assert list(records.read("someone/talks:test.v1")) == wanted
    assert library.asked == [("someone/talks", "train"), ("someone/talks", "test.v1")]


@pytest.mark.parametrize(
    "path, kind",
    [
        ("a.txt", ".txt"),
        ("A.TXT", ".txt"),
        ("a.b/c.JsonL", ".jsonl"),
        ("a.jsonl.gz", ".jsonl.gz"),
        ("A.JSONL.GZ", ".jsonl.gz"),
        ("a.txt.gz", ".gz"),
        ("name", ""),
        ("owner/name", "dataset"),
        ("owner/name:some.split-1", "dataset"),
        ("1own.er-/na-me_1.5", "dataset"),
        # a path, because of its suffix
        ("owner/name.txt", ".txt"),
        ("owner/name.bin", ".bin"),
        ("owner/name.json", ".json"),
        ("owner/name.jsonl", ".jsonl"),
        ("owner/name.jsonl.gz", ".jsonl.gz"),
        ("owner/name.Parquet", ".parquet"),
        # not a dataset's name
        ("owner/name/more", ""),
        ("./owner/name", ""),
        ("/owner/name", ""),
        ("-owner/name", ""),
        ("owner/name-", ""),
        ("owner/name:", ""),
        ("own er/name", ""),
        # a path, because its folder exists
        ("folder/name", ""),
        ("folder/name.v1", ".v1"),
        ("folder/there", ""),
    ],
)
def test_the_kind_of_a_path_or_dataset_name(tmp_path, monkeypatch, path, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "there").write_text("")
    assert records.kind(path) == kind


@pytest.mark.parametrize(
    "name, place",
    [("a.jsonl", "line"), ("a.jsonl.gz", "line"), ("list.json", "record"), ("a.parquet", "row")],
)
def test_each_record_comes_with_its_place(tmp_path, name, place):
    """Rows of a .parquet are read 64 at a time."""
    rows = [{"a": i} for i in range(130)]
    path = contain(tmp_path / name, rows)
    assert list(records.read(path)) == [(f"{place} {i + 1}", row) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    "text, found",
    [
        ("", []),
        (" \n", []),
        ("[]", []),
        (" [ ] \n", []),
        ("[1]", [1]),
        ("[[1], {}]", [[1], {}]),
        ('["]", ","]', ["]", ","]),
        ("[1,2 , 3\n,\t4]\n\n", [1, 2, 3, 4]),
        ("\ufeff[1]", [1]),
        ("\ufeff1", [1]),
        ("1", [1]),
        ("1 2\n3", [1, 2, 3]),
        ('{"a": 1}{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("null", [None]),
        ('"[" [1]', ["[", [1]]),
    ],
)
def test_the_values_of_json_are_read_one_by_one(tmp_path, text, found):
    path = tmp_path / "a.json"
    path.write_text(text)
    wanted = [(f"record {i + 1}", value) for i, value in enumerate(found)]
    assert list(records.read(str(path))) == wanted


@pytest.mark.parametrize(
    "name, content, good, words",
    [
        ("a.jsonl", b"1\n\n[2\n", 1, "line 3 is not JSON: Expecting ',' delimiter"),
        (
            "a.jsonl",
            b"1\n{2: 3}\n",
            1,
            "line 2 is not JSON: Expecting property name enclosed in double quotes",
        ),
        ("a.jsonl", b"\xef\xbb\xbf1\n\xef\xbb\xbf2\n", 1, "line 2 is not JSON: "),
        ("a.jsonl", "1\n\u00e9\u00e9".encode() + b"\xff\n", 1, "is not UTF-8 at byte 6"),
        ("a.jsonl", b"1\n22\n\xff\n", 2, "is not UTF-8 at byte 5"),
        ("a.json", b"[1, x]", 1, "record 2 is not JSON: Expecting value"),
        ("a.json", b"[1, , 2]", 1, "record 2 is not JSON: Expecting value"),
        ("a.json", b"[1,]", 1, "record 2 is not JSON: Expecting value"),
        ("a.jsonl", b"1\n" + b"[" * 100_000, 1, "line 2 is not JSON: it is nested too deeply"),
        ("a.json", b"[" * 100_000, 0, "record 1 is not JSON: it is nested too deeply"),
        ("a.json", b"[,1]", 0, "record 1 is not JSON: Expecting value"),
        ("a.json", b"1, 2", 1, "record 2 is not JSON: Expecting value"),
        ("a.json", b"1 ]", 1, "record 2 is not JSON: Expecting value"),
        ("a.json", b"[1 2]", 1, "is not JSON after record 1: wanted a comma or the list's end"),
        ("a.json", b"[1, 2", 2, "is not JSON after record 2: wanted a comma or the list's end"),
        ("a.json", b"[", 0, "record 1 is not JSON: Expecting value"),
        ("a.json", b"[1]]", 1, "is not JSON: there is more after the list"),
        ("a.json", b"[1] ,", 1, "is not JSON: there is more after the list"),
        ("a.json", b"[] []", 0, "is not JSON: there is more after the list"),
        ("a.json", b"1\xff", 0, "is not UTF-8 at byte 1"),
    ],
)
def test_the_records_before_a_fault_are_read_and_the_fault_is_named(tmp_path, name, content, good, words):
    """The messages of Python's json come without their line and column, which count within one record."""
    path = tmp_path / name
    path.write_bytes(content)
    found = records.read(str(path))
    for _ in range(good):
        next(found)
    message = failure(next, found)
    assert message.startswith(f"{path}: {words}") and "column" not in message


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert failure(form_of, str(path)) == f"{path}: reading .parquet needs pip install 'longlora[parquet]'"
    assert failure(form_of, "someone/talks").endswith("of that name: pip install 'longlora[datasets]'")


def zipped(data):
    """gzip without the time, which would be in the names of tests: processes of one run need equal names."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl.gz", b"not gzip", "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", zipped(b'{"text": "a"}\n' * 99)[:-9], "cannot be read: Compressed file ended"),
        ("a.jsonl.gz", zipped(b'{"text": "a"}\n{"text": \n'), "line 2 is not JSON"),
        ("a.jsonl.gz", zipped(b'{"text": "\xff"}\n'), "is not UTF-8 at byte 10"),
        ("a.parquet", b"PAR1 nothing", "cannot be read: "),
        ("a.json", b"", "holds no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.json", b'[{"text": "a"}, {"text": ]', "record 2 is not JSON"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "after record 1: wanted a comma or the list's end"),
        ("a.json", b'[{"text": "a"}', "after record 1: wanted a comma or the list's end"),
        ("a.json", b'[{"text": "a"},', "record 2 is not JSON"),
        ("a.json", b'[{"text": "a"}] x', "there is more after the list"),
        ("a.json", b"[" * 100_000, "record 1 is not JSON"),
        ("a.json", b'{"text": "a"} "b"', 'record 2 should be an object with a string "text"'),
        ("a.json", b"\xff", "is not UTF-8 at byte 0"),
    ],
)
def test_damaged_containers_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    message = failure(tokenise, str(path), KINDS["llama3"], 500, str(tmp_path / "cache"), str)
    assert message.startswith(f"{path}: ") and words in message


# ---- forms ---------------------------------------------------------------------------------------


def said(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts)]


@pytest.mark.parametrize(
    "record, name, wanted",
    [
        ({"instruction": "a", "input": "", "output": "c"}, "Alpaca", said("a", "c")),
        ({"instruction": "a", "input": "b", "output": "c", "file": "f"}, "Alpaca", said("a\nb", "c")),
        (
            {"instruction": "a", "input": None, "output": "c", "system": None, "history": None},
            "Alpaca",
            said("a", "c"),
        ),
        (
            {"instruction": "a", "output": "c", "system": "s", "history": [["d", "e"]]},
            "Alpaca",
            [{"role": "system", "content": "s"}, *said("d", "e", "a", "c")],
        ),
        ({"messages": TALK}, "messages", TALK),
        ({"prompt": "a", "messages": TALK}, "messages", TALK),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                    {"from": "tool", "value": "t"},
                    {"from": "assistant", "value": "c"},
                ]
            },
            "ShareGPT",
            [
                {"role": role, "content": text}
                for role, text in zip(("system", "user", "assistant", "tool", "assistant"), "sabtc")
            ],
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "user", "value": "a"},
                    {"from": "chatgpt", "value": "b"},
                    {"from": "observation", "value": "c"},
                    {"from": "function_response", "value": "d"},
                ],
            },
            "ShareGPT",
            [
                {"role": role, "content": text}
                for role, text in zip(("system", "user", "assistant", "tool", "tool"), "sabcd")
            ],
        ),
        ({"conversations": TALK}, "ShareGPT", TALK),
        ({"messages": [ASSISTANT]}, "messages", [ASSISTANT]),
        ({"prompt": said("a"), "completion": said("a", "b")[1:]}, PROMPT + " messages", said("a", "b")),
    ],
)
def test_a_form_gives_messages(tmp_path, record, name, wanted):
    path = write(tmp_path / "a.jsonl", [record])
    assert form_of(path).name == name and not form_of(path).plain
    assert messages(path) == [wanted]


def test_only_the_completion_is_learned_of_message_lists(tmp_path):
    for template in (LLAMA_2, TEMPLATE.source):
        rows = [{"prompt": TALK[:3], "completion": TALK[3:]}]
        path = write(tmp_path / "a.jsonl", rows)
        how = Instructions(form_of(path), ChatTemplate(template, SPECIAL, "here"))
        ((ids, learned, _),) = how.encode([path], KINDS["llama3"])
        text = KINDS["llama3"].decode(ids[learned])
        assert text.strip() in ("\u65e5\u672c fox </s>", "\u65e5\u672c fox</s>")


@pytest.mark.parametrize(
    "kind, front, back",
    [
        ("llama3", [], []),
        ("llama", ["<s>"], []),
        ("llama3", [], ["</s>"]),
        ("llama3", ["<s>"], ["<end>", "</s>"]),
    ],
)
def test_strings_are_tokenised_as_one_text_with_an_end(tmp_path, kind, front, back):
    """No template. As TRL does, the end token is added to the completion, and only that is learned."""
    made = tokenizer(kind)
    if front or back:
        from tokenizers import processors

        made.backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*front, "$A", *back]),
            special_tokens=[(name, made.backend.token_to_id(name)) for name in front + back],
        )
    path = write(tmp_path / "a.jsonl", [{"prompt": "the quick", "completion": " fox"}])
    assert form_of(path).plain
    ((ids, learned, _),) = Instructions(form_of(path), None).encode([path], made)
    assert ids.tolist() == [*made.encode("the quick fox").tolist(), *([] if back else [made.eos_token_id])]
    count = len(made.encode("the quick")) - len(back)
    assert learned.tolist() == [i >= count for i in range(len(ids))]
    ((same, everything, _),) = Instructions(form_of(path), None, True).encode([path], made)
    assert same.tolist() == ids.tolist() and everything.all()


def test_a_record_needs_one_token_to_learn_besides_its_first(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "", "completion": "x"}])
    ((ids, learned, size),) = Instructions(form_of(path), None).encode([path], KINDS["llama3"])
    assert ids.tolist() == [*KINDS["llama3"].encode("x").tolist(), KINDS["llama3"].eos_token_id]
    assert learned.tolist() == [True, True] and size == 1
    without = Tokenizer(KINDS["llama3"].backend, {}, {}, "no end")
    with pytest.raises(UserError, match="line 1: has no token to learn"):
        list(Instructions(form_of(path), None).encode([path], without))
    path = write(tmp_path / "a.jsonl", [{"prompt": "y", "completion": "x"}])
    ((ids, learned, _),) = Instructions(form_of(path), None).encode([path], without)
    assert ids.tolist() == without.encode("yx").tolist() and learned.tolist() == [False, True]


def test_tools_reach_the_template(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        path = write(tmp_path / "a.jsonl", [{"messages": [USER, call], "tools": tools}])
        ((_, sample),) = samples([path], form_of(path))
        assert sample.extra == {"tools": [{"name": "f"}]} and list(sample.messages) == [USER, call]
    for nothing in (None, "", [], "null", "[]"):
        path = write(tmp_path / "a.jsonl", [{"messages": TALK, "tools": nothing}])
        ((_, sample),) = samples([path], form_of(path))
        assert sample.extra == {}


WRONG = [
    ({"question": "a"}, 'should be an object with a string "text", or with messages; conversations; instr'),
    (["a"], 'should be an object with a string "text", or with'),
    ({"instruction": "a"}, "output should be a text that is not empty, got None"),
    ({"instruction": "a", "output": " \n"}, "output should be a text that is not empty, got ' \\n'"),
    ({"instruction": "", "output": "a"}, "instruction should be a text that is not empty"),
    ({"instruction": "a", "input": 3, "output": "b"}, "input should be a text, got 3"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "history should be a list of questions"),
    ({"instruction": "a", "output": "b", "history": [["c", 3]]}, "with their answers, got [['c', 3]]"),
    ({"instruction": "a", "output": "b", "history": [{"c": 1, "d": 2}]}, "history should be a list of"),
    ({"instruction": "a", "output": "b", "history": 3}, "with their answers, got 3"),
    ({"instruction": "a", "output": "\ud83d"}, "holds half a character"),
    ({"messages": []}, "messages should be a list of messages, got []"),
    ({"messages": ["a"]}, "messages[0] should be an object with role and content, got 'a'"),
    ({"messages": [{"content": "a"}]}, "messages[0] should be an object with role and content"),
    ({"messages": [ASSISTANT, {"role": "user"}]}, "messages[1]: content should be a text, got None"),
    ({"messages": [{**ASSISTANT, "content": 3, "tool_calls": [3]}]}, "content should be a text, got 3"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0]: content should be a text, got 3"),
    ({"messages": [{"role": "user", "content": ["text"]}]}, "with a text, got 'text'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "with a text, got {'type': 'text'}"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, 'content[0] should be a part of type "text"'),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "got {'type': 'image'}"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}]}, 'of type "text" with'),
    ({"messages": [USER, {**ASSISTANT, "weight": True}]}, "weight should be 0 or 1, got True"),
    ({"messages": [USER, {**ASSISTANT, "weight": 2}]}, "messages[1]: weight should be 0 or 1, got 2"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "messages has no answer: the assistant says nothing"),
    ({"messages": [USER]}, "messages has no answer: the assistant says nothing"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages has no answer"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages has no answer"),
    ({"messages": [USER, {"role": "assistant", "content": "\udcfe"}]}, "holds half a character"),
    ({"messages": TALK, "tools": [{"name": "\ud83d"}]}, "holds half a character"),
    ({"messages": TALK, "tools": "f"}, "tools should be a list, got 'f'"),
    ({"messages": TALK, "tools": {"name": "f"}}, "tools should be a list, got {'name': 'f'}"),
    ({"conversations": []}, "conversations should be a list of messages, got []"),
    ({"conversations": [3]}, "conversations[0] should be an object with from and value, got 3"),
    (
        {"conversations": [{"role": "user", "content": 3}]},
        "conversations[0]: content should be a text, got 3",
    ),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, "from should be one of human, user, gpt"),
    ({"conversations": [{"from": "human"}]}, "conversations[0]: value should be a text, got None"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "conversations has no answer"),
    ({"prompt": "a"}, "completion should be a text that is not empty, got None"),
    ({"prompt": [USER]}, "completion should be a list of messages, got None"),
    ({"prompt": [USER], "completion": "a"}, "completion should be a list of messages, got 'a'"),
    ({"prompt": [3], "completion": TALK}, "prompt[0] should be an object with role and content, got 3"),
    ({"prompt": [USER], "completion": [3]}, "completion[0] should be an object with role and content"),
    ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "completion has no answer"),
]


@pytest.mark.parametrize("record, words", WRONG)
def test_what_is_wrong_with_a_record_is_named_with_its_place(tmp_path, record, words):
    path = write(tmp_path / "a.jsonl", [record])
    message = failure(messages, path)
    assert message.startswith(f"{path}: line 1") and words in message


def test_a_record_may_be_nested_as_deep_as_json_is_read(tmp_path):
    path, refused = tmp_path / "a.jsonl", 0
    for depth in range(100, 1100, 25):
        path.write_text(f'{{"instruction": "a", "output": "b", "more": {"[" * depth}{"]" * depth}}}\n')
        try:
            assert messages(str(path)) == [said("a", "b")]
        except UserError as error:
            assert str(error).startswith(f"{path}: line 1")
            refused += 1
    assert 0 < refused < 40


def test_a_record_that_is_nested_too_deeply_is_named(monkeypatch):
    deep = []
    for _ in range(5000):
        deep = [deep]
    read = [("line 1", ROWS[1]), ("line 2", {**ROWS[1], "more": deep})]
    monkeypatch.setattr(records, "read", lambda path: iter(read))
    form = next(form for form in FORMS if form.name == "Alpaca")
    assert failure(list, samples(["some.jsonl"], form)) == "some.jsonl: line 2: is nested too deeply"


def test_files_without_a_record_are_named(tmp_path):
    paths = [write(tmp_path / name, []) for name in ("a.jsonl", "b.jsonl")]
    assert form_of(paths[0]) is None
    assert failure(list, samples(paths, FORMS[0])) == f"{paths[0]}: holds no record"


@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
def test_files_of_text_and_of_tokens_hold_no_records(tmp_path, name):
    assert form_of(write(tmp_path / name, [{"messages": TALK}])) is None


WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "tool", "a b", "", " ", "<s>", "\u65e5"])
NAMES = ["role", "content", "from", "value", "tool_calls"]
KEYS = ["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "system"]
TURNS = st.lists(st.dictionaries(st.sampled_from(NAMES), WORDS, max_size=4), max_size=4)
VALUES = st.recursive(
    WORDS | TURNS | st.none() | st.integers(), lambda x: st.lists(x, max_size=3), max_leaves=5
)
RECORDS = st.dictionaries(st.sampled_from([*KEYS, "tools", "history"]), VALUES, max_size=4)


@given(rows=st.lists(RECORDS, min_size=1, max_size=3), everything=st.booleans())
@settings(max_examples=150)
def test_no_record_fails_in_another_way(tmp_path_factory, rows, everything):
    """A record of whatever content has targets, or is refused by a UserError."""
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", rows)
    try:
        form = form_of(path)
        for ids, learned, _ in Instructions(form, TEMPLATE, everything).encode([path], KINDS["llama3"]):
            assert len(ids) == len(learned) and learned[1:].any()
    except UserError as error:
        assert str(error).startswith(f"{path}: line ")


def test_a_record_of_another_form_is_named_with_its_place(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[1], {"messages": TALK}])
    wanted = "should have instruction, input and output, as the first record has; it is messages"
    assert failure(messages, path) == f"{path}: line 2: {wanted}"
    path = contain(tmp_path / "list.json", [ROWS[1], {"text": "b"}])
    assert failure(messages, path) == f"{path}: record 2: {wanted[:-8]}text"
    path = write(tmp_path / "a.jsonl", [{"messages": TALK}, {"question": "a"}])
    assert failure(messages, path).endswith(
        "should have messages, as the first record has; it is in an unknown form"
    )
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, ROWS[0]])
    message = failure(tokenise, path, KINDS["llama3"], 500, str(tmp_path / "cache"), str)
    assert message == f'{path}: line 2 should be an object with a string "text"'


def test_a_directory_of_records_has_one_form(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:1])
    write(tmp_path / "b.jsonl", ROWS[1:])
    form = form_of(str(tmp_path))
    assert form.name == "Alpaca"
    found = samples([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], form)
    assert [sample.messages[-1]["content"] for _, sample in found] == ["\u00e9\u00e9", "c"]
    (tmp_path / "c.txt").write_text("some text")
    message = failure(tokenise, str(tmp_path), KINDS["llama3"], 500, str(tmp_path / "cache"), str)
    assert 'a.jsonl: line 1 should be an object with a string "text"' in message


# ---- the cache -----------------------------------------------------------------------------------


def test_the_cache_is_keyed_by_what_the_tokens_depend_on(tmp_path):
    path, cache = contain(tmp_path / "list.json", ROWS), tmp_path / "cache"
    made = KINDS["llama3"]

    def tokens(template=LLAMA_2, everything=False):
        said = []
        how = Instructions(form_of(path), ChatTemplate(template, SPECIAL, "here"), everything)
        return tokenise(path, made, 500, str(cache), said.append, how), said

    first, lines = tokens()
    assert len(lines) == 1 and lines[0].startswith(f"tokenised 2 samples, {len(first.ids)} tokens")
    again, lines = tokens()
    assert again.fingerprint == first.fingerprint and not lines
    np.testing.assert_array_equal(again.learned, first.learned)
    np.testing.assert_array_equal(again.ids, first.ids)
    for found in (tokens(LLAMA_2 + "!"), tokens(everything=True)):
        assert found[0].fingerprint != first.fingerprint and found[1]
    for file in cache.glob("*.mask"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"\.mask: is damaged; remove it and "):
        tokens()
