"""A store that fails, or dies, where a test tells it to; and a small run to try it on."""

from __future__ import annotations

import errno
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa
from samples import attempt, encoded, pixels

from pipeline.orchestration.executor import Executor, Record, Resources, Unit, Work
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.run import Run, open_run
from pipeline.stage import ShardContext
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.atomic import unseal
from pipeline.storage.folder import FolderFormat
from pipeline.storage.formats import Format, Region
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import Shard, Source, TableSource
from pipeline.storage.store import FileInfo, Store
from pipeline.storage.webdataset import WebDatasetFormat

KILLS = ("kill before", "kill after")
ERRORS = ("no space", "error after")
POINTS = (
    "scratch",
    "write",
    "create",
    "ledger",
    "step manifest",
    "run manifest",
    "replace",
    "delete",
    "log",
)


class Killed(BaseException):
    """The process is gone: nothing that it would still have done takes place."""


@dataclass(eq=False)
class Faults:
    """What happens at which call.

    Attributes:
        at: a kind of operation and its number from 0, counted for each kind; or the kind ``any``.
        effect: one of ``KILLS`` and ``ERRORS``, or a function that is called before the operation.
    """

    at: tuple[str, int] | None = None
    effect: str | Callable[[], object] = "kill before"
    fired: bool = False
    dead: bool = False
    calls: list[str] = field(default_factory=list)
    left: list[Any] = field(default_factory=list)
    """What a dead process never cleaned up."""

    @contextmanager
    def around(self, kind: str) -> Iterator[None]:
        """One operation."""
        if self.dead:
            raise Killed
        here = {(kind, self.calls.count(kind)), ("any", len(self.calls))}
        self.calls.append(kind)
        now = not self.fired and self.at in here
        self.fired |= now
        if now and callable(self.effect):
            self.effect()
        elif now and self.effect == "no space":
            raise OSError(errno.ENOSPC, "No space left on device", kind)
        elif now and self.effect == "kill before":
            self.die()
        try:
            yield
        finally:  # a name that is taken already is the end of an operation too
            if now and self.effect == "error after":
                raise OSError(errno.EIO, "Input/output error", kind)
            if now and self.effect == "kill after":
                self.die()

    def die(self) -> None:
        self.dead = True
        raise Killed


