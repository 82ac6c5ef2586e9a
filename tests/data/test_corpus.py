"""A directory of data stands for its texts, each once, and a sentence names the rest."""

import os

import pytest
import tiny
from test_data import KINDS, failure, write

from longlora.data.text import Corpus
from longlora.data.tokens import tokenise


def texts(corpus):
    return ["".join(pieces) for pieces in corpus.documents()]


def names(corpus, folder):
    return [os.path.relpath(file, folder) for file in corpus.files]


def test_missing_and_unreadable_paths_are_named(tmp_path):
    assert "no such file" in failure(Corpus, str(tmp_path / "no.txt"))
    assert "no .txt and no .jsonl" in failure(Corpus, str(tmp_path))
    write(tmp_path / "a.csv", "a,b")
    wanted = f"{tmp_path}: holds no .txt and no .jsonl file; left out 1 of another kind (a.csv)"
    assert failure(Corpus, str(tmp_path)) == wanted
    (tmp_path / "folder.txt").mkdir()
    write(tmp_path / "folder.txt" / "b.jsonl", '{"text": "b"}')
    write(tmp_path / "folder.txt" / "a.txt", "a")
    found = Corpus(str(tmp_path / "folder.txt"))
    assert names(found, tmp_path) == ["folder.txt/a.txt", "folder.txt/b.jsonl"] and found.sentence() is None
    os.symlink("nowhere", tmp_path / "folder.txt" / "lost.txt")
    assert "lost.txt: No such file" in failure(texts, Corpus(str(tmp_path / "folder.txt")))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """root can read every folder, so the test replaces the system call."""
    write(tmp_path / "a.txt", "a")
    (tmp_path / "b").mkdir()
    listdir = os.listdir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert failure(Corpus, str(tmp_path)) == f"{tmp_path}/b: cannot be read: Permission denied"


@pytest.mark.parametrize(
    "present, taken, sentence",
    [
        (["a.txt", "b/c.txt"], ["a.txt", "b/c.txt"], None),
        (["b.txt", "B.TXT", "c.JsonL"], ["B.TXT", "b.txt", "c.JsonL"], None),
        (
            ["a.txt", ".ipynb_checkpoints/a-checkpoint.txt"],
            ["a.txt"],
            "left out 1 hidden (.ipynb_checkpoints)",
        ),
        (["a.txt", "b/._a.txt", ".DS_Store"], ["a.txt"], "left out 2 hidden (.DS_Store, ...)"),
        (["a.txt", "a.md", "LICENSE", "c/x.bin"], ["a.txt"], "left out 3 of another kind (LICENSE, ...)"),
        (
            ["a.txt", "o/options.yaml", "o/metrics.jsonl", "metrics.jsonl"],
            ["a.txt", "metrics.jsonl"],
            "left out 1 of another kind (o/options.yaml), 1 part of a run or a model (o/metrics.jsonl)",
        ),
        (
            ["m/config.json", "m/merges.txt", "m/vocab.txt", "merges.txt", "vocab.txt"],
            ["merges.txt", "vocab.txt"],
            "left out 1 of another kind (m/config.json), 2 part of a run or a model (m/merges.txt, ...)",
        ),
        (["a.txt", ".b\x1b[2J"], ["a.txt"], "left out 1 hidden (.b\\x1b[2J)"),
    ],
)
def test_a_directory_stands_for_its_texts(tmp_path, present, taken, sentence):
    for name in present:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, '{"text": "a"}' if name.lower().endswith("jsonl") else "a")
    found = Corpus(str(tmp_path))
    assert names(found, tmp_path) == taken and found.sentence() == sentence
    assert texts(found) == ["a"] * len(taken)


def test_links_are_followed_and_nothing_is_read_twice(tmp_path):
    """A link to another folder counts. A second path to a text does not, nor does a folder inside itself."""
    data = tmp_path / "data"
    (data / "z").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    write(data / "z" / "one.txt", "1")
    write(tmp_path / "elsewhere" / "two.txt", "2")
    write(tmp_path / "three", "3")
    os.symlink("../elsewhere", data / "more")
    os.symlink("../three", data / "three.txt")
    assert names(Corpus(str(data)), data) == ["more/two.txt", "three.txt", "z/one.txt"]
    assert Corpus(str(data)).sentence() is None
    os.symlink("z", data / "again")
    os.symlink("z/one.txt", data / "one.txt")
    os.symlink("..", data / "z" / "up")
    found = Corpus(str(data))
    assert names(found, data) == ["more/two.txt", "three.txt", "z/one.txt"]
    assert found.sentence() == "left out 3 linked again (again, ...)"
    assert texts(found) == ["2", "3", "1"]


def test_files_without_text_are_left_out_of_a_directory(tmp_path):
    """The sentence is the same when the tokens come from the cache."""
    data, cache, said = tmp_path / "data", str(tmp_path / "cache"), []
    data.mkdir()
    write(data / "a.txt", "some text")
    write(data / "blank.txt", "\ufeff" + " \n" * 100)
    write(data / "empty.txt", "")
    write(data / "nothing.jsonl", '\n{"text": ""}\n')
    first = tokenise(str(data), KINDS["gpt2"], 400, cache, said.append)
    second = tokenise(str(data), KINDS["gpt2"], 400, cache, said.append)
    assert len(first) == len(second) == 1
    sentence = "left out 3 without text (blank.txt, ...)"
    assert said[0].startswith("tokenised 1 document, ") and said[0].endswith(f"bytes each; {sentence}")
    assert said[1:] == [f"{data}: {sentence}"]
    os.unlink(data / "a.txt")
    assert f"{data}: holds no text" in failure(tokenise, str(data), KINDS["gpt2"], 400, cache)


