"""Every loader reads what extend and `longlora train` saved with the positions it was trained with, or says
that it does not."""

import json
import os

import forked
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="these tests extend models of transformers")
peft = pytest.importorskip("peft", reason="extend makes a PeftModel")
import families  # noqa: E402
import test_gguf  # noqa: E402
import tiny as runs  # noqa: E402
from families import close, ids_of, tiny  # noqa: E402
from peft import AutoPeftModelForCausalLM, PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import longlora.torch  # noqa: E402
from longlora.errors import UserError  # noqa: E402
from longlora.files import base_folder, merge  # noqa: E402
from longlora.torch.extend import opened  # noqa: E402
from longlora.training import driver  # noqa: E402

KEY = "needs_the_positions_in_its_folder_longlora_base"


def moved(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.eval()


def saved(tmp_path, **how):
    """A base and an adapter of an extended model -> their paths, the model's logits."""
    tiny("llama", "sdpa", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = moved(longlora.torch.extend(model, 512, group_size=6, **how))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model(ids_of(1, 24)).logits


def driven(tmp_path, **fields):
    """The same by `longlora train`; the logits are those of stock transformers on what `merge` writes."""
    base = runs.model(tmp_path / "base")
    driver.train(lambda line: None, **runs.options(tmp_path, max_steps=2, save_steps=1, **fields))
    merge.merge(base, tmp_path / "out", tmp_path / "merged")
    return base, tmp_path / "out", logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))


def logits(model):
    return model.eval()(ids_of(1, 24) % model.config.vocab_size).logits


LOADERS = {
    "ours": lambda base, adapter: longlora.torch.load(adapter, base),
    "AutoPeftModel": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "transformers": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
    "PeftModel on the folder": lambda base, adapter: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(adapter / "longlora_base"), adapter
    ),
}
REFUSING = {
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapter
    ),
    "load_adapter": lambda base, adapter: AutoModelForCausalLM.from_pretrained(base).load_adapter(adapter),
    "load_adapter by name": lambda base, adapter: AutoModelForCausalLM.from_pretrained(base).load_adapter(
        peft_model_id=str(adapter)
    ),
}


@pytest.mark.parametrize("make", [saved, driven])
def test_a_loader_reads_it_right_or_refuses(tmp_path, make):
    base, adapter, want = make(tmp_path)
    for name, load in LOADERS.items():
        close(logits(load(base, adapter)), want), name
    for name, load in REFUSING.items():
        with pytest.raises(ValueError, match="was trained with longer positions than this model has"):
            load(base, adapter), name


STOCK = """
import sys, warnings, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base, adapter, ids, out = sys.argv[1:]
ids = torch.load(ids)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
made = [kind.from_pretrained(adapter) for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM)]
torch.save([[model.eval()(ids).logits for model in (*made, plain)], [str(x.message) for x in seen]], out)
assert not any(name.startswith("longlora") for name in sys.modules)
"""


def test_without_longlora_peft_reads_it_right_or_warns(tmp_path):
    base, adapter, want = saved(tmp_path)
    torch.save(ids_of(1, 24), tmp_path / "ids")
    done = forked.run(["-c", STOCK, base, adapter, tmp_path / "ids", tmp_path / "found"])
    assert done.returncode == 0, done.stderr
    (auto, stock, plain), said = torch.load(tmp_path / "found")
    close(auto, want)
    close(stock, want)
    assert (plain - want).abs().max() > 0.01 * want.abs().max()  # PEFT cannot know: it warns
    assert any(f"Unexpected keyword arguments ['{KEY}']" in line for line in said)


