"""Whether swap knows a forward is read from its source: what is only near a known one is unknown."""

import functools

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="its sources are read")
from families import VERSION, tiny  # noqa: E402
from swap_checks import own_rotary  # noqa: E402
from torch import nn  # noqa: E402

import longlora.torch  # noqa: E402
from longlora.torch import forms  # noqa: E402

LLAMA = transformers.models.llama.modeling_llama


class Norm(LLAMA.LlamaRMSNorm):
    """As transformers', in other words."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        kept: torch.dtype = rows.dtype
        rows = rows.to(torch.float32)
        mean = rows.pow(2).mean(-1, keepdim=True)
        # A comment.
        rows = rows * torch.rsqrt(mean + self.variance_epsilon)
        return self.weight * rows.to(kept)


class Other(LLAMA.LlamaRMSNorm):
    def forward(self, rows):
        kept = rows.dtype
        rows = rows.to(torch.float32)
        mean = rows.pow(2).mean(-1, keepdim=False)
        rows = rows * torch.rsqrt(mean + self.variance_epsilon)
        return self.weight * rows.to(kept)


class Gated(LLAMA.LlamaRMSNorm):
    def forward(self, rows, gate=None):
        kept = rows.dtype
        rows = rows.to(torch.float32)
        mean = rows.pow(2).mean(-1, keepdim=True)
        rows = rows * torch.rsqrt(mean + self.variance_epsilon)
        return self.weight * rows.to(kept)


def doubled(function):
    @functools.wraps(function)
    def call(*args):
        return 2 * function(*args)

    return call


class Decorated(LLAMA.LlamaRMSNorm):
    forward = doubled(LLAMA.LlamaRMSNorm.forward)


class Helped(nn.Module):
    """Moshi's norm with a helper that subtracts the mean."""

    def _norm(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        output = output * self.weight.float()
        return output.type_as(x)


def without_source():
    space = {"torch": torch, "LlamaRMSNorm": LLAMA.LlamaRMSNorm}
    exec("class Made(LlamaRMSNorm):\n  def forward(self, x):\n    return x", space)
    return space["Made"]


def seeing_a_variable(eps):
    class Closed(LLAMA.LlamaRMSNorm):
        def forward(self, rows):
            kept = rows.dtype
            rows = rows.to(torch.float32)
            mean = rows.pow(2).mean(-1, keepdim=True)
            rows = rows * torch.rsqrt(mean + eps)
            return self.weight * rows.to(kept)

    return Closed


class Inherits(LLAMA.LlamaRMSNorm):
    pass


@pytest.mark.parametrize(
    "kind, known",
    [
        (LLAMA.LlamaRMSNorm, True),
        (Norm, True),
        (Inherits, True),
        (Other, False),
        (Gated, False),
        (Decorated, False),
        (Helped, False),
        (without_source(), False),
        (seeing_a_variable(1e-6), False),
        (nn.LayerNorm, False),
        (nn.Module, False),
    ],
)
def test_norms(kind, known):
    assert (forms.norm(kind) is not None) == known


def test_a_patched_class_is_unknown(monkeypatch):
    monkeypatch.setattr(LLAMA.LlamaRMSNorm, "forward", Gated.forward)

    class Fresh(LLAMA.LlamaRMSNorm):
        """Nobody has asked for this class before it was patched."""

    assert forms.norm(Fresh) is None


NORMS = {"olmo2": True, "helium": True, "glm": True, "gemma": False, "cohere": False}


@pytest.mark.parametrize("family", NORMS)
def test_norms_of_families(family):
    found = {type(m) for m in tiny(family, "sdpa").modules() if "Norm" in type(m).__name__}
    assert {forms.norm(kind) is not None for kind in found} == {NORMS[family]}


def test_the_dtype_of_a_norm():
    """Llama's norm promotes the dtypes of weight and x. OLMo-2's and Helium's keep the dtype of x."""
    for family, keeps in (("llama", False), ("olmo2", True), ("helium", True)):
        (kind,) = {type(m) for m in tiny(family, "sdpa").modules() if "Norm" in type(m).__name__}
        assert forms.norm(kind).keeps is keeps
        x = torch.ones(2, 4, dtype=torch.bfloat16)
        assert kind(4)(x).dtype == (torch.bfloat16 if keeps else torch.float32)


class Clamped(LLAMA.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))


class Squared(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x).square()


def test_mlps_and_their_activations():
    assert forms.mlp(LLAMA.LlamaMLP) and forms.mlp(transformers.models.qwen2.modeling_qwen2.Qwen2MLP)
    assert not forms.mlp(Clamped) and not forms.mlp(nn.Linear)
    from transformers.activations import ACT2FN

    assert forms.silu(type(ACT2FN["silu"])) and forms.silu(nn.SiLU)
    assert not forms.silu(Squared) and not forms.silu(nn.GELU)


