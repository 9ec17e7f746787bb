"""Tables as files, whole or not at all."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import encoded, folder_of, image_table, keyed, local_run, pixels

from pipeline.errors import RunError
from pipeline.stage import ShardContext
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.folder import FolderFormat
from pipeline.storage.formats import Format, Region
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import Source
from pipeline.storage.webdataset import WebDatasetFormat, WebDatasetSource
from pipeline.storage.zarr import ZarrFormat
from pipeline.tensors import tensor_column, to_numpy
from pipeline.testing import assert_same_rows, check_format

FORMATS: list[Format] = [
    ParquetFormat(),
    WebDatasetFormat(),
    WebDatasetFormat(max_bytes=100),
    ZarrFormat(),
    FolderFormat(("a", "b")),
]
BY_NAME = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
RNG = np.random.default_rng(0)

TENSORS = {
    "logits": tensor_column(RNG.normal(size=(7, 3, 5)).astype(np.float16)),
    "crop": tensor_column(RNG.integers(0, 2**16, (7, 3, 4)).astype(np.uint16)),
    "zeros": tensor_column(np.zeros((7, 2), np.float32)),
    "score": pa.array(RNG.normal(size=7).astype(np.float32)),
    "keep": pa.array([True, False] * 3 + [True]),
    "word": pa.array(["", "a", "long " * 50, "\u00e4", "\U0001f40d", "x/y", "."]),
}
NESTED = {
    "list": pa.array([[1, 2], [], None, [3], [4], [5], [6]]),
    "none": pa.array([1, None, 3, 4, 5, 6, 7]),
    "score": pa.array(RNG.normal(size=7)),
}


def extended(columns: dict[str, Any], **options: Any) -> pa.Table:
    table = image_table(7, **options)
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


@dataclass(frozen=True)
class Pictures:
    """Adds tensors drawn from the shard's name."""

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        images = pixels(table.num_rows, size=4, seed=int(context.shard))
        return table.append_column("image", tensor_column(images))


def written(out: Path, fmt: Format, *sizes: int) -> ArtifactSource:
    return local_run(out).map("step", keyed(*sizes), [Pictures()], to=fmt)


@BY_NAME
@pytest.mark.parametrize("channels", [1, 3])
def test_images_with_labels_keep_the_contract(fmt: Format, channels: int) -> None:
    check_format(fmt, image_table(7, channels=channels))


def test_parquet_holds_every_column() -> None:
    check_format(
        ParquetFormat(), extended({**TENSORS, **NESTED, "data": pa.array([b"\x00\xff"] * 7)})
    )


def test_zarr_holds_tensors_numbers_and_text() -> None:
    check_format(ZarrFormat(), extended(TENSORS))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_webdataset_holds_encoded_images_as_they_are(kind: str) -> None:
    images = pa.array([encoded(image, kind) for image in pixels(7)], pa.binary())
    table = extended(NESTED)
    check_format(WebDatasetFormat(), table.set_column(1, "image", images))


def test_webdataset_holds_tensors_with_and_without_an_image() -> None:
    tensors = {name: TENSORS[name] for name in ("logits", "crop", "zeros", "word", "keep")}
    table = extended(tensors)
    check_format(WebDatasetFormat(), table)
    check_format(WebDatasetFormat(max_bytes=100), table.drop_columns(["image"]))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1], [2]]),
        pa.array([1, None]),
        pa.array(["a", None]),
        pa.array([b"a", None]),
    ],
    ids=["list", "missing number", "missing text", "missing bytes"],
)
def test_zarr_refuses_what_would_come_back_otherwise(column: pa.Array, tmp_path: Path) -> None:
    table = pa.table({"key": ["a", "b"], "x": column})
    with pytest.raises(RunError, match="bad-column"):
        ZarrFormat().write(table, tmp_path, Region("0", 0, 2, 2))


KEYS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120),
    min_size=3,
    max_size=4,
    unique=True,
)


