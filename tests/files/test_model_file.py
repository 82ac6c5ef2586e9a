"""What all model formats share: reading in pieces, rounding, the check of the tensors, the fingerprint."""

import math
import mmap
import types

import ml_dtypes
import numpy as np
import pytest
import tiny

from longlora import Tensor
from longlora.decoder.config import read_config
from longlora.errors import UserError
from longlora.files import model_file
from longlora.files.model_file import ModelFile, finite, from_float32, narrowed, some, to_float32

# Every bfloat16, as its bits and as float32.
BITS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
ALL = (BITS.astype(np.uint32) * (1 << 16)).view(np.float32)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Pages(bytearray):
    """A stand-in for a mapped file. `.released`: the ranges of bytes that were given back to the system."""

    released = ()

    def madvise(self, option, start, length):
        assert option == mmap.MADV_DONTNEED
        self.released = [*self.released, (start, start + length)]


class Arrays(ModelFile):
    """A model whose tensors are arrays. `.parts`: (first row, number of rows) of each piece that was read."""

    def __init__(self, config=None, **arrays):
        self.path, self.config, self.arrays, self.parts = "arrays", config, arrays, []
        self._shapes = {name: array.shape for name, array in arrays.items()}
        self.buffer = Pages(b"before" + b"".join(a.tobytes() for a in arrays.values()) + b"behind")
        if config is not None:
            self._check()

    def dtype(self, name):
        return str(self.arrays[name].dtype)

    def _part(self, name, start, stop):
        array = self.arrays[name][start:stop]
        self.parts.append((start, len(array)))
        return array.view(np.uint16) if self.dtype(name) == "bfloat16" else array, self.dtype(name)

    def _span(self, name):
        names = list(self.arrays)
        sizes = [array.nbytes for array in self.arrays.values()]
        start = 6 + sum(sizes[: names.index(name)])
        return self.buffer, start, start + self.arrays[name].nbytes


def numbers(shape, dtype=np.float32):
    return (np.arange(math.prod(shape)).reshape(shape) + 1).astype(dtype)


def test_what_a_format_does_not_implement_is_an_error():
    bare = ModelFile()
    for call in (
        lambda: bare.dtype("x"),
        lambda: bare.storage("x"),
        bare.has_tokenizer,
        bare.tokenizer,
        lambda: bare._part("x", 0, 1),
        lambda: bare._span("x"),
    ):
        with pytest.raises(NotImplementedError):
            call()
    assert bare.beside() == {} and Arrays(a=numbers((2, 3), np.float16)).storage("a") == "float16"


# ---- pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, rows",
    [
        ((6, 4), [2, 2, 2]),
        ((5, 4), [2, 2, 1]),
        ((3, 10), [1, 1, 1]),
        ((3, 11), [1, 1, 1]),
        ((4, 3), [3, 1]),
        ((25,), [10, 10, 5]),
        ((9, 1), [9]),
        ((3, 2, 4), [1, 1, 1]),
        ((5, 2, 2), [2, 2, 1]),
        ((3, 0), [3]),
    ],
)
def test_as_many_rows_are_read_at_a_time_as_fit_into_a_chunk(shape, rows, monkeypatch):
    monkeypatch.setattr(model_file, "CHUNK", 10)
    file = Arrays(a=numbers(shape))
    np.testing.assert_array_equal(file.read("a"), numbers(shape))
    assert [count for _, count in file.parts] == rows
    assert [start for start, _ in file.parts] == [sum(rows[:i]) for i in range(len(rows))]


def test_a_small_tensor_is_read_in_one_piece():
    file = Arrays(a=numbers((50, 20)))
    np.testing.assert_array_equal(file.read("a"), numbers((50, 20)))
    assert file.parts == [(0, 50)]


