"""The file of --config: values of options, and nothing that takes time, memory or a traceback."""

import argparse

import effort
import pytest
import yaml

from longlora.errors import UserError
from longlora.training import config_file, options


def refused(tmp_path, content, *words):
    file = tmp_path / "c.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    # The largest of these files takes 63,000 calls; aliases that are followed never end.
    with effort.calls(most=500_000), pytest.raises(UserError) as caught:
        options.from_flags(argparse.Namespace(config=str(file)), planning=True)
    message = str(caught.value)
    assert all(word in message for word in words) and len(message) < 2100 and message.isprintable(), message


BOMB = "seed:\n - &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f" - &a{i} [" + ",".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {r: 4}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [" + ",".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "content, words",
    [
        ("seed: 2026-13-45", ["c.yaml: seed: month must be in 1..12"]),
        ("seed: 0x_", ["c.yaml: seed: invalid literal for int()"]),
        ("seed: !!int x", ["c.yaml: seed: invalid literal for int()"]),
        ("seed: !!bool x", ["c.yaml: seed: 'x' does not fit its YAML tag"]),
        ("seed: " + "9" * 5000, ["c.yaml: seed: Exceeds the limit"]),
        ("seed: 2026-11-29", ["seed should be int, got datetime.date(2026, 11, 29)"]),
        ("seed: " + "[" * 1000, ["c.yaml: is not YAML: it is nested too deeply"]),
        ("seed: '\\x", ["is not YAML"]),
        ('seed: "\\U00110000"', ["is not YAML"]),
        ("seed: !!python/object:os.system {}", ["seed should be a value or a list of values"]),
        ("seed: [1]", ["seed should be int, got [1]"]),
        ("seed: {a: 1}", ["seed should be a value or a list of values"]),
        ("seed: 1\nseed: 2", ["seed is given twice"]),
        ("? [a, b]\n: 1", ["unknown option 'a sequence'"]),
        ("zzz: ~", ["unknown option 'zzz'"]),
        ("modules_to_save: ~", ["modules_to_save is missing"]),
        ("- a", ["should be a mapping of options, got a sequence"]),
        ("just words", ["should be a mapping of options, got a scalar"]),
        ("a: 1\n---\nb: 2", ["is not YAML"]),
        (b"seed: \xff", ["is not UTF-8 at byte 6"]),
        (b"#" * (1 << 16) + b"#", ["is larger than 65,536 bytes"]),
        (BOMB, ["seed should be a value or a list of values"]),
        (MERGES, ["a0 should be a value or a list of values"]),
        ("model: " + "x" * 60_000 + "\nzzz: 1", ["unknown option 'zzz'"]),
        ("x" * 60_000 + ": 1", ["is not YAML"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, content, words):
    refused(tmp_path, content, *words)


def test_the_values_are_those_of_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    content = (
        "\ufeffseed: 0x1F\nr: 0b11\nmax_steps: 1_000\nlearning_rate: 1e-4\nlora_alpha: .5\nfull: no\n"
        "target_modules: &t [q_proj, 'v_proj']\nmodules_to_save: *t\nmodel: |\n  base\ninit: ~\n"
        "data: !!str 7\n"
    )
    file.write_text(content)
    assert config_file.read(file) == yaml.safe_load(content)
    file.write_text("# nothing\n")
    assert config_file.read(file) == {}
    file.write_text("seed: 1\n".ljust(1 << 16, "#"))  # the largest size that is accepted
    assert config_file.read(file) == dict(seed=1)


def test_a_list_in_an_error_is_cut_short():
    """A list of lists of lists has a billion items, and a few kilobytes in memory."""
    bomb = ["x"] * 9
    for _ in range(11):
        bomb = [bomb] * 9
    with pytest.raises(UserError) as caught:
        options.from_dict({"model": "m", "data": "d", "output_dir": "o", "seed": bomb})
    assert str(caught.value).startswith("seed should be int, got [[[[...], ")
