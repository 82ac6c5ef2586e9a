"""The headers of GGUF files are read as the specification says, and damage in them is named."""

import struct

import pytest
from refusals import refusal

from longlora.errors import UserError
from longlora.files.gguf_header import open_file, open_files


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def array(kind, count, data):
    return struct.pack("<IQ", kind, count) + data


def header(path, pairs=(), tensors=(), version=3, after=b""):
    """Write a header. pairs: (key, type, bytes of the value); tensors: (name, sizes, type, offset)."""
    data = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    data += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    for name, sizes, kind, offset in tensors:
        data += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    path.write_bytes(data + after)
    return path


def value_of(path, key="key"):
    """The value of a key of the file's metadata."""
    return open_file(path).metadata[key]


def damage(path):
    return refusal(path, lambda: open_file(path))


# The scalar types of the specification: number, format of struct, a value that another type would misread.
SCALARS = [
    (0, "B", 200),
    (1, "b", -100),
    (2, "H", 60000),
    (3, "h", -30000),
    (4, "I", 4_000_000_000),
    (5, "i", -2_000_000_000),
    (6, "f", 1.5),
    (7, "?", True),
    (10, "Q", (1 << 64) - 3),
    (11, "q", -(1 << 62)),
    (12, "d", 0.1),
]


@pytest.mark.parametrize("kind, code, value", SCALARS)
def test_each_type_of_number_is_read(tmp_path, kind, code, value):
    path = tmp_path / "m.gguf"
    found = value_of(header(path, [("key", kind, struct.pack(f"<{code}", value))]))
    assert found == value and type(found) is type(value)
    for count in (0, 1, 3):
        values = [value, type(value)(0), value][:count]
        packed = struct.pack(f"<{count}{code}", *values)
        found = value_of(header(path, [("key", 9, array(kind, count, packed)), ("next", 0, b"\x05")]))
        assert found == values and value_of(path, "next") == 5
        assert [type(x) for x in found] == [type(x) for x in values]


@pytest.mark.parametrize("value", ["", "x", "two words", "caf\u00e9 \u65e5\u672c \U0001f642\n\0"])
def test_texts_are_read(tmp_path, value):
    path = tmp_path / "m.gguf"
    assert value_of(header(path, [("key", 8, text(value)), ("next", 0, b"\x05")])) == value
    assert value_of(path, "next") == 5
    for values in ([], [value], [value, "other", value]):
        packed = array(8, len(values), b"".join(map(text, values)))
        assert value_of(header(path, [("key", 9, packed), ("next", 0, b"\x05")])) == values
        assert value_of(path, "next") == 5


def test_many_empty_texts_are_read(tmp_path):
    """Each takes 8 bytes, so they are nearly the whole file."""
    found = value_of(header(tmp_path / "m.gguf", [("key", 9, array(8, 500, bytes(4000)))]))
    assert found == [""] * 500


def test_keys_may_be_any_text(tmp_path):
    assert open_file(header(tmp_path / "m.gguf", [("caf\u00e9.\u65e5", 0, b"\x07")])).metadata == {
        "caf\u00e9.\u65e5": 7
    }


@pytest.mark.parametrize(
    "kind, value",
    [
        (0, b"\x01"),
        (12, bytes(8)),
        (8, text("text")),
        (8, text("")),
        (9, array(2, 3, bytes(6))),
        (9, array(8, 2, text("one") + text("two"))),
        (9, array(8, 2, text("one") + text(""))),
        (9, array(8, 0, b"")),
    ],
    ids=["byte", "double", "text", "empty text", "numbers", "texts", "last text is empty", "no texts"],
)
def test_a_header_that_is_cut_anywhere_is_truncated(tmp_path, kind, value):
    path = header(tmp_path / "m.gguf", [("key", kind, value)])
    open_file(path)
    whole = path.read_bytes()
    for size in range(8, len(whole)):
        path.write_bytes(whole[:size])
        assert damage(path) == f"truncated: the header extends past the file's {size} bytes"


@pytest.mark.parametrize(
    "kind, value",
    [
        (8, struct.pack("<Q", 1 << 62)),
        (8, struct.pack("<Q", (1 << 64) - 8)),
        (9, array(8, 1 << 62, text("one"))),
        (9, array(8, 1, struct.pack("<Q", (1 << 64) - 8))),
        (9, array(4, 1 << 61, bytes(8))),
        (9, array(12, (1 << 64) - 1, bytes(8))),
    ],
)
def test_huge_lengths_extend_past_the_end_of_the_file(tmp_path, kind, value):
    assert damage(header(tmp_path / "m.gguf", [("key", kind, value)])).startswith(
        "truncated: the header extends"
    )