@BY_NAME
@given(keys=KEYS)
@example(keys=["0", "00", "0/"])
@example(keys=["/", "//", ".", "..", "%", "../x", "/x", "%2Fx"])
@example(keys=["x.png", "x.jpg", "y", "z/y.png"])
@settings(max_examples=15)
def test_any_key_comes_back(fmt: Format, keys: list[str]) -> None:
    check_format(fmt, image_table(len(keys), size=2).set_column(0, "key", pa.array(keys)))


def test_tar_members_carry_no_time_owner_or_mode(tmp_path: Path) -> None:
    source = written(tmp_path, WebDatasetFormat(), 3, 2)
    for path in folder_of(source).glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert members
        for member in members:
            facts = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
            assert facts == (0, 0, 0, "", "", 0o644)
            assert member.isreg()


def test_the_webdataset_library_reads_our_tars(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    table = image_table(5)
    WebDatasetFormat().write(table, tmp_path, Region("00000", 0, 5, 5))
    found = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = {member.name: tar.extractfile(member) for member in tar}
        held = {name: file.read() for name, file in members.items() if file}
    assert [json.loads(sample["json"])["key"] for sample in found] == table["key"].to_pylist()
    for sample, image in zip(found, to_numpy(table["image"]), strict=True):
        assert sample["png"] == held[f"{sample['__key__']}.png"] == encoded(image)
        assert sample["json"] == held[f"{sample['__key__']}.json"]


def test_our_tars_are_a_source(tmp_path: Path) -> None:
    source = written(tmp_path, WebDatasetFormat(), 3, 2)
    store = source.artifact.store
    tars = WebDatasetSource(store, tuple(f for f in store.files() if f.has("tar")), ("0", "1"))
    expected = pa.concat_tables(source.tables()).select(["key", "image", "label"])
    assert_same_rows(pa.concat_tables(tars.tables()), expected)


def test_pyarrow_alone_reads_tensors_from_parquet(tmp_path: Path) -> None:
    file = next(folder_of(written(tmp_path, ParquetFormat(), 3)).glob("*.parquet"))
    table = pq.read_table(file)
    about = json.loads(table.schema.field("image").metadata[b"tensor"])
    images = np.frombuffer(b"".join(table["image"].to_pylist()), about["type"])
    assert np.array_equal(images.reshape(3, *about["shape"]), pixels(3, size=4, seed=0))
    column = pq.ParquetFile(file).metadata.row_group(0).column(table.schema.names.index("image"))
    assert not column.is_stats_set
    assert not column.has_dictionary_page


def test_the_zarr_library_reads_all_shards_as_one_array(tmp_path: Path) -> None:
    source = written(tmp_path, ZarrFormat(), 3, 3, 2)
    group: Any = zarr.open_group(folder_of(source) / "data.zarr", mode="r")
    expected = pa.concat_tables(keyed(3, 3, 2).tables())
    assert group["key"][:].tolist() == expected["key"].to_pylist()
    assert group["label"][:].tolist() == expected["label"].to_pylist()
    images = [pixels(rows, size=4, seed=seed) for seed, rows in enumerate((3, 3, 2))]
    assert np.array_equal(group["image"][:], np.concatenate(images))
    shards = sorted((folder_of(source) / "data.zarr" / "label" / "c").iterdir())
    assert [path.name for path in shards] == ["0", "1", "2"]


def test_zarr_chunks_divide_the_shard_and_stay_small(tmp_path: Path) -> None:
    rows = 12
    table = pa.table({"x": tensor_column(np.zeros((rows, 300, 1000), np.uint8))})
    ZarrFormat().write(table, tmp_path, Region("0", 0, rows, rows))
    array: Any = zarr.open_group(tmp_path / "data.zarr", mode="r")["x"]
    assert array.chunks == (3, 300, 1000)
    assert array.shards == (rows, 300, 1000)


def test_zarr_writes_zeros_too_so_that_a_missing_file_is_missed(tmp_path: Path) -> None:
    table = pa.table({"x": tensor_column(np.zeros((2, 3), np.int32)), "y": pa.array([0, 0])})
    ZarrFormat().write(table, tmp_path, Region("1", 2, 2, 4))
    for place in ("x/c/1/0", "y/c/1"):
        assert (tmp_path / "data.zarr" / place).stat().st_size > 0


@pytest.mark.parametrize("sizes", [(2, 5), (2, 3, 2), (3, 2, 3)])
def test_zarr_needs_shards_of_one_size(sizes: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ragged-shards"):
        written(tmp_path, ZarrFormat(), *sizes)


def data_files(source: ArtifactSource) -> list[Path]:
    root = folder_of(source)
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name != "manifest.json")


def read_all(source: ArtifactSource) -> pa.Table:
    fresh = ArtifactSource(source.artifact)
    return pa.concat_tables(fresh.tables())


@BY_NAME
def test_a_missing_or_cut_file_is_never_read(fmt: Format, tmp_path: Path) -> None:
    source = written(tmp_path, fmt, 3, 2)
    for path in data_files(source):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(RunError, match="damaged-artifact"):
            read_all(source)
        for cut in (data[:-1], data[: len(data) // 2], b"", data + b"x"):
            path.write_bytes(cut)
            with pytest.raises(RunError, match="damaged-artifact"):
                read_all(source)
        path.write_bytes(data)
    assert read_all(source).num_rows == 5


def test_a_file_that_is_no_part_of_the_artifact_is_not_read(tmp_path: Path) -> None:
    source = written(tmp_path, ParquetFormat(), 3, 2)
    root = folder_of(source)
    (root / "00002.parquet").write_bytes((root / "00001.parquet").read_bytes())
    assert read_all(source).num_rows == 5


def read_unchecked(source: ArtifactSource, fmt: Format) -> pa.Table:
    """The rows as the format reads them, without the digests of the manifest."""
    root = folder_of(source)
    return pa.concat_tables(
        fmt.read(root, shard.name, shard.location["offset"], shard.rows or 0)
        for shard in source.shards
    )


def silent_flips(read: Callable[[], pa.Table], path: Path, places: range) -> list[int]:
    """The places of a file where a flipped bit gives other values and no error."""
    expected, data = read(), path.read_bytes()
    silent = []
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert_same_rows(read(), expected)
        except AssertionError:
            silent.append(place)
        except Exception:  # noqa: BLE001 - any error says that the file is damaged
            pass
    path.write_bytes(data)
    return silent


@BY_NAME
def test_a_flipped_bit_anywhere_is_found(fmt: Format, tmp_path: Path) -> None:
    source = written(tmp_path, fmt, 3)
    for path in data_files(source):
        data = path.read_bytes()
        for place in range(0, len(data), 1 + len(data) // 40):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(RunError, match="damaged-artifact"):
                read_all(source)
        path.write_bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fmt", [ParquetFormat(), ZarrFormat()], ids=lambda fmt: fmt.name)
def test_other_readers_find_a_flipped_bit_in_the_data(fmt: Format, tmp_path: Path) -> None:
    source = written(tmp_path, fmt, 3, 2)
    for path in data_files(source):
        if path.name == "zarr.json":
            continue
        size = path.stat().st_size
        if path.suffix == ".parquet":  # what follows the data is a footer without a checksum
            size -= 8 + int.from_bytes(path.read_bytes()[-8:-4], "little")
        assert size > 40
        assert silent_flips(lambda: read_unchecked(source, fmt), path, range(0, size, 7)) == []


@dataclass(frozen=True)
class Vague(Source):
    """A source that does not know how many samples a shard has."""

    base: Source

    @property
    def classes(self) -> tuple[str, ...]:
        return self.base.classes

    @cached_property
    def shards(self) -> Any:
        return tuple(type(s)(s.name, s.identity) for s in self.base.shards)

    def read(self, shard: Any) -> pa.Table:
        return self.base.read(shard)


def test_zarr_needs_shards_of_known_size(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ragged-shards"):
        local_run(tmp_path).map("step", Vague(keyed(2, 2)), [], to=ZarrFormat())
    copy = local_run(tmp_path).map("step", Vague(keyed(2, 1)), [], to=ParquetFormat())
    assert read_all(copy).num_rows == 3
