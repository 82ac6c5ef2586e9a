"""Generation on a GPU or its emulation: the logits of the CPU, in both kinds of caches."""

import numpy as np
import pytest
import tiny

import longlora
from longlora import cuda
from longlora.decoder.cache import Cache
from longlora.decoder.generate import Generator
from longlora.decoder.model import Model
from longlora.decoder.streaming import StreamingCache, Window
from longlora.files.open_model import open_model

if not cuda.is_available():
    pytest.skip(f"no GPU and no emulation of one: {cuda.reason()}", allow_module_level=True)

# Logits reach 4. On the emulation they differ by 1.5e-5 at most in each dtype. A GPU may round a key or a
# value of the cache the other way: by 2^-8 in bfloat16, and one of forty keys has a small share of a logit.
NEAR = {"float32": 1e-4, "bfloat16": 4e-3, "float16": 1e-3}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("window", [None, Window(3, 20)], ids=["cache", "streaming"])
def test_logits_are_those_of_the_cpu(tmp_path, window, dtype):
    """A prompt in chunks, steps that pass the end of the window several times, and a prompt behind them."""
    base, found = open_model(tiny.model(tmp_path / "base")), []
    for device in ("cpu", "cuda:0"):
        model = Model(base.config, device=device).load(base)
        if window is None:
            cache = Cache(base.config, 1, 100, dtype, device)
        else:
            cache = StreamingCache(base.config, window, base.config.rope, dtype, device)
        generator, ids = Generator(model, cache, chunk=16), np.arange(40, dtype=np.int32) * 7 % 260
        logits = [generator.extend(0, ids)]
        logits += [generator.step([0], [token])[0] for token in range(20)]
        found.append(np.array([*logits, generator.extend(0, ids[:21])]))
    np.testing.assert_allclose(found[1], found[0], atol=NEAR[dtype])


def test_a_saved_cache_moves_between_devices(tmp_path):
    base, answers = tiny.model(tmp_path / "base"), []
    first = longlora.Session(base, device="cpu", cache_dtype="bfloat16")
    "".join(first.generate("abcdef", max_new_tokens=3))
    first.save(tmp_path / "saved")
    second = longlora.Session(base, device="cuda", cache_dtype="bfloat16")
    assert second.load(tmp_path / "saved") == first.held == second.held
    second.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "saved").read_bytes()
    for session in (first, second):
        answer = session.generate("abcdefg", max_new_tokens=3)
        "".join(answer)
        answers.append(answer)
    assert [answer.reused for answer in answers] == [6, 6] and answers[0].tokens == answers[1].tokens
