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


def words(figure):
    """What is written around each picture: title, axes, legend."""
    return [
        [axes.get_title().strip(), axes.get_xlabel(), axes.get_ylabel()]
        + [text.get_text() for text in (axes.get_legend().get_texts() if axes.get_legend() else [])]
        for axes in figure.axes
    ]


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
    assert {line.get_alpha() for line in figures[0].axes[0].get_xgridlines()} == {0.3}
    np.testing.assert_array_equal(logged.get_xydata(), np.stack([np.arange(1, 31), values], 1))
    wanted = [np.average(values[:n], weights=0.9 ** np.arange(n)[::-1]) for n in range(1, 31)]
    np.testing.assert_allclose(smooth.get_ydata(), wanted, rtol=1e-12)
    assert held.get_xydata().tolist() == [[30, 2.5]]
    assert words(figures[0]) == [
        [
            "training loss",
            "step",
            "loss per token (nats)",
            "as logged",
            "smoothed (0.9)",
            "held out, dense attention",
        ]
    ]
    plots.loss("x", rows[:20], title="mine")
    assert words(figures[1]) == [["mine", "step", "loss per token (nats)", "as logged"]]
    one, *rest = figures[1].axes[0].get_lines()
    assert one.get_color() == smooth.get_color() != logged.get_color() and not rest


def test_perplexity_has_its_curves_and_the_native_length(figures):
    plots.perplexity("x", {"before": ([1, 2], [9, 8]), "after": ([1, 2], [7, 6])}, native=2)
    before, after, native = figures[0].axes[0].get_lines()
    assert [line.get_label() for line in (before, after)] == ["before", "after"]
    assert after.get_xydata().tolist() == [[1, 7], [2, 6]] and list(native.get_xdata()) == [2, 2]
    assert before.get_marker() == "o" and native.get_linestyle() == ":" and native.get_color() == "black"
    axes = figures[0].axes[0]
    assert words(figures[0]) == [["perplexity by position", "tokens", "perplexity", "before", "after"]]
    assert axes.get_yscale() == "log" and [text.get_text() for text in axes.texts] == [" native length"]
    for axis in (axes.yaxis.get_major_formatter(), axes.yaxis.get_minor_formatter()):
        assert axis(12.5) == "12.5" and axis(1e3) == "1000"  # no powers of ten
    plots.perplexity("x", {"a": (range(20), range(1, 21)), "b": ([1], [1]), "c": ([1], [2])}, title="mine")
    many, *others = figures[1].axes[0].get_lines()
    assert many.get_marker() == "None" and len({line.get_color() for line in (many, *others)}) == 3
    assert words(figures[1]) == [["mine", "tokens", "perplexity", "a", "b", "c"]]


def test_the_settings_of_the_user_do_not_change_the_size(figures):
    import matplotlib

    with matplotlib.rc_context({"figure.dpi": 50}):
        plots.loss("x", [{"step": 1, "loss": 2.0}])
    assert figures[0].get_dpi() == 100 and list(figures[0].get_size_inches()) == [7, 4]


@pytest.mark.parametrize("boundary", ["split", "wrap", "swap"])
@pytest.mark.parametrize("shift", ["half", "none", "all"])
def test_attention_is_what_the_reference_attends_to(figures, boundary, shift):
    plots.attention("x", 32, 8, boundary, shift)
    left, right = (axes.images[0].get_array() for axes in figures[0].axes)
    mask = np.broadcast_to(reference.attention_mask(32, 2, 8, boundary, shift), (2, 32, 32))
    np.testing.assert_array_equal(np.stack([left, right]), mask)
    assert words(figures[0]) == [[f"{kind} heads, group 8", "key", "query"] for kind in ("plain", "shifted")]
    assert list(figures[0].get_size_inches()) == [8, 4.2]  # two squares side by side
    plots.attention("x", 1024, 256, boundary, shift)  # every fourth token is drawn
    for axes, row in zip(figures[1].axes, reference.attention_mask(256, 2, 64, boundary, shift)):
        np.testing.assert_array_equal(axes.images[0].get_array(), row)
        assert list(axes.images[0].get_extent()) == [0, 1024, 1024, 0]
        assert axes.images[0].get_cmap().name == "Blues"


def test_the_heat_map_has_a_block_for_each_cell(figures):
    """Depths 0.2 and 0.6 meet at 0.4. A length may have its own depths. Marks lie after columns."""
    cells = [(64, 0.2, 1.0), (64, 0.6, 0.5), (128, 0.5, 0.0), (256, "random", 0.25), (128, "random", 0.9)]
    rows = [dict(zip(("length", "depth", "accuracy"), cell)) for cell in cells]
    plots.passkey("x", rows, context=200, pretrained=64)
    axes = figures[0].axes[0]
    blocks = [(patch.get_x() + 0.5, patch.get_y(), patch.get_height()) for patch in axes.patches]
    np.testing.assert_allclose(blocks, [(0, 0, 0.4), (0, 0.4, 0.6), (1, 0, 1), (2, 0, 1)])
    shown = [text.get_text().split("\n")[0] for text in axes.texts]
    assert shown == ["100", "50", "0", "25", "base 64", "made for 200"]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[0.5, 0.5], [1.5, 1.5]]
    assert words(figures[0]) == [
        ["passkeys found, %", "tokens of the prompt", "depth of the key (0 is the beginning)"]
    ]
    assert (
        axes.get_xlim() == (-0.5, 2.5) and axes.get_ylim() == (1, 0) and list(axes.get_xticks()) == [0, 1, 2]
    )
    assert [text.get_text() for text in axes.get_xticklabels()] == ["64", "128", "256"]
    assert [text.get_position() for text in axes.texts[4:]] == [(0.5, -0.02), (1.5, -0.02)]  # above it
    assert [text.get_position() for text in axes.texts[:4]] == [(0, 0.2), (0, 0.7), (1, 0.5), (2, 0.5)]
    assert axes.texts[3].get_text() == "25\nat random"
    assert [line.get_linestyle() for line in axes.get_lines()] == [":", "-"]
    greens = [patch.get_facecolor()[1] - patch.get_facecolor()[0] for patch in axes.patches]
    assert greens[0] > greens[1] > greens[3] > greens[2]  # from green to red
    plots.passkey("x", rows, context=64, pretrained=64)
    assert [text.get_text() for text in figures[1].axes[0].texts[4:]] == ["made for 64"]
    plots.passkey("x", rows, context=256, pretrained=32)
    assert [text.get_text() for text in figures[2].axes[0].texts[4:]] == ["made for 256"]
    assert list(figures[0].get_size_inches()) == [5, 4.6]
    del figures[1:]
    plots.passkey("x", rows, context=512, pretrained=32)
    assert not figures[1].axes[0].get_lines()  # both lie outside
    more = [dict(length=length, depth=0.5, accuracy=1.0) for length in range(1, 6)]
    plots.passkey("x", more, context=512, pretrained=32)
    np.testing.assert_allclose(figures[2].get_size_inches(), [6.2, 4.6])  # 0.8 inches for each length
