"""We read from a model directory what transformers loads from it, whatever its files are and say."""

import json

import numpy as np
import pytest
import torch
from test_weights import build, edit, failure

from longlora.files.open_model import open_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def same(path):
    """Our tensors equal those of transformers, and both tie the head or neither does."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours, state = open_model(path), theirs.state_dict()
    tied = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert ours.config.tie_word_embeddings is tied
    assert set(ours.names()) == set(state) - ({HEAD} if tied else set())
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), state[name].numpy(), err_msg=name)
    return ours


def sharded(path, **fields):
    """Save a tiny model in shards -> the index as a dict."""
    build(path, save=dict(max_shard_size="3KB"), **fields)
    return json.loads((path / INDEX).read_text())


def shard_of(index, name):
    return index["weight_map"][name]


def change_config(path, **fields):
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, **fields}))


def numbers(shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_single_file_wins_over_an_index(tmp_path):
    """An earlier run may have left its shards and their index."""
    sharded(tmp_path)
    build(tmp_path / "new")
    edit(tmp_path / "new", lambda tensors: {name: array + 1 for name, array in tensors.items()})
    (tmp_path / "new" / SINGLE).rename(tmp_path / SINGLE)
    assert (tmp_path / INDEX).exists() and same(tmp_path).read("model.norm.weight")[0] > 0.5


def test_the_index_says_which_files_to_read_not_where_a_tensor_is(tmp_path):
    index = sharded(tmp_path)
    places = index["weight_map"]
    first, last = "model.embed_tokens.weight", "model.norm.weight"
    places[first], places[last] = places[last], places[first]
    (tmp_path / INDEX).write_text(json.dumps(index))
    same(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.rubbish", "model.layers.7.mlp.up_proj.weight"])
def test_a_tensor_that_the_index_does_not_list_is_read_as_transformers_does(tmp_path, name):
    index = sharded(tmp_path)
    place = index["weight_map"].pop(name, None)
    (tmp_path / INDEX).write_text(json.dumps(index))
    if place is None:
        edit(tmp_path, lambda t: t.update({name: numbers((3, 4))}), shard_of(index, EMBEDDING))
    same(tmp_path)


@pytest.mark.parametrize("lists", ["first", "last"])
def test_a_tensor_in_two_shards_is_read_as_transformers_does(tmp_path, lists):
    index = sharded(tmp_path)
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, place in index["weight_map"].items() if place == files[0])
    edit(tmp_path, lambda t: t.update({name: numbers((50, 16))}), files[-1])
    index["weight_map"][name] = files[0 if lists == "first" else -1]
    (tmp_path / INDEX).write_text(json.dumps(index))
    same(tmp_path)


def test_config_json_may_name_the_weights(tmp_path):
    build(tmp_path)
    edit(tmp_path, lambda tensors: {name: array + 1 for name, array in tensors.items()})
    (tmp_path / SINGLE).rename(tmp_path / "other.safetensors")
    build(tmp_path)
    change_config(tmp_path, transformers_weights="other.safetensors")
    assert same(tmp_path).read("model.norm.weight")[0] > 0.5


@pytest.mark.parametrize("save", [{}, dict(max_shard_size="3KB")], ids=["single", "sharded"])
@pytest.mark.parametrize("head", ["absent", "equal", "another", "alone", "last number"])
def test_a_head_is_tied_where_transformers_ties_it(tmp_path, head, save):
    build(tmp_path, tie_word_embeddings=True, save=save)
    file = shard_of(json.loads((tmp_path / INDEX).read_text()), EMBEDDING) if save else SINGLE

    def change(tensors):
        embedding = tensors[EMBEDDING]
        if head == "alone":
            tensors[HEAD] = tensors.pop(EMBEDDING)
        elif head != "absent":
            tensors[HEAD] = embedding.copy() if head != "another" else numbers(embedding.shape)
        if head == "last number":
            tensors[HEAD][-1, -1] += 1
        return tensors

    edit(tmp_path, change, file)
    if save and head == "alone":  # then the index lists the head
        index = json.loads((tmp_path / INDEX).read_text())
        index["weight_map"][HEAD] = index["weight_map"].pop(EMBEDDING)
        (tmp_path / INDEX).write_text(json.dumps(index))
    ours = same(tmp_path)
    assert ours.config.tie_word_embeddings is (head not in ("another", "last number"))


@pytest.mark.parametrize("value", [-1, [-1], None, 3, [3, 4]])
def test_a_token_id_of_minus_one_is_none(tmp_path, value):
    build(tmp_path)
    change_config(tmp_path, bos_token_id=value, eos_token_id=value)
    config = open_model(tmp_path).config
    assert config.bos_token_id == config.eos_token_id == (3 if value in (3, [3, 4]) else None)
    change_config(tmp_path, bos_token_id=-2)
    assert "bos_token_id should be a token id" in failure(tmp_path)
