"""The files of an adapter: what saving writes, and what loading reads, ignores and refuses."""

import json
import os

import ml_dtypes
import numpy as np
import peft
import pytest
import tiny
from adapter_small import CONFIG, NORM, QUERY, SHAPES, SMALL, WEIGHTS, described, numbers, written
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_adapter_fields import INITIAL, READ, SAID

from longlora.decoder import rope
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.files import adapter
from longlora.files.open_model import open_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def extended(base):
    """The config of a base whose positions are extended to 256."""
    return rope.to_config(base.config.raw, rope.extend(base.config, "linear", 256)[0], 256)


# ---- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_fields_of_a_saved_adapter(tmp_path, longer, tied):
    base = open_model(tiny.model(tmp_path / "base", tie_word_embeddings=tied))
    lora = LoraConfig(r=2, lora_alpha=7.5, target_modules=("q_proj",), modules_to_save=("embed_tokens",))
    raw = extended(base) if longer else base.config.raw
    adapter.save(tmp_path / "a", numbers(lora.tensor_shapes(base.config)), lora, base, raw)
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "base"),
        "r": 2,
        "lora_alpha": 7.5,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"] if tied else ["embed_tokens"],
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "revision": None,
        "ensure_weight_tying": tied,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if longer:
        wanted["base_model_name_or_path"] = str(tmp_path / "a" / "longlora_base")
        wanted["needs_the_positions_in_its_folder_longlora_base"] = str(tmp_path / "base")
    text = (tmp_path / "a" / CONFIG).read_text()
    assert text == json.dumps(wanted, indent=2, sort_keys=True) + "\n"
    assert sorted(os.listdir(tmp_path / "a")) == ["README.md", CONFIG, WEIGHTS] + ["longlora_base"] * longer
    card = (tmp_path / "a" / "README.md").read_text()
    assert ("The longer positions are in the folder `longlora_base`" in card) is longer
    assert f"A context of {256 if longer else 64} tokens" in card and "~" not in card


@pytest.mark.parametrize(
    "modules, tied, whole, said",
    [
        ((), False, [], None),
        ((), True, [], None),
        (("model.norm",), True, [NORM], ["model.norm"]),
        (("embed_tokens",), False, [EMBEDDING], ["embed_tokens"]),
        (("lm_head",), False, [HEAD], ["lm_head"]),
        (("embed_tokens",), True, [EMBEDDING, HEAD], ["embed_tokens", "lm_head"]),
        (("lm_head", "model.norm"), True, [EMBEDDING, HEAD, NORM], ["lm_head", "model.norm", "embed_tokens"]),
    ],
)
def test_an_embedding_that_is_also_the_head_is_saved_twice(tmp_path, modules, tied, whole, said):
    base = open_model(tiny.model(tmp_path / "base", tie_word_embeddings=tied))
    lora = LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=modules)
    tensors = numbers(lora.tensor_shapes(base.config))
    adapter.save(tmp_path / "a", tensors, lora, base, base.config.raw)
    found = load_file(tmp_path / "a" / WEIGHTS)
    names = [QUERY.format(layer, side) for layer in (0, 1) for side in "AB"] + whole
    assert sorted(found) == sorted(f"base_model.model.{name}" for name in names)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[f"base_model.model.{name}"], array)
    if HEAD in whole and tied:
        np.testing.assert_array_equal(found[f"base_model.model.{HEAD}"], tensors[EMBEDDING])
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (fields["modules_to_save"], fields["ensure_weight_tying"]) == (said, HEAD in whole and tied)
    lora, again, raw = adapter.load(tmp_path / "a", base)
    assert again.keys() == tensors.keys() and raw is None and lora.r == 2


def test_the_metadata_of_the_weights(tmp_path):
    """transformers refuses weights without a format."""
    base = open_model(tiny.model(tmp_path / "base"))
    adapter.save(tmp_path / "a", numbers(), SMALL, base, base.config.raw)
    with safe_open(tmp_path / "a" / WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt", "longlora_base": base.fingerprint()}


def test_saving_without_tensors_writes_all_other_files(tmp_path):
    base = open_model(tiny.model(tmp_path / "base"))
    home = tmp_path / "home"
    adapter.save(tmp_path / "a", None, SMALL, base, extended(base), base.tokenizer(), home)
    names = ["README.md", CONFIG, "longlora_base", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path / "a")) == names
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert fields["base_model_name_or_path"] == str(home / "longlora_base") and not home.exists()
    config = json.loads((tmp_path / "a" / "longlora_base" / "config.json").read_text())
    assert config["max_position_embeddings"] == 256
    tokenizer = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert tokenizer == {"eos_token": "<|end|>"}