def test_the_folder_is_the_base_with_a_config_of_its_own(tmp_path):
    base, adapter, _ = saved(tmp_path)
    folder = adapter / "longlora_base"
    assert sorted(os.listdir(folder)) == sorted(os.listdir(base))
    for name in os.listdir(folder):
        linked = name != "config.json"
        assert (folder / name).is_symlink() == linked
        assert not linked or os.readlink(folder / name) == str(base / name)
    assert not (adapter / "config.json").exists()
    described = json.loads((adapter / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(folder) and described[KEY] == str(base)
    assert "`AutoPeftModelForCausalLM.from_pretrained(adapter)`" in (adapter / "README.md").read_text()


def test_saving_again_and_from_another_directory(tmp_path, monkeypatch):
    """Paths that were relative stay those of the directory where the base was loaded."""
    monkeypatch.chdir(tmp_path)
    tiny("llama", "sdpa").save_pretrained("base")
    model = moved(longlora.torch.extend(AutoModelForCausalLM.from_pretrained("base"), 512))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for _ in range(2):
        model.save_pretrained("adapter")
    card = (tmp_path / "other" / "adapter" / "README.md").read_text()
    assert card.count(base_folder.NOTE.strip()) == 1
    monkeypatch.chdir(tmp_path)
    close(logits(AutoPeftModelForCausalLM.from_pretrained("other/adapter")), logits(model))


def test_what_was_loaded_is_saved_again(tmp_path):
    base, adapter, want = saved(tmp_path)
    longlora.torch.load(adapter, base).save_pretrained(tmp_path / "again")
    close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again")), want)


def test_what_is_in_the_way_stays(tmp_path):
    base, adapter, _ = saved(tmp_path)
    (adapter / "longlora_base" / "weights.bin").write_text("mine")
    with pytest.raises(UserError, match="weights.bin: is in the way"):
        base_folder.make(adapter, base)
    assert (adapter / "longlora_base" / "weights.bin").read_text() == "mine"


def test_a_base_that_went_away_is_missed(tmp_path):
    base, adapter, want = saved(tmp_path)
    base.rename(tmp_path / "elsewhere")
    for name in ("AutoPeftModel", "transformers"):
        with pytest.raises(OSError, match="longlora_base"):
            LOADERS[name](base, adapter)
    close(logits(longlora.torch.load(adapter, tmp_path / "elsewhere")), want)


def test_a_file_system_without_links_stops_nothing(tmp_path, monkeypatch):
    def refuse(*unused):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    base, adapter, want = saved(tmp_path)
    assert os.listdir(adapter / "longlora_base") == ["config.json"]
    close(logits(longlora.torch.load(adapter, base)), want)
    with pytest.raises(OSError, match="longlora_base"):
        AutoPeftModelForCausalLM.from_pretrained(adapter)


def test_a_checkpoint_names_its_own_folder(tmp_path):
    """It is written under another name."""
    base, out, _ = driven(tmp_path)
    place = out / "checkpoint-1"
    described = json.loads((place / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(place / "longlora_base")
    close(logits(AutoPeftModelForCausalLM.from_pretrained(place)), logits(longlora.torch.load(place, base)))


def test_without_longer_positions_it_is_a_plain_adapter(tmp_path):
    base, out, want = driven(tmp_path, target_length=None, sequence_length=64, group_size=16)
    described = json.loads((out / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base) and KEY not in described
    assert not (out / "longlora_base").exists() and "longlora_base" not in (out / "README.md").read_text()
    for name in ("ours", "AutoPeftModel", "transformers"):
        close(logits(LOADERS[name](base, out)), want)
    close(logits(REFUSING["PeftModel"](base, out)), want)


def test_adapters_of_0_1_0_are_read(tmp_path):
    """They have config.json beside adapter_config.json, and lead to the plain base."""
    base, adapter, want = saved(tmp_path)
    described = json.loads((adapter / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = described.pop(KEY)
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    (adapter / "longlora_base" / "config.json").rename(adapter / "config.json")
    for entry in os.scandir(adapter / "longlora_base"):
        os.unlink(entry.path)
    (adapter / "longlora_base").rmdir()
    close(logits(longlora.torch.load(adapter, base)), want)
    merge.merge(base, adapter, tmp_path / "merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want)


def test_a_model_that_takes_images_too(tmp_path):
    """What reads text is extended and trained; the tower for images stays, with norms of the same names."""
    text = {**families.SMALL, "model_type": "mistral", "sliding_window": None, "head_dim": 8}
    vision = dict(model_type="pixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    vision |= dict(num_attention_heads=4, image_size=28, patch_size=14, head_dim=8)
    torch.manual_seed(0)
    kind = transformers.Mistral3ForConditionalGeneration
    kind(transformers.Mistral3Config(text_config=text, vision_config=vision)).save_pretrained(
        tmp_path / "base"
    )
    model = moved(longlora.torch.extend(kind.from_pretrained(tmp_path / "base"), 512, group_size=6))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".language_model." in name for name in trained)
    ids = ids_of(1, 24)
    want = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    close(longlora.torch.load(tmp_path / "adapter", tmp_path / "base")(input_ids=ids).logits, want)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = kind.from_pretrained(tmp_path / "merged")
    assert merged.config.text_config.max_position_embeddings == 512
    close(merged(input_ids=ids).logits, want)


# ---- bases whose weights are not plain


def test_a_gguf_base(tmp_path):
    """transformers unpacks it and says so in the config; our files do not."""
    model = test_gguf.tiny(tmp_path / "hf", hidden_size=64)
    path = tmp_path / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    test_gguf.write(str(path), model, "Q8_0", vocab=False, vocab_size=model.config.vocab_size)
    place, how = opened(path)
    base = AutoModelForCausalLM.from_pretrained(place, **how)
    length = 4 * base.config.max_position_embeddings
    made = moved(longlora.torch.extend(base, length, group_size=6))
    made.save_pretrained(tmp_path / "adapter")
    assert os.listdir(tmp_path / "adapter" / "longlora_base") == ["config.json"]
    found = json.loads((tmp_path / "adapter" / "longlora_base" / "config.json").read_text())
    assert found["max_position_embeddings"] == length and "quantization_config" not in found
    close(logits(longlora.torch.load(tmp_path / "adapter", path)), logits(made))
    with pytest.raises(OSError, match="longlora_base"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    merge.merge(path, tmp_path / "adapter", tmp_path / "merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(made))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_is_quantised_when_it_is_loaded(tmp_path, bits):
    """The base's files stay plain: the adapter is loaded on either, and merged with the plain one."""
    pytest.importorskip("bitsandbytes", reason="it quantises the base")
    tiny("llama", "sdpa", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    how = dict(
        quantization_config=transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        device_map="cpu",
        dtype=torch.float32,
    )
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **how)
    made = moved(longlora.torch.extend(made, 512, group_size=6))
    made.save_pretrained(tmp_path / "adapter")
    found = json.loads((tmp_path / "adapter" / "longlora_base" / "config.json").read_text())
    assert "quantization_config" not in found
    again = longlora.torch.load(tmp_path / "adapter", tmp_path / "base", is_trainable=True, **how)
    assert torch.equal(logits(again), logits(made))
    plain = longlora.torch.load(tmp_path / "adapter", tmp_path / "base")
    merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(plain))
    difference = (logits(plain) - logits(made)).abs().max()
    assert 0 < difference < 0.5 * logits(made).abs().max()
    # A base that is stored as it was quantised: its config says so, and so does ours.
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **how)
    stored.save_pretrained(tmp_path / "stored")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", device_map="cpu", dtype=torch.float32)
    moved(longlora.torch.extend(made, 512, group_size=6)).save_pretrained(tmp_path / "other")
    found = json.loads((tmp_path / "other" / "longlora_base" / "config.json").read_text())
    assert found["quantization_config"]["quant_method"] == "bitsandbytes"
    for base in ("stored", "base"):  # how the base is stored decides, not how it was in training
        model = longlora.torch.load(tmp_path / "other", tmp_path / base, device_map="cpu")
        assert np.isfinite(logits(model).detach().float().numpy()).all()
