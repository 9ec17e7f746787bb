"""The parts of a report, and the report of a distillation."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.backbones import ModelSpec
from pipeline.dataset_distill.config import RecoverConfig, SqueezeConfig
from pipeline.dataset_distill.label_codec import LabelCodec
from pipeline.dataset_distill.views import ViewSampler
from pipeline.digest import dumps
from pipeline.labelled_images import ImageConfig
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.run import Run
from pipeline.recipes.distill_config import ARMS, Arm, DistillConfig
from pipeline.recipes.distill_evaluation import Trainings, evaluation_table, metrics
from pipeline.recipes.distill_report import Found, report
from pipeline.report import (
    axis_ticks,
    bar_chart,
    contact_sheet,
    html_table,
    line_chart,
    page,
    paragraph,
)
from pipeline.stages.relabel import Relabel
from pipeline.storage.array_artifact import FILE, to_bytes
from pipeline.storage.artifact import Artifact
from pipeline.storage.atomic import FileEntry
from pipeline.storage.models import FittedModels
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.records import to_table
from pipeline.storage.regroup import ChosenSource, find_places
from pipeline.storage.source import TableSource
from pipeline.storage.store import LocalStore
from pipeline.storage.webdataset import WebDatasetFormat
from pipeline.storage.zarr import ZarrFormat
from pipeline.tensors import tensor_column

HOSTILE = '<script>alert("x")</script>'


def sheet_of(images, **options):
    return np.asarray(Image.open(io.BytesIO(contact_sheet(images, **options))))


@pytest.mark.parametrize("channels", [1, 3])
def test_contact_sheet_enlarges_by_whole_numbers(channels):
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (5, 16, 16, channels), np.uint8))
    sheet = sheet_of(images, columns=3)
    assert sheet.shape == (2 * 64 + 2, 3 * 64 + 4, channels + 1)
    for index, image in enumerate(images):
        top, left = index // 3 * 66, index % 3 * 66
        cell = sheet[top : top + 64, left : left + 64]
        assert np.array_equal(cell[::4, ::4, :-1], image)
        assert np.array_equal(cell[3::4, 3::4, :-1], image)
        assert (cell[..., -1] == 255).all()
    assert not sheet[:, 64:66].any()
    assert not sheet[66:, 132:].any()


@pytest.mark.parametrize(("side", "shown"), [(8, 64), (28, 56), (64, 64), (65, 65), (224, 224)])
def test_contact_sheet_leaves_large_images_as_they_are(side, shown):
    image = np.full((side, side, 1), 7, np.uint8)
    assert sheet_of([image]).shape == (shown, shown, 2)


def places(svg):
    return [
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in re.findall(r'<polyline [^>]*points="([^"]*)"', svg)
    ]


def test_line_chart_draws_every_point_in_its_place():
    series = {"a": [(0, 1.0), (1, 3.0), (2, 5.0)], "b": [(0, 5.0), (2, 0.0)]}
    svg = line_chart("Loss", series, x_label="epoch", y_label="loss")
    first, second = places(svg)
    assert [len(first), len(second)] == [3, 2]
    (x0, y0), (x1, y1), (x2, y2) = first
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.1)
    assert second[0] == (x0, y2)
    assert second[1][1] > y0 > y1 > y2
    assert "<title>a: 1, 3</title>" in svg
    assert all(f">{text}<" in svg for text in ("a", "b", "epoch", "loss", "Loss"))


def test_line_chart_with_a_logarithmic_axis():
    points = [(0, 100.0), (1, 1.0), (2, 0.01), (3, 0.0), (4, float("nan"))]
    svg = line_chart("Loss", {"a": points}, x_label="x", y_label="y", log=True)
    ((_, y0), (_, y1), (_, y2)) = places(svg)[0]
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.1)
    empty = line_chart("Loss", {"a": [(0, 0.0)]}, x_label="x", y_label="y", log=True)
    assert "no values" in empty


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 100, False, [0, 20, 40, 60, 80, 100]),
        (3, 3, False, [3, 4]),
        (0, 0, False, [0, 0.2]),
        (-1, 1, False, [-1, -0.5, 0, 0.5, 1]),
        (0.002, 60, True, [0.001, 0.01, 0.1, 1, 10, 100]),
        (0.3, 4, True, [0.2, 0.5, 1, 2, 5]),
        (1, 1, True, [1, 2]),
        (1e-12, 1e12, True, [10.0**p for p in range(-12, 13, 3)]),
    ],
)
def test_axis_ticks(low, high, log, expected):
    assert axis_ticks(low, high, log=log) == pytest.approx(expected)


def test_bar_chart_shows_value_and_spread():
    svg = bar_chart("Accuracy", [("a", 50.0, 2.0), ("b", 100.0, 0.0)], limit=100, unit="%")
    half, whole = (float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', svg))
    assert whole == pytest.approx(2 * half)
    assert svg.count('class="error"') == 1
    assert "50.0 ± 2.0%" in svg
    assert "100.0%" in svg


def test_table_and_page_escape_text():
    table = html_table((HOSTILE, "n"), [(HOSTILE, 1234), ("b", 0.5), ("c", None)])
    assert "<script" not in table
    assert '<td class="n">1,234</td>' in table
    assert '<td class="n">0.50</td>' in table
    chart = line_chart(HOSTILE, {HOSTILE: [(0, 1)]}, x_label=HOSTILE, y_label=HOSTILE)
    bars = bar_chart(HOSTILE, [(HOSTILE, 1, 0)], limit=1)
    html = page(HOSTILE, paragraph(HOSTILE), [(HOSTILE, table + chart + bars)]).decode()
    assert "<script" not in html
    assert 'alert("' not in html


def test_page_takes_text_that_is_not_unicode():
    assert b"\\udcff" in page("\udcff", "", [])


@dataclass(frozen=True)
class Traced:
    """Passes a shard on and reports the trace of a synthesis."""

    version: ClassVar[int] = 1

    def __call__(self, table, context):
        context.metrics["trace"] = [[0.0, 10.0, 90.0], [50.0, 1.0, 9.0 + int(context.shard)]]
        context.metrics["final"] = {"cross_entropy": 0.5, "batchnorm": 4.0}
        return table


def models(path: Path, units: dict[str, tuple[float, list[float]]]) -> Artifact:
    shards = []
    for name, (accuracy, losses) in units.items():
        (path / name).mkdir(parents=True)
        course = [[1, {"accuracy": accuracy + 1}], [2, {"accuracy": accuracy}]]
        contents = {
            "history.json": {"loss": losses, "evaluations": course},
            "network.json": ModelSpec("convnet3", 2, 1, (0.0,), (1.0,)),
        }
        files = []
        for file, content in contents.items():
            (path / name / file).write_bytes(dumps(vars(content) if file[0] == "n" else content))
            files.append(vars(FileEntry.of(LocalStore(path), f"{name}/{file}")))
        metrics = {"accuracy": accuracy, "images": 1234}
        shards.append({"name": name, "files": files, "metrics": metrics})
    manifest = {"kind": "models", "identity": path.name}
    return Artifact.finish(LocalStore(path), manifest, to_table(shards))


def arrays(path: Path, **values: Any) -> Artifact:
    path.mkdir()
    (path / FILE).write_bytes(to_bytes(values))
    files = [vars(FileEntry.of(LocalStore(path), FILE))]
    manifest = {"kind": "arrays", "identity": str(path)}
    return Artifact.finish(LocalStore(path), manifest, to_table([{"name": "a", "files": files}]))


SHOWN: tuple[Arm, ...] = ("distilled-soft", "random-real-soft", "random-real-hard")


@dataclass
class Finished:
    """What the recipe hands to the report, of two classes with two images each."""

    folder: Path
    classes: tuple[str, ...] = (HOSTILE, "cat")
    losses: tuple[float, ...] = (2.0, 1.0)
    scores: tuple[tuple[float, ...], ...] = ((90.0, 92.0), (95.0, 97.0), (80.0, 82.0))
    start: str = "noise"
    pixels: Any = field(default_factory=lambda: np.arange(4 * 16, dtype=np.uint8).reshape(4, 4, 4))

    def page(self, **changes: Any) -> str:
        run = Run(LocalStore(self.folder), LocalExecutor())
        labels = pa.array([0, 1] * 2)
        keys = ["a", "b", "c", "d"]
        images = tensor_column(self.pixels[..., None])
        table = pa.table({"key": keys, "label": labels, "image": images})
        soft = table.select(["key", "label"]).append_column("seed", pa.array([1, 2, 3, 4]))
        soft = soft.append_column("logits", tensor_column(np.zeros((4, 3, 2), np.float16)))

        def source(whole):
            return TableSource((("00000", whole[:2]), ("00001", whole[2:])), self.classes)

        made = run.map("images", source(table), [Traced()], to=WebDatasetFormat())
        decoded = run.map("pixels", source(table), [], to=ParquetFormat())
        labelled = run.map("labels", source(soft), [], to=ZarrFormat())
        pool = run.map("real", source(table), [], to=ParquetFormat())
        real = ChosenSource(pool, tuple(find_places(pool)[key] for key in ("c", "b", "a", "d")), 2)
        teachers = models(self.folder / "teacher", {"model": (99.0, list(self.losses))})
        students = models(
            self.folder / "students",
            {
                f"{arm}-{seed}": (score, [2.0 + seed, 1.0])
                for arm, scores in zip(SHOWN, self.scores, strict=True)
                for seed, score in enumerate(scores)
            },
        )
        nearest = arrays(
            self.folder / "nearest",
            similarity=np.array([0.25, 0.5, 0.75, 0.99], np.float32),
            key=np.frombuffer(b"dcba", np.uint8).reshape(4, 1),
        )
        image = ImageConfig(size=4, channels=1, mean=(0.0,), std=(1.0,))
        config = DistillConfig(
            ipc=2,
            image=image,
            teacher=SqueezeConfig(backbone="convnet3"),
            recover=RecoverConfig(iterations=100, start=self.start),
            seeds=len(self.scores[0]),
            arms=SHOWN,
        )
        relabel = Relabel(teachers, ("model",), ViewSampler(image, 0.5, 1.0, 4), 3, LabelCodec())
        trainings = Trainings(config, 2, relabel, FittedModels(teachers, ("model",)))
        trainings.synthetic(pool, decoded, labelled)
        for seed in range(config.seeds):
            trainings.real(pool, real, labelled, seed)
            trainings.real_hard(pool, real, seed)
        self.evaluation = evaluation_table(trainings, students, teachers, made, labelled, 1000)
        about = {
            "dataset": HOSTILE,
            "classes": list(self.classes),
            "evaluation": self.evaluation,
            "metrics": metrics(self.evaluation),
            "config": {**config.model_dump(mode="json"), "note": HOSTILE},
            "label_store": {"codec": LabelCodec().model_dump(), "views": 3, "group": 4},
            "seed": 5,
            **changes,
        }
        found = Found(
            made, decoded, labelled, real, teachers, students, trainings, nearest, decoded
        )
        return report(about, found, [real.base, made, labelled]).decode()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def html(finished):
    return finished.page()


def test_report_is_the_same_wherever_and_whenever_it_is_made(html, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOSTNAME", "elsewhere")
    assert Finished(tmp_path / "other").page() == html
    assert str(finished.folder) not in html


def test_report_escapes_what_comes_from_data(html):
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_report_refers_to_nothing_outside(html):
    references = re.findall(r"(?:src|href|action|data)\s*=\s*[\"']?([^\"'\s>]+)", html)
    assert references
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    assert not re.search(r"@import|url\(|<link|<script|<iframe|<object", html)
    assert "default-src 'none'" in html


def test_report_shows_the_images_of_each_class(html, finished):
    sheets = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[::16, :, 0]
        for data in re.findall(r"base64,([^\"]+)", html)
    ]
    assert len(sheets) == 5
    rows = {"made": ([0, 2], [1, 3]), "real": ([2, 0], [1, 3])}
    for number, (kind, label) in enumerate([("made", 0), ("real", 0), ("made", 1), ("real", 1)]):
        left, right = sheets[number][:, :64:16], sheets[number][:, 66::16]
        first, second = rows[kind][label]
        assert np.array_equal(left, finished.pixels[first])
        assert np.array_equal(right, finished.pixels[second])


def test_report_shows_the_nearest_real_image_below_each(html, finished, tmp_path):
    sheet = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([^\"]+)", html)[4])))
    )[::, :, 0]
    for column, (made, real) in enumerate(zip(range(4), (3, 2, 1, 0), strict=True)):
        left = 66 * column
        assert np.array_equal(sheet[:64:16, left : left + 64 : 16], finished.pixels[made])
        assert np.array_equal(sheet[66::16, left : left + 64 : 16], finished.pixels[real])
    assert "at least 0.250, in the middle 0.625, at most 0.990" in html
    assert "no pixel was copied" in html
    assert "rights in the real images" in Finished(tmp_path, start="random").page()


def test_report_draws_the_losses_and_counts(html):
    assert "<title>cross-entropy: 0, 10</title>" in html
    assert "<title>BatchNorm statistics: 50, 9.5</title>" in html
    assert "<title>teacher: 2, 1</title>" in html
    assert "<title>synthetic images, soft labels: 1, 2.5</title>" in html
    # Bars, losses of the synthesis, curriculum, teacher, two of students, accuracy against bytes.
    assert html.count("<svg") == 7
    assert "expected and no failure" in html
    assert "1,234 test images" in html
    assert "All images of every class" in html
    for step in ("images", "labels", "real"):
        assert f'<tr><td>{step}</td><td class="n">4</td><td class="n">4</td>' in html


def test_evaluation_table(finished, html):
    first, *_, teacher = finished.evaluation
    sizes = (first.pop("image_bytes"), first.pop("label_bytes"))
    assert first == {
        "arm": "distilled-soft",
        "network": "convnet3",
        "trained_on": ARMS["distilled-soft"],
        "images": 4,
        "accuracy": 91.0,
        "spread": pytest.approx(2**0.5),
        "best": 92.0,
        "seeds": 2,
    }
    assert sizes[0] > 4 * 60
    assert 4 * 3 * 2 * 2 < sizes[1] < 500  # chunks of seeds and logits, and their framing
    assert teacher["trained_on"] == "teacher: real images"
    assert (teacher["images"], teacher["accuracy"], teacher["spread"]) == (1000, 99.0, 0.0)
    assert metrics(finished.evaluation) == {"hlr": None, "ior": -5.0}
    hard = {**first, "arm": "distilled-hard", "accuracy": 40.0}
    assert metrics([*finished.evaluation, hard])["hlr"] == 59.0
    other = [{**row, "network": "resnet20"} for row in finished.evaluation[:-1]]
    assert metrics([*other, {**hard, "network": "resnet20"}, teacher])["hlr"] is None


@pytest.mark.parametrize(
    ("scores", "outcome"),
    [
        (((90, 92), (95, 97), (80, 82)), ("beat random real images with class labels (81.0%) by",)),
        (((90, 92), (95, 97), (80, 82)), ("fall 5.0 points behind random real images with the",)),
        (((90, 92), (80, 80), (95, 97)), ("same kind of labels (80.0%) by 11.0 points",)),
        (((90, 92), (80, 80), (95, 97)), ("fall 5.0 points behind random real images with class",)),
        (((90, 92), (91, 93), (90, 91)), ("are level with", "(90.5%): +0.5 points, within")),
        (((90,), (95,), (80,)), ("one seed of each, so the spread is not known",)),
    ],
)
def test_report_tells_the_outcome_as_it_is(tmp_path, scores, outcome):
    html = Finished(tmp_path, scores=scores).page()
    assert all(text in html for text in outcome)


def test_report_of_a_teacher_with_given_weights(tmp_path):
    finished = Finished(tmp_path, losses=())
    html = finished.page()
    assert finished.evaluation[-1]["trained_on"] == "teacher: given weights"
    assert "Cross-entropy on the real training images" not in html
    assert html.count("<svg") == 6


def test_report_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.recipes.distill_report.CLASSES_SHOWN", 1)
    html = Finished(tmp_path).page()
    assert "The first 2 of 2 images of 1 of 2 classes" in html
    assert html.count("<img") == 3
