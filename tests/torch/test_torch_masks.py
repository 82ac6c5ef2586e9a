"""Masks of attn_implementation="longlora_s2": none is lost, misread or taken for another.

Right values are those of transformers' SDPA, of the unpadded and unpacked runs, and of the reference.
"""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="its masks are read")
from attention_matrix import build  # noqa: E402
from devices import device, put  # noqa: E402, F401 (a fixture)
from families import VERSION, G, close, ids_of, tiny  # noqa: E402
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask  # noqa: E402

import longlora.torch  # noqa: E402
from longlora.torch import attention, watch  # noqa: E402
from longlora.torch.documents import Documents, of_function  # noqa: E402

pytestmark = pytest.mark.skipif(VERSION < (5, 0), reason="these masks are those of transformers 5")


def trained(family="llama", **how):
    """A model of the family that trains with S²-Attn."""
    return longlora.torch.configure(build(family, "longlora_s2"), **{"group_size": G, **how}).train()


# ---- Documents are not a tensor ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "misread",
    [
        lambda mask, x: x + mask,
        lambda mask, x: mask + x,
        lambda mask, x: x.masked_fill(mask, 0),
        lambda mask, x: torch.where(mask, x, 0),
        lambda mask, x: torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask),
        lambda mask, x: mask[:, :, :2],
        lambda mask, x: 1 - mask,
        lambda mask, x: ~mask,
        lambda mask, x: bool(mask),
        lambda mask, x: mask.shape,
        lambda mask, x: mask.unsqueeze(1),
    ],
)
def test_a_model_that_computes_with_documents_is_refused_by_name(misread):
    for mask in (Documents(4, model="bloom"), Documents(4, put(torch.tensor([[0, 2, 4]])), model="bloom")):
        with pytest.raises(ValueError, match="longlora_s2: a bloom model computes with its attention mask"):
            misread(mask, put(torch.zeros(1, 1, 4, 4)))


def test_documents_are_moved_and_asked_for_attributes_as_accelerate_does():
    mask = Documents(4, torch.tensor([[0, 2, 4]]), torch.ones(1, 4, dtype=torch.bool), True, "llama")
    assert not hasattr(mask, "shape") and not isinstance(mask, torch.Tensor)
    moved = mask.to("meta", non_blocking=True)
    assert moved.cu_seqlens.is_meta and moved.seen.is_meta and moved.packed is True and moved.model == "llama"


# ---- the first training pass ---------------------------------------------------------------------


def test_models_without_the_interface_are_refused_however_they_come():
    for family in ("bloom", "xglm", "mpt", "gpt_neox_japanese"):
        with pytest.raises(ValueError, match=f"longlora_s2: a {family} model computes"):
            build(family, "longlora_s2")(ids_of(1, 8))
        with pytest.raises(ValueError, match="ForCausalLM has no AttentionInterface"):
            longlora.torch.configure(build(family, "longlora_s2"))
    model = build("mamba", "eager")
    model.set_attn_implementation("longlora_s2")
    model.eval()(ids_of(1, 8))
    with pytest.raises(
        ValueError, match="MambaForCausalLM has not called S2-Attn in its first training pass"
    ):
        model.train()(ids_of(1, 8))


class OwnAttention(torch.nn.Module):
    """Attention that asks nobody."""

    def forward(self, hidden_states, **unused):
        return hidden_states.cumsum(1), None


@pytest.mark.parametrize("inner", [False, True])
def test_a_layer_that_attends_by_itself_is_named(inner):
    """Also below the model that is called, as PEFT calls it."""
    model = trained()
    model.model.layers[1].self_attn = OwnAttention()
    for _ in range(2):  # a refused model is not taken for a checked one
        with pytest.raises(ValueError, match="OwnAttention of Llama.* attends by itself, not by S2-Attn"):
            (model.forward if inner else model)(ids_of(1, 8))
    model.eval()(ids_of(1, 8))


def test_a_model_is_checked_once_and_an_interrupted_pass_leaves_nothing():
    model = trained()
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda *unused: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        model(ids_of(1, 8), position_ids=put(torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])))
    handle.remove()
    ids = ids_of(1, 8)
    want = trained()(ids).logits
    assert torch.equal(model(ids).logits, want)
    assert torch.equal(trained()(ids).logits, want) and not watch.packed()
    hooks = [len(m._forward_pre_hooks) for m in model.modules() if type(m).__name__ == "LlamaAttention"]
    assert hooks == [0, 0]
    model.model.layers[1].self_attn = OwnAttention()
    model(ids)  # it was checked


