"""GGUFs that llama.cpp's tools split are read from their first file. Wrong metadata is named."""

import gguf
import numpy as np
import pytest
from test_gguf import tiny, write
from test_tokenizer import gguf_file, trained

from longlora.errors import UserError
from longlora.files.open_model import open_model


def split(path, folder, most=5, **keys):
    """Write the GGUF at `path` again in files of at most `most` tensors, by gguf-py -> their paths."""
    reader = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "m.gguf", architecture, split_max_tensors=most)
    for name, found in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "split.")):
            writer.add_key_value(name, found.contents(), found.types[0], *found.types[1:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


@pytest.mark.parametrize("family, kind", [("llama", "Q8_0"), ("qwen3", "F16"), ("phi3", "F32")])
@pytest.mark.parametrize("most", [1, 7])
def test_a_split_model_equals_the_whole_one(tmp_path, family, kind, most):
    whole = write(tmp_path / "m.gguf", tiny(tmp_path / "hf", family), kind)
    files = split(whole.path, tmp_path / "parts", most)
    assert len(files) == -(-len(whole.names()) // most) and files[0].name.startswith("m-00001-of-")
    ours = open_model(files[0])
    assert ours.names() == whole.names() and ours.config == whole.config
    assert ours.fingerprint() == whole.fingerprint()
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), whole.read(name), err_msg=name)


def test_the_tokenizer_of_a_split_model_is_in_its_first_file(tmp_path):
    path = gguf_file(tmp_path / "m.gguf", trained("gpt2"), "gpt2", eos_token_id=2)
    ours = open_model(split(path, tmp_path / "parts")[0])
    assert ours.tokenizer().fingerprint() == open_model(path).tokenizer().fingerprint()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda files: files[1].unlink(), "m-00002-of-00003.gguf: No such file"),
        (lambda files: files[1].write_bytes(files[1].read_bytes()[:-40]), "m-00002-of-00003.gguf: truncated"),
        (lambda files: files[1].write_bytes(files[2].read_bytes()), "should be part 2 of 3 by its metadata"),
        (lambda files: files[0].write_bytes(files[1].read_bytes()), "is part 2 of 3; wanted the first"),
        (lambda files: files[2].write_bytes(b"GGUF" + bytes(20)), "m-00003-of-00003.gguf: damaged header"),
    ],
    ids=["missing", "truncated", "another part", "no first", "damaged"],
)
def test_missing_and_wrong_parts_are_named(tmp_path, change, message):
    write(tmp_path / "m.gguf", tiny(tmp_path / "hf"))
    files = split(tmp_path / "m.gguf", tmp_path / "parts", 8)
    assert len(files) == 3
    change(files)
    with pytest.raises(UserError, match=message):
        open_model(files[0])


@pytest.mark.parametrize(
    "family, keys, message",
    [
        ("llama", {"attention.key_length": "8"}, "llama.attention.key_length should be an integer above 0"),
        (
            "llama",
            {"attention.value_length": -8},
            "llama.attention.value_length should be an integer above 0",
        ),
        ("llama", {"rope.dimension_count": [8]}, "llama.rope.dimension_count should be an integer above 0"),
        ("llama", {"rope.freq_base": "x"}, "rope_theta should be a number from 2"),
        ("llama", {"rope.freq_base": -1.0}, "rope_theta should be a number from 2"),
        ("llama", {"rope.freq_base": float("inf")}, "rope_theta should be a number from 2"),
        ("llama", {"rope.scaling.type": ["linear"]}, "rope type \\['linear'\\] is not supported"),
        ("llama", {"rope.scaling.factor": [2.0]}, "factor should be a number from 1"),
        ("llama", {"embedding_length": "x"}, "hidden_size should be an integer from 1"),
        ("llama", {"attention.head_count": 0}, "num_attention_heads should be an integer from 1"),
        ("llama", {"attention.head_count_kv": [2, 2]}, "num_key_value_heads should be an integer from 1"),
        ("llama", {"attention.layer_norm_rms_epsilon": 1e300}, "rms_norm_eps should be a number above 0"),
        ("llama", {"block_count": 1.5}, "num_hidden_layers should be an integer from 1"),
        ("granite", {"attention.scale": "x"}, "attention_multiplier should be a number above 0"),
        ("granite", {"embedding_length": "x", "attention.scale": 0.0}, "hidden_size should be an integer"),
    ],
)
def test_metadata_of_wrong_types_is_named(tmp_path, family, keys, message, monkeypatch):
    """One line names the key, and nothing else is printed."""
    model = tiny(tmp_path / "hf", family)
    write(tmp_path / "m.gguf", model)
    from longlora.files import gguf as module

    original = module.open_files

    def changed(path):
        found = original(path)
        for name, value in keys.items():
            found[0].metadata[f"{family}.{name}"] = value
        return found

    monkeypatch.setattr(module, "open_files", changed)
    with pytest.raises(UserError, match=message):
        open_model(tmp_path / "m.gguf")
