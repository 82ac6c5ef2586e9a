"""The profile: FLOPs and bytes by hand and against the reference's mask, ops put back, what a run prints and
writes."""

import json

import numpy as np
import pytest
import reference
import tiny

from longlora import _C
from longlora.training import driver, profile

PEAKS = (100.0, 10.0)


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch):
    monkeypatch.setattr(profile, "peaks", lambda threads: PEAKS)


SIZES = [(24, 6), (24, 24), (30, 10), (12, 1), (21, 7), (25, 7), (5, 40), (1, 4)]


@pytest.mark.parametrize("shift", ["half", "none", "all"])
@pytest.mark.parametrize(
    "T, G, boundary",
    [(T, G, b) for T, G in SIZES for b in ("split", "wrap", "swap") if b == "split" or T % G == 0],
)
def test_pairs_are_those_of_the_mask(T, G, boundary, shift):
    mask = reference.attention_mask(T, 3, G, boundary=boundary, shift=shift)
    assert profile.pairs(T, 3, G, boundary, shift) == np.broadcast_to(mask, (3, T, T)).sum()


def f32(*shape):
    return np.ones(shape, np.float32)


def test_flops_and_bytes_by_hand():
    M, C, N, R, V = 10, 6, 8, 2, 12
    x, w, a, b, u, out = f32(M, C), f32(N, C), f32(R, C), f32(N, R), f32(M, R), f32(M, N)
    size, flops, moved = profile.work("lora_linear_forward", (out, u, x, w, None, a, b, None, 1.0))
    assert (size["M"], size["C"], size["N"], size["R"]) == (M, C, N, R)
    assert flops == 2 * M * N * C + 2 * M * R * C + 2 * M * R * N
    assert moved == 4 * (M * N + M * R + M * C + N * C + R * C + N * R)
    everything = (f32(M, C), f32(R, C), f32(N, R), f32(N, C), None, out, x, w, a, b, u, 1.0)
    du, dx, da, db, dw = 2 * M * N * R, 2 * M * C * (N + R), 2 * M * R * C, 2 * M * N * R, 2 * M * N * C
    assert profile.work("lora_linear_backward", everything)[1] == du + dx + da + db + dw
    no_dx = (None, *everything[1:3], None, *everything[4:10], None, 1.0)
    assert (
        profile.work("lora_linear_backward", no_dx)[1] == du + da + db + 2 * M * R * C
    )  # u is computed again
    plain = (f32(M, C), None, None, None, None, out, None, w, None, None, None, 1.0)
    _, flops, moved = profile.work("lora_linear_backward", plain)
    assert flops == 2 * M * N * C and moved == 4 * (M * C + M * N + N * C)
    table, ids, losses = f32(V, C), np.zeros(M, np.int32), f32(M)
    head = (losses, x, f32(V, C), f32(M, C), table, ids, losses, -100)
    assert profile.work("linear_cross_entropy_backward", head)[1] == 6 * M * V * C
    assert profile.work("linear_cross_entropy_backward", (*head[:2], None, *head[3:]))[1] == 4 * M * V * C
    q, k = f32(1, 20, 4, 8), f32(1, 20, 2, 8)
    pairs = 2 * (2 * 55) + 2 * (15 + 55 + 15)
    scalars = (10, 0, 0, 1.0)
    assert (
        profile.work("s2_attention_forward", (q, f32(1, 4, 20), q, k, k, None, *scalars))[1] == 4 * 8 * pairs
    )
    assert (
        profile.work("s2_attention_backward", (q, k, k, q, q, k, k, q, f32(1, 4, 20), None, *scalars))[1]
        == 10 * 8 * pairs
    )
    packed = np.array([0, 10, 20], np.int32)
    apart = 2 * (2 * 55) + 2 * 2 * (15 + 15)
    assert (
        profile.work("s2_attention_forward", (q, f32(1, 4, 20), q, k, k, packed, *scalars))[1]
        == 4 * 8 * apart
    )
    assert profile.work("embedding_forward", (f32(M, C), f32(1000, C), ids))[1:] == (0, 4 * (2 * M * C + M))
    assert profile.work("adamw", (f32(5), f32(5), f32(5), None, f32(5), *[0.0] * 7))[1:] == (0, 4 * 7 * 5)
    product = (f32(M, N), f32(M, C), f32(C, N), 1.0, 0.0)
    assert profile.work("matmul", product)[1:] == (2 * M * N * C, 4 * (M * N + M * C + C * N))


