"""GGUF files have transformers' weights, bit for bit. Metadata becomes the config. Damage is one line."""

import dataclasses
import mmap
import os
import subprocess
import sys

import effort
import gguf
import numpy as np
import pytest
import torch
from gguf_small import ARCH, PERMUTED, permute
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2 import converted, smollm2  # noqa: F401 (fixtures)
from test_weights import build

from longlora.decoder.rope import Rope
from longlora.errors import UserError
from longlora.files.gguf import ARCHITECTURES, Gguf
from longlora.files.merge import save_merged
from longlora.files.open_model import open_model
from longlora.tools import inspect


def write(path, model, kind="F32", vocab=True, extra=None, alignment=None, **keys):
    """Write `model` as llama.cpp's converter would, matrices of type `kind` -> the file, opened."""
    config, arch = model.config, {"mistral": "llama"}.get(model.config.model_type, model.config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if arch == "phi3":  # Phi3MiniModel
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
    elif arch == "granite":  # GraniteModel
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    else:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in keys.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }[type(value)]
        add(f"{arch}.{key.replace('__', '.')}", value)
    if vocab:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    names = gguf.get_tensor_name_map(ARCH[arch], config.num_hidden_layers)
    for theirs, array in state.items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch in PERMUTED and ("q_proj" in theirs or "k_proj" in theirs):
            heads = config.num_attention_heads if "q_proj" in theirs else config.num_key_value_heads
            array = permute(array, heads)
        type_ = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        ours = names.get_name(theirs, (".weight", ".bias"))
        writer.add_tensor(ours, gguf.quants.quantize(np.ascontiguousarray(array), type_), raw_dtype=type_)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_model(path)


def tiny(path, family="llama", **fields):
    return build(
        path, family, **{"hidden_size": 32, "intermediate_size": 64, **FOUR_LAYERS.get(family, {}), **fields}
    )


# llama.cpp omits the rope in every fourth layer of SmolLM3. The metadata does not say so.
FOUR_LAYERS = {"smollm3": dict(num_hidden_layers=4, no_rope_layer_interval=4)}


STORED = [
    ("llama", {}),
    ("llama", dict(attention_bias=True)),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("phi3", {}),
    ("granite", {}),
    ("granite", dict(attention_bias=True, tie_word_embeddings=True)),
    ("smollm3", {}),
    ("llama", dict(tie_word_embeddings=True)),
]


def test_every_architecture_is_here():
    assert {{"mistral": "llama"}.get(family, family) for family, _ in STORED} == set(ARCHITECTURES)


@pytest.mark.parametrize("family, fields", STORED)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_every_family_is_read_from_every_storage(tmp_path, family, fields, kind):
    model = tiny(tmp_path / "hf", family, **fields)
    ours, state = write(tmp_path / "m.gguf", model, kind), model.state_dict()
    assert ours.kind == "gguf"
    assert set(ours.names()) == set(state) - (
        {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    )
    for name in ours.names():
        wanted, got = state[name].numpy(), ours.read(name)
        if kind == "F32" or wanted.ndim == 1:
            np.testing.assert_array_equal(got, wanted)
        else:
            assert np.abs(got - wanted).max() <= {"F16": 1e-3, "BF16": 8e-3, "Q8_0": 1e-2}[kind]
        stored = {"F16": "float16", "BF16": "bfloat16"} if wanted.ndim == 2 else {}
        assert ours.dtype(name) == stored.get(kind, "float32")
    matrices = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "q8_0"}
    assert inspect.describe(tmp_path / "m.gguf")["dtypes"] == sorted({"float32", matrices[kind]})
    config = open_model(tmp_path / "hf").config
    other = ("raw", "family", "bos_token_id", "eos_token_id")
    assert {"mistral": "llama"}.get(config.family, config.family) == ours.config.family
    for field in dataclasses.fields(config):
        if field.name not in other:
            assert getattr(ours.config, field.name) == getattr(config, field.name), field.name


@pytest.mark.parametrize("family", ["phi3", "granite", "smollm3"])
def test_transformers_reads_the_directory_made_of_a_gguf(tmp_path, family):
    """Wrong multipliers, layers without rope or orders of rows give other logits."""
    from transformers import AutoModelForCausalLM

    model = tiny(tmp_path / "hf", family).eval()
    ours = write(tmp_path / "m.gguf", model)
    save_merged(tmp_path / "saved", ours.read, ours.config.raw)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    ids = torch.arange(40)[None] * 7 % 50
    with torch.no_grad():
        wanted, got = model(ids).logits, again(ids).logits
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_transformers_reads_a_phi3_gguf_as_we_do(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny(tmp_path / "hf", "phi3")
    ours = write(tmp_path / "m.gguf", model, kind="Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    state = theirs.state_dict()
    assert set(ours.names()) == set(state)
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), state[name].numpy(), err_msg=name)
    for name in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"):
        assert ours.config.raw[name] == pytest.approx(getattr(theirs.config, name), rel=1e-6)


@pytest.mark.parametrize("alignment", [8, 256, 4096])
def test_tensors_are_aligned_as_the_file_says(tmp_path, alignment):
    """The data and each tensor begin at a multiple of general.alignment, or of 32 without that key."""
    model = tiny(tmp_path / "hf")
    ours, state = write(tmp_path / "m.gguf", model, alignment=alignment), model.state_dict()
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), state[name].numpy(), err_msg=name)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_pieces_of_a_tensor_equal_the_whole(tmp_path, kind, monkeypatch):
    ours = write(tmp_path / "m.gguf", tiny(tmp_path / "hf"), kind)
    whole = {name: ours.read(name) for name in ours.names()}
    monkeypatch.setattr("longlora.files.model_file.CHUNK", 100)
    for name, array in whole.items():
        np.testing.assert_array_equal(ours.read(name), array)