def each(calls: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Every operation by its kind and its number among those of its kind.

    Not by its number among all: a shard is published while the next one is computed.
    """
    for kind, count in Counter(calls).items():
        for number in range(count):
            yield kind, number


def untimed(data: bytes) -> bytes | dict[str, Any]:
    """What a record says, but for when its shard was finished and how long that took."""
    try:
        return {k: v for k, v in unseal(data).items() if k not in {"at", "seconds", "sha256"}}
    except ValueError:
        return data


@dataclass(frozen=True)
class FaultyStore(Store):
    """Forwards to a real store, with faults. It holds no lock: another process may hold it too."""

    inner: Store
    faults: Faults
    place: str = ""

    @property
    def url(self) -> str:  # type: ignore[override]
        return self.inner.url

    def _kind(self, name: str) -> str:
        parts = f"{self.place}{name}".split("/")
        if parts[0] == ".run":
            if parts[-1].endswith(".jsonl"):
                return "log"
            return "ledger" if "ledger" in parts else "replace"
        if parts[-1] == "manifest.json":
            return "run manifest" if len(parts) == 1 else "step manifest"
        return "replace"

    def files(self) -> list[FileInfo]:
        return self.inner.files()

    def info(self, name: str) -> FileInfo | None:
        return self.inner.info(name)

    def open(self, name: str) -> BinaryIO:
        return self.inner.open(name)

    def sizes(self) -> Iterator[tuple[str, int]]:
        return self.inner.sizes()

    def create(self, name: str, file: Path) -> None:
        with self.faults.around("create"):
            self.inner.create(name, file)

    def link(self, name: str, source: Store) -> None:
        with self.faults.around("create"):
            self.inner.link(name, source.inner if isinstance(source, FaultyStore) else source)

    def replace(self, name: str, data: bytes, *, durable: bool = True) -> None:
        with self.faults.around(self._kind(name)):
            before = self.inner.read(name) if self.inner.info(name) else data
            # A run that is repeated says the same of what it made.
            free = name.endswith((".pt", ".jsonl", "plan.json", "steps.json"))
            assert free or untimed(before) == untimed(data), name
            self.inner.replace(name, data, durable=durable)

    def delete(self, name: str) -> None:
        with self.faults.around("delete"):
            self.inner.delete(name)

    def below(self, name: str) -> FaultyStore:
        return FaultyStore(self.inner.below(name), self.faults, f"{self.place}{name}/")

    @property
    def parent(self) -> FaultyStore:
        return FaultyStore(self.inner.parent, self.faults)

    def beside(self, name: str) -> FaultyStore:
        return FaultyStore(self.inner.beside(name), self.faults, f"{name}/")

    def writing_in(self, name: str) -> FaultyStore:
        return FaultyStore(self.inner.writing_in(name), self.faults, self.place)

    def remove(self) -> None:
        with self.faults.around("delete"):
            for info in self.inner.files()[1:]:
                self.inner.delete(info.name)
        with self.faults.around("delete"):
            self.inner.remove()

    def clear(self) -> None:
        self.inner.clear()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        holder = self.inner.scratch()
        with self.faults.around("scratch"):
            folder = holder.__enter__()
        try:
            yield folder
        except Killed:
            self.faults.left.append(holder)  # until the test ends nobody cleans up
            raise
        except BaseException as error:
            holder.__exit__(type(error), error, error.__traceback__)
            raise
        holder.__exit__(None, None, None)

    @contextmanager
    def fetched(self, names: Sequence[str]) -> Iterator[Path]:
        with self.inner.fetched(names) as folder:
            yield folder


def torn(fmt: Format, faults: Faults) -> Format:
    """The same format, whose files are cut in half where ``faults`` say so."""

    class Torn(type(fmt)):  # type: ignore[misc]
        def write(self, table: pa.Table, directory: Path, region: Region) -> None:
            try:
                with faults.around("write"):
                    super().write(table, directory, region)
            except (OSError, Killed):
                for path in [path for path in directory.rglob("*") if path.is_file()]:
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                raise

    return Torn(**vars(fmt))


@dataclass(frozen=True)
class Sort:
    """Keeps, filters or sets aside a sample by its number."""

    fates: str

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        keys = table["key"].to_pylist()
        fates = [self.fates[int(key.removeprefix("k")) % len(self.fates)] for key in keys]
        for key, fate in zip(keys, fates, strict=True):
            if fate == "f":
                context.filter("dull")
            if fate == "b":
                context.quarantine(key, "bad", "It is bad.")
        context.metrics["kept"] = fates.count("k")
        return table.filter(pa.array([fate == "k" for fate in fates], pa.bool_()))


class Samples(TableSource):
    """A table of images in memory."""

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(Shard(name, name, table.num_rows) for name, table in self.parts)


def samples(*sizes: int) -> Samples:
    """Shards of small images."""
    parts, first = [], 0
    for index, size in enumerate(sizes):
        rows = range(first, first + size)
        images = [encoded(image) for image in pixels(size, size=4, seed=index)]
        table = {
            "key": pa.array([f"k{row}" for row in rows], pa.string()),
            "image": pa.array(images, pa.binary()),
            "label": pa.array([row % 2 for row in rows], pa.int64()),
        }
        parts.append((f"{index:05d}", pa.table(table)))
        first += size
    return Samples(tuple(parts), ("even", "odd"))


SOURCE = samples(4, 1, 3)
FORMATS: dict[str, Format] = {
    "parquet": ParquetFormat(),
    "webdataset": WebDatasetFormat(100),
    "folder": FolderFormat(("even", "odd")),
}


@contextmanager
def unheld(*_: object) -> Iterator[SimpleNamespace]:
    """In place of the hold on an output: what is published must be right without it."""
    yield SimpleNamespace(run=uuid.uuid4().hex[:12], check=lambda: None)


@dataclass
class Noting(LocalExecutor):
    """An executor in this process that keeps the work it was given."""

    work: list[tuple[Work, Unit]] = field(default_factory=list)

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        for unit in units:
            self.work.append((work, unit))
            yield attempt(work, unit)


def whole_run(
    store: Store, fmt: Format, executor: Executor | None = None, source: Source = SOURCE
) -> Run:
    """Two map steps over a few shards, and their publication."""
    faults = store.faults if isinstance(store, FaultyStore) else Faults()
    with open_run(store, executor or LocalExecutor(), max_bad=1.0) as run:
        first = run.map("first", source, [Sort("kkbkf")], to=torn(fmt, faults))
        second = run.map("second", first, [Sort("kkkb")], to=torn(ParquetFormat(), faults))
        products = {"first": first.artifact, "second": second.artifact}
        if not run.published("dataset", products):
            run.publish("dataset", products, {"about": 1}, b"<html>")
        return run


def output(store: Store) -> dict[str, bytes]:
    """Every file but the run's own memory."""
    names = [info.name for info in store.files() if not info.name.startswith(".run/")]
    return dict(zip(names, store.read_many(names), strict=True))


def rows(store: Store, role: str) -> list[dict[str, Any]]:
    """The samples of a product, as a reader sees them."""
    source = ArtifactSource(Artifact.open(store).product(role))
    return [
        row
        for table in source.tables()
        for row in table.select(["key", "label", "image"]).to_pylist()
    ]
