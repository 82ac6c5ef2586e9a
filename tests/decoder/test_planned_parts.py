"""Bytes of each part in plans of training and generation, the changes they propose, and their dry runs."""

import dataclasses
import math

import pytest

from longlora.decoder import generation_plan as generation_
from longlora.decoder import plan as plan_
from longlora.decoder.config import read_config
from longlora.decoder.lora import LoraConfig
from longlora.decoder.streaming import Window
from longlora.errors import UserError
from longlora.memory.dry_run import Recorder
from longlora.ops import BOUNDARIES, SHIFTS

# With these sizes almost all buffers are multiples of 64 bytes, so their sums have little padding.
V, C, F, H, K, D, LAYERS = 64, 32, 48, 4, 2, 16, 3
RAW = dict(
    model_type="llama",
    vocab_size=V,
    hidden_size=C,
    intermediate_size=F,
    num_hidden_layers=LAYERS,
    num_attention_heads=H,
    num_key_value_heads=K,
    head_dim=D,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
CONFIG = read_config(RAW)
QKV, OUT, LINEARS = (H + 2 * K) * D, H * D, (H + 2 * K) * D * C + H * D * C + 3 * C * F
LORA = LoraConfig(r=4)  # on q, k, v and o; the embedding and the norms are trained too
B, T = 2, 16
M = B * T
OWN = 1 << 28  # the memory of the process in these tests


@pytest.fixture(autouse=True)
def same_process(monkeypatch):
    """Plans count the memory of the process. This makes it the same whatever ran before."""
    for module in (plan_, generation_):
        monkeypatch.setattr(module, "own_memory", lambda: OWN)
        monkeypatch.setattr(module.job, "memory", lambda own: own + (1 << 40))


@pytest.fixture
def called(monkeypatch):
    """A function of an op's name that gives the arguments of its calls in dry runs."""
    calls, note = [], Recorder._note

    def noted(self, op, args):
        calls.append((op, args))
        note(self, op, args)

    monkeypatch.setattr(Recorder, "_note", noted)
    return lambda name: [args for op, args in calls if op == name]


def training(config=CONFIG, **choices):
    given = dict(batch_size=B, sequence_length=T, group_size=8, lora=LORA, checkpointing="none")
    return plan_.plan(config, **{**given, **choices})


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_the_bytes_of_a_runs_weights(dtype, size):
    found = training(dtype=dtype).parts
    norms, a, b = (2 * LAYERS + 1) * C, LAYERS * 4 * (3 * C + OUT), LAYERS * 4 * (QKV + C)
    trained = V * C + norms + a + b
    assert found["frozen weights"] == size * LAYERS * LINEARS
    assert found["trained parameters, float32"] == found["gradients"] == 4 * trained
    assert found["moments"] == 2 * 4 * trained
    # q, k and v are one product. Its B has 3 r columns.
    wide = LAYERS * 3 * 4 * QKV
    copies = {"float32": 4 * wide, "bfloat16": 2 * (V * C + norms + a + wide + LAYERS * 4 * C)}
    assert found["trained parameters, working copies"] == copies[dtype]
    assert found["runtime"] == OWN + (12 << 20)
    assert found["scratch of the ops"] > 0 and all(found.values())


def test_full_fine_tuning_has_no_frozen_weights():
    found = training(lora=None, checkpointing="full").parts
    every = V * C + (2 * LAYERS + 1) * C + LAYERS * LINEARS
    assert found["trained parameters, float32"] == found["gradients"] == found["moments"] // 2 == 4 * every
    assert not {"frozen weights", "trained parameters, working copies"} & set(found)


# Numbers per token, with the names of decoder/layer.py. Each layer keeps x, qkv with u, o with lse and u, h
# with rstd, gate and up; or fewer of them.
KEPT = {"none": C + QKV + 3 * 4 + OUT + H + 4 + C + 1 + 2 * F, "minimal": C + OUT + H, "full": C}
# All layers share n with rstd, the gradients d and dn, and what the backward computes again. The MLP uses the
# same memory as the backward of the attention, which has do and dqkv.
AGAIN = 2 * C + 1 + F + 2 * F  # n2, h with rstd, a, gate and up
HAND = {
    "none": 3 * C + 1 + max(C + F, OUT + QKV),
    "minimal": 3 * C + 1 + QKV + 3 * 4 + 4 + max(AGAIN, OUT + QKV),
    "full": 3 * C + 1 + QKV + 3 * 4 + 4 + OUT + H + max(AGAIN, OUT + QKV),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("choice", KEPT)
def test_the_bytes_of_a_runs_activations(choice, packed):
    found = training(checkpointing=choice, packed=packed).parts
    assert found["kept activations"] == LAYERS * 4 * M * KEPT[choice]
    assert found["layer in hand"] == 4 * M * HAND[choice]
    # Losses and their gradients, ids, targets, positions and order; 33 boundaries in 192 bytes; cosines and
    # sines; NumPy's ids, targets, order and gradients.
    assert found["batch and tables"] == 6 * 4 * M + 192 + 2 * 4 * T * D // 2 + 4 * 4 * M


def test_norms_of_heads_and_lora_on_the_mlp_take_more_memory():
    config = read_config({**RAW, "model_type": "qwen3", "sliding_window": None})
    plain = training(checkpointing="minimal").parts
    heads = training(config, checkpointing="minimal").parts
    # q and k before their norms, and the rstd of each head
    assert heads["layer in hand"] - plain["layer in hand"] == 4 * M * ((H + K) * D + H + K)
    lora = LoraConfig(r=4, target_modules="all-linear")
    for choice, where, layers in (("none", "kept activations", LAYERS), ("full", "layer in hand", 1)):
        few, more = (training(checkpointing=choice, lora=x).parts[where] for x in (LORA, lora))
        assert more - few == layers * 4 * M * 2 * 4  # u of gate and of up


def test_a_plan_for_a_gpu_counts_the_memory_of_the_gpu_only(monkeypatch):
    cpu, gpu = training(), training(device="cuda:0", memory=1 << 30)
    assert gpu.device == "cuda:0" and cpu.device == "cpu" and "runtime" not in gpu.parts
    assert gpu.parts["batch and tables"] == cpu.parts["batch and tables"] - 4 * 4 * M
    same = {"frozen weights", "kept activations", "layer in hand", "moments", "gradients"}
    assert {name: gpu.parts[name] for name in same} == {name: cpu.parts[name] for name in same}
    assert gpu.parts["workspace of the ops"] > 0 and "scratch of the ops" not in gpu.parts
    monkeypatch.setattr(plan_, "free_memory", lambda device: 12345 if device == "cuda:0" else 0)
    assert training(device="cuda:0").memory == 12345 and training().memory == OWN + (1 << 40)


def test_a_plan_reports_its_choices():
    found = training(dtype="bfloat16", checkpointing="minimal", memory=123)
    for name, value in dict(
        config=CONFIG,
        dtype="bfloat16",
        batch_size=B,
        sequence_length=T,
        group_size=8,
        lora=LORA,
        checkpointing="minimal",
        memory=123,
        device="cpu",
    ).items():
        assert getattr(found, name) == value, name
    plain = plan_.plan(CONFIG, sequence_length=1)
    assert (plain.dtype, plain.batch_size, plain.checkpointing) == ("float32", 1, "none")
    assert (plain.group_size, plain.lora, plain.changes) == (None, None, ())
    assert plain.parts == plan_.plan(CONFIG, sequence_length=1, packed=False).parts


def proposals(monkeypatch, module, made):
    """The changes that a plan considers when nothing fits: text, field, value, bytes after the change.

    made: a function of `memory` that makes the plan in `module`.
    """
    found = []

    def noted(total, steps, memory):
        found.extend((text, name, value, total(**{name: value})) for text, name, value in steps)
        return ("sentences",)

    monkeypatch.setattr(module, "what_would_fit", noted)
    assert made(memory=1).changes == ("sentences",)
    return found


LONG = "--per-device-train-batch-size 1, the rest by gradient accumulation"


def test_the_changes_that_a_run_proposes(monkeypatch):
    def bytes_of(**choices):
        return training(memory=1 << 40, **choices).total

    rest = dataclasses.replace(LORA, modules_to_save=("input_layernorm", "post_attention_layernorm", "norm"))
    assert proposals(monkeypatch, plan_, training) == [
        ("--checkpointing minimal", "recompute", "minimal", bytes_of(checkpointing="minimal")),
        ("--checkpointing full", "recompute", "full", bytes_of(checkpointing="full")),
        ("--dtype bfloat16", "dtype", "bfloat16", bytes_of(dtype="bfloat16")),
        (LONG, "batch_size", 1, bytes_of(batch_size=1)),
        ("no training of the embedding", "lora", rest, bytes_of(lora=rest)),
        *((f"--sequence-length {n}", "length", n, bytes_of(sequence_length=n)) for n in (8, 4, 2, 1)),
    ]


def test_a_run_does_not_propose_its_own_choices(monkeypatch):
    def texts(**choices):
        given = dict(batch_size=1, sequence_length=1, dtype="bfloat16", checkpointing="full", **choices)
        made = proposals(monkeypatch, plan_, lambda memory: training(memory=memory, **given))
        return [(text, value) for text, _, value, _ in made]

    assert texts(lora=LoraConfig(modules_to_save=("norm",))) == []
    assert texts(lora=None) == [("LoRA instead of --full", LoraConfig())]
    head = LoraConfig(modules_to_save=("lm_head", "norm"))
    assert texts(lora=head) == [("no training of the embedding", LoraConfig(modules_to_save=("norm",)))]
    made = proposals(
        monkeypatch, plan_, lambda memory: training(memory=memory, batch_size=2, sequence_length=1000)
    )
    lengths = [value for _, name, value, _ in made if name == "length"]
    assert lengths == [500, 250, 125, 62, 31, 15, 7]
    assert [value for _, name, value, _ in made if name == "batch_size"] == [1]


def test_the_dry_run_of_a_step_has_two_layers_and_the_gradient_norm(called):
    training(read_config({**RAW, "num_hidden_layers": 5}))
    ((*_, group, boundary, shift, scale), _) = called("s2_attention_forward")  # in two layers
    assert (group, boundary, shift, scale) == (8, BOUNDARIES["split"], SHIFTS["half"], D**-0.5)
    assert len(called("s2_attention_backward")) == 2
    (embedding,) = called("embedding_forward")
    assert embedding[0].shape == (M, C)
    assert len(called("embedding_backward")) == 1
    assert len(called("linear_cross_entropy_backward")) == 1
    _, _, cos, sin, positions = called("rope_forward")[0]
    assert cos.shape == sin.shape == (T, D // 2) and cos.dtype == "float32" and positions is None
    squares = called("sum_squares")
    trained = V * C + 5 * C + 2 * 4 * (3 * C + OUT + QKV + C)  # in two layers
    assert sum(math.prod(x.shape) for _, x in squares) == trained
    assert all((out.shape, out.dtype, len(x.shape)) == ((1,), "float64", 1) for out, x in squares)


@pytest.mark.parametrize("packed", [False, True])
def test_the_dry_run_attends_to_rows_or_packed_documents(called, packed):
    training(packed=packed, group_size=None)
    rows, tokens = (1, M) if packed else (B, T)
    out, _, q, *_ = call = called("s2_attention_forward")[0]
    assert out.shape == q.shape == (rows, tokens, H, D)
    assert call[6:9] == (tokens, BOUNDARIES["split"], SHIFTS["none"])
    assert call[5].shape == (2,) if packed else call[5] is None
    assert (called("rope_forward")[0][4] is not None) is packed


def test_the_dry_run_has_two_layers_with_rope_and_two_without(called):
    flags = dict(model_type="smollm3", no_rope_layers=[0, 0, 0, 1, 1, 1, 1], num_hidden_layers=7)
    training(read_config({**RAW, **flags}))
    assert len(called("s2_attention_forward")) == 4
    assert len(called("rope_forward")) == len(called("rope_backward")) == 2


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(checkpointing="some"), "checkpointing should be one of auto, none, minimal, full, got 'some'"),
        (dict(dtype="int8"), "dtype should be one of float32, bfloat16, float16, got 'int8'"),
        (dict(sequence_length=0), "sequence_length should be at least 1, got 0"),
        (dict(batch_size=0), "batch_size should be at least 1, got 0"),
    ],
)
def test_wrong_choices_of_a_run_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        training(**fields)


