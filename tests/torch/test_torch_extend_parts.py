"""Units of longlora.torch.extend and longlora.torch.positions."""

import json
import sys
from types import SimpleNamespace

import pytest

from longlora.errors import UserError

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="its models are extended")
peft = pytest.importorskip("peft", reason="extend makes a PeftModel")
from torch import nn  # noqa: E402

from longlora.torch import positions  # noqa: E402
from longlora.torch.extend import (  # noqa: E402
    ExtendedModel,
    _decoder,
    _directory,
    _guarded,
    _names,
    _store_as,
    _stored,
    lora_config,
    opened,
)
from longlora.torch.extend import positions as positions_of  # noqa: E402

# ---- what trains ---------------------------------------------------------------------------------


class TinyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.gate_proj, self.scale = nn.Linear(2, 2), nn.Linear(2, 2), nn.Identity()


class TinyMLA(TinyAttention):
    pass


class TinyNorm(nn.Module):
    pass


class NormOfNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Identity()


class Layer(nn.Module):
    def __init__(self, kind=TinyAttention):
        super().__init__()
        self.attn, self.norm, self.mlp, self.outer = kind(), TinyNorm(), nn.Linear(2, 2), NormOfNorms()


class Decoder(nn.Module):
    def __init__(self, kind=TinyAttention):
        super().__init__()
        self.embed, self.layers = nn.Embedding(2, 2), nn.ModuleList([Layer(kind), Layer(kind)])


class Whole(nn.Module):
    def __init__(self, kind=TinyAttention, **config):
        super().__init__()
        self.model, self.config = Decoder(kind), SimpleNamespace(**config)

    def get_input_embeddings(self):
        return self.model.embed


@pytest.mark.parametrize("kind", [TinyAttention, TinyMLA])
def test_the_default_lora_is_the_papers(kind):
    found = lora_config(Whole(kind))
    assert (found.r, found.lora_alpha, found.lora_dropout, found.task_type) == (8, 16, 0.0, "CAUSAL_LM")
    assert found.target_modules == {"gate_proj", "q_proj"} and found.modules_to_save == ["embed", "norm"]
    assert not found.ensure_weight_tying
    changed = lora_config(Whole(kind, tie_word_embeddings=True), r=3, lora_dropout=0.5)
    assert changed.ensure_weight_tying is True and (changed.r, changed.lora_dropout) == (3, 0.5)
    assert not lora_config(Whole(kind, tie_word_embeddings=False)).ensure_weight_tying


def test_indexers_and_experts_are_left_out():
    model = Whole()
    model.model.layers[0].indexer = nn.ModuleDict({"attn": TinyAttention()})
    model.model.layers[0].experts = nn.ParameterDict({"gate_up_proj": nn.Parameter(torch.ones(2))})
    # PEFT would find "q_proj" in the indexer too, so target_modules has whole paths. It takes any gate_proj
    # for a part of the experts.
    names = [f"model.layers.{i}.attn.q_proj" for i in range(2)]
    assert lora_config(model).target_modules == set(names)


def test_a_vision_tower_is_left_out():
    model = Whole()
    model.tower = Layer()
    model.get_decoder = lambda: model.model
    assert _decoder(model) == "model"
    found = lora_config(model)
    assert found.target_modules == {
        f"model.layers.{i}.attn.{name}" for i in range(2) for name in ("q_proj", "gate_proj")
    }
    assert found.modules_to_save == ["embed", "model.layers.0.norm", "model.layers.1.norm"]
    model.get_decoder = lambda: model.tower  # which does not read text
    assert _decoder(model) == ""
    model.get_decoder = lambda: None
    assert _decoder(model) == "" and _decoder(Whole()) == ""


def test_a_model_without_attention_or_norms_is_refused():
    for kind in (nn.Identity, TinyNorm):
        with pytest.raises(UserError, match="extend: no attention linears or no norms in Whole; give lora="):
            lora_config(Whole(kind))
    model = Whole()
    for layer in model.model.layers:
        layer.norm = nn.Identity()
    with pytest.raises(UserError, match="no norms in Whole"):
        lora_config(model)


def test_short_names_only_where_peft_finds_no_other_module():
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Identity()}), "xq": nn.Identity(), "q": nn.Identity()})
    assert _names(model, {"a.q", "q"}, ".") == ["q"]
    assert _names(model, {"a.q", "q"}, "") == ["a.q", "q"]  # "q" would find xq too
    assert _names(model, {"q"}, ".") == ["q"] and _names(model, {"xq", "a.q"}, ".") == ["a.q", "xq"]
    assert _names(model, set(), ".") == []


