"""Data sets as they are published, in miniature."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from samples import encoded, image_table, local_run, pixels
from scipy.io import savemat
from zarr.dtype import VariableLengthBytes

from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import Shard, Source, TableSource
from pipeline.storage.store import Store
from pipeline.storage.webdataset import WebDatasetFormat

IMAGES = [encoded(image) for image in pixels(6)]
LABELS = [0, 1, 2, 0, 1, 2]
NAMES = ("ant", "bee", "cat")


def upload(root: Path, store: Store) -> None:
    """Put every file below a folder into a store under the same name."""
    for path in sorted(root.rglob("*")):
        if path.is_file():
            store.replace(path.relative_to(root).as_posix(), path.read_bytes())


def rows_of(source: Source | None) -> list[dict[str, Any]]:
    assert source
    return pa.concat_tables(source.tables()).to_pylist()


def column(source: Source | None, name: str) -> list[Any]:
    return [row[name] for row in rows_of(source)]


class InMemory(TableSource):
    """Tables of anything, images too."""

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(Shard(name, f"{name} {table}", len(table)) for name, table in self.parts)


# Image folders


def write_images(root: Path, *names: str) -> None:
    """Images by their paths; the six of ``IMAGES`` in turn."""
    for index, name in enumerate(names):
        write(root / name, IMAGES[index % len(IMAGES)])


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def class_folders(root: Path) -> None:
    write_images(root, "b/1.png", "a/sub/2.PNG", "a/1.jpeg", "b/10.png", "b/.hidden.png")
    write(root / "a" / "notes.txt", "not an image")


def flat_images(root: Path) -> None:
    write_images(root, "1.png", "2.png", "[3] #%41?.png")


def images_beside_classes(root: Path) -> None:
    class_folders(root)
    write_images(root, "top.png")


def train_and_val(root: Path) -> None:
    write_images(root, "train/a/1.png", "train/b/2.png", "val/b/3.png", "val/a/4.png")


def imagenet21k(root: Path) -> None:
    write_images(root, "imagenet21k_train/n01/n01_1.JPEG", "imagenet21k_train/n02/n02_1.JPEG")
    write_images(root, "imagenet21k_val/n01/n01_9.JPEG", "imagenet21k_val/n02/n02_9.JPEG")
    write_images(root, "imagenet21k_small_classes/n03/n03_1.JPEG")


def wnid(number: int) -> str:
    """The WordNet id of an ILSVRC number; the ids are not in the order of the numbers."""
    return f"n{(number * 7919) % 2000 + 1_440_000:08d}"


def synsets(leaves: int = 1000, inner: int = 60) -> npt.NDArray[Any]:
    """The struct array of the devkit's ``meta.mat``: leaves first, then the nodes above them."""
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")
    names = (*names, "wordnet_height", "num_train_images")
    rows = np.empty((leaves + inner, 1), [(name, object) for name in names])
    for number in range(1, leaves + inner + 1):
        leaf = number <= leaves
        children = [] if leaf else [number - leaves]
        facts = (float(number), wnid(number), f"word {number}", "a gloss", float(len(children)))
        rows[number - 1, 0] = (*facts, children, float(not leaf), 1300.0 if leaf else 0.0)
    return rows


def ilsvrc_images(root: Path) -> None:
    base = "ILSVRC/Data/CLS-LOC"
    write_images(root, *(f"{base}/train/{wnid(n)}/{wnid(n)}_{n}.JPEG" for n in (1, 500, 1000)))
    write_images(root, *(f"{base}/val/ILSVRC2012_val_{n:08d}.JPEG" for n in (1, 2, 3)))
    write_images(root, f"{base}/test/ILSVRC2012_test_00000001.JPEG")
    write(root / "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml", "<annotation/>")


def ilsvrc_devkit(root: Path) -> None:
    ilsvrc_images(root)
    data = root / "ILSVRC2012_devkit_t12/data"
    write(data / "ILSVRC2012_validation_ground_truth.txt", "1000\n1\n500\n")
    savemat(data / "meta.mat", {"synsets": synsets()}, do_compression=True)
    write(root / "ILSVRC2012_img_val.tar", "the archive it came in")


def ilsvrc_kaggle(root: Path) -> None:
    ilsvrc_images(root)
    lines = ["ImageId,PredictionString"]
    for image, number in ((3, 500), (1, 1000), (2, 1)):
        boxes = f"{wnid(number)} 85 1 499 272 {wnid(number)} 1 2 3 4 "
        lines.append(f"ILSVRC2012_val_{image:08d},{boxes}")
    write(root / "LOC_val_solution.csv", "\n".join(lines))
    write(root / "LOC_synset_mapping.txt", f"{wnid(1)} tench\n")


