"""Bitstreams: round trips, random access, every field damaged, and golden files."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.codecs import bitstream
from pipeline.codecs.bitstream import Bitstream, BitstreamError, compress, decompress, read_header
from pipeline.codecs.entropy import StaticModel
from pipeline.codecs.hidden_tree import HiddenTree
from pipeline.errors import PipelineError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "bitstreams.json").read_text())
MODELS = {"static": StaticModel, "tree": HiddenTree}


def samples(count: int = 200, dtype: str = "int16", seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    scale = np.array([0.3, 1.0, 4.0])[:, None, None]
    return np.abs(np.rint(draw.laplace(0, scale, (count, 3, 4, 5)))).astype(dtype)


@pytest.fixture(scope="module", params=["channel", "position", "tree"])
def model(request):
    x = samples(400, seed=1)
    if request.param == "tree":
        return HiddenTree.fit(x, states=3, epochs=2)
    return StaticModel.counted(x, positions=request.param == "position")


@pytest.mark.parametrize("dtype", list(bitstream.TYPES.values()))
@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_samples_come_back_with_their_type(model, dtype, count):
    x = samples(count, dtype)
    data = compress(x, model)
    found = decompress(data, model)
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    assert (found == x).all()


@pytest.mark.parametrize("group", [1, 3, 200, 1000])
def test_a_sample_is_one_range_of_bytes(model, group):
    x = samples()
    data = compress(x, model, group=group)
    asked = []

    def read(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return data[start:stop]

    stream = Bitstream(read, model)
    before = len(asked)
    assert (stream[101] == x[101]).all()
    assert len(asked) == before + 1
    assert (decompress(data, model) == x).all()
    with pytest.raises(IndexError):
        stream[200]


def test_groups_take_two_kilobytes_and_little_for_themselves(model):
    x = samples(1000)
    data = compress(x, model)
    header = read_header(data)
    sizes = np.diff(header.starts)
    assert 1500 < sizes[:-1].mean() < 3000
    ideal = model.bits(x.reshape(len(x), -1)) / 8
    assert len(data) < 1.01 * ideal + 100


def test_bytes_are_those_of_symbols_and_not_of_their_layout(model):
    x = samples(64)
    data = compress(x, model)
    assert compress(np.asfortranarray(x), model) == data
    assert compress(np.repeat(x, 2, 0)[::2], model) == data
    one = compress(x, model, group=1)
    starts = read_header(one).starts
    for row in range(0, 64, 9):
        alone = bitstream.encode_group(x[row : row + 1], model)
        assert one[starts[row] : starts[row + 1]] == alone


def test_noise_takes_no_more_than_itself(model):
    x = np.random.default_rng(0).integers(-(2**15), 2**15, (30, 3, 4, 5)).astype(np.int16)
    data = compress(x, model, group=1)
    assert (decompress(data, model) == x).all()
    assert np.diff(read_header(data).starts).max() <= x[0].nbytes + 5


def test_a_model_that_went_to_another_process_gives_the_same_bytes(model):
    x = samples(50)
    again = pickle.loads(pickle.dumps(model))
    assert again.digest == model.digest
    assert compress(x, again) == compress(x, model)
    stored = type(model).from_arrays(model.to_arrays())
    assert compress(x, stored) == compress(x, model)


def test_one_damaged_group_leaves_the_others(model):
    x = samples()
    data = bytearray(compress(x, model, group=20))
    starts = read_header(bytes(data)).starts
    data[(starts[3] + starts[4]) // 2] ^= 4
    stream = Bitstream(bytes(data), model)
    with pytest.raises(BitstreamError, match="group 3") as caught:
        stream[65]
    assert caught.value.code == "bitstream-group"
    assert (stream[59] == x[59]).all()
    assert (stream[80] == x[80]).all()


def mended(data: bytearray) -> bytes:
    """With the checksum of its header as it now is."""
    size = int.from_bytes(data[8:12], "little")
    data[size - 4 : size] = google_crc32c.value(bytes(data[: size - 4])).to_bytes(4, "little")
    return bytes(data)


FIELDS = {
    0: "magic",
    4: "version",
    5: "codec",
    6: "dtype",
    7: "shape",
    12: "model",
    20: "shape",
    23: "index",
}
"""A byte of each field, and what is said when it is another: shape is 3, 4, 5, then 10 and 5."""


@pytest.mark.parametrize(("place", "field"), FIELDS.items())
def test_every_field_of_a_header_is_checked(model, place, field):
    data = bytearray(compress(samples(10), model, group=5))
    data[place] = 99
    with pytest.raises(BitstreamError) as caught:
        decompress(bytes(data), model)
    expected = field if field in {"magic", "version"} else "header"
    assert caught.value.code == f"bitstream-{expected}"
    with pytest.raises(BitstreamError) as caught:
        decompress(mended(data), model)
    assert caught.value.code == f"bitstream-{field}"
    assert caught.value.hint


def test_a_stream_of_another_model_is_refused(model):
    data = compress(samples(5), model)
    other = StaticModel.counted(samples(50, seed=9) + 1)
    with pytest.raises(BitstreamError) as caught:
        decompress(data, other)
    same = type(other) is type(model)
    assert caught.value.code == ("bitstream-model" if same else "bitstream-codec")


def test_what_is_claimed_is_refused_before_it_is_allocated(model):
    fixed = bitstream._FIXED
    numbers = b"".join(map(bitstream._varint, [3, 4, 5, 2**40, 2**40, 5]))
    head = fixed.pack(
        b"VPBS",
        1,
        model.codec,
        4,
        3,
        fixed.size + len(numbers) + 4,
        bytes.fromhex(model.digest)[:8],
    )
    data = head + numbers
    data += google_crc32c.value(data).to_bytes(4, "little") + b"\1\2\3\4\5"
    tracemalloc.start()
    with pytest.raises(BitstreamError) as caught:
        decompress(data, model)
    assert caught.value.code == "bitstream-size"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    with pytest.raises(BitstreamError, match="More than 100 symbols"):
        decompress(compress(samples(5), model), model, most=100)


def test_every_cut_is_refused(model):
    data = compress(samples(40), model, group=10)
    for size in range(len(data)):
        with pytest.raises(BitstreamError):
            decompress(data[:size], model)
    with pytest.raises(BitstreamError, match="follow its last group"):
        decompress(data + b"\0", model)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_change_of_bytes_gives_other_samples(model, data):
    x = samples(12)
    stream = bytearray(compress(x, model, group=4))
    for place in data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=4)):
        stream[place] ^= data.draw(st.integers(1, 255))
    try:
        found = decompress(bytes(stream), model)
    except BitstreamError:
        return
    assert (found == x).all()  # two changes that undo each other


def test_ten_thousand_strings_of_bytes_are_only_refused(model):
    draw = np.random.default_rng(0)
    good = compress(samples(4), model)
    size = int.from_bytes(good[8:12], "little")
    for number in range(10_000):
        noise = draw.bytes(int(draw.integers(0, 120)))
        # A third of them are noise, a third noise behind a header, a third groups of noise.
        if number % 3 == 1:
            noise = good[:20] + noise
        elif number % 3 == 2:
            noise = good[:size] + bytes([1]) + noise
        with pytest.raises(PipelineError):
            decompress(noise, model)


@pytest.mark.parametrize(
    ("symbols", "why"),
    [
        (np.zeros((2, 3, 4, 6), np.int16), "for a model of"),
        (np.zeros((2, 3, 4, 5), np.float32), "float32"),
    ],
)
def test_symbols_that_do_not_fit_a_model_are_refused(model, symbols, why):
    with pytest.raises(ValueError, match=why):
        compress(symbols, model)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_files_that_were_written_once_are_read_for_ever(case):
    arrays = {n: np.array(v["values"], v["dtype"]) for n, v in case["model"].items()}
    arrays = {n: a.reshape(case["model"][n]["shape"]) for n, a in arrays.items()}
    model = MODELS[case["kind"]].from_arrays(arrays)
    assert model.digest == case["digest"]
    data, symbols = bytes.fromhex(case["stream"]), np.array(case["symbols"], case["dtype"])
    found = decompress(data, model)
    assert found.dtype == symbols.dtype
    assert (found == symbols).all()
    assert compress(symbols, model, group=case["group"]) == data
