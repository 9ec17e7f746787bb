"""Earlier manifests of an output, each with its report: what was published before it grew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.digest import canonical
from pipeline.errors import PipelineError, UsageError
from pipeline.storage.artifact import MANIFEST, SNAPSHOTS, Artifact
from pipeline.storage.store import Store

REPORT = "report.html"


def snapshots(out: Store) -> list[int]:
    """The numbers of the earlier snapshots of an output, oldest first."""
    names = [info.name.split("/") for info in out.below(SNAPSHOTS).files()]
    found = {int(p[0]) for p in names if len(p) == 2 and p[0].isdecimal() and p[1] == MANIFEST}
    return sorted(found)


def place_of(out: Store, number: int) -> Store:
    """Where the manifest and the report of a snapshot lie."""
    return out.below(f"{SNAPSHOTS}/{number:06d}")


def open_snapshot(out: Store, number: int | None = None) -> Artifact:
    """The output as it was published, or as it was in an earlier snapshot.

    Raises:
        UsageError: there is no such snapshot.
    """
    if number is None:
        return Artifact.open(out)
    known = snapshots(out)
    if number not in known:
        raise UsageError(
            f"There is no snapshot {number} of this output.",
            hint=f"There are {', '.join(map(str, known))}." if known else "It has no earlier ones.",
            code="no-snapshot",
            where=str(out),
        )
    return Artifact.open(place_of(out, number))


def keep(out: Store, new: Mapping[str, Any]) -> None:
    """Keep what is published as a snapshot, before the manifest ``new`` takes its place."""
    try:
        present = Artifact.open(out).manifest
    except PipelineError:
        return  # nothing was published yet, or it is damaged
    if all(present.get(name) == value for name, value in canonical(new).items()):
        return
    data = out.read(MANIFEST)
    known = snapshots(out)
    if known and place_of(out, known[-1]).read(MANIFEST) == data:
        return  # a run died between this and publishing
    place = place_of(out, known[-1] + 1 if known else 1)
    if out.info(REPORT) is not None:
        place.replace(REPORT, out.read(REPORT))
    place.replace(MANIFEST, data)