def test_saving_refuses_missing_tensors_and_a_path_that_is_a_file(tmp_path):
    base = open_model(tiny.model(tmp_path / "base"))
    tensors = {name: array for name, array in numbers().items() if name != NORM}
    with pytest.raises(UserError, match="^tensors: 1 tensors of the adapter are missing: model.norm.weight$"):
        adapter.save(tmp_path / "a", tensors, SMALL, base, base.config.raw)
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").write_text("mine")
    with pytest.raises(UserError, match="a: cannot be made: File exists"):
        adapter.save(tmp_path / "a", numbers(), SMALL, base, base.config.raw)


# ---- the fields that are read --------------------------------------------------------------------


FREE = {*READ, *SAID, *INITIAL, "needs_the_positions_in_its_folder_longlora_base"}
FREE -= {
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "modules_to_save",
    "peft_type",
    "init_lora_weights",
}
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@pytest.mark.parametrize(
    "cases",
    [
        [{name: {"a": 1}} for name in sorted(FREE)],
        [{"next_year": value} for value in (None, False, "", "none", [], {})],
        [{"init_lora_weights": value} for value in INITIALISATIONS],
    ],
    ids=["origin", "unknown and off", "initialisation"],
)
def test_fields_that_do_not_change_what_is_computed_are_ignored(tmp_path, cases):
    for fields in cases:
        assert adapter.read_lora(described(tmp_path, **fields)) == SMALL, fields


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, "x", "None", [0], {"a": 0}])
def test_an_unknown_field_that_is_not_off_is_refused(tmp_path, value):
    with pytest.raises(UserError) as error:
        adapter.read_lora(described(tmp_path, next_year=value))
    said = f"next_year {value!r} is not supported; supported is an adapter without it"
    assert str(error.value) == f"{tmp_path / CONFIG}: {said}"


def test_missing_fields_and_null_have_the_defaults_of_peft(tmp_path):
    theirs = peft.LoraConfig()
    for value in (..., None):
        names = ("r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save")
        ours = adapter.read_lora(described(tmp_path, **dict.fromkeys(names, value)))
        assert (ours.r, ours.lora_alpha, ours.use_rslora) == (theirs.r, theirs.lora_alpha, theirs.use_rslora)
        assert (ours.target_modules, ours.modules_to_save) == ((), ())
    assert adapter.read_lora(described(tmp_path, use_rslora=True)).scale == 8 / 2**0.5


def test_full_names_of_modules_are_shortened(tmp_path):
    targets = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    whole = ["model.embed_tokens", "embed_tokens", "model.norm", "norm"]
    lora = adapter.read_lora(described(tmp_path, target_modules=targets, modules_to_save=whole))
    assert lora.target_modules == ("q_proj", "v_proj")
    assert lora.modules_to_save == ("embed_tokens", "model.norm", "norm")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(peft_type="IA3"), "peft_type 'IA3' is not supported; supported is LORA"),
        (dict(peft_type=...), "peft_type None is not supported; supported is LORA"),
        (dict(init_lora_weights="pissa"), "init_lora_weights 'pissa' changes the base model's weights"),
        (dict(r=0), "r should be an integer above 0, got 0"),
        (dict(target_modules=["q_proj", 3]), r"target_modules should be a list of .*, got \['q_proj', 3\]"),
        (dict(target_modules="q_proj"), "target_modules should be a list of .*, got 'q_proj'"),
        (dict(modules_to_save="norm"), "modules_to_save should be a list of .*, got 'norm'"),
        (dict(modules_to_save=["model.layers.0.norm"]), "modules_to_save should be a list of"),
        (dict(target_modules=["layers.0.q_proj"]), "target_modules should be a list of"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path, fields, message):
    with pytest.raises(UserError, match=f"^{tmp_path / CONFIG}: {message}"):
        adapter.read_lora(described(tmp_path, **fields))


