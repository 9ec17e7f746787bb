"""Is an output what its manifests say it is?"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pipeline.errors import PipelineError, UsageError
from pipeline.orchestration.ledger import Ledger
from pipeline.orchestration.memory import PLAN, WORK
from pipeline.orchestration.snapshots import REPORT, open_snapshot, place_of, snapshots
from pipeline.storage.artifact import MANIFEST, Artifact
from pipeline.storage.atomic import FileEntry, unseal
from pipeline.storage.records import to_records
from pipeline.storage.store import FileInfo, Store

DAMAGED = f"{WORK}/damaged/"
"""Where damaged files are set aside."""


@dataclass
class Findings:
    """What was looked at and what was found.

    Attributes:
        files: files that were looked at: whether they are there, with their size.
        read: files that were read through and compared with their SHA-256.
        bytes: bytes of the files that were read.
        damaged: what is wrong with each damaged file, by path.
        unlisted: files that no manifest lists; they are never read as data.
        unfinished: files of steps that are not finished, of no shard that is.
    """

    files: int = 0
    read: int = 0
    bytes: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**vars(self), "whole": not self.damaged}


def verify(store: Store, share: float = 0.0) -> Findings:
    """Check the output in ``store``: of a whole run, or of one step.

    Every listed file must be there with its size and every manifest with its own digest. A run's
    own memory (ledger, checkpoints) is checked with the files that are read.

    Args:
        store: what was given with ``--out``, or one folder in it.
        share: of the files, chosen at random, that are read through and compared with their
            SHA-256; 1 reads all.

    Raises:
        UsageError: nothing there was ever finished.
    """
    files = {info.name: info for info in store.files()}
    outputs = {name: info for name, info in files.items() if not name.startswith(f"{WORK}/")}
    roots = [name.removesuffix(MANIFEST) for name in outputs if is_manifest(name)]
    memory = [
        name for name in files if name.startswith(f"{WORK}/") and not name.startswith(DAMAGED)
    ]
    if not roots and not any("/ledger/" in name for name in memory):
        raise UsageError(
            "There is no output of this pipeline here.",
            hint="Give the folder that was given with --out.",
            code="no-manifest",
            where=str(store),
        )
    findings = Findings()
    listed: set[str] = set()
    for root in roots:
        listed |= _check_artifact(store, root, outputs, share, findings)
    for number in snapshots(store):
        listed |= _check_snapshot(store, number, outputs, share, findings)
    steps = {f"{name.split('/')[1]}/" for name in memory if "/ledger/" in name}
    for root in sorted(steps - set(roots)):
        entries = _from_ledger(store, root)
        listed |= _check_files(store, root, entries.values(), outputs, share, findings)
        findings.unfinished += [n for n in outputs if n.startswith(root) and n not in listed]
    if share:
        for name in memory:
            _check_memory(store, name, findings)
    known = listed | {f"{root}{MANIFEST}" for root in roots} | set(findings.damaged)
    known |= set(findings.unfinished)
    findings.unlisted = [
        name
        for name in outputs
        if name not in known and ("" in roots or f"{name.partition('/')[0]}/" in roots)
    ]
    return findings


def is_manifest(name: str) -> bool:
    """Whether a path is that of the manifest of a run or of one of its steps."""
    return name == MANIFEST or (name.endswith(f"/{MANIFEST}") and name.count("/") == 1)


def _check_artifact(
    store: Store, root: str, outputs: Mapping[str, FileInfo], share: float, findings: Findings
) -> set[str]:
    """Check one manifest and what it lists; the paths that it lists."""
    findings.files += 1
    place = _place(store, root)
    listed: set[str] = set()
    try:
        artifact = Artifact.open(place)
        listed = _check_files(store, root, artifact.own, outputs, share, findings)
        entries = artifact.files
    except PipelineError as error:
        if not listed & findings.damaged.keys():  # else it is the index that is damaged
            findings.damaged[f"{root}{MANIFEST}"] = error.message
        if not root:
            return listed
        # The ledger still knows the files of finished shards; nobody knows any others.
        entries = _from_ledger(store, root)
        known = {f"{root}{MANIFEST}", *listed, *(f"{root}{name}" for name in entries)}
        unknown = [name for name in outputs if name.startswith(root) and name not in known]
        findings.damaged |= dict.fromkeys(unknown, "Nothing vouches for it.")
    others = [entry for name, entry in entries.items() if f"{root}{name}" not in listed]
    return listed | _check_files(store, root, others, outputs, share, findings)


def _check_snapshot(
    store: Store,
    number: int,
    outputs: Mapping[str, FileInfo],
    share: float,
    findings: Findings,
) -> set[str]:
    """Check an earlier manifest, its report, and that the steps it names are as they were.

    A step that is damaged is told of as such. One that is whole and not what it was, or gone, was
    made anew from another source: the snapshot is lost.
    """
    findings.files += 1
    place = place_of(store, number)
    folder = place.url.removeprefix(f"{store.url}/")
    path = f"{folder}/{MANIFEST}"
    try:
        entries = open_snapshot(store, number).own
    except PipelineError as error:
        findings.damaged[path] = error.message
        return {path}
    reports = [entry for entry in entries if entry.path == REPORT]
    steps = [entry for entry in entries if entry.path != REPORT]
    if any(not e.intact(store) for e in steps if e.path not in findings.damaged):
        findings.damaged[path] = "A step that it names is gone, or is not what it was."
    return {path} | _check_files(store, f"{folder}/", reports, outputs, share, findings)


def _check_files(
    store: Store,
    root: str,
    entries: Collection[FileEntry],
    outputs: Mapping[str, FileInfo],
    share: float,
    findings: Findings,
) -> set[str]:
    place = _place(store, root)
    for entry in entries:
        path = f"{root}{entry.path}"
        findings.files += 1
        info = outputs.get(path)
        if info is None:
            findings.damaged[path] = "It is missing."
        elif info.bytes != entry.bytes:
            findings.damaged[path] = f"It has {info.bytes:,} bytes, not {entry.bytes:,}."
        elif random.random() < share:  # noqa: S311 - a sample of files, no secret
            findings.read += 1
            findings.bytes += entry.bytes
            if not entry.intact(place):
                findings.damaged[path] = "Its bytes do not match its SHA-256."
    return {f"{root}{entry.path}" for entry in entries}


def _from_ledger(store: Store, root: str) -> dict[str, FileEntry]:
    """The files of the finished shards of a step."""
    ledger = Ledger(store.below(f"{WORK}/{root}ledger"), _place(store, root))
    records = (record for table in ledger.finished() for record in to_records(table))
    return {e["path"]: FileEntry(**e) for record in records for e in record["files"]}


def _place(store: Store, root: str) -> Store:
    return store.below(root.rstrip("/")) if root else store


def _check_memory(store: Store, name: str, findings: Findings) -> None:
    """A ledger's record, a plan or a checkpoint: all carry their own digest."""
    ledger, checkpoint = "/ledger/" in name, "/checkpoints/" in name
    if not (ledger or checkpoint or name.endswith(f"/{PLAN}")):
        return
    data = store.read(name)
    findings.files += 1
    findings.read += 1
    findings.bytes += len(data)
    if checkpoint:
        whole = hashlib.sha256(data[32:]).digest() == data[:32]
    elif "/ledger/parts/" in name:
        whole = hashlib.sha256(data).hexdigest() == PurePosixPath(name).stem
    else:
        whole = _is_sealed(data)
    if not whole:
        findings.damaged[name] = (
            "The record of finished shards is damaged."
            if ledger
            else "Its bytes do not match its SHA-256."
        )


