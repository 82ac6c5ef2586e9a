"""HarnessModel, the model that lm-eval calls: tokens, cuts, likelihoods and answers, mostly over fakes."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from longlora.data.chat_template import ChatTemplate
from longlora.decoder.sampling import Sampling
from longlora.errors import UserError
from longlora.serving.engine import Event
from longlora.serving.open import prepare

pytest.importorskip("lm_eval", reason="pip install 'longlora[eval]'")

from longlora.evaluation import harness  # noqa: E402


class Tokenizer:
    """One token per byte. `encode` puts token 1 before them."""

    where = "here"

    def __init__(self, **special):
        self.special = special
        self.bos_token_id, self.eos_token_id = (
            {"<s>": 1, "</s>": 2}.get(special.get(name)) for name in ("bos_token", "eos_token")
        )
        self.encoded = []

    def encode(self, text):
        self.encoded.append(text)
        return np.array([1, *text.encode()], np.int32)

    def encode_parts(self, texts):
        return [np.array(list(text.encode()), np.int32) for text in texts]

    def fingerprint(self):
        return "abc"


BOTH = dict(bos_token="<s>", eos_token="</s>")


def made(context=8, load=None, template=None, **special):
    """Make a HarnessModel of fakes."""
    base, planned = SimpleNamespace(tokenizer=lambda: Tokenizer(**special)), SimpleNamespace(context=context)
    return harness.HarnessModel(SimpleNamespace(base=base, planned=planned, load=load), template)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("harness") / "base", max_position_embeddings=64)


@pytest.fixture
def bars(monkeypatch):
    """A list of all progress bars, each with its total and its count."""
    bars = []

    class Bar:
        def __init__(self, total=None, **_):
            self.total, self.n = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            self.n += count

    monkeypatch.setattr(harness.progress, "bar", Bar)
    return bars


# ---- tokens --------------------------------------------------------------------------------------


def test_the_prefix_token_is_bos_or_else_eos():
    assert made(**BOTH).prefix_token_id == 1 and made(bos_token="<s>").prefix_token_id == 1
    assert made(eos_token="</s>").prefix_token_id == 2
    assert made(**BOTH).eot_token_id == 2 and made(bos_token="<s>").eot_token_id is None
    with pytest.raises(UserError, match="^here: the tokenizer has neither a BOS nor an EOS token"):
        assert made().prefix_token_id
    assert made().tokenizer_name == "abc" and made(context=9).max_length == 9


def test_lm_eval_runs_the_model_in_one_process():
    assert (made().rank, made().world_size) == (0, 1)


@pytest.mark.parametrize(
    "special, text, how, wanted",
    [
        (BOTH, "ab", None, [1, 97, 98]),
        (BOTH, "<s>a", None, [60, 115, 62, 97]),
        (BOTH, "</s>", None, [1, 60, 47, 115, 62]),
        (dict(eos_token="</s>"), "</s>", None, [60, 47, 115, 62]),
        (dict(eos_token="</s>"), "a", None, [1, 97]),
        ({}, "a", None, [1, 97]),
        (BOTH, "a", False, [97]),
        (BOTH, "<s>", True, [1, 60, 115, 62]),
    ],
)
def test_special_tokens_are_added_unless_a_text_begins_with_the_prefix_token(special, text, how, wanted):
    assert made(**special).tok_encode(text, how) == wanted


def test_a_text_that_comes_again_is_not_tokenised_again():
    model = made()
    assert [model.tok_encode("ab") for _ in range(3)] == [[1, 97, 98]] * 3
    assert model._tokenizer.encoded == ["ab"]


# ---- chats ---------------------------------------------------------------------------------------

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
STRICT = (
    "{% for m in messages if m.role not in ['user', 'assistant'] %}{{ raise_exception('no') }}{% endfor %}"
)


def talk(*roles):
    return [dict(role=role, content=f" {role} ") for role in roles]


def test_a_chat_is_rendered_with_and_without_a_generation_prompt():
    model = made(template=ChatTemplate(PLAIN, {}, "here"))
    chat = talk("system", "user", "assistant")
    text = "<system> system ;<user> user ;<assistant> assistant "
    assert model.apply_chat_template(chat) == f"{text};>"
    assert model.apply_chat_template(chat, add_generation_prompt=False) == text
    assert chat == talk("system", "user", "assistant")
    trims = made(template=ChatTemplate(PLAIN.replace("m.content", "m.content | trim"), {}, "here"))
    assert trims.apply_chat_template(talk("user", "assistant"), False) == "<user>user;<assistant>assistant"


def test_only_a_system_message_is_left_out_where_the_template_refuses_it():
    model = made(template=ChatTemplate(STRICT + PLAIN, {}, "here"))
    assert model.apply_chat_template(talk("system", "user")) == "<user> user ;>"
    with pytest.raises(UserError, match="no"):
        model.apply_chat_template(talk("user", "tool"))


# ---- likelihoods ---------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """A list that records scored pairs. Each target has the log-probability -1."""
    scored = []

    class Scorer:
        def __init__(self, generator):
            assert generator == "generator"

        def score(self, pairs, done):
            for context, rest in pairs:
                assert context.dtype == rest.dtype == np.int32
                scored.append((context.tolist(), rest.tolist()))
                done(1)
            return [(-float(len(rest)), len(rest) > 1) for _, rest in pairs]

    monkeypatch.setattr(harness, "Scorer", Scorer)
    return scored


def loaded(**fields):
    engine = SimpleNamespace(generator="generator", abort=lambda error: None, **fields)
    return lambda: SimpleNamespace(engine=engine, end=frozenset([9]))


def test_a_context_that_is_too_long_loses_its_beginning(scored, bars):
    """The model does not read the last token of a continuation, so a context of 4 has room for 5 tokens."""
    model = made(4, loaded())
    asked = [
        ([1], [2]),
        ([1, 2], [3, 4, 5]),
        ([1, 2, 3], [4, 5, 6]),
        ([1, 2, 3, 4, 5, 6], [7]),
        ([9], [1, 2, 3, 4]),
    ]
    found = model._loglikelihood_tokens([(None, context, rest) for context, rest in asked])
    assert found == [(-1.0, False), (-3.0, True), (-3.0, True), (-1.0, False), (-4.0, True)]
    assert scored == [
        ([1], [2]),
        ([1, 2], [3, 4, 5]),
        ([2, 3], [4, 5, 6]),
        ([3, 4, 5, 6], [7]),
        ([9], [1, 2, 3, 4]),
    ]
    assert model.cut == 2
    assert [(bar.total, bar.n) for bar in bars] == [(5, 5)]


@pytest.mark.parametrize(
    "rest, words",
    [
        ([], "a task asks for the likelihood of a text without tokens: .*'x'"),
        ([1, 2, 3, 4, 5], "a task asks for the likelihood of 5 tokens, the context is 4"),
    ],
)
def test_a_continuation_that_is_empty_or_too_long_is_an_error(scored, rest, words):
    with pytest.raises(UserError, match=words):
        made(4, loaded())._loglikelihood_tokens([(("x", ""), [1], rest)])


def test_the_likelihood_of_a_long_text_is_the_sum_over_its_windows(scored):
    """A window has one token of context, which is BOS in the first. lm-eval gives the last window more."""
    model = made(3, loaded(), **BOTH)
    tokens = {"a long text": [5, 6, 7, 8, 9, 10, 11], "": [], "one": [4]}
    model._remembered = lambda text, special: tokens[text]
    assert model.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in tokens]) == [
        -7.0,
        0.0,
        -1.0,
    ]
    assert scored == [([1], [5, 6, 7]), ([7], [8, 9, 10]), ([8, 9, 10], [11]), ([1], [4])]
    assert model.cut == 0


def test_answers_are_the_same_after_likelihoods(base):
    """The engine keeps the tokens of a row for the next prompt, and likelihoods overwrite them."""
    model = harness.HarnessModel(prepare(base, rows=1, context=64))
    ask = SimpleNamespace(args=("the token of attention", dict(until=[], max_gen_toks=8)))
    before = model.generate_until([ask])
    other = list(b"another text, of more tokens than the prompt")
    model._loglikelihood_tokens([(None, other, [5, 6])])
    assert model.generate_until([ask]) == before and before != [""]


# ---- answers -------------------------------------------------------------------------------------


def test_a_prompt_loses_its_beginning_where_the_answer_needs_room():
    model = made(8)
    assert model.prompt("abcde", 2).tolist() == [1, *b"abcde"] and model.cut == 0
    assert model.prompt("abcdef", 2).tolist() == list(b"abcdef") and model.cut == 1
    found = model.prompt("abc", 7)
    assert found.tolist() == [99] and found.dtype == np.int32 and model.cut == 2
    with pytest.raises(UserError, match="a task asks for 8 new tokens, the context is 8: there is no room"):
        model.prompt("a", 8)


def test_the_end_tokens_are_those_of_the_model_and_of_the_tokenizer():
    assert made(load=loaded(), **BOTH).ends() == {9, 2}
    assert made(load=loaded()).ends() == {9}


def test_special_tokens_stop_a_text_and_are_not_part_of_it(base):
    model = harness.HarnessModel(prepare(base, rows=1))
    stream = model.stream(["<|end|>"])
    assert [stream.add(token) for token in (97, 256)] == ["a", ""] and stream.stopped
    assert model.text([97, 256, 98]) == "ab"


class Engine:
    """A fake with room for two requests. A tick gives each of them its next token of `tokens`, or the end."""

    def __init__(self, tokens, error=None):
        self.tokens, self.error, self.taken, self.ran = tokens, error, [], []
        self.most = self.ticks = self.calls = 0

    @property
    def busy(self):
        return bool(self.ran)

    def submit(self, request):
        self.calls += 1
        assert self.calls < 99
        if len(self.ran) == 2:
            return False
        self.taken.append(request)
        self.ran.append((request, iter(self.tokens)))
        return True

    def tick(self):
        self.most, self.ticks = max(self.most, len(self.ran)), self.ticks + 1
        assert self.ticks < 99
        for request, tokens in list(self.ran):
            token = None if request.cancelled else next(tokens, None)
            if token is None:
                reason = "error" if self.error else "length"
                request.notify(Event(reason=reason, error=self.error))
                self.ran.remove((request, tokens))
            else:
                request.notify(Event(token=token))
        assert len(self.taken) < 9


def answering(base, engine, **how):
    model = harness.HarnessModel(prepare(base, rows=1))
    model.__dict__["_opened"] = SimpleNamespace(engine=engine, end=frozenset([3]))
    texts = ("bc", "a", "bb", "a")
    return model.generate_until([SimpleNamespace(args=(text, how)) for text in texts])


def test_prompts_that_begin_alike_are_submitted_one_after_the_other(base, bars):
    engine = Engine(b"xyz")
    assert answering(base, engine, until=["q"], max_gen_toks=5) == ["xyz"] * 4
    assert [bytes(request.prompt.tolist()) for request in engine.taken] == [b"a", b"a", b"bb", b"bc"]
    assert engine.most == 2 and [(bar.total, bar.n) for bar in bars] == [(4, 4)]
    assert all(request.end == {3, 256} and request.max_new_tokens == 5 for request in engine.taken)
    assert all(request.sampling == Sampling() for request in engine.taken)


def test_an_answer_ends_before_a_stop_string(base):
    engine = Engine(b"xyzw")
    assert answering(base, engine, until="yz", max_gen_toks=9) == ["x"] * 4
    assert all(request.cancelled for request in engine.taken)
    engine = Engine([120, 256, 121])  # 256 is <|end|>, which stops a text though no task names it
    assert answering(base, engine, until=[], max_gen_toks=9) == ["x"] * 4
    assert all(request.cancelled for request in engine.taken)


def test_tokens_after_the_end_are_not_part_of_an_answer(base):
    model = harness.HarnessModel(prepare(base, rows=1))
    text = harness._Text(model, 0, "a", dict(until=["y"], max_gen_toks=4))
    for event in (Event(token=120), Event(), Event(token=256), Event(token=122)):
        text.request.notify(event)
        assert not text.over
    assert text.result() == "x" and text.request.cancelled
    text.request.notify(Event(reason="cancelled"))
    assert text.over and text.result() == "x"


def test_an_answer_that_fails_is_an_error(base):
    with pytest.raises(UserError, match="^the logits are bad$"):
        answering(base, Engine(b"x", "the logits are bad"), until=["q"], max_gen_toks=9)


def test_an_answer_has_at_most_256_tokens_by_default(tmp_path):
    model = harness.HarnessModel(prepare(tiny.model(tmp_path / "base", max_position_embeddings=300), rows=1))
    assert harness._Text(model, 0, "a", {}).request.max_new_tokens == 256  # as lm-eval's default_max_gen_toks


def test_the_sampling_options_of_a_task_are_used():
    drawn = dict(do_sample=True, temperature=0.5, top_p=0.9, num_beams=1)
    assert harness._sampling(drawn, 7) == Sampling(temperature=0.5, top_p=0.9, seed=7)
    assert harness._sampling(dict(do_sample=True, temperature=1.0, seed=3), 7) == Sampling(
        temperature=1.0, seed=7
    )
    greedy = dict(do_sample=False, temperature=0.0, top_k=5, num_beams=1)
    assert harness._sampling(greedy, 7) == Sampling()
    for odd in (dict(num_beams=2), dict(typical_p=0.5)):
        (name,) = odd
        words = f"a task generates with {name}={odd[name]}, which longlora cannot compute"
        with pytest.raises(UserError, match=words):
            harness._sampling(dict(odd, do_sample=False), 0)
