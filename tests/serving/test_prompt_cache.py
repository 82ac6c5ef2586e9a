"""Saved prompt caches, with keys and values that are random numbers; the options of a session."""

import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import served
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file

import longlora
from longlora.decoder.sampling import Sampling
from longlora.errors import UserError
from longlora.serving import prompt_cache
from longlora.serving import session as session_
from longlora.serving.open import open_engine
from longlora.serving.session import Session, check, open_session

WHO = {"model": "m", "adapter": "none", "dtype": "float32", "cache_dtype": "float32"}
TOKENS = np.arange(10, 35, dtype=np.int32)
NAMES = [f"layers.{i}.{kind}" for i in range(2) for kind in ("keys", "values")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("cache") / "base")


def arrays(engine):
    """Name -> keys or values of a layer, [places,K,D] of row 0. They share the engine's memory."""
    found = [np.asarray(x) for pair in engine.cache.layers for x in pair]
    return {name: array[0] for name, array in zip(NAMES, found, strict=True)}


@pytest.fixture
def engine(base):
    """An engine whose row 0 holds TOKENS and random numbers."""
    made = open_engine(base, rows=2).engine
    random = np.random.default_rng(0)
    for array in arrays(made).values():
        array[:] = random.standard_normal(array.shape)
    made.hold(0, TOKENS)
    return made


@pytest.fixture
def saved(tmp_path, engine):
    assert prompt_cache.save(tmp_path / "saved", engine, WHO) == len(TOKENS)
    return tmp_path / "saved"


def fresh(base, context=64):
    """An engine whose row 0 holds three tokens."""
    made = open_engine(base, context=context).engine
    made.hold(0, TOKENS[:3])
    return made


def test_the_contents_of_a_file(saved, engine):
    found = load_file(saved)
    with safe_open(saved, "numpy") as file:
        assert file.metadata() == {"format": "longlora prompt cache 2", **WHO}
    assert found.keys() == {*NAMES, "tokens", "checksums"}
    np.testing.assert_array_equal(found["tokens"], TOKENS)
    for name, array in arrays(engine).items():
        np.testing.assert_array_equal(found[name], array[: len(TOKENS)])
        assert found[name].dtype == np.float32
    sums = [zlib.crc32(found[name].tobytes()) for name in sorted([*NAMES, "tokens"])]
    assert found["checksums"].shape == (5, 4)
    assert [int.from_bytes(row.tobytes(), "little") for row in found["checksums"]] == sums


@pytest.mark.parametrize("block, context", [(4096, 64), (25, 64), (8, 25), (1, 26)])
def test_a_file_is_read_in_blocks(saved, engine, base, monkeypatch, block, context):
    data, released = saved.read_bytes(), []
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    monkeypatch.setattr(prompt_cache, "BLOCK", block)
    monkeypatch.setattr(prompt_cache, "release", lambda _, *place: released.append(place))
    other = fresh(base, context)
    assert prompt_cache.load(saved, other, WHO) == len(TOKENS)
    np.testing.assert_array_equal(other.tokens(0), TOKENS)
    assert other.cache.lengths[0] == len(TOKENS)
    for array, wanted in zip(arrays(other).values(), arrays(engine).values(), strict=True):
        np.testing.assert_array_equal(array[: len(TOKENS)], wanted[: len(TOKENS)])
        assert not array[len(TOKENS) :].any()
    assert released == [tuple(begin + x for x in header[name]["data_offsets"]) for name in NAMES]


def test_a_cache_of_one_token(base, tmp_path):
    engine = fresh(base)
    engine.hold(0, TOKENS[:1])
    assert prompt_cache.save(tmp_path / "saved", engine, WHO) == 1
    assert prompt_cache.load(tmp_path / "saved", engine, WHO) == 1
    engine.hold(0, TOKENS[:0])
    with pytest.raises(UserError, match="other: the cache is empty, there is nothing to save"):
        prompt_cache.save(tmp_path / "other", engine, WHO)
    assert not (tmp_path / "other").exists()


