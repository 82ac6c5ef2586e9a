"""The options with which a model is opened and served: their defaults, effects and limits."""

import json
import socket
from types import SimpleNamespace

import pytest
import tiny

import longlora
from longlora.decoder.streaming import Window
from longlora.errors import UserError
from longlora.serving import listen, serve, server
from longlora.serving import open as opening
from longlora.serving.open import Prepared, end_tokens, open_engine, prepare


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("opening") / "base")


def test_the_defaults_of_a_plan(base):
    made = prepare(base)
    planned = made.planned
    assert (planned.rows, planned.context, planned.device) == (1, 64, "cpu")
    assert (planned.dtype, planned.cache_dtype, made.size) == ("float32", "float32", 64)
    assert made.identity == {
        "model": made.base.fingerprint(),
        "adapter": "none",
        "dtype": "float32",
        "cache_dtype": "float32",
    }
    assert made.weights is made.base and made.config is made.base.config


def test_the_options_of_a_plan(base, monkeypatch):
    given, real = {}, opening.plan

    def plan(config, **how):
        given.update(how)
        return real(config, **{**how, "device": "cpu", "memory": None})

    monkeypatch.setattr(opening, "plan", plan)
    options = dict(dtype="bfloat16", cache_dtype="float16", chunk=7, device="cuda:1", memory=1 << 40)
    made = prepare(base, context=9, rows=3, **options)
    assert given == dict(context=9, rows=3, **options)
    assert made.identity["dtype"] == "bfloat16" and made.identity["cache_dtype"] == "float16"
    assert prepare(base, dtype="float16").planned.cache_dtype == "float16"


@pytest.mark.parametrize(
    "positions, window, size",
    [
        (64, (4, None), Window(4, 60)),
        (64, (4, 7), Window(4, 7)),
        (64, (0, 100), Window(0, 100)),
        (8197, (4, None), Window(4, 8192)),
        (8195, (4, None), Window(4, 8191)),
    ],
)
def test_the_window_of_a_streaming_session(tmp_path, base, positions, window, size):
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(base / name)
    config = {**json.loads((base / "config.json").read_text()), "max_position_embeddings": positions}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert prepare(tmp_path, window=window).size == size


@pytest.mark.parametrize(
    "rows, fewest, most, tried",
    [
        (9, 1, 9, [9]),
        (9, 1, 8, [9, 4]),
        (9, 3, 3, [9, 4, 3]),
        (9, 3, 2, [9, 4, 3, None]),
        (8, 1, 1, [8, 4, 2, 1]),
        (8, 0, 0, [8, 4, 2, 1, 0]),
        (3, None, 2, [3, None]),
        (3, 3, 2, [3, None]),
    ],
)
def test_rows_are_halved_where_memory_is_short(base, monkeypatch, rows, fewest, most, tried):
    """`most` rows fit. A None at the end of `tried` stands for the error."""

    def plan(config, rows, **_):
        found.append(rows)
        sizes = dict(total=3 << 29, memory=1 << 30, changes=("this", "that"))
        return SimpleNamespace(rows=rows, fits=rows <= most, context=64, cache_dtype="float32", **sizes)

    found = []
    monkeypatch.setattr(opening, "plan", plan)
    try:
        assert prepare(base, rows=rows, fewest_rows=fewest).planned.rows == found[-1]
    except UserError as error:
        words = (
            f"the model does not fit in memory: with {found[-1]} x 64 tokens it needs 1.50 GiB, 1.00 GiB are"
        )
        assert str(error).startswith(words) and str(error).endswith("fit: this; that")
        found.append(None)
    assert found == tried


@pytest.mark.parametrize("name", ["dtype", "cache_dtype"])
def test_an_unknown_dtype_is_named(base, name):
    words = f"^{name} should be one of auto, float32, bfloat16, float16, got 'int8'$"
    with pytest.raises(UserError, match=words):
        prepare(base, **{name: "int8"})


def test_a_context_that_is_too_long_gets_a_warning(base, capsys):
    prepare(base, context=64)
    prepare(base, context=65, warns=False)
    assert capsys.readouterr().err == ""
    prepare(base, context=65)
    said = capsys.readouterr().err
    assert said.startswith(
        "warning: a context of 65 tokens is longer than the 64 that the model was made for"
    )
    assert said.endswith(")\n")