def tied(wrapped=True, ties=True):
    """A fake PEFT model, its embedding, its head, and a list of the calls of the base's tie_weights."""

    def wrapper():
        copies = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("default", "other")})
        return SimpleNamespace(original_module=nn.Linear(2, 2, bias=False), modules_to_save=copies)

    embedding, head = wrapper(), wrapper() if wrapped else nn.Linear(2, 2)
    asked = []
    base = SimpleNamespace(
        get_input_embeddings=lambda: embedding,
        get_output_embeddings=lambda: head,
        tie_weights=lambda *args, **how: asked.append((args, how)),
        config=SimpleNamespace(tie_word_embeddings=ties),
    )
    return SimpleNamespace(get_base_model=lambda: base), embedding, head, asked


def test_embedding_and_head_stay_tied():
    model, embedding, head, asked = tied()
    ExtendedModel.tie_weights(model)
    assert head.original_module.weight is embedding.original_module.weight and not asked
    for name in ("default", "other"):
        assert head.modules_to_save[name].weight is embedding.modules_to_save[name].weight
    model, embedding, head, asked = tied(ties=False)
    ExtendedModel.tie_weights(model)
    assert head.original_module.weight is not embedding.original_module.weight and not asked
    model, *_, asked = tied(wrapped=False)
    ExtendedModel.tie_weights(model, 1, missing=2)
    assert asked == [((1,), {"missing": 2})]


# ---- files ---------------------------------------------------------------------------------------


def test_the_directory_of_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert _directory("base") == str(tmp_path / "base") and _directory(None) is None
    assert _directory("not/here/at/all") is None
    asked = []
    base = SimpleNamespace(config=SimpleNamespace(_name_or_path=""))  # made from a config alone
    made = SimpleNamespace(get_base_model=lambda: base)
    ExtendedModel._note_base(made)
    assert (made._base, made._base_directory) == (None, None)
    base.config = SimpleNamespace(_name_or_path="base")
    ExtendedModel._note_base(made)
    assert (made._base, made._base_directory) == ("base", str(tmp_path / "base"))

    def cached_file(*args, **how):
        asked.append((args, how))
        return "/cache/model/config.json"

    monkeypatch.setattr(sys.modules["longlora.torch.extend"], "cached_file", cached_file)
    assert _directory("someone/model", "abc") == "/cache/model"
    assert asked == [(("someone/model", "config.json"), dict(revision="abc", local_files_only=True))]