def test_lora():
    lora = pytest.importorskip("peft", reason="PEFT has the LoRA linear").tuners.lora
    assert forms.lora_linear(lora.Linear)
    assert not forms.lora_linear(lora.Embedding) and not forms.lora_linear(nn.Linear)


ROTATIONS = {
    "llama": False,
    "mistral": False,
    "gpt_neox": False,
    "phi3": False,
    "olmo": True,
    "olmo2": True,
    "cohere": None,  # rotates neighbours
    "glm": None,
    "qwen2_vl": None,  # has positions of three axes
}


@pytest.mark.parametrize("family", ROTATIONS)
def test_rotations(family):
    own_rotary()
    source = getattr(getattr(transformers.models, family), f"modeling_{family}")
    assert forms.rotation(source) is ROTATIONS[family]


def test_a_rotation_by_other_halves(monkeypatch):
    monkeypatch.setattr(LLAMA, "rotate_half", lambda x: torch.cat((x[..., 4:], -x[..., :4]), -1))
    assert forms.rotation(LLAMA) is None


def test_a_rotation_by_other_angles(monkeypatch):
    class OtherRotaryEmbedding(nn.Module):
        def forward(self, x, position_ids):
            freqs = position_ids[..., None].float() * self.inv_freq
            emb = torch.repeat_interleave(freqs, 2, dim=-1)
            cos = emb.cos()
            sin = emb.sin()
            return cos, sin

    own_rotary()
    assert forms.rotation(LLAMA) is False
    monkeypatch.setattr(LLAMA, "LlamaRotaryEmbedding", OtherRotaryEmbedding)
    assert forms.rotation(LLAMA) is None


# ---- the loss


def test_the_loss_function(monkeypatch):
    from transformers.loss import loss_utils

    assert forms.causal_loss(loss_utils.ForCausalLMLoss)
    assert not forms.causal_loss(loss_utils.ForMaskedLMLoss) and not forms.causal_loss(None)
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", lambda *args, **kwargs: 0)
    assert not forms.causal_loss(loss_utils.ForCausalLMLoss)


class Model:
    """Forwards of causal models. None of them runs."""

    def plain(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        outputs = self.model(input_ids, **kwargs)
        logits = self.lm_head(outputs[0][:, -logits_to_keep:]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def capped(self, input_ids=None, labels=None, return_dict=None):
        outputs = self.model(input_ids)
        scores = self.embed_out(outputs[0])
        if self.config.softcap is not None:
            scores = torch.tanh(scores / self.config.softcap) * self.config.softcap
        loss = None
        if labels is not None:
            loss = self.loss_function(scores, labels, self.config.vocab_size)
        if not return_dict:
            return (loss, scores) + outputs[1:]
        return Output(loss=loss, logits=scores)  # noqa: F821

    def with_router(self, input_ids=None, labels=None, **kwargs):
        outputs = self.model(input_ids, **kwargs)
        logits = self.lm_head(outputs[0])
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = balance(outputs.router_logits)  # noqa: F821
        loss += self.coefficient * aux_loss
        return Output(loss=loss, aux_loss=aux_loss, logits=logits)  # noqa: F821

    def scaled(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        logits = logits * self.logit_scale
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def scaled_at_once(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs)[0]) * self.logit_scale
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def capped_by_another_rule(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        if self.config.softcap is None:
            logits = torch.tanh(logits)
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def capped_otherwise(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        if self.config.softcap is not None:
            pass
        else:
            logits = torch.tanh(logits)
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_z_loss(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        loss = loss + logits.logsumexp(-1).square().mean()
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_own_labels(self, input_ids=None, labels=None, **kwargs):
        labels = labels.clone()
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_shifted_labels(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        loss = self.loss_function(logits, labels[:, 1:], self.vocab_size, **kwargs)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_own_count(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids)[0])
        loss = self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=7)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_changed_keywords(self, input_ids=None, labels=None, **kwargs):
        kwargs.pop("num_items_in_batch", None)
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_two_heads(self, input_ids=None, labels=None, **kwargs):
        outputs = self.model(input_ids, **kwargs)
        logits = self.lm_head(outputs[0])
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return Output(loss=loss, logits=logits, more=self.lm_head(outputs[1]))  # noqa: F821

    def with_two_losses(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        loss = loss + self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_logits_kept(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        self.last = logits
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def contiguous(self, input_ids=None, *, labels=None):
        logits = self.lm_head(self.model(input_ids)[0]).contiguous().float()
        loss = self.loss_function(logits, vocab_size=self.vocab_size, labels=labels)
        return Output(logits=logits, loss=loss)  # noqa: F821

    def capped_twice(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0])
        if self.config.second is not None:
            logits = logits / self.config.second
        if self.config.first is not None:
            logits = logits / self.config.first
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def capped_by_a_part_of_the_config(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0])
        if self.config.text.softcap is not None:
            logits = logits / self.config.text.softcap
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def capped_by_an_argument(self, input_ids=None, labels=None, softcap=None):
        logits = self.lm_head(self.model(input_ids)[0])
        if softcap is not None:
            logits = logits / softcap
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_rounded_logits(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0]).round()
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_cast_logits(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0]).float(7)
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_two_names(self, input_ids=None, labels=None):
        logits = self.last = self.lm_head(self.model(input_ids)[0])
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_a_head_of_two_arguments(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0], input_ids)
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_a_head_of_keyword_arguments(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0], scale=2)
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_a_head_of_the_decoder(self, input_ids=None, labels=None):
        logits = self.model.lm_head(self.model(input_ids)[0])
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_a_function_for_a_head(self, input_ids=None, labels=None):
        logits = project(self.model(input_ids)[0])  # noqa: F821
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_logits_made_twice(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0])
        logits = self.lm_head(logits)
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_logits_of_another_name(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0])
        loss = self.loss_function(logits, labels, self.vocab_size)
        return Output(loss=loss, scores=logits)  # noqa: F821

    def with_an_output_in_a_variable(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0])
        output = Output(loss=self.loss_function(logits, labels, self.vocab_size), logits=logits)  # noqa: F821
        return output

    def without_a_vocabulary(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0])
        loss = self.loss_function(logits, labels)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def with_logits_in_no_variable(self, input_ids=None, labels=None):
        loss = self.loss_function(self.lm_head(self.model(input_ids)[0]), labels, self.vocab_size)
        return Output(loss=loss)  # noqa: F821

    def with_other_targets(self, input_ids=None, labels=None):
        logits = self.lm_head(self.model(input_ids)[0])
        targets = input_ids
        loss = self.loss_function(logits, targets, self.vocab_size)
        return Output(loss=loss, logits=logits, labels=labels)  # noqa: F821

    def with_other_keywords(self, input_ids=None, labels=None, **kwargs):
        more = {}
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        loss = self.loss_function(logits, labels, self.vocab_size, **more)
        return Output(loss=loss, logits=logits)  # noqa: F821

    def without_labels(self, input_ids=None, **kwargs):
        logits = self.lm_head(self.model(input_ids)[0])
        return Output(logits=logits)  # noqa: F821