def test_attention_counts_the_pairs_of_every_sequence():
    """Each visible pair takes 4 FLOPs forward and 10 backward for each of the D numbers of a head."""
    q, k, lse = f32(3, 12, 4, 8), f32(3, 12, 2, 8), f32(3, 4, 12)
    for boundary, number in (("split", 0), ("wrap", 1), ("swap", 2)):
        for shift, kind in (("half", 0), ("none", 1), ("all", 2)):
            mask = reference.attention_mask(12, 4, 6, boundary=boundary, shift=shift)
            pairs = 3 * np.broadcast_to(mask, (4, 12, 12)).sum()
            how = (None, 6, number, kind, 1.0)
            assert profile.work("s2_attention_forward", (q, lse, q, k, k, *how))[1] == 4 * 8 * pairs
            backward = (q, k, k, q, q, k, k, q, lse, *how)
            size, flops, moved = profile.work("s2_attention_backward", backward)
            assert (size["B"], size["T"], size["H"], size["K"], size["D"]) == (3, 12, 4, 2, 8)
            assert flops == 10 * 8 * pairs and moved == 4 * (4 * q.size + 4 * k.size + lse.size)


@pytest.mark.parametrize("rows, P, lengths, S", [(6, 7, [4, 1], 3), (1, 1, [0], 1), (3, 9, [8, 0, 2], 1)])
def test_a_cache_is_read_as_far_as_it_is_filled(rows, P, lengths, S):
    """Each of the S new queries of a row sees what is in the cache, the new ones before it and itself."""
    B, H, K, D = len(lengths), 4, 2, 5
    out, new, cache = f32(B, S, H, D), f32(B, S, K, D), f32(rows, P, K, D)
    ids = np.arange(B, dtype=np.int32)
    args = (out, cache, cache, out, new, new, ids, np.array(lengths, np.int32), 1.0)
    _, flops, moved = profile.work("cached_attention", args)
    pairs = sum(length + 1 + i for length in lengths for i in range(S))
    assert flops == 4 * H * D * pairs
    read = sum(length + S for length in lengths) * K * D
    assert moved == 4 * (2 * out.size + 2 * new.size + 2 * read + 2 * B)


def test_a_cache_of_no_rows_has_no_bytes():
    q, new, cache, lengths = f32(0, 1, 4, 5), f32(0, 1, 2, 5), f32(0, 7, 2, 5), np.zeros(0, np.int32)
    args = (q, cache, cache, q, new, new, None, lengths, 1.0)
    assert profile.work("cached_attention", args)[1:] == (0, 0)


@pytest.mark.parametrize(
    "wanted, u, flops",
    [
        # du = dout @ b: N * R. dx = dout @ weight + du @ a: N * C + R * C. da = du.T @ x: R * C.
        ("dx", True, lambda N, C, R: N * R + N * C + R * C),
        ("da", True, lambda N, C, R: N * R + R * C),
        ("dx da", True, lambda N, C, R: N * R + N * C + 2 * R * C),
        ("da", False, lambda N, C, R: N * R + R * C),
        ("db", True, lambda N, C, R: N * R),
        ("db", False, lambda N, C, R: N * R + R * C),  # x @ a is computed again
        ("da db", False, lambda N, C, R: 2 * N * R + 2 * R * C),
        ("dweight", True, lambda N, C, R: N * C),
        ("dx dweight", True, lambda N, C, R: N * R + 2 * N * C + R * C),
        ("dbias", True, lambda N, C, R: 0),
    ],
)
def test_a_backward_counts_only_the_wanted_gradients(wanted, u, flops):
    M, C, N, R = 10, 6, 8, 3
    grads = dict(dx=f32(M, C), da=f32(R, C), db=f32(N, R), dweight=f32(N, C), dbias=f32(N))
    given = [grads[name] if name in wanted.split() else None for name in grads]
    rest = (f32(M, N), f32(M, C), f32(N, C), f32(R, C), f32(N, R), f32(M, R) if u else None)
    _, found, moved = profile.work("lora_linear_backward", (*given, *rest, 1.0))
    assert found == 2 * M * flops(N, C, R)
    # Every gradient but dx is added to, so it is read and written.
    written = sum((1 if x.shape == (M, C) else 2) * x.size for x in given if x is not None)
    assert moved == 4 * (written + sum(x.size for x in rest if x is not None))


