"""What an output folder holds that nobody needs any more."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.orchestration.memory import PLAN, WORK
from pipeline.orchestration.snapshots import REPORT, open_snapshot, snapshots
from pipeline.orchestration.verify import verify
from pipeline.storage.artifact import SNAPSHOTS, Artifact
from pipeline.storage.store import FileInfo, Store

SET_ASIDE = {"unfinished": "left by processes that died", "damaged": "damaged and set aside"}
"""Folders of a run's memory whose files are needed by nobody."""


@dataclass(frozen=True)
class Garbage:
    """Files of one kind that can go.

    Attributes:
        what: why they can.
        files: the files, by path in the output folder.
    """

    what: str
    files: tuple[FileInfo, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def find_garbage(
    store: Store, *, intermediate: bool = False, expired: bool = False
) -> list[Garbage]:
    """The files in the output folder of a finished run that are no part of its output.

    These are: what processes that died were writing, steps of other configurations, files that no
    manifest lists, and damaged files that were set aside.

    Args:
        store: what was given with ``--out``.
        intermediate: also the steps that led to the products and are no products themselves. The
            same command would make them again.
        expired: also earlier snapshots, with the steps that only they need.

    Raises:
        UsageError: no run was finished there. Then nothing is garbage: the next start needs it.
    """
    if not Artifact.exists(store):
        raise UsageError(
            "No run was finished in this folder, and what is there is needed to go on.",
            hint="Start the same command again to finish it, or delete the folder if you do not "
            "want it.",
            code="unfinished-run",
            where=str(store),
        )
    runs = [open_snapshot(store, number) for number in [None, *snapshots(store)]]
    kept = runs[:1] if expired else runs
    steps = {step for run in kept for step in run.manifest["steps"]}
    old = {step for run in runs for step in run.manifest["steps"]} - steps
    products = {entry.path.partition("/")[0] for run in kept for entry in run.own} - {REPORT}
    unlisted = set(verify(store).unlisted)
    files = store.files()
    # A folder that no run has made is the user's own, whatever it holds.
    plans = [f.name.split("/") for f in files if f.name.startswith(f"{WORK}/")]
    made = {parts[1] for parts in plans if parts[2:] == [PLAN]}
    groups: dict[str, list[FileInfo]] = {}
    for info in files:
        folder, _, rest = info.name.partition("/")
        if folder == WORK:
            what = SET_ASIDE.get(rest.partition("/")[0].partition(".")[0])
            folder = rest.partition("/")[0] if "/" in rest else ""
        else:
            what = "listed in no manifest" if info.name in unlisted and folder in steps else None
        if folder in old or (expired and folder == SNAPSHOTS and rest):
            what = "earlier snapshots"
        elif folder in made | steps and folder not in SET_ASIDE:
            if folder not in steps:
                what = "steps of other configurations"
            elif intermediate and folder not in products:
                what = "intermediate steps"
        if what:
            groups.setdefault(what, []).append(info)
    return [Garbage(what, tuple(files)) for what, files in sorted(groups.items())]
