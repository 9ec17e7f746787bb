"""MNIST's and CIFAR's own files, damaged ones, and pickles that would run something."""

from __future__ import annotations

import copyreg
import gzip
import os
import pickle
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage import cifar, idx
from pipeline.storage.cifar import read_binary, read_class_names, read_pickled, read_pickled_batch
from pipeline.storage.idx import read_idx

RNG = np.random.default_rng(0)
Array = npt.NDArray[Any]


# IDX


def idx_bytes(array: Array, kind: int = 8) -> bytes:
    head = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


GRAY = RNG.integers(0, 256, (300, 5, 7), np.uint8)


@pytest.mark.parametrize("array", [GRAY, GRAY[:, 0, 0], GRAY[:0], GRAY[..., None]])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_files_are_read(array: Array, pack: Callable[[bytes], bytes]) -> None:
    found = read_idx(pack(idx_bytes(array)))
    assert found.dtype == np.uint8
    assert found.shape == array.shape
    assert np.array_equal(found, array)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no IDX file"),
        (b"\0\0\x08", "no IDX file"),
        (b"\x89PNG", "no IDX file"),
        (b"\0\1\x08\1\0\0\0\1x", "no IDX file"),
        (idx_bytes(GRAY.view(np.int8), 9), "element type 0x09"),
        (idx_bytes(GRAY.astype(">f4"), 13), "element type 0x0d"),
        (b"\0\0\x08\0x", "0 dimensions"),
        (b"\0\0\x08\xff" + bytes(255 * 4), "255 dimensions"),
        (idx_bytes(GRAY)[:15], "header, at byte 15"),
        (idx_bytes(GRAY)[:16], "0 bytes where"),
        (idx_bytes(GRAY)[:-1], "10499 bytes where its shape .* needs 10500"),
        (idx_bytes(GRAY) + b"x", "10501 bytes where"),
        (b"\0\0\x08\4" + b"\xff" * 16, "0 bytes where"),  # 2**128, more than a word holds
        (b"\0\0\x08\4" + bytes(4) + b"\xff" * 12, "too big"),
        (gzip.compress(idx_bytes(GRAY), mtime=0)[:-1], "damaged"),
        (gzip.compress(idx_bytes(GRAY), mtime=0)[:100], "damaged"),
        (gzip.compress(idx_bytes(GRAY), mtime=0) + b"junk", "damaged"),
        (gzip.compress(idx_bytes(GRAY)[:-1], mtime=0), "10499 bytes where"),
        (gzip.compress(gzip.compress(idx_bytes(GRAY), mtime=0), mtime=0), "no IDX file"),
        (b"\x1f\x8b", "damaged"),
    ],
)
def test_what_is_no_idx_file_is_refused(data: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_idx(data)


def test_a_flipped_bit_in_a_compressed_idx_file_is_seen() -> None:
    raw = gzip.compress(idx_bytes(GRAY), 0, mtime=0)
    assert raw[40:50] in idx_bytes(GRAY)
    for place in [*range(16, 60), *range(len(raw) - 8, len(raw))]:
        with pytest.raises(ValueError, match=r"damaged|no IDX file"):
            read_idx(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])


def test_a_compressed_idx_file_is_not_unpacked_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(idx, "MAX_BYTES", 2**20)
    raw = gzip.compress(bytes(2**26), 1)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 1048576 bytes"):
            read_idx(raw)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@settings(max_examples=300)
@given(
    head=st.binary(max_size=20),
    tail=st.binary(max_size=40),
    start=st.sampled_from([b"", b"\0\0\x08", b"\0\0\x08\1\0\0\0", b"\x1f\x8b\x08"]),
)
def test_any_bytes_are_an_idx_array_or_an_error(head: bytes, tail: bytes, start: bytes) -> None:
    try:
        found = read_idx(start + head + tail)
    except ValueError:
        return
    assert found.nbytes <= len(head) + len(tail)


# CIFAR's binary batches