def tiny_imagenet(root: Path) -> None:
    base = root / "tiny-imagenet-200"
    for name in ("n01", "n02"):
        write_images(
            base, f"train/{name}/images/{name}_0.JPEG", f"train/{name}/images/{name}_1.JPEG"
        )
        write(base / f"train/{name}/{name}_boxes.txt", f"{name}_0.JPEG\t0\t0\t62\t62\n")
    write_images(base, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "val/images/val_2.JPEG")
    rows = [("val_1.JPEG", "n02"), ("val_0.JPEG", "n02"), ("val_2.JPEG", "n01")]
    text = "".join(f"{image}\t{name}\t0\t32\t44\t62\n" for image, name in rows)
    write(base / "val/val_annotations.txt", text)
    write_images(base, "test/images/test_0.JPEG")
    write(base / "words.txt", "n01\ta thing\n")


# WebDataset


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w", links: Sequence[str] = ()
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)


def samples(rows: Sequence[int], start: str = "d/") -> list[tuple[str, bytes]]:
    """An image and a ``cls`` of each row."""
    members = []
    for row in rows:
        members += [
            (f"{start}{row}.png", IMAGES[row]),
            (f"{start}{row}.cls", b"%d\n" % LABELS[row]),
        ]
    return members


def tars(root: Path) -> None:
    write_tar(root / "0.tar", samples(range(3)))
    write_tar(root / "1.tar", samples(range(3, 6)))
    write(root / "classes.txt", "\n".join(NAMES))


def gzipped_tars(root: Path) -> None:
    write_tar(root / "a/0.tar.gz", samples(range(3), "./a.b/x/"), "w:gz")
    write_tar(root / "b/0.tgz", samples(range(3, 6), "deep/er/"), "w:gz")


def odd_tar(root: Path) -> None:
    """Members of a sample lie apart; keys have dots in their folders; strays and links."""
    labels = [(f"v1.0/{row}.JSON", json.dumps({"label": LABELS[row]}).encode()) for row in range(6)]
    images = [(f"v1.0/{row}.seg.png", b"no") for row in range(6)]
    images += [(f"v1.0/{row}.webp", IMAGES[row]) for row in range(6)]
    strays = [("README", b"read me"), ("v1.0/._0.webp", b"\0\5\26\7"), (".DS_Store", b"x")]
    write_tar(root / "0.tar", [*labels, *strays, *images], links=["v1.0/0.txt", "LICENSE"])


def unlabelled_tar(root: Path) -> None:
    write_tar(root / "0.tar", [(f"{row}.jpg", IMAGES[row]) for row in range(3)])


def split_tars(root: Path) -> None:
    write_tar(root / "imagenet1k-train-0000.tar", samples(range(3)))
    write_tar(root / "imagenet1k-train-0001.tar", samples(range(3, 5)))
    write_tar(root / "imagenet1k-validation-00.tar", samples(range(5, 6)))


# Parquet


