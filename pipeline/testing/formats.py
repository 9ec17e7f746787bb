"""What every format promises."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from pipeline.storage.formats import Format, Region
from pipeline.testing.pickled import pickled
from pipeline.testing.tables import assert_same_rows
from pipeline.testing.trees import tree_digest


def check_format(fmt: Format, table: pa.Table) -> None:
    """Check the contract of :class:`~pipeline.storage.formats.Format` on a table cut in two shards.

    Args:
        fmt: the format.
        table: at least three rows of what the format is meant to hold.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    options = json.loads(json.dumps(asdict(fmt)))
    assert type(fmt)(**options) == fmt, "the options that a manifest records do not rebuild it"
    rows = (table.num_rows + 1) // 2
    assert 0 < rows < table.num_rows, "the table is too short to be cut in two"
    with tempfile.TemporaryDirectory() as folder:
        published = Path(folder) / "published"
        regions = [
            Region(f"{start // rows:05d}", start, rows, table.num_rows)
            for start in range(0, table.num_rows, rows)
        ]
        for region in regions:
            part = table.slice(region.offset, rows)
            first, second = (Path(folder) / f"{region.name}-{attempt}" for attempt in "ab")
            first.mkdir()
            second.mkdir()
            fmt.write(part, first, region)
            pickled(fmt).write(part, second, region)
            assert tree_digest(first), "nothing was written"
            assert tree_digest(first) == tree_digest(second), "writing twice gave other bytes"
            _publish(first, published)
        for region in regions:
            part = table.slice(region.offset, rows)
            found = pickled(fmt).read(published, region.name, region.offset, part.num_rows)
            assert_same_rows(found, part)


def _publish(attempt: Path, published: Path) -> None:
    for file in sorted(path for path in attempt.rglob("*") if path.is_file()):
        final = published / file.relative_to(attempt)
        data = file.read_bytes()
        assert not final.exists() or final.read_bytes() == data, (
            f"two shards write '{file.relative_to(attempt)}' with different bytes"
        )
        final.parent.mkdir(parents=True, exist_ok=True)
        final.write_bytes(data)
