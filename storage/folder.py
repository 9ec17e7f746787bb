"""Image folders: one sub-folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from pipeline.digest import digest
from pipeline.storage.images import EXTENSIONS
from pipeline.storage.listing import file_identity, files_below
from pipeline.storage.source import Shard, Source
from pipeline.storage.webdataset import ROW

SHARD_ROWS = 1024


@dataclass(frozen=True)
class FolderSource(Source):
    """``root/<class>/**/<image>``, cut into shards of 1,024 files of the sorted listing.

    The key is the path relative to ``root``.

    Args:
        root: the folder.
        class_names: names by label; the sub-folders' names in sorted order where not given.
    """

    root: Path
    class_names: tuple[str, ...] = ()

    @cached_property
    def _files(self) -> list[Path]:
        return [p for p in files_below(self.root, EXTENSIONS) if p.parent != self.root]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return self.class_names or self.folders

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """The sub-folders that hold images, sorted."""
        return tuple(sorted({path.relative_to(self.root).parts[0] for path in self._files}))

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        files = self._files
        return tuple(
            self._shard(start // SHARD_ROWS, files[start : start + SHARD_ROWS])
            for start in range(0, len(files), SHARD_ROWS)
        )

    def _shard(self, index: int, files: Sequence[Path]) -> Shard:
        names = [path.relative_to(self.root).as_posix() for path in files]
        identity = digest(
            [[name, *file_identity(p)[1:]] for name, p in zip(names, files, strict=True)]
        )
        return Shard(f"{index:05d}", identity, len(files), {"files": names})

    def read(self, shard: Shard) -> pa.Table:
        label = {name: index for index, name in enumerate(self.classes)}
        rows = [
            {"key": n, "image": (self.root / n).read_bytes(), "label": label[n.split("/")[0]]}
            for n in shard.location["files"]
        ]
        return pa.Table.from_pylist(rows, schema=ROW)
