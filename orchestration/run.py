"""A run: memoised steps over shards, published together at the end."""

from __future__ import annotations

import logging
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.digest import canonical, digest, seed_for
from pipeline.errors import PipelineError, RunError
from pipeline.orchestration.executor import Executor, Resources, Unit, Work
from pipeline.orchestration.fit import Fit, FitUnit, FitWork
from pipeline.orchestration.retry import RetrySource, in_quarantine
from pipeline.orchestration.steps import MapWork, StepFolders, shard_units
from pipeline.orchestration.training import TrainingTask
from pipeline.stage import Stage
from pipeline.storage.artifact import MANIFEST, Artifact, ArtifactSource, writer_spec
from pipeline.storage.atomic import FileEntry, exclusive
from pipeline.storage.formats import Format
from pipeline.storage.models import UNIT
from pipeline.storage.source import Source
from pipeline.storage.store import LocalStore, Store, storage_error

log = logging.getLogger(__name__)
WORK = ".run"
LOG = "log.txt"


@dataclass
class Run:
    """The steps of one recipe over one output folder.

    A step's identity is the digest of its configuration, its version and its inputs' identities;
    a step that is finished is found, not repeated.

    Args:
        out: the output folder. Everything below it but ``.run`` depends on configuration and
            input alone.
        executor: where shards are worked on.
        seed: the run's seed.
        threads: CPU threads of one unit of work. Part of every step's identity, since the sums
            of floats depend on it.
        max_bad: how many samples of a step may be quarantined before the run fails: a share
            (float) or a count (int).
        retry: take up the samples in quarantine once more: those with one of these reasons, or
            all where none is named.
    """

    out: Store
    executor: Executor
    seed: int = 0
    threads: int = 1
    max_bad: float | int = 0.01
    retry: frozenset[str] | None = None
    executed: int = 0
    steps: dict[str, Artifact] = field(default_factory=dict)

    def map(
        self, name: str, source: Source, stages: Sequence[Stage], *, to: Format
    ) -> ArtifactSource:
        """Run every shard of ``source`` through ``stages`` and write it as ``to``.

        Raises:
            RunError: a shard failed, or too many samples were quarantined.
        """
        seed = seed_for(self.seed, name)
        identity = digest("map", name, source, list(stages), writer_spec(to), seed, self.threads)
        step = f"{name}-{identity[:12]}"
        artifact = self._map(name, step, identity, source, stages, to, None)
        number = 1
        while Artifact.exists(self.out.below(f"{step}-retry{number}")):
            added = Artifact.open(self.out.below(f"{step}-retry{number}"))
            # One that was added to what the step was before it was repaired is out of date.
            artifact = added if added.adds_to(artifact) else artifact
            number += 1
        if self.retry is not None:
            chosen = in_quarantine(artifact, self.retry)
            if chosen:
                again = RetrySource(source, chosen, number)
                log.info("%s: %d samples taken up from quarantine", name, len(again))
                identity = digest("retry", artifact.identity, again)
                artifact = self._map(
                    name, f"{step}-retry{number}", identity, again, stages, to, artifact
                )
        self._check_bad(name, artifact.manifest["counts"])
        found = ArtifactSource(artifact)
        self.steps |= {part.name: part for part in found.artifacts}
        return found

    def _map(
        self,
        name: str,
        step: str,
        identity: str,
        source: Source,
        stages: Sequence[Stage],
        to: Format,
        base: Artifact | None,
    ) -> Artifact:
        folders = self._folders(step)
        if Artifact.exists(folders.artifact):
            return self._found(name, folders)
        seed = seed_for(self.seed, name)
        work = MapWork(folders, source, tuple(stages), to, seed, self.threads)
        records = self._execute(name, folders, work, list(shard_units(source.shards, to)))
        offset = 0
        for record in records:
            record["offset"] = offset
            offset += record["rows"]
        counts = add_counts([record["counts"] for record in records])
        manifest = {
            "kind": "table",
            "step": name,
            "identity": identity,
            "spec": canonical({"stages": list(stages), "input": source.identity}),
            "writer": writer_spec(to),
            "classes": list(source.classes),
            "counts": counts,
            "shards": records,
        }
        if base and isinstance(source, RetrySource):
            if not offset:
                log.warning("%s: none of the samples taken up could be used", name)
                folders.artifact.remove()
                folders.work.remove()
                return base
            manifest["counts"] = _with_retried(base.manifest["counts"], source.retried, counts)
            manifest |= {"base": base.name, "base_sha256": base.sha256, "retried": source.retried}
        return Artifact.finish(folders.artifact, manifest)

    def fit(self, name: str, task: TrainingTask, **inputs: Source) -> Artifact:
        """Train one model; the artifact holds its weights and ``metrics`` what it measured."""
        return self.fit_each(name, {UNIT: Fit(task, inputs)})

    def fit_each(self, name: str, fits: Mapping[str, Fit]) -> Artifact:
        """Train several models that do not depend on one another, each a unit of work."""
        seed = seed_for(self.seed, name)
        identity = digest("fit", name, fits, seed, self.threads)
        folders = self._folders(f"{name}-{identity[:12]}")
        if Artifact.exists(folders.artifact):
            return self._keep(self._found(name, folders))
        work = FitWork(folders, fits, seed, self.threads)
        records = self._execute(
            name, folders, work, [FitUnit(index, unit) for index, unit in enumerate(fits)]
        )
        spec = canonical({unit: fit.task for unit, fit in fits.items()})
        manifest = {"kind": "models", "step": name, "identity": identity, "spec": spec}
        return self._keep(Artifact.finish(folders.artifact, {**manifest, "shards": records}))

    def _keep(self, artifact: Artifact) -> Artifact:
        self.steps[artifact.name] = artifact
        return artifact

    def publish(
        self,
        kind: str,
        products: Mapping[str, Artifact],
        about: Mapping[str, Any],
        report: bytes | None = None,
    ) -> Artifact:
        """Write the report and, last, the run's manifest, which names the products by role."""
        files = [f"{name}/{MANIFEST}" for name in _with_bases(products.values())]
        if report is not None:
            self.out.replace("report.html", report)
            files.append("report.html")
        manifest = {
            "kind": kind,
            "identity": digest(kind, products),
            "products": {role: artifact.name for role, artifact in products.items()},
            "steps": list(self.steps),
            "files": [vars(FileEntry.of(self.out, name)) for name in files],
            **about,
        }
        return Artifact.finish(self.out, manifest)

    def published(self, kind: str, products: Mapping[str, Artifact]) -> bool:
        """Whether these very products were published already, and the report is as it was."""
        if not Artifact.exists(self.out):
            return False
        found = Artifact.open(self.out)
        whole = all(entry.intact(self.out) for entry in found.files.values())
        same = found.manifest["steps"] == list(self.steps)
        return whole and same and found.identity == digest(kind, products)

    def _folders(self, step: str) -> StepFolders:
        return StepFolders(self.out.below(step), self.out.below(WORK).below(step))

    def _found(self, name: str, folders: StepFolders) -> Artifact:
        artifact = Artifact.open(folders.artifact)
        log.info("%s: all %d shards found finished", name, len(artifact.shards))
        return artifact

    def _execute(
        self, name: str, folders: StepFolders, work: Work, units: Sequence[Unit]
    ) -> list[dict[str, Any]]:
        """Do the units that the ledger does not hold; their records in the order of ``units``."""
        records = folders.ledger.finished()
        missing = [unit for unit in units if unit.name not in records]
        if records:
            log.info("%s: %d of %d shards found finished", name, len(records), len(units))
        log.info("%s: %d shards to do", name, len(missing))
        errors = []
        for record in self.executor.run(work, missing, Resources(self.threads)) if missing else ():
            if "error" in record:
                errors.append(record["error"])
                log.error("%s: %s", name, errors[-1].pop("traceback", errors[-1]["message"]))
                continue
            records[record["name"]] = record
            self.executed += 1
            log.info("%s: %d of %d shards done", name, len(records), len(units))
        if errors:
            raise _failure(name, errors, units)
        return [records[unit.name] for unit in units]

    def _check_bad(self, name: str, counts: Mapping[str, Any]) -> None:
        bad = sum(counts["quarantined"].values())
        if bad:
            log.warning("%s: %d of %d samples are in quarantine", name, bad, counts["in"])
        allowed = self.max_bad * counts["in"] if isinstance(self.max_bad, float) else self.max_bad
        if bad > allowed:
            reasons = ", ".join(f"{n} {reason}" for reason, n in counts["quarantined"].items())
            raise RunError(
                f"{bad} of {counts['in']} samples could not be used in the step '{name}': "
                f"{reasons}.",
                hint="'pipeline retry' takes them up again; they lie in the step's folder "
                f"'quarantine' with the reasons. --max-bad {bad} goes on without them.",
                code="too-many-bad",
            )


