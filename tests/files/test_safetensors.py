"""We read and write the dtypes, sizes and offsets that the safetensors library does."""

import json
import mmap
import struct

import ml_dtypes
import numpy as np
import pytest
from refusals import refusal as refusal_of
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from test_model_file import Pages
from test_weights import entry, raw_file

from longlora.errors import UserError
from longlora.files import safetensors as safetensors_file
from longlora.files.safetensors import SafetensorsFile, release

# The dtypes that we read: their names in the file, and the bytes of an element.
ARRAYS = {
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "float64": ("F64", 8),
    "int32": ("I32", 4),
    "int64": ("I64", 8),
    "uint8": ("U8", 1),
}
# Other dtypes of the format, and the bytes of an element.
OTHERS = {
    **{"BOOL": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
    **{"I16": 2, "U16": 2, "U32": 4, "U64": 8, "C64": 8},
}


def numbers(dtype, shape=(3, 2)):
    return (np.arange(np.prod(shape)).reshape(shape) * 7 + 1).astype(getattr(ml_dtypes, dtype, dtype))


def parts(path):
    """The header of a file with its padding, and the data behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def refusal(path):
    return refusal_of(path, lambda: SafetensorsFile(path))


@pytest.mark.parametrize("dtype", ARRAYS)
def test_arrays_of_each_dtype_are_written_and_read(tmp_path, dtype):
    path, array = tmp_path / "x.safetensors", numbers(dtype)
    bits = array.view(np.uint16) if dtype == "bfloat16" else array
    tensors = {"a": array, "b": array[:1] + array[:1]}
    for save in (lambda: save_file(tensors, path), lambda: safetensors_file.save(path, tensors)):
        save()
        file = SafetensorsFile(path)
        assert {name: found[:2] for name, found in file.entries.items()} == {
            "a": (dtype, (3, 2)),
            "b": (dtype, (1, 2)),
        }
        found = file.array("a")
        assert found.dtype == bits.dtype
        np.testing.assert_array_equal(found, bits)
    theirs = load_file(path)
    assert theirs["a"].dtype == array.dtype and theirs["b"].shape == (1, 2)
    np.testing.assert_array_equal(theirs["b"], array[:1] + array[:1])
    described = json.loads(parts(path)[0])["a"]
    assert described["dtype"] == ARRAYS[dtype][0] and described["shape"] == [3, 2]
    assert safetensors_file.WIDTHS[dtype] == ARRAYS[dtype][1] == array.itemsize


@pytest.mark.parametrize("dtype, width", OTHERS.items())
def test_other_dtypes_may_be_in_a_file_but_are_not_read(tmp_path, dtype, width):
    header = {"a": entry(0, 3 * width, [3], dtype), "b": entry(3 * width, 3 * width + 8)}
    path = raw_file(tmp_path / "x.safetensors", header, bytes(3 * width) + b"\0\0\x80\x3f\0\0\0\x40")
    with safe_open(path, "np") as theirs:
        assert set(theirs.keys()) == {"a", "b"}
    ours = SafetensorsFile(path)
    assert ours.entries["a"][:2] == (dtype, (3,))
    np.testing.assert_array_equal(ours.array("b"), [1, 2])
    with pytest.raises(
        UserError, match=f"x.safetensors: a: dtype {dtype} is not supported; supported are F32"
    ):
        ours.array("a")
    header = {"a": entry(0, 3 * width, [4], dtype)}
    assert refusal(raw_file(path, header, bytes(3 * width))) == (
        f"a: {dtype} of shape [4] needs {4 * width} bytes, its data_offsets span {3 * width}"
    )
    with pytest.raises(SafetensorError):
        safe_open(path, "np")


def test_wide_elements_come_first_so_all_are_aligned(tmp_path):
    """Arrays of the same width keep their order. The data begins at a multiple of 64."""
    order = ["uint8", "bfloat16", "int32", "float64", "float16", "float32", "int64"]
    tensors = {f"{dtype}.{'x' * i}": numbers(dtype, (3,)) for i, dtype in enumerate(order)}
    for size in range(3, 8):
        path = tmp_path / "x.safetensors"
        some = dict(list(tensors.items())[:size])
        safetensors_file.save(path, some)
        text, data = parts(path)
        header = json.loads(text)
        assert header.pop("__metadata__") == {"format": "pt"}
        wanted = sorted(some, key=lambda name: some[name].itemsize, reverse=True)
        assert list(header) == wanted
        assert (8 + len(text)) % 64 == 0 and text.endswith((b"}", b" ")) and b" " not in text.rstrip(b" ")
        assert len(text) - len(text.rstrip(b" ")) < 64
        for name, found in header.items():
            start, end = found["data_offsets"]
            assert start % some[name].itemsize == 0
            assert data[start:end] == some[name].tobytes()
        assert load_file(path).keys() == some.keys() and len(data) == sum(
            array.nbytes for array in some.values()
        )


@pytest.mark.parametrize(
    "given, stored", [(None, {"format": "pt"}), ({}, {"format": "pt"}), ({"a": "b"}, None)]
)
def test_files_without_other_metadata_have_the_format_of_pytorch(tmp_path, given, stored):
    path = tmp_path / "x.safetensors"
    safetensors_file.save(path, {"a": numbers("float32")}, given)
    with safe_open(path, "np") as theirs:
        assert theirs.metadata() == SafetensorsFile(path).metadata == (stored or given)


def test_an_array_of_one_byte_is_saved(tmp_path):
    safetensors_file.save(tmp_path / "x.safetensors", {"a": np.array([7], np.uint8)})
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [7]


@pytest.mark.parametrize("wrong", ["a", "b"])
@pytest.mark.parametrize("shape", [(2,), (4,)])
def test_an_array_of_another_size_than_announced_is_not_written(tmp_path, wrong, shape):
    arrays = {"a": numbers("float32", (3,)), "b": numbers("float32", (3,)), "c": numbers("float16", (3,))}
    wanted = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    arrays[wrong] = numbers("float32", shape)
    message = f"{wrong}: wanted \\('float32', \\(3,\\)\\), got float32 of shape \\({shape[0]},\\)"
    with pytest.raises(ValueError, match=message):
        safetensors_file.write(tmp_path / "x.safetensors", wanted, arrays.__getitem__)
    assert not list(tmp_path.iterdir())


def test_the_header_may_be_the_whole_file(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", {})
    file = SafetensorsFile(path)
    assert (file.entries, file.metadata) == ({}, {})
    size = path.stat().st_size
    for more in (1, 7, 8, 9, 1 << 40):
        raw_file(path, {}, length=size - 8 + more)
        assert refusal(path) == (
            f"truncated or not a safetensors file: its header should have {size - 8 + more} bytes, "
            f"the file has {size}"
        )


def test_names_may_be_any_text(tmp_path):
    name = "caf\u00e9 \u65e5\u672c"
    save_file({name: numbers("float32")}, tmp_path / "x.safetensors", {name: name})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert list(file.entries) == [name] and file.metadata == {name: name}
    safetensors_file.save(tmp_path / "y.safetensors", {name: numbers("float32")})
    assert list(load_file(tmp_path / "y.safetensors")) == [name]


@pytest.mark.parametrize("size", [-1, 1 << 63, 1 << 64, 3.0, True, None, "3", [3]])
@pytest.mark.parametrize("key", ["shape", "data_offsets"])
def test_sizes_must_be_integers_of_63_bits(tmp_path, key, size):
    header = {"a": {**entry(0, 12), key: [size] if key == "shape" else [0, size]}}
    found = refusal(raw_file(tmp_path / "x.safetensors", header, bytes(12)))
    assert found == f"a: {key} should be a list of integers from 0, got {header['a'][key]!r}"


@pytest.mark.parametrize("value", [3, "33", None, {"0": 3}, True])
@pytest.mark.parametrize("key", ["shape", "data_offsets"])
def test_shapes_and_data_offsets_must_be_lists(tmp_path, key, value):
    found = refusal(raw_file(tmp_path / "x.safetensors", {"a": {**entry(0, 12), key: value}}, bytes(12)))
    assert found == f"a: {key} should be a list of integers from 0, got {value!r}"


@pytest.mark.parametrize("key", ["shape", "data_offsets", "dtype"])
def test_an_entry_must_have_all_keys(tmp_path, key):
    header = {"a": {name: value for name, value in entry(0, 12).items() if name != key}}
    found = refusal(raw_file(tmp_path / "x.safetensors", header, bytes(12)))
    should = "dtype None is not supported" if key == "dtype" else f"{key} should be a list of integers from 0"
    assert found.startswith(f"a: {should}")


@pytest.mark.parametrize("offsets", [[], [0], [12], [0, 12, 12], [0, 0, 12], [12, 0], [12, 11]])
def test_a_tensor_must_have_one_start_and_one_end(tmp_path, offsets):
    header = {"a": {**entry(0, 12), "data_offsets": offsets}}
    found = refusal(raw_file(tmp_path / "x.safetensors", header, bytes(12)))
    assert found == f"a: data_offsets should be a start and an end, got {offsets}"


@pytest.mark.parametrize(
    "dtype, shape, needed",
    [
        ("U8", [(1 << 63) - 1], (1 << 63) - 1),
        ("U8", [1 << 62, 2], 1 << 63),
        ("F32", [1 << 61], 1 << 63),
        ("U8", [1 << 62, 3], "more than 2^63"),
        ("U8", [1 << 62, 4, 0], "more than 2^63"),
        ("F32", [(1 << 61) + 1], "more than 2^63"),
        ("F32", [3, 5], 60),
    ],
)
def test_data_offsets_must_span_the_bytes_of_the_shape(tmp_path, dtype, shape, needed):
    """The safetensors library refuses these files too."""
    path = raw_file(tmp_path / "x.safetensors", {"a": entry(0, 16, shape, dtype)}, bytes(16))
    assert refusal(path) == f"a: {dtype} of shape {shape} needs {needed} bytes, its data_offsets span 16"
    with pytest.raises(SafetensorError):
        safe_open(path, "np")


def test_an_empty_tensor_may_have_the_largest_size(tmp_path):
    path = raw_file(
        tmp_path / "x.safetensors", {"a": entry(0, 0, [0, (1 << 63) - 1]), "b": entry(0, 4)}, bytes(4)
    )
    with safe_open(path, "np") as theirs:
        assert set(theirs.keys()) == {"a", "b"}
    assert SafetensorsFile(path).entries["a"][1] == (0, (1 << 63) - 1)


def test_tensors_must_fill_the_data_exactly(tmp_path):
    path, two = tmp_path / "x.safetensors", {"a": entry(0, 8), "b": entry(8, 16)}
    length = len(json.dumps(two))
    raw_file(path, two, bytes(15))
    assert refusal(path) == f"truncated: b ends at byte {8 + length + 16}, the file has {8 + length + 15}"
    raw_file(path, two, bytes(17))
    assert refusal(path) == f"the file has {8 + length + 17} bytes, its header describes {8 + length + 16}"
    for start, words in ((4, "overlap"), (9, "have a hole between them")):
        header = {"a": entry(0, 8), "b": entry(start, start + 8)}
        base = 8 + len(json.dumps(header))
        raw_file(path, header, bytes(start + 8))
        assert refusal(path) == (
            f"b: data starts at byte {base + start}, should start at {base + 8}: tensors {words}"
        )


def test_all_pages_of_a_tensor_are_released():
    """From the start of the page that holds the first byte."""
    page, buffer = mmap.PAGESIZE, Pages()
    spans = [
        (0, 1),
        (0, page),
        (5, page + 5),
        (page - 1, page),
        (page, 2 * page),
        (3 * page + 7, 5 * page + 9),
    ]
    for start, end in spans:
        release(buffer, start, end)
    firsts = [0, 0, 0, 0, page, 3 * page]
    assert buffer.released == [(first, end) for first, (_, end) in zip(firsts, spans, strict=True)]


def test_no_page_of_an_empty_tensor_at_the_end_is_released(tmp_path):
    """madvise fails behind the end of a file."""
    (tmp_path / "file").write_bytes(bytes(mmap.PAGESIZE))
    with open(tmp_path / "file", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        release(mapped, mmap.PAGESIZE, mmap.PAGESIZE)
        release(mapped, 0, mmap.PAGESIZE)
    assert mapped[:] == bytes(mmap.PAGESIZE)


def test_a_system_that_cannot_release_pages_keeps_them():
    release(b"a mapped file without madvise", 0, 20)