def _is_sealed(data: bytes) -> bool:
    try:
        unseal(data)
    except ValueError:
        return False
    return True


def set_aside(store: Store, damaged: Sequence[str]) -> None:
    """Move damaged files, and the manifests that vouch for them, to :data:`DAMAGED`.

    With a file go the others of its shard, which is done again as a whole. What is left is the
    output of a run that was stopped: started again, it makes anew what is missing and nothing else.
    """
    steps = sorted({name.partition("/")[0] for name in damaged if "/" in name} - {WORK})
    manifests = [MANIFEST, *(f"{step}/{MANIFEST}" for step in steps)]
    others = [name for step in steps for name in _of_their_shards(store, step, set(damaged))]
    for name in dict.fromkeys([*manifests, *damaged, *others]):
        if store.info(name) is not None:
            store.replace(f"{DAMAGED}{name}", store.read(name))
            store.delete(name)


def _of_their_shards(store: Store, step: str, damaged: Set[str]) -> list[str]:
    """The files of one step that are of a shard with a damaged file and of no other shard."""
    try:
        records = list(Artifact.open(store.below(step)).records())
    except PipelineError:
        ledger = Ledger(store.below(f"{WORK}/{step}/ledger"), store.below(step))
        records = [record for table in ledger.tables() for record in to_records(table)]
    files = [[f"{step}/{entry['path']}" for entry in record["files"]] for record in records]
    shards = Counter(name for names in files for name in names)
    return [n for names in files if damaged & {*names} for n in names if shards[n] == 1]
