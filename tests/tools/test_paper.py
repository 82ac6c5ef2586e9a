"""benchmarks/paper.py: its runs, how it resumes, its verdicts on made-up rows, and docs/paper.md."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="these tests need the source tree")


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import paper

    return paper


@pytest.fixture
def tables(paper):
    return {name: make() for name, make in paper.TABLES.items()}


# ---- verdicts ------------------------------------------------------------------------------------


def test_verdicts_by_pencil(paper):
    from benchmarks import paper_stats as p

    assert p.above({0: 2, 1: 3}, {0: 1, 1: 2.9}) == "yes"
    assert p.above({0: 2, 1: 3}, {0: 3, 1: 4}) == "no"
    assert p.above({0: 2, 1: 3}, {0: 1, 1: 4}) == "within noise"
    assert p.above({0: 2}, {1: 1}) == "not yet run"  # no seed in common
    assert p.near({0: 10.1, 1: 9.9}, {0: 10, 1: 10}) == "yes (+0.00%)"
    assert p.near({0: 10.3}, {0: 10}) == "no (+3.00%)"
    assert p.at_most({0: 9}, {0: 10}) == "yes (-10.00%)" and p.at_most({0: 11}, {0: 10}) == "no (+10.00%)"
    assert p.within_noise([{0: 1, 1: 3}, {0: 2, 1: 4}]) == "yes"  # means 2 and 3, spreads 1.41
    assert p.within_noise([{0: 1, 1: 1.1}, {0: 2, 1: 2.1}]) == "no"
    assert p.rises([{0: 1, 1: 1}, {0: 2, 1: 2}, {0: 3, 1: 1.5}]) == "within noise"
    assert p.closes([(0, 8, 0), (1, 5, 0), (2, 4.1, 0)], [(0, 8, 0), (1, 4, 0), (2, 4, 0)]) == "yes"
    assert p.closes([(0, 8, 0), (1, 5, 0), (2, 5, 0)], [(0, 8, 0), (1, 4, 0), (2, 4, 0)]) == "no"
    assert (
        p.closes([(0, 8, 0), (1, 3, 0), (2, 3, 0)], [(0, 8, 0), (1, 4, 0), (2, 4, 0)]) == "no"
    )  # never behind
    assert p.joined({1: "yes", 2: "yes"}) == "yes"
    assert p.joined({1: "yes", 2: "no"}) == "1: yes; 2: no"
    assert p.joined({1: "yes (+0.1%)", 2: "yes (-0.1%)"}) == "yes (1: +0.1%, 2: -0.1%)"
    assert p.together("yes", "within noise", "no") == "no"
    assert p.cell({0: 1.0, 1: 3.0}) == "2.00 ± 1.41" and p.cell({0: 1.0}) == "1.00"


def made_up(one, worse):
    """A row in which every alternative of the paper is worse by `worse`, and long texts are no harder."""
    if "time" in one:
        T = one["time"]
        seconds = {"dense_seconds": 1 + worse * T, "s2_seconds": 1.0, "dense_gib": 0.1, "s2_gib": 0.1}
        return {"run": one, "load": 0.0, "threads": 2} | seconds
    train, target = one["train"], one["train"]["target_length"]
    modules = train.get("modules_to_save")
    value = 30 + one["seed"] + (train["learning_rate"] if not train.get("full") else 0) * 10
    value += worse * {None: 0, (): 3, ("embed_tokens",): 0.5}.get(modules, 2)
    value += worse * (train.get("shift", "half") != "half") + worse * ("pattern" in one)
    group = train.get("group_size", target)
    value += worse * (group < target // 4) * (target // 4 / group)
    row = {"run": one, "dense": {str(n): value + (n > target) * worse for n in one["lengths"]}}
    if "own" in one:
        row["own"] = {str(target): value + worse * target / 1000}
    if "curve" in one:
        gap = 5 * worse * (not train.get("full"))
        row["curve"] = [[0, 80], [6, 50 + gap], [60, 40]]
    return row


def verdicts(paper, tables, worse):
    rows = [made_up(one, worse) for _, _, one in paper.wanted(tables)]
    stats = paper.Stats(rows)
    return [verdict for table in tables.values() for _, verdict in table.claims(stats)]


def test_every_claim_holds_where_the_rows_say_so(paper, tables):
    found = verdicts(paper, tables, 1.0)
    assert len(found) > 20 and all(verdict.startswith("yes") for verdict in found), found


def test_claims_fail_where_the_rows_say_the_opposite(paper, tables):
    found = verdicts(paper, tables, -1.0)
    stay = sum(
        verdict.startswith("yes") for verdict in found
    )  # dense and S2-Attn, group sizes, ends are as near
    assert found.count("no") >= 12 and stay < len(found) / 2, found


def test_nothing_run_is_said_to_hold(paper, tables):
    text = paper.paper_report.text(paper.Stats([]), tables)
    assert "**not yet run**" in text and "**yes" not in text and "**no**" not in text


# ---- the runs ------------------------------------------------------------------------------------


def test_runs_are_made_once_seed_by_seed(paper, tables):
    runs = [one for _, _, one in paper.wanted(tables)]
    keys = [paper.key(one) for one in runs]
    assert len(set(keys)) == len(keys)
    seeds = [one["seed"] for one in runs]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2}
    assert sum(len(table.runs) * len(table.seeds) for table in tables.values()) > len(runs)  # some are shared
    json.dumps(runs)


def test_a_stopped_command_goes_on_where_it_was(paper, tables, tmp_path, monkeypatch):
    made, results = [], tmp_path / "rows.jsonl"

    def perform(one):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(paper.key(one))
        return {"dense": {"512": 1.0}}

    monkeypatch.setattr(paper, "perform", perform)
    only = {"8": tables["8"]}
    with pytest.raises(KeyboardInterrupt):
        paper.make(only, results, say=lambda line: None)
    with open(results, "a") as file:
        file.write('{"run": {"cut')
    monkeypatch.setattr(paper, "perform", lambda one: made.append(paper.key(one)) or {"dense": {"512": 2.0}})
    paper.make(only, results, say=lambda line: None)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [paper.key(row["run"]) for row in rows] == made and len(set(made)) == 9
    assert [row["dense"]["512"] for row in rows] == [1.0] * 4 + [2.0] * 5
    paper.make(only, results, say=lambda line: None)
    assert len(made) == 9
    paper.make(only, results, again=True, say=lambda line: None)
    assert len(made) == 18 and len(results.read_text().splitlines()) == 9


def test_the_smallest_real_run(paper, monkeypatch):
    """Two steps, evaluated dense and as trained, by step too; other seeds see other data."""
    from benchmarks import paper_run, paper_tables

    monkeypatch.setattr(paper_run, "held_out", lambda: [np.arange(600, dtype=np.int32)])
    monkeypatch.setattr(paper_run, "CURVE_SAMPLES", 1)
    one = paper_tables.run(
        512, [256, 512], max_steps=2, per_device_train_batch_size=1, curve=1, pattern="layers"
    )
    found = [paper.perform(one | {"seed": seed}) for seed in (0, 1)]
    for row in found:
        assert row["dense"].keys() == {"256", "512"} and row["own"].keys() == {"512"}
        assert row["own"]["512"] != row["dense"]["512"]
        assert [step for step, _ in row["curve"]] == [0, 1, 2]
    assert found[0]["loss"] != found[1]["loss"]


# ---- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", ["none", "half"])
def test_the_masked_reference_is_the_kernel_under_its_mask(paper, shift):
    pytest.importorskip("torch")
    from benchmarks.paper_run import Masked
    from longlora import ops

    random = np.random.default_rng(0)
    T, H, K, D, G = 32, 4, 2, 8, 8
    q, dout = (random.standard_normal((1, T, H, D), np.float32) for _ in range(2))
    k, v = (random.standard_normal((1, T, K, D), np.float32) for _ in range(2))
    out, lse = ops.s2_attention_forward(q, k, v, group_size=G, shift=shift)
    gradients = ops.s2_attention_backward(dout, q, k, v, out, lse, group_size=G, shift=shift)
    mask = np.broadcast_to(reference.attention_mask(T, H, G, shift=shift), (H, T, T)).copy()
    masked, found = Masked(mask), [np.empty_like(x) for x in (out, q, k, v)]
    scalars = (None, G, 0, 0, D**-0.5)
    masked.s2_attention_forward(found[0], lse, q, k, v, *scalars)
    masked.s2_attention_backward(*found[1:], dout, q, k, v, out, lse, *scalars)
    for x, wanted in zip(found, (out, *gradients)):
        np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-5)


def test_masks_by_pencil(paper):
    from benchmarks.paper_run import dilated, strided

    first, last = dilated(2, 8, 3)
    assert np.flatnonzero(first[7]).tolist() == [5, 6, 7] and np.flatnonzero(last[7]).tolist() == [3, 5, 7]
    local, stride = strided(2, 9, 2)
    assert np.flatnonzero(local[8]).tolist() == [7, 8] and np.flatnonzero(stride[8]).tolist() == [2, 5, 8]
    for mask in (first, last, local, stride):
        assert not np.triu(mask, 1).any() and mask.diagonal().all()


def test_across_layers_every_second_layer_is_shifted_and_the_evaluation_is_dense(paper):
    from benchmarks.paper_run import Observed
    from longlora.ops import SHIFTS

    def shift(index, trains):
        batch = SimpleNamespace(attention=(8, 0, SHIFTS["half" if trains else "none"]), cu_seqlens=None)
        return Observed._in_turns(SimpleNamespace(index=index, scale=1.0), batch)[3]

    assert [shift(i, True) for i in range(4)] == [SHIFTS[name] for name in ("none", "all", "none", "all")]
    assert {shift(i, False) for i in range(4)} == {SHIFTS["none"]}


# ---- cost and page -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, row", [(8192, (35.2, 8.8, 35.2, 70.9, 2.2)), (65536, (2251.8, 562.9, 281.5, 567.4, 17.3))]
)
def test_operations_are_those_of_table_11(paper, length, row):
    """Llama-2 7B. The paper counts every pair of a group, and the causal half is ours."""
    from benchmarks.paper_cost import forward, pairs

    llama = SimpleNamespace(
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, num_hidden_layers=32
    )
    llama.hidden_size, llama.intermediate_size, llama.vocab_size = 4096, 11008, 32000
    parts = [forward(llama, length, seen) for seen in (length**2, length**2 // 4)]
    found = [part["attention"] for part in parts] + [
        parts[0][name] for name in ("projections", "MLP", "head")
    ]
    np.testing.assert_allclose(np.array(found) / 1e12, row, atol=0.16)
    assert pairs(6, 4) == 1 + 2 + 3 + 4 + 1 + 2


def test_the_page_shows_the_results(paper, tables, tmp_path):
    """After new results: python -m benchmarks.paper --docs."""
    page = (ROOT / "docs/paper.md").read_text()
    (tmp_path / "paper.md").write_text(page)
    paper.paper_report.write_page(tmp_path / "paper.md", paper.Stats(paper.read(paper.RESULTS)), tables)
    assert (tmp_path / "paper.md").read_text() == page


def test_charts_have_the_results(paper, tables):
    from benchmarks import paper_charts

    stats = paper.Stats([made_up(one, 1.0) for _, _, one in paper.wanted(tables)])
    for draw in paper_charts.CHARTS.values():
        left, right = draw(stats).axes
        assert left.get_title() and right.get_title()
    curve = right.get_lines()[0].get_xydata()
    assert curve[0].tolist() == [512, 1 / 513]