def test_towers_and_cross_attention_keep_transformers_sdpa():
    """Images in LLaVA: the tower sees both ways, the text attends causally; a BART sees its encoder."""
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    llava = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(vocab_size=61, **small),
            vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=14, **small),
            image_token_id=3,
        )
    )
    ids = ids_of(1, 12).masked_fill(put(torch.arange(12)) // 4 == 1, 3)
    bart = build("bart", "sdpa").config
    bart = transformers.BartForConditionalGeneration(bart)
    seen = put((torch.arange(12)[None] < 9).long())
    for model, inputs in (
        (llava, dict(input_ids=ids, pixel_values=put(torch.randn(1, 3, 28, 28)))),
        (bart, dict(input_ids=ids, attention_mask=seen, decoder_input_ids=ids_of(1, 7))),
    ):
        model = put(model).eval()
        want = model(**inputs).logits
        longlora.torch.configure(model, group_size=12, shift="none")
        close(model(**inputs).logits, want)
        close(model.train()(**inputs).logits, want)
        longlora.torch.configure(model, group_size=2)
        assert (model(**inputs).logits - want).abs().max() > 1e-3 * want.abs().max()
    with pytest.raises(ValueError, match="BertLMHeadModel has not called S2-Attn"):
        config = transformers.BertConfig(vocab_size=61, **small)
        put(transformers.BertLMHeadModel._from_config(config, attn_implementation="longlora_s2")).train()(ids)


# ---- what models ask of their attention ----------------------------------------------------------


def test_an_unknown_tensor_is_refused_unless_the_model_was_given_it():
    model, ids = trained(), ids_of(1, 8)
    want = model(ids).logits
    assert torch.equal(model(ids, num_items_in_batch=put(torch.tensor(7))).logits, want)
    original = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda *args, **kwargs: original(*args, sieve=ids, **kwargs)
    with pytest.raises(ValueError, match=r"a tensor that is unknown here \(sieve\) of LlamaAttention"):
        model(ids)


def test_what_the_models_of_transformers_ask_for_is_known():
    """The keywords of all calls of the attention interface in transformers' own code."""
    asked = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for call in path.read_text().split(" = attention_interface(\n")[1:]:
            end = re.search(r"^ *\)$", call, re.MULTILINE)
            asked |= set(re.findall(r"^ +(\w+)=", call[: end.start()], re.MULTILINE))
    harmless = {"attention_mask", "dropout", "scaling", "is_causal", "sliding_window", "deterministic"}
    named = {"query", "key", "value"}
    assert {"softcap", "s_aux", "indices", "scaling"} <= asked
    assert asked <= attention.REFUSED.keys() | attention.KNOWN | harmless | named


# ---- masks that users give -----------------------------------------------------------------------


def test_4d_masks_are_what_they_say():
    ids, T = ids_of(2, 9), 9
    causal = put(torch.ones(T, T, dtype=torch.bool).tril())
    model = trained()
    want = model(ids).logits
    for hidden in (-torch.inf, torch.finfo(torch.float32).min, -1e9):
        mask = put(torch.zeros(T, T)).masked_fill(~causal, hidden)
        assert torch.equal(model(ids, attention_mask=mask[None, None]).logits, want)  # one for both sequences
    documents = causal & (put(torch.arange(T)) // 5 == put(torch.arange(T))[:, None] // 5)
    bias = put(torch.zeros(T, T)).masked_fill(~causal, -torch.inf).masked_fill(causal & ~documents, -2.0)
    for mask, words in (
        (bias, "S2-Attn adds no bias to scores"),
        (causal.long(), ""),
        (documents | documents.T, "not causal attention within documents"),
    ):
        with pytest.raises(ValueError, match=f"4-D attention mask of LlamaAttention.*{words}"):
            model(ids, attention_mask=mask[None, None])
    sdpa = build("llama", "sdpa")
    close(*(m.eval()(ids, attention_mask=bias[None, None]).logits for m in (model, sdpa)))


def test_a_function_from_elsewhere_may_be_any_mask():
    """Token 2 is hidden from all but itself and the next: at the pairs that documents are read from, it looks
    as if a document began."""

    def hides(b, h, q, k):
        return (k != 2) | (q <= 3)

    how = dict(batch_size=1, kv_length=8, q_length=8, device="cpu")
    assert isinstance(attention.mask(**how), Documents)
    how["allow_is_causal_skip"] = False
    custom = dict(mask_function=and_masks(causal_mask_function, hides), use_vmap=True)
    assert torch.equal(attention.mask(**custom, **how), sdpa_mask(**custom, **how))
    always = attention.mask(**how)
    assert torch.equal(always, torch.ones(1, 1, 8, 8, dtype=torch.bool).tril())


# ---- documents -----------------------------------------------------------------------------------

PACKED, SEEN = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]), torch.ones(1, 8, dtype=torch.long)


