"""Units of longlora.torch.attention, documents and watch, without a model of transformers."""

import functools
import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="its masks are read")
from families import VERSION  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
)

from longlora.torch import attention, documents, ops, watch  # noqa: E402
from longlora.torch.documents import Documents  # noqa: E402

new = pytest.mark.skipif(VERSION < (5, 0), reason="transformers 5 makes these masks")


class Layer(torch.nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(model_type="tiny", **config)


def plain_layer():
    """A layer whose one group has all 8 tokens, so that it attends causally."""
    return Layer(longlora_group_size=8, longlora_shift="none")


def qkv(T=8, H=2, K=1, D=4, B=1, S=None, E=None):
    draw = torch.Generator().manual_seed(0)
    shapes = (B, H, T, D), (B, K, S or T, D), (B, K, S or T, E or D)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def reference(q, k, v, seen, scale):
    """softmax(scale q k^T) v over the keys that `seen` allows, with one KV head. Returns [B,T,H,E]."""
    scores = (scale * q @ k.transpose(2, 3)).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


CAUSAL = torch.ones(8, 8, dtype=torch.bool).tril()
NUMBER = torch.arange(8) // 5  # the document of each token
APART = CAUSAL & (NUMBER[:, None] == NUMBER)
RESTARTED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])  # position_ids of these documents
near = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


# ---- a call of a layer ---------------------------------------------------------------------------


def test_the_settings_of_the_config_apply_in_training_only():
    layer, (q, k, v) = Layer(longlora_group_size=4, longlora_shift="none", longlora_boundary="wrap"), qkv()
    groups = torch.arange(8) // 4
    seen = CAUSAL & (groups[:, None] == groups)
    out, weights = attention.attention(layer, q, k, v, None)
    near(out, reference(q, k, v, seen, 0.5))
    assert weights is None and out.shape == (1, 8, 2, 4)
    layer.eval()
    near(attention.attention(layer, q, k, v, Documents(8))[0], reference(q, k, v, CAUSAL, 0.5))
    near(attention.attention(layer, q, k, v, Documents(8), scaling=0.1)[0], reference(q, k, v, CAUSAL, 0.1))


def test_the_default_settings_are_the_papers(monkeypatch):
    seen = []
    attend = ops.s2_attention
    monkeypatch.setattr(ops, "s2_attention", lambda *x, **how: seen.append(how) or attend(*x, **how))
    layer = Layer()
    attention.attention(layer, *qkv(16), None)
    attention.attention(layer.eval(), *qkv(16), Documents(16))
    both = dict(cu_seqlens=None, scale=0.5, boundary="split")
    assert seen == [dict(group_size=4, shift="half", **both), dict(group_size=16, shift="none", **both)]
    assert attention.attention(layer, *qkv(1), Documents(1))[0].shape == (1, 1, 2, 4)


@pytest.mark.parametrize("widths", [(4, 6), (6, 4), (10, 8)])
def test_heads_of_k_and_v_of_different_sizes(widths):
    D, E = widths
    layer, (q, k, v) = plain_layer(), qkv(D=D, E=E)
    out = attention.attention(layer, q, k, v, None)[0]
    assert out.shape == (1, 8, 2, E)
    near(out, reference(q, k, v, CAUSAL, 1 / math.sqrt(D)))


@pytest.mark.parametrize(
    "how",
    [
        dict(attention_mask=Documents(8, torch.tensor([0, 5, 8], dtype=torch.int32))),
        dict(attention_mask=APART[None, None]),
        dict(attention_mask=torch.zeros(1, 1, 8, 8).masked_fill(~APART, -1e4)),
        dict(attention_mask=None, position_ids=RESTARTED),
        dict(attention_mask=Documents(8), position_ids=RESTARTED),
        dict(attention_mask=None, cu_seq_lens_q=torch.tensor([0, 5, 8])),
    ],
)
def test_every_way_to_give_documents(how):
    layer, (q, k, v) = plain_layer(), qkv()
    near(attention.attention(layer, q, k, v, **how)[0], reference(q, k, v, APART, 0.5))


