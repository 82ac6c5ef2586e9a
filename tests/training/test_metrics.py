"""metrics.jsonl: its rows, which process writes them, and the errors of reading and writing."""

import json

import pytest

from longlora.errors import UserError
from longlora.training import metrics

ROWS = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.25}]


def test_a_log_starts_with_the_earlier_rows_and_appends_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("another run's\n")
    log = metrics.Log(tmp_path, ROWS)
    lines = [json.dumps(row) for row in ROWS]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(f"{line}\n" for line in lines)
    log.add(step=3, loss=1.0)
    log.sync()
    wanted = [*ROWS, {"step": 3, "loss": 1.0}]
    assert log.rows == metrics.read(tmp_path) == wanted and len(ROWS) == 2
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n") and [json.loads(line) for line in text.splitlines()] == wanted


def test_a_log_of_no_rows_is_an_empty_file(tmp_path):
    metrics.Log(str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "" and metrics.read(str(tmp_path)) == []


def test_one_process_of_a_group_writes_and_all_keep_the_rows(tmp_path):
    log = metrics.Log(tmp_path, ROWS, False)
    log.add(step=3)
    assert log.rows == [*ROWS, {"step": 3}] and not list(tmp_path.iterdir())


def test_files_that_cannot_be_read_or_written_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match=f"^{path}: cannot be read: No such file or directory$"):
        metrics.read(tmp_path)
    path.write_bytes(b'{"step": 1}\n\xff\n')
    with pytest.raises(UserError, match=f"^{path}: is damaged: .*utf-8"):
        metrics.read(tmp_path)
    log = metrics.Log(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"^{path}: cannot be written: No such file or directory$"):
        log.sync()
    path.mkdir()
    with pytest.raises(UserError, match=f"^{path}: cannot be written: Is a directory$"):
        log.add(step=1)