def test_a_directory_without_an_adapter_is_named(tmp_path):
    (tmp_path / "checkpoint-x").mkdir()
    for name in ("", "checkpoint-x"):
        with pytest.raises(UserError) as error:
            adapter.read_lora(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: is not an adapter: it has no {CONFIG}"
    with pytest.raises(UserError, match="gone: no such directory"):
        adapter.read_lora(tmp_path / "gone")
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match=f"{CONFIG}; a run was stopped here, its newest .*/checkpoint-3$"):
        adapter.read_lora(tmp_path)


# ---- the base of an adapter ----------------------------------------------------------------------


def placed(path, base, **fields):
    """Put a config.json with the positions beside the adapter, as longlora 0.1.0 did."""
    (path / "config.json").write_text(json.dumps(extended(base) | fields))
    return path


def test_describe_needs_no_base(tmp_path):
    base = open_model(tiny.model(tmp_path / "base"))
    whole = ["embed_tokens", "lm_head", "model.norm"]
    path = described(tmp_path / "a", modules_to_save=whole)
    lora, raw = adapter.describe(path)
    assert (list(lora.modules_to_save), raw) == (whole, None)
    lora, raw = adapter.describe(placed(path, base, quantization_config={"quant_method": "gguf"}))
    assert raw == extended(base) and lora.modules_to_save == ("embed_tokens", "model.norm")
    assert adapter.describe(path, base.config, base.path) == (lora, raw)


@pytest.mark.parametrize(
    "tied, modules, kept",
    [
        (True, ["lm_head", "embed_tokens"], ("embed_tokens",)),
        (True, ["lm_head"], ("lm_head",)),
        (False, ["lm_head", "embed_tokens"], ("lm_head", "embed_tokens")),
    ],
)
def test_a_tied_head_is_dropped_beside_the_embedding(tmp_path, tied, modules, kept):
    config = read_config(tiny.CONFIG | dict(tie_word_embeddings=tied))
    lora, _ = adapter.describe(described(tmp_path, modules_to_save=modules), config, "base")
    assert lora.modules_to_save == kept


def test_an_adapter_for_a_base_of_other_shapes_is_refused(tmp_path):
    base = open_model(tiny.model(tmp_path / "base"))
    path = placed(written(tmp_path / "a"), base, vocab_size=261)
    said = "is an adapter for a base model other than .*/base: its config has other shapes"
    for call in (lambda: adapter.describe(path, base.config, base.path), lambda: adapter.load(path, base)):
        with pytest.raises(UserError, match=f"^{path}: {said}$"):
            call()
    assert adapter.describe(path)[1]["vocab_size"] == 261


def test_a_linear_that_the_base_does_not_have_is_named_with_the_file(tmp_path):
    path, config = described(tmp_path, target_modules=["qkv_proj"]), read_config(tiny.CONFIG)
    with pytest.raises(
        UserError, match=f"^{tmp_path / CONFIG}: target_modules: a llama model has no qkv_proj"
    ):
        adapter.describe(path, config)


@pytest.mark.parametrize("says", [None, "own", "other"])
def test_the_fingerprint_of_the_base_is_checked_if_the_file_has_it(tmp_path, says):
    base = open_model(tiny.model(tmp_path / "base"))
    metadata = {"longlora_base": base.fingerprint() if says == "own" else "0"} if says else {}
    path = written(tmp_path / "a", metadata={"format": "pt", **metadata})
    assert adapter.load(path)[1].keys() == SHAPES.keys()
    if says != "other":
        assert adapter.load(path, base)[1].keys() == SHAPES.keys()
        return
    with pytest.raises(UserError, match=f"^{path}: is an adapter for a base model other than {base.path}$"):
        adapter.load(path, base)


# ---- the tensors that are read -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_tensors_of_any_float_dtype_become_float32(tmp_path, dtype):
    base = open_model(tiny.model(tmp_path / "base"))
    path = written(tmp_path / "a", numbers(dtype=getattr(ml_dtypes, dtype, dtype)))
    for given in (None, base):
        lora, tensors, raw = adapter.load(path, given)
        assert lora == SMALL and raw is None and tensors.keys() == SHAPES.keys()
        for name, array in numbers().items():
            assert tensors[name].dtype == np.float32
            np.testing.assert_array_equal(tensors[name], array)


