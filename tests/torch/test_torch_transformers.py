"""attn_implementation="longlora_s2" on tiny random models of many families.

Dense attention equals sdpa's, S²-Attn the reference's, padded and packed runs the unpadded ones, and generate
gives sdpa's tokens. test_torch_oldest.py runs this again on transformers 4.53.
"""

import functools
import os

import numpy as np
import pytest
import reference

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="these tests extend models of transformers")
from devices import device, put  # noqa: E402, F401 (a fixture)
from families import FAMILIES, VERSION, G, close, ids_of, tiny, without_interface  # noqa: E402

import longlora.torch  # noqa: E402
from longlora.torch import attention  # noqa: E402


def by_mask(module, query, key, value, attention_mask, scaling=None, dropout=0.0, pattern=(G,), **unused):
    """S2-Attn by the reference's mask, document by document: what `attention` must equal. pattern: group,
    boundary, shift.
    """
    H, T = query.shape[1:3]
    key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
    borders = attention_mask.cu_seqlens
    borders = [[0, T]] * len(query) if borders is None else borders.tolist()
    mask = put(np.stack([reference.attention_mask(T, H, *pattern, cu_seqlens=row) for row in borders]))
    scores = (query.double() @ key.double().transpose(2, 3)) * (scaling or query.shape[-1] ** -0.5)
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (p @ value.double()).to(query.dtype).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("s2_by_the_reference", by_mask)
attention.AttentionMaskInterface.register("s2_by_the_reference", attention.mask)
for name, pattern in (
    ("s2_split_none", (4, "split", "none")),
    ("s2_wrap_half", (4, "wrap", "half")),
    ("s2_swap_all", (4, "swap", "all")),
):
    transformers.AttentionInterface.register(name, functools.partial(by_mask, pattern=pattern))
    attention.AttentionMaskInterface.register(name, attention.mask)


def test_the_version_that_is_meant_is_tested():
    assert os.environ.get("LONGLORA_TRANSFORMERS", transformers.__version__) == transformers.__version__


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    without_interface(family)
    ours, sdpa = tiny(family, "longlora_s2"), tiny(family, "sdpa")
    ids = ids_of(2, 23)
    close(ours(ids).logits, sdpa(ids).logits)  # dense
    assert torch.equal(
        *(
            m.generate(
                ids[:, :9], attention_mask=torch.ones_like(ids[:, :9]), max_new_tokens=6, do_sample=False
            )
            for m in (ours, sdpa)
        )
    )
    longlora.torch.configure(ours, group_size=G)
    ours.train()
    whole = ours(ids, use_cache=False).logits
    close(whole, tiny(family, "s2_by_the_reference").train()(ids, use_cache=False).logits)  # S2-Attn
    assert (whole - sdpa(ids).logits).abs().max() > 1e-3 * whole.abs().max()
    loss = ours(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in ours.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_padding_and_packing_are_the_unpadded_runs(family, training):
    without_interface(family)
    model = longlora.torch.configure(tiny(family, "longlora_s2"), group_size=G).train(training)
    lengths, T = (23, 14, 9), 23
    rows = [ids_of(1, n, seed=n) for n in lengths]
    with torch.no_grad():
        want = [model(row, use_cache=False).logits[0] for row in rows]
        for side in ("right", "left"):
            ids, seen = put(torch.zeros(2, 3, T, dtype=torch.long))
            places = [slice(0, n) if side == "right" else slice(T - n, T) for n in lengths]
            for i, (row, place) in enumerate(zip(rows, places)):
                ids[i, place], seen[i, place] = row[0], 1
            position_ids = (seen.cumsum(-1) - 1).clamp(min=0)
            got = model(ids, attention_mask=seen, position_ids=position_ids, use_cache=False).logits
            for i, place in enumerate(places):
                close(got[i, place], want[i])
        packed = torch.cat(rows, 1)
        position_ids = put(torch.cat([torch.arange(n) for n in lengths]))[None]
        got = model(packed, position_ids=position_ids, use_cache=False).logits[0]
        close(got, torch.cat(want))
        documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        mask = put(
            (documents[:, None] == documents)
            & torch.ones(len(documents), len(documents), dtype=torch.bool).tril()
        )
        for given in (mask, torch.where(mask, 0.0, torch.finfo(torch.float32).min)):  # the same as a 4-D mask
            got = model(
                packed, attention_mask=given[None, None], position_ids=position_ids, use_cache=False
            ).logits[0]
            close(got, torch.cat(want))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_documents_that_transformers_leaves_out_of_its_mask(family, training):
    """position_ids that start again beside a padding mask, which may have padding at either end."""
    without_interface(family)
    model = longlora.torch.configure(tiny(family, "longlora_s2"), group_size=G).train(training)
    lengths, T = (14, 9), 26
    rows = [ids_of(1, n, seed=n) for n in lengths]
    packed, position_ids = torch.cat(rows, 1), put(torch.cat([torch.arange(n) for n in lengths]))[None]
    with torch.no_grad():
        want = torch.cat([model(row, use_cache=False).logits[0] for row in rows])
        close(
            model(
                packed, attention_mask=torch.ones_like(packed), position_ids=position_ids, use_cache=False
            ).logits[0],
            want,
        )
        for left in (0, 3):  # padding on both ends, its positions all 1
            ids, seen, positions = (torch.full((1, T), fill, device=packed.device) for fill in (0, 0, 1))
            place = slice(left, left + 23)
            ids[:, place], seen[:, place], positions[:, place] = packed, 1, position_ids
            close(
                model(ids, attention_mask=seen, position_ids=positions, use_cache=False).logits[0, place],
                want,
            )


def test_documents_by_cu_seq_lens():
    """As DataCollatorWithFlattening gives them. Without position_ids positions go on in the next document,
    which changes nothing: attention depends on distances."""
    model = longlora.torch.configure(tiny("llama", "longlora_s2"), group_size=G).train()
    rows = [ids_of(1, n, seed=n) for n in (14, 9)]
    boundaries = put(torch.tensor([0, 14, 23], dtype=torch.int32))
    how = dict(cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=14, max_length_k=14)
    with torch.no_grad():
        want = torch.cat([model(row, use_cache=False).logits[0] for row in rows])
        for position_ids in (None, put(torch.cat([torch.arange(14), torch.arange(9)]))[None]):
            got = model(torch.cat(rows, 1), position_ids=position_ids, use_cache=False, **how).logits[0]
            close(got, want)


def test_the_default_group_is_a_quarter():
    model = tiny("llama", "longlora_s2").train()
    ids = ids_of(1, 4 * G)
    close(model(ids).logits, longlora.torch.configure(tiny("llama", "longlora_s2"), G).train()(ids).logits)
    assert attention.group_size_of(model.config, 3) == 2


@pytest.mark.parametrize("boundary, shift", [("split", "none"), ("wrap", "half"), ("swap", "all")])
def test_settings_count_and_are_saved(tmp_path, boundary, shift):
    ids = ids_of(1, 16)
    want = tiny("llama", f"s2_{boundary}_{shift}").train()(ids, use_cache=False).logits
    model = longlora.torch.configure(tiny("llama", "sdpa"), group_size=4, boundary=boundary, shift=shift)
    close(model.train()(ids).logits, want)
    model.save_pretrained(tmp_path)
    loaded = put(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="longlora_s2")
    )
    assert loaded.config.longlora_group_size == 4
    close(loaded.train()(ids).logits, want)


