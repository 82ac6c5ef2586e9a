"""Context parallelism in a transformers model, over a group of one process."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="context parallelism of its models")
from attention_matrix import build
from families import ids_of

from longlora.torch import configure
from longlora.torch import context_parallel as cp
from longlora.torch.context_parallel import model as inside
from longlora.torch.documents import Documents


@pytest.fixture
def asked(monkeypatch):
    """The keyword arguments of every call of s2_attention."""
    calls = []
    attend = inside.s2_attention

    def attention(*tensors, **how):
        calls.append(how)
        return attend(*tensors, **how)

    monkeypatch.setattr(inside, "s2_attention", attention)
    return calls


def trained(family="llama", **how):
    return configure(build(family, "longlora_s2"), **how).train()


def test_an_enabled_model_computes_the_same(group, asked):
    ids = ids_of(2, 21)
    want = trained(group_size=6, shift="all")(ids).logits
    model = trained(group_size=6, shift="all")
    assert cp.enable(model, group) is model
    assert torch.equal(model(ids).logits, want) and torch.equal(model(input_ids=ids).logits, want)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, want)
    layers = model.config.num_hidden_layers
    assert len(asked) == 3 * layers
    how = asked[0]
    assert (how["group_size"], how["shift"], how["boundary"]) == (6, "all", "split") and how["group"] is group
    assert how["scale"] == (model.config.hidden_size // model.config.num_attention_heads) ** -0.5
    # Without lengths, s2_attention compares the arguments of all ranks: once is enough.
    assert [how["lengths"] for how in asked] == [None] + [(21,)] * (3 * layers - 1)


def test_the_default_group_is_a_quarter_of_the_whole_sequence(group, asked):
    cp.enable(trained(), group)(ids_of(1, 32))
    assert {how["group_size"] for how in asked} == {8}


def test_the_model_gets_the_positions_of_its_piece(group, monkeypatch):
    """This rank has tokens 5 to 11. It makes no cache, unless it is told to."""
    model = cp.enable(trained(group_size=4), group)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    agreed = []

    def agree(op, facts, error, *where):
        agreed.append((op, facts))
        if error is not None:
            raise error
        return 5, 7

    monkeypatch.setattr(inside, "agree", agree)
    (state,) = {module._longlora_cp for module in model.modules()}
    ids, whole = ids_of(2, 7), torch.arange(5, 12)[None]
    mask = torch.ones(2, 7, dtype=torch.long)
    for given, use_cache in (({}, False), ({"use_cache": True}, True), ({"attention_mask": mask}, False)):
        _, how = state.before(model, (ids,), given)
        assert how["position_ids"].tolist() == whole.tolist() and how["attention_mask"] is None
        assert how["use_cache"] is use_cache and state.lengths == (5, 7) and state.seen == {(5, 7)}
    assert agreed == [("context parallel", {"T": 7, "B": 2, "position_ids": False})] * 3
    state.before(model, (ids,), {"position_ids": whole})
    assert agreed[3:] == [
        ("context parallel", {"T": 7, "B": 2, "position_ids": True}),
        ("context parallel", {"T": 7}),
    ]
    for wrong in (whole - 5, whole[:, :6], whole.clone().fill_(5)):
        with pytest.raises(ValueError, match="context parallel: position_ids should be those of the piece"):
            state.before(model, (ids,), {"position_ids": wrong})
    state.after(model, (), None)
    assert state.lengths is None


@pytest.mark.parametrize(
    "given, error, words",
    [
        (
            dict(attention_mask=torch.tensor([[1, 1, 1, 0]])),
            ValueError,
            "attention_mask should be None or all",
        ),
        (dict(past_key_values=object()), ValueError, "past_key_values should be None, got a cache"),
        (dict(cache=object()), ValueError, "cache should be None, got a cache"),
        (dict(labels=ids_of(1, 4)), ValueError, "labels would be shifted inside each piece"),
        (dict(input_ids=None), TypeError, "input_ids or inputs_embeds should be given"),
    ],
)
def test_unsupported_arguments_are_named(group, given, error, words):
    model = cp.enable(trained(group_size=4), group)
    with pytest.raises(error, match=f"context parallel: {words}"):
        model(**{"input_ids": ids_of(1, 4), **given})


def test_two_positional_arguments_are_refused(group):
    with pytest.raises(TypeError, match="context parallel: .*all arguments but the first by name"):
        cp.enable(trained(group_size=4), group)(ids_of(1, 4), torch.ones(1, 4))


def test_shifted_labels_are_accepted(group):
    model, ids = cp.enable(trained(group_size=4), group), ids_of(1, 8)
    labels = cp.next_tokens(ids)
    want = torch.nn.functional.cross_entropy(model(ids).logits[0], labels[0])
    assert model(ids, labels=labels, shift_labels=labels).loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_disable_allows_evaluation_again(group):
    model, ids = trained(group_size=4), ids_of(1, 12)
    want = copy.deepcopy(model).eval()(ids).logits
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    cp.enable(cp.enable(model, group), group)  # the second call replaces the first
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (hooks[0] + 1, hooks[1] + 1)
    with pytest.raises(
        NotImplementedError, match=r"context parallel: only training .* call disable\(model\)"
    ):
        model.eval()(ids)
    assert cp.disable(model) is model
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == hooks
    assert not any(hasattr(module, "_longlora_cp") for module in model.modules())
    assert torch.equal(model(ids).logits, want)


def test_a_layer_in_eval_mode_is_refused(group):
    model = cp.enable(trained(group_size=4), group)
    model.model.layers[1].self_attn.eval()
    with pytest.raises(NotImplementedError, match="got a module in eval mode"):
        model(ids_of(1, 8))


def test_calling_a_part_of_the_enabled_model_is_refused(group):
    model = cp.enable(trained(group_size=4), group)
    with pytest.raises(RuntimeError, match=r"call the model that enable\(\) was given"):
        model.model(ids_of(1, 8))
    with pytest.raises(ValueError, match="labels would"):
        model(ids_of(1, 8), labels=ids_of(1, 8))
    with pytest.raises(RuntimeError, match=r"call the model that enable\(\) was given"):
        model.model(ids_of(1, 8))  # the refused call has left no lengths behind


def test_checkpointed_layers_give_the_same_gradients(group, monkeypatch):
    """The backward pass asks the ranks for lengths only after passes of different lengths."""
    counted, lengths = [], inside.lengths
    monkeypatch.setattr(inside, "lengths", lambda *args: counted.append(args) or lengths(*args))
    for sizes, times in (((8,), 0), ((8, 13), 4)):
        grads = []
        for checkpointing in (False, True):
            model = cp.enable(trained(group_size=4), group)
            if checkpointing:
                how = {"use_reentrant": False}
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            sum(model(ids_of(1, n)).logits.square().sum() for n in sizes).backward()
            grads.append([p.grad for p in model.parameters()])
        assert all(map(torch.equal, *grads))
        assert len(counted) == times
    assert sorted(T for T, *_ in counted) == [8, 8, 13, 13] and counted[0][1] is group


def test_a_layer_is_recomputed_in_the_first_backward_pass(group, monkeypatch):
    """Backward passes are numbered from 0, and outside of them the number is -1."""
    state, x = inside._Parallel(group), torch.ones(1, 4, 2, 8)
    state.seen = {(4,)}
    module = SimpleNamespace(training=True, config=SimpleNamespace(longlora_group_size=4))
    how = dict(documents=Documents(4), boundary="split", shift="half", scale=1.0, window=None)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 0)
    torch.testing.assert_close(state(module, x, x, x, **how), x)  # a mean of ones
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: -1)
    with pytest.raises(RuntimeError, match=r"call the model that enable\(\) was given"):
        state(module, x, x, x, **how)


def test_documents_and_windows_are_refused(group):
    state = inside._Parallel(group)
    state.lengths = (4, 4)
    module = SimpleNamespace(training=True, config=SimpleNamespace(longlora_group_size=4))
    x = torch.zeros(1, 4, 2, 8)
    how = dict(boundary="split", shift="half", scale=1.0)
    with pytest.raises(ValueError, match="SimpleNamespace does not attend causally to its own tokens"):
        state(module, x, x, x, documents=None, window=None, **how)
    packed = Documents(4, torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="packed documents and padding are not supported"):
        state(module, x, x, x, documents=packed, window=None, **how)
    with pytest.raises(ValueError, match="a sliding window of 7 tokens is active at 8"):
        state(module, x, x, x, documents=Documents(4), window=7, **how)
    state.lengths = (4,)
    for window in (None, 4):
        assert state(module, x, x, x, documents=Documents(4), window=window, **how).shape == x.shape
    assert copy.deepcopy(state) is state


def test_a_copied_model_stays_enabled(group):
    model = copy.deepcopy(cp.enable(trained(group_size=4), group))
    assert len({module._longlora_cp for module in model.modules()}) == 1


@pytest.mark.parametrize(
    "family, words",
    [
        ("qwen3_next", "Qwen3NextForCausalLM has linear attention or convolutions"),
        ("bart", "BartForCausalLM takes no position_ids"),
        ("roberta", "RobertaForCausalLM counts positions from its padding"),
    ],
)
def test_unsupported_families_are_refused(group, family, words):
    with pytest.raises(ValueError, match=f"enable: {words}"):
        cp.enable(build(family, "longlora_s2"), group)


def test_other_attention_and_other_groups_are_refused(group):
    with pytest.raises(ValueError, match="enable: .*attn_implementation=\"longlora_s2\", got 'sdpa'"):
        cp.enable(build("llama", "sdpa"), group)
    with pytest.raises(TypeError, match="enable: group should be"):
        cp.enable(trained(), "cp")
