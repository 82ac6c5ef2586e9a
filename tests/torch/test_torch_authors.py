"""Files as the authors' scripts write them, made with torch.save: they are imported, and faults in them are
named."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from longlora.decoder.lora import LoraConfig
from longlora.errors import UserError
from longlora.evaluation import ppl
from longlora.files import adapter
from longlora.files.open_model import open_model

torch = pytest.importorskip("torch", reason="what the authors wrote is torch's")
pytest.importorskip("peft", reason="PEFT loads what is imported")
authors = pytest.importorskip("longlora.torch.authors", reason="the importer needs torch")

# adapter_config.json as the PEFT of 2023 wrote it.
CONFIG = {
    "auto_mapping": None,
    "base_model_name_or_path": "Llama-2-7b-hf",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "revision": None,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "task_type": "CAUSAL_LM",
}


def left_by_them(tmp_path, rows=0, dtype=torch.bfloat16, change=None, **fields):
    """A base and the directory of a run on it -> (base, directory, float32 tensors by our names)."""
    base = tiny.model(tmp_path / "base", **fields)
    config = open_model(base).config
    random = np.random.default_rng(1)
    tensors = {
        name: random.standard_normal(shape).astype(np.float32) * 0.1 + np.float32(len(shape) == 1)
        for name, shape in LoraConfig().tensor_shapes(config).items()
    }
    if rows:
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = np.concatenate(
            [table, np.ones((rows, table.shape[1]), np.float32)]
        )
    tensors = {name: torch.from_numpy(array).to(dtype) for name, array in tensors.items()}
    lora = {adapter.PREFIX + name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    whole = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    described = dict(CONFIG)
    if change:
        change(lora, whole, described)
    directory = tmp_path / "theirs"
    directory.mkdir()
    torch.save(lora, directory / "adapter_model.bin")
    torch.save(whole, directory / "trainable_params.bin")
    (directory / "adapter_config.json").write_text(json.dumps(described))
    return base, directory, {name: tensor.float().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_theirs_becomes_one_of_ours(tmp_path, tied, capsys):
    base, directory, tensors = left_by_them(tmp_path, tie_word_embeddings=tied)
    assert (
        authors.main([str(directory), str(tmp_path / "ours"), "--model", str(base), "--target-length", "256"])
        == 0
    )
    assert "factor ceil(256 / 64) = 4" in capsys.readouterr().out
    lora, found, raw = adapter.load(tmp_path / "ours", open_model(base))
    assert lora == LoraConfig() and found.keys() == tensors.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], tensors[name], name)
    assert raw["rope_scaling"]["factor"] == 4 and raw["max_position_embeddings"] == 256

    # The authors' own way: base, then trainable_params.bin by load_state_dict, then PEFT's adapter merged.
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tmp_path / "ours" / "longlora_base")
    theirs = AutoModelForCausalLM.from_pretrained(base, config=config)
    theirs.load_state_dict(torch.load(directory / "trainable_params.bin", weights_only=True), strict=False)
    theirs = PeftModel.from_pretrained(theirs, directory).merge_and_unload().eval()
    ours = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, config=config), tmp_path / "ours"
    ).eval()
    ids = torch.arange(200)[None] % 250
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids).logits
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    made, _ = ppl.open_for_evaluation(base, tmp_path / "ours")
    assert (
        np.abs(made.logits(ids[0].numpy().astype(np.int32)) - want[0].numpy()).max()
        <= 1e-4 * want.abs().max()
    )


def test_a_padding_row_is_left_out_only_when_told(tmp_path):
    base, directory, tensors = left_by_them(tmp_path, rows=1)
    with pytest.raises(UserError, match=r"has 261 rows, the base 260: .*--cut-embedding"):
        authors.import_adapter(directory, tmp_path / "ours", base, 128)
    assert not (tmp_path / "ours").exists()
    lines = authors.import_adapter(directory, tmp_path / "ours", base, 128, cut_embedding=True)
    assert any("left out: the last 1 rows of model.embed_tokens.weight" in line for line in lines)
    _, found, _ = adapter.load(tmp_path / "ours", open_model(base))
    np.testing.assert_array_equal(
        found["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"][:260]
    )


def test_norms_alone_and_a_safetensors_adapter(tmp_path):
    base, directory, _ = left_by_them(
        tmp_path, dtype=torch.float32, change=lambda lora, whole, _: whole.pop("model.embed_tokens.weight")
    )
    from safetensors.torch import save_file

    save_file(torch.load(directory / "adapter_model.bin"), directory / "adapter_model.safetensors")
    with pytest.raises(UserError, match="found both"):
        authors.import_adapter(directory, tmp_path / "ours", base, 128)
    (directory / "adapter_model.bin").unlink()
    authors.import_adapter(directory, tmp_path / "ours", base, 128)
    lora, found, _ = adapter.load(tmp_path / "ours", open_model(base))
    assert "embed_tokens" not in lora.modules_to_save and "model.norm.weight" in found


NORM = "model.layers.1.input_layernorm.weight"
A = f"{adapter.PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda lora, whole, config: whole.pop(NORM),
            f"trainable_params.bin: 1 tensors of the adapter are missing: {NORM}",
        ),
        (
            lambda lora, whole, config: lora.pop(A),
            "adapter_model.bin: 1 tensors of the adapter are missing: model.layers.0",
        ),
        (
            lambda lora, whole, config: whole.update({NORM: torch.ones(5)}),
            f"{NORM} should have shape [32], got [5]",
        ),
        (
            lambda lora, whole, config: lora.update({A: torch.empty(0)}),
            "lora_A.weight should have shape [8, 32], got [0]",
        ),
        (
            lambda lora, whole, config: whole.update({NORM: torch.full((32,), torch.nan)}),
            f"{NORM} is not finite",
        ),
        (
            lambda lora, whole, config: whole.update({"odd.weight": torch.ones(3)}),
            "modules_to_save should be a list of",
        ),
        (
            lambda lora, whole, config: whole.update(
                {"model.layers.7.input_layernorm.weight": torch.ones(32)}
            ),
            "trainable_params.bin: 1 tensors do not belong to this adapter: model.layers.7",
        ),
        (
            lambda lora, whole, config: whole.update({NORM: torch.ones(32, dtype=torch.int32)}),
            f"should be a dict of floating-point tensors, got '{NORM}'",
        ),
        (
            lambda lora, whole, config: whole.update({A: torch.ones(3)}),
            "trainable_params.bin: 1 tensors do not belong to the base model",
        ),
        (
            lambda lora, whole, config: whole.update({f"base_model.model.{NORM}": torch.ones(32)}),
            "trainable_params.bin: 1 tensors do not belong to the base model: base_model",
        ),
        (
            lambda lora, whole, config: lora.update({"lm_head.weight": torch.ones(3)}),
            "do not belong to a PEFT LoRA: lm_head.weight",
        ),
        (lambda lora, whole, config: config.update(use_dora=True), "use_dora True is not supported"),
        (
            lambda lora, whole, config: config.update(modules_to_save=["norm"]),
            "has norm in the adapter itself",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path, change, words):
    base, directory, _ = left_by_them(tmp_path, change=change)
    with pytest.raises(UserError) as caught:
        authors.import_adapter(directory, tmp_path / "ours", base, 128)
    assert words in str(caught.value), str(caught.value)
    assert not (tmp_path / "ours").exists()


class Unpickled:
    def __reduce__(self):
        return print, ("code of the file was run",)


def test_code_in_a_file_is_not_run(tmp_path, capfd):
    base, directory, _ = left_by_them(
        tmp_path, change=lambda lora, whole, _: whole.update({NORM: Unpickled()})
    )
    with pytest.raises(UserError, match="cannot load it as weights only"):
        authors.import_adapter(directory, tmp_path / "ours", base, 128)
    assert "was run" not in capfd.readouterr().out


def test_files_that_are_not_there_and_other_bases(tmp_path, capsys):
    base, directory, _ = left_by_them(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="is not an empty directory"):
        authors.import_adapter(directory, tmp_path / "full", base, 128)
    long = tiny.model(tmp_path / "long", rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(UserError, match="was extended before"):
        authors.import_adapter(directory, tmp_path / "ours", long, 256)
    (directory / "trainable_params.bin").unlink()
    assert (
        authors.main([str(directory), str(tmp_path / "ours"), "--model", str(base), "--target-length", "128"])
        == 2
    )
    assert "has no trainable_params.bin" in capsys.readouterr().err
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="found neither"):
        authors.import_adapter(directory, tmp_path / "ours", base, 128)
    with pytest.raises(UserError, match="has no adapter_config.json"):
        authors.import_adapter(base, tmp_path / "ours", base, 128)


def test_the_command_line(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        authors, "import_adapter", lambda *args: calls.append(args) or ["one line", "another"]
    )
    plain = ["theirs", "ours", "--model", "base", "--target-length", "256"]
    assert authors.main(plain) == 0 and capsys.readouterr().out == "one line\nanother\n"
    monkeypatch.setattr("sys.argv", ["authors", *plain, "--cut-embedding"])
    assert authors.main() == 0
    assert calls == [("theirs", "ours", "base", 256, False), ("theirs", "ours", "base", 256, True)]
    capsys.readouterr()
    for wrong in (plain[:4], [*plain[:2], *plain[4:]], plain[1:], [*plain, "--cut"]):
        with pytest.raises(SystemExit) as ended:
            authors.main(wrong)
        assert ended.value.code == 2
    with pytest.raises(SystemExit):
        authors.main(["--help"])
    help = " ".join(capsys.readouterr().out.split())
    assert help.startswith("usage: python -m longlora.torch.authors [-h]") and " DIR OUT " in help
    assert "Import the adapter that the LongLoRA authors' scripts wrote." in help
    assert f"DIR adapter_config.json, adapter_model.bin, {authors.PARAMETERS} OUT the adapter" in help
    assert len(calls) == 2


def test_modules_to_save_by_the_names_of_tensors():
    norms = ["model.norm.weight", "model.layers.0.input_layernorm.weight"]
    all_norms = ("input_layernorm", "post_attention_layernorm", "norm")
    assert authors._modules(["model.embed_tokens.weight", *norms]) == ("embed_tokens", *all_norms)
    assert authors._modules(norms) == all_norms
    assert authors._modules(["model.embed_tokens.weight", "lm_head.weight"]) == ("embed_tokens", "lm_head")


def test_rows_that_the_base_does_not_have():
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=3, hidden_size=2))
    name = "model.embed_tokens.weight"
    for shape in ((3, 2), (2, 2), (5, 3), (5, 2, 1)):
        whole = {name: np.ones(shape)}
        assert authors._cut(whole, model, "file", False) == [] and whole[name].shape == shape
    assert authors._cut({}, model, "file", False) == []
    whole = {name: np.arange(10).reshape(5, 2)}
    with pytest.raises(UserError, match=f"^file: {name} has 5 rows, the base 3: .*--cut-embedding"):
        authors._cut(whole, model, "file", False)
    assert authors._cut(whole, model, "file", True) == [
        f"left out: the last 2 rows of {name}, which the base does not have"
    ]
    assert whole[name].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_bad_files_of_tensors_are_named(tmp_path):
    for content, got in (
        ([torch.ones(1)], "'list'"),
        ({3: torch.ones(1)}, "3"),
        ({"a": 1.0}, "'a'"),
        ({"a": torch.ones(1), "b": torch.ones(1).int()}, "'b'"),
    ):
        torch.save(content, tmp_path / "file.bin")
        with pytest.raises(UserError, match=f"should be a dict of floating-point tensors, got {got}$"):
            authors._read(str(tmp_path / "file.bin"))
    torch.save({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "file.bin")
    (array,) = authors._read(str(tmp_path / "file.bin")).values()
    assert array.dtype == np.float32 and array.tolist() == [1, 1]
    torch.save({"a": torch.tensor([1, torch.inf])}, tmp_path / "file.bin")
    with pytest.raises(UserError, match="file.bin: a is not finite"):
        authors._read(str(tmp_path / "file.bin"))