@pytest.mark.parametrize("size", [9, Window(4, 5)])
def test_model_and_cache_go_to_the_planned_device(monkeypatch, size):
    """No GPU is needed: the fakes record the device and the dtypes that they are given."""
    made = {}

    class Model:
        def __init__(self, config, **how):
            made["model"] = (config, how)

        def load(self, weights):
            made["weights"] = weights
            return "loaded"

    monkeypatch.setattr(opening, "Model", Model)
    monkeypatch.setattr(opening, "Cache", lambda *how: ("cache", *how))
    monkeypatch.setattr(opening, "StreamingCache", lambda *how: ("streaming", *how))
    monkeypatch.setattr(opening, "Engine", lambda *made, chunk: (*made, chunk))
    monkeypatch.setattr(opening, "end_tokens", lambda base, tokenizer: (base, tokenizer))
    base, config = SimpleNamespace(tokenizer=lambda: "tokenizer"), SimpleNamespace(rope="rope")
    planned = SimpleNamespace(dtype="float16", cache_dtype="bfloat16", device="cuda:1", rows=3)
    opened = Prepared(base, config, "weights", size, 7, planned, {"a": "b"}).load()
    assert made == dict(model=(config, dict(dtype="float16", device="cuda:1")), weights="weights")
    kind = ("bfloat16", "cuda:1")
    cache = ("cache", config, 3, 9, *kind) if size == 9 else ("streaming", config, size, "rope", *kind)
    assert opened.engine == ("loaded", cache, 7) and opened.end == (base, "tokenizer")
    assert (opened.tokenizer, opened.config, opened.base) == ("tokenizer", config, base)
    assert opened.identity == {"a": "b"}


def test_an_engine_has_the_rows_and_the_context_of_its_options(base):
    opened = open_engine(base, rows=2, context=9)
    assert opened.engine.cache.rows == 2 and opened.engine.cache.places == 9 and opened.end == {256}


@pytest.mark.parametrize(
    "generation, config, tokenizer, end",
    [
        (5, 6, 7, {5}),
        ([5, 8], 6, 7, {5, 8}),
        (0, 6, 7, {0}),
        (None, 6, 7, {6, 7}),
        ("absent", 6, 7, {6, 7}),
        ("absent", [6, 9], None, {6, 9}),
        ("absent", None, 7, {7}),
        ([5, -1, None, "x"], 6, 7, {5}),
        ("absent", None, None, set()),
    ],
)
def test_which_tokens_end_an_answer(tmp_path, generation, config, tokenizer, end):
    """Those of generation_config.json, as in transformers; without it, those of config and tokenizer."""
    if generation != "absent":
        (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=generation)))
    base = SimpleNamespace(path=str(tmp_path), config=SimpleNamespace(raw=dict(eos_token_id=config)))
    assert end_tokens(base, SimpleNamespace(eos_token_id=tokenizer)) == end


@pytest.fixture
def run(base, monkeypatch):
    """A function that calls longlora.serve without serving, and returns what its parts were given."""

    def called(**how):
        found = SimpleNamespace()
        bind, open_, service = listen.bind, serve.open_engine, server.Service

        def ready(made):
            made.stop()

        def bound(*where):
            found.where = where
            return bind("127.0.0.1", 0)

        def opened(*paths, **how):
            found.paths, found.how = paths, how
            return open_(*paths[:1], **how)

        def made(*parts, **more):
            found.parts, found.more = parts, more
            found.service = service(*parts, **more)
            return found.service

        def run(made):
            found.url = made.url
            found.listens = made._bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            made._drain.__self__._thread.join(60)
            found.idle = made._idle()

        def choose(device):
            found.device = device
            return "cpu", "the CPU"

        with monkeypatch.context() as patch:
            patch.setattr(listen, "bind", bound)
            patch.setattr(serve, "open_engine", opened)
            patch.setattr(serve, "choose", choose)
            patch.setattr(server, "Service", made)
            patch.setattr(listen.Server, "run", run)
            longlora.serve(base, ready=ready, **how)
        return found

    monkeypatch.delenv("LONGLORA_API_KEY", raising=False)
    return called