@pytest.mark.parametrize("family", ["gpt_bigcode", "llama4_text", "gemma3_text"])
@pytest.mark.parametrize("kwargs", [dict(use_reentrant=False), dict(use_reentrant=True)])
def test_checkpointed_layers_have_the_same_documents(family, kwargs):
    """Also where the attention is not shown the position_ids that start again."""
    ids, grads, how = ids_of(1, 8), [], dict(position_ids=put(PACKED), attention_mask=put(SEEN))
    for checkpointing in (False, True):
        model = trained(family)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=x, use_cache=False, **how).logits[0, 5:].square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert x.grad[0, 5:].any() and not x.grad[0, :5].any(), "the second document sees the first"
    assert all(map(torch.equal, *grads))


def test_a_window_in_evaluation_keeps_documents_apart():
    model = tiny("mistral", "longlora_s2", sliding_window=3)
    ids, positions = ids_of(1, 8), put(PACKED)
    with torch.no_grad():
        want = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], 1)
        for how in ({}, dict(attention_mask=put(SEEN))):
            close(model(ids, position_ids=positions, use_cache=False, **how).logits, want)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "zamba2", "falcon_h1", "recurrent_gemma"])
def test_a_state_is_not_carried_from_document_to_document(family):
    model, ids = trained(family), ids_of(1, 8)
    boundaries = put(torch.tensor([0, 5, 8], dtype=torch.int32))
    apart = put(torch.ones(8, 8, dtype=torch.bool).tril())
    apart[5:, :5] = False
    for training in (False, True):
        for how in (
            dict(position_ids=put(PACKED)),
            dict(position_ids=put(PACKED), attention_mask=put(SEEN)),
            dict(cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries),
            dict(attention_mask=apart[None, None]),
        ):
            if "attention_mask" in how and how["attention_mask"].ndim == 4 and not training:
                continue  # there transformers' own SDPA takes the mask
            # Where the first layer is linear, transformers refuses cu_seq_lens_q itself.
            words = f"not supported for {family}.*carry a state|can't keep packed sequences apart"
            with pytest.raises(ValueError, match=words):
                model.train(training)(ids, use_cache=False, **how)
    padded = put(SEEN.clone())
    padded[:, :3] = 0
    model(ids, attention_mask=padded, use_cache=False)


def test_a_compiled_model_keeps_documents_apart_and_stops_at_other_masks():
    torch._dynamo.reset()
    model, ids = trained(), ids_of(1, 8)
    del model.model.layers[1:]
    how = dict(position_ids=put(PACKED), attention_mask=put(SEEN))
    want = model(ids, use_cache=False, **how).logits
    assert (want - model(ids, use_cache=False).logits).abs().max() > 1e-3
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(ids, use_cache=False, **how).logits, want)
    gap = put(SEEN.clone())
    gap[:, 3] = 0
    with pytest.raises(RuntimeError, match="longlora_s2: this mask is not causal attention within documents"):
        compiled(ids, use_cache=False, position_ids=put(torch.arange(8))[None], attention_mask=gap)


def test_documents_of_a_function_are_exact_or_none():
    """Each mask of five tokens, with windows, chunks, documents and padding, equals its documents, if any."""
    from transformers.masking_utils import (
        chunked_overlay,
        packed_sequence_mask_function,
        sliding_window_overlay,
    )

    T, cpu, found_some, found_none = 5, torch.device("cpu"), 0, 0
    b, h, q, k = torch.zeros((), dtype=torch.long), None, torch.arange(T)[:, None], torch.arange(T)[None]
    for overlay in (
        None,
        sliding_window_overlay(2),
        sliding_window_overlay(4),
        chunked_overlay(2, torch.zeros(1)),
    ):
        for bits in range(2 ** (T - 1)):
            index = torch.tensor([[0, *(bits >> i & 1 for i in range(T - 1))]]).cumsum(1)
            function = and_masks(causal_mask_function, packed_sequence_mask_function(index))
            function = and_masks(function, overlay) if overlay else function
            for padding in (
                None,
                *(torch.tensor([[bool(seen >> i & 1) for i in range(T)]]) for seen in range(1, 2**T)),
            ):
                got = of_function(function, padding, 1, T, cpu, "llama")
                if got is None:
                    found_none += 1
                    continue
                found_some += 1
                number = got.starts(1, cpu)[0].cumsum(0)
                ours = (number[:, None] == number) & (k <= q)
                theirs = function(b, h, q, k)
                if padding is not None:
                    ours, theirs = (x & padding[0] & padding[0][:, None] for x in (ours, theirs))
                assert torch.equal(ours, theirs)
    assert found_some > 500 and found_none > 500
