"""Documents packed into one sequence that do not see each other: losses as if each were alone."""

import numpy as np
import pytest
import tiny
from runs import run

from longlora.decoder import model as model_


def mean_loss(base, config, documents):
    """The mean loss of transformers over the targets of documents that do not see each other, dense
    attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(config / "longlora_base")
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32).eval()
    losses = []
    for ids in documents:
        with torch.no_grad():
            logits = model(torch.tensor(ids)[None]).logits[0, :-1].double()
        target = torch.tensor(ids[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    return torch.cat(losses).mean().item()


def test_a_batch_of_packed_documents_reaches_the_model_with_its_borders(tmp_path, monkeypatch):
    seen = []

    class Recording(model_.Model):
        def train_microbatch(self, ids, targets, loss_scale, read=True, cu_seqlens=None):
            seen.append((cu_seqlens.tolist(), int((targets >= 0).sum())))
            return super().train_microbatch(ids, targets, loss_scale, read, cu_seqlens)

    monkeypatch.setattr(model_, "Model", Recording)
    tiny.documents(tmp_path / "few.jsonl", [64, 64, 30, 98, 128])
    fields = dict(data=str(tmp_path / "few.jsonl"), packing_boundaries="document", max_steps=3)
    run(tmp_path, **fields)
    assert sorted(seen) == [([0, 30, 128], 126), ([0, 64, 128], 126), ([0, 128], 127)]


def test_held_out_documents_do_not_see_each_other(tmp_path):
    tiny.documents(tmp_path / "few.jsonl", [64, 64, 30, 98, 128])
    fields = dict(data=str(tmp_path / "few.jsonl"), max_steps=1)
    held = tiny.documents(tmp_path / "held.jsonl", [64, 64, 20, 60, 48], seed=1)
    fields["eval_data"] = str(tmp_path / "held.jsonl")
    apart = run(tmp_path, packing_boundaries="document", output_dir=str(tmp_path / "apart"), **fields)
    joined = run(tmp_path, output_dir=str(tmp_path / "joined"), **fields)
    losses = (
        mean_loss(tmp_path / "base", tmp_path / "apart", documents)
        for documents in (held, [np.concatenate(held[:2]), np.concatenate(held[2:])])
    )
    for result, wanted in zip((apart, joined), losses, strict=True):
        assert result.history[0]["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    assert apart.history[0]["eval_loss"] != pytest.approx(joined.history[0]["eval_loss"], rel=1e-3)


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_packed_documents_train_as_if_each_were_alone(tmp_path, name):
    """A step over three sequences. The last one is shorter, so that the batch of three ends in padding."""
    documents = tiny.documents(tmp_path / "few.jsonl", [64, 64, 30, 98, 70])
    fields = dict(data=str(tmp_path / "few.jsonl"), packing_boundaries="document", attention="dense")
    result = run(tmp_path, max_steps=1, **fields, **{name: 3})
    wanted = mean_loss(tmp_path / "base", tmp_path / "out", documents)
    assert result.loss == pytest.approx(wanted, rel=1e-5)


def test_s2_attention_of_a_document_does_not_depend_on_what_it_is_packed_with(tmp_path):
    """One step over two documents of 64 tokens: packed into a sequence, or a sequence each. The groups are of
    16."""
    tiny.documents(tmp_path / "few.jsonl", [64, 64])
    fields = dict(data=str(tmp_path / "few.jsonl"), max_steps=2, group_size=16, packing_boundaries="document")
    together = run(tmp_path, output_dir=str(tmp_path / "together"), **fields)
    fields.update(sequence_length=64, per_device_train_batch_size=2)
    apart = run(tmp_path, output_dir=str(tmp_path / "apart"), **fields)
    for a, b in zip(together.history, apart.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