def test_position_ids_of_other_shapes_are_ignored():
    layer, (q, k, v) = plain_layer(), qkv()
    for positions in (torch.zeros(1, 7), torch.zeros(3, 1, 8), torch.zeros(8), 0):
        out = attention.attention(layer, q, k, v, None, position_ids=positions)[0]
        near(out, reference(q, k, v, CAUSAL, 0.5))


def test_sdpa_of_transformers_serves_other_attention():
    q, k, v = qkv(3, S=8)
    layer = Layer().eval()
    layer.num_key_value_groups = 2
    every = torch.ones(3, 8, dtype=torch.bool)
    seen = every.tril(5)
    for mask in (None, seen[None, None]):
        out = attention.attention(layer, q, k, v, mask, is_causal=False, scaling=0.3)[0]
        near(out, reference(q, k, v, every if mask is None else seen, 0.3))
    out = attention.attention(layer, q, k, v, seen[None, None])[0]  # 3 queries after 5 cached keys
    near(out, reference(q, k, v, seen, 0.5))
    q, k, v = qkv()
    near(attention.attention(layer, q, k, v, CAUSAL[None, None])[0], reference(q, k, v, CAUSAL, 0.5))
    layer.train().is_causal = False  # such as a vision tower
    near(attention.attention(layer, q, k, v, None)[0], reference(q, k, v, torch.ones_like(CAUSAL), 0.5))


@pytest.mark.parametrize(
    "how, words",
    [
        (
            dict(dropout=0.1),
            r"dropout of attention weights is not supported, got 0.1 \(config.attention_drop",
        ),
        (dict(sliding_window=7), "a sliding window of 7 tokens is active at 8"),
        (dict(mask=Documents(7)), "the mask of Layer is for 7 tokens, got 8 queries and 8 keys"),
        (dict(mask=torch.ones(8, 8)), "the attention mask of Layer should have 4 axes, got 2"),
        (dict(mask=torch.ones(1, 2, 8, 8)), r"of Layer should be \[1,1,8,8\], got \[1, 2, 8, 8\]"),
        (dict(mask=torch.ones(3, 1, 8, 8)), r"of Layer should be \[1,1,8,8\], got \[3, 1, 8, 8\]"),
        (dict(mask=torch.ones(1, 1, 7, 8)), r"of Layer should be \[1,1,8,8\], got \[1, 1, 7, 8\]"),
        (dict(mask=torch.ones(1, 1, 8, 9)), r"of Layer should be \[1,1,8,8\], got \[1, 1, 8, 9\]"),
        (dict(mask=(CAUSAL | CAUSAL.T)[None, None]), "is not causal attention within documents"),
        (
            dict(mask=torch.zeros(1, 1, 8, 8).masked_fill(~CAUSAL, -9e3)),
            "0 where a token is seen and at most -10000",
        ),
        (dict(softcap=30.0), r"soft-capped scores \(softcap\) of Layer is not supported"),
        (dict(cache=None, softcap=30.0), r"soft-capped scores \(softcap\)"),
        (dict(head_mask=torch.ones(2)), r"a head mask \(head_mask\) of Layer"),
        (dict(sieve=torch.ones(2)), r"a tensor that is unknown here \(sieve\) of Layer"),
    ],
)
def test_unsupported_arguments_are_named(how, words, monkeypatch):
    monkeypatch.setattr(watch, "is_argument", lambda name: False)
    how = dict(how)
    mask = how.pop("mask", None)
    with pytest.raises(ValueError, match=f"longlora_s2: .*{words}"):
        attention.attention(Layer(), *qkv(), mask, **how)


def test_arguments_without_effect_are_accepted(monkeypatch):
    monkeypatch.setattr(watch, "is_argument", lambda name: name == "mine")
    layer = plain_layer()
    want = attention.attention(layer, *qkv(), None)[0]
    harmless = dict(softcap=None, output_attentions=False, mine=torch.ones(1))
    flash = "cu_seq_lens_k max_length_q max_length_k cache_position".split()  # for other functions
    harmless |= dict.fromkeys(flash, torch.arange(8))
    out = attention.attention(layer, *qkv(), None, unknown=7, sliding_window=8, **harmless)[0]
    assert torch.equal(out, want)