IMAGES = RNG.integers(0, 256, (6, 32, 32, 3), np.uint8)
PLANES = IMAGES.transpose(0, 3, 1, 2).reshape(6, 3072)
LABELS = [9, 0, 3, 3, 8, 1]
FINE = [99, 0, 57, 10, 20, 1]


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_binary_batches_are_read(label_bytes: Any) -> None:
    columns = [np.array(LABELS)] if label_bytes == 1 else [np.array(LABELS), np.array(FINE)]
    raw = np.column_stack([*columns, PLANES]).astype(np.uint8).tobytes()
    images, labels = read_binary(raw, label_bytes)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert np.array_equal(images, IMAGES)
    assert labels.tolist() == (LABELS if label_bytes == 1 else FINE)
    for wrong in (b"", raw[:-1], raw + b"x", raw[:3072]):
        with pytest.raises(ValueError, match="whole number of records"):
            read_binary(wrong, label_bytes)
    with pytest.raises(ValueError, match="whole number of records"):
        read_binary(raw, 3 - label_bytes)


@pytest.mark.parametrize(("label_bytes", "labels"), [(1, [10]), (2, [20, 5]), (2, [5, 100])])
def test_labels_that_are_no_class_are_refused(label_bytes: Any, labels: list[int]) -> None:
    with pytest.raises(ValueError, match="no class"):
        read_binary(bytes(3072 + label_bytes) + bytes(labels) + bytes(3072), label_bytes)


# CIFAR's pickles, written instruction by instruction as cPickle of Python 2 did


class Python2:
    """Protocol 2 as of Python 2: strings are 'U' and 'T', and everything is put into the memo."""

    def __init__(self) -> None:
        self.puts = 0

    def put(self) -> bytes:
        self.puts += 1
        place = self.puts
        return b"q%c" % place if place < 256 else b"r" + struct.pack("<I", place)

    def text(self, value: bytes) -> bytes:
        if len(value) < 256:
            return b"U%c" % len(value) + value + self.put()
        return b"T" + struct.pack("<i", len(value)) + value + self.put()

    def number(self, value: int) -> bytes:
        if 0 <= value < 256:
            return b"K%c" % value
        return (
            b"M" + struct.pack("<H", value)
            if 0 <= value < 65536
            else (b"J" + struct.pack("<i", value))
        )

    def array(self, rows: Array) -> bytes:
        out = b"cnumpy.core.multiarray\n_reconstruct\n" + self.put() + b"cnumpy\nndarray\n"
        out += self.put() + b"K\0\x85" + self.put() + self.text(b"b") + b"\x87" + self.put()
        out += b"R" + self.put() + b"(K\1" + b"".join(self.number(n) for n in rows.shape)
        out += b"\x86" + self.put() + b"cnumpy\ndtype\n" + self.put() + self.text(b"u1")
        out += b"K\0K\1\x87" + self.put() + b"R" + self.put() + b"(K\3" + self.text(b"|")
        out += b"NNN" + self.number(-1) * 2 + b"K\0t" + self.put() + b"b"
        return out + b"\x89" + self.text(rows.tobytes()) + b"t" + self.put() + b"b"

    def value(self, value: Any) -> bytes:
        if isinstance(value, list):
            out = b"]" + self.put()
            for start in range(0, len(value), 1000):
                out += b"(" + b"".join(map(self.value, value[start : start + 1000])) + b"e"
            return out
        if isinstance(value, bytes):
            return self.text(value)
        return self.number(value) if isinstance(value, int) else self.array(value)

    def file(self, content: dict[bytes, Any]) -> bytes:
        out = b"\x80\2}" + self.put() + b"("
        return out + b"".join(self.text(k) + self.value(v) for k, v in content.items()) + b"u."


NAMES = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse"]
NAMES += [b"ship", b"truck"]
BATCH = {
    b"batch_label": b"training batch 1 of 5",
    b"labels": LABELS,
    b"data": PLANES,
    b"filenames": [b"leptodactylus_pentadactylus_s_00000%d.png" % row for row in range(6)],
}
META = {b"num_cases_per_batch": 10000, b"label_names": NAMES, b"num_vis": 3072}
GENUINE = Python2().file(BATCH)


DTYPE = GENUINE[GENUINE.index(b"cnumpy\ndtype") : GENUINE.index(b"\x89T")]


