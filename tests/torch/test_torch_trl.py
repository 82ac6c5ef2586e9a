"""An extended model in TRL's SFTTrainer trains on padded and packed batches with S²-Attn, and loads again."""

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
trl = pytest.importorskip("trl", reason="these tests run its SFTTrainer")
transformers = pytest.importorskip("transformers", reason="trl stands on it")
import tiny  # noqa: E402

import longlora.torch  # noqa: E402
from longlora.torch import attention  # noqa: E402


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(tmp_path, packing, monkeypatch):
    from datasets import Dataset

    base = tiny.model(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    model = longlora.torch.extend(transformers.AutoModelForCausalLM.from_pretrained(base), 128, group_size=8)
    lines = tiny.text(tmp_path / "text.txt", 600).read_text().splitlines()
    seen = []
    original = attention.ops.s2_attention

    def spy(*arrays, **how):
        seen.append((how["group_size"], how["cu_seqlens"]))
        return original(*arrays, **how)

    monkeypatch.setattr(attention.ops, "s2_attention", spy)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_length=128,
        packing=packing,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model, args=config, train_dataset=Dataset.from_dict({"text": lines}), processing_class=tokenizer
    )
    result = trainer.train()
    assert result.training_loss == result.training_loss and result.global_step == 3
    assert {size for size, _ in seen} == {8}, "something other than S²-Attn trained"
    assert any(boundaries is not None for _, boundaries in seen), (
        "padding or packing did not become document boundaries"
    )
    now = dict(trainer.model.named_parameters())
    assert not [name for name, p in before.items() if torch.equal(now[name], p)]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = longlora.torch.load(tmp_path / "saved", base)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
