"""A run: memoised steps over shards, published together at the end."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.digest import canonical, digest, seed_for
from pipeline.errors import RunError
from pipeline.orchestration.executor import Executor, Work
from pipeline.orchestration.steps import Fit, FitWork, MapWork, StepFolders
from pipeline.orchestration.training import TrainingTask
from pipeline.stage import Stage
from pipeline.storage.artifact import MANIFEST, Artifact, ArtifactSource, writer_spec
from pipeline.storage.atomic import FileEntry, exclusive, write_atomic
from pipeline.storage.formats import Format
from pipeline.storage.models import UNIT
from pipeline.storage.source import Source

log = logging.getLogger(__name__)
WORK = ".run"


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
        max_bad: share of a step's samples that may be quarantined before the run fails.
    """

    out: Path
    executor: Executor
    seed: int = 0
    threads: int = 1
    max_bad: float = 0.01
    executed: int = 0

    def map(
        self, name: str, source: Source, stages: Sequence[Stage], *, to: Format
    ) -> ArtifactSource:
        """Run every shard of ``source`` through ``stages`` and write it as ``to``.

        Raises:
            RunError: a shard failed, or too many samples were quarantined.
        """
        seed = seed_for(self.seed, name)
        identity = digest("map", name, source, list(stages), writer_spec(to), seed, self.threads)
        folders = self._folders(name, identity)
        if Artifact.exists(folders.artifact):
            artifact = self._found(name, folders)
            self._check_bad(name, artifact.manifest["counts"])
            return ArtifactSource(artifact)
        work = MapWork(folders, source, tuple(stages), to, seed, self.threads)
        records = self._execute(name, folders, work, [shard.name for shard in source.shards])
        counts = add_counts([record["counts"] for record in records])
        self._check_bad(name, counts)
        offset = 0
        for record in records:
            record["offset"] = offset
            offset += record["rows"]
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
        return ArtifactSource(Artifact.finish(folders.artifact, manifest, folders.attempts))

    def fit(self, name: str, task: TrainingTask, **inputs: Source) -> Artifact:
        """Train one model; the artifact holds its weights and ``metrics`` what it measured."""
        return self.fit_each(name, {UNIT: Fit(task, inputs)})

    def fit_each(self, name: str, fits: Mapping[str, Fit]) -> Artifact:
        """Train several models that do not depend on one another, each a unit of work."""
        seed = seed_for(self.seed, name)
        identity = digest("fit", name, fits, seed, self.threads)
        folders = self._folders(name, identity)
        if Artifact.exists(folders.artifact):
            return self._found(name, folders)
        work = FitWork(folders, fits, seed, self.threads)
        records = self._execute(name, folders, work, list(fits))
        spec = canonical({unit: fit.task for unit, fit in fits.items()})
        manifest = {"kind": "models", "step": name, "identity": identity, "spec": spec}
        return Artifact.finish(folders.artifact, {**manifest, "shards": records}, folders.attempts)

    def publish(
        self, kind: str, products: Mapping[str, Artifact], about: Mapping[str, Any], report: bytes
    ) -> Artifact:
        """Write the report and, last, the run's manifest, which names the products by role."""
        scratch = self.out / WORK / "scratch"
        page = self.out / "report.html"
        write_atomic(page, report, scratch)
        files = [page, *(artifact.path / MANIFEST for artifact in products.values())]
        manifest = {
            "kind": kind,
            "identity": digest(kind, products),
            "products": {role: artifact.path.name for role, artifact in products.items()},
            "files": [vars(FileEntry.of(self.out, path)) for path in files],
            **about,
        }
        return Artifact.finish(self.out, manifest, scratch)

    def published(self, kind: str, products: Mapping[str, Artifact]) -> bool:
        """Whether these very products were published already, and the report is as it was."""
        if not Artifact.exists(self.out):
            return False
        found = Artifact.open(self.out)
        whole = all(entry.intact(self.out) for entry in found.files.values())
        return whole and found.identity == digest(kind, products)

    def _folders(self, name: str, identity: str) -> StepFolders:
        folder = f"{name}-{identity[:12]}"
        return StepFolders(self.out / folder, self.out / WORK / folder)

    def _found(self, name: str, folders: StepFolders) -> Artifact:
        artifact = Artifact.open(folders.artifact)
        log.info("%s: all %d shards found finished", name, len(artifact.shards))
        return artifact

    def _execute(
        self, name: str, folders: StepFolders, work: Work, units: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Do the units that the ledger does not hold; their records in the order of ``units``."""
        shutil.rmtree(folders.attempts, ignore_errors=True)
        records = folders.ledger.finished()
        missing = [unit for unit in units if unit not in records]
        if records:
            log.info("%s: %d of %d shards found finished", name, len(records), len(units))
        log.info("%s: %d shards to do", name, len(missing))
        errors = []
        for record in self.executor.run(work, missing, self.threads) if missing else ():
            if "error" in record:
                errors.append(record["error"])
                log.error("%s: %s", name, errors[-1].pop("traceback", errors[-1]["message"]))
                continue
            records[record["name"]] = record
            self.executed += 1
            log.info("%s: %d of %d shards done", name, len(records), len(units))
        if errors:
            raise _failure(name, errors, len(units))
        return [records[unit] for unit in units]

    def _check_bad(self, name: str, counts: Mapping[str, Any]) -> None:
        bad = sum(counts["quarantined"].values())
        if bad:
            log.warning("%s: %d of %d samples are in quarantine", name, bad, counts["in"])
        if bad > self.max_bad * counts["in"]:
            reasons = ", ".join(f"{n} {reason}" for reason, n in counts["quarantined"].items())
            raise RunError(
                f"{bad} of {counts['in']} samples could not be used in the step '{name}': "
                f"{reasons}.",
                hint=f"Their keys and bytes are in the step's folder 'quarantine'; raise --max-bad "
                f"above {bad / counts['in']:.3g} to go on without them.",
                code="too-many-bad",
            )


@contextmanager
def open_run(out: Path, executor: Executor, **options: Any) -> Iterator[Run]:
    """Hold ``out`` for this process and close the executor at the end.

    Raises:
        UsageError: ``out`` cannot be written.
        RunError: another process is writing it.
    """
    with exclusive(out / WORK), _log_file(out / WORK / "log.txt"), closing(executor):
        yield Run(out, executor, **options)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("pipeline")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


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


def _failure(name: str, errors: Sequence[Mapping[str, str]], units: int) -> RunError:
    first = errors[0]
    if len(errors) == 1 and units == 1:
        where = None
        message = first["message"]
    else:
        where = ", ".join(error["where"] for error in errors[:5]) + (", ..." * (len(errors) > 5))
        message = (
            f"{len(errors)} of {units} shards of the step '{name}' failed; the first: "
            f"{first['message']}"
        )
    return RunError(message, hint=first["hint"], code=first["code"], where=where)