@contextmanager
def open_run(out: Store, executor: Executor, **options: Any) -> Iterator[Run]:
    """Hold ``out`` for this process and close the executor at the end.

    Raises:
        UsageError: ``out`` cannot be written.
        RunError: another process is writing it, or the storage failed.
    """
    out = out.writing_in(f"{WORK}/unfinished")
    work = out.below(WORK)
    try:
        with exclusive(work), _log_file(work), closing(executor):
            out.clear()
            yield Run(out, executor, **options)
    except OSError as error:
        raise storage_error(error, str(out)) from error


@contextmanager
def _log_file(work: Store) -> Iterator[None]:
    """Keep a log in ``work``: as it is written on a disk, in an object store when the run ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = work.root / LOG if isinstance(work, LocalStore) else Path(folder, LOG)
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("pipeline")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()
            if not isinstance(work, LocalStore):
                stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
                try:
                    work.replace(f"{stamp}-{LOG}", path.read_bytes())
                except (OSError, PipelineError) as error:
                    # What went wrong before is what the user has to know.
                    log.warning("the log could not be kept: %s", error)


def _with_bases(artifacts: Iterable[Artifact]) -> list[str]:
    """The folders of artifacts and of those that they add to."""
    found: dict[str, None] = {}
    for artifact in artifacts:
        table = artifact.manifest["kind"] == "table"
        parts = ArtifactSource(artifact).artifacts if table else (artifact,)
        found |= dict.fromkeys(part.name for part in parts)
    return list(found)


def _with_retried(
    base: Mapping[str, Any], retried: Mapping[str, int], counts: Mapping[str, Any]
) -> dict[str, Any]:
    """Counts of a step of whose quarantine ``retried`` samples became ``counts``."""
    total = add_counts([base, counts])
    total["in"] = base["in"]
    for reason, rows in retried.items():
        total["quarantined"][reason] -= rows
    total["quarantined"] = {reason: n for reason, n in total["quarantined"].items() if n}
    return total


def add_counts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of sample counts: ``in`` = ``out`` + ``filtered`` + ``quarantined``."""
    total: dict[str, Any] = {"in": 0, "out": 0, "filtered": {}, "quarantined": {}}
    for part in parts:
        for side in ("in", "out"):
            total[side] += part[side]
        for side in ("filtered", "quarantined"):
            for reason, rows in part[side].items():
                total[side][reason] = total[side].get(reason, 0) + rows
    return total


def _failure(name: str, errors: Sequence[Mapping[str, str]], units: Sequence[Unit]) -> RunError:
    first = errors[0]
    message, where = first["message"], first["where"]
    if len(units) > 1:
        where = ", ".join(error["where"] for error in errors[:5]) + (", ..." * (len(errors) > 5))
        count = f"{len(errors)} of {len(units)} shards of the step '{name}'"
        message = f"{count} failed; the first: {message}"
    return RunError(message, hint=first["hint"], code=first["code"], where=where)