FIRST = QUERY.format(0, "A")


@pytest.mark.parametrize(
    "change, message, alone",
    [
        (lambda t: t.pop(FIRST), f"1 tensors of the adapter are missing: {FIRST}$", False),
        (
            lambda t: t.update({"x.weight": t[NORM]}),
            "1 tensors do not belong to this adapter: x.weight$",
            False,
        ),
        (lambda t: t.update({NORM: t[FIRST]}), rf"{NORM} should have shape \[32\], got \[2, 32\]$", False),
        (lambda t: t[NORM].__setitem__(31, np.inf), f"{NORM} is not finite$", True),
        (
            lambda t: t.update({NORM: t[NORM].astype(np.int32)}),
            f"{NORM} has dtype int32; supported are floating-point numbers$",
            True,
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(tmp_path, change, message, alone):
    """alone: whether it is found without a config, which determines names and shapes."""
    base, tensors = open_model(tiny.model(tmp_path / "base")), numbers()
    change(tensors)
    path = written(tmp_path / "a", tensors)
    wrong = pytest.raises(UserError, match=f"^{path / WEIGHTS}: (base_model.model.)?{message}")
    if alone:
        with wrong:
            adapter.load(path)
    else:
        assert adapter.load(path)[1].keys() == tensors.keys()
    for given in (base, None):
        with wrong:
            adapter.load(placed(path, base), given)


def test_tensors_without_the_prefix_of_peft_are_counted(tmp_path):
    path = written(tmp_path)
    save_file(numbers({f"{i}.weight": (1,) for i in range(5)}), path / WEIGHTS)
    said = "5 tensors lack PEFT's prefix 'base_model.model.': 0.weight, 1.weight, 2.weight, ...$"
    with pytest.raises(UserError, match=f"^{path / WEIGHTS}: {said}"):
        adapter.load(path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("has", ["embedding", "head", "both", "two", "none"])
def test_an_adapter_of_a_tied_base_must_have_embedding_and_head_alike(tmp_path, tied, has):
    base = open_model(tiny.model(tmp_path / "base", tie_word_embeddings=tied))
    table = numbers({EMBEDDING: (260, 32)})[EMBEDDING]
    both = {EMBEDDING: table, HEAD: table + (has == "two")}
    given = {
        name: both[name] for name in {"embedding": [EMBEDDING], "head": [HEAD], "none": []}.get(has, both)
    }
    modules = [name.split(".")[-2] for name in given]
    path = written(tmp_path / "a", {**numbers(), **given}, modules_to_save=["model.norm", *modules])
    if tied and has in ("embedding", "head", "two"):
        said = "ties its head to the embedding, but this adapter was trained without ensure_weight_tying"
        with pytest.raises(UserError, match=f"^{path / WEIGHTS}: the base model {said}"):
            adapter.load(path, base)
        return
    _, tensors, _ = adapter.load(path, base)
    assert tensors.keys() == {*SHAPES, *given} - ({HEAD} if tied else set())


def test_a_fingerprint_covers_fields_tensors_and_config():
    config = read_config(tiny.CONFIG)
    one = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    same = {"b": one["b"].copy(), "a": np.asfortranarray(one["a"])}
    given = [
        (SMALL, one, config),
        (LoraConfig(r=2, lora_alpha=4), one, config),
        (SMALL, one, read_config(tiny.CONFIG | dict(max_position_embeddings=128))),
        (SMALL, one, read_config(tiny.CONFIG | dict(rope_theta=2000.0))),
        (SMALL, one | {"a": one["a"].reshape(3, 2)}, config),
        (SMALL, one | {"b": np.array([1, 2], np.float32)}, config),
        (SMALL, {"a": one["a"], "c": one["b"]}, config),
    ]
    found = [adapter.fingerprint(*case) for case in given]
    assert len(set(found)) == len(given) and found[0] == adapter.fingerprint(SMALL, same, config)
    assert {len(bytes.fromhex(text)) for text in found} == {32}
