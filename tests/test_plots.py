"""Pictures: they are PNG files, hold the right numbers, and leave the program's matplotlib alone."""

import numpy as np
import pytest
import reference

from longlora import plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    found = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: found.append(figure))
    return found


def test_the_backend_of_the_program_stays(tmp_path):
    """No pyplot: it would keep every figure, and Agg would end a notebook's own pictures."""
    import matplotlib

    before = matplotlib.get_backend()
    try:
        matplotlib.use("svg")
        plots.loss(tmp_path / "loss.png", [{"step": 1, "loss": 2.0}])
        plots.attention(tmp_path / "attention.png", 64, 16)
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)
    for name in ("loss.png", "attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_smoothed_loss_is_the_mean_with_weights_that_fall_by_a_tenth(figures):
    values = np.random.default_rng(0).uniform(1, 5, 30)
    rows = [{"step": i, "loss": value} for i, value in enumerate(values, 1)] + [
        {"step": 30, "eval_loss": 2.5}
    ]
    plots.loss("x", rows)
    logged, smooth, held = figures[0].axes[0].get_lines()
    np.testing.assert_array_equal(logged.get_xydata(), np.stack([np.arange(1, 31), values], 1))
    wanted = [np.average(values[:n], weights=0.9 ** np.arange(n)[::-1]) for n in range(1, 31)]
    np.testing.assert_allclose(smooth.get_ydata(), wanted, rtol=1e-12)
    assert held.get_xydata().tolist() == [[30, 2.5]]


def test_perplexity_has_its_curves_and_the_native_length(figures):
    plots.perplexity("x", {"before": ([1, 2], [9, 8]), "after": ([1, 2], [7, 6])}, native=2)
    before, after, native = figures[0].axes[0].get_lines()
    assert [line.get_label() for line in (before, after)] == ["before", "after"]
    assert after.get_xydata().tolist() == [[1, 7], [2, 6]] and list(native.get_xdata()) == [2, 2]


@pytest.mark.parametrize("boundary", ["split", "wrap", "swap"])
@pytest.mark.parametrize("shift", ["half", "none", "all"])
def test_attention_is_what_the_reference_attends_to(figures, boundary, shift):
    plots.attention("x", 32, 8, boundary, shift)
    left, right = (axes.images[0].get_array() for axes in figures[0].axes)
    mask = np.broadcast_to(reference.attention_mask(32, 2, 8, boundary, shift), (2, 32, 32))
    np.testing.assert_array_equal(np.stack([left, right]), mask)


def test_the_heat_map_has_a_block_for_each_cell(figures):
    """Depths 0.2 and 0.6 meet at 0.4. A length may have its own depths. Marks lie after columns."""
    cells = [(64, 0.2, 1.0), (64, 0.6, 0.5), (128, 0.5, 0.0), (256, "random", 0.25)]
    rows = [dict(zip(("length", "depth", "accuracy"), cell)) for cell in cells]
    plots.passkey("x", rows, context=200, pretrained=64)
    axes = figures[0].axes[0]
    blocks = [(patch.get_x() + 0.5, patch.get_y(), patch.get_height()) for patch in axes.patches]
    np.testing.assert_allclose(blocks, [(0, 0, 0.4), (0, 0.4, 0.6), (1, 0, 1), (2, 0, 1)])
    shown = [text.get_text().split("\n")[0] for text in axes.texts]
    assert shown == ["100", "50", "0", "25", "base 64", "made for 200"]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[0.5, 0.5], [1.5, 1.5]]
    plots.passkey("x", rows, context=512, pretrained=32)
    assert not figures[1].axes[0].get_lines()  # both lie outside
