"""How hard each sample is: what the recipe ``prune`` trains, embeds and scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pipeline.clustering.sharded_kmeans import ShardedKMeans
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.datasets import Dataset
from pipeline.errors import UsageError
from pipeline.orchestration.fit import Fit
from pipeline.orchestration.run import Run
from pipeline.pruning.class_centres import ClassCentres
from pipeline.pruning.scores import check_epochs
from pipeline.recipes.prune_config import PruneConfig
from pipeline.recipes.teacher import teacher_task
from pipeline.stage import Stage
from pipeline.stages.assign import Assign
from pipeline.stages.decode import Decode
from pipeline.stages.embed import Embed
from pipeline.stages.score import CentreDistances, Score
from pipeline.stages.select import Columns
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import UNIT
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import Source

KMEANS = 25
"""Iterations of k-means at most: prototypes need no more."""


@dataclass(frozen=True)
class ScoreKind:
    """A score as a column of a table.

    Attributes:
        group: scores that are made together.
        column: of the table.
        trains: whether it is of a training, so that weights cannot be given.
        means: what it is, in a sentence.
    """

    group: str
    column: str
    trains: bool
    means: str


SCORES = {
    "el2n": ScoreKind(
        "el2n",
        "el2n",
        True,
        "distance of the class probabilities from the label, early in training",
    ),
    "grand": ScoreKind("grand", "grand", True, "norm of the loss's gradient, early in training"),
    "forgetting": ScoreKind(
        "dynamics", "forgetting", True, "how often it was learned and forgotten"
    ),
    "aum": ScoreKind(
        "dynamics",
        "aum",
        True,
        "how far other classes' logits lie above the label's, mean over training",
    ),
    "tdds": ScoreKind("dynamics", "tdds", True, "how unevenly its probabilities move in training"),
    "margin": ScoreKind(
        "uncertainty",
        "margin",
        False,
        "1 less the difference of the two largest class probabilities",
    ),
    "entropy": ScoreKind(
        "uncertainty", "entropy", False, "entropy of the class probabilities, nats"
    ),
    "least-confidence": ScoreKind(
        "uncertainty", "least-confidence", False, "1 less the largest class probability"
    ),
    "prototypes": ScoreKind(
        "prototypes",
        "distance",
        False,
        "cosine distance of its features from the nearest cluster's centre",
    ),
    "supervised-prototypes": ScoreKind(
        "supervised-prototypes",
        "supervised-prototypes",
        False,
        "cosine distance of its features from their class's mean",
    ),
    "moderate": ScoreKind(
        "moderate", "moderate", False, "distance of its features from their class's median"
    ),
}


@dataclass(frozen=True)
class Material:
    """What scores, selectors and the search for duplicates are made of, each when it is asked for.

    Args:
        run: whose steps these are.
        data: what is pruned.
        config: the recipe's.
    """

    run: Run
    data: Dataset
    config: PruneConfig

    @cached_property
    def images(self) -> ArtifactSource:
        """The training images at the size that networks take."""
        decode = Decode(self.config.image.size, self.config.image.channels)
        return self.run.map("train", self.data.train, [decode], to=ParquetFormat())

    @cached_property
    def test(self) -> Source:
        """What networks are tried on; the training images where there is no test split."""
        if self.data.test is None:
            return self.images
        decode = Decode(self.config.image.size, self.config.image.channels)
        return self.run.map("test", self.data.test, [decode], to=ParquetFormat())

    def task(self, epochs: int) -> Squeeze:
        """The training of a network, for so many epochs."""
        proxy = self.config.proxy
        train = proxy.train.model_copy(update={"epochs": epochs})
        return teacher_task(
            proxy.model_copy(update={"train": train}),
            self.config.image,
            len(self.data.train.classes),
        )

    def fit(self, name: str, units: tuple[str, ...], epochs: int, *, snapshots: bool) -> Artifact:
        """Networks trained on all training images, which differ in their seeds."""
        task = self.task(epochs)
        inputs: dict[str, Source] = {"test": self.test}
        if not task.given:
            inputs["train"] = self.images
        return self.run.fit_each(
            name, {unit: Fit(task, inputs, snapshots=snapshots) for unit in units}
        )

    @cached_property
    def proxy(self) -> Artifact:
        """One network, trained to the end or taken with its weights."""
        return self.fit("proxy", (UNIT,), self.config.proxy.train.epochs, snapshots=False)

    @cached_property
    def features(self) -> ArtifactSource:
        """What the network's last layer is given, for each training image."""
        proxy, image = self.config.proxy, self.config.image
        model = proxy.backbone if proxy.weights == "pretrained" else self.proxy
        return self.run.map("features", self.images, [Embed(model, image)], to=ParquetFormat())

    @cached_property
    def prototypes(self) -> Artifact:
        """Centres of clusters of features."""
        count = self.config.prototypes or len(self.data.train.classes)
        if not count:
            count = min(1000, self.features.artifact.manifest["counts"]["out"] // 20)
        task = ShardedKMeans(max(count, 2), spherical=True, max_iter=KMEANS)
        return self.run.rounds("prototypes", task, self.features, "feature")

    @cached_property
    def assigned(self) -> ArtifactSource:
        """Features with their two nearest prototypes, and the distance to the nearest."""
        return self.run.map(
            "assigned", self.features, [Assign(self.prototypes)], to=ParquetFormat()
        )

    @property
    def epsilon(self) -> float:
        """Cosine distance below which features are duplicates."""
        if self.config.epsilon is not None:
            return self.config.epsilon
        return 0.03 if self.config.proxy.weights == "pretrained" else 0.001

    def scores(self, name: str) -> tuple[ArtifactSource, Artifact | str]:
        """The table of a score and others that come with it, and the model that it is of."""
        group, image = SCORES[name].group, self.config.image
        stages: list[Stage]
        model: Artifact | str
        source: Source = self.images
        if group in {"el2n", "grand"}:
            units = tuple(f"run-{number}" for number in range(self.config.runs))
            model = self.fit("early", units, self.config.early_epochs, snapshots=False)
            stages = [Score(model, units, group, image)]
        elif group == "uncertainty":
            model = self.proxy
            stages = [Score(model, (UNIT,), group, image)]
        elif group == "dynamics":
            epochs = self.config.proxy.train.epochs
            model = self.fit("dynamics", (UNIT,), epochs, snapshots=True)
            stages = [Score(model, (UNIT,), group, image)]
        else:
            proxy = self.config.proxy
            model = proxy.backbone if proxy.weights == "pretrained" else self.proxy
            if group == "prototypes":
                source, stages = self.assigned, [Columns(self._columns("distance"))]
            else:
                task = ClassCentres(
                    "median" if group == "moderate" else "mean", len(self.data.train.classes)
                )
                centres = self.run.rounds("centres", task, self.features, "feature", "label")
                source, stages = self.features, [CentreDistances(centres, group)]
        return self.run.map("scores", source, stages, to=ParquetFormat()), model

    def _columns(self, *names: str) -> tuple[str, ...]:
        labels = ("label",) if self.data.train.classes else ()
        return ("key", *labels, *names)

    def check(self, name: str) -> None:
        """Refuse a score that cannot be made of this data set and these settings.

        Raises:
            UsageError: labels or a network are missing, or weights are given that it cannot use.
        """
        kind, weights = SCORES[name], self.config.proxy.weights
        given = kind.group == "prototypes" and weights == "pretrained"
        if not (self.data.train.classes or given):
            raise UsageError(
                f"The score '{name}' cannot be made without labels, and the data set has none.",
                hint="Take --score prototypes with a network that comes with its weights: "
                "--backbone timm:NAME --weights pretrained; or give a data set with labels.",
                code="no-labels",
            )
        if kind.trains and weights is not None:
            raise UsageError(
                f"The score '{name}' is of a training, and weights are given.",
                hint="Leave --weights out, or take a score of a trained network: margin, entropy, "
                "least-confidence, prototypes, supervised-prototypes or moderate.",
                code="score-needs-training",
            )
        if kind.group == "dynamics":
            check_epochs(self.config.proxy.train.epochs)
        if weights != "pretrained":
            # Refuses now a network that cannot be made, or weights that do not fit it.
            self.task(self.config.proxy.train.epochs).network()