def test_the_quantization_config_of_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _stored(None) is None and _stored(tmp_path / "nowhere") is None
    (tmp_path / "config.json").write_text("{}")
    assert _stored(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    assert _stored(tmp_path) == {"bits": 4}
    config = SimpleNamespace()
    _store_as(config, {"bits": 4})
    assert config.quantization_config == {"bits": 4}
    _store_as(config, None)
    _store_as(config, None)
    assert not hasattr(config, "quantization_config")


def test_arguments_of_from_pretrained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert opened(tmp_path) == (str(tmp_path), {}) and opened("someone/model") == ("someone/model", {})
    (tmp_path / "model.gguf").touch()
    place, how = opened("model.gguf")
    assert place == str(tmp_path) and how["gguf_file"] == "model.gguf"
    if hasattr(transformers, "GgufConfig"):
        assert how["quantization_config"].dequantize is True
    else:
        assert how.keys() == {"gguf_file"}


def test_the_positions_of_an_adapter(tmp_path, monkeypatch):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    transformers.LlamaConfig(max_position_embeddings=64).save_pretrained(base)
    assert positions_of(adapter, str(base), {}) is None
    transformers.LlamaConfig(max_position_embeddings=256).save_pretrained(adapter / "longlora_base")
    found = positions_of(adapter, str(base), {})
    assert found.max_position_embeddings == 256 and not hasattr(found, "quantization_config")
    asked, read = [], transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(
        transformers.AutoConfig,
        "from_pretrained",
        lambda *args, **how: asked.append((args, how)) or read(args[0]),
    )
    where = dict(revision="main", token="t", cache_dir="c", subfolder="s", local_files_only=True)
    positions_of(adapter, str(base), dict(trust_remote_code=True, dtype="float32") | where)
    folder = str(adapter / "longlora_base")
    code = dict(trust_remote_code=True)
    assert asked == [((folder,), code), ((str(base),), code | where)]
    asked.clear()
    positions_of(adapter, str(base), dict(gguf_file="x.gguf"))
    assert asked == [((folder,), dict(trust_remote_code=None))]


def test_the_class_of_a_loaded_model(tmp_path, monkeypatch):
    """AutoModelForCausalLM knows no models that also take images: these are of the class that they name."""
    module, asked = sys.modules["longlora.torch.extend"], []
    (tmp_path / "adapter_config.json").write_text("{}")

    class Opened(Exception):
        pass

    def opens(name):
        def from_pretrained(place, **how):
            asked.append((name, place, how))
            raise Opened

        return SimpleNamespace(from_pretrained=from_pretrained)

    monkeypatch.setattr(module, "opened", lambda base: (f"place of {base}", {"gguf_file": "f"}))
    monkeypatch.setattr(module, "AutoModelForCausalLM", opens("auto"))
    monkeypatch.setattr(module, "transformers", SimpleNamespace(Llava=opens("llava")))
    llama = transformers.LlamaConfig(architectures=["Llava"])
    for config, kind in (
        (None, "auto"),
        (llama, "auto"),
        (SimpleNamespace(architectures=None), "auto"),
        (SimpleNamespace(architectures=["NoSuchClass"]), "auto"),
        (SimpleNamespace(architectures=["Llava"]), "llava"),
    ):
        monkeypatch.setattr(module, "positions", lambda adapter, place, how, found=config: found)
        with pytest.raises(Opened):
            module.load(tmp_path, "base", dtype="float32")
        how = dict(gguf_file="f", dtype="float32", attn_implementation="longlora_s2")
        how |= {} if config is None else dict(config=config)
        assert asked.pop() == (kind, "place of base", how)
    with pytest.raises(UserError, match="nowhere is not the directory of an adapter"):
        module.load("nowhere", "base")


def test_an_adapter_with_longer_positions_is_refused(tmp_path):
    long = transformers.LlamaConfig(max_position_embeddings=4096)
    long.save_pretrained(tmp_path / "longlora_base")
    called = []

    def original(self, *args, **kwargs):
        """Loads."""
        called.append((args, kwargs))
        return "loaded"

    loader = _guarded(original)
    short, same = (SimpleNamespace(config=config) for config in (transformers.LlamaConfig(), long))
    assert loader.__doc__ == "Loads."
    for args, kwargs in (((tmp_path,), {}), ((str(tmp_path),), {}), ((), {"model_id": tmp_path})):
        with pytest.raises(UserError, match="was trained with longer positions than this model has"):
            loader(short, *args, **kwargs)
        assert loader(same, *args, **kwargs) == "loaded" and called.pop() == (args, kwargs)
    with pytest.raises(UserError, match="was trained with longer positions"):
        loader(short, peft_model_id=str(tmp_path))
    for given in ({}, {"model_id": None}, {"model_id": "someone/adapter"}, {"adapter_state_dict": {}}):
        assert loader(short, **given) == "loaded"


# ---- positions -----------------------------------------------------------------------------------


def test_configs_with_the_same_positions():
    def config(**how):
        return transformers.LlamaConfig(**how)

    assert positions.same(config(), config(hidden_size=64))
    assert not positions.same(config(), config(max_position_embeddings=99))
    assert not positions.same(config(), config(rope_theta=5.0))
    linear = dict(rope_type="linear", factor=2.0)
    assert not positions.same(config(), config(rope_scaling={**linear}))
    assert positions.same(config(rope_scaling={**linear}), config(rope_scaling={**linear}))


def test_positions_are_copied():
    rope = dict(rope_type="linear", factor=2.0)
    source = transformers.LlamaConfig(max_position_embeddings=99, hidden_size=64, rope_scaling=rope)
    target = transformers.LlamaConfig()
    positions.write(source, target)
    assert positions.same(source, target) and target.hidden_size != 64
    assert not hasattr(target, "rotary_emb_base") and not hasattr(target, positions.ORIGINAL)
    name = "rope_parameters" if hasattr(target, "rope_parameters") else "rope_scaling"
    assert getattr(source, name) is not getattr(target, name)


class Rotary(nn.Module):
    def __init__(self, config, extra=None):
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", torch.ones(2))
        if extra:
            self.register_buffer(extra, torch.ones(2))


def test_rotary_embeddings_of_the_config():
    config = SimpleNamespace(max_position_embeddings=64)
    model = nn.ModuleDict({"mine": Rotary(config, "original_inv_freq"), "other": Rotary(SimpleNamespace())})
    assert positions._rotary(model, config) == [("mine", model["mine"])]
    words = "extend: ModuleDict has no rotary embedding that follows its config, so its positions"
    for wrong in ({}, {"max_position_embeddings": None}, {"max_position_embeddings": 64, "alibi": True}):
        wrong = SimpleNamespace(**wrong)
        with pytest.raises(UserError, match=words):
            positions._rotary(nn.ModuleDict({"mine": Rotary(wrong)}), wrong)
    with pytest.raises(UserError, match=words):
        positions._rotary(nn.ModuleDict({"other": Rotary(None)}), config)
    model["mine"] = Rotary(config, "local_inv_freq")
    with pytest.raises(UserError, match="extend: mine of ModuleDict has positions for each kind of layer"):
        positions._rotary(model, config)


def test_the_partial_rotary_factor_is_removed_from_a_copy():
    partial = "partial_rotary_factor"
    before = {
        "a": 1,
        partial: 0.5,
        "rope_parameters": {partial: 0.25, "b": 2},
        "rope_scaling": {partial: 0.1},
    }
    raw, factor = positions._without_partial(before)
    assert raw == {"a": 1, "rope_parameters": {"b": 2}, "rope_scaling": {}} and factor == 0.25
    assert before["rope_parameters"] == {partial: 0.25, "b": 2} and before[partial] == 0.5
    assert positions._without_partial({partial: 0.5, "rope_scaling": None}) == ({"rope_scaling": None}, 0.5)
    assert positions._without_partial({"rope_scaling": {partial: 0.1}}) == ({"rope_scaling": {}}, None)
    assert positions._without_partial({"rope_parameters": None}) == ({"rope_parameters": None}, None)


class Config(SimpleNamespace):
    """A config of 64 positions with heads of 4 dimensions, as transformers 5 has it."""

    def __init__(self, **more):
        super().__init__(**{"model_type": "llama", "max_position_embeddings": 64, **more})

    def to_dict(self):
        return dict(vars(self))


def test_parameters_of_other_rules_are_kept():
    """A model of pictures has sections there, and some families scale queries by a length."""
    rotary = SimpleNamespace(inv_freq=torch.ones(2))
    own = {"rope_type": "default", "rope_theta": 5.0, "sections": [1, 1], "partial_rotary_factor": 0.5}
    extended, sentence = positions._extended(Config(rope_parameters=own), rotary, "linear", 256)
    assert extended.rope_parameters == own | {"rope_type": "linear", "factor": 4.0}
    assert sentence == "rope: linear, factor ceil(256 / 64) = 4"
    assert (extended.max_position_embeddings, extended.original_max_position_embeddings) == (256, 64)
    own = {"rope_theta": 5.0, positions.ORIGINAL: 32}
    extended, _ = positions._extended(Config(rope_parameters=own), rotary, "linear", 256)
    assert extended.rope_parameters == own | {"rope_type": "linear", "factor": 8.0}
    extended, _ = positions._extended(Config(rope_parameters=None, rope_theta=5.0), rotary, "linear", 128)
    assert extended.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}