def test_tensors_are_read(tmp_path):
    """The file lists the fastest axis first. Offsets count from the start of the data."""
    tensors = [("a", (7,), 0, 0), ("b.weight", (5, 6), 8, 64), ("c", (2, 3, 4, 1 << 40), 30, 1 << 50)]
    path = header(tmp_path / "m.gguf", tensors=tensors)
    size = path.stat().st_size
    found = open_file(path)
    assert found.infos == {
        "a": ((7,), 0, 0),
        "b.weight": ((6, 5), 8, 64),
        "c": ((1 << 40, 4, 3, 2), 30, 1 << 50),
    }
    info = found.infos["b.weight"]
    assert (info.shape, info.code, info.offset) == ((6, 5), 8, 64)
    assert found.path == str(path) and found.metadata == {} and found.base == -(-size // 32) * 32
    assert found.buffer[:] == path.read_bytes()


@pytest.mark.parametrize("extra", [0, 1, 31, 32, 33])
@pytest.mark.parametrize("alignment", [None, 1, 2, 8, 32, 64])
def test_the_data_begins_at_a_multiple_of_the_alignment(tmp_path, extra, alignment):
    pairs = [("x" * (10 + extra), 0, b"\x01")]
    pairs += [("general.alignment", 4, struct.pack("<I", alignment))] if alignment else []
    path = header(tmp_path / "m.gguf", pairs, after=bytes(100))
    end, unit = path.stat().st_size - 100, alignment or 32
    assert open_file(path).base == min(n for n in range(0, 500, unit) if n >= end)


@pytest.mark.parametrize(
    "kind, value",
    [(4, 0), (4, 3), (4, 6), (4, 33), (4, 96), (5, -1), (5, -8), (6, 32.0), (8, "32"), (12, float("nan"))],
)
def test_a_wrong_alignment_is_refused(tmp_path, kind, value):
    packed = text(value) if kind == 8 else struct.pack("<" + {4: "I", 5: "i", 6: "f", 12: "d"}[kind], value)
    found = damage(header(tmp_path / "m.gguf", [("general.alignment", kind, packed)]))
    assert found == f"damaged header: general.alignment should be a power of 2, got {value!r}"


def test_versions_2_and_3_are_read_and_no_others(tmp_path):
    for version in (2, 3):
        assert open_file(header(tmp_path / "m.gguf", version=version)).metadata == {}
    for version in (0, 1, 4, 3 << 24):  # the last is version 3 of a big-endian file
        found = damage(header(tmp_path / "m.gguf", version=version))
        assert found.startswith(
            f"damaged header: GGUF version {version} is not supported; supported are 2 and 3"
        )


@pytest.mark.parametrize(
    "pairs, tensors, message",
    [
        ([("key", 13, bytes(8))], [], "metadata of unknown type 13"),
        ([("key", 1 << 31, bytes(8))], [], f"metadata of unknown type {1 << 31}"),
        ([("key", 9, array(9, 1, array(0, 1, b"\0")))], [], "an array of type 9"),
        ([("key", 9, array(13, 1, bytes(8)))], [], "an array of type 13"),
        ([("key", 9, array(13, 0, b""))], [], "an array of type 13"),
        ([("key", 8, struct.pack("<Q", 2) + b"\xff\xff")], [], "'utf-8' codec can't decode"),
        ([("key", 9, array(8, 1, struct.pack("<Q", 2) + b"\xff\xff"))], [], "'utf-8' codec can't decode"),
        ([("key", 0, b"\1"), ("b", 0, b"\1"), ("key", 0, b"\1")], [], "key 'key' appears twice"),
        ([], [("a", (4,), 0, 0), ("b", (4,), 0, 0), ("a", (4,), 0, 32)], "tensor 'a' appears twice"),
        ([], [("a", (), 0, 0)], "tensor 'a' has 0 axes, should have 1 to 4"),
        ([], [("a", (1,) * 5, 0, 0)], "tensor 'a' has 5 axes, should have 1 to 4"),
    ],
)
def test_damage_is_named(tmp_path, pairs, tensors, message):
    assert damage(header(tmp_path / "m.gguf", pairs, tensors)).startswith(f"damaged header: {message}")


@pytest.mark.parametrize("start", [b"GGUE", b"FUGG", b"GGML", b"PK\3\4"])
def test_a_file_with_another_magic_is_not_a_gguf(tmp_path, start):
    path = header(tmp_path / "m.gguf")
    path.write_bytes(start + path.read_bytes()[4:])
    assert damage(path) == "not a GGUF file (and not a model directory)"


def test_a_file_of_seven_bytes_is_truncated(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0")
    assert damage(tmp_path / "m.gguf") == "truncated: 7 bytes are not a GGUF file"


# ---- the files of a split model ------------------------------------------------------------------


def part(folder, number, count, /, tensors=(), keys=(), **metadata):
    """Write part `number` of a split model. metadata: other values of split.* keys; None leaves one out."""
    values = {"no": number, "count": count, **metadata}
    kinds = {int: (5, "i"), float: (6, "f")}
    pairs = list(keys)
    for key, value in values.items():
        if isinstance(value, str):
            pairs.append((f"split.{key.replace('_', '.')}", 8, text(value)))
        elif value is not None:
            kind, code = kinds[type(value)]
            pairs.append((f"split.{key.replace('_', '.')}", kind, struct.pack(f"<{code}", value)))
    name = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
    return header(name, pairs, [(name, (32,), 0, 32 * i) for i, name in enumerate(tensors)])


def split_refusal(path):
    """The message for a split model. It may start with the path of any of the files."""
    with pytest.raises(UserError) as caught:
        open_files(path)
    return str(caught.value)


@pytest.mark.parametrize("total", [None, 4])
def test_all_files_of_a_split_model_are_opened_in_order(tmp_path, total):
    key = ("general.name", 8, text("whole"))
    first = part(tmp_path, 0, 3, ["a"], [key], tensors_count=total)
    others = [part(tmp_path, 1, 3, ["b", "c"]), part(tmp_path, 2, 3, ["d"])]
    files = open_files(first)
    assert [file.path for file in files] == [str(path) for path in (first, *others)]
    assert [list(file.infos) for file in files] == [["a"], ["b", "c"], ["d"]]
    assert files[0].metadata["general.name"] == "whole"


@pytest.mark.parametrize(
    "metadata", [dict(no=None, count=None), dict(no=0), dict(no=None), dict(no=0, count=0)]
)
def test_a_single_part_is_a_whole_model(tmp_path, metadata):
    path = part(tmp_path, 0, 1, ["a"], **metadata).rename(tmp_path / "any name.gguf")
    (file,) = open_files(path)
    assert file.path == str(path) and list(file.infos) == ["a"]


@pytest.mark.parametrize(
    "no, count",
    [(0, "2"), ("0", 2), (0, 2.0), (0.0, 2), (-1, 2), (2, 2), (3, 2), (0, -2), (0, 1 << 16), (-1, "x")],
)
def test_a_part_number_that_does_not_fit_the_count_is_refused(tmp_path, no, count):
    path = part(tmp_path, 0, 2, no=no, count=count)
    assert split_refusal(path) == f"{path}: split.no {no!r} does not fit split.count {count!r}"


def test_a_model_may_have_65535_files(tmp_path):
    path = part(tmp_path, 0, 2, count=(1 << 16) - 1)
    assert split_refusal(path).endswith("so its name should end in -00001-of-65535.gguf")


def test_a_part_must_be_named_by_its_number_and_count(tmp_path):
    path = part(tmp_path, 1, 3)
    for name in ("m.gguf", "m-00002-of-00004.gguf", "m-2-of-3.gguf", "m-00002-of-00003.gguf.bak"):
        moved = path.rename(tmp_path / name)
        assert split_refusal(moved) == (
            f"{moved}: is part 2 of 3 of a split model, so its name should end in -00002-of-00003.gguf"
        )
        path = moved


def test_only_the_first_part_opens_a_model(tmp_path):
    paths = [part(tmp_path, number, 2, [str(number)]) for number in (0, 1)]
    assert split_refusal(paths[1]) == f"{paths[1]}: is part 2 of 2; wanted the first, {paths[0]}"
    part(tmp_path, 1, 2, no=0)
    assert split_refusal(paths[1]) == f"{paths[1]}: is part 1 of 2; wanted the first, {paths[0]}"
    part(tmp_path, 0, 2, no=1)
    assert split_refusal(paths[0]) == f"{paths[0]}: is part 2 of 2; wanted the first, {paths[0]}"


@pytest.mark.parametrize(
    "number, metadata",
    [(0, dict(no=None)), (1, dict(no=None)), (1, dict(no=2)), (1, dict(count=2)), (2, dict(count=None))],
)
def test_a_part_whose_metadata_and_name_differ_is_named(tmp_path, number, metadata):
    paths = [part(tmp_path, i, 3, [str(i)], **(metadata if i == number else {})) for i in range(3)]
    assert split_refusal(paths[0]) == f"{paths[number]}: should be part {number + 1} of 3 by its metadata"


@pytest.mark.parametrize("total", [None, 3, 2, 4])
@pytest.mark.parametrize("third", ["c", "a"])
def test_the_parts_must_hold_as_many_tensors_as_the_first_says(tmp_path, total, third):
    first = part(tmp_path, 0, 2, ["a"], tensors_count=total)
    part(tmp_path, 1, 2, ["b", third])
    if third == "c" and total in (None, 3):
        assert len(open_files(first)) == 2
    else:
        different = 3 if third == "c" else 2
        assert split_refusal(first) == (
            f"{first}: its 2 files hold 3 tensors, {different} different, split.tensors.count says {total}"
        )