def write_parquet(
    path: Path, columns: dict[str, Any], names: Sequence[str] = NAMES, **options: Any
) -> None:
    """A file with the class names of its column of labels in what Hugging Face writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {
        name: {"names": list(names), "_type": "ClassLabel"}
        for name in ("label", "fine_label")
        if name in columns and names
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, **options)


def structs(rows: Sequence[int], paths: bool = True) -> list[dict[str, Any]]:
    return [{"bytes": IMAGES[row], "path": f"{row}.png" if paths else None} for row in rows]


def struct_parquet(root: Path) -> None:
    write_parquet(
        root / "x.parquet", {"image": structs(range(6)), "label": LABELS}, row_group_size=4
    )


def binary_parquet(root: Path) -> None:
    columns = {"label": LABELS, "image": IMAGES, "width": [8] * 6}
    write_parquet(root / "x.parquet", columns, row_group_size=4)


def unlabelled_parquet(root: Path) -> None:
    write_parquet(root / "x.parquet", {"image": structs(range(6), paths=False)})


def hugging_face_cifar10(root: Path) -> None:
    for split, rows in (("train", [0, 1, 2, 3]), ("test", [4, 5])):
        columns = {"img": structs(rows, paths=False), "label": [LABELS[row] for row in rows]}
        write_parquet(root / f"plain_text/{split}-00000-of-00001.parquet", columns)


def hugging_face_cifar100(root: Path) -> None:
    for split, rows in (("train", [0, 1, 2, 3]), ("test", [4, 5])):
        labels = [LABELS[row] for row in rows]
        coarse = [7] * len(rows)
        image = structs(rows, paths=False)
        columns = {"image": image, "fine_label": labels, "coarse_label": coarse}
        write_parquet(root / f"cifar100/{split}-00000-of-00001.parquet", columns)


def hugging_face_imagenet(root: Path) -> None:
    """Its test split has the label -1 throughout."""
    for split, rows in (("train", [0, 1, 2]), ("validation", [3, 4]), ("test", [5])):
        labels = [-1 if split == "test" else LABELS[row] for row in rows]
        name = f"data/{split}-00000-of-00001.parquet"
        write_parquet(root / name, {"image": structs(rows), "label": labels})


# Arrays


def npz(root: Path, names: Sequence[str] = NAMES) -> None:
    arrays = {"x_train": pixels(5), "y_train": np.array(LABELS[:5], np.uint8)}
    arrays |= {"x_test": pixels(3, seed=1), "y_test": np.array(LABELS[:3])}
    root.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(root / "x.npz", **arrays, class_names=list(names))


def gray_npz(root: Path) -> None:
    images = pixels(5, channels=1)[..., 0]
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / "x.npz", x_train=images, y_train=np.array(LABELS[:5], np.int32))


def idx_bytes(array: npt.NDArray[np.uint8]) -> bytes:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.tobytes()


def mnist(root: Path, compress: bool = False, dash: str = "-") -> None:
    for side, rows, seed in (("train", 5, 0), ("t10k", 3, 1)):
        images = pixels(rows, size=28, channels=1, seed=seed)[..., 0]
        labels = np.array(LABELS[:rows], np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx_bytes(array)
            name = f"{side}-{kind.replace('-', dash, 1)}-ubyte"
            if compress:
                write(root / f"{name}.gz", gzip.compress(data))
            else:
                write(root / name, data)


def gzipped_mnist(root: Path) -> None:
    mnist(root / "MNIST/raw", compress=True)


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def planes(rows: int, seed: int) -> npt.NDArray[np.uint8]:
    """Images N x 3072 as CIFAR stores them."""
    images = pixels(rows, size=32, seed=seed)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(rows, -1)


def cifar10_binary(root: Path) -> None:
    base = root / "cifar-10-batches-bin"
    write(base / "batches.meta.txt", "\n".join(CIFAR10) + "\n\n")
    write(base / "readme.html", "<html>")
    for seed, name in enumerate((*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")):
        labels = np.array([[seed], [9 - seed]], np.uint8)
        write(base / f"{name}.bin", np.hstack([labels, planes(2, seed)]).tobytes())


def cifar10_python(root: Path) -> None:
    base = root / "cifar-10-batches-py"
    write(base / "batches.meta", pickle.dumps({"label_names": list(CIFAR10)}, 2))
    write(base / "readme.html", "<html>")
    for seed, name in enumerate((*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")):
        batch = {"data": planes(2, seed), "labels": [seed, 9 - seed], "batch_label": name}
        write(base / name, pickle.dumps(batch, 2))


CIFAR100 = tuple(f"class_{label:02d}" for label in range(100))


def cifar100_binary(root: Path) -> None:
    base = root / "cifar-100-binary"
    write(base / "fine_label_names.txt", "\n".join(CIFAR100))
    write(base / "coarse_label_names.txt", "\n".join(f"coarse_{n}" for n in range(20)))
    for seed, name in enumerate(("train", "test")):
        labels = np.array([[3, 99 - seed], [4, seed]], np.uint8)
        write(base / f"{name}.bin", np.hstack([labels, planes(2, seed)]).tobytes())


def cifar100_python(root: Path) -> None:
    base = root / "cifar-100-python"
    names = {"fine_label_names": list(CIFAR100), "coarse_label_names": ["coarse"] * 20}
    write(base / "meta", pickle.dumps(names, 2))
    for seed, name in enumerate(("train", "test")):
        batch = {"data": planes(2, seed), "fine_labels": [99 - seed, seed], "coarse_labels": [3, 4]}
        write(base / name, pickle.dumps(batch, 2))


def write_zarr(root: Path, image: npt.NDArray[Any], **options: Any) -> Any:
    """A group with ``image``, ``label`` and ``key``."""
    group: Any = zarr.open_group(root, mode="w", zarr_format=3)
    array = group.create_array("image", data=image, **options)
    rows = len(image)
    group.create_array("label", data=np.array((LABELS * 2)[:rows], np.uint8), chunks=(2,))
    group.create_array("key", shape=(rows,), dtype="str", chunks=(rows,))[:] = np.array(
        [f"k/{row}" for row in range(rows)], object
    )
    return array


def sharded_zarr(root: Path) -> None:
    write_zarr(root, pixels(5), chunks=(1, 8, 8, 3), shards=(2, 8, 8, 3))


def chunked_zarr(root: Path) -> None:
    write_zarr(root, pixels(5, channels=1)[..., 0], chunks=(2, 8, 4))


def bytes_zarr(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        group: Any = zarr.open_group(root, mode="w", zarr_format=3)
        array = group.create_array("image", shape=(6,), dtype=VariableLengthBytes(), chunks=(4,))
        array[:] = np.array(IMAGES, object)


# URLs and what this package writes


def url_list(root: Path) -> None:
    write_images(root, "images/a 1.png", "images/b#2%.png", "images/c.png")
    lines = ["# the images", "images/a 1.png\tbee", "images/b#2%.png\tant", "", "images/c.png\tbee"]
    write(root / "list.txt", "\ufeff" + "\r\n".join(lines))


def plain_url_list(root: Path) -> None:
    write_images(root, "1.png", "2.png")
    write(root / "list.txt", "1.png\n2.png\n")


def url_table(root: Path) -> None:
    write_images(root, "1.png", "2.png", "3.png")
    write_parquet(
        root / "list.parquet", {"url": ["1.png", "2.png", "3.png"], "label": [0, 2, 0]}, ()
    )


def run_output(root: Path) -> None:
    """A finished run with both splits, of which one has an empty shard."""
    run = local_run(root)
    products = {
        "train": run.map("train", pictures(3, 0, 2), [], to=ParquetFormat()).artifact,
        "test": run.map("test", pictures(2), [], to=ParquetFormat()).artifact,
    }
    run.publish("dataset", products, {})


def step_output(root: Path) -> None:
    """What one step wrote."""
    local_run(root).map("step", pictures(2, 3), [], to=WebDatasetFormat())
    next(root.glob("step-*")).rename(root / "step")


def pictures(*sizes: int) -> TableSource:
    """Shards of so many tensors each."""
    table, parts, start = image_table(sum(sizes)), [], 0
    for index, size in enumerate(sizes):
        parts.append((f"{index:05d}", table.slice(start, size)))
        start += size
    return TableSource(tuple(parts), ("a", "b"))


@dataclass(frozen=True)
class Layout:
    """How a data set is written below a folder, and what is to be found there.

    Attributes:
        write: writes it.
        rows: number of samples by split.
        place: path of the data set in the folder.
        may_lack: columns of which some samples have no value.
        files: of its training split, each with shards of its own.
    """

    write: Callable[[Path], None]
    rows: Mapping[str, int]
    place: str = ""
    may_lack: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def _layout(write: Callable[[Path], None], train: int, test: int = 0, **options: Any) -> Layout:
    return Layout(write, {"train": train} | ({"test": test} if test else {}), **options)


LAYOUTS = {
    layout.write.__name__: layout
    for layout in (
        _layout(class_folders, 4),
        _layout(flat_images, 3),
        _layout(images_beside_classes, 5, may_lack=("label",)),
        _layout(train_and_val, 2, 2),
        _layout(imagenet21k, 2, 2),
        _layout(ilsvrc_devkit, 3, 3),
        _layout(ilsvrc_kaggle, 3, 3, place="ILSVRC"),
        _layout(tiny_imagenet, 4, 3, place="tiny-imagenet-200"),
        _layout(tars, 6, files=("0.tar", "1.tar")),
        _layout(gzipped_tars, 6, files=("a/0.tar.gz", "b/0.tgz")),
        _layout(odd_tar, 6),
        _layout(unlabelled_tar, 3, place="0.tar"),
        _layout(split_tars, 5, 1, files=tuple(f"imagenet1k-train-000{n}.tar" for n in (0, 1))),
        _layout(struct_parquet, 6, files=("x.parquet",)),
        _layout(binary_parquet, 6),
        _layout(unlabelled_parquet, 6, place="x.parquet"),
        _layout(hugging_face_cifar10, 4, 2),
        _layout(hugging_face_cifar100, 4, 2),
        _layout(hugging_face_imagenet, 3, 2),
        _layout(npz, 5, 3, place="x.npz"),
        _layout(gray_npz, 5, place="x.npz"),
        _layout(mnist, 5, 3),
        _layout(gzipped_mnist, 5, 3),
        _layout(cifar10_binary, 10, 2),
        _layout(cifar10_python, 10, 2, place="cifar-10-batches-py"),
        _layout(cifar100_binary, 2, 2),
        _layout(cifar100_python, 2, 2),
        _layout(sharded_zarr, 5),
        _layout(chunked_zarr, 5),
        _layout(bytes_zarr, 6),
        _layout(url_list, 3, place="list.txt"),
        _layout(plain_url_list, 2, place="list.txt"),
        _layout(url_table, 3, place="list.parquet"),
        _layout(run_output, 5, 2),
        _layout(step_output, 5, place="step"),
    )
}