# ---- generation --------------------------------------------------------------------------------


def generation(**choices):
    return generation_.plan(CONFIG, **{"context": 48, **choices})


# Numbers per token in a pass: x and its rstd, qkv, lse; n and o in the same memory; n2 and its rstd, gate, up
# and a; losses, ids, targets, positions and the lse of the head.
PASS = C + 1 + QKV + H + max(C, OUT) + C + 1 + 2 * F + F + 5


def padded(size):
    """The size of a buffer with its padding to a multiple of 64 bytes."""
    return -(-size // 64) * 64


def test_the_bytes_of_the_parts_of_generation():
    found = generation(rows=3, cache_dtype="bfloat16").parts
    assert found["frozen weights"] == 4 * (V * C + (2 * LAYERS + 1) * C + LAYERS * LINEARS)
    assert found["cache of keys and values"] == 2 * 3 * 48 * K * D * 2 * LAYERS
    ends = padded(4 * (48 + 1)) + 2 * 64  # boundaries; the row and the length of the sequence
    assert found["a pass"] == 4 * 48 * PASS + ends + 4 * 3 * V
    assert found["tables"] == 2 * 4 * 48 * D // 2
    assert found["runtime"] == OWN + (12 << 20) and found["scratch of the ops"] > 0
    assert set(generation(device="cuda:0", memory=1 << 30).parts) == set(found) - {
        "runtime",
        "scratch of the ops",
    } | {"workspace of the ops"}


def test_a_pass_has_a_chunk_of_512_tokens_or_16_rows():
    long = generation(context=4096).parts
    assert long["a pass"] == 4 * 512 * PASS + padded(4 * 513) + 2 * 64 + 4 * V
    assert long["tables"] == 2 * 4 * 4096 * D // 2
    longer = generation(context=4096, chunk=2048).parts
    assert longer["a pass"] == 4 * 2048 * PASS + padded(4 * 2049) + 2 * 64 + 4 * V
    assert generation(context=100, chunk=2048).parts == generation(context=100).parts
    many = generation(context=1, rows=20).parts
    assert many["a pass"] == 4 * 16 * PASS + padded(4 * 17) + 2 * 64 + 4 * 16 * V
    assert many["cache of keys and values"] == 2 * LAYERS * padded(4 * 20 * K * D)


def test_the_bytes_of_a_window():
    """With 64 recent tokens a chunk has 16, so the cache has 16 more places. It holds the 8 sinks twice."""
    found = generation(context=Window(8, 64))
    assert found.context == 72
    assert found.parts["cache of keys and values"] == 2 * LAYERS * 4 * K * D * (8 + 64 + 16 + 8)
    assert found.parts["tables"] == 2 * 4 * 16 * D // 2
    assert found.parts["a pass"] == 4 * 16 * PASS + padded(4 * 17) + 2 * 64 + 4 * V


def test_a_generation_plan_reports_its_choices(monkeypatch):
    found = generation(rows=3, dtype="bfloat16", memory=1 << 40)
    assert (found.config, found.dtype, found.cache_dtype) == (CONFIG, "bfloat16", "bfloat16")
    assert (found.context, found.rows, found.device, found.memory) == (48, 3, "cpu", 1 << 40)
    plain = generation()
    assert (plain.dtype, plain.cache_dtype, plain.rows) == ("float32", "float32", 1)
    assert plain.memory == OWN + (1 << 40) and plain.fits and plain.changes == ()
    assert generation(cache_dtype="float16").cache_dtype == "float16"
    assert generation(memory=plain.total).changes == () != generation(memory=plain.total - 1).changes
    monkeypatch.setattr(generation_, "free_memory", lambda device: 12345)
    assert generation(device="cuda:0").memory == 12345


def test_the_changes_that_generation_proposes(monkeypatch):
    def bytes_of(**choices):
        return generation(**{"rows": 40, **choices, "memory": 1 << 40}).total

    made = proposals(monkeypatch, generation_, lambda memory: generation(memory=memory, rows=40))
    assert made == [
        ("--cache-dtype bfloat16", "cache_dtype", "bfloat16", bytes_of(cache_dtype="bfloat16")),
        ("--dtype bfloat16", "dtype", "bfloat16", bytes_of(dtype="bfloat16")),
        *((f"{n} rows", "rows", n, bytes_of(rows=n)) for n in (20, 10, 5, 2, 1)),
        *((f"--context {n}", "context", n, bytes_of(context=n)) for n in (24, 12, 6, 3, 1)),
    ]
    given = dict(dtype="bfloat16", rows=1, context=1 << 20)
    made = proposals(monkeypatch, generation_, lambda memory: generation(memory=memory, **given))
    assert [value for *_, value, _ in made] == [1 << i for i in range(19, 10, -1)]


def test_a_window_proposes_fewer_recent_tokens_and_the_same_start(monkeypatch):
    given = dict(dtype="bfloat16", context=Window(8, 92))
    made = proposals(monkeypatch, generation_, lambda memory: generation(memory=memory, **given))
    assert [(text, value) for text, _, value, _ in made] == [
        (f"--recent-size {n}", Window(8, n)) for n in (42, 17, 4)
    ]
    smaller = generation(**{**given, "context": Window(8, 4)}).total
    assert made[-1][1] == "context" and made[-1][3] == smaller
    made = proposals(monkeypatch, generation_, lambda memory: generation(memory=memory, context=Window(8, 8)))
    # half of this window would have the start alone
    assert [name for _, name, _, _ in made] == ["cache_dtype", "dtype"]


def test_the_dry_run_of_generation_has_a_prompt_and_a_step_in_two_layers(called):
    generation(rows=3, cache_dtype="bfloat16")
    assert len(called("cached_attention")) == 4
    whole, one = called("cached_attention")[::2]  # the first layer: a prompt, then three rows
    assert whole[0].shape == (1, 48, H, D) and one[0].shape == (3, 1, H, D)
    assert whole[1].shape == (3, 48, K, D) and whole[1].dtype == "bfloat16"
    assert [out.shape for out, *_ in called("matmul")] == [(1, V), (3, V)]
    for out, n, head, alpha, beta in called("matmul"):
        assert (n.shape, head.shape, alpha, beta) == ((out.shape[0], C), (C, V), 1.0, 0.0)
        assert out.dtype == "float32"
    _, _, cos, sin, _ = called("rope_forward")[0]
    assert cos.shape == sin.shape == (48, D // 2) and cos.dtype == "float32"


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(dtype="int8"), "^dtype should be one of float32, bfloat16, float16, got 'int8'"),
        (dict(cache_dtype="f32"), "^cache_dtype should be one of .*, got 'f32'"),
        (dict(context=0), "context should be an integer from 1 to 16777216, got 0"),
        (dict(context=True), "context should be an integer"),
        (dict(context=2.0), "context should be an integer"),
        (dict(context=(1 << 24) + 1), "context should be an integer"),
        (dict(rows=0), "rows should be an integer from 1 to 4096, got 0"),
        (dict(rows=4097), "rows should be an integer"),
        (dict(rows=True), "rows should be an integer"),
    ],
)
def test_wrong_choices_of_generation_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        generation(**fields)


def test_generation_takes_its_largest_and_smallest_sizes():
    assert generation(context=1 << 24).context == 1 << 24 and generation(rows=4096).rows == 4096
    assert generation(context=1, rows=1).rows == 1
