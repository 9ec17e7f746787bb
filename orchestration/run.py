"""A run: memoised steps over shards, published together at the end."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.digest import canonical, digest, seed_for
from pipeline.errors import RunError
from pipeline.orchestration import snapshots
from pipeline.orchestration.adopt import Known, adopt, earlier
from pipeline.orchestration.execute import Do, execute, finished
from pipeline.orchestration.executor import Executor, Record, Resources, Unit, attempts
from pipeline.orchestration.fit import Fit, FitUnit, FitWork
from pipeline.orchestration.live import hold
from pipeline.orchestration.logs import run_log
from pipeline.orchestration.memory import WORK, StepFolders, write_plan, write_steps
from pipeline.orchestration.progress import Progress
from pipeline.orchestration.retry import RetrySource, in_quarantine
from pipeline.orchestration.rounds import (
    ONE_ROUND,
    OneRound,
    PartUnit,
    PartWork,
    ResultWork,
    Rounds,
    RoundsTask,
    part_units,
)
from pipeline.orchestration.steps import MapWork, shard_units
from pipeline.orchestration.training import TrainingTask
from pipeline.stage import Stage
from pipeline.storage.artifact import MANIFEST, Artifact, ArtifactSource, writer_spec
from pipeline.storage.atomic import FileEntry
from pipeline.storage.formats import Format
from pipeline.storage.models import UNIT
from pipeline.storage.records import add_counts, total_counts
from pipeline.storage.source import Source
from pipeline.storage.store import Store, storage_error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MapStep:
    """A map step before it is done.

    Attributes:
        name: what the recipe calls it.
        folder: where its artifact lies.
        identity: digest of all that its output depends on.
        work: digest of the same without the source: shards that two sources share are made alike.
        source, stages, to: as of :meth:`Run.map`.
        seed: of the step.
        resources: of a shard.
    """

    name: str
    folder: str
    identity: str
    work: str
    source: Source
    stages: tuple[Stage, ...]
    to: Format
    seed: int
    resources: Resources


@dataclass
class Run:
    """The steps of one recipe over one output folder.

    A step's identity is the digest of its configuration, its version and its inputs' identities;
    a step that is finished is found, not repeated. Where a source has grown, the shards that an
    earlier snapshot holds are taken over.

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
            all where none is named. Shards in quarantine are taken up too.
        resources: what a unit of a step needs, by the step's name, where it is not the default.
        checkpoint_seconds: time between two checkpoints of a training, or of a long synthesis.
        progress: what is shown of it.
        check: called after each shard; raises where the run has to end.
    """

    out: Store
    executor: Executor
    seed: int = 0
    threads: int = 1
    max_bad: float | int = 0.01
    retry: frozenset[str] | None = None
    resources: Mapping[str, Resources] = field(default_factory=dict)
    checkpoint_seconds: float = 600.0
    progress: Progress = field(default_factory=Progress)
    check: Callable[[], None] = lambda: None
    executed: int = 0
    begun: list[str] = field(default_factory=list)
    steps: dict[str, Artifact] = field(default_factory=dict)

    def map(
        self, name: str, source: Source, stages: Sequence[Stage], *, to: Format
    ) -> ArtifactSource:
        """Run every shard of ``source`` through ``stages`` and write it as ``to``.

        Raises:
            RunError: a shard failed, or too many samples were quarantined.
        """
        step = self._map_step(name, source, stages, to)
        artifact = self._map(step)
        number = 1
        while Artifact.exists(self.out.below(f"{step.folder}-retry{number}")):
            added = Artifact.open(self.out.below(f"{step.folder}-retry{number}"))
            # One that was added to what the step was before it was repaired is out of date.
            artifact = added if added.adds_to(artifact) else artifact
            number += 1
        if self.retry is not None:
            artifact = self._map_again(step, artifact, number)
        self._check_bad(name, artifact.manifest["counts"])
        found = ArtifactSource(artifact)
        self.steps |= {part.name: part for part in found.artifacts}
        return found

    def _map_step(self, name: str, source: Source, stages: Sequence[Stage], to: Format) -> MapStep:
        resources = self._resources(name)
        seed = seed_for(self.seed, name)
        facts = (name, list(stages), writer_spec(to), list(source.classes), seed, resources.threads)
        work = digest("map", *facts)
        identity = digest(work, source)
        folder = f"{name}-{identity[:12]}"
        return MapStep(name, folder, identity, work, source, tuple(stages), to, seed, resources)

    def _map(self, step: MapStep) -> Artifact:
        folders = self._begin(step.folder)
        if Artifact.exists(folders.artifact):
            return self._found(step.name, folders)
        return Artifact.finish(folders.artifact, *self._mapped(step, folders))

    def _mapped(self, step: MapStep, folders: StepFolders) -> tuple[dict[str, Any], pa.Table]:
        """What the manifest of a map step says, and the records of its shards."""
        shards = step.source.shards
        work = MapWork(
            folders,
            step.source.lean(),
            step.stages,
            step.to,
            step.seed,
            step.resources.threads,
            self.checkpoint_seconds,
        )
        write_plan(folders.work, step.name, step.identity, len(shards))
        self._adopt(step, folders)
        units = shard_units(shards, step.to, step.work)

        def do(missing: Iterator[Unit]) -> Iterator[Record]:
            model = any(getattr(stage, "model", False) for stage in step.stages)
            return self.executor.run(work, missing, self._with_gpus(step.resources, model))

        records = self._execute(step.name, folders, units, len(shards), do)
        manifest = {
            "kind": "table",
            "step": step.name,
            "identity": step.identity,
            "work": step.work,
            "spec": canonical({"stages": list(step.stages), "input": step.source.identity}),
            "writer": writer_spec(step.to),
            "classes": list(step.source.classes),
            "counts": total_counts(records),
        }
        return manifest, records

    def _map_again(self, step: MapStep, base: Artifact, number: int) -> Artifact:
        """Take up samples in quarantine: an artifact that adds to ``base``, or that itself."""
        chosen = in_quarantine(base, self.retry or ())
        if not chosen:
            return base
        source = RetrySource(step.source, chosen, number)
        log.info("%s: %d samples taken up from quarantine", step.name, len(source))
        identity = digest("retry", base.identity, source)
        again = replace(
            step, folder=f"{step.folder}-retry{number}", identity=identity, source=source
        )
        folders = self._begin(again.folder)
        manifest, records = self._mapped(again, folders)
        counts = manifest["counts"]
        if not counts["out"]:
            log.warning("%s: none of the samples taken up could be used", step.name)
            folders.artifact.remove()
            folders.work.remove()
            return base
        manifest["counts"] = _with_retried(base.manifest["counts"], source.retried, counts)
        manifest |= {"base": base.name, "base_sha256": base.sha256, "retried": source.retried}
        return Artifact.finish(folders.artifact, manifest, records)

    def fit(self, name: str, task: TrainingTask, **inputs: Source) -> Artifact:
        """Train one model; the artifact holds its weights and ``metrics`` what it measured."""
        return self.fit_each(name, {UNIT: Fit(task, inputs)})

    def fit_each(self, name: str, fits: Mapping[str, Fit]) -> Artifact:
        """Train several models that do not depend on one another, each a unit of work.

        Raises:
            RunError: an input holds no sample, or a training failed.
        """
        identity, folders = self._fit_step(name, fits)
        artifact = self._fit(name, identity, folders, fits)
        self.steps[artifact.name] = artifact
        return artifact

    def _fit_step(self, name: str, fits: Mapping[str, Fit]) -> tuple[str, StepFolders]:
        """Identity and folders of a fit step."""
        seed, threads = seed_for(self.seed, name), self._resources(name).threads
        identity = digest("fit", name, fits, seed, threads)
        return identity, StepFolders.of(self.out, f"{name}-{identity[:12]}")

    def _fit(
        self,
        name: str,
        identity: str,
        folders: StepFolders,
        fits: Mapping[str, Fit],
    ) -> Artifact:
        self._begin(folders.artifact.url.rpartition("/")[2])
        if Artifact.exists(folders.artifact):
            return self._found(name, folders)
        _check_inputs(name, fits)
        threads, seed = self._resources(name).threads, seed_for(self.seed, name)
        work = FitWork(folders, fits, seed, threads, self.checkpoint_seconds)
        units = [FitUnit(index, unit) for index, unit in enumerate(fits)]

        def do(missing: Iterator[Unit]) -> Iterator[Record]:
            resources = self._with_gpus(self._resources(name), True)
            teams = {unit.name: fits[unit.name].task.workers for unit in units}
            left = list(missing)
            alone = [unit for unit in left if teams[unit.name] == 1]
            if alone:
                yield from self.executor.run(work, alone, resources)
            for unit in left:
                if teams[unit.name] > 1:
                    yield self.executor.train(work, unit, teams[unit.name], resources)

        write_plan(folders.work, name, identity, len(fits))
        records = self._execute(name, folders, units, len(fits), do)
        spec = canonical({unit: fit.task for unit, fit in fits.items()})
        manifest = {"kind": "models", "step": name, "identity": identity, "spec": spec}
        return Artifact.finish(folders.artifact, manifest, records)

    def rounds(
        self, name: str, task: RoundsTask, source: Source, *columns: str, parts: int = 32
    ) -> Artifact:
        """Go through columns of all shards in rounds, until ``task`` has found what it looks for.

        The artifact holds arrays (:func:`~pipeline.storage.array_artifact.read_arrays`), and
        ``metrics`` what was measured. After each round its state is kept, so that a run that is
        stopped goes on with the round it was in, and in it with the parts that are missing.

        Args:
            name: of the step.
            task: what to find.
            source: the shards.
            columns: whose values are taken.
            parts: in how many parts shards are gone through; sums depend on it.

        Raises:
            RunError: the source holds no sample, or a part failed.
        """
        identity, folders = self._rounds_step(name, task, source, columns, parts)
        artifact = self._rounds(name, identity, folders, (task, source, columns, parts))
        self.steps[artifact.name] = artifact
        return artifact

    def compute(self, name: str, task: OneRound) -> Artifact:
        """Arrays that one worker computes in one go, from what is in the task's fields.

        Raises:
            RunError: it failed.
        """
        return self.rounds(name, task, ONE_ROUND, "key", parts=1)

    def _rounds_step(
        self, name: str, task: RoundsTask, source: Source, columns: tuple[str, ...], parts: int
    ) -> tuple[str, StepFolders]:
        """Identity and folders of a step in rounds."""
        seed, threads = seed_for(self.seed, name), self._resources(name).threads
        identity = digest("rounds", name, task, source, columns, parts, seed, threads)
        return identity, StepFolders.of(self.out, f"{name}-{identity[:12]}")

    def _rounds(
        self,
        name: str,
        identity: str,
        folders: StepFolders,
        what: tuple[RoundsTask, Source, tuple[str, ...], int],
    ) -> Artifact:
        task, source, columns, parts = what
        self._begin(folders.artifact.url.rpartition("/")[2])
        if Artifact.exists(folders.artifact):
            return self._found(name, folders)
        if not source.shards:
            raise _no_samples(name, columns[0])
        write_plan(folders.work, name, identity, 1)
        threads = self._resources(name).threads
        units = part_units(source.shards, parts)

        def go(number: int, inner: StepFolders) -> None:
            work = PartWork(inner, task, source.lean(), columns, threads)

            def do(missing: Iterator[Unit]) -> Iterator[Record]:
                resources = self._with_gpus(self._resources(name), getattr(task, "model", False))
                return self.executor.run(work, missing, resources)

            self._execute(f"{name} {number + 1}", inner, units, len(units), do)

        rounds = Rounds(folders.work.below("rounds"))
        state = rounds.finish(task, units, seed_for(self.seed, name), threads, go)
        result = [PartUnit(0, name, ())]
        publish = ResultWork(folders, task, state)
        records = self._execute(name, folders, result, 1, partial(attempts, publish))
        spec = canonical(
            {"task": task, "input": source.identity, "columns": columns, "parts": parts}
        )
        manifest = {"kind": "arrays", "step": name, "identity": identity, "spec": spec}
        rounds.store.remove()
        return Artifact.finish(folders.artifact, manifest, records)

    def require(self, look: Callable[[], object]) -> None:
        """Look at what a step gave, so that what cannot come to a good end is refused early."""
        look()

    def publish(
        self,
        kind: str,
        products: Mapping[str, Artifact],
        about: Mapping[str, Any],
        report: bytes | None = None,
    ) -> Artifact:
        """Write the report and, last, the run's manifest, which names the products by role.

        What was published before is kept as a snapshot.
        """
        names = [f"{name}/{MANIFEST}" for name in _with_bases(products.values())]
        files = [FileEntry.of(self.out, name) for name in names]
        if report is not None:
            digest_of = hashlib.sha256(report).hexdigest()
            files.append(FileEntry(snapshots.REPORT, len(report), digest_of))
        manifest = {
            "kind": kind,
            "identity": digest(kind, products),
            "products": {role: artifact.name for role, artifact in products.items()},
            "steps": list(self.steps),
            "files": [vars(entry) for entry in files],
            **about,
        }
        snapshots.keep(self.out, manifest)
        if report is not None:
            self.out.replace(snapshots.REPORT, report)
        return Artifact.finish(self.out, manifest)

    def published(self, kind: str, products: Mapping[str, Artifact]) -> bool:
        """Whether these very products were published already, and the report is as it was."""
        if not Artifact.exists(self.out):
            return False
        found = Artifact.open(self.out)
        whole = all(entry.intact(self.out) for entry in found.files.values())
        same = found.manifest["steps"] == list(self.steps)
        return whole and same and found.identity == digest(kind, products)

    def _resources(self, name: str) -> Resources:
        return self.resources.get(name) or Resources(threads=self.threads)

    def _with_gpus(self, resources: Resources, model: bool) -> Resources:
        """Resources with a GPU for a unit that runs a network, where nothing else was said."""
        if "gpus" in resources.model_fields_set:
            return resources
        gpus = 1.0 if model and self.executor.gpus() >= 1 else 0.0
        return resources.model_copy(update={"gpus": gpus})

    def _begin(self, step: str) -> StepFolders:
        """The folders of a step that the run has come to."""
        self.begun.append(step)
        write_steps(self.out.below(WORK), self.begun)
        return StepFolders.of(self.out, step)

    def _found(self, name: str, folders: StepFolders) -> Artifact:
        artifact = Artifact.open(folders.artifact)
        log.info("%s: all %d shards found finished", name, artifact.shards)
        return artifact

    def _adopt(self, step: MapStep, folders: StepFolders) -> None:
        known = Known(earlier(self.out, step.name, step.work))
        if not known:
            return
        done = finished(folders, len(step.source.shards))
        units = shard_units(step.source.shards, step.to, step.work)
        adopted = adopt(folders, (unit for unit in units if not done[unit.index]), known)
        if adopted:
            log.info("%s: %d shards taken over from an earlier snapshot", step.name, adopted)

    def _execute(
        self,
        name: str,
        folders: StepFolders,
        units: Iterable[Unit],
        total: int,
        do: Do,
    ) -> pa.Table:
        """Do the units that the ledger does not hold; the records of all, in order."""
        if self.retry is not None:
            folders.ledger.forgive()

        def counted(missing: Iterator[Unit]) -> Iterator[Record]:
            for record in do(missing):
                self.executed += "error" not in record
                yield record
                self.check()

        return execute(name, folders, units, total, counted, self.progress)

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
def open_run(
    out: Store,
    executor: Executor,
    *,
    command: str = "run",
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[Run]:
    """Hold ``out`` for this process, log what is done, and close the executor at the end.

    Args:
        out: the output folder.
        executor: where shards are worked on.
        command: what is run, for those who ask who holds the folder.
        about: facts for the log.
        progress: what a user sees; log lines where not given.
        options: of :class:`Run`.

    Raises:
        UsageError: ``out`` cannot be written.
        RunError: another process is writing it, the run was cancelled, or the storage failed.
    """
    out = out.writing_in(f"{WORK}/unfinished")
    work = out.below(WORK)
    shown = progress or Progress()
    try:
        with (
            hold(work, command, type(executor).__name__) as held,
            run_log(work, held.run, about or {}),
            closing(shown),
            closing(executor),
        ):
            out.clear()
            executor.check_output(out)
            yield Run(out, executor, progress=shown, check=held.check, **options)
    except OSError as error:
        raise storage_error(error, str(out)) from error


def _check_inputs(name: str, fits: Mapping[str, Fit]) -> None:
    for fit in fits.values():
        for role, source in fit.inputs.items():
            if not source.shards:
                raise _no_samples(name, role)


def _no_samples(name: str, role: str) -> RunError:
    return RunError(
        f"The step '{name}' has no sample to learn from as '{role}'.",
        hint="Give more images, or a data set with a part for each purpose, such as the folders "
        "train/ and test/.",
        code="no-samples",
    )


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