def same(found: dict[str, object], content: dict[bytes, Any]) -> None:
    assert list(found) == [key.decode() for key in content]
    for key, value in content.items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(found[key.decode()], value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            texts = [item.decode() if isinstance(item, bytes) else item for item in value]
            assert found[key.decode()] == texts
        else:
            assert found[key.decode()] == (value.decode() if isinstance(value, bytes) else value)


def test_what_is_written_here_is_what_python_reads() -> None:
    found = pickle.loads(GENUINE, encoding="bytes")
    assert list(found) == list(BATCH)
    assert np.array_equal(found[b"data"], PLANES)
    # 158 bytes is what the published batches.meta has.
    assert len(Python2().file(META)) == 158
    assert pickle.loads(Python2().file(META), encoding="bytes") == META


def test_published_pickles_are_read() -> None:
    same(read_pickled(GENUINE), BATCH)
    same(read_pickled(Python2().file(META)), META)
    images, labels = read_pickled_batch(GENUINE)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert np.array_equal(images, IMAGES)
    assert labels.tolist() == LABELS
    assert read_class_names(Python2().file(META)) == tuple(name.decode() for name in NAMES)


def test_fine_labels_and_names_go_before_coarse_ones() -> None:
    content = {b"coarse_labels": LABELS, b"fine_labels": FINE, b"data": PLANES}
    assert read_pickled_batch(Python2().file(content))[1].tolist() == FINE
    meta = {b"fine_label_names": [b"apple", b"aquarium_fish"], b"coarse_label_names": NAMES}
    assert read_class_names(Python2().file(meta)) == ("apple", "aquarium_fish")


def test_a_batch_of_the_published_size_is_read() -> None:
    rows = np.broadcast_to(PLANES[:1], (10_000, 3072))
    names = [b"name_s_%06d.png" % row for row in range(10_000)]
    content = {b"labels": [1] * 10_000, b"data": rows, b"filenames": names}
    raw = Python2().file(content)
    images, labels = read_pickled_batch(raw)
    assert images.shape == (10_000, 32, 32, 3)
    assert np.array_equal(images[-1], IMAGES[0])
    assert labels.sum() == 10_000
    assert read_pickled(raw)["filenames"] == [name.decode() for name in names]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_python_3_writes_is_read(protocol: int, order: Any) -> None:
    content = {**BATCH, b"data": np.array(PLANES, order=order)}
    same(read_pickled(pickle.dumps(content, protocol)), BATCH)
    texts = {key.decode(): value for key, value in META.items()}
    texts["label_names"] = [name.decode() for name in NAMES]
    same(read_pickled(pickle.dumps(texts, protocol)), META)


def test_truth_values_and_shared_values() -> None:
    order = GENUINE.replace(b"\x89T", b"I00\nT")
    same(read_pickled(order), BATCH)
    raw = b"\x80\2}(U\1a]q\1(K\1K\2eU\1bh\1U\1cj\1\0\0\0U\1d(K\3lu."
    assert read_pickled(raw) == {"a": [1, 2], "b": [1, 2], "c": [1, 2], "d": [3]}


def batch(**changes: Any) -> bytes:
    content = {**BATCH, **{key.encode(): value for key, value in changes.items()}}
    return Python2().file({key: value for key, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (batch(data=None), "lacks"),
        (batch(labels=None), "lacks"),
        (batch(data=b"x"), "lacks"),
        (batch(labels=b"x"), "lacks"),
        (batch(labels=LABELS[:-1]), "6 images and 5 labels"),
        (batch(labels=[*LABELS[:-1], 10]), "0 to 9"),
        (batch(labels=[*LABELS[:-1], -1]), "0 to 9"),
        (batch(labels=[b"x"] * 6), "0 to 9"),
        (batch(fine_labels=[*FINE[:-1], 100]), "0 to 99"),
        (batch(labels=[*LABELS[:-1], 1]).replace(b"K\1e", b"I" + b"9" * 4000 + b"\ne"), "0 to 9"),
        (batch(data=PLANES[:, :3071]), "N x 3072"),
        (batch(data=PLANES[:0]), "N x 3072"),
        (batch(data=PLANES.reshape(6, 3, 1024)), "no CIFAR"),
        (GENUINE.replace(b"M\0\x0c\x86", b"M\1\x0c\x86"), "N x 3072"),
        (GENUINE.replace(DTYPE, b"N"), "N x 3072"),
        (GENUINE.replace(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"), "other arguments"),
        (GENUINE.replace(b"U\1b", b"U\1c"), "other arguments"),
        (pickle.dumps(BATCH, 2).replace(b"latin1", b"rot_13"), "other arguments"),
        (GENUINE.replace(b"u1", b"i1"), "other arguments"),
        (GENUINE.replace(b"u1", b"O8"), "other arguments"),
        (GENUINE.replace(b"K\3U\1|", b"K\3U\1<"), "other than uint8"),
        (pickle.dumps({"data": PLANES.astype(np.int64)}, 2), "other arguments"),
        (pickle.dumps({"data": np.array([None])}, 2), "other arguments"),
        (pickle.dumps(LABELS, 2), "no dictionary"),
        (pickle.dumps({"a": {"b": 1}}, 2), "holds a dict"),
        (pickle.dumps({"a": [1, "b"]}, 2), "holds a int"),
        (pickle.dumps({"a": [[1]]}, 2), "holds a list"),
        (pickle.dumps({"a": True}, 2), "holds a bool"),
        (pickle.dumps({"a": None}, 2), "holds a NoneType"),
        (pickle.dumps({1: 1}, 2), "key that is no text"),
        (pickle.dumps({f"k{n}": n for n in range(17)}, 2), "too many keys"),
        (pickle.dumps({"data": PLANES}, 5), "not admitted|names"),
        (pickle.dumps({"a": 1.5}, 2), "BINFLOAT"),
        (b"\x80\2}U\1acnumpy\nndarray\ns.", "holds a _Mark"),
        (GENUINE + b"x", "one value"),
        (GENUINE[:-1] + b"}.", "one value"),
        (GENUINE[:-1] + b"(.", "one value"),
        (b"(" + GENUINE, "one value"),
        (b"", "exhausted"),
        (b".", "one value"),
        (b"garbage", "no CIFAR"),
        (b"\x89PNG\r\n\x1a\n", "not admitted"),
    ],
)
def test_other_pickles_are_refused(raw: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_pickled_batch(raw)


@pytest.mark.parametrize("names", [None, [], NAMES, [1, 2], b"x", 3])
def test_class_names_are_a_list_of_text(names: Any) -> None:
    raw = Python2().file({} if names is None else {b"label_names": names})
    if names in ([], NAMES):
        assert len(read_class_names(raw)) == len(names)
    else:
        with pytest.raises(ValueError, match="no class names"):
            read_class_names(raw)


def test_a_cut_anywhere_is_seen() -> None:
    small = [*range(200), *range(200, len(GENUINE), 997), *range(len(GENUINE) - 300, len(GENUINE))]
    for cut in small:
        with pytest.raises(ValueError, match="no CIFAR file"):
            read_pickled(GENUINE[:cut])


# Pickles that would run something


class Runs:
    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def canaries(path: str) -> dict[str, bytes]:
    """Pickles that make the folder ``path``, or name what could, by every way there is."""
    make = b"cposix\nmkdir\n"
    text = b"U%c" % len(path) + path.encode()
    named = b"X" + struct.pack("<I", len(path)) + path.encode()
    call = make + text + b"\x85R"
    source = f"__import__('os').mkdir({path!r})".encode()
    found = {
        "mkdir": b"\x80\2" + call + b".",
        "as a value": b"\x80\2}U\1a" + call + b"s.",
        "as a key": b"\x80\2}" + call + b"K\1s.",
        "in a batch": GENUINE[:-2] + b"U\1x" + call + b"u.",
        "taken off": GENUINE[:-1] + call + b"0.",
        "eval": b"\x80\2cbuiltins\neval\nU%c" % len(source) + source + b"\x85R.",
        "exec of Python 2": b"c__builtin__\nexec\nU%c" % len(source) + source + b"\x85R.",
        "by stack": b"\x80\4\x8c\5posix\x8c\5mkdir\x93" + named + b"\x85R.",
        "by stack and memo": b"\x80\4\x8c\5posix\x94\x8c\5mkdir\x940h\0h\1\x93" + named + b"\x85R.",
        "dotted": b"\x80\4\x8c\2os\x8c\x08sys.exit\x93)R.",
        "instance": b"(" + text + b"iposix\nmkdir\n.",
        "object": b"(" + make + text + b"o.",
        "new object": b"\x80\2cpipeline.errors\nPipelineError\n)\x81.",
        "new object with keywords": b"\x80\4cbuiltins\ndict\n)}\x92.",
        "persistent": b"Pposix mkdir\n.",
        "binary persistent": text + b"Q.",
        "extension": b"\x80\2\x82\x01.",
        "extension 2": b"\x80\2\x83\x01\x00.",
        "extension 4": b"\x80\2\x84\x01\0\0\0.",
        "next buffer": b"\x80\5\x97.",
        "numpy.load": b"cnumpy\nload\n" + text + b"\x85R.",
        "numpy's own exec": b"cnumpy.testing._private.utils\nrunstring\n(U\1a}tR.",
        "frombuffer": b"cnumpy._core.numeric\n_frombuffer\n(U\1a}tR.",
        "copyreg": b"ccopyreg\n_reconstructor\n(cposix\nstat_result\nc__builtin__\nobject\nNtR.",
        "getattr": b"c__builtin__\ngetattr\n(cnumpy\nndarray\nU\1atR.",
        "nested": b"cnumpy\ndtype\n(" + call + b"K\0K\1tR.",
        "codec that runs": b"c_codecs\nencode\n(X\1\0\0\0aX\3\0\0\0zipt\x52.",
        "call of a result": b"cnumpy\ndtype\n(U\2u1K\0K\1tR)R.",
        "call of an array": b"cnumpy\nndarray\n(K\1\x85tR.",
        "subclass in reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n"
        b"(cnumpy\nmatrix\nK\0\x85U\1btR.",
        "state of a class": b"cnumpy\nndarray\n}U\1aK\1sb.",
        "state of a dictionary": b"}}U\x0c__setstate__K\1sb.",
        "state of a list": b"](" + call + b"tb.",
        "string of protocol 0": b"S'" + path.encode() + b"'\n.",
        "set": b"\x80\4\x8f(K\1\x90.",
        "frozen set": b"\x80\4(K\1\x91.",
        "bytearray": b"\x80\5\x96" + struct.pack("<Q", 1) + b"x.",
        "long": b"\x80\2\x8a\1\1.",
        "float": b"F1.5\n.",
        "copy": b"}2.",
        "pop mark": b"}(1.",
    }
    for protocol in range(6):
        found[f"dumps {protocol}"] = pickle.dumps(Runs(os.mkdir, (path,)), protocol)
        inner = Runs(Runs, (Runs(os.mkdir, (path,)),), {"a": Runs(os.mkdir, (path,))})
        found[f"dumps nested {protocol}"] = pickle.dumps({"data": [inner]}, protocol)
    return found


@pytest.mark.parametrize("name", sorted(canaries("/x")))
def test_pickles_that_would_run_something_are_refused_and_do_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extensions = {1: ("posix", "mkdir")}
    monkeypatch.setattr(copyreg, "_inverted_registry", extensions)
    with pytest.raises(ValueError, match="no CIFAR file"):
        read_pickled(canaries(str(tmp_path / "canary"))[name])
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["mkdir", "eval", "by stack", "instance", "in a batch"])
def test_the_canaries_themselves_work(name: str, tmp_path: Path) -> None:
    path = tmp_path / "canary"
    pickle.loads(canaries(str(path))[name], encoding="latin1")
    assert path.exists()


# Pickles that would use up memory or the stack


def test_an_odd_escape_where_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="no CIFAR file"):
            read_pickled(b"S'\\c'\n.")


def test_long_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="1000000"):
        read_pickled(b"\x80\2" + b"]" * (cifar.MAX_INSTRUCTIONS + 1) + b".")


def test_large_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "MAX_PICKLE_BYTES", len(GENUINE))
    assert read_pickled(GENUINE)
    with pytest.raises(ValueError, match="more than"):
        read_pickled(GENUINE + b"x")


