"""Questions and answers become the tokens of transformers, and exactly the answers' tokens are learned."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_chat_template import SHAPES, SPECIAL
from test_tokenizer import UGLY, trained

from longlora.data import chat
from longlora.data.chat import Instructions, form_of
from longlora.data.chat_template import LLAMA_2, ChatTemplate
from longlora.data.sequences import Sequences, batch
from longlora.data.tokens import Tokens
from longlora.errors import UserError
from longlora.files.tokenizer import Tokenizer
from longlora.ops import IGNORE

TALK = [
    {"role": "user", "content": "What's \u00e9? "},
    {"role": "assistant", "content": " It's the quick 'letter'.\n"},
    {"role": "user", "content": "the \n\nlazy"},
    {"role": "assistant", "content": "\u65e5\u672c fox"},
]
NAMES = ["<s>", "</s>", "<end>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<end_of_turn>"]


def tokenizer(kind, names=NAMES, **how):
    from tokenizers import AddedToken

    backend = trained(kind)
    backend.add_tokens([AddedToken(name, special=True, **how) for name in names])
    return Tokenizer(backend, SPECIAL, {}, kind)


KINDS = {kind: tokenizer(kind) for kind in ("llama3", "qwen2", "llama")}


def failure(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def encoded(tmp_path, made, rows, template=None, everything=False):
    """The ids of each record, and which are learned."""
    path = write(tmp_path / "data.jsonl", rows)
    how = Instructions(form_of(path), template and ChatTemplate(template, SPECIAL, "here"), everything)
    return [(ids, learned) for ids, learned, _ in how.encode([path], made)]


def parts(made, ids, learned):
    """The texts of the runs of tokens that are learned."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(int), [0]])))
    return [made.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


# ---- which tokens are answers --------------------------------------------------------------------


def trl_templates():
    """name -> text of public models' chat templates, and of those that TRL marks for training."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text() for path in folder.glob("*.jinja")}


@pytest.mark.parametrize("kind", KINDS)
def test_marked_answers_are_those_of_transformers(tmp_path, kind):
    """{% generation %}: LLaMA-2's template, our tests' own and those of TRL, in conversations of 2 and 4."""
    import transformers

    made = KINDS[kind]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made.backend, **SPECIAL)
    marked, count = [text for name, text in trl_templates().items() if name.endswith("_training")], 0
    for text in [LLAMA_2, SHAPES["generation"], *marked]:
        talks = [TALK[:2], TALK]
        try:
            wanted = [
                theirs.apply_chat_template(
                    talk, chat_template=text, return_assistant_tokens_mask=True, return_dict=True
                )
                for talk in talks
            ]
        except Exception:  # a template for pictures
            continue
        count += 1
        found = encoded(tmp_path, made, [{"messages": talk} for talk in talks], text)
        for (ids, learned), right in zip(found, wanted, strict=True):
            assert ids.tolist() == right["input_ids"]
            assert learned.astype(int).tolist() == right["assistant_masks"] and learned.any()
    assert count > 10


@pytest.mark.parametrize(
    "name", "cohere gemma gemma3 llama3 qwen2_5 qwen3_instruct_2507 smolvlm lfm2 phi3".split()
)
def test_answers_of_public_templates_are_those_that_trl_marks(tmp_path, name):
    """By the prefixes of the original template. TRL also marks spaces around some answers."""
    found = trl_templates()
    row, made = {"messages": TALK}, KINDS["llama3"]
    ((ids, learned),) = encoded(tmp_path, made, [row], found[name])
    ((marked, wanted),) = encoded(tmp_path, made, [row], found[name + "_training"])
    assert ids.tolist() == marked.tolist()
    assert [text.strip() for text in parts(made, ids, learned)] == [
        text.strip() for text in parts(made, marked, wanted)
    ]


@pytest.mark.parametrize("template", [SHAPES["chatml"], LLAMA_2], ids=["prefixes", "marks"])
def test_answers_of_weight_0_are_read_and_not_learned(tmp_path, template):
    made = KINDS["llama3"]
    talk = [TALK[0], TALK[1] | {"weight": 0}, TALK[2], TALK[3] | {"weight": 1}]
    rows = [{"messages": TALK}, {"messages": talk}]
    (ids, both), (same, last) = encoded(tmp_path, made, rows, template)
    texts = [parts(made, ids, learned) for learned in (both, last)]
    assert ids.tolist() == same.tolist() and len(texts[0]) == 2 and texts[1] == texts[0][1:]
    once = "{% for m in messages %}{{ m.content }}{% if loop.last %}{% generation %}x{% endgeneration %}"
    words = failure(encoded, tmp_path, made, rows[1:], once + "{% endif %}{% endfor %}")
    assert "the template marks 1 of 2 answers, so it is not clear which ones have weight 0" in words


def test_text_parts_of_a_message_become_its_lines(tmp_path):
    made = KINDS["llama3"]
    part = [{"type": "text", "text": text} for text in ("one", "two")]
    lists = [{"role": "user", "content": part}, {"role": "assistant", "content": part[:1]}]
    plain = [{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": "one"}]
    rows = [{"messages": lists}, {"messages": plain}]
    (ids, learned), (wanted, right) = encoded(tmp_path, made, rows, SHAPES["chatml"])
    assert ids.tolist() == wanted.tolist() and learned.tolist() == right.tolist()


TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SAID = [" It's the quick 'letter'.\n", "\u65e5\u672c fox"]


@pytest.mark.parametrize(
    "template, wanted",
    [
        # the spaces after the end token belong to nobody
        ("{% for m in messages %}" + TURN + "{% endfor %}" + HEAD, [text + "<|im_end|>" for text in SAID]),
        # without an end token the line break is what ends an answer
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            [" It's the quick 'letter'.\n", " \u65e5\u672c fox\n"],
        ),
        # the prompt ends in a space, which the tokenizer joins with the answer's first word
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            [" It's the quick 'letter'.</s>", " \u65e5\u672c fox</s>"],
        ),
        # no words before an answer: add_generation_prompt changes nothing
        (
            "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
            "' ' + m.content | trim + '</s>' }}{% endfor %}",
            [" It's the quick 'letter'.</s>", " \u65e5\u672c fox</s>"],
        ),
        # the end of the last message is the end of the conversation too
        (
            "{% for m in messages %}" + TURN + "{% endfor %}" + HEAD[:-11] + "{% else %}</s>{% endif %}",
            [SAID[0] + "<|im_end|>", SAID[1] + "<|im_end|>\n</s>"],
        ),
        # the last answer has an empty thought, the others lose it
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
            "{{ '<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' }}"
            "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + HEAD,
            [SAID[0] + "<|im_end|>", "<think>\n\n</think>\n\n" + SAID[1] + "<|im_end|>"],
        ),
        # the prompt begins a thought that no answer of the conversation has
        (
            "{% for m in messages %}" + TURN + "{% endfor %}" + HEAD[:-11] + "<think>\n{% endif %}",
            [SAID[0] + "<|im_end|>", SAID[1] + "<|im_end|>"],
        ),
    ],
    ids=["end token", "line break", "joined", "no prompt", "end of all", "thought", "prompted thought"],
)
def test_answers_by_hand(tmp_path, template, wanted):
    made = KINDS["llama3"]
    ((ids, learned),) = encoded(tmp_path, made, [{"messages": TALK}], template)
    assert parts(made, ids, learned) == wanted
    text = ChatTemplate(template, SPECIAL, "here").render(TALK)
    np.testing.assert_array_equal(ids, made.encode_parts([text])[0])
    ((same, everything),) = encoded(tmp_path, made, [{"messages": TALK}], template, everything=True)
    assert everything.all() and same.tolist() == ids.tolist()


@pytest.mark.parametrize(
    "template, words",
    [
        # the number of messages stands before them
        (
            "{{ messages | length }}{% for m in messages %}" + TURN + "{% endfor %}" + HEAD,
            ["record", "message 2", "writes '1<|im_start|>user", "and '4<|im_start|>user"],
        ),
        # an answer is shortened where it is not the last
        (
            "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else m.content[:4] }}</s>"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
            ["message 2", "the template does not show which tokens are the answer"],
        ),
        # nothing ends an answer, and the next message changes it
        (
            "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ '.' if not loop.last }}{% endfor %}"
            "{{ 'assistant:' if add_generation_prompt }}",
            ["message 2"],
        ),
        ("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}", ["message 2"]),
        (
            "{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}",
            ["no token"],
        ),
        ("{{ raise_exception('roles must alternate') }}", ["refuses these messages: roles must alternate"]),
        ("{{ 1 / 0 }}", ["the chat template fails: ZeroDivisionError"]),
    ],
)
def test_a_template_that_shows_no_answer_is_named_with_the_place(tmp_path, template, words):
    message = failure(encoded, tmp_path, KINDS["llama3"], [{"messages": TALK}], template)
    assert message.startswith(f"{tmp_path / 'data.jsonl'}: line 1: ")
    assert all(word in message.replace("line 1", "record") for word in words), message


def test_an_assistant_may_speak_first(tmp_path):
    """In the first template the prompt for an answer is a "?", with which no answer begins."""
    made, rows = KINDS["llama3"], [{"messages": TALK[1:]}, {"messages": TALK[1:2]}]
    template = (
        "{% for m in messages %}{{ m.content | trim }}</s>{% endfor %}{{ '?' if add_generation_prompt }}"
    )
    for source in (template, SHAPES["chatml"], SHAPES["generation"]):
        both, alone = encoded(tmp_path, made, rows, source)
        said = [parts(made, *found) for found in (both, alone)]
        assert [len(texts) for texts in said] == [2, 1] and said[1] == said[0][:1]
        assert TALK[1]["content"].strip() in said[1][0]


TOOLS = [{"name": "f"}]  # also the tool calls of an answer
WITH_TOOLS = "{{ tools | tojson if tools }}"
LINES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt }}"
)


@pytest.mark.parametrize(
    "template", [SHAPES["chatml"], LINES, SHAPES["generation"]], ids=["prefixes", "lines", "marks"]
)
@pytest.mark.parametrize("row", [{"messages": TALK}, {"prompt": TALK[:3], "completion": TALK[3:]}])
def test_answers_are_found_in_conversations_with_tools(tmp_path, template, row):
    made = KINDS["llama3"]
    ((bare, answers),) = encoded(tmp_path, made, [row], template)
    ((ids, learned),) = encoded(tmp_path, made, [row | {"tools": TOOLS}], WITH_TOOLS + template)
    ((same, everything),) = encoded(tmp_path, made, [row | {"tools": TOOLS}], WITH_TOOLS + template, True)
    assert made.decode(ids) == made.decode(same) == '[{"name": "f"}]' + made.decode(bare)
    assert parts(made, ids, learned) == parts(made, bare, answers) and everything.all()


def test_a_marked_answer_begins_after_the_prompt_for_it(tmp_path):
    """What a template adds after the last message is not in the prompt. The whole text must begin with the
    prompt.
    """
    row = {"prompt": TALK[:1], "completion": TALK[1:2]}
    source = SHAPES["generation"] + "{{ '!' if not add_generation_prompt }}"
    ((ids, learned),) = encoded(tmp_path, KINDS["llama3"], [row], source)
    assert parts(KINDS["llama3"], ids, learned) == [TALK[1]["content"] + "</s>"]
    source = "{{ messages | length }}" + SHAPES["generation"]
    words = failure(encoded, tmp_path, KINDS["llama3"], [row], source)
    assert "in message 2: it writes \"1user: What's" in words and "and \"2user: What's" in words


def test_an_error_shows_both_texts_from_20_characters_before_they_differ(tmp_path):
    source = "{{ 'a' * 30 }}{{ ('1' if messages | length == 1 else '2') * 30 }}"
    one, two = ("a" * 20 + digit * 20 for digit in "12")
    words = f"in message 2: it writes '{one}' up to there, and '{two}' with what follows; mark answers with"
    assert words in failure(encoded, tmp_path, KINDS["llama3"], [{"messages": TALK[:2]}], source)


QUESTION = (
    "{% for m in messages %}{{ m.content + ('' if loop.last else '</s>') if m.role == 'user' }}{% endfor %}"
)
CALLS = "{% for m in messages %}{{ m.content }}</s>{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"


@pytest.mark.parametrize(
    "template, question, answer",
    [
        (QUESTION, "x", {"content": "x"}),  # only the question holds "x"
        ("</s>" + QUESTION, "y", {"content": "x"}),
        (QUESTION, "x", {"content": None, "tool_calls": TOOLS}),
        (CALLS, "x", {"content": "y", "tool_calls": TOOLS}),  # the call comes after the end token
        (
            "{% for m in messages %}{{ m.content + ('</s>' if m.role == 'user' else '!') }}{% endfor %}",
            "x",
            {"content": "y"},  # no end token follows
        ),
    ],
)
def test_an_answer_that_the_template_leaves_out_is_not_found_elsewhere(tmp_path, template, question, answer):
    talk = [{"role": "user", "content": question}, {"role": "assistant", **answer}]
    source = template + "{{ '?' if add_generation_prompt }}"
    message = failure(encoded, tmp_path, KINDS["llama3"], [{"messages": talk}], source)
    assert "the template does not show which tokens are the answer in message 2" in message


def test_an_answer_may_begin_like_the_prompt_for_it(tmp_path):
    """The answer "<x" and the prompt "<think>" have the first character in common."""
    source = CALLS + "{{ '<think>' if add_generation_prompt }}"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<x"}]
    ((ids, learned),) = encoded(tmp_path, KINDS["llama3"], [{"messages": talk}], source)
    assert parts(KINDS["llama3"], ids, learned) == ["<x</s>"]


@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
@given(
    sides=st.lists(
        st.lists(
            st.sampled_from([*UGLY, " ", "\n", "the quick", "don't", "12", "\u65e5", "</s>"]), max_size=9
        ),
        min_size=2,
        max_size=2,
    )
)
@example(sides=[["so ", "\u65e5"], ["\u65e5 "]])
@settings(max_examples=100)
def test_a_target_is_a_token_with_a_byte_of_the_answer(kind, sides):
    """Byte-level tokens: their bytes, one after the other, are those of the text."""
    prompt, answer = map("".join, sides)
    made = KINDS[kind]
    ((ids, first, last),) = made.encode_places([prompt + answer])
    np.testing.assert_array_equal(ids, made.encode_parts([prompt + answer])[0])
    added = {index: token.content for index, token in made.backend.get_added_tokens_decoder().items()}
    sizes = [len(added[i].encode()) if i in added else len(made.backend.id_to_token(i)) for i in ids.tolist()]
    ends = np.cumsum(sizes)
    start = len(prompt.encode())
    assert not len(ids) or ends[-1] == len((prompt + answer).encode())
    learned = chat.targets(first, last, [(len(prompt), len(prompt + answer))])
    np.testing.assert_array_equal(learned, ends > start if answer else np.zeros(len(ids), bool))


def test_a_token_that_strips_the_spaces_of_an_answer_is_not_learned(tmp_path):
    """Phi-3's <|assistant|> takes the spaces that follow it; the prompt's tokens are the same without."""
    made = tokenizer("llama", ["<|assistant|>", "<|end|>"], rstrip=True, lstrip=True)
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": " \n the fox \n"}]}]
    ((ids, learned),) = encoded(tmp_path, made, rows, template)
    assert parts(made, ids, learned) == ["the fox<|end|>"]


def test_the_longest_end_token_ends_an_answer(tmp_path):
    made = tokenizer("llama3", ["</s>", "</s>>"])
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content | trim }}</s>>{% endfor %}"
        "{{ 'assistant:' if add_generation_prompt else '!' }}"
    )
    ((ids, learned),) = encoded(tmp_path, made, [{"messages": TALK}], template)
    assert parts(made, ids, learned) == ["It's the quick 'letter'.</s>>", "\u65e5\u672c fox</s>>!"]


@pytest.mark.parametrize("prompt, completion", [("the", "  fox \n\n"), ("the ", "\n\nfox")])
def test_a_post_processor_that_takes_spaces_off_changes_no_target(tmp_path, prompt, completion):
    from tokenizers import processors

    made = tokenizer("llama3")
    made.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    ((ids, learned),) = encoded(tmp_path, made, [{"prompt": prompt, "completion": completion}])
    assert parts(made, ids, learned) == [completion + "</s>"]


@pytest.mark.parametrize(
    "span, wanted",
    [
        ((0, 1), [1, 0, 0, 0, 0, 0]),
        ((1, 2), [0, 1, 0, 0, 0, 0]),
        ((1, 3), [0, 1, 0, 0, 0, 0]),  # one of the token's two characters
        ((3, 4), [0, 0, 1, 0, 0, 0]),
        ((4, 5), [0, 0, 0, 1, 1, 0]),
        ((5, 6), [0, 0, 0, 0, 0, 1]),
        ((0, 6), [1, 1, 1, 1, 1, 1]),
        ((2, 2), [0, 0, 0, 0, 0, 0]),  # an empty answer, inside a token
    ],
)
def test_targets_of_six_tokens(span, wanted):
    """They have 1, 2, 1, 0, 1 and 1 characters. The empty token counts as part of the next one."""
    first, last = np.array([0, 1, 3, 4, 4, 5]), np.array([1, 3, 4, 4, 5, 6])
    assert chat.targets(first, last, [span]).tolist() == [bool(x) for x in wanted]
    assert not chat.targets(first, last, []).any()


@pytest.mark.parametrize(
    "first, last, words",
    [
        ([0, 0, 2, 1, 3], [1, 1, 3, 4, 4], "token 4 is made of, after 'abc'"),
        ([0, 0, 2, 3, 3], [1, 1, 5, 4, 5], "token 4 is made of, after 'abcde'"),
        ([0, 2, 1, 2, 1], [1, 3, 2, 3, 2], "token 3 is made of, after 'abc'"),
        ([0, 30, 29, 40, 41], [1, 31, 40, 41, 42], "token 3 is made of, after 'klmnopqrstuvwxyzABCDE'"),
    ],
)
def test_tokens_that_go_back_in_the_text_are_refused(tmp_path, monkeypatch, first, last, words):
    made, text = tokenizer("llama3"), "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    monkeypatch.setattr(made, "encode_places", lambda _: [(np.arange(5), np.array(first), np.array(last))])
    message = failure(encoded, tmp_path, made, [{"prompt": "", "completion": text}])
    where = f"{tmp_path / 'data.jsonl'}: line 1: the tokenizer does not say which characters "
    assert message == where + words


@pytest.mark.parametrize(
    "at_once, sizes, groups",
    [
        (65, [3] * 5, [2, 2, 1]),  # a short text counts as 64 characters
        (128, [3] * 5, [2, 2, 1]),
        (140, [70, 70, 3, 70, 100], [2, 3]),
        (9, [3] * 2, [1, 1]),
        (1000, [3] * 9, [9]),
    ],
)
def test_records_are_tokenised_in_groups(tmp_path, monkeypatch, at_once, sizes, groups):
    made = tokenizer("llama3")
    rows = [{"prompt": "a", "completion": "b" * (n - 1)} for n in sizes]
    whole = [ids.tolist() for ids, _ in encoded(tmp_path, made, rows)]
    seen, encode = [], made.encode_places

    def noted(texts):
        seen.append(len(texts))
        return encode(texts)

    monkeypatch.setattr(chat, "AT_ONCE", at_once)
    monkeypatch.setattr(made, "encode_places", noted)
    assert [ids.tolist() for ids, _ in encoded(tmp_path, made, rows)] == whole and len(whole) == len(sizes)
    assert [n for n in seen if n] == groups


def test_equal_instructions_have_equal_keys():
    """Tokenised data are cached under this key. The file that a template comes from is not in it."""
    forms = {form.name: form for form in chat.FORMS}

    def key(name, template=None, everything=False):
        return json.dumps(Instructions(forms[name], template and ChatTemplate(*template), everything).key())

    one, plain = (LLAMA_2, SPECIAL, "here"), "prompt and completion"
    assert key("messages", one) == key("messages", (LLAMA_2, SPECIAL, "there"))
    others = [
        key("messages", (LLAMA_2 + "!", SPECIAL, "here")),
        key("Alpaca", one),
        key("messages", one, True),
        key(plain),
        key(plain, None, True),
    ]
    assert len({key("messages", one), *others}) == 6


# ---- sequences -----------------------------------------------------------------------------------


def samples_of(sizes, learned):
    """Tokens of samples of these sizes, whose ids count up; learned: where the answer of each begins."""
    borders = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    mask = np.concatenate([np.arange(n) >= k for n, k in zip(sizes, learned)] or [np.zeros(0)])
    return Tokens(np.arange(borders[-1], dtype=np.int32), borders, "", mask.astype(np.uint8))


def test_samples_stay_whole_and_fill_the_least_room_by_hand():
    """Samples of 5, 6, 3, 2 and 4 in sequences of 8."""
    found = Sequences(samples_of([5, 6, 3, 2, 4], [3, 1, 0, 1, 2]), 8, "refuse", "data", "document")
    assert found.pieces == [[(0, 5), (11, 14)], [(5, 11), (14, 16)], [(16, 20)]]
    assert found.sentence == (
        "5 samples, 20 tokens (12 of them targets, shortest 2, median 4, longest 6) -> 3 sequences of 8; "
        "samples do not see each other"
    )
    ids, targets, cu_seqlens = batch(found, [0, 2])
    none = IGNORE
    assert ids.tolist() == [[0, 1, 2, 3, 4, 11, 12, 13], [16, 17, 18, 19, 0, 0, 0, 0]]
    assert targets.tolist() == [
        [none, none, 3, 4, none, 12, 13, none],
        [none, 18, 19, none, none, none, none, none],
    ]
    assert cu_seqlens.tolist() == [0, 5, 8, 12, 16]


def test_long_samples_are_refused_by_their_record():
    message = failure(Sequences, samples_of([5, 9], [3, 3]), 8, "refuse", "some.json", "document")
    assert message.startswith(
        "some.json: record 2 has 9 tokens, more than the 8 of a sequence (1 are too long)"
    )


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    length=st.integers(2, 17),
    rule=st.sampled_from(["split", "truncate", "drop"]),
    boundaries=st.sampled_from(["none", "document"]),
    data=st.data(),
)
@settings(max_examples=200)
def test_every_target_is_the_next_token_of_an_answer(sizes, length, rule, boundaries, data):
    """All targets are there that the parts of the samples have, and no sequence is without one."""
    made = samples_of(sizes, [data.draw(st.integers(0, n)) for n in sizes])
    sample = np.repeat(np.arange(len(sizes)), sizes)
    try:
        found = Sequences(made, length, rule, packing_boundaries=boundaries)
    except UserError:
        return
    seen = []
    for i in range(len(found)):
        ids, targets, _ = batch(found, [i])
        assert len(found.get(i)) == found.size(i) <= length
        scored = targets[0] != IGNORE
        assert scored.sum() == found.targets(i) > 0
        assert made.learned[targets[0][scored]].all()
        if boundaries == "document":
            assert (targets[0][scored] == ids[0][scored] + 1).all()
            assert (sample[targets[0][scored]] == sample[ids[0][scored]]).all()
        seen += targets[0][scored].tolist()
    assert len(seen) == len(set(seen))
    assert f"{len(seen):,} of them targets" in found.sentence
    if boundaries == "document":
        place = np.concatenate([np.arange(n) for n in sizes])
        whole = np.repeat(sizes, sizes) <= length
        kept = {
            "split": place % length > 0,
            "truncate": (place < length) & (place > 0),
            "drop": whole & (place > 0),
        }
        assert sorted(seen) == np.flatnonzero(kept[rule] & (made.learned > 0)).tolist()