def test_flops_and_bytes_of_other_ops():
    M, C, N, V = 10, 6, 8, 12
    x, ids = f32(M, C), np.array([3, 3, 5, 0, 0, 0, 3, 5, 3, 11], np.int32)  # four rows of the table
    rows = profile.work("embedding_backward", (f32(V, C), x, ids, ids))[1:]
    assert rows == (0, 4 * (2 * 4 * C + M * C + 2 * M))
    plain = profile.work("lora_linear_forward", (f32(M, N), None, x, f32(N, C), *[None] * 4, 1.0))[1:]
    assert plain == (2 * M * N * C, 4 * (M * N + M * C + N * C))
    added = (f32(M, N), x, f32(C, N), 1.0, 1.0)
    assert profile.work("matmul", added)[1:] == (2 * M * N * C, 4 * (2 * M * N + M * C + C * N))
    head = (f32(M), f32(M), x, f32(V, C), ids, -100)
    assert profile.work("linear_cross_entropy_forward", head)[1:] == (
        2 * M * V * C,
        4 * (3 * M + M * C + V * C),
    )


def test_a_run_says_where_its_time_goes(tmp_path):
    before, said = dict(vars(_C)), []
    result = driver.train(said.append, **tiny.options(tmp_path, max_steps=3, profile=True))
    assert dict(vars(_C)) == before  # off again, nothing is left in the way
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert found["steps"] == 2 and [found["peak_gflops"], found["copy_gbytes"]] == list(PEAKS)
    ops = {row["op"]: row for row in found["ops"]}
    assert ops["s2_attention_forward"]["calls"] == ops["rope_backward"]["calls"] == 2
    assert ops["linear_cross_entropy_backward"]["flops"] == 6 * 128 * 260 * 32
    for row in found["ops"]:
        by_size = row["by_size"]
        for key in ("calls", "seconds", "flops", "bytes", "floor_seconds"):
            assert row[key] == pytest.approx(sum(part[key] for part in by_size))
        assert row["bytes"] > 0 and row["floor_seconds"] >= max(row["flops"] / 1e11, row["bytes"] / 1e10) * (
            1 - 1e-9
        )
    spent = sum(row["seconds"] for row in found["ops"])
    assert (
        found["other"]["seconds"] == pytest.approx(found["seconds"] - spent) and 0 < spent < found["seconds"]
    )
    (table,) = [text for text in said if "measured peaks" in text]
    assert all(op in table for op in ops) and "Python and NumPy" in table
    assert (
        result.history[-1]["loss"]
        == driver.train(
            lambda line: None, **tiny.options(tmp_path, max_steps=3, output_dir=str(tmp_path / "plain"))
        ).history[-1]["loss"]
    )
    assert not (tmp_path / "plain" / "profile.json").exists()


def test_a_run_of_one_step_profiles_it(tmp_path):
    driver.train(lambda line: None, **tiny.options(tmp_path, max_steps=1, profile=True))
    assert json.loads((tmp_path / "out" / "profile.json").read_text())["steps"] == 1


def test_ops_are_put_back_when_a_step_fails():
    before = dict(vars(_C))
    recorder = profile.Recorder(PEAKS)
    with pytest.raises(ValueError), recorder:
        _C.cast(f32(2, 3), f32(3, 3))
    assert dict(vars(_C)) == before and recorder.steps == 0


def test_what_is_recorded_is_what_ran():
    recorder, before = profile.Recorder(PEAKS), _C.calls()
    with recorder:
        for rows in (4, 4, 5):
            _C.cast(f32(rows, 3), f32(rows, 3))
    after, (row,) = _C.calls(), recorder.report()["ops"]
    assert after["cast"] - before["cast"] == row["calls"] == 3 and row["bytes"] == 2 * 4 * 13 * 3
    assert sorted((part["sizes"]["M"], part["calls"]) for part in row["by_size"]) == [(4, 2), (5, 1)]
