"""A sequence without end in a cache of fixed size, against StreamingLLM written down in NumPy float64."""

import numpy as np
import pytest
import tiny

from longlora.decoder.cache import Cache
from longlora.decoder.generate import Generator
from longlora.decoder.generation_plan import plan
from longlora.decoder.model import Model
from longlora.decoder.rope import inverse_frequencies
from longlora.decoder.streaming import StreamingCache, Window
from longlora.files.open_model import open_model

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
MODELS = {
    "llama": {},
    "yarn": dict(rope_scaling=YARN, max_position_embeddings=256),
    "smollm3": dict(model_type="smollm3", no_rope_layers=[1, 0, 1], num_hidden_layers=3),
}


class Plain:
    """Keys are kept before rope and rotated by their places in the cache, at every pass."""

    def __init__(self, base, start, recent):
        self.weights = {}
        self.base, self.config, self.start, self.size = base, base.config, start, start + recent
        self.frequency, self.factor = inverse_frequencies(base.config.rope, base.config.head_dim)
        shape = 0, self.config.num_key_value_heads, self.config.head_dim
        self.cache = [[np.zeros(shape)] * 2 for _ in range(self.config.num_hidden_layers)]

    def rotated(self, x, first):
        angle = np.arange(first, first + len(x))[:, None, None] * self.frequency
        cos, sin = np.cos(angle) * self.factor, np.sin(angle) * self.factor
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps) * self.weight(name)

    def weight(self, name):
        if name not in self.weights:
            self.weights[name] = self.base.read(f"model.{name}.weight").astype(np.float64)
        return self.weights[name]

    def attention(self, x, i):
        c, S, layer = self.config, len(x), f"layers.{i}.self_attn"
        q, k, v = ((x @ self.weight(f"{layer}.{name}_proj").T).reshape(S, -1, c.head_dim) for name in "qkv")
        kept = [np.delete(old, slice(self.start, self.start + self.over), 0) for old in self.cache[i]]
        keys, values = self.cache[i] = [np.concatenate(pair) for pair in zip(kept, (k, v))]
        before = len(keys) - S
        if c.rope_layers is None or c.rope_layers[i]:
            q, keys = self.rotated(q, before), self.rotated(keys, 0)
        each = c.num_attention_heads // c.num_key_value_heads
        keys, values = np.repeat(keys, each, 1), np.repeat(values, each, 1)
        scores = np.einsum("qhd,khd->hqk", q, keys) / np.sqrt(c.head_dim)
        scores[:, np.arange(before + S) > before + np.arange(S)[:, None]] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), values)
        return out.reshape(S, -1) @ self.weight(f"{layer}.o_proj").T

    def read(self, ids):
        """A pass over a chunk: as many of the oldest recent tokens go as the chunk needs places."""
        self.over = max(0, len(self.cache[0][0]) + len(ids) - self.size)
        x = self.weight("embed_tokens")[ids]
        for i in range(self.config.num_hidden_layers):
            x = x + self.attention(self.norm(x, f"layers.{i}.input_layernorm"), i)
            n = self.norm(x, f"layers.{i}.post_attention_layernorm")
            gate, up = (n @ self.weight(f"layers.{i}.mlp.{name}_proj").T for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weight(f"layers.{i}.mlp.down_proj").T
        return self.norm(x[-1], "norm") @ self.weight("embed_tokens").T


@pytest.mark.parametrize("place", ["_write_sinks", "_look_from"])
def test_what_ctrl_c_leaves_half_forgotten_is_forgotten_whole(tmp_path, monkeypatch, place):
    """It may come while keys are moved, in some layers and not in others."""
    base, generator = opened(tmp_path)
    cache, ids = generator.cache, np.random.default_rng(0).integers(0, 64, 40)
    generator.extend(0, ids)
    assert cache.keep(0, 40) == 40 and cache.forgotten > 0

    def interrupted(*unused):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, place, interrupted)
        generator.extend(0, ids[:9])
    assert cache.keep(0, 40) == 0 and cache.lengths[0] == 0
    np.testing.assert_array_equal(generator.extend(0, ids), opened(tmp_path)[1].extend(0, ids))
    assert cache.keep(0, 40) == 40


