"""The students that say what a distilled set is worth, and honest controls beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.dataset_distill.label_codec import label_bytes
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.dataset_distill.student import Student
from pipeline.orchestration.fit import Fit
from pipeline.recipes.distill_config import ARMS, DistillConfig
from pipeline.stages.relabel import Relabel
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import UNIT, FittedModels, read_spec
from pipeline.storage.source import Source


@dataclass(frozen=True)
class Row:
    """A row of the evaluation: students that differ in their seed alone.

    Attributes:
        arm: what they were trained on, as a name.
        network: of the students.
        title: what they were trained on, in words.
        views: soft labels of each image, where these are not all that are stored.
        units: names of the students.
    """

    arm: str
    network: str
    title: str
    views: int | None
    units: list[str] = field(default_factory=list)


@dataclass
class Trainings:
    """All students of an evaluation, by name, and the rows that they belong to.

    The first network sees every arm; others, synthetic and random real images with soft labels.
    """

    config: DistillConfig
    classes: int
    relabel: Relabel
    teachers: FittedModels
    fits: dict[str, Fit] = field(default_factory=dict)
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    @property
    def networks(self) -> tuple[str, ...]:
        """Of the students."""
        return self.config.student.backbones or (self.config.teacher.backbone,)

    def synthetic(self, test: Source, images: Source, labels: Source) -> None:
        """Students on synthetic images."""
        inputs = {"train": images, "labels": labels, "test": test}
        for seed in range(self.config.seeds):
            self._soft("distilled-soft", inputs, seed)
            self._soft("shuffled-soft", inputs, seed, shuffled=True)
            self._hard("distilled-hard", images, test, seed)
            for count in self.config.student.view_counts:
                self._soft(f"distilled-soft-{count}", inputs, seed, views=count)

    def real(self, test: Source, images: Source, labels: Source, seed: int) -> None:
        """Students on one draw of random real images, with soft labels."""
        inputs = {"train": images, "labels": labels, "test": test}
        self._soft("random-real-soft", inputs, seed)

    def real_hard(self, test: Source, images: Source, seed: int) -> None:
        """A student on one draw of random real images, with class labels."""
        self._hard("random-real-hard", images, test, seed)

    def noise(self, test: Source, images: Source, labels: Source) -> None:
        """Students on noise that the teachers labelled."""
        inputs = {"train": images, "labels": labels, "test": test}
        for seed in range(self.config.seeds):
            self._soft("noise-soft", inputs, seed)

    def _soft(
        self,
        arm: str,
        inputs: Mapping[str, Source],
        seed: int,
        *,
        views: int | None = None,
        shuffled: bool = False,
    ) -> None:
        config, relabel = self.config, self.relabel
        everywhere = arm in {"distilled-soft", "random-real-soft"}
        for network in self.networks if everywhere else self.networks[:1]:
            task = Student(
                config.student,
                network,
                self.classes,
                relabel.sampler,
                relabel.codec,
                None if relabel.views else self.teachers,
                shuffled,
                views,
            )
            self._add(Row(arm, network, _title(arm, views), views), seed, Fit(task, inputs))

    def _hard(self, arm: str, images: Source, test: Source, seed: int) -> None:
        network = self.networks[0]
        plain = SqueezeConfig(backbone=network, train=self.config.student.train)
        task = Squeeze(plain, self.config.image, self.classes)
        row = Row(arm, network, _title(arm, None), None)
        self._add(row, seed, Fit(task, {"train": images, "test": test}))

    def _add(self, row: Row, seed: int, fit: Fit) -> None:
        if row.views is None and row.arm not in self.config.arms:
            return
        number = self.networks.index(row.network)
        unit = f"{row.arm}-{seed}" if number == 0 else f"{row.arm}-network{number + 1}-{seed}"
        self.rows.setdefault((row.arm, row.network), row).units.append(unit)
        self.fits[unit] = fit


def _title(arm: str, views: int | None) -> str:
    if views is not None:
        return f"synthetic images, {views:,} soft labels each"
    return ARMS[arm]  # type: ignore[index]


NAMES = (
    "arm",
    "network",
    "trained_on",
    "images",
    "image_bytes",
    "label_bytes",
    "accuracy",
    "spread",
    "best",
    "seeds",
)


def evaluation_table(
    trainings: Trainings,
    students: Artifact,
    teachers: Artifact,
    images: ArtifactSource,
    labels: ArtifactSource,
    real_images: int | None,
) -> list[dict[str, Any]]:
    """The accuracy of every row of students and of the teachers.

    ``accuracy`` is that after the last epoch, mean over seeds, ``spread`` its sample standard
    deviation, and ``best`` the mean of what each seed had at best: test data chose it. Bytes are
    those of synthetic images as files, and of their soft labels.

    Args:
        trainings: the students.
        students: fitted.
        teachers: fitted.
        images: the synthetic images.
        labels: their label store.
        real_images: images that teachers were trained on.
    """
    scores = {shard["name"]: shard["metrics"]["accuracy"] for shard in students.records()}
    count, relabel = images.artifact.manifest["counts"]["out"], trainings.relabel
    image_bytes, stored = images.bytes(), logits_bytes(labels)
    order = [*ARMS, *(arm for arm, _ in trainings.rows)]
    networks, rows = trainings.networks, []
    for row in sorted(
        trainings.rows.values(), key=lambda r: (networks.index(r.network), order.index(r.arm))
    ):
        last = [scores[unit] for unit in row.units]
        best = [
            max(e[1]["accuracy"] for e in history(students, u)["evaluations"]) for u in row.units
        ]
        made = row.arm.startswith(("distilled", "shuffled"))
        sizes: list[int | None] = [image_bytes if made else None, None]
        if made and not row.arm.endswith("hard"):
            sizes[1] = stored
        if row.views:
            sizes[1] = label_bytes(relabel.codec, row.views, count, trainings.classes)
        scored = (fmean(last), _spread(last), fmean(best), len(last))
        values = (row.arm, row.network, row.title, count, *sizes, *scored)
        rows.append(dict(zip(NAMES, values, strict=True)))
    return rows + [_teacher(teachers, unit, real_images) for unit in trainings.teachers.units]


def _teacher(teachers: Artifact, unit: str, images: int | None) -> dict[str, Any]:
    record = next(shard for shard in teachers.records() if shard["name"] == unit)
    trained = history(teachers, unit)["loss"]
    title = "teacher: real images" if trained else "teacher: given weights"
    arm = "teacher" if unit == UNIT else f"teacher{unit.removeprefix(UNIT)}"
    score, network = record["metrics"]["accuracy"], read_spec(teachers, unit).backbone
    values = (arm, network, title, images if trained else None, None, None, score, 0.0, score, 1)
    return dict(zip(NAMES, values, strict=True))


def metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """DD-Ranking's two figures, in points, for the first network.

    ``hlr``, hard-label recovery: what is lost to a network trained on all data, with class labels;
    the teacher stands for that where it is of the students' network, else it is null. ``ior``,
    improvement over random: what is gained over random real images with the same labels.
    """
    first = rows[0]["network"]
    found = {r["arm"]: r["accuracy"] for r in reversed(rows) if r["network"] == first}

    def gap(a: str, b: str) -> float | None:
        return found[a] - found[b] if a in found and b in found else None

    return {
        "hlr": gap("teacher", "distilled-hard"),
        "ior": gap("distilled-soft", "random-real-soft"),
    }


def logits_bytes(labels: ArtifactSource) -> int:
    """Bytes of a label store's chunks of seeds and logits: what a label budget is about.

    Keys, class labels and metadata, which come on top, do not grow with the number of views.
    """
    files = {e["path"]: e["bytes"] for shard in labels.artifact.records() for e in shard["files"]}
    return sum(
        size
        for path, size in files.items()
        if "/c/" in path and not any(f"/{name}/" in path for name in ("key", "label"))
    )


def history(artifact: Artifact, unit: str) -> dict[str, Any]:
    """Losses of each epoch and what was measured in the course of a training."""
    found: dict[str, Any] = json.loads(artifact.read(f"{unit}/history.json"))
    return found


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