def test_config_fields_of_linear_interpolation():
    old = SimpleNamespace(rope_scaling={"type": "linear", "factor": 4.0, "rope_type": "linear"})
    assert list(positions._linear_words(old, 2)) == [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "longrope", "short_factor": [4.0] * 2, "long_factor": [4.0] * 2}},
    ]
    usual = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0}
    new = SimpleNamespace(rope_parameters=usual, original_max_position_embeddings=64)
    words = {"rope_type": "longrope", "short_factor": [4.0] * 3, "long_factor": [4.0] * 3}
    kept = {"rope_theta": 5.0, "original_max_position_embeddings": 64}
    assert list(positions._linear_words(new, 3)) == [{"rope_parameters": kept | words}]


def test_equal_rotary_embeddings():
    def made(values, **more):
        return SimpleNamespace(inv_freq=torch.tensor(values), **more)

    assert positions._equal(made([1.0, 2.0]), made([1.0, 2.0]))
    assert positions._equal(made([1.0]), made([1.0], attention_scaling=1.0))
    assert not positions._equal(made([1.0, 2.0]), made([1.0, 3.0]))
    assert not positions._equal(made([1.0]), made([1.0, 1.0]))
    assert not positions._equal(made([1.0], attention_scaling=2.0), made([1.0]))
    assert not positions._equal(made([1.0]), made([1.0], attention_scaling=2.0))


def test_an_unsupported_rope_type_is_named():
    class Refusing(Rotary):
        def __init__(self, config):
            if config:
                raise config
            super().__init__(config)

    rotary = Refusing(None)
    assert type(positions._follower(rotary, None, "yarn")) is Refusing
    for error in (ValueError("one\n two \n"), KeyError("two")):
        with pytest.raises(UserError, match="extend: rope type yarn is not possible here: '?two'?$"):
            positions._follower(rotary, error, "yarn")
    meta = positions._follower(Refusing(None).to("meta"), None, "yarn")
    assert meta.inv_freq.is_meta