def test_smollm2_has_the_weights_of_transformers(smollm2, converted):  # noqa: F811
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    ours, state = open_model(smollm2), theirs.state_dict()
    assert len(ours.names()) == 272
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), state[name].numpy(), err_msg=name)
    config = ours.config
    assert (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.head_dim,
    ) == (30, 9, 3, 576, 1536, 49152, 64)
    assert (
        config.rope == Rope("default", 100000.0, 8192)
        and config.tie_word_embeddings
        and config.rms_norm_eps == 1e-5
    )


def test_loading_needs_little_more_than_the_weights(smollm2):  # noqa: F811
    """The test measures the peak resident size of a process that reads all tensors as float32.

    getrusage would not do: a child inherits its figure from the parent.
    """
    if not os.path.exists("/proc/self/status"):
        pytest.skip("this system has no /proc/self/status to read the peak from")
    script = """if True:
        import sys
        import gguf, numpy as np
        from longlora.files.open_model import open_model
        def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
        before = peak()
        model = open_model(sys.argv[1])
        out = {name: np.empty(model.shape(name), np.float32) for name in model.names()}
        for name in out:
            model.read(name, out[name])
        print((peak() - before) / sum(array.nbytes for array in out.values()))
    """
    done = subprocess.run([sys.executable, "-c", script, str(smollm2)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.99 < float(done.stdout) < 1.1


def test_loading_is_quick(smollm2):  # noqa: F811
    """Calls and page faults from the file to a model that can be trained.

    A loop over numbers in Python would call millions of functions. Only the first reading, into fresh memory,
    has many page faults."""
    script = (
        effort.IMPORT
        + """if True:
        import resource
        from longlora.decoder import model
        from longlora.decoder import plan
        from longlora.decoder.lora import LoraConfig
        from longlora.files import open_model as weights
        def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with calls() as counted:
            base = weights.open_model(sys.argv[1])
            base.tokenizer()
            lora = LoraConfig()
            planned = plan.plan(base.config, sequence_length=512, lora=lora, memory=1 << 40)
            made = model.Model(base.config, lora=lora, plan=planned)
            made.load(base)
        loaded = faults()
        made.load(base)
        print(counted.count, faults() - loaded)
    """
    )
    done = subprocess.run([sys.executable, "-c", script, str(smollm2)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, faults = map(int, done.stdout.split())
    assert count < 1_500_000 and faults < 40_000, (
        count,
        faults,
    )  # 550,000 and 2,000; the file has 24,000 pages


def test_extra_missing_and_misshapen_tensors_are_named(tmp_path):
    model = tiny(tmp_path / "hf")
    with pytest.raises(UserError, match="1 tensors do not belong to a llama model: blk.0.more.weight"):
        write(tmp_path / "m.gguf", model, extra={"blk.0.more.weight": np.ones(32, np.float32)})
    model.config.intermediate_size = 96
    with pytest.raises(
        UserError, match="gate_proj.weight should have shape \\[96, 32\\] by the config, got \\[64, 32\\]"
    ):
        write(tmp_path / "n.gguf", model)
    model.config.intermediate_size, model.config.num_hidden_layers = 64, 3
    with pytest.raises(
        UserError, match="9 tensors of the config are missing: model.layers.2.input_layernorm.weight"
    ):
        write(tmp_path / "o.gguf", model)


def test_nan_is_named(tmp_path):
    model = tiny(tmp_path / "hf")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 3] = float("nan")
    with pytest.raises(UserError, match="layers.1.self_attn.k_proj.weight is not finite at \\[0, 3\\]"):
        write(tmp_path / "m.gguf", model).read("model.layers.1.self_attn.k_proj.weight")


def opened(path):
    """Open and read a file, build its tokenizer. The only error is a UserError of one line with its name."""
    try:
        model = Gguf(path)
        for name in model.names():
            model.read(name)
        model.tokenizer()
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return str(error)


def test_a_file_that_is_cut_anywhere_is_one_line(tmp_path):
    write(tmp_path / "m.gguf", tiny(tmp_path / "hf"))
    whole, cut = (tmp_path / "m.gguf").read_bytes(), tmp_path / "cut.gguf"
    for size in [*range(0, 100), *range(100, len(whole), 613), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        assert opened(cut), size


def test_smollm2_that_is_cut_is_truncated(smollm2, tmp_path):  # noqa: F811
    with open(smollm2, "rb") as file:
        head = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for size in (5, 100, 100_000, 2_000_000, 50_000_000, len(head) - 1):
            (tmp_path / "cut.gguf").write_bytes(head[:size])
            assert "truncated" in opened(tmp_path / "cut.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write(folder / "m.gguf", tiny(folder / "hf"))
    return folder / "m.gguf"


@given(st.integers(0, 3000), st.binary(min_size=1, max_size=9))
@settings(max_examples=100)
def test_a_damaged_header_never_hangs_or_crashes(small, at, noise):
    whole = bytearray(small.read_bytes())
    whole[at : at + len(noise)] = noise
    path = small.parent / "noise.gguf"
    path.write_bytes(whole)
    opened(path)


def test_another_file_is_not_a_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "not a GGUF file" in opened(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(100))
    assert "version" in opened(tmp_path / "m.gguf")