@pytest.mark.parametrize("shape", [(7, 5), (23,), (3, 30)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [*DTYPES, "float64"])
def test_out_may_be_an_array_or_a_tensor_of_any_dtype(shape, dtype, stored, monkeypatch):
    """A Tensor on the CPU is written in place."""
    monkeypatch.setattr(model_file, "CHUNK", 10)
    monkeypatch.setattr(model_file, "staged", None)
    array = (numbers(shape) / 3).astype(DTYPES.get(stored, np.float64))
    wanted = array.astype(np.float32).astype(DTYPES[dtype])
    out = np.empty(shape, DTYPES[dtype])
    assert Arrays(a=array).read("a", out) is out
    np.testing.assert_array_equal(out, wanted)
    tensor = Tensor(shape, dtype)
    assert Arrays(a=array).read("a", tensor) is tensor
    found = tensor.view((tensor.nbytes,), "uint8").numpy()
    assert found.tobytes() == wanted.tobytes()


class Away:
    """A stand-in for a Tensor on a GPU: only copy_ writes to it."""

    device = "cuda:0"

    def __init__(self, shape, dtype):
        self.there, self.shape, self.dtype, self.first = np.zeros(shape, np.uint16), shape, dtype, 0

    def __getitem__(self, rows):
        part = Away((rows.stop - rows.start, *self.shape[1:]), self.dtype)
        part.there = self.there[rows]
        return part

    def copy_(self, piece):
        self.there[:] = piece.view((piece.nbytes,), "uint8").numpy().view(np.uint16).reshape(self.shape)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_tensor_on_a_gpu_is_filled_piece_by_piece(dtype, monkeypatch):
    """Each piece is converted in host memory, then copied to the GPU."""
    pieces = []

    def staged(part):
        pieces.append(part.shape)
        return Tensor(part.shape, part.dtype)

    monkeypatch.setattr(model_file, "staged", staged)
    monkeypatch.setattr(model_file, "CHUNK", 10)
    array, out = numbers((5, 4)), Away((5, 4), dtype)
    assert Arrays(a=array).read("a", out) is out
    np.testing.assert_array_equal(out.there, array.astype(DTYPES[dtype]).view(np.uint16))
    assert pieces == [(2, 4), (2, 4), (1, 4)]


def test_pages_are_released_once_a_tensor_is_read():
    file = Arrays(a=numbers((2, 3)), b=numbers((4,)))
    file.read("b")
    assert file.buffer.released == [(0, 6 + 24 + 16)]


@pytest.mark.parametrize("shape", [(3,), (4, 1), (1, 4), (), (4, 4)])
def test_an_out_of_a_wrong_shape_is_refused(shape):
    file = Arrays(a=numbers((4,)))
    with pytest.raises(ValueError, match=rf"^a: out should have shape \(4,\), got \({str(shape)[1:-1]}\)$"):
        file.read("a", np.empty(shape, np.float32))
    assert not file.parts


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (1, 3), (4, 2), (5, 3)])
def test_the_first_number_that_is_not_finite_is_named(value, dtype, place, monkeypatch):
    monkeypatch.setattr(model_file, "CHUNK", 10)
    array = numbers((6, 4), DTYPES[dtype])
    array[place] = array[5, 3] = value
    with pytest.raises(UserError, match=rf"^arrays: a is not finite at \[{place[0]}, {place[1]}\]$"):
        Arrays(a=array).read("a")
    flat = array.reshape(-1)
    with pytest.raises(UserError, match=rf"^arrays: a is not finite at \[{place[0] * 4 + place[1]}\]$"):
        Arrays(a=flat).read("a")


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value")
def test_each_bfloat16_is_finite_where_ml_dtypes_says_so():
    wanted = np.isfinite(BITS.view(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(finite(BITS, "bfloat16"), wanted)
    assert (~wanted).sum() == 256
    np.testing.assert_array_equal(finite(ALL, "float32"), wanted)
    np.testing.assert_array_equal(finite(np.array([1, np.inf, np.nan], np.float16), "float16"), [1, 0, 0])


def test_each_bfloat16_becomes_the_float32_of_ml_dtypes():
    found = to_float32(BITS, "bfloat16")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, BITS.view(ml_dtypes.bfloat16).astype(np.float32))
    for dtype in (np.float16, np.float64):
        found = to_float32(np.array([0.1, -3], dtype), np.dtype(dtype).name)
        assert (
            found.dtype == np.float32 and found.tolist() == np.array([0.1, -3], dtype).astype("f4").tolist()
        )
    assert to_float32(ALL, "float32") is ALL


@pytest.mark.filterwarnings("ignore:invalid value")
def test_float32_is_rounded_to_bfloat16_as_ml_dtypes_does():
    """For each bfloat16: the number itself, its neighbours, the middle to the next one and its neighbours."""
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (ALL.view(np.uint32) + np.uint32(low)).view(np.float32)
        found, nan = from_float32(values, "bfloat16"), np.isnan(values)
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found[~nan], values.astype(ml_dtypes.bfloat16).view(np.uint16)[~nan])
        assert (found[nan] == 0x7FC0).all()  # the quiet NaN
    columns = np.arange(12, dtype=np.float32).reshape(3, 4).T
    wanted = columns.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(from_float32(columns, "bfloat16"), wanted)