KNOWN = {
    "plain": ("lm_head", True, ()),
    "capped": ("embed_out", False, ("softcap",)),
    "with_router": ("lm_head", True, ()),
    "contiguous": ("lm_head", False, ()),
    "capped_twice": ("lm_head", False, ("first", "second")),
}


@pytest.mark.parametrize("name", [name for name in vars(Model) if not name.startswith("__")])
def test_the_way_of_the_logits(name):
    flow = forms.loss_flow(getattr(Model, name))
    assert (flow and (flow.head, flow.keywords, flow.unset)) == KNOWN.get(name)


def test_the_argument_names_of_a_forward():
    names = ("self", "input_ids", "labels", "logits_to_keep")
    assert forms.loss_flow(Model.plain).names == names
    assert forms.loss_flow(Model.contiguous).names == ("self", "input_ids", "labels")


def test_a_decorator_of_ones_own_hides_the_loss():
    assert forms.loss_flow(LLAMA.LlamaForCausalLM.forward) is not None
    assert forms.loss_flow(doubled(LLAMA.LlamaForCausalLM.forward)) is None


def test_decorated_models_stay():
    class Sum(LLAMA.LlamaForCausalLM):
        @functools.wraps(LLAMA.LlamaForCausalLM.forward)
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            return output.loss + output.logits.square().mean()

    model = Sum(tiny("llama", "sdpa").config).train()
    ids = torch.arange(3, 20)[None]
    want = model(input_ids=ids, labels=ids)
    assert longlora.torch.swap(model)["linear_cross_entropy"] == 0
    torch.testing.assert_close(model(input_ids=ids, labels=ids), want)


CAPPED = ["gemma2"] + (["gemma3_text", "nanochat", "vaultgemma"] if VERSION >= (5, 0) else [])


@pytest.mark.parametrize("family", CAPPED)
@pytest.mark.parametrize("cap", [None, 5.0])
def test_soft_caps_decide(family, cap):
    model = tiny(family, "eager", head_dim=8, sliding_window=64).train()
    model.config.final_logit_softcapping = cap
    ids = torch.arange(3, 20)[None].to(model.device)
    want = model(input_ids=ids, labels=ids).loss
    assert longlora.torch.swap(model)["linear_cross_entropy"] == (cap is None)
    for now in (cap, 3.0, cap):
        model.config.final_logit_softcapping = now
        output = model(input_ids=ids, labels=ids)
        assert (output.logits is None) == (now is None and cap is None)
    torch.testing.assert_close(output.loss, want)
