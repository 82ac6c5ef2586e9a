"""A batch, and documents packed in it, give what transformers gives for each row or document alone."""

import numpy as np
import pytest
from peers import CONFIGS, LORAS, S2, build, close, gradients, peer, peer_losses, registered, tokens

from longlora.decoder import layer as layer_

# A second thread only slows such small models.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CONFIGS)
def test_batches_and_positions_give_the_logits_of_transformers(name):
    made = build(name, LORAS["all"], B=1, T=16)
    module, _ = peer(made, name, LORAS["all"], None)
    torch, _ = registered()
    ids, targets = tokens(3, 29)
    positions = np.random.default_rng(1).integers(0, 200, ids.shape).astype(np.int32)
    want = {}
    for key, given in (("rows", {}), ("positions", {"position_ids": torch.from_numpy(positions).long()})):
        want[key] = module(torch.from_numpy(ids).long(), use_cache=False, **given).logits.detach().numpy()
    close(made.logits(ids), want["rows"], 1e-5)
    found = made.logits(ids, positions=positions)
    assert found.shape == (3, 29, 101) and found.dtype == np.float32
    close(found, want["positions"], 1e-5)
    close(made.logits(ids[1], positions=positions[1]), want["positions"][1], 1e-5)
    losses = made.losses(ids, targets, positions=positions)
    logits = torch.from_numpy(want["positions"])
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).long().flatten(), reduction="none"
    )
    close(losses, flat.numpy().reshape(3, 29), 1e-5)


# Of two rows. One document has one token, one spans both rows, one is empty.
BORDERS = np.array([0, 9, 10, 50, 50, 74], np.int32)


def documents(ids):
    """The packed documents of ids [B,T], each [1,L]."""
    flat = ids.reshape(-1)
    return [flat[None, a:b] for a, b in zip(BORDERS[:-1], BORDERS[1:]) if b > a]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_evaluated_as_if_alone(name):
    made = build(name, LORAS["all"], B=1, T=16)
    module, _ = peer(made, name, LORAS["all"], None)
    ids, targets = tokens(2, 37)
    found = made.logits(ids, cu_seqlens=BORDERS)
    alone = [peer_losses(module, x, t) for x, t in zip(documents(ids), documents(targets))]
    close(found.reshape(74, -1), np.concatenate([logits.detach().numpy() for _, logits in alone]), 1e-5)
    losses = made.losses(ids, targets, cu_seqlens=BORDERS)
    assert losses.shape == (2, 37)
    close(losses.sum(dtype=np.float64), sum(total.item() for total, _ in alone), 1e-6)
    again = made.losses(ids, targets)  # rows again: nothing of the documents is left
    total, _ = peer_losses(module, ids, targets)
    close(again.sum(dtype=np.float64), total.item(), 1e-6)


@pytest.mark.parametrize("attention", [S2, None], ids=["s2", "dense"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "smollm3"])
def test_packed_documents_are_trained_as_if_alone(name, attention):
    """Groups and positions start again in each document. Loss and gradients are sums over transformers'."""
    ids, targets = tokens(2, 37)
    found = []
    for choice in layer_.RECOMPUTE:
        made = build(name, LORAS["all"], attention=attention, checkpointing=choice)
        loss = made.train_microbatch(ids, targets, 0.01, cu_seqlens=BORDERS)
        found.append((loss, {p.name: p.grad.numpy().copy() for p in made.parameters}))
    module, named = peer(made, name, LORAS["all"], attention)
    total = sum(peer_losses(module, x, t)[0] for x, t in zip(documents(ids), documents(targets)))
    (total * 0.01).backward()
    close(found[0][0], total.item(), 1e-6)
    for n, parameter in named.items():
        close(found[0][1][n], parameter.grad.numpy(), 2e-5, n)
        for _, other in found[1:]:
            np.testing.assert_array_equal(other[n], found[0][1][n], n)
    rows, _ = gradients(made, ids, targets)  # rows again: nothing of the documents is left
    assert rows == gradients(build(name, LORAS["all"], attention=attention), ids, targets)[0] != found[0][0]