def test_float32_is_rounded_to_other_dtypes_by_numpy():
    values = np.array([0.1, 1 / 3, 2049, -7], np.float32)
    found = from_float32(values, "float16")
    assert found.dtype == np.float16 and found.tolist() == values.astype(np.float16).tolist()
    assert np.shares_memory(from_float32(values, "float32"), values)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "dtype, largest, beyond",
    [("float16", 65519, 65520), ("bfloat16", 3.3961e38, 3.3962e38), ("float32", 3.4e38, None)],
)
def test_a_weight_beyond_the_range_of_a_dtype_is_named(dtype, largest, beyond):
    """The largest float16 is 65504, the largest bfloat16 3.3895e38. Numbers that round to these are held."""
    values = np.array([1, -largest, 0.1], np.float32)
    found = narrowed(values, dtype, "x")
    np.testing.assert_array_equal(found, from_float32(values, dtype))
    for more, words in (
        (beyond, f"^x has a weight of {beyond or 0:g}, which {dtype} cannot hold; choose another dtype$"),
        (-np.inf, "^x has a weight of inf$"),
        (np.nan, "^x has a weight of nan$"),
    ):
        if more is not None:
            with pytest.raises(UserError, match=words.replace("+", r"\+")):
                narrowed(np.array([[1, 2], [more, 3]], np.float32), dtype, "x")


# ---- the tensors of a config ---------------------------------------------------------------------


def arrays(tied, **changes):
    """The config and the arrays of a tiny model. `changes` replace arrays; None removes one."""
    config = read_config({**tiny.CONFIG, "num_hidden_layers": 1, "tie_word_embeddings": tied})
    found = {name: np.zeros(shape, np.float16) for name, shape in config.tensor_shapes().items()} | changes
    return config, {name: array for name, array in found.items() if array is not None}


@pytest.mark.parametrize("tied", [False, True])
def test_the_names_are_those_of_the_config(tied):
    config, found = arrays(tied)
    backwards = dict(reversed(found.items()))
    file = Arrays(config, **backwards)
    assert file.names() == list(config.tensor_shapes()) == list(found) and (HEAD in found) is not tied
    file.names().clear()
    assert file.names() == list(found)
    assert file.shape(EMBEDDING) == (260, 32) and type(file.shape(EMBEDDING)) is tuple
    if tied:
        file = Arrays(config, **{HEAD: found[EMBEDDING], **found})
        assert file.names() == list(found)