def test_fewer_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="a key for each query, got 3 queries and 8 keys"):
        attention.attention(Layer(), *qkv(3, S=8), None)
    with pytest.raises(ValueError, match="the mask of Layer is for 8 tokens, got 3 queries and 8 keys"):
        attention.attention(Layer().eval(), *qkv(3, S=8), Documents(8))


def test_context_parallel_gets_the_settings_and_the_documents():
    layer, (q, k, v), given = Layer(longlora_shift="all", longlora_boundary="swap"), qkv(E=6), []

    def parallel(module, q, k, v, **how):
        given.append((module, how))
        return q

    layer._longlora_cp = parallel
    out = attention.attention(layer, q, k, v, None, scaling=0.3, sliding_window=9)[0]
    assert out.shape == (1, 8, 2, 6)
    ((module, how),) = given
    assert module is layer and how.pop("documents").cu_seqlens is None
    assert how == dict(boundary="swap", shift="all", scale=0.3, window=9)
    attention.attention(layer.eval(), q, k, v, None, is_causal=False)
    assert given[1][1] == dict(boundary="split", shift="none", scale=0.5, window=None, documents=None)


def test_packed_documents_beside_bidirectional_attention(monkeypatch):
    layer = Layer().eval()
    monkeypatch.setattr(watch, "packed", lambda: True)
    with pytest.raises(ValueError, match="packed documents are not supported beside Layer"):
        attention.attention(layer, *qkv(3, S=8), None, is_causal=False)
    layer.num_key_value_groups = 2
    assert attention.attention(layer, *qkv(), None, is_causal=False)[0].shape == (1, 8, 2, 4)
    assert attention.attention(layer, *qkv(3, S=8), None)[0].shape == (1, 3, 2, 4)  # after cached tokens


# ---- the mask of a forward pass ------------------------------------------------------------------


def masked(T=8, kv=None, **how):
    return attention.mask(**{**dict(batch_size=1, kv_length=kv or T, q_length=T, device="cpu"), **how})


def test_a_mask_without_documents_stops_a_compiled_model(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="longlora_s2: this mask is not causal attention within documents"):
        documents.of_function(
            lambda b, h, q, k: (k <= q) & (k > q - 2), None, 1, 8, torch.device("cpu"), "tiny"
        )


@new
def test_masks_that_are_documents():
    found = masked()
    assert isinstance(found, Documents) and found.length == 8 and found.cu_seqlens is None
    assert not found.packed and found.model == "this"
    packed = and_masks(causal_mask_function, packed_sequence_mask_function(NUMBER[None]))
    config = SimpleNamespace(model_type="tiny")
    found = masked(mask_function=packed, config=config)
    assert found.cu_seqlens.tolist() == [[0, 5, 8]] and found.cu_seqlens.dtype == torch.int32
    assert bool(found.packed) and found.model == "tiny" and found.seen is None
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 5]])  # longer than the queries
    found = masked(attention_mask=padding)
    assert (
        found.cu_seqlens.tolist() == [[0, 2, 7, 8]] and found.seen.tolist() == padding[:, :8].bool().tolist()
    )
    assert not found.packed


def test_masks_of_transformers_4(monkeypatch):
    """It passes cache_position in place of the number of queries and their offset."""
    positions = torch.arange(8)
    found = attention.mask(batch_size=1, kv_length=8, cache_position=positions)
    assert isinstance(found, Documents) and found.length == 8
    monkeypatch.setattr(attention, "sdpa_mask", lambda **how: how)
    how = attention.mask(batch_size=1, kv_length=9, cache_position=positions)
    assert how["cache_position"] is positions and how["kv_length"] == 9
    assert how.keys().isdisjoint(("q_length", "q_offset", "device"))