@pytest.mark.parametrize("kwargs", [dict(use_reentrant=False), dict(use_reentrant=True)])
def test_activation_checkpointing(kwargs):
    ids, grads = ids_of(2, 17), []
    for checkpointing in (False, True):
        model = longlora.torch.configure(tiny("llama", "longlora_s2"), G).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        mask = torch.ones_like(ids)
        mask[0, 12:] = 0
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


@pytest.mark.skipif(
    VERSION < (5, 0), reason="transformers 4 does not trace its own masks without a graph break"
)
def test_a_model_compiles_in_one_graph():
    torch._dynamo.reset()
    model, ids = longlora.torch.configure(tiny("llama", "longlora_s2"), G).train(), ids_of(2, 17)
    want = model(ids, labels=ids, use_cache=False).loss
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(got, want)


def test_generate_with_left_padding_and_a_static_cache():
    ours, sdpa = tiny("llama", "longlora_s2"), tiny("llama", "sdpa")
    ids, mask = ids_of(2, 9), put(torch.ones(2, 9, dtype=torch.long))
    mask[0, :4] = 0
    for kwargs in (
        dict(),
        dict(cache_implementation="static", disable_compile=True),
        dict(use_cache=False),
        dict(num_beams=2),
    ):
        assert torch.equal(
            *(
                m.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, **kwargs)
                for m in (ours, sdpa)
            )
        )


def bidirectional():
    return dict(attention_mask=put(torch.ones(1, 1, 8, 8, dtype=torch.bool)))


@pytest.mark.parametrize(
    "family, changes, inputs, words",
    [
        ("mistral", dict(sliding_window=4), dict, "sliding window of 4 tokens is active at 8"),
        (
            "llama",
            dict(attention_dropout=0.1),
            dict,
            "dropout of attention weights is not supported, got 0.1",
        ),
        ("llama", {}, bidirectional, "not causal attention within documents"),
        (
            "llama",
            {},
            lambda: dict(attention_mask=put(torch.ones(1, 1, 8, 9, dtype=torch.bool))),
            "should be",
        ),
        (
            "llama",
            {},
            lambda: dict(attention_mask=put(torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]]))),
            "a 2-D mask that hides tokens between others",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(family, changes, inputs, words):
    model = tiny(family, "longlora_s2", **changes).train()
    with pytest.raises(ValueError, match=words):
        model(ids_of(1, 8), use_cache=False, **inputs())


@pytest.mark.parametrize(
    "asked, words",
    [
        (dict(s_aux=torch.zeros(4)), "attention sinks"),
        (dict(softcap=30.0), "soft-capped"),
        (dict(indices=torch.zeros(4, dtype=torch.int32)), "attention to selected tokens"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(asked, words):
    module = tiny("llama", "longlora_s2").model.layers[0].self_attn
    x = put(torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match=words):
        attention.attention(module, x, x, x, None, **asked)


def test_in_evaluation_a_sliding_window_and_a_gap_are_sdpas():
    ids = ids_of(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 3:5] = 0
    for family, changes, kwargs in (
        ("mistral", dict(sliding_window=4), {}),
        ("llama", {}, dict(attention_mask=mask)),
    ):
        ours, sdpa = (
            tiny(family, name, **changes)(ids, use_cache=False, **kwargs).logits
            for name in ("longlora_s2", "sdpa")
        )
        close(ours[mask.bool()], sdpa[mask.bool()])


@pytest.mark.parametrize(
    "asked, words",
    [
        (dict(group_size=0), "above 0, got 0"),
        (dict(group_size=True), "got True"),
        (dict(boundary="warp"), "split, wrap, swap"),
        (dict(shift="most"), "half, none, all"),
    ],
)
def test_configure_names_what_is_wrong(asked, words):
    with pytest.raises(ValueError, match=words):
        longlora.torch.configure(tiny("llama", "sdpa"), **asked)