@pytest.mark.parametrize(
    "tied, changes, message",
    [
        (True, {"model.norm.weight": None}, "1 tensors of the config are missing: model.norm.weight"),
        (False, {HEAD: None}, "1 tensors of the config are missing: lm_head.weight"),
        (True, {EMBEDDING: None}, f"1 tensors of the config are missing: {EMBEDDING}"),
        (
            True,
            {EMBEDDING: np.zeros((259, 32))},
            f"{EMBEDDING} should have shape [260, 32] by the config, got [259, 32]",
        ),
        (
            True,
            {HEAD: np.zeros((260, 31))},
            f"{HEAD} should have shape [260, 32] by the config, got [260, 31]",
        ),
        (False, {HEAD: np.zeros((1,))}, f"{HEAD} should have shape [260, 32] by the config, got [1]"),
        (True, {"model.more": np.zeros(1)}, "1 tensors do not belong to a llama model: model.more"),
        (False, {"a": np.zeros(1), "b": np.zeros(1)}, "2 tensors do not belong to a llama model: a, b"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(tied, changes, message):
    config, found = arrays(tied, **changes)
    with pytest.raises(UserError) as caught:
        Arrays(config, **found)
    assert str(caught.value) == f"arrays: {message}"


def test_a_message_lists_three_names():
    assert [some(list("abcd")[:count]) for count in range(5)] == ["", "a", "a, b", "a, b, c", "a, b, c, ..."]


# ---- the fingerprint -----------------------------------------------------------------------------


def fingerprint(change=None, config=(), **tensors):
    """The fingerprint of a model of these arrays. change: the place of a byte of the file to change."""
    fields = dict(
        family="llama", rms_norm_eps=1e-5, tie_word_embeddings=True, num_attention_heads=4, rope="r"
    )
    file = Arrays(**tensors)
    file.config, file._names = types.SimpleNamespace(**{**fields, **dict(config)}), list(tensors)
    if change is not None:
        file.buffer[change] ^= 1
    return file.fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        dict(config=dict(family="qwen2"), a=numbers((2, 8), np.float16)),
        dict(config=dict(rms_norm_eps=1e-6), a=numbers((2, 8), np.float16)),
        dict(config=dict(tie_word_embeddings=False), a=numbers((2, 8), np.float16)),
        dict(config=dict(num_attention_heads=2), a=numbers((2, 8), np.float16)),
        dict(config=dict(rope="s"), a=numbers((2, 8), np.float16)),
        dict(b=numbers((2, 8), np.float16)),
        dict(a=numbers((4, 4), np.float16)),
        dict(a=numbers((2, 8), np.float16).view(np.int16)),
        dict(a=numbers((2, 8), np.float16), b=numbers((1,))),
        dict(change=6, a=numbers((2, 8), np.float16)),
        dict(change=6 + 31, a=numbers((2, 8), np.float16)),
    ],
)
def test_different_models_have_different_fingerprints(other):
    assert fingerprint(**other) != fingerprint(a=numbers((2, 8), np.float16))


def test_a_fingerprint_reads_the_first_and_last_4096_bytes_of_a_tensor():
    """Not all of a model of gigabytes, and no bytes beside a tensor."""
    tensors = dict(a=np.zeros(2500, np.float32), b=np.ones(3, np.float32))
    begin, end = 6, 6 + 10000
    seen = [begin, begin + 4095, end - 4096, end - 1, end, end + 11]
    unseen = [0, begin - 1, begin + 4096, end - 4097, end + 12, end + 17]
    wanted = fingerprint(**tensors)
    assert all(fingerprint(place, **tensors) != wanted for place in seen)
    assert all(fingerprint(place, **tensors) == wanted for place in unseen)
    assert len(wanted) == 64 and set(wanted) <= set("0123456789abcdef")


def test_a_fingerprint_is_computed_once_and_releases_the_pages():
    """Somebody may change the file during a run."""
    config, found = arrays(True)
    file = Arrays(config, **found)
    before = file.fingerprint()
    assert len(file.buffer.released) == len(found) and file.buffer.released[-1][1] == len(file.buffer) - 6
    file.buffer[6] ^= 1
    assert file.fingerprint() == before
    other = Arrays(config, **{**found, EMBEDDING: found[EMBEDDING] + 1})
    assert other.fingerprint() != before