@new
@pytest.mark.parametrize(
    "how",
    [
        dict(q_offset=2),
        dict(q_offset=torch.tensor(0)),
        dict(kv_offset=2),
        dict(kv=9),
        dict(T=1),
        dict(allow_is_causal_skip=False),
        dict(use_vmap=True),
        dict(attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])),
    ],
)
def test_masks_that_transformers_makes(how):
    found = masked(**how)
    assert not isinstance(found, Documents)
    how = dict(how)
    T = how.pop("T", 8)
    sizes = dict(batch_size=1, q_length=T, kv_length=how.pop("kv", T), device="cpu")
    want = sdpa_mask(**{**sizes, "attention_mask": None, **how})
    if want is None:
        assert found is None
    else:
        assert torch.equal(found, want)


@new
def test_the_keys_of_a_cache_may_begin_after_the_first_token():
    """Tokens 3 and 4, and the keys of tokens 2 to 5."""
    found = masked(2, 4, q_offset=3, kv_offset=2)
    assert found[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


class Model(torch.nn.Module):
    """A model whose mask is made in its forward pass."""

    def __init__(self, **how):
        super().__init__()
        self.how, self.found = how, None
        watch.watch(self)

    def forward(self, position_ids=None, **unused):
        self.found = masked(**self.how)
        self.packed = watch.packed()


@new
def test_position_ids_of_the_model_divide_its_mask():
    model = Model().eval()
    model(position_ids=RESTARTED)
    assert model.found.cu_seqlens.tolist() == [[0, 5, 8]] and model.packed
    model(position_ids=RESTARTED[:, :5])  # not those of the 8 tokens
    assert model.found.cu_seqlens is None and not model.packed
    model()
    assert model.found.cu_seqlens is None and not watch.packed()
    model = Model(allow_is_causal_skip=False).eval()
    model(position_ids=RESTARTED)
    assert torch.equal(model.found[0, 0], APART) and model.packed
    model(position_ids=torch.arange(8)[None])
    assert torch.equal(model.found[0, 0], CAUSAL) and not model.packed
    mamba = SimpleNamespace(model_type="mixed", layer_types=["linear_attention"])
    for how in (dict(config=mamba), dict(config=mamba, allow_is_causal_skip=False)):
        with pytest.raises(ValueError, match="packed documents are not supported for mixed"):
            Model(**how).eval()(position_ids=RESTARTED)


# ---- documents -----------------------------------------------------------------------------------


def test_devices_and_starts_of_documents():
    found = Documents(4, torch.tensor([[0, 2, 4]]), torch.ones(1, 4), torch.tensor(True), "llama").to("meta")
    assert found.length == 4 and found.cu_seqlens.is_meta and found.seen.is_meta and found.packed.is_meta
    plain = Documents(4).to("meta")
    assert (plain.cu_seqlens, plain.seen, plain.packed, plain.model) == (None, None, False, "this")
    starts = Documents(4, torch.tensor([[0, 2, 4], [0, 4, 4]])).starts(2, torch.device("cpu"))
    assert starts.int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 0]]
    starts = Documents(4, torch.tensor([0, 3, 4])).starts(2, torch.device("cpu"))
    assert starts.int().tolist() == [[1, 0, 0, 1]] * 2


def test_documents_are_on_the_device_of_their_mask():
    """Not on torch's default device, which no tensor of a model need be on."""
    seen = torch.ones(2, 8, dtype=torch.bool)
    fourd = torch.ones(8, 8, dtype=torch.bool).tril().expand(2, 1, 8, 8)
    with torch.device("meta"):
        for how in ({}, dict(attention_mask=seen)):
            assert isinstance(masked(batch_size=2, **how), Documents)
        assert documents.of_4d(fourd, 2, 8, "a", "b").cu_seqlens is None
        found = Documents(8).restarted(RESTARTED, 1)
    assert found.cu_seqlens.device.type == "cpu"