DEEP = 100_000
BOMBS = {
    "lists in lists": b"\x80\2}U\1a" + b"]" * DEEP + b"a" * (DEEP - 1) + b"s.",
    "tuples in tuples": b"\x80\2}U\1aN" + b"\x85" * DEEP + b"s.",
    "a deep key": b"\x80\2}N" + b"\x85" * DEEP + b"K\1s.",
    "deep arguments": b"\x80\2cnumpy\ndtype\nN" + b"\x85" * DEEP + b"R.",
    "a deep state": b"cnumpy\ndtype\n(U\2u1K\0K\1tRN" + b"\x85" * DEEP + b"b.",
    "marks": b"\x80\2" + b"(" * DEEP + b".",
    "laughs": b"\x80\2]q\0" + b"".join(b"](" + b"h\0" * 10 + b"eq\0" for _ in range(50)) + b".",
    "laughs as a value": b"\x80\2}U\1a]q\0"
    + b"".join(b"0](" + b"h\0" * 10 + b"eq\0" for _ in range(50))
    + b"s.",
    "a list in itself": b"\x80\2}U\1a]q\0h\0as.",
    "a dictionary in itself": b"\x80\2}q\0U\1ah\0s.",
    "a string encoded often": b"\x80\2}X\1\0\0\0a](c_codecs\nencode\nq\0X\6\0\0\0latin1q\1"
    + (b"X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"q\2")
    + b"h\0h\2h\1\x86R" * 10_000
    + b"es.",
    "lengths that lie": b"\x80\2T\xff\xff\xff\x7fx.",
    "a negative length": b"\x80\2T\xff\xff\xff\xffx.",
    "a frame that lies": b"\x80\4\x95" + b"\xff" * 8 + b"X\xff\xff\xff\xffx.",
    "a place in the memo": b"\x80\2}r\xff\xff\xff\xffh\1s.",
    "an empty stack": b"\x80\2q\1.",
    "no mark": b"\x80\2}u.",
    "an odd number": b"\x80\2}(U\1au.",
    "into a number": b"\x80\2K\1K\1a.",
    "a deep name": b"\x80\4N" + b"\x85" * DEEP + b"\x8c\1a\x93.",
    "a call of nothing": b"\x80\2R.",
    "arguments that are none": b"\x80\2c_codecs\nencode\nNR.",
    "a number too long": b"\x80\2}U\1aI" + b"9" * 5000 + b"\ns.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str) -> None:
    raw = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="no CIFAR file"):
            read_pickled(raw)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


def test_one_array_set_again_and_again_is_refused() -> None:
    writer = Python2()
    array = writer.array(PLANES)
    assert array.endswith(b"q%cb" % writer.puts)
    with pytest.raises(ValueError, match="sets the state of what has none"):
        read_pickled(b"\x80\2}U\4data" + array + b"h%c" % writer.puts + b"bs.")


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
@settings(max_examples=500)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=4), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    from_end=st.booleans(),
    protocol=st.sampled_from([0, 2, 3, 4]),
)
def test_changed_pickles_give_what_they_may_or_an_error(
    changes: list[tuple[int, bytes, bool]], from_end: bool, protocol: int
) -> None:
    raw = pickle.dumps(BATCH, protocol) if protocol else GENUINE
    for offset, data, insert in changes:
        place = len(raw) - offset if from_end else offset
        raw = raw[:place] + data + raw[place + len(data) * (not insert) :]
    try:
        found = read_pickled(raw)
        images, labels = read_pickled_batch(raw)
    except ValueError:
        return
    assert all(isinstance(value, int | str | list | np.ndarray) for value in found.values())
    assert images.shape == (len(labels), 32, 32, 3)


@settings(max_examples=300)
@given(
    program=st.lists(
        st.sampled_from(
            [
                *[bytes([byte]) for byte in b"}])(.uaestblRN\x85\x86\x87\x88\x89\x93\x94"],
                *[b"K\1", b"U\1a", b"X\1\0\0\0b", b"q\1", b"h\1", b"U\6latin1", b"I01\n"],
                *[b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"\x8c\1a"],
                b"cnumpy.core.multiarray\n_reconstruct\n",
            ]
        ),
        max_size=30,
    )
)
def test_any_program_gives_a_dictionary_or_an_error(program: list[bytes]) -> None:
    try:
        found = read_pickled(b"\x80\2" + b"".join(program) + b".")
    except ValueError:
        return
    assert all(isinstance(key, str) for key in found)
