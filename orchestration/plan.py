"""What a run would do: the recipe is walked, and nothing is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, overload

import pyarrow as pa

from pipeline.orchestration.adopt import Known, earlier
from pipeline.orchestration.execute import finished
from pipeline.orchestration.executor import Resources
from pipeline.orchestration.fit import Fit
from pipeline.orchestration.memory import StepFolders
from pipeline.orchestration.rounds import RoundsTask
from pipeline.orchestration.run import MapStep, Run
from pipeline.orchestration.steps import ShardUnit, shard_units
from pipeline.stage import Stage
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.formats import Format
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import Shard, Source


class NotYetMadeError(Exception):
    """A recipe looked at what a step has not made yet; its argument is the step's name."""


class _Unmade(dict[str, Any]):
    """What is known of a manifest before it is written."""

    def __missing__(self, key: str) -> NoReturn:
        raise NotYetMadeError(self["step"])

    def get(self, key: str, default: Any = None) -> Any:
        return default if key == "base" else self[key]


class PlannedShards(Sequence[Shard]):
    """Shards of which a million take no more room than ten: they are gone through in order."""

    def __init__(self, count: int, units: Callable[[], Iterable[ShardUnit]]) -> None:
        self._count, self._units = count, units

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Shard]:
        return (Shard(unit.name, unit.identity) for unit in self._units())

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | Sequence[Shard]:
        return list(self)[index]


class PlannedSource(ArtifactSource):
    """The output of a step that is not done yet: its identity is known, its samples are not.

    Args:
        artifact: with what is known of its manifest.
        count: how many shards the step has.
        units: what it would do.
    """

    def __init__(
        self, artifact: Artifact, count: int, units: Callable[[], Iterable[ShardUnit]]
    ) -> None:
        super().__init__(artifact)
        self._count, self._units = count, units

    @property
    def planned(self) -> Sequence[Shard]:
        """The shards that there will be; those that come out empty are left out in the end."""
        return PlannedShards(self._count, self._units)

    @property
    def shards(self) -> Sequence[Shard]:
        raise NotYetMadeError(self.artifact.manifest["step"])

    def read(self, shard: Shard) -> pa.Table:
        raise NotYetMadeError(self.artifact.manifest["step"])


@dataclass(frozen=True)
class StepPlan:
    """What would be done for one step.

    Attributes:
        step: its name.
        folder: where its output lies.
        stages: what is done with a shard, one after the other in one process.
        resources: what a shard is given.
        model: whether a network is run.
        shards: how many it has.
        finished: how many of them are done.
        adopted: how many an earlier snapshot holds: they are taken over.
        failed: how many are in quarantine: they are left alone.
        bytes: size of what would be read, where it is known.
    """

    step: str
    folder: str
    stages: tuple[str, ...]
    resources: Resources
    model: bool
    shards: int = 0
    finished: int = 0
    adopted: int = 0
    failed: int = 0
    bytes: int | None = None

    @property
    def missing(self) -> int:
        """Shards that would be worked on."""
        return self.shards - self.finished - self.adopted - self.failed


@dataclass
class Planner(Run):
    """A run that does nothing, and notes what it would have done.

    A recipe that needs to look at what a step gives, such as the labels in an index, can be
    followed up to there as long as that step is not finished.
    """

    plans: list[StepPlan] = field(default_factory=list)
    publishes: bool = False

    def follow(self, recipe: Callable[[Run], object]) -> str | None:
        """Walk a recipe; the step whose output has to be there to see further."""
        try:
            recipe(self)
        except NotYetMadeError as error:
            return str(error.args[0])
        return None

    def map(
        self, name: str, source: Source, stages: Sequence[Stage], *, to: Format
    ) -> ArtifactSource:
        step = self._map_step(name, source, stages, to)
        folders = StepFolders.of(self.out, step.folder)
        names = ["read", *(type(stage).__name__ for stage in stages), f"write {to.name}"]
        model = any(getattr(stage, "model", False) for stage in stages)
        plan = StepPlan(name, step.folder, tuple(names), step.resources, model)
        if Artifact.exists(folders.artifact):
            self._note_finished(plan, folders)
            return super().map(name, source, stages, to=to)
        shards = source.planned if isinstance(source, PlannedSource) else source.shards

        def units() -> Iterator[ShardUnit]:
            # Of a planned source it is not known whether a format can hold it.
            writer = ParquetFormat() if isinstance(source, PlannedSource) else to
            return shard_units(shards, writer, step.work)

        self.plans.append(self._looked_at(replace(plan, shards=len(shards)), step, folders, units))
        known = {"kind": "table", "step": name, "identity": step.identity}
        artifact = Artifact(folders.artifact, _Unmade(**known, classes=list(source.classes)))
        self.steps[artifact.name] = artifact
        return PlannedSource(artifact, len(shards), units)

    def _looked_at(
        self,
        plan: StepPlan,
        step: MapStep,
        folders: StepFolders,
        units: Callable[[], Iterator[ShardUnit]],
    ) -> StepPlan:
        done = finished(folders, plan.shards)
        known = Known(earlier(self.out, step.name, step.work))
        count, adopted, size, sized = int(done.sum()), 0, 0, True
        for unit in units():
            if done[unit.index]:
                continue
            if unit.identity in known:
                adopted += 1
            elif unit.shard.bytes is None:
                sized = False
            else:
                size += unit.shard.bytes
        failed = len(folders.ledger.failed())
        size_read = size if sized else None
        return replace(plan, finished=count, adopted=adopted, failed=failed, bytes=size_read)

    def require(self, look: Callable[[], object]) -> None:
        with suppress(NotYetMadeError):
            look()

    def _begin(self, step: str) -> StepFolders:
        return StepFolders.of(self.out, step)

    def fit_each(self, name: str, fits: Mapping[str, Fit]) -> Artifact:
        identity, folders = self._fit_step(name, fits)
        kinds = sorted({type(fit.task).__name__ for fit in fits.values()})
        folder = folders.artifact.url.rpartition("/")[2]
        plan = StepPlan(name, folder, tuple(kinds), self._resources(name), model=True)
        if Artifact.exists(folders.artifact):
            self._note_finished(plan, folders)
            return super().fit_each(name, fits)
        done = int(finished(folders, len(fits)).sum())
        failed = len(folders.ledger.failed())
        self.plans.append(replace(plan, shards=len(fits), finished=done, failed=failed))
        known = {"kind": "models", "step": name, "identity": identity}
        artifact = Artifact(folders.artifact, _Unmade(**known))
        self.steps[artifact.name] = artifact
        return artifact

    def rounds(
        self, name: str, task: RoundsTask, source: Source, *columns: str, parts: int = 32
    ) -> Artifact:
        identity, folders = self._rounds_step(name, task, source, columns, parts)
        folder = folders.artifact.url.rpartition("/")[2]
        plan = StepPlan(name, folder, (type(task).__name__,), self._resources(name), model=False)
        if Artifact.exists(folders.artifact):
            self._note_finished(plan, folders)
            return super().rounds(name, task, source, *columns, parts=parts)
        self.plans.append(replace(plan, shards=1))
        artifact = Artifact(folders.artifact, _Unmade(kind="arrays", step=name, identity=identity))
        self.steps[artifact.name] = artifact
        return artifact

    def _note_finished(self, plan: StepPlan, folders: StepFolders) -> None:
        count = Artifact.open(folders.artifact).shards
        self.plans.append(replace(plan, shards=count, finished=count))

    def published(self, kind: str, products: Mapping[str, Artifact]) -> bool:
        self.publishes = not super().published(kind, products)
        return True