def opened(tmp_path, model="llama", start=3, recent=20, dtype="float32", device="cpu"):
    base = open_model(tiny.model(tmp_path / "base", **MODELS[model]))
    made = Model(base.config, device=device).load(base)
    cache = StreamingCache(base.config, Window(start, recent), base.config.rope, dtype, device)
    return base, Generator(made, cache)


# Of the logits' size. With sinks that are one place off the difference is 0.38 and more.
NEAR = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}


def close(found, wanted, dtype="float32"):
    return np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()) < NEAR[dtype]


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("model", MODELS)
def test_streaming_is_the_plain_implementation(tmp_path, model, dtype):
    """A prompt of several windows, answers of several windows, and another prompt behind them."""
    base, generator = opened(tmp_path, model, dtype=dtype)
    plain, random = Plain(base, 3, 20), np.random.default_rng(0)
    assert generator.chunk == 5 and generator.cache.places == 28
    for count in (61, 1, 16):
        ids = random.integers(0, 260, count).astype(np.int32)
        found = generator.extend(0, ids)
        for start in range(0, count, 5):
            wanted = plain.read(ids[start : start + 5])
        assert close(found, wanted, dtype)
        for token in random.integers(0, 260, 30):
            found = generator.step([0], [int(token)])[0]
            assert close(found, plain.read(np.array([token])), dtype)
    assert generator.cache.lengths[0] == 78 + 90 and generator.cache.forgotten == 78 + 90 - 23


@pytest.mark.parametrize("start, recent", [(0, 9), (4, 1), (1, 4)])
def test_windows_of_odd_sizes(tmp_path, start, recent):
    base, generator = opened(tmp_path, start=start, recent=recent)
    plain, ids = Plain(base, start, recent), np.arange(40, dtype=np.int32) * 7 % 260
    found = generator.extend(0, ids)
    for i in range(0, 40, generator.chunk):
        wanted = plain.read(ids[i : i + generator.chunk])
    assert close(found, wanted)


def test_positions_far_out_are_as_exact(tmp_path):
    """How many tokens were forgotten does not matter."""
    _, generator = opened(tmp_path, start=0, recent=8)
    cache, ids = generator.cache, np.arange(40, dtype=np.int32)
    near = generator.extend(0, ids)
    cache.keep(0, 0)
    cache.lengths[0] = 1_000_000_000  # as if that many had been read and forgotten
    np.testing.assert_allclose(generator.extend(0, ids), near, atol=1e-4)
    assert cache.forgotten == 1_000_000_032


def test_before_anything_is_forgotten_it_is_the_dense_pass(tmp_path):
    _, generator = opened(tmp_path)
    ids = np.arange(20, dtype=np.int32)
    dense = Generator(generator.model, Cache(generator.model.config, 1, 40), chunk=generator.chunk)
    np.testing.assert_allclose(generator.extend(0, ids), dense.extend(0, ids), atol=1e-6)
    assert generator.cache.keep(0, 10) == 10  # the last tokens can be forgotten
    dense.cache.keep(0, 10)
    np.testing.assert_allclose(generator.extend(0, ids[10:]), dense.extend(0, ids[10:]), atol=1e-6)


def test_what_is_forgotten_cannot_come_back(tmp_path):
    _, generator = opened(tmp_path)
    ids = np.arange(60, dtype=np.int32)
    first = generator.extend(0, ids)
    assert generator.cache.keep(0, 60) == 60 and generator.cache.keep(0, 59) == 0
    np.testing.assert_array_equal(generator.extend(0, ids), first)


def test_the_plan_is_what_the_cache_takes(tmp_path):
    base, generator = opened(tmp_path)
    found = plan(base.config, context=Window(3, 20), device="cpu")
    assert found.parts["cache of keys and values"] == generator.cache.nbytes and found.context == 23
    tight = plan(base.config, context=Window(4, 1 << 20), memory=found.total + (64 << 20))
    assert not tight.fits and tight.changes[-1].startswith("--recent-size 131068: ")