@pytest.mark.parametrize(
    "name, beside",
    [
        ("metrics.jsonl", "options.yaml"),
        *[("merges.txt", beside) for beside in ("config.json", "tokenizer_config.json", "vocab.json")],
        *[("vocab.txt", beside) for beside in ("config.json", "tokenizer_config.json")],
    ],
)
def test_a_file_of_a_run_or_a_model_is_known_by_the_file_beside_it(tmp_path, name, beside):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / name, '{"text": "a"}')
    assert names(Corpus(str(tmp_path)), tmp_path) == ["a.txt", name]
    write(tmp_path / beside, "{}")
    found = Corpus(str(tmp_path))
    assert names(found, tmp_path) == ["a.txt"]
    assert found.sentence() == (f"left out 1 of another kind ({beside}), 1 part of a run or a model ({name})")


def test_paths_of_other_kinds_are_refused(tmp_path):
    wanted = "should be .txt, .jsonl or .bin, .jsonl.gz, .json or .parquet, "
    wanted += "or a directory of .txt and .jsonl files"
    for name in ("a.csv", "a", "txt", "a.txt.gz"):
        path = write(tmp_path / name, "a")
        assert failure(Corpus, path) == f"{path}: {wanted}"
    for name in ("b.txt", "b.JSONL", "b.bin", "b.jsonl.gz", "b.json", "b.parquet"):
        path = str(tmp_path / name)
        assert failure(Corpus, path) == f"{path}: no such file or directory"
        assert Corpus(write(tmp_path / name, "a")).files == [path]
    assert Corpus("someone/texts").files == ["someone/texts"]  # a dataset's name


def test_line_ends_of_windows_become_line_breaks(tmp_path):
    """Python reads text files like this. A lone CR and the strings of JSON stay."""
    write(tmp_path / "a.txt", "one\r\ntwo\rthree\r\n\r\n")
    write(tmp_path / "b.txt", "four\n")
    write(tmp_path / "c.jsonl", b'{"text": "five\\r\\n"}\r\n')
    found = Corpus(str(tmp_path))
    assert texts(found) == ["one\ntwo\rthree\n\n", "four\n", "five\r\n"]
    assert found.sentence() == "CRLF became LF in 1 of 3 files"
    write(tmp_path / ".d.txt", "five\n")
    found = Corpus(str(tmp_path))
    assert len(texts(found)) == 3
    assert found.sentence() == "left out 1 hidden (.d.txt); CRLF became LF in 1 of 3 files"


def test_a_run_reads_the_folder_that_it_writes_to(tmp_path, monkeypatch):
    """A second run in the folder of the text and a resumed run train on the same text as the first."""
    monkeypatch.chdir(tmp_path)
    tiny.model("base")
    tiny.text("text.txt")
    given = [
        "--model",
        "base",
        "--data",
        ".",
        "--sequence-length",
        64,
        "--learning-rate",
        1e-2,
        "--device",
        "cpu",
    ]
    for more in (
        ["--output-dir", "out1", "--max-steps", 1],
        ["--output-dir", "out2", "--max-steps", 1],
        ["--output-dir", "out1", "--max-steps", 2, "--resume-from-checkpoint", "latest"],
    ):
        done = tiny.command("train", *given, *more)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    metrics = [(tmp_path / out / "metrics.jsonl").read_text() for out in ("out1", "out2")]
    assert "out1/metrics.jsonl" in done.stdout and metrics[0].count("\n") == 2


def test_names_that_are_not_utf_8_are_read(tmp_path):
    """The name of a file is bytes. The token cache and the messages can hold it."""
    data, said = tmp_path / "data", []
    data.mkdir()
    path = os.fsdecode(bytes(data) + b"/caf\xe9.txt")
    write(data / "a.txt", "some text")
    os.rename(data / "a.txt", path)
    for given in (path, str(data)):
        found = tokenise(given, KINDS["gpt2"], 400, str(tmp_path / "cache"), said.append)
        assert KINDS["gpt2"].backend.decode(found.ids[:-1].tolist()) == "some text"
    assert len(said) == 1  # the second time the tokens come from the cache
    assert "caf\\udce9.txt: is not UTF-8 at byte 0" in failure(
        tokenise, write_bad(path), KINDS["gpt2"], 400, str(tmp_path / "no")
    )


def write_bad(path):
    with open(path, "wb") as file:
        file.write(b"\xff")
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.bin"])
def test_pipes_and_devices_are_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    message = failure(tokenise, str(tmp_path / name), KINDS["gpt2"], 400, str(tmp_path / "cache"))
    assert "is a pipe, a socket or a device; wanted a file" in message
    os.unlink(tmp_path / name)
    os.symlink("/dev/zero", tmp_path / name)
    message = failure(tokenise, str(tmp_path / name), KINDS["gpt2"], 400, str(tmp_path / "cache"))
    assert "is a pipe, a socket or a device; wanted a file" in message