def changed(path, change):
    """Write a file again after change(tensors, metadata), with the checksums of the new tensors."""

    def change_and_sum(tensors, metadata):
        change(tensors, metadata)
        if "checksums" in tensors:
            names = sorted(tensors.keys() - {"checksums"})
            sums = np.array([zlib.crc32(tensors[name].tobytes()) for name in names], "<u4")
            tensors["checksums"] = sums.view(np.uint8).reshape(-1, 4)

    served.rewrite(path, change_and_sum)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, m: m.update(format="longlora prompt cache 1"), "is not a longlora prompt cache 2"),
        (lambda t, m: m.update(model="n"), "another model$"),
        (lambda t, m: m.update(adapter="n"), "another adapter$"),
        (lambda t, m: m.update(dtype="float16"), "another dtype: float16, wanted float32$"),
        (lambda t, m: m.pop("cache_dtype"), "another cache dtype: None, wanted float32$"),
        (lambda t, m: t.pop("tokens"), "has 0 tokens, the context is 64$"),
        (lambda t, m: t.update(tokens=np.array(5, np.int32)), "has 0 tokens, the context is 64$"),
        (lambda t, m: t.update(tokens=np.zeros(0, np.int32)), "has 0 tokens, the context is 64$"),
        (lambda t, m: t.update(tokens=np.zeros(65, np.int32)), "has 65 tokens, the context is 64$"),
        (lambda t, m: t.update(a=np.zeros(1, np.int32)), r"a should be absent, got int32 \[1\]$"),
        (lambda t, m: t.pop("checksums"), r"checksums should be uint8 \[5, 4\], got absent$"),
        (
            lambda t, m: t.update({NAMES[2]: t[NAMES[2]].astype(np.float16)}),
            r"layers.1.keys should be float32 \[25, 2, 8\], got float16 \[25, 2, 8\]$",
        ),
        (
            lambda t, m: t.update({NAMES[1]: t[NAMES[1]][:, :1].copy()}),
            r"layers.0.values should be float32 \[25, 2, 8\], got float32 \[25, 1, 8\]$",
        ),
        (
            lambda t, m: t.update(tokens=t["tokens"].astype(np.int64)),
            r"tokens should be int32 \[25\], got int64",
        ),
        (lambda t, m: t["tokens"].put(24, 260), "has tokens outside 0 to 259$"),
        (lambda t, m: t["tokens"].put(0, -1), "has tokens outside 0 to 259$"),
    ],
)
def test_a_file_that_does_not_fit_leaves_the_row_as_it_was(saved, base, change, words):
    changed(saved, change)
    engine = fresh(base)
    with pytest.raises(UserError, match=words):
        prompt_cache.load(saved, engine, WHO)
    assert engine.tokens(0).tolist() == TOKENS[:3].tolist() and engine.cache.lengths[0] == 3


def test_a_file_may_hold_the_first_and_the_last_token_of_the_vocabulary(saved, base):
    changed(saved, lambda t, m: (t["tokens"].put(0, 0), t["tokens"].put(24, 259)))
    engine = fresh(base)
    assert prompt_cache.load(saved, engine, WHO) == 25
    assert engine.tokens(0)[[0, 24]].tolist() == [0, 259]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [4096, 8])
def test_a_checksum_covers_the_first_and_the_last_number(saved, base, monkeypatch, name, block):
    monkeypatch.setattr(prompt_cache, "BLOCK", block)
    data = bytearray(saved.read_bytes())
    stored = load_file(saved)[name].tobytes()
    at = data.index(stored)
    for place in (0, len(stored) - 4):
        damaged = data.copy()
        damaged[at + place] ^= 1
        saved.write_bytes(damaged)
        engine = fresh(base)
        words = f"{name} is damaged: its checksum is [0-9a-f]{{8}}, not [0-9a-f]{{8}}$"
        with pytest.raises(UserError, match=words):
            prompt_cache.load(saved, engine, WHO)
        assert len(engine.tokens(0)) == 0 and engine.cache.lengths[0] == 0


@pytest.mark.parametrize("place", [0, 24])
def test_keys_that_are_not_finite_are_refused(saved, base, place):
    changed(saved, lambda t, m: t["layers.1.keys"][place].fill(np.inf))
    engine = fresh(base)
    with pytest.raises(UserError, match="layers.1.keys is not finite$"):
        prompt_cache.load(saved, engine, WHO)
    assert len(engine.tokens(0)) == 0


def test_a_damaged_token_leaves_the_row_as_it_was(saved, base):
    data = bytearray(saved.read_bytes())
    data[data.index(TOKENS.tobytes())] ^= 1
    saved.write_bytes(data)
    engine = fresh(base)
    with pytest.raises(UserError, match="tokens is damaged: its checksum is"):
        prompt_cache.load(saved, engine, WHO)
    assert len(engine.tokens(0)) == 3


def test_a_rehearsal_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "a/b/saved"
    prompt_cache.rehearse(path)
    assert list((tmp_path / "a/b").iterdir()) == []
    path.write_text("kept")
    prompt_cache.rehearse(path)
    assert path.read_text() == "kept" and list(path.parent.iterdir()) == [path]
    monkeypatch.chdir(tmp_path)
    prompt_cache.rehearse("saved")
    assert [x.name for x in tmp_path.iterdir()] == ["a"]
    with pytest.raises(UserError, match="saved: cannot be made: "):
        prompt_cache.rehearse(path / "below")


@pytest.fixture
def asked(monkeypatch):
    """The arguments with which a Session opens its engine, whose context is 7 tokens."""
    found = SimpleNamespace()

    def opened(*paths, **how):
        found.paths, found.how = paths, how
        return SimpleNamespace(engine=SimpleNamespace(cache=SimpleNamespace(limit=7)), tokenizer="tokenizer")

    monkeypatch.setattr(session_, "open_engine", opened)
    monkeypatch.setattr(session_, "choose", lambda device: (f"chosen {device}", "a sentence"))
    monkeypatch.setattr(session_, "find_template", lambda *how: how)
    return found