def test_documents_of_position_ids_are_cached():
    whole, positions = Documents(8, model="llama"), RESTARTED.clone()
    found = whole.restarted(positions, 1)
    assert found.cu_seqlens.tolist() == [[0, 5, 8]] and bool(found.packed) and found.model == "llama"
    assert whole.restarted(positions, 1) is found and found.restarted(positions, 1) is found
    positions[0, 5:] += 5  # now they do not restart
    assert whole.restarted(positions, 1) is whole
    other = RESTARTED.clone()
    assert whole.restarted(other, 1).cu_seqlens.tolist() == [[0, 5, 8]]
    both = Documents(8, torch.tensor([[0, 2, 8]]), packed=True).restarted(other, 1)
    assert both.cu_seqlens.tolist() == [[0, 2, 5, 8]]
    same = Documents(8, torch.tensor([[0, 5, 8]]))
    assert same.restarted(other, 1) is same
    seen = torch.tensor([[True] * 5 + [False] * 3])
    padded = Documents(8, torch.tensor([[0, 5, 8]]), seen)
    assert padded.restarted(torch.tensor([[0, 1, 0, 1, 2, 1, 1, 1]]), 1).cu_seqlens.tolist() == [[0, 2, 5, 8]]
    with torch.inference_mode():
        assert whole.restarted(RESTARTED.clone(), 1).cu_seqlens.tolist() == [[0, 5, 8]]


def test_boundaries_and_restarts():
    starts = torch.tensor([[True, False, True, False], [True, False, False, False]])
    assert documents.boundaries(starts).tolist() == [[0, 2, 4], [0, 4, 4]]
    assert documents.boundaries(starts[1:]) is None and documents.boundaries(starts).dtype == torch.int32
    positions = torch.tensor([[0, 1, 1, 0, 5]])
    assert documents.restarts(positions, None, 2, 5).int().tolist() == [[0, 0, 1, 1, 0]] * 2
    for hidden, wanted in ((1, [0, 0, 0, 1, 0]), (2, [0, 0, 0, 0, 0]), (3, [0, 0, 1, 0, 0])):
        seen = torch.arange(5)[None] != hidden
        assert documents.restarts(positions, seen, 1, 5).int().tolist() == [wanted]


def test_a_4d_mask_is_read_again_only_after_a_change():
    mask = torch.stack([CAUSAL, APART])[:, None]
    found = documents.of_4d(mask, 2, 8, "Layer", "tiny")
    assert (
        found.cu_seqlens.tolist() == [[0, 8, 8], [0, 5, 8]] and bool(found.packed) and found.model == "tiny"
    )
    assert found.seen is None and found.length == 8 and documents.of_4d(mask, 2, 8, "Layer", "tiny") is found
    mask[1] = CAUSAL
    assert documents.of_4d(mask, 2, 8, "Layer", "tiny").cu_seqlens is None
    assert documents.of_4d(APART[None, None], 2, 8, "", "").cu_seqlens.tolist() == [[0, 5, 8]] * 2
    assert not documents.of_4d(CAUSAL[None, None], 2, 8, "", "").packed
    hidden = torch.zeros(1, 1, 8, 8).masked_fill(~CAUSAL, -1e4)
    assert documents.of_4d(hidden, 1, 8, "", "").cu_seqlens is None


# Layer types of Qwen3-Next, LFM2, Jamba and RecurrentGemma.
STATEFUL = ("linear_attention", "conv", "mamba", "recurrent")


@pytest.mark.parametrize(
    "config, carries",
    [
        (None, False),
        (SimpleNamespace(), False),
        (SimpleNamespace(layer_types=["full_attention"]), False),
        *((SimpleNamespace(layer_types=["full_attention", kind]), True) for kind in STATEFUL),
        (SimpleNamespace(layers_block_type=["hybrid"]), True),
        (SimpleNamespace(layer_types=["hybrid_sliding"]), True),
        (SimpleNamespace(mamba_d_state=4), True),
        (SimpleNamespace(not_mamba_d=4), False),
        (transformers.LlamaConfig(), False),
    ],
)
def test_models_that_carry_a_state(config, carries):
    assert documents.carries_state(config) is carries
    packed = Documents(4, packed=torch.tensor(True), model="tiny")
    alone = Documents(4, packed=torch.tensor(False))
    assert documents.keep_apart(alone, config) is alone
    if carries:
        with pytest.raises(ValueError, match="packed documents are not supported for tiny.*carry a state"):
            documents.keep_apart(packed, config)
    else:
        assert documents.keep_apart(packed, config) is packed