def test_the_defaults_of_a_server(run, base, capsys):
    found = run()
    assert found.where == ("127.0.0.1", 8000) and found.paths == (base, None) and found.device == "auto"
    assert found.how == dict(context=None, rows=4, dtype="auto", cache_dtype="auto", device="cpu")
    opened, template, limits, key, origins = found.parts
    assert (limits.model, limits.context, limits.choices, limits.tokens) == ("base", 64, 68, None)
    assert limits.defaults == {"temperature": 1.0} and opened.engine.queue == 64
    assert key is None and origins == [] and found.more == dict(any_host=False)
    assert found.listens and found.idle and "[INST]" in template.source  # the format of LLaMA-2-chat
    url = found.url
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines() == [
        "the CPU; base: 4 answers at a time, a context of 64 tokens each",
        f"{url} has the page, {url}/v1 is the base URL of the API",
    ]


def test_the_options_of_a_server(run, tmp_path, capsys):
    (tmp_path / "t.jinja").write_text("a template")
    found = run(
        adapter=tmp_path,
        host="0.0.0.0",
        port=7,
        rows=2,
        queue=3,
        cors_origin=["*", "https://site.example"],
        max_new_tokens=5,
        context=9,
        dtype="bfloat16",
        cache_dtype="float16",
        chat_template=tmp_path / "t.jinja",
        device="cpu",
        top_k=8,
        temperature=0.5,
    )
    assert found.where == ("0.0.0.0", 7) and found.paths[1] == tmp_path and found.device == "cpu"
    assert found.how == dict(context=9, rows=2, dtype="bfloat16", cache_dtype="float16", device="cpu")
    opened, template, limits, _, origins = found.parts
    assert (limits.model, limits.context, limits.choices, limits.tokens) == (tmp_path.name, 9, 5, 5)
    assert limits.defaults == dict(temperature=0.5, top_k=8)
    assert opened.engine.queue == 3 and template.source == "a template"
    assert origins == ["*", "https://site.example"] and found.more == dict(any_host=True)
    assert "warning: whoever reaches this machine can use the server" in capsys.readouterr().err
    named = run(host="0.0.0.0", api_key="secret", served_model_name="x/y")
    assert named.parts[2].model == "x/y" and named.parts[3] == "secret"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("host, local", [("::1", True), ("localhost", True), ("10.1.2.3", False)])
def test_a_host_that_others_can_reach_gets_a_warning(run, host, local, capsys):
    assert run(host=host).more == dict(any_host=not local)
    assert ("warning" in capsys.readouterr().err) is not local


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(rows=0), "^rows should be an integer of at least 1, got 0$"),
        (dict(rows=True), "^rows should be an integer of at least 1, got True$"),
        (dict(queue=-1), "^queue should be an integer of at least 0, got -1$"),
        (dict(max_new_tokens=0), "^max_new_tokens should be an integer of at least 1, got 0$"),
        (dict(max_new_tokens=1.0), "^max_new_tokens should be an integer of at least 1, got 1.0$"),
        (dict(top_k=-1), "^top_k should be an integer from 0"),
        *((dict(api_key=key), "^the API key should be") for key in ("", " a", "a ", "a\nb", "\u00e9")),
        *((dict(cors_origin=[site]), "^cors_origin should be") for site in ("", "a", "http://", "http://a/")),
        *((dict(cors_origin=[site]), "^cors_origin should be") for site in ("**", "http://a b", "1a://b")),
    ],
)
def test_wrong_options_are_refused_before_anything_is_opened(how, words, monkeypatch):
    monkeypatch.setattr(listen, "bind", None)
    with pytest.raises(UserError, match=words):
        longlora.serve("no model", **how)


def test_options_that_are_accepted(monkeypatch):
    serve._check(1, 0, 1)  # which raises nothing
    serve._check(1, 0, None)
    monkeypatch.setenv("LONGLORA_API_KEY", "of the environment")
    assert serve._key(None) == "of the environment" and serve._key("a b~!") == "a b~!"
    monkeypatch.delenv("LONGLORA_API_KEY")
    assert serve._key(None) is None
    for site in ("*", "https://a.example:80", "chrome-extension://abc", "a+b.c-1://x"):
        assert serve._origin(site) == site