def test_the_options_of_a_session(asked):
    session = Session("m")
    wanted = dict(context=None, window=None, dtype="auto", cache_dtype="auto", chunk=2048)
    assert asked.paths == ("m", None) and asked.how == wanted | {"device": "chosen auto"}
    assert session.chosen == "a sentence" and session.context == 7
    assert session.template == ("tokenizer", None, None) and session.template is session.template
    session = Session("m", "a", context=9, dtype="d", cache_dtype="c", chat_template="t", device="cpu")
    assert asked.paths == ("m", "a")
    wanted |= dict(context=9, dtype="d", cache_dtype="c", device="chosen cpu")
    assert asked.how == wanted
    assert session.template == ("tokenizer", "t", "a")
    Session("m", streaming=True)
    assert asked.how["window"] == (4, None)
    Session("m", streaming=True, start_size=0, recent_size=5)
    assert asked.how["window"] == (0, 5) and asked.how["context"] is None
    Session("m", start_size=4)


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(streaming=True, context=1), "context and streaming exclude each other"),
        (dict(start_size=3), "start_size and recent_size go with streaming"),
        (dict(recent_size=5), "start_size and recent_size go with streaming"),
    ],
)
def test_options_that_exclude_each_other_open_nothing(asked, how, words):
    with pytest.raises(UserError, match=words):
        Session("m", **how)
    assert not hasattr(asked, "how")


def test_the_arguments_of_an_answer():
    assert check(None, (), top_k=3) == (Sampling(top_k=3), ())
    assert check(1, "ab") == (Sampling(), ["ab"]) and check(None, ["a", "b"])[1] == ["a", "b"]
    for number in (0, True, 1.0):
        words = f"^max_new_tokens should be an integer of at least 1, got {number}$"
        with pytest.raises(UserError, match=words):
            check(number, ())


def test_options_are_split_between_the_session_and_sampling(monkeypatch, tmp_path):
    done = []

    class Made:
        def __init__(self, *paths, **how):
            done.append((*paths, how))

        def load(self, path, **how):
            done.append((path, how))

    monkeypatch.setattr(session_, "Session", Made)
    monkeypatch.setattr(prompt_cache, "rehearse", lambda path: done.append(f"rehearsed {path}"))
    session, sampling = open_session("m", "a", "c", dict(top_k=3, seed=None, context=5))
    assert isinstance(session, Made) and sampling == dict(top_k=3, seed=None)
    assert done == ["rehearsed c", ("m", "a", dict(context=5)), ("c", dict(missing_ok=True))]
    done.clear()
    assert open_session("m", None, None, {})[1] == {} and done == [("m", None, {})]
    with pytest.raises(UserError, match="top_k should be"):
        open_session("m", None, "c", dict(top_k=-1))
    assert len(done) == 1


def test_each_way_to_ask_a_session_passes_all_arguments_on(base, monkeypatch):
    session = Session(base, device="cpu")
    monkeypatch.setattr(session_, "chat_ids", lambda opened, template, messages: np.array(messages))
    session.template, read = None, []
    how = dict(max_new_tokens=5, stop="xy", top_logprobs=2, on_read=read.append, top_k=3, seed=1)
    for call, what in (
        (session.generate, "ab"),
        (session.answer, np.array([97, 98])),
        (session.chat, [97, 98]),
    ):
        answer = call(what, **how)
        request = answer._request
        assert request.prompt.tolist() == [97, 98] and request.sampling == Sampling(top_k=3, seed=1)
        assert (request.max_new_tokens, request.top_logprobs) == (5, 2)
        assert answer._on_read == read.append and answer._stream._stop == ["xy"]
    assert session.held == 0 and session.context == 64


def test_a_missing_file_may_be_allowed(base, tmp_path):
    session = longlora.Session(base, device="cpu")
    "".join(session.generate("abc", max_new_tokens=4))
    assert session.save(tmp_path / "saved") == session.held == 6
    other = longlora.Session(base, device="cpu")
    assert other.load(tmp_path / "missing", missing_ok=True) == 0 and other.held == 0
    with pytest.raises(UserError, match="missing: No such file"):
        other.load(tmp_path / "missing")
    assert other.load(tmp_path / "saved", missing_ok=True) == 6 and other.held == 6
    streaming = longlora.Session(base, streaming=True, device="cpu")
    for call in (streaming.load, streaming.save):
        with pytest.raises(UserError, match="saved: a streaming session forgets what it reads"):
            call(tmp_path / "saved")


def test_load_ends_the_running_answer(base, tmp_path):
    session = longlora.Session(base, device="cpu")
    left = session.generate("abc", max_new_tokens=50)
    next(iter(left))
    with pytest.raises(UserError, match="missing: No such file"):
        session.load(tmp_path / "missing")
    assert not session.opened.engine.busy and left._request.cancelled