# ---- forward passes ------------------------------------------------------------------------------


class TinyAttention(torch.nn.Module):
    """served: whether S2-Attn serves its call, or None if it attends by itself."""

    def __init__(self, served=True, index=0):
        super().__init__()
        self.served, self.layer_idx = served, index

    def forward(self, x):
        if self.served is not None:
            watch.note(self, self.served)
        return x


class Watched(torch.nn.Module):
    def __init__(self, *layers, **config):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))
        watch.watch(self)

    def forward(self, x, **unused):
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_first_training_pass_is_checked():
    for layers in ((), (TinyAttention(False),)):
        with pytest.raises(ValueError, match="Watched has not called S2-Attn in its first training pass"):
            Watched(*layers)(1)
        Watched(*layers).eval()(1)
    with pytest.raises(ValueError, match="TinyAttention of Watched attends by itself"):
        Watched(TinyAttention(), TinyAttention(None))(1)
    model = Watched(TinyAttention(), torch.nn.Identity())
    model(1)
    model.layers.append(TinyAttention(None))
    model(1)  # only the first pass is checked
    assert not model.layers[0]._forward_pre_hooks
    types = ["full_attention", "linear_attention"]
    Watched(TinyAttention(), TinyAttention(None, 1), layer_types=types)(1)
    with pytest.raises(ValueError, match="attends by itself"):
        Watched(TinyAttention(), TinyAttention(None, 0), layer_types=types)(1)
    with pytest.raises(ValueError, match="attends by itself"):
        Watched(TinyAttention(), TinyAttention(None, None), layer_types=types)(1)


def test_nested_passes():
    inner = Watched(TinyAttention())
    Watched(inner)(1)  # the attention of the inner model is enough
    with pytest.raises(ValueError, match="TinyAttention of Watched attends by itself"):
        Watched(Watched(TinyAttention(), TinyAttention(None)), TinyAttention())(1)
    watch.watch(inner)
    assert len(inner._forward_pre_hooks) == len(inner._forward_hooks) == 1


def test_the_arguments_of_the_current_pass():
    seen = []

    class Asking(TinyAttention):
        def forward(self, x):
            seen.append([watch.is_argument(name) for name in ("mine", "other")])
            seen.append([watch.positions(B, T) is not None for B, T in ((1, 4), (2, 4), (1, 5))])
            watch.remember(torch.tensor(False))
            seen.append(watch.packed())
            watch.remember(True)
            seen.append(watch.packed())
            return super().forward(x)

    for positions, fits in (
        (torch.zeros(1, 4), [True, True, False]),
        (torch.zeros(2, 4), [False, True, False]),
        (torch.zeros(1, 1, 4), [False] * 3),
        ([[0] * 4], [False] * 3),
        (None, [False] * 3),
    ):
        seen.clear()
        Watched(Watched(Asking())).eval()(1, mine=1)
        assert seen[0] == [True, False] and seen[2:] == [False, True]
        seen.clear()
        Watched(Asking()).eval()(1, position_ids=positions)
        assert seen[1] == fits
    assert watch.is_argument("other") and not watch.packed() and watch.positions(1, 4) is None
    watch.remember(True)
    watch.note(None, True)
    assert not watch.packed()


def test_an_interrupted_pass_leaves_no_state():
    class Stops(TinyAttention):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Watched(Watched(Stops()))(1)
    model = Watched(Watched(TinyAttention()))
    model(1)
    assert not watch._passes.stack
    for _ in range(2):  # a pass of which no hook has seen the end
        watch._before(model, (), {})
        assert len(watch._passes.stack) == 1
    watch._after(model, (), 1)
    assert not watch._passes.stack


def test_a_pass_that_fails_has_not_been_checked():
    class Fails(TinyAttention):
        def forward(self, x):
            raise KeyError("mine")

    model = Watched(TinyAttention(), Fails())
    with pytest.raises(KeyError, match="mine"):
        model(1)
    model.layers[1] = TinyAttention(None)
    with pytest.raises(ValueError, match="TinyAttention of Watched attends by itself"):
        model(1)
